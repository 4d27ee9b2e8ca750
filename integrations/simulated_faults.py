"""A rank that fails on purpose after a while, to see that the job survives it."""

import logging
import os
import random
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ft_launcher.integrations.progress import from_rank_0, rank

__all__ = ["SimulatedFaultParams", "simulate"]

SIGNALS = {"rank_killed": signal.SIGKILL, "rank_hung": signal.SIGSTOP}


@dataclass(frozen=True)
class SimulatedFaultParams:
    """Which fault, after `base_delay` seconds from the start of the training and up to `rand_delay` more.

    `fault_type`: `rank_killed`, `rank_hung` (it is stopped) or `random`, one of the two. `rank_to_fail`: any, if None.
    Each start of the ranks has its fault, restarts too.
    """

    fault_type: str
    base_delay: float
    rand_delay: float = 0.0
    rank_to_fail: int | None = None

    def __post_init__(self) -> None:
        if self.fault_type not in (*SIGNALS, "random"):
            raise ValueError(f"fault_type={self.fault_type!r}: must be one of {', '.join(SIGNALS)}, random")
        if self.base_delay < 0 or self.rand_delay < 0:
            raise ValueError("base_delay and rand_delay must not be negative")

    @classmethod
    def of(cls, given: "SimulatedFaultParams | Mapping[str, Any] | None") -> "SimulatedFaultParams | None":
        """Give the parameters that a mapping names (of a configuration file, say)."""
        if given is None or isinstance(given, SimulatedFaultParams):
            return given
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"simulated_fault_params={given!r}: {error}") from None


def simulate(params: SimulatedFaultParams, world_size: int, logger: logging.Logger) -> threading.Timer | None:
    """Start the clock of the fault on the rank that it falls on; its timer, to be cancelled. A collective."""
    if not 0 <= (params.rank_to_fail or 0) < world_size:
        raise ValueError(f"rank_to_fail={params.rank_to_fail}: there are {world_size} ranks")

    def choice() -> tuple[int, str, float]:
        chance = random.SystemRandom()  # not moved by the seed of the training, and not moving it
        at_rank = chance.randrange(world_size) if params.rank_to_fail is None else params.rank_to_fail
        kind = chance.choice(sorted(SIGNALS)) if params.fault_type == "random" else params.fault_type
        return at_rank, kind, params.base_delay + params.rand_delay * chance.random()

    at_rank, kind, delay = from_rank_0(choice)
    if rank() != at_rank:
        return None

    def fail() -> None:
        logger.warning("simulated fault: %s at rank %d (pid %d)", kind, at_rank, os.getpid())
        os.kill(os.getpid(), SIGNALS[kind])

    timer = threading.Timer(delay, fail)
    timer.daemon = True
    timer.start()
    return timer
