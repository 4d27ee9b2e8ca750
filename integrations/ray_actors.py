"""Fault tolerance for Ray actors: independent ones that come back, gangs that start anew, health and metrics.

    critic = SupervisedActor(Critic, (hidden_size,), role="critic", init=load_latest, metrics=metrics)
    values = critic.call("compute_values", batch)

A new process is initialised before any call reaches it. What was lost is sent again, unless it is marked `@no_retry`.
"""

import itertools
import logging
from bisect import insort
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from ray.exceptions import RayActorError

from ft_launcher.integrations.ray_config import RayFaultToleranceConfig
from ft_launcher.integrations.ray_gang import ActorGang, GangRestartedError, Rendezvous, torch_process_group
from ft_launcher.integrations.ray_health import HealthMonitor
from ft_launcher.integrations.ray_incarnation import End, Incarnation, Observer
from ft_launcher.integrations.ray_member import Hello, Init, fuse_roles, may_repeat, no_retry
from ft_launcher.integrations.ray_metrics import ActorMetrics, to_json_lines, to_prometheus, to_tensorboard
from ft_launcher.integrations.ray_policy import Call, Limits, Verdict, after_death
from ft_launcher.integrations.ray_supervised import RestartsExhaustedError, Supervised

__all__ = [
    "ActorGang",
    "ActorMetrics",
    "FaultToleranceConfig",
    "GangRestartedError",
    "HealthMonitor",
    "Limits",
    "PoisonCallError",
    "RayFaultToleranceConfig",
    "Rendezvous",
    "RestartsExhaustedError",
    "SupervisedActor",
    "fuse_roles",
    "no_retry",
    "to_json_lines",
    "to_prometheus",
    "to_tensorboard",
    "torch_process_group",
]

logger = logging.getLogger(__name__)

FaultToleranceConfig = RayFaultToleranceConfig
"""The name that it has in EasyR1. (`ft_launcher.FaultToleranceConfig` is the launcher's own.)"""


class PoisonCallError(RayActorError):
    """This call has ended each actor that it was sent to; the actor itself is there again for others."""


class _Sent:
    """A call with what belongs to its caller."""

    def __init__(self, number: int, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.number, self.call, self.args, self.kwargs = number, call, args, kwargs
        self.answer: Future[Any] = Future()
        self.answer.set_running_or_notify_cancel()


class SupervisedActor(Supervised[None]):
    """One actor that stands for itself, over all its incarnations. Its methods may be used from any thread."""

    def __init__(
        self,
        cls: type,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        role: str | None = None,
        config: RayFaultToleranceConfig | None = None,
        init: Init | None = None,
        options: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        metrics: ActorMetrics | None = None,
        poison_after: int | None = 2,
    ) -> None:
        """Create it; `ready` waits until it is there.

        `cls`: a plain class. `init(instance, restart)` runs in each new process before any call, `restart` being 0 in
        the first one: load what is needed there. `options`: of ray.remote; asserted once the actor is there.
        `config`: None is `RayFaultToleranceConfig.resolve()`. `limits`: when it is taken for hung. `poison_after`: the
        number of processes that one call may end. Raises UsageError.
        """
        super().__init__(cls, options or {}, role, config, limits, metrics)
        self._args, self._kwargs, self._init = args, dict(kwargs or {}), init
        self._poison_after = poison_after
        self._numbers = itertools.count()
        self._waiting: list[_Sent] = []  # in the order of their numbers
        self._in_flight: list[_Sent] = []
        self._current: Incarnation | None = None
        self._loop.post(self._start)

    # -- for any thread -------------------------------------------------------------------------------------------

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the actor, and wait for its result: `submit(...).result()`."""
        return self.submit(method, *args, **kwargs).result()

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a method of the actor. Raises AttributeError where it has none of that name.

        The future raises what the method raised, PoisonCallError, RestartsExhaustedError, or Ray's RayActorError where
        the call is lost and is not to be sent again.
        """
        sent = _Sent(next(self._numbers), Call(method, may_repeat(self._class, method)), args, kwargs)
        self._loop.post(partial(self._enqueue, sent))
        return sent.answer

    def check(self) -> "Future[bool]":
        """Ask it now how it is. The future is True when it is initialised and has answered."""
        answer: Future[bool] = Future()

        def look() -> None:
            current = self._current
            if current is None or self._ended is not None:
                answer.set_result(False)
            else:
                current.ping(lambda: answer.set_result(current is self._current and self.is_healthy))

        self._loop.post(look)
        return answer

    @property
    def is_healthy(self) -> bool:
        """It is initialised, and answered the last ping."""
        current = self._current
        return current is not None and current.end is None and current.vitals.is_healthy

    @property
    def pid(self) -> int | None:
        """Of the present process; None while there is none that is initialised."""
        current = self._current
        return None if current is None or current.hello is None else current.hello.pid

    @property
    def handle(self) -> Any:
        """Ray's handle of the present incarnation, for what cannot be called through here; None while there is none."""
        current = self._current
        return None if current is None else current.handle

    # -- in the loop ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        try:
            handle = self._blueprint.make(self._args, self._kwargs)
        except Exception as error:  # noqa: BLE001  # Ray refuses options in many ways
            self._give_up(error)
            return
        observer = Observer(self._on_ready, self._on_end)
        self._current = Incarnation(handle, self._blueprint, self._loop, self._limits, observer)
        self._current.initialise(self._init, {}, self._budget.used)

    def _on_ready(self, _incarnation: Incarnation, hello: Hello) -> None:
        if self._budget.used:
            logger.info("%s: initialised again (pid %d)", self.role, hello.pid)
        if not self._ready.done():
            self._ready.set_result(None)
        self._send()

    def _on_end(self, incarnation: Incarnation, end: End) -> None:
        if self._ended is not None:
            return
        incarnation.ran = len(self._in_flight)
        names = dict.fromkeys(repr(sent.call.method) for sent in self._in_flight)
        running = f", with {' and '.join(names)}" if names else ""
        pid = "not initialised yet" if incarnation.hello is None else f"pid {incarnation.hello.pid}"
        what = f"{self.role} ({pid}{running}): {end.reason}"
        never_ran = end.raised and not self._ready.done()
        self._was_lost(what, end.error, end.error if end.is_final or never_ran else None)

    def _fail_calls(self, error: Exception) -> None:
        waiting, self._waiting = self._waiting, []
        for sent in waiting:
            sent.answer.set_exception(error)

    def _enqueue(self, sent: _Sent) -> None:
        if self._ended is not None:
            sent.answer.set_exception(self._ended)
            return
        self._waiting.append(sent)
        self._send()

    def _send(self) -> None:
        """Send as many as it runs at a time: then a death is due to those that were sent, and loses no others."""
        current = self._current
        while self._waiting and current is not None and current.hello is not None and current.end is None:
            goes_alone = any(each[0].call.goes_alone for each in (self._waiting, self._in_flight) if each)
            if len(self._in_flight) >= (1 if goes_alone else self._blueprint.concurrency):
                return
            sent = self._waiting.pop(0)
            self._in_flight.append(sent)
            try:
                current.call(sent.call.method, sent.args, sent.kwargs, partial(self._on_answer, current, sent))
            except Exception as error:  # noqa: BLE001  # an argument that cannot be pickled
                self._in_flight.remove(sent)
                sent.answer.set_exception(error)

    def _on_answer(self, incarnation: Incarnation, sent: _Sent, result: Any, error: Exception | None) -> None:
        if sent.answer.done():
            return  # closed
        if isinstance(error, RayActorError):
            incarnation.ended_by(error)
            self._in_flight.remove(sent)
            self._decide(incarnation, sent, error)
        else:
            self._in_flight.remove(sent)
            sent.answer.set_result(result) if error is None else sent.answer.set_exception(error)
        self._send()

    def _decide(self, incarnation: Incarnation, sent: _Sent, error: RayActorError) -> None:
        call = sent.call
        verdict = after_death(
            call,
            was_alone=incarnation.ran == 1,
            node_lost=incarnation.end is not None and incarnation.end.node_lost,
            config=self._config,
            poison_after=self._poison_after,
        )
        if verdict is Verdict.SEND and self._ended is None:
            insort(self._waiting, sent, key=lambda each: each.number)
            return
        logger.error("%s: the call of %r is given up: %s", self.role, call.method, verdict.value)
        if verdict is Verdict.POISON:
            why = f"{self.role}: {call.method!r} ended {call.crashes} processes that it was sent to"
            sent.answer.set_exception(PoisonCallError(error_msg=why))
        else:
            sent.answer.set_exception(error if self._ended is None else self._ended)

    def _kill(self) -> None:
        # What is in flight is not answered any more.
        self._waiting, self._in_flight = [*self._in_flight, *self._waiting], []
        if self._current is not None:
            self._current.kill("closed")
