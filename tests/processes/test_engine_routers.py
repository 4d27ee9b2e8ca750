"""The real routers, with fake engines behind them: who is listed, when, and that nobody else is sent requests."""

import asyncio
import logging
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable

import pytest

pytest.importorskip("aiohttp", reason="needs the extra engines")

from ft_launcher.engines import EngineError, EngineEvent, SglangRouter, State, VllmRouter
from tests.conftest import Sandbox, free_port
from tests.processes.test_engines import FAKE, Events, ask, ask_to_die, load, spec, supervised

WaitFor = Callable[[Callable[[], bool], str], None]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def workers(url: str) -> dict[str, bool]:
    """Give the engines that a router lists, and whether it calls them healthy."""
    return {each["url"]: each["is_healthy"] for each in ask(url, "/workers")["workers"]}


class Listing(Events):
    """Events, each with what the router lists at that moment."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.listed: list[tuple[EngineEvent, dict[str, bool]]] = []

    def __call__(self, event: EngineEvent) -> None:
        self.listed.append((event, workers(self._url)))
        super().__call__(event)

    def at(self, name: str, state: State, incarnation: int) -> dict[str, bool]:
        event = self.wait_for(name, state, incarnation)
        return next(listed for each, listed in self.listed if each is event)


@pytest.fixture
def sglang(sandbox: Sandbox, wait_for: WaitFor) -> str:
    """A running sglang-router without engines."""
    pytest.importorskip("sglang_router", reason="needs sglang-router")
    port = free_port()
    flags = "--policy round_robin --disable-health-check --disable-circuit-breaker --log-level error"
    ports = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    # Its Python package warns of what newer Pythons will not have.
    sandbox.start(sys.executable, "-m", "sglang_router.launch_router", *ports, *flags.split(), PYTHONWARNINGS="ignore")
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: answers(f"{url}/health"), "the router answers")
    return url


@pytest.fixture
def vllm(sandbox: Sandbox, wait_for: WaitFor) -> str:
    """A running vllm-router without engines."""
    pytest.importorskip("vllm_router", reason="needs vllm-router")
    port = free_port()
    flags = "--policy round_robin --disable-circuit-breaker --health-failure-threshold 1000000 --log-level error"
    ports = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    sandbox.start(sys.executable, "-m", "vllm_router.launch_router", *ports, *flags.split(), PYTHONWARNINGS="ignore")
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: answers(f"{url}/health"), "the router answers")
    return url


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_E13_a_dead_engine_is_not_listed_and_a_new_one_is_before_it_is_said_to_serve(
    kind: str, request: pytest.FixtureRequest
) -> None:
    url: str = request.getfixturevalue(kind)
    router = {"sglang": SglangRouter, "vllm": VllmRouter}[kind](url)
    path = {"sglang": "/generate", "vllm": "/v1/completions"}[kind]
    body = {"model": "toy", "prompt": "1", "text": "1"}
    listing = Listing(url)
    # In the round it stays away, so the requests below meet the one that is left.
    with supervised(spec("a"), spec("b"), router=router, events=listing) as (supervisor, _):
        first = {engine.name: engine for engine in supervisor.wait_serving(2)}
        for name in "ab":
            assert listing.at(name, State.SERVING, 1)[first[name].url]
        with supervisor.round(0):
            os.kill(ask(first["a"].url, "/about")["pid"], signal.SIGKILL)
            assert first["a"].url not in listing.at("a", State.DEAD, 1)
            for _ in range(50):
                assert ask(url, path, body)["version"] == "base"
        assert [engine.incarnation for engine in supervisor.wait_serving(2)] == [2, 1]
        again = next(engine for engine in supervisor.engines() if engine.name == "a")
        assert listing.at("a", State.SERVING, 2)[again.url]
        for _ in range(10):
            assert ask(url, path, body)["version"] == "base"
    assert workers(url) == {}


def test_E7_from_set_version_on_no_answer_through_the_router_is_of_old_weights(sglang: str) -> None:
    seen: list[str] = []
    is_over = threading.Event()

    def hammer() -> None:
        while not is_over.is_set():
            try:
                seen.append(ask(sglang, "/generate", {"text": "1"})["version"])
            except urllib.error.HTTPError:
                seen.append("none")  # no engine has the weights yet

    with supervised(spec("a"), spec("b"), router=SglangRouter(sglang), refresh=load) as (supervisor, events):
        supervisor.set_version("v1")
        supervisor.wait_serving(2)
        client = threading.Thread(target=hammer)
        client.start()
        try:
            for number in range(2, 5):
                supervisor.set_version(f"v{number}")
                since = len(seen)
                engines = supervisor.wait_serving(2)
                ask_to_die(engines[0])
                events.wait_for(engines[0].name, State.SERVING, number)
                events.wait_for("b", State.SERVING, 1)
                ask(sglang, "/generate", {"text": "1"})
                # The first may have been on its way when the version moved.
                assert set(seen[since + 1 :]) <= {f"v{number}", "none"}
        finally:
            is_over.set()
            client.join()
    assert {"v2", "v3", "v4"} <= set(seen)


def test_a_router_that_cannot_be_reached_costs_the_engine_its_place_and_not_the_supervisor() -> None:
    router = SglangRouter(f"http://127.0.0.1:{free_port()}", deregister_seconds=0.5)
    with supervised(spec("a"), spec("b"), router={"a": router}, max_restarts=0) as (supervisor, events):
        failed = events.wait_for("a", State.FAILED, 1)
        assert "the router did not take it" in failed.reason
        assert [engine.name for engine in supervisor.wait_serving(1)] == ["b"]


def test_an_engine_that_a_router_lists_too_late_is_taken_away_again(
    sglang: str, sandbox: Sandbox, wait_for: WaitFor, caplog: pytest.LogCaptureFixture
) -> None:
    """sglang-router tries on when nobody wants the engine any more: it would get requests behind our backs."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    router = SglangRouter(sglang, register_seconds=0.2)

    async def story() -> None:
        with pytest.raises(EngineError, match=r"has not listed it as healthy within 0.2 s"):
            await router.register(url)
        await router.deregister(url)
        sandbox.start(sys.executable, FAKE, str(port))
        await asyncio.to_thread(wait_for, lambda: f"lists {url} late" in caplog.text, "the router lists it")
        await asyncio.to_thread(wait_for, lambda: workers(sglang) == {}, "it is taken away")

    with caplog.at_level(logging.INFO, "ft_launcher"):
        asyncio.run(story())
