"""How a training loop shows that it moves: by heartbeats or by sections, with timeouts learned for the next run."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ft_launcher import RankMonitorClient, RankMonitorClientError

__all__ = [
    "FINISHED_FLAG_ENV",
    "SECTIONS",
    "Heartbeats",
    "Sections",
    "Seen",
    "StateFile",
    "finish",
    "from_rank_0",
    "require_finished_flag",
    "tell",
]

FINISHED_FLAG_ENV = "FAULT_TOL_FINISHED_FLAG_FILE"
"""Names the file whose presence ends the loop of a job script that starts a training again and again."""

SECTIONS = frozenset({"setup", "step", "checkpointing"})
"""`setup`: until the first batch. `step`: a batch of any kind. `checkpointing`: a checkpoint is saved or removed."""

HEARTBEAT_ITERATIONS = 2
"""Batches before the timeouts of heartbeats are learned: the first one is slower than the others."""

STEP_ITERATIONS = 16
"""Batches before the timeout of a step is learned: it is tighter, so it must have seen more."""


LEAST_SECONDS = 3.0
"""No learned timeout is shorter: five times some milliseconds are soon over on a busy machine."""


@dataclass
class Seen:
    """What this process has seen of its training: the same on all ranks, as learning is a collective."""

    iterations: int = 0
    has_loaded: bool = False
    saves: int = 0
    is_last: bool = False
    """Nothing of this training comes after it."""


class Heartbeats:
    """Shows progress by a heartbeat wherever something begins or ends; learns its timeouts once in a run.

    The first one is sent when the first batch begins, so that the initial timeout covers the loading of a checkpoint.
    """

    file_name = "_ft_state.json"

    def __init__(self, client: RankMonitorClient, *, learns: bool) -> None:
        if client.is_initialized and not client.hb_timeouts.are_valid and not learns:
            raise ValueError(
                "nothing would watch the heartbeats: set initial_rank_heartbeat_timeout and rank_heartbeat_timeout, "
                "or calculate_timeouts=True"
            )
        self._client = client
        self._has_begun = False
        self._has_learned = not learns

    def enter(self, section: str) -> None:
        """Say that a part of the training begins."""
        if section != "setup":
            self._has_begun = True
            self.beat()

    def leave(self) -> None:
        """Say that what went on has ended."""
        self.beat()

    def beat(self) -> None:
        """Say that something within goes on."""
        if self._has_begun and self._client.is_initialized:
            self._client.send_heartbeat()

    @contextmanager
    def during(self, section: str) -> Iterator[None]:
        """Say that a part begins and ends."""
        self.enter(section)
        try:
            yield
        finally:
            self.leave()

    def learn(self, seen: Seen) -> bool:
        """Learn the timeouts if enough has been seen, and say whether it was. A collective."""
        if self._has_learned or seen.iterations < HEARTBEAT_ITERATIONS or not seen.saves or _is_alone():
            return False
        configured = self._client.hb_timeouts.initial
        self._has_learned = self._client.calculate_and_set_hb_timeouts(skip_if_not_ready=True)
        if self._has_learned:
            state = self._client.state_dict()
            limits = state["current_timeouts"]["heartbeat"]
            limits["subsequent"] = max(limits["subsequent"], LEAST_SECONDS)
            # A fresh start says nothing of the time that a resumed one takes to load its checkpoint.
            limits["initial"] = max(limits["initial"], LEAST_SECONDS) if seen.has_loaded else configured
            self._client.load_state_dict(state)
        return self._has_learned


class Sections:
    """Shows progress by sections, of which one is open at a time; learns their timeouts as they have been seen.

    One at a time, because a checkpoint that is saved within a step must not count for the step.
    """

    file_name = "_ft_state_.json"

    def __init__(self, client: RankMonitorClient, *, learns: bool) -> None:
        configured = frozenset(client.cfg.rank_section_timeouts) if client.cfg else SECTIONS
        if configured != SECTIONS:
            raise ValueError(
                f"rank_section_timeouts must have the sections {', '.join(sorted(SECTIONS))} and no other; "
                f"it has {', '.join(sorted(configured)) or 'none'}"
            )
        self._client = client
        self._learns = learns
        self._saves_learned = 0
        self._open: str | None = None
        self.saves_in_background = False
        """A save returns before it is done, so that the time it takes says nothing of the next one."""

    def enter(self, section: str) -> None:
        """Open `section`, and close the one that is open, if its end was not told."""
        self.leave()
        if self._client.is_initialized:
            self._client.start_section(section)
            self._open = section

    def leave(self) -> None:
        """Close the section that is open, if one is."""
        if self._open is not None and self._client.is_initialized:
            self._client.end_section(self._open)
        self._open = None

    def beat(self) -> None:
        """Do nothing: what goes on within a section does not move its timeout."""

    @contextmanager
    def during(self, section: str) -> Iterator[None]:
        """Open a section for a while, and the one that was open anew afterwards."""
        before = self._open
        if before != section:
            self.enter(section)
        try:
            yield
        finally:
            if before is None:
                self.leave()
            elif before != section:
                self.enter(before)

    def learn(self, seen: Seen) -> bool:
        """Learn, after a save and at the end, the timeouts of what has been seen enough; say whether there was any.

        A collective.
        """
        if not self._learns or _is_alone() or not (seen.is_last or seen.saves > self._saves_learned):
            return False
        self._saves_learned = seen.saves
        enough = {
            "setup": seen.has_loaded,  # a fresh start says nothing of a resumed one
            "step": seen.iterations >= STEP_ITERATIONS,
            "checkpointing": seen.saves > 0 and not self.saves_in_background,
        }
        names = sorted(name for name, is_enough in enough.items() if is_enough)
        if not names:
            return False
        # What comes between the sections has been seen at the end of a run that had all of them.
        outside = seen.is_last and seen.has_loaded and seen.saves > 0 and seen.iterations >= STEP_ITERATIONS
        if not self._client.calculate_and_set_section_timeouts(names, outside, skip_if_not_ready=True):
            return False
        state = self._client.state_dict()
        limits = state["current_timeouts"]["section"]
        limits["section"] |= {name: max(limits["section"][name], LEAST_SECONDS) for name in names}
        if outside:
            limits["out_of_section"] = max(limits["out_of_section"], LEAST_SECONDS)
        self._client.load_state_dict(state)
        return True


class StateFile:
    """The learned timeouts, as a file that the next run reads; rank 0 reads and writes it for all ranks."""

    def __init__(self, directory: Path, name: str, logger: logging.Logger) -> None:
        self._path = directory / "ft_state" / name
        self._logger = logger

    def load_into(self, client: RankMonitorClient) -> None:
        """Put the timeouts of an earlier run in force, if there are any. A collective."""
        state = from_rank_0(self._read)
        if not state or not client.is_initialized:
            return
        try:
            client.load_state_dict(state)
        except RankMonitorClientError as error:
            self._logger.warning("%s: %s; the configured timeouts stay", self._path, error)
        else:
            self._logger.info("timeouts loaded from %s", self._path)

    def save(self, client: RankMonitorClient) -> None:
        """Write the timeouts in force, all of them or nothing."""
        if rank() != 0:
            return
        temporary = self._path.with_suffix(".tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(client.state_dict()))
            temporary.replace(self._path)
        except OSError as error:  # a full disk is no reason to end a training that needs no new timeouts
            self._logger.warning("the timeouts were not saved: %s", error)
        else:
            self._logger.info("timeouts calculated and saved in %s", self._path)

    def _read(self) -> Any:
        try:
            return json.loads(self._path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._logger.warning("%s: %s; the configured timeouts stay", self._path, error)
            return None


def rank() -> int:
    """Give this process's rank, 0 for one that is alone."""
    return 0 if _is_alone() else dist.get_rank()


def _is_alone() -> bool:
    # Timeouts are calculated over a process group, which a training on one rank usually has not.
    return not dist.is_available() or not dist.is_initialized()


def from_rank_0(value: Any) -> Any:
    """Give on all ranks what `value()` gives on rank 0; only there it is called. A collective."""
    held = [value() if rank() == 0 else None]
    if not _is_alone():
        dist.broadcast_object_list(held, src=0)
    return held[0]


def tell(report: Callable[[Any, int | None], bool], path: Any, step: int | None, logger: logging.Logger) -> None:
    """Call `report_resume` or `report_checkpoint` of a client; what is wrong with a path ends no training."""
    try:
        report(path, step)
    except RankMonitorClientError as error:
        logger.warning("%s; the launcher does not know of it", error)


def require_finished_flag() -> None:
    """Raise unless the job script has said which file says that the training is finished."""
    if not os.environ.get(FINISHED_FLAG_ENV):
        raise ValueError(
            f"autoresume=True needs the variable {FINISHED_FLAG_ENV}: the file that is made when the training is "
            "finished, and that the job script looks for before it starts it again"
        )


def finish(why: str, logger: logging.Logger) -> None:
    """Make the file that tells the job script not to start the training again. Never raises: the training is done."""
    path = os.environ.get(FINISHED_FLAG_ENV)
    if path:
        try:
            Path(path).write_text(why + "\n")
        except OSError as error:
            logger.error("the job script will start this training again: %s", error)  # noqa: TRY400
