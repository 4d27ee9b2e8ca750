"""Asks the engines for the samples of a round, has them fail where that is wanted, and asks others when one is gone."""

import http.client
import json
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct
from policy import LETTERS

from ft_launcher.engines import Engine, EngineConfig, EngineEvent, EngineSpec, EngineSupervisor, State
from ft_launcher.rollout import trace_sample, trace_span

PROMPTS = 16  # requests of a round
SAMPLES = 8  # of a prompt
LENGTH = 12  # letters of a sample
_ENGINE = Path(__file__).with_name("engine.py")


class InjectedFault(Struct):
    """A fault, and what became of it; instants of time.monotonic()."""

    kind: str
    round: int
    engine: str
    incarnation: int
    at: float
    noticed_at: float | None = None
    back_at: float | None = None


class Sampling:
    """The engines of a run, and the requests to them."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        engines: int,
        token_seconds: float,
        weights: Path,
        faults: Mapping[int, str],
        seed: int,
    ) -> None:
        """weights: the directory of the files that `weights_file` names. faults: their kinds by their round."""
        command = [sys.executable, str(_ENGINE), "{port}", "--token-seconds", str(token_seconds)]
        allowed = ["--allow-faults"] if faults else []
        specs = [EngineSpec(name=f"engine-{number}", command=[*command, *allowed]) for number in range(engines)]
        self.supervisor = EngineSupervisor(config, specs, refresh=self._refresh, on_event=self._hear)
        self.faults: list[InjectedFault] = []
        self.retries = 0
        self._count, self._seed = engines, seed
        self._weights, self._wanted_faults = weights, faults
        self._lock = threading.Lock()
        self._in_flight: Counter[str] = Counter()

    def __enter__(self) -> "Sampling":
        self.supervisor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.supervisor.close()

    def prepare(self, number: int) -> None:
        """Before the first round, and before one with a fault, wait for all engines; order the fault."""
        kind = self._wanted_faults.get(number)
        if number > 0 and kind is None:
            return
        serving = self.supervisor.wait_serving(self._count)
        if kind is not None:
            engine = serving[len(self.faults) % len(serving)]
            self.faults.append(InjectedFault(kind, number, engine.name, engine.incarnation, monotonic()))
            post(engine.url, "/fault", {"kind": kind})

    def collect(self, number: int) -> list[dict[str, Any]]:
        """Give the answers to all prompts of a round, in their order."""
        with ThreadPoolExecutor(self._count) as threads:
            return list(threads.map(lambda prompt: self._answer(number, prompt), range(PROMPTS)))

    def _answer(self, number: int, prompt: int) -> dict[str, Any]:
        asked = {
            "prompt": LETTERS[prompt % len(LETTERS)],
            "n": SAMPLES,
            "length": LENGTH,
            "seed": (self._seed * 1_000_003 + number) * 1_009 + prompt,
        }
        failed: set[tuple[str, int]] = set()
        with trace_sample(f"{number}-{prompt}", group=number):
            while True:
                engine = self._choose(failed)
                try:
                    with trace_span("generate", engine=engine.name, incarnation=engine.incarnation):
                        answer = post(engine.url, "/generate", asked)
                except (OSError, http.client.HTTPException):
                    # Its process has ended, or somebody has ended it because it hung: that is the supervisor's to find
                    # out, so there is no time limit here.
                    failed.add((engine.name, engine.incarnation))
                    with self._lock:
                        self.retries += 1
                    sleep(0.01)  # the supervisor notices meanwhile
                    continue
                finally:
                    self._let_go(engine)
                return {"prompt": asked["prompt"], "engine": engine.name, **answer}

    def _choose(self, failed: set[tuple[str, int]]) -> Engine:
        """Take the engine with the fewest requests, rather one that has not failed this request."""
        serving = self.supervisor.wait_serving(1)
        with self._lock:
            chosen = min(
                serving, key=lambda each: ((each.name, each.incarnation) in failed, self._in_flight[each.name])
            )
            self._in_flight[chosen.name] += 1
            return chosen

    def _let_go(self, engine: Engine) -> None:
        with self._lock:
            self._in_flight[engine.name] -= 1

    def _refresh(self, engine: Engine, version: str) -> None:
        """Give an engine the weights; the supervisor calls it, also for one that has come back."""
        post(engine.url, "/load_weights", {"path": str(weights_file(self._weights, version)), "version": version})

    def _hear(self, event: EngineEvent) -> None:
        for fault in self.faults:
            if event.name != fault.engine or fault.kind not in ("kill", "hang"):
                continue
            if event.after is State.FAILED and event.incarnation == fault.incarnation:
                fault.noticed_at = event.at
            if event.after is State.SERVING and event.incarnation > fault.incarnation and fault.back_at is None:
                fault.back_at = event.at


def weights_file(directory: Path, version: str) -> Path:
    return directory / f"weights-{version}.bin"


def post(url: str, path: str, body: Mapping[str, Any]) -> Any:
    """Send JSON, give JSON. OSError, HTTPException: the connection failed; RuntimeError: the engine said no."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"{url}{path} answered {response.status}: {data.decode(errors='replace')}")
    return json.loads(data)
