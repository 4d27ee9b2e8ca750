"""What presets see of engines that hang, rest or work; whether numbers are kept; what Prometheus is told."""

import asyncio
import logging
import socket
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="needs the extra engines")

from ft_launcher.engines import EngineConfig, EngineMetrics, EngineSpec, EngineSupervisor, State, healthy, preset
from ft_launcher.engines.fleet import Fleet, Probe, Register
from ft_launcher.engines.probes import ProbeFunction, asked, open_session, seconds_for
from tests.conftest import GENEROUS, Sandbox, free_port
from tests.processes.test_engines import FAKE, ask, ask_to_die, load, spec, supervised

WaitFor = Callable[[Callable[[], bool], str], None]


@pytest.fixture
def engine(sandbox: Sandbox, wait_for: WaitFor) -> str:
    """The URL of a fake engine."""
    port = free_port()
    sandbox.start(sys.executable, FAKE, str(port))
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        try:
            return bool(ask(url, "/about"))
        except OSError:
            return False

    wait_for(is_up, "the engine answers")
    return url


def problem(probe: ProbeFunction, url: str, seconds: float = GENEROUS) -> str:
    """Give what a probe finds within a deadline."""

    async def once() -> str:
        http = await open_session()
        try:
            return await asked(probe, http, url, seconds)
        finally:
            await http.close()

    return asyncio.run(once())


def tell(url: str, do: str, **values: Any) -> None:
    ask(url, "/admin", {"do": do, **values})


@pytest.mark.parametrize("part", ["stall", "block"])
def test_vllms_health_says_yes_while_generation_hangs_and_its_preset_does_not(engine: str, part: str) -> None:
    probe = preset("vllm")
    assert problem(probe, engine) == ""
    tell(engine, part)
    # Its own token of a moment ago is no sign of life: this is the very next look.
    assert problem(probe, engine, 0.3) == "no answer within 0.3 s"
    assert problem(healthy(), engine) == ""


@pytest.mark.parametrize("rest", ["pause", "sleep"])
def test_a_vllm_that_is_paused_or_asleep_is_not_asked_for_tokens(engine: str, rest: str) -> None:
    probe = preset("vllm")
    tell(engine, rest)
    assert problem(probe, engine) == ""
    tell(engine, "stall")
    assert problem(probe, engine, 0.3) == "no answer within 0.3 s"


def test_a_vllm_whose_tokens_come_works_however_long_its_queue_is(engine: str) -> None:
    probe = preset("vllm", model="toy")
    assert problem(probe, engine) == ""
    for _ in range(3):
        tell(engine, "busy")
        assert problem(probe, engine) == ""
        # What came before a look is no sign of life in it.
        tell(engine, "stall")
        assert problem(probe, engine, 0.3) == "no answer within 0.3 s"


def test_a_vllm_whose_worker_died_says_so_by_its_health(engine: str) -> None:
    tell(engine, "status", status=503)
    assert problem(preset("vllm"), engine) == "/health answered 503"


def test_sglang_is_asked_for_a_token_by_its_own_route(engine: str) -> None:
    assert problem(preset("sglang"), engine) == ""
    tell(engine, "stall")
    assert problem(preset("sglang"), engine, 0.3) == "no answer within 0.3 s"
    assert problem(healthy(), engine) == ""


def test_sglang_is_given_the_time_that_it_takes_for_its_own_verdict(caplog: pytest.LogCaptureFixture) -> None:
    specs = [EngineSpec(name=name, command=["x"]) for name in "ab"]
    with caplog.at_level(logging.INFO, "ft_launcher"):
        EngineSupervisor(EngineConfig(), specs, probe={"a": preset("sglang"), "b": preset("http")}).close()
    (line,) = [each for each in caplog.messages if "engine" in each]
    assert line == "engine a: health_check_timeout is 25 s here, not 5 s: its server takes so long"
    caplog.clear()
    EngineSupervisor(EngineConfig(health_check_timeout=30.0), specs, probe=preset("sglang")).close()
    assert not any("engine" in each for each in caplog.messages)
    for asked_for, given in ((5.0, 25.0), (30.0, 30.0)):
        assert seconds_for(preset("sglang"), asked_for, "a") == given
        assert seconds_for(preset("vllm"), asked_for, "a") == asked_for


def given_up(silent_since: float, rounds: tuple[float, ...]) -> float:
    """Give when engine a is given up, which answers nothing from some time on but that it is there.

    With the documented 300, 10 and 5 seconds; `rounds`: when they begin.
    """
    fleet, now = Fleet(EngineConfig(), ["a", "b", "c"]), 0.0
    actions = fleet.start(now)
    late: list[tuple[float, Probe]] = []
    while fleet.slots["a"].state is not State.FAILED and now < 2000.0:
        actions += fleet.tick(now)
        if now in rounds:
            actions += [*(fleet.end_round(now) if fleet.in_round else []), *fleet.begin_round(now)]
        for at, probe in [each for each in late if each[0] <= now]:
            late.remove((at, probe))
            actions += fleet.probed(probe.name, probe.incarnation, "no answer", now)
        while actions:
            match actions.pop():
                case Probe("a") as probe if now >= silent_since and fleet.slots["a"].state is not State.STARTING:
                    late.append((now + fleet.config.health_check_timeout, probe))
                case Probe(name, incarnation):
                    actions += fleet.probed(name, incarnation, "", now)
                case Register(name, incarnation):
                    actions += fleet.registered(name, incarnation, "", now)
        now += 0.5
    return now


def test_E8_the_first_wait_holds_until_the_first_answer_and_not_for_every_round() -> None:
    bound = 10.0 + 5.0 + 1.0
    # It answers once that it is there, and then never: it has the first wait, and no more.
    assert 300.0 <= given_up(0.0, rounds=(100.0,)) <= 300.0 + bound
    # It has answered: a miss counts from then on, in the second and third round too (they begin at 200 and 400).
    for since in (50.0, 205.0, 405.0):
        assert since <= given_up(since, rounds=(0.0, 200.0, 400.0)) <= since + bound


def test_what_prometheus_is_told(wait_for: WaitFor) -> None:
    metrics = EngineMetrics(["a", "b"])
    value = metrics.registry.get_sample_value
    with supervised(spec("a"), spec("b"), observer=metrics, refresh=load) as (supervisor, events):
        supervisor.set_version("v1")
        engines = {engine.name: engine for engine in supervisor.wait_serving(2)}
        port = metrics.serve(0)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        assert 'ft_engine_state{engine="a",state="serving"} 1.0' in text
        assert 'ft_engine_weight_version{engine="b",version="v1"} 1.0' in text
        assert "ft_engine_serving 2.0" in text
        wait_for(lambda: (value("ft_engine_probe_seconds_count", {"engine": "a"}) or 0) > 1, "probes are counted")
        ask_to_die(engines["a"])
        events.wait_for("a", State.SERVING, 2)
        ask(engines["b"].url, "/admin", {"do": "hang"})
        events.wait_for("b", State.SERVING, 2)
        supervisor.request_restart("a")
        events.wait_for("a", State.SERVING, 3)
    assert value("ft_engine_restarts_total", {"engine": "a"}) == 2
    assert value("ft_engine_restarts_total", {"engine": "b"}) == 1
    assert value("ft_engine_start_seconds_count", {"engine": "a"}) == 3
    assert value("ft_engine_refresh_seconds_count", {"engine": "a"}) == 3
    for reason, count in (("exit", 1), ("timeout", 1), ("requested", 1), ("closing", 2)):
        assert value("ft_engine_kills_total", {"reason": reason}) == count
    assert value("ft_engine_probe_failures_total", {"engine": "b", "reason": "timeout"}) == 1
    # From its last good probe: an interval and a deadline at most, and what the machine takes.
    assert value("ft_engine_detection_seconds_count", {"engine": "b"}) == 1
    assert (value("ft_engine_detection_seconds_sum", {"engine": "b"}) or 0) >= 0.5
    assert value("ft_engine_detection_seconds_count", {"engine": "a"}) is None
    assert value("ft_engine_up", {"engine": "a"}) == 0
    assert value("ft_engine_serving") == 0
    assert value("ft_engine_weight_version", {"engine": "a", "version": "v1"}) is None
    metrics.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


def test_a_callback_that_fails_harms_nobody() -> None:
    def broken(_: object) -> None:
        raise RuntimeError("the user's")

    with supervised(spec("a"), events=broken) as (supervisor, _):
        (engine,) = supervisor.wait_serving(1)
        ask_to_die(engine)
        supervisor.request_restart("a")
        assert supervisor.wait_serving(1)
