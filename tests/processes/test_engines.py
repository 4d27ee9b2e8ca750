"""The engine supervisor with real engines: processes that serve HTTP, crash, hang, and come back."""

import itertools
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("aiohttp", reason="needs the extra engines")

from ft_launcher.engines import (
    Engine,
    EngineCapacityError,
    EngineConfig,
    EngineEvent,
    EngineSpec,
    EngineSupervisor,
    State,
    generates,
)
from tests import fake_engine
from tests.conftest import GENEROUS, Sandbox, free_port, wait_until_gone

FAKE = str(Path(fake_engine.__file__))
QUICK: dict[str, Any] = {
    "health_check_first_wait": 0.0001,
    "health_check_interval": 0.5,
    "health_check_timeout": 1.0,  # which an engine that is well needs on no machine
    "ready_interval": 0.05,
    "term_grace": 1.0,
    "backoff_first": 0.05,
}


def spec(name: str, *arguments: str) -> EngineSpec:
    return EngineSpec(name=name, command=[sys.executable, FAKE, "{port}", *arguments])


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask an engine directly. OSError when it does not answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=GENEROUS) as answer:
        return json.load(answer)


class Events:
    """What a supervisor has told of its engines, and a way to wait for it."""

    def __init__(self) -> None:
        self.all: list[EngineEvent] = []
        self._news = threading.Condition()

    def __call__(self, event: EngineEvent) -> None:
        with self._news:
            self.all.append(event)
            self._news.notify_all()

    def wait_for(self, name: str, state: State, incarnation: int, seconds: float = GENEROUS) -> EngineEvent:
        def found() -> EngineEvent | None:
            wanted = (name, state, incarnation)
            return next((each for each in self.all if (each.name, each.after, each.incarnation) == wanted), None)

        with self._news:
            assert self._news.wait_for(lambda: found() is not None, seconds), self.all
            event = found()
        assert event is not None
        return event

    def count(self, state: State) -> int:
        return sum(event.after is state for event in self.all)


def is_alive(process: psutil.Process) -> bool:
    """Say whether a process runs. Others of this test run may have left zombies to it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def supervised(
    *specs: EngineSpec, refresh: Callable[[Engine, str], None] | None = None, **settings: Any
) -> Iterator[tuple[EngineSupervisor, Events]]:
    events = Events()
    beside = {name: settings.pop(name) for name in ("probe", "router", "observer", "log_dir") if name in settings}
    events = settings.pop("events", events)
    config = EngineConfig(**(QUICK | settings))
    made = EngineSupervisor(config, specs, refresh=refresh, on_event=events, **beside)
    ours = {each.name for each in specs if not each.url}
    with made:
        yield made, events
        ports = [int(engine.url.rsplit(":", 1)[1]) for engine in made.engines() if engine.name in ours and engine.url]
        wardens = [each for each in psutil.Process().children() if is_alive(each) and "warden" in str(each.cmdline())]
        family = [each for warden in wardens for each in (warden, *warden.children(recursive=True))]
    assert not any(is_alive(each) for each in family)
    for port in ports:
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass


def load(engine: Engine, version: str) -> None:
    ask(engine.url, "/load_weights", {"version": version})


def test_E1_engines_serve_round_robin_and_nothing_is_left_of_them() -> None:
    with supervised(*(spec(name) for name in "abc")) as (supervisor, events):
        engines = supervisor.wait_serving(3)
        with supervisor.round(0):
            for turn in range(20):
                assert ask(engines[turn % 3].url, "/generate", {})["version"] == "base"
        assert [event.after for event in events.all if event.name == "a"] == [
            State.STARTING,
            State.REGISTERING,
            State.SERVING,
        ]


def test_E2_an_engine_that_hangs_in_a_round_is_killed_and_comes_back_after_it() -> None:
    with supervised(*(spec(name) for name in "abc")) as (supervisor, events):
        engines = {engine.name: engine for engine in supervisor.wait_serving(3)}
        with supervisor.round(0):
            ask(engines["b"].url, "/admin", {"do": "hang"})
            failed = events.wait_for("b", State.FAILED, 1)
            events.wait_for("b", State.DEAD, 1)
            assert "no answer within 1 s" in failed.reason
            assert {engine.name for engine in supervisor.serving()} == {"a", "c"}
            assert ask(engines["a"].url, "/generate", {})
            assert not any(event.incarnation == 2 for event in events.all)
        events.wait_for("b", State.SERVING, 2)
        assert events.count(State.FAILED) == 1


@pytest.mark.parametrize(
    ("number", "words", "interval"),
    # A death needs no probe to be noticed; one could come first.
    [(signal.SIGKILL, "SIGKILL", 1000.0), (signal.SIGSTOP, "no answer within", 0.5)],
)
def test_E3_an_engine_that_dies_or_is_stopped_is_noticed(number: signal.Signals, words: str, interval: float) -> None:
    with supervised(spec("a"), spec("b"), health_check_interval=interval) as (supervisor, events):
        engines = {engine.name: engine for engine in supervisor.wait_serving(2)}
        os.kill(ask(engines["a"].url, "/about")["pid"], number)
        assert words in events.wait_for("a", State.FAILED, 1).reason
        events.wait_for("a", State.SERVING, 2)
        assert [engine.incarnation for engine in supervisor.wait_serving(2)] == [2, 1]


def test_E4_slow_answers_kill_nobody_and_one_missed_probe_of_three_is_forgiven() -> None:
    with supervised(spec("a"), spec("b"), health_check_failures=3) as (supervisor, events):
        engines = {engine.name: engine for engine in supervisor.wait_serving(2)}
        ask(engines["a"].url, "/admin", {"do": "slow", "seconds": 0.3})
        ask(engines["b"].url, "/admin", {"do": "status", "status": 503})
        events.wait_for("b", State.SUSPECT, 1)
        ask(engines["b"].url, "/admin", {"do": "status", "status": 200})
        begun = ask(engines["a"].url, "/about")["asked"]
        while ask(engines["a"].url, "/about")["asked"] < begun + 10:
            time.sleep(0.1)  # nothing tells of probes that were answered
        assert events.count(State.FAILED) == 0
        assert [engine.state for engine in supervisor.engines()] == [State.SERVING, State.SERVING]


def test_E5_when_all_hang_in_a_round_one_comes_back_at_once() -> None:
    with supervised(*(spec(name) for name in "abc"), min_serving=1) as (supervisor, events):
        supervisor.wait_serving(3)
        with supervisor.round(0) as engines:
            for engine in engines:
                ask(engine.url, "/admin", {"do": "hang"})
            back = next(iter(self_serving(events, 2)))
            assert ask(next(e.url for e in supervisor.engines() if e.name == back), "/generate", {})
            assert len([event for event in events.all if event.incarnation == 2 and event.after is State.SERVING]) == 1
        supervisor.wait_serving(3)


def self_serving(events: Events, incarnation: int) -> Iterator[str]:
    """Give the names of engines as they serve in this incarnation."""
    seen: set[str] = set()
    deadline = time.monotonic() + GENEROUS
    while time.monotonic() < deadline:
        with events._news:
            events._news.wait(0.1)
            now = {e.name for e in events.all if e.incarnation == incarnation and e.after is State.SERVING}
        yield from now - seen
        seen |= now
    raise AssertionError(events.all)


def test_E6_restarts_that_fail_wait_longer_and_then_the_engine_serves(tmp_path: Path) -> None:
    starts = str(tmp_path / "starts")
    engine = spec("a", "--fail-starts", starts, "3")
    with supervised(engine, max_restarts=5, backoff_first=0.2) as (supervisor, events):
        assert supervisor.wait_serving(1)[0].incarnation == 4
        times = [event.at for event in events.all if event.after is State.STARTING]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert gaps[1] >= 0.2
        assert gaps[2] >= 0.4
        assert "exited with code 3" in events.wait_for("a", State.FAILED, 1).reason


def test_E6_who_always_fails_is_retired_and_the_last_one_ends_the_job(tmp_path: Path) -> None:
    bad = [spec(name, "--fail-starts", str(tmp_path / name), "99") for name in "ab"]
    with supervised(spec("c"), *bad, max_restarts=2) as (supervisor, events):
        for name in "ab":
            events.wait_for(name, State.RETIRED, 3)
        with supervisor.round(0) as engines:
            assert [engine.name for engine in engines] == ["c"]
        with pytest.raises(EngineCapacityError, match=r"2 of 3 retired: .*exited with code 3"):
            supervisor.wait_serving(2)
        supervisor.request_restart("a")  # a person's word is a new budget
        events.wait_for("a", State.STARTING, 4)


def test_E7_no_request_is_ever_served_with_old_weights() -> None:
    answers: list[tuple[str, str]] = []
    calls: list[tuple[str, int, str]] = []
    is_over = threading.Event()

    def refresh(engine: Engine, version: str) -> None:
        calls.append((engine.name, engine.incarnation, version))
        load(engine, version)

    with supervised(spec("a"), spec("b"), refresh=refresh) as (supervisor, events):
        supervisor.set_version("v1")
        supervisor.wait_serving(2)

        def hammer() -> None:
            while not is_over.is_set():
                for engine in supervisor.serving():
                    try:
                        answers.append((engine.version or "", ask(engine.url, "/generate", {})["version"]))
                    except OSError:
                        continue  # it was killed

        client = threading.Thread(target=hammer)
        client.start()
        try:
            for turn in range(3):
                name = "ab"[turn % 2]
                engine = next(each for each in supervisor.wait_serving(2) if each.name == name)
                ask_to_die(engine)
                events.wait_for(name, State.SERVING, engine.incarnation + 1)
        finally:
            is_over.set()
            client.join()
        assert len(answers) > 20
        assert {seen for _, seen in answers} == {"v1"}
        assert len(calls) == len(set(calls)) == 5


def ask_to_die(engine: Engine) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - the connection ends in one way or another
        ask(engine.url, "/admin", {"do": "crash"})


def test_E7_an_engine_whose_refresh_fails_never_serves() -> None:
    def refresh(engine: Engine, version: str) -> None:
        if engine.incarnation == 1:
            raise ValueError("no such weights")
        load(engine, version)

    with supervised(spec("a"), refresh=refresh) as (supervisor, events):
        supervisor.set_version("v1")
        (engine,) = supervisor.wait_serving(1)
        assert ask(engine.url, "/generate", {})["version"] == "v1"
        assert not any(event.after is State.SERVING and event.incarnation == 1 for event in events.all)
        assert "ValueError: no such weights" in events.wait_for("a", State.FAILED, 1).reason


def test_E7_a_version_that_moves_during_a_refresh_is_what_is_served() -> None:
    entered, may_go = threading.Event(), threading.Event()

    def refresh(engine: Engine, version: str) -> None:
        entered.set()
        assert may_go.wait(GENEROUS)
        load(engine, version)

    with supervised(spec("a"), refresh=refresh) as (supervisor, _):
        supervisor.set_version("v1")
        assert entered.wait(GENEROUS)
        supervisor.set_version("v2")
        may_go.set()
        (engine,) = supervisor.wait_serving(1)
        assert engine.version == ask(engine.url, "/generate", {})["version"] == "v2"


def test_E9_a_pause_begins_when_no_probe_is_under_way_and_in_it_nobody_is_killed() -> None:
    with supervised(spec("a"), spec("b"), health_check_interval=0.05, health_check_timeout=0.2) as (supervisor, events):
        supervisor.wait_serving(2)
        chance = random.Random(5)
        for _ in range(500):
            with supervisor.paused("weights"):
                before = list(events.all)
                if chance.random() < 0.03:
                    for engine in supervisor.serving():
                        ask(engine.url, "/admin", {"do": "hang"})
                    time.sleep(0.3)  # as long as a sweep and its kills would take
                killed = [e for e in events.all[len(before) :] if e.after in (State.FAILED, State.DEAD, State.STARTING)]
                assert not killed
            supervisor.wait_serving(2)


def test_E11_children_that_hide_and_ignore_sigterm_end_with_their_engine() -> None:
    with supervised(spec("a", "--leak-child", "--ignore-sigterm")) as (supervisor, events):
        (engine,) = supervisor.wait_serving(1)
        server = psutil.Process(ask(engine.url, "/about")["pid"])
        family = [server, *server.children(recursive=True)]
        assert len(family) == 2
        supervisor.request_restart("a")
        events.wait_for("a", State.STARTING, 2)  # not before nothing is left of the first
        assert not any(is_alive(each) for each in family)


def test_E11_engines_end_with_their_supervisor(sandbox: Sandbox) -> None:
    script = sandbox.script(
        f"""
import sys, time, threading
from ft_launcher.engines import EngineConfig, EngineSpec, EngineSupervisor
command = [sys.executable, {FAKE!r}, "{{port}}", "--leak-child", "--ignore-sigterm"]
specs = [EngineSpec(name=name, command=command) for name in "ab"]
supervisor = EngineSupervisor(EngineConfig(ready_interval=0.05, term_grace=30), specs)
supervisor.start()
supervisor.wait_serving(2)
print("serving", flush=True)
threading.Event().wait()
"""
    )
    running = sandbox.start(sys.executable, script)
    running.wait_for("serving")
    family = [each.pid for each in psutil.Process(running.pid).children(recursive=True)]
    assert len(family) == 6  # for each of the two a warden, the server and its child
    os.kill(running.pid, signal.SIGKILL)
    assert wait_until_gone(family, GENEROUS) == []


def test_E14_probes_ask_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with supervised(spec("a")) as (supervisor, _):
        assert supervisor.wait_serving(1)


def test_E14_somebody_elses_engine_is_never_killed_and_is_refreshed_when_it_is_back(sandbox: Sandbox) -> None:
    port = free_port()
    theirs = sandbox.start(sys.executable, FAKE, str(port))
    outside = EngineSpec(name="x", url=f"http://127.0.0.1:{port}")
    with supervised(spec("a"), outside, refresh=load, min_serving=1) as (supervisor, events):
        supervisor.set_version("v1")
        supervisor.wait_serving(2)
        theirs.send(signal.SIGSTOP)
        events.wait_for("x", State.WAITING, 2)
        assert psutil.Process(theirs.pid).status() == psutil.STATUS_STOPPED
        theirs.send(signal.SIGKILL)
        theirs.wait()
        sandbox.start(sys.executable, FAKE, str(port))
        events.wait_for("x", State.SERVING, 2)
        assert ask(outside.url, "/generate", {})["version"] == "v1"
        supervisor.request_restart("a")
        supervisor.wait_serving(2)
    assert ask(outside.url, "/about")


def test_a_generation_probe_sees_a_hang_that_health_does_not() -> None:
    probe = generates("/v1/completions", {"prompt": "1", "max_tokens": 1}, key="choices")
    with supervised(spec("a"), probe=probe) as (supervisor, events):
        (engine,) = supervisor.wait_serving(1)
        ask(engine.url, "/admin", {"do": "hang"})
        events.wait_for("a", State.SERVING, 2)


def test_an_engine_that_cannot_be_started_says_why() -> None:
    broken = EngineSpec(name="a", command=["/no/such/program"])
    with supervised(broken, max_restarts=1) as (supervisor, events):
        with pytest.raises(EngineCapacityError, match="a: exited with code 127"):
            supervisor.wait_serving(1)
        assert events.count(State.STARTING) == 2
