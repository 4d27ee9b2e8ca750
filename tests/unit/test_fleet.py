"""The decisions about engines, against a world of random events: E10 and what every state promises."""

import itertools
import random
from collections.abc import Iterator
from math import inf

import pytest

from ft_launcher.engines.config import EngineConfig
from ft_launcher.engines.fleet import Action, Deregister, Fleet, Kill, Probe, Refresh, Register, Spawn, State

CONFIG = EngineConfig(
    health_check_first_wait=3.0,
    health_check_interval=2.0,
    health_check_timeout=1.0,
    health_check_failures=2,
    startup_timeout=20.0,
    ready_interval=0.5,
    max_restarts=3,
    restart_window=100.0,
    min_serving=1,
)


class World:
    """What a fleet's actions do, as fast or late as chance will have it, and what must hold whatever comes."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.fleet = Fleet(CONFIG, ["a", "b", "c", "d"], external=["x"])
        self.pending: list[Action] = []
        self.alive: dict[str, set[int]] = {name: set() for name in self.fleet.slots}
        self.weights: dict[tuple[str, int], str | None] = {}
        self.routed: dict[str, bool] = dict.fromkeys(self.fleet.slots, False)
        self.pauses = 0
        self.versions = 0
        self.is_closed = False
        self.take(self.fleet.start(0.0))

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            slot = self.fleet.slots[action.name]
            assert action.incarnation == slot.incarnation, "a decision about an engine that is no longer there"
            match action:
                case Spawn(name, incarnation):
                    assert not self.alive[name], "two processes at one place"
                    assert not self.fleet.is_paused
                    self.alive[name].add(incarnation)
                    self.weights[name, incarnation] = None
                    continue
                case Kill(name, _):
                    assert not self.fleet.is_paused or self.is_closed
                    assert slot.state is State.FAILED
                case Deregister(name, _):
                    self.routed[name] = False
                    continue
                case Probe():
                    assert not self.fleet.is_paused
            self.pending.append(action)
        self.check()

    def check(self) -> None:
        for slot in self.fleet.slots.values():
            if slot.is_routed:
                assert self.fleet.version in (None, slot.version), "it serves with other weights than the current ones"
                assert self.routed[slot.name]
                if self.fleet.version is not None:
                    assert self.weights[slot.name, slot.incarnation] == self.fleet.version
        assert len(self.fleet.serving()) <= self.fleet.capacity()
        if self.fleet.is_paused and not self.is_closed:
            assert self.fleet.due() == inf

    def finish(self, action: Action) -> None:
        """Let something that was begun end, well or badly."""
        self.pending.remove(action)
        is_well = self.chance.random() < 0.8
        match action:
            case Probe(name, incarnation):
                works = is_well and (incarnation in self.alive[name] or self.fleet.slots[name].is_external)
                self.weights.setdefault((name, incarnation), None)
                self.take(self.fleet.probed(name, incarnation, "" if works else "no answer", self.now))
            case Refresh(name, incarnation, version):
                if is_well:
                    self.weights[name, incarnation] = version
                self.take(self.fleet.refreshed(name, incarnation, version, "" if is_well else "no", self.now))
            case Register(name, incarnation):
                # What a shell does one after the other for each engine: a goodbye that came later wins.
                slot = self.fleet.slots[name]
                if is_well and slot.state is State.REGISTERING and slot.incarnation == incarnation:
                    self.routed[name] = True
                self.take(self.fleet.registered(name, incarnation, "" if is_well else "no", self.now))
            case Kill(name, incarnation):
                self.alive[name].discard(incarnation)
                self.take(self.fleet.gone(name, incarnation, self.now))

    def something(self) -> None:
        """Let one thing happen."""
        kinds = (
            ["finish"] * 8 + ["time"] * 4 + ["die"] * 2 + ["stale", "pause", "resume", "round", "version", "restart"]
        )
        match self.chance.choice(kinds):
            case "finish" if self.pending:
                self.finish(self.chance.choice(self.pending))
            case "time":
                self.now += self.chance.choice([0.1, 0.5, 2.0, 30.0])
                self.take(self.fleet.tick(self.now))
            case "die":
                name = self.chance.choice("abcd")
                for incarnation in self.alive[name]:
                    self.take(self.fleet.exited(name, incarnation, "killed", self.now))
            case "stale":
                name = self.chance.choice("abcdx")
                old = self.fleet.slots[name].incarnation - 1
                before = self.fleet.slots[name].state
                for actions in (
                    self.fleet.exited(name, old, "killed", self.now),
                    self.fleet.refreshed(name, old, str(self.versions), "", self.now),
                    self.fleet.registered(name, old, "", self.now),
                    self.fleet.gone(name, old, self.now),
                ):
                    assert self.fleet.slots[name].state is before or actions
                    self.take(actions)
            case "pause":
                self.pauses += 1
                self.take(self.fleet.pause("weights", self.now))
            case "resume" if self.pauses:
                self.pauses -= 1
                self.take(self.fleet.resume("weights", self.now))
            case "round":
                self.take((self.fleet.end_round if self.fleet.in_round else self.fleet.begin_round)(self.now))
            case "version":
                self.versions += 1
                self.take(self.fleet.set_version(str(self.versions), self.now))
            case "restart":
                self.take(self.fleet.request_restart(self.chance.choice("abcd"), self.now))

    def settle(self) -> None:
        """Give everything back and let all end well: the fleet must come to serve again."""
        while self.pauses:
            self.pauses -= 1
            self.take(self.fleet.resume("weights", self.now))
        if self.fleet.in_round:
            self.take(self.fleet.end_round(self.now))
        for name in "abcd":
            self.take(self.fleet.request_restart(name, self.now))
        self.chance.random = lambda: 0.0  # type: ignore[method-assign]  # from here on all goes well
        for _ in range(500):
            while self.pending:
                self.finish(self.pending[0])
            if len(self.fleet.serving()) == 5:
                return
            self.now = min(self.now + 60.0, max(self.now, self.fleet.due()))
            self.take(self.fleet.tick(self.now))
        raise AssertionError([(slot.name, slot.state) for slot in self.fleet.slots.values()])

    def close(self) -> None:
        self.is_closed = True
        self.take(self.fleet.close(self.now))
        while self.pending:
            self.finish(self.pending[0])
        assert self.fleet.is_stopped
        assert not any(self.alive.values())


@pytest.mark.parametrize("seed", range(10))
def test_E10_no_invariant_is_broken_in_2000_random_events(seed: int) -> None:
    world = World(seed)
    for _ in range(2000):
        world.something()
    world.settle()
    for _ in range(50):
        world.something()
    world.close()


def fleet(config: EngineConfig = CONFIG, names: str = "abc") -> Fleet:
    """Give a fleet whose engines serve, at time 0."""
    made = Fleet(config, names)
    actions = made.start(0.0)
    while actions:
        actions = [each for action in actions for each in well(made, action, 0.0)]
    assert len(made.serving()) == len(names)
    return made


def well(made: Fleet, action: Action, now: float) -> list[Action]:
    """Let an action end well."""
    match action:
        case Probe(name, incarnation):
            return made.probed(name, incarnation, "", now)
        case Refresh(name, incarnation, version):
            return made.refreshed(name, incarnation, version, "", now)
        case Register(name, incarnation):
            return made.registered(name, incarnation, "", now)
        case Kill(name, incarnation):
            return made.gone(name, incarnation, now)
    return []


def sweep(made: Fleet, silent: str, now: float) -> list[Action]:
    """Let a sweep begin and end in which these do not answer; what follows."""
    probes = made.tick(now)
    assert {each.name for each in probes if isinstance(each, Probe)} == {slot.name for slot in made.serving()}
    return [
        action
        for each in probes
        for action in made.probed(each.name, each.incarnation, "no answer" if each.name in silent else "", now + 1)
    ]


def state(made: Fleet, name: str) -> State:
    return made.slots[name].state


def kills(actions: list[Action]) -> set[str]:
    return {action.name for action in actions if isinstance(action, Kill)}


def times(config: EngineConfig) -> Iterator[float]:
    """Give the begin of one sweep after the other, behind the grace."""
    at = config.health_check_first_wait
    while True:
        yield at
        at += config.health_check_interval


def test_an_engine_is_killed_after_as_many_missed_probes_in_a_row_as_configured() -> None:
    made, at = fleet(), times(CONFIG)
    assert not kills(sweep(made, "a", next(at)))
    assert state(made, "a") is State.SUSPECT
    sweep(made, "", next(at))
    assert state(made, "a") is State.SERVING  # a missed one is forgiven
    assert not kills(sweep(made, "a", next(at)))
    assert kills(sweep(made, "a", next(at))) == {"a"}


def test_missed_probes_do_not_count_in_the_first_wait_but_a_death_does() -> None:
    made = fleet()
    made._sweep_at = 0.0
    assert not kills(sweep(made, "abc", 0.0))
    assert all(slot.failures == 0 for slot in made.slots.values())
    assert kills(made.exited("a", 1, "killed", 1.0)) == {"a"}


def test_the_first_wait_ends_with_the_first_answer() -> None:
    made = fleet()
    made._sweep_at = 0.0
    sweep(made, "", 0.0)
    made._sweep_at = 1.0
    sweep(made, "a", 1.0)
    assert made.slots["a"].state is State.SUSPECT


def test_when_most_engines_are_silent_at_once_they_are_looked_at_once_more_before_they_are_killed() -> None:
    made, at = fleet(), times(CONFIG)
    sweep(made, "ab", next(at))
    assert not kills(sweep(made, "ab", next(at)))  # the second miss would do for one of them
    assert kills(sweep(made, "ab", next(at))) == {"a", "b"}


def test_the_only_engine_is_not_waited_for() -> None:
    made, at = fleet(names="a"), times(CONFIG)
    sweep(made, "a", next(at))
    assert kills(sweep(made, "a", next(at))) == {"a"}


def test_in_a_round_the_dead_wait_for_its_end_unless_too_few_are_left() -> None:
    made = fleet()
    made.begin_round(1.0)
    for name in "ab":
        assert kills(made.exited(name, 1, "killed", 1.0)) == {name}
        assert not made.gone(name, 1, 1.0)
    after = [*made.exited("c", 1, "killed", 1.0), *made.gone("c", 1, 1.5)]
    spawned = [each for each in after if isinstance(each, Spawn)]
    assert len(spawned) == CONFIG.min_serving
    assert len([each for each in made.end_round(1.6) if isinstance(each, Spawn)]) == 2


def test_an_engine_that_fails_too_often_is_retired_and_a_request_brings_it_back() -> None:
    made, now = fleet(names="a"), 0.0
    for incarnation in range(1, CONFIG.max_restarts + 2):
        assert made.slots["a"].incarnation == incarnation
        made.exited("a", incarnation, "killed", now)
        made.gone("a", incarnation, now)
        now = max(now, made.due()) if made.due() < inf else now
        made.tick(now)
    assert made.slots["a"].state is State.RETIRED
    assert made.capacity() == 0
    assert [type(each) for each in made.request_restart("a", now)] == [Spawn, Probe]


def test_restarts_without_a_success_wait_longer_and_longer() -> None:
    config = EngineConfig(health_check_interval=1e6, max_restarts=100, backoff_first=1.0, backoff_most=5.0)
    made, now, starts = fleet(config, "a"), 0.0, []
    for incarnation in range(1, 7):
        made.exited("a", incarnation, "killed", now)
        made.gone("a", incarnation, now)
        if made.slots["a"].incarnation == incarnation:
            now = made.due()
            made.tick(now)
        starts.append(now)
    assert [b - a for a, b in itertools.pairwise(starts)] == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_the_version_moves_during_a_refresh_and_the_engine_is_refreshed_again() -> None:
    made = fleet(names="a")
    (goodbye, refresh) = made.set_version("1", 1.0)
    assert isinstance(goodbye, Deregister)
    assert isinstance(refresh, Refresh)
    assert not made.serving()
    made.set_version("2", 1.2)
    assert made.refreshed("a", 1, "1", "", 1.3) == [Refresh("a", 1, "2")]
    assert made.refreshed("a", 1, "2", "", 1.4) == [Register("a", 1)]
    made.registered("a", 1, "", 1.5)
    assert made.slots["a"].is_routed
    assert made.set_version("2", 1.6) == []  # it is served with these already


def test_a_version_that_is_set_in_a_pause_closes_the_gate_at_once_and_refreshes_after_it() -> None:
    made = fleet(names="a")
    made.pause("weights", 1.0)
    assert made.set_version("1", 1.0) == [Deregister("a", 1)]
    assert not made.serving()
    assert made.resume("weights", 2.0) == [Refresh("a", 1, "1")]


def test_somebody_elses_engine_is_not_started_and_comes_back_as_another_incarnation() -> None:
    made = Fleet(CONFIG, [], external=["x"])
    made.set_version("1", 0.0)
    assert made.start(0.0) == [Probe("x", 1)]
    assert made.probed("x", 1, "refused", 0.0) == []
    assert made.tick(1.0) == [Probe("x", 1)]
    assert made.probed("x", 1, "", 1.0) == [Refresh("x", 1, "1")]
    made.refreshed("x", 1, "1", "", 1.0)
    made.registered("x", 1, "", 1.0)
    at = times(CONFIG)
    next(at), next(at)
    sweep(made, "x", next(at))
    sweep(made, "x", next(at))
    made.gone("x", 1, 20.0)
    assert (made.slots["x"].state, made.slots["x"].incarnation) == (State.WAITING, 2)
