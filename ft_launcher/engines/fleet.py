"""Decides about rollout engines: who is probed, refreshed, served from, killed and started again, and when.

Pure: every method takes an event and the time and gives back what is to be done; the supervisor does it and tells the
outcome as another event. An event about a process carries its incarnation, and is dropped when that is no longer the
slot's: nothing that was decided about a dead engine reaches the one that took its place.
"""

from collections.abc import Iterable
from enum import Enum
from math import inf
from typing import TypeAlias

from msgspec import Struct

from ft_launcher.engines.config import EngineConfig

__all__ = [
    "Action",
    "Deregister",
    "Fleet",
    "Kill",
    "Probe",
    "Refresh",
    "Register",
    "Slot",
    "Spawn",
    "State",
]


class State(Enum):
    """Where an engine is. Only SERVING and SUSPECT ones are given requests."""

    STOPPED = "stopped"
    STARTING = "starting"
    """Its process runs, and has not answered yet."""
    WAITING = "waiting"
    """Somebody else's engine, that does not answer yet, or no more."""
    LOADED = "loaded"
    """It answers, with weights that nobody has looked at."""
    REFRESHING = "refreshing"
    """It is being given the current weights."""
    REGISTERING = "registering"
    """It has the current weights; the router is being told."""
    SERVING = "serving"
    SUSPECT = "suspect"
    """It serves, and has missed probes."""
    FAILED = "failed"
    """It is being taken away: from the router, then by its processes."""
    DEAD = "dead"
    """Nothing is left of it."""
    RETIRED = "retired"
    """It has used up its restarts."""


_ROUTED = (State.SERVING, State.SUSPECT)
_ALIVE = (State.STARTING, State.LOADED, State.REFRESHING, State.REGISTERING, State.SERVING, State.SUSPECT)


class Spawn(Struct, frozen=True):
    """Start this incarnation's process; then `spawned`, and `exited` when it ends."""

    name: str
    incarnation: int


class Probe(Struct, frozen=True):
    """Ask the engine whether it works, under the configured deadline; then `probed`."""

    name: str
    incarnation: int


class Refresh(Struct, frozen=True):
    """Give the engine the weights of `version`; then `refreshed`."""

    name: str
    incarnation: int
    version: str


class Register(Struct, frozen=True):
    """Have the router send requests to the engine; then `registered`."""

    name: str
    incarnation: int


class Deregister(Struct, frozen=True):
    """Have the router send no more requests; nothing waits for it."""

    name: str
    incarnation: int


class Kill(Struct, frozen=True):
    """End all that this incarnation has started, and see that it is gone; then `gone`. Nothing to kill: the same."""

    name: str
    incarnation: int


Action: TypeAlias = Spawn | Probe | Refresh | Register | Deregister | Kill


class Slot(Struct):
    """The place of one engine, and what is known of the one that has it."""

    name: str
    is_external: bool
    state: State = State.STOPPED
    incarnation: int = 0
    version: str | None = None  # of its weights, as far as somebody has seen to them
    wanted: str | None = None  # what a refresh under way will bring
    failures: int = 0  # probes missed in a row
    reason: str = ""  # why it failed last
    since: float = 0.0
    grace_until: float = -inf
    probe_at: float = inf
    is_probing: bool = False
    is_killing: bool = False
    is_requested: bool = False
    failed_in_a_row: int = 0  # times since it served
    restart_at: float = -inf
    restarts: tuple[float, ...] = ()  # times of those that count

    @property
    def is_routed(self) -> bool:
        """It may be given requests."""
        return self.state in _ROUTED


class Fleet:
    """All engines of one supervisor."""

    def __init__(self, config: EngineConfig, names: Iterable[str], *, external: Iterable[str] = ()) -> None:
        outside = set(external)
        self.config = config
        self.slots = {name: Slot(name, name in outside) for name in [*names, *sorted(outside)]}
        self.version: str | None = None
        self.in_round = False
        self.is_closing = False
        self._paused: dict[str, int] = {}
        self._sweep_at = inf
        self._sweep: set[tuple[str, int]] = set()
        self._is_forced = False
        self._has_waited = False

    # -- what can be asked ----------------------------------------------------------------------------------------

    @property
    def is_paused(self) -> bool:
        """Somebody holds a pause."""
        return bool(self._paused)

    @property
    def is_quiet(self) -> bool:
        """No probe and no kill is under way."""
        return not any(slot.is_probing or slot.is_killing for slot in self.slots.values())

    @property
    def is_checked(self) -> bool:
        """No sweep is wanted or under way."""
        return not self._is_forced and not self._sweep

    @property
    def is_stopped(self) -> bool:
        """Nothing runs."""
        return all(slot.state is State.STOPPED for slot in self.slots.values())

    def serving(self) -> list[Slot]:
        """Give those that may be given requests."""
        return [slot for slot in self.slots.values() if slot.is_routed]

    def capacity(self) -> int:
        """Give how many engines serve, or may serve again."""
        return sum(slot.state is not State.RETIRED for slot in self.slots.values())

    def due(self) -> float:
        """Give when `tick` is to be called next; inf: only events matter."""
        if self.is_closing or self.is_paused:
            return inf
        times = [self._sweep_at if not self._sweep else inf]
        for slot in self.slots.values():
            if slot.state in (State.STARTING, State.WAITING):
                times.append(inf if slot.is_probing else slot.probe_at)
            if slot.state is State.STARTING:
                times.append(slot.since + self.config.startup_timeout)
            if slot.state is State.DEAD and self._may_restart(slot):
                times.append(slot.restart_at)
        return min(times)

    # -- events ---------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        """Start all."""
        self._sweep_at = now + self.config.health_check_interval
        for slot in self.slots.values():
            slot.state = State.WAITING if slot.is_external else State.DEAD
            slot.incarnation += slot.is_external
            slot.probe_at = now
        return self._follow(now)

    def tick(self, now: float) -> list[Action]:
        """Do what is due."""
        for slot in self.slots.values():
            if slot.state is State.STARTING and now >= slot.since + self.config.startup_timeout:
                self._fail(slot, f"it has not answered within {self.config.startup_timeout:g} s of its start", now)
        return self._follow(now)

    def exited(self, name: str, incarnation: int, how: str, now: float) -> list[Action]:
        """The engine's process has ended, asked or not."""
        slot = self._current(name, incarnation)
        if slot is not None and slot.state in _ALIVE:
            self._fail(slot, how, now)
        return self._follow(now)

    def probed(self, name: str, incarnation: int, problem: str, now: float) -> list[Action]:
        """A probe has ended; `problem` is empty when the engine works."""
        slot = self.slots[name]
        self._sweep.discard((name, incarnation))
        if slot.incarnation == incarnation:
            slot.is_probing = False
            self._hear_probe(slot, problem, now)
        if not self._sweep:
            self._judge(now)
        return self._follow(now)

    def refreshed(self, name: str, incarnation: int, version: str, problem: str, now: float) -> list[Action]:
        """A refresh has ended: the engine has the weights of `version`, or `problem` says why not."""
        slot = self._current(name, incarnation)
        if slot is not None and slot.state is State.REFRESHING and slot.wanted == version:
            slot.wanted = None
            if problem:
                self._fail(slot, f"its weights were not refreshed: {problem}", now)
            else:
                slot.version = version
                # The version may have moved meanwhile: then it is refreshed again.
                self._enter(slot, State.LOADED, now)
        return self._follow(now)

    def registered(self, name: str, incarnation: int, problem: str, now: float) -> list[Action]:
        """The router knows the engine, or `problem` says why not."""
        slot = self._current(name, incarnation)
        if slot is not None and slot.state is State.REGISTERING:
            if problem:
                self._fail(slot, f"the router did not take it: {problem}", now)
            else:
                self._enter(slot, State.SERVING, now)
                slot.failed_in_a_row, slot.reason = 0, ""
        return self._follow(now)

    def gone(self, name: str, incarnation: int, now: float) -> list[Action]:
        """Nothing of this incarnation runs any more."""
        slot = self._current(name, incarnation)
        if slot is not None and slot.is_killing:
            slot.is_killing = False
            if self.is_closing:
                self._enter(slot, State.STOPPED, now)
            elif slot.is_external:
                self._enter(slot, State.WAITING, now)
                slot.incarnation += 1
                slot.probe_at = now + self.config.health_check_interval
            else:
                self._enter(slot, State.DEAD, now)
        return self._follow(now)

    def set_version(self, version: str, now: float) -> list[Action]:
        """From now on only these weights may serve."""
        actions: list[Action] = []
        if version != self.version:
            self.version = version
            for slot in self.slots.values():
                if slot.state in (*_ROUTED, State.REGISTERING) and slot.version != version:
                    # At once, also during a pause: no request may reach it with the old ones.
                    actions.append(Deregister(slot.name, slot.incarnation))
                    self._enter(slot, State.LOADED, now)
        return actions + self._follow(now)

    def pause(self, reason: str, now: float) -> list[Action]:
        """Start nothing, probe nothing, kill nothing until `resume` is called as often. Wait for `is_quiet`."""
        self._paused[reason] = self._paused.get(reason, 0) + 1
        return self._follow(now)

    def resume(self, reason: str, now: float) -> list[Action]:
        """Give one pause back. KeyError when there is none of this reason."""
        self._paused[reason] -= 1
        if not self._paused[reason]:
            del self._paused[reason]
        if not self.is_paused:
            # Those that were due meanwhile are not due all at once, and an engine that slept has to wake up.
            self._sweep_at = max(self._sweep_at, now + self.config.health_check_interval)
        return self._follow(now)

    def begin_round(self, now: float) -> list[Action]:
        """Requests are being sent: engines that die are started again after it, but for `min_serving` of them."""
        self.in_round = True
        return self._follow(now)

    def end_round(self, now: float) -> list[Action]:
        """The round is over: look at all engines once more (until `is_checked`), and start again what has died."""
        self.in_round = False
        self._is_forced = True
        return self._follow(now)

    def request_restart(self, name: str, now: float) -> list[Action]:
        """Kill an engine and start it again; a retired one gets a new budget. KeyError for an unknown name."""
        slot = self.slots[name]
        if slot.state is State.RETIRED:
            slot.restarts, slot.failed_in_a_row = (), 0
            self._enter(slot, State.DEAD, now)
        slot.is_requested = True
        if slot.state in _ALIVE:
            self._fail(slot, "a restart was asked for", now)
        return self._follow(now)

    def close(self, now: float) -> list[Action]:
        """End everything; until `is_stopped`."""
        self.is_closing = True
        return self._follow(now)

    # -- how ------------------------------------------------------------------------------------------------------

    def _current(self, name: str, incarnation: int) -> Slot | None:
        slot = self.slots[name]
        return slot if slot.incarnation == incarnation else None

    def _enter(self, slot: Slot, state: State, now: float) -> None:
        slot.state, slot.since = state, now

    def _hear_probe(self, slot: Slot, problem: str, now: float) -> None:
        if slot.state in (State.STARTING, State.WAITING):
            if problem:
                slot.probe_at = now + min(self.config.ready_interval, self.config.health_check_interval)
                return
            slot.failures, slot.version = 0, None
            slot.grace_until = now + self.config.health_check_first_wait
            self._enter(slot, State.LOADED, now)
        elif slot.is_routed:
            if not problem:
                slot.failures, slot.grace_until = 0, -inf
                slot.state = State.SERVING
            elif now >= slot.grace_until:
                slot.failures += 1
                slot.reason = problem
                slot.state = State.SUSPECT

    def _judge(self, now: float) -> None:
        """At the end of a sweep: give up those that missed too many, unless that many cannot be their own fault."""
        routed = self.serving()
        lost = [slot for slot in routed if slot.failures >= self.config.health_check_failures]
        is_mass = len(routed) > 1 and len(lost) > self.config.mass_failure_fraction * len(routed)
        if is_mass and not self._has_waited:
            self._has_waited = True
            return
        self._has_waited = False
        for slot in lost:
            self._fail(slot, slot.reason, now)

    def _fail(self, slot: Slot, reason: str, now: float) -> None:
        slot.reason, slot.failures, slot.wanted, slot.version = reason, 0, None, None
        slot.failed_in_a_row += 1
        self._enter(slot, State.FAILED, now)

    def _follow(self, now: float) -> list[Action]:
        """Do what follows from how things are, whatever has led there."""
        actions: list[Action] = []
        for slot in self.slots.values():
            if self.is_closing:
                actions += self._stop(slot, now)
            elif not self.is_paused:
                actions += self._lead_on(slot, now)
        if not self.is_closing and not self.is_paused:
            actions += self._probes(now)
        return actions

    def _stop(self, slot: Slot, now: float) -> list[Action]:
        if slot.is_killing or slot.state is State.STOPPED:
            return []
        if slot.state in (State.DEAD, State.RETIRED, State.WAITING):
            self._enter(slot, State.STOPPED, now)
            return []
        slot.reason = "the supervisor ends"
        self._enter(slot, State.FAILED, now)
        slot.is_killing = True
        return [Deregister(slot.name, slot.incarnation), Kill(slot.name, slot.incarnation)]

    def _lead_on(self, slot: Slot, now: float) -> list[Action]:
        actions: list[Action] = []
        if slot.state is State.FAILED and not slot.is_killing:
            slot.is_killing = True
            actions = [Deregister(slot.name, slot.incarnation), Kill(slot.name, slot.incarnation)]
        if slot.state is State.DEAD and self._may_restart(slot) and now >= slot.restart_at:
            actions += self._start_again(slot, now)
        if slot.state is State.LOADED:
            if self.version is not None and slot.version != self.version:
                slot.wanted = self.version
                self._enter(slot, State.REFRESHING, now)
                actions.append(Refresh(slot.name, slot.incarnation, self.version))
            else:
                self._enter(slot, State.REGISTERING, now)
                actions.append(Register(slot.name, slot.incarnation))
        return actions

    def _may_restart(self, slot: Slot) -> bool:
        if slot.incarnation == 0 or slot.is_requested or not self.in_round:
            return True
        alive = sum(each.state in _ALIVE for each in self.slots.values())
        return alive < self.config.min_serving

    def _start_again(self, slot: Slot, now: float) -> list[Action]:
        counts = slot.incarnation > 0 and not slot.is_requested
        if counts:
            recent = tuple(at for at in slot.restarts if at > now - self.config.restart_window)
            if len(recent) >= self.config.max_restarts:
                self._enter(slot, State.RETIRED, now)
                return []
            slot.restarts = (*recent, now)
        slot.is_requested = False
        slot.incarnation += 1
        slot.probe_at, slot.is_probing, slot.failures = now, False, 0
        # The next one after this waits longer, unless it has served in between.
        slot.restart_at = now + self.config.backoff(slot.failed_in_a_row + 1)
        self._enter(slot, State.STARTING, now)
        return [Spawn(slot.name, slot.incarnation)]

    def _probes(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for slot in self.slots.values():
            if slot.state in (State.STARTING, State.WAITING) and not slot.is_probing and now >= slot.probe_at:
                slot.is_probing = True
                actions.append(Probe(slot.name, slot.incarnation))
        if not self._sweep and (self._is_forced or now >= self._sweep_at):
            self._sweep_at = now + self.config.health_check_interval
            self._is_forced = False
            for slot in self.serving():
                slot.is_probing = True
                self._sweep.add((slot.name, slot.incarnation))
                actions.append(Probe(slot.name, slot.incarnation))
        return actions
