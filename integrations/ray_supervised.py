"""What an actor and a gang have in common: a budget of restarts, a thread in which all happens, and an end."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, TypeVar

from ray.exceptions import RayActorError

from ft_launcher.integrations.ray_config import RayFaultToleranceConfig
from ft_launcher.integrations.ray_incarnation import Blueprint
from ft_launcher.integrations.ray_loop import Loop
from ft_launcher.integrations.ray_metrics import ActorMetrics
from ft_launcher.integrations.ray_policy import Budget, Limits

__all__ = ["RestartsExhaustedError", "Supervised"]

logger = logging.getLogger(__name__)

Start = TypeVar("Start")
Self = TypeVar("Self", bound="Supervised[Any]")


class RestartsExhaustedError(RayActorError):
    """It has died, and its restarts are used up."""


class Supervised(ABC, Generic[Start]):
    """Its public methods may be used from any thread. Close it, or use it as a context manager."""

    def __init__(
        self,
        cls: type,
        options: Mapping[str, Any],
        role: str | None,
        config: RayFaultToleranceConfig | None,
        limits: Limits | None,
        metrics: ActorMetrics | None,
    ) -> None:
        """Raises UsageError."""
        self._config = RayFaultToleranceConfig.resolve() if config is None else config
        self._class, self._blueprint = cls, Blueprint(cls, options)
        self.role = role or cls.__name__
        self._limits = (limits or Limits()).heeding(self._config)
        self._metrics = metrics or ActorMetrics()
        self._budget = Budget.of(self._config)
        self._ended: Exception | None = None
        self._ready: Future[Start] = Future()
        self._loop = Loop(f"ft-ray-{self.role}")

    # -- for any thread -------------------------------------------------------------------------------------------

    def ready(self, timeout: float | None = None) -> Start:
        """Wait until it has been initialised once; at most `timeout` seconds. Raises TimeoutError, or why it ended.

        Of a gang: gives the step to start from.
        """
        return self._ready.result(timeout)

    @abstractmethod
    def check(self) -> "Future[bool]":
        """Ask it now how it is. The future is True when it is initialised and has answered; of a gang, all of it."""

    @property
    def restarts(self) -> int:
        """How often it has been started again."""
        return self._budget.used

    def close(self) -> None:
        """End it; what was not answered raises RayActorError."""
        self._loop.post(self._close)
        self._loop.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- in the loop ----------------------------------------------------------------------------------------------

    @abstractmethod
    def _start(self) -> None:
        """Make what is supervised, for the first time or anew."""

    @abstractmethod
    def _kill(self) -> None:
        """End what is there, for good."""

    @abstractmethod
    def _fail_calls(self, error: Exception) -> None:
        """Give this answer to all calls that wait for one."""

    def _was_lost(self, what: str, cause: Exception | None, final: Exception | None, whole: str = "") -> None:
        """Start anew, or give up: for `final`, or because the restarts are used up."""
        self._metrics.failed(self.role)
        if final is not None:
            logger.error("%s", what)
            self._give_up(final)
        elif self._budget.spend():
            logger.error("%s; %s%s", what, self._budget, whole)
            self._metrics.restarted(self.role)
            self._start()
        else:
            exhausted = RestartsExhaustedError(error_msg=f"{what}; no restart left of {self._budget.limit}")
            exhausted.__cause__ = cause
            logger.error("%s", exhausted)
            self._give_up(exhausted)

    def _give_up(self, error: Exception) -> None:
        self._ended = error
        if not self._ready.done():
            self._ready.set_exception(error)
        self._fail_calls(error)

    def _close(self) -> None:
        self._ended = self._ended or RayActorError(error_msg=f"{self.role}: closed")
        self._kill()
        self._give_up(self._ended)
