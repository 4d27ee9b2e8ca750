"""One Ray actor from its creation to its end: it is initialised, pinged, and killed if it hangs.

Ray's own restarts are not used. Their owner learns of a death 1.8 s late (Ray 2.60 waits for the actor to be back),
the new process answers calls before it is initialised, and `ray.kill` is followed by answers of the old one. Without
them a death is known in 0.01 s, and each incarnation has a handle of its own.
"""

import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorDiedError, RayActorError

from ft_launcher.errors import UsageError
from ft_launcher.integrations.ray_loop import Loop
from ft_launcher.integrations.ray_member import GROUP, GROUP_THREADS, Address, Hello, Init, is_async, supervised
from ft_launcher.integrations.ray_policy import Ailing, Limits, Pulse, Vitals

__all__ = ["Blueprint", "End", "Incarnation", "Observer"]

_OURS = {
    "max_restarts": "set it in RayFaultToleranceConfig",
    "max_task_retries": "set it in RayFaultToleranceConfig",
    "lifetime": "a supervised actor ends with its supervisor",
    "get_if_exists": "a supervised actor is made anew",
}
_RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU"}


class Blueprint:
    """What each incarnation of an actor is made from."""

    def __init__(self, cls: type, options: Mapping[str, Any] | None) -> None:
        """`options`: of ray.remote. Raises UsageError for those that are ours to set, or a class that is not plain."""
        options = dict(options or {})
        for name, instead in _OURS.items():
            if name in options:
                raise UsageError(f"options: {name}={options[name]!r}: must not be there; {instead}")
        groups = {GROUP: GROUP_THREADS, **options.pop("concurrency_groups", {})}
        # Ray's defaults; https://docs.ray.io/en/latest/ray-core/actors/async_api.html
        self.concurrency: int = options.get("max_concurrency", 1000 if is_async(cls) else 1)
        self._options = options
        asked = {resource: options[name] for name, resource in _RESOURCES.items() if options.get(name)}
        self._resources: dict[str, float] = asked | options.get("resources", {})
        # The number of restarts and retries is ours: what Ray would do besides would multiply.
        remote: Any = ray.remote
        self._actor_class = remote(max_restarts=0, max_task_retries=0, concurrency_groups=groups)(supervised(cls))

    def make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], **more: Any) -> Any:
        """Have Ray make one; its handle. `more`: options of this one."""
        return self._actor_class.options(**self._options, **more).remote(*args, **kwargs)

    def lost_options(self, hello: Hello) -> str:
        """Tell which options the actor runs without, though they were given; "" for none."""
        lost = [
            f"{name}={amount:g} (has {hello.resources.get(name, 0):g})"
            for name, amount in self._resources.items()
            if hello.resources.get(name, 0) < amount
        ]
        group = getattr(self._options.get("scheduling_strategy"), "placement_group", None)
        if group is not None and hello.placement_group != group.id.hex():
            lost.append(f"placement group {group.id.hex()} (is in {hello.placement_group})")
        return ", ".join(lost)


class End(NamedTuple):
    """How an incarnation ended."""

    reason: str
    error: Exception
    node_lost: bool = False
    raised: bool = False
    """Its constructor or its initialisation did."""
    is_final: bool = False
    """Another one would end the same way."""


class Observer(NamedTuple):
    """Whom an incarnation tells, in its loop: once `ready`, once `ended`."""

    ready: Callable[["Incarnation", Hello], None]
    ended: Callable[["Incarnation", End], None]


class Incarnation:
    """One. All its methods are for its loop only."""

    def __init__(self, handle: Any, blueprint: Blueprint, loop: Loop, limits: Limits, observer: Observer) -> None:
        self.handle = handle
        self.vitals = Vitals(time.monotonic())
        self.hello: Hello | None = None
        self.end: End | None = None
        self.ran = 0
        """How many calls it was running when it ended."""
        self._blueprint = blueprint
        self._loop, self._limits, self._observer = loop, limits, observer
        self._ping: object | None = None
        self._is_constructed = False
        self._when_constructed: list[Callable[[], None]] = []
        until_the_end = handle._ft_until_the_end.options(concurrency_group=GROUP).remote()  # noqa: SLF001
        self._ask(until_the_end, lambda _result, error: self._end_of(error))
        # Answered as soon as the constructor is done, however long that takes.
        self._ask(handle._ft_ping.options(concurrency_group=GROUP).remote(), self._constructed)  # noqa: SLF001
        if limits.start is not None:
            loop.later(limits.start, self._judge_start)

    def initialise(self, init: Init | None, environment: Mapping[str, str], *args: Any) -> None:
        """Have `init(instance, *args)` run in it; the observer is told when that is done."""

        def begin() -> None:
            self._ask(self.handle._ft_init.remote(init, dict(environment), *args), self._initialised)  # noqa: SLF001

        # Not before: from the first answer on it is known whether it lives, in its initialisation too.
        if self._is_constructed:
            begin()
        else:
            self._when_constructed.append(begin)

    def locate(self, then: Callable[[Address], None]) -> None:
        """Ask it where it is; `then` follows, unless it ends before."""
        located = self.handle._ft_address.remote()  # noqa: SLF001
        self._ask(located, lambda address, error: then(address) if error is None else None)

    def call(self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], done: Callable[..., None]) -> None:
        """Call a method; `done(result, error)` follows in the loop."""
        self._ask(self.handle._ft_call.remote(method, *args, **kwargs), done)  # noqa: SLF001

    def ping(self, then: Callable[[], None] = lambda: None) -> None:
        """Ask it how it is, now; `then` follows once that is known."""
        if self.end is not None or not self._is_constructed:
            then()
            return
        ping = self._ping = object()
        ref = self.handle._ft_ping.options(concurrency_group=GROUP).remote()  # noqa: SLF001
        waiting = [then]

        def finish() -> None:
            if waiting:
                waiting.pop()()

        def over(ailing: Ailing | None) -> None:
            if ailing is not None:
                self.kill(ailing.reason)
            elif self._ping is ping:
                self._plan()
            finish()

        def answered(pulse: Pulse | None, _error: Exception | None) -> None:
            if pulse is None or self.end is not None:
                finish()  # an error is the actor's end, of which we are told besides
            else:
                over(self.vitals.answered(pulse, self._limits))

        def missed() -> None:
            if self.end is not None or self._ping is not ping:
                finish()
            else:
                over(self.vitals.missed_ping(self._limits))

        self._ask(ref, answered)
        self._loop.later(self._limits.ping_timeout, missed)

    def kill(self, reason: str) -> None:
        """End it; asks nobody. The observer is told at once."""
        if self.end is None:
            self._kill()
            self._ended(End(reason, RayActorError(error_msg=reason)))

    def _ask(self, ref: Any, done: Callable[[Any, Exception | None], None]) -> None:
        # Ray calls back in a thread of its own, in which little may be done.
        ref.future().add_done_callback(lambda future: self._loop.post(partial(_deliver, future, done)))

    def _constructed(self, pulse: Pulse | None, _error: Exception | None) -> None:
        if pulse is not None and self.end is None:
            self._is_constructed = True
            self._plan()
            for do in self._when_constructed:
                do()

    def _initialised(self, hello: Hello | None, error: Exception | None) -> None:
        if self.end is not None or isinstance(error, RayActorError):
            return
        if error is not None or hello is None:
            self._kill()
            reason = f"its initialisation raised {_last_line(error)}"
            self._ended(End(reason, error or RayActorError(error_msg=reason), raised=True))
        elif lost := self._blueprint.lost_options(hello):
            self._kill()
            reason = f"runs without what was asked for: {lost}"
            self._ended(End(reason, UsageError(reason), is_final=True))
        else:
            self.hello = hello
            self.vitals.ready(time.monotonic())
            self._observer.ready(self, hello)

    def _kill(self) -> None:
        if ray.is_initialized():
            ray.kill(self.handle)

    def _plan(self) -> None:
        """Ask again when it is time, or when what runs now would be at its limit."""
        now = time.monotonic()
        at_limit = self.vitals.next_look(now, self._limits)
        wait = self._limits.ping_every if at_limit is None else min(self._limits.ping_every, at_limit - now)
        planned = self._ping = object()
        self._loop.later(wait, lambda: self.ping() if self._ping is planned else None)

    def _judge_start(self) -> None:
        ailing = self.vitals.overdue(time.monotonic(), self._limits)
        if ailing is not None:
            self.kill(ailing.reason)

    def _end_of(self, error: Exception | None) -> None:
        if self.end is None and error is not None:
            self.ended_by(error)

    def ended_by(self, error: Exception) -> None:
        """Note that a call gave Ray's error for an actor that is gone, or cannot be reached."""
        if self.end is None:
            if not isinstance(error, ActorDiedError):
                self._kill()  # so that it cannot go on, unreachable, beside the next one
            in_constructor = isinstance(error, RayActorError) and error.actor_init_failed
            reason = f"its constructor raised {_last_line(error)}" if in_constructor else _reason(error)
            node_lost = self.hello is not None and _is_lost(self.hello.node_id)
            self._ended(End(reason, error, node_lost, raised=in_constructor))

    def _ended(self, end: End) -> None:
        self.end = end
        self._observer.ended(self, end)


def _deliver(future: Any, done: Callable[[Any, Exception | None], None]) -> None:
    error = future.exception()
    done(None, error) if error is not None else done(future.result(), None)


def _last_line(error: Exception | None) -> str:
    return str(error).strip().rpartition("\n")[2]


def _reason(error: Exception) -> str:
    """Give what Ray knows in one line: it writes a paragraph, with the actor's data before it."""
    found = re.search(r"The actor is dead because (.+?)(?:\. |\.?$)", str(error), re.MULTILINE)
    return found[1] if found else _last_line(error)


_nodes: Callable[[], list[dict[str, Any]]] = ray.nodes


def _is_lost(node_id: str) -> bool:
    return not any(node["Alive"] for node in _nodes() if node["NodeID"] == node_id)
