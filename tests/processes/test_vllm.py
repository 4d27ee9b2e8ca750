"""The engine supervisor with the real vLLM, on this machine's CPU. docs/engines.md tells how to run these tests.

They take minutes, and an environment of several gigabytes: they run only where somebody asks for them.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("aiohttp", reason="needs the extra engines")

from ft_launcher.engines import Engine, EngineEvent, EngineSpec, EngineSupervisor, State, preset
from tests.conftest import GENEROUS
from tests.processes.test_engines import Events, ask, supervised

pytestmark = [
    pytest.mark.skipif(os.environ.get("FT_TEST_VLLM") != "1", reason="the real vLLM is asked for by FT_TEST_VLLM=1"),
    pytest.mark.timeout(1200),
]

logger = logging.getLogger(__name__)

MODEL_MAKER = str(Path(__file__).with_name("vllm_model.py"))
PYTHON = os.environ.get("FT_TEST_VLLM_PYTHON", sys.executable)
"""Of an environment with vLLM's build for CPUs."""

START_SECONDS = 300.0
"""Within which vLLM must have started on any machine; it takes 30 s on one with two cores and nothing else to do."""

INTERVAL, TIMEOUT = 2.0, 5.0

ENGINE_ENV = {
    "VLLM_SERVER_DEV_MODE": "1",  # the routes by which weights are loaded anew are there in this mode only
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # Without these two a machine that says of itself more than it can (AMX in a sandbox) ends the worker by SIGILL.
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    "ATEN_CPU_CAPABILITY": "avx2",
}

Answer = dict[str, list[Any]]


class Model:
    """A folder from which engines load their first weights, two sets of weights, and what each must answer."""

    def __init__(self, folder: Path) -> None:
        maker = [PYTHON, MODEL_MAKER, str(folder)]
        env = os.environ | {"TMPDIR": str(folder)}  # torch makes a folder for what it might compile
        made = subprocess.run(maker, env=env, capture_output=True, text=True, timeout=START_SECONDS, check=False)
        assert made.returncode == 0, made.stderr
        self.answers: dict[str, Answer] = json.loads(made.stdout.splitlines()[-1])
        self._weights = folder
        self.folder = folder / "served"
        shutil.copytree(folder / "v1", self.folder)

    def put(self, version: str) -> None:
        """Have this version's weights in the folder, whole at every moment."""
        new = self.folder / "new"
        shutil.copyfile(self._weights / version / "model.safetensors", new)
        new.replace(self.folder / "model.safetensors")

    def is_answered(self, url: str, version: str) -> bool:
        """Whether the engine there answers as these weights must."""
        wanted = self.answers[version]
        seen = continued(url, wanted["prompt"], len(wanted["tokens"]))
        return seen["tokens"] == wanted["tokens"] and seen["logprobs"] == pytest.approx(wanted["logprobs"], abs=1e-4)

    def spec(self) -> EngineSpec:
        """An engine of this model; what it compiles stays beside the model."""
        server = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", "{port}"]
        settings = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "toy"]
        caches = {"TMPDIR": str(self._weights), "VLLM_CACHE_ROOT": str(self._weights / "cache")}
        command = [*server, "--model", str(self.folder), *settings]
        return EngineSpec(name="a", command=command, env=ENGINE_ENV | caches)


class Refresh:
    """Gives an engine its weights, as a trainer would that shares a disk with it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.began_with_v1: list[int] = []
        """Starts of the engine that answered as of the folder's first weights before they were given others."""

    def __call__(self, engine: Engine, version: str) -> None:
        # Also the first request with log-probabilities, for which vLLM compiles something for longer than a probe may
        # take: better here, where an engine is not probed, than while it serves.
        if self._model.is_answered(engine.url, "v1"):
            self.began_with_v1.append(engine.incarnation)
        begun = time.monotonic()
        post(engine.url, "/pause")
        self._model.put(version)
        post(engine.url, "/collective_rpc", {"method": "reload_weights"})
        post(engine.url, "/update_weight_version", {"new_version": version})
        post(engine.url, "/reset_prefix_cache")
        post(engine.url, "/resume")
        logger.info("figure: refresh of start %d: %.0f ms", engine.incarnation, (time.monotonic() - begun) * 1000)
        # What an engine loads when it starts are the weights of hours ago.
        self._model.put("v1")


class Probes:
    """An observer that counts probes, and a way to wait for more of them."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._news = threading.Condition()

    def changed(self, event: EngineEvent) -> None:
        pass

    def probed(self, name: str, seconds: float, problem: str) -> None:
        with self._news:
            self.problems.append(problem)
            self._news.notify_all()

    def refreshed(self, name: str, version: str, seconds: float, problem: str) -> None:
        pass

    def next(self, count: int) -> list[str]:
        """Wait for so many probes from now on, and give what they found."""
        with self._news:
            begun = len(self.problems)
            assert self._news.wait_for(lambda: len(self.problems) >= begun + count, GENEROUS), self.problems
            return self.problems[begun:]


class Served:
    """An engine, and all that is told of it."""

    supervisor: EngineSupervisor

    def __init__(self, events: Events, probes: Probes, refresh: Refresh) -> None:
        self.events, self.probes, self.refresh = events, probes, refresh

    @property
    def url(self) -> str:
        return self.supervisor.engines()[0].url


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def log_dir(tmp_path: Path) -> Iterator[Path]:
    """For the output of engines, the end of which is told when a test fails."""
    yield tmp_path / "logs"
    for log in sorted((tmp_path / "logs").glob("*")):
        sys.stdout.write(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}\n")


def continued(url: str, prompt: list[int], steps: int) -> Answer:
    """Have the engine continue the prompt with what it finds likeliest, as the script that made the model has."""
    body = {"model": "toy", "prompt": prompt, "max_tokens": steps, "temperature": 0, "ignore_eos": True}
    body |= {"logprobs": 0, "return_tokens_as_token_ids": True}
    said = ask(url, "/v1/completions", body)["choices"][0]["logprobs"]
    tokens = [int(each.removeprefix("token_id:")) for each in said["tokens"]]
    return {"tokens": tokens, "logprobs": said["token_logprobs"]}


def post(url: str, path: str, body: dict[str, Any] | None = None) -> None:
    """Ask for something whose answer says no more than that it was done. OSError when it was not."""
    sent = json.dumps({} if body is None else body).encode()
    request = urllib.request.Request(url + path, sent, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=GENEROUS) as said:
        assert said.status == 200


def health(url: str) -> int:
    with urllib.request.urlopen(url + "/health", timeout=GENEROUS) as said:
        status: int = said.status
    return status


def process(name: str) -> psutil.Process:
    """One of vLLM's: its server only speaks HTTP, a core plans the steps, and a worker computes them."""
    found = [each for each in psutil.Process().children(recursive=True) if name in " ".join(each.cmdline())]
    assert len(found) == 1, found
    return found[0]


@contextmanager
def served(model: Model, log_dir: Path) -> Iterator[Served]:
    """An engine that serves v1."""
    one = Served(Events(), Probes(), Refresh(model))
    settings: dict[str, Any] = {"health_check_interval": INTERVAL, "health_check_timeout": TIMEOUT, "term_grace": 5.0}
    beside = {"probe": preset("vllm"), "observer": one.probes, "log_dir": log_dir, "events": one.events}
    begun = time.monotonic()
    with supervised(model.spec(), refresh=one.refresh, **settings, **beside) as (supervisor, _):
        supervisor.set_version("v1")
        one.events.wait_for("a", State.SERVING, 1, START_SECONDS)
        logger.info("figure: from the start to serving: %.1f s", time.monotonic() - begun)
        one.supervisor = supervisor
        yield one


@pytest.mark.parametrize("part", ["VLLM::EngineCore", "VLLM::Worker"])
def test_E12_a_vllm_part_of_which_is_stopped_comes_back_with_the_weights_of_now(
    model: Model, log_dir: Path, part: str
) -> None:
    with served(model, log_dir) as one:
        assert model.is_answered(one.url, "v1")
        assert not model.is_answered(one.url, "v2")
        one.supervisor.set_version("v2")
        one.supervisor.wait_serving(1)
        assert model.is_answered(one.url, "v2")

        process(part).send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        assert health(one.url) == 200  # why /health is not enough
        failed = one.events.wait_for("a", State.FAILED, 1)
        assert failed.reason == f"no answer within {TIMEOUT:g} s"
        logger.info("figure: detection: %.2f s (interval %g s, timeout %g s)", failed.at - stopped, INTERVAL, TIMEOUT)
        starting = one.events.wait_for("a", State.STARTING, 2)
        serving = one.events.wait_for("a", State.SERVING, 2, START_SECONDS)
        assert model.is_answered(one.url, "v2")
        assert not model.is_answered(one.url, "v1")
        logger.info("figure: kill: %.2f s, start to serving: %.1f s", starting.at - failed.at, serving.at - starting.at)
    # Both starts had other weights than those that they then served with; between them v2 came in place of v1.
    assert one.refresh.began_with_v1 == [1, 1, 2]


def test_E12_a_vllm_that_is_paused_is_left_alone_and_serves_on(model: Model, log_dir: Path) -> None:
    with served(model, log_dir) as one:
        post(one.url, "/pause")
        assert one.probes.next(6) == [""] * 6
        post(one.url, "/resume")
        assert model.is_answered(one.url, "v1")
        assert one.events.count(State.FAILED) == one.events.count(State.SUSPECT) == 0


def test_a_vllm_whose_core_dies_is_noticed_and_comes_back(model: Model, log_dir: Path) -> None:
    with served(model, log_dir) as one:
        process("VLLM::EngineCore").kill()
        killed = time.monotonic()
        failed = one.events.wait_for("a", State.FAILED, 1)
        logger.info("figure: detection of a dead core: %.2f s: %s", failed.at - killed, failed.reason)
        one.events.wait_for("a", State.SERVING, 2, START_SECONDS)
        assert model.is_answered(one.url, "v1")
