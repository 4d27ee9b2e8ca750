"""What Prometheus is told of engines: their states, probes, refreshes, restarts, and why they were killed."""

from collections.abc import Iterable
from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from ft_launcher.engines.errors import EngineError
from ft_launcher.engines.fleet import State
from ft_launcher.engines.supervisor import EngineEvent

__all__ = ["EngineMetrics"]

_SOON = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_LONG = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)

_PROBE_REASONS = (("no answer within", "timeout"), (" answered ", "answer"), ("", "connection"))
_KILL_REASONS = (
    ("a restart was asked for", "requested"),
    ("the supervisor ends", "closing"),
    ("its weights were not refreshed", "refresh"),
    ("the router did not take it", "router"),
    ("of its start", "startup"),
    ("could not be started", "exit"),
    ("exited with code", "exit"),
    ("killed by", "exit"),
    ("no answer within", "timeout"),
    (" answered ", "answer"),
    ("", "connection"),
)


class EngineMetrics:
    """An observer of one supervisor: EngineSupervisor(..., observer=EngineMetrics(names))."""

    def __init__(self, engines: Iterable[str], registry: CollectorRegistry | None = None) -> None:
        """`engines`: their names. `registry`: None makes one of its own, which `registry` then is."""
        self.registry = registry or CollectorRegistry()
        self._server: Any = None
        self._states: dict[str, State] = {}
        self._since: dict[str, float] = {}
        self._answered: dict[str, float] = {}
        self._versions: dict[str, str] = {}
        self._make()
        for name in engines:
            self._states[name] = State.STOPPED
            self._up.labels(name).set(0)
            for state in State:
                self._state.labels(name, state.value).set(state is State.STOPPED)
            self._restarts.labels(name)

    def _make(self) -> None:
        of, registry = ("engine",), self.registry
        self._up = Gauge("ft_engine_up", "1 while the engine may be sent requests", of, registry=registry)
        self._state = Gauge(
            "ft_engine_state", "1 for the state that the engine is in", ("engine", "state"), registry=registry
        )
        self._serving = Gauge("ft_engine_serving", "Engines that may be sent requests", registry=registry)
        self._retired = Gauge("ft_engine_retired", "Engines that have used up their restarts", registry=registry)
        self._version = Gauge(
            "ft_engine_weight_version", "1 for the weights it serves", ("engine", "version"), registry=registry
        )
        self._probe = Histogram("ft_engine_probe_seconds", "Length of a probe", of, buckets=_SOON, registry=registry)
        self._missed = Counter(
            "ft_engine_probe_failures", "Probes that were not answered well", ("engine", "reason"), registry=registry
        )
        self._kills = Counter("ft_engine_kills", "Engines taken away, by why", ("reason",), registry=registry)
        self._restarts = Counter("ft_engine_restarts", "Starts after the first one", of, registry=registry)
        self._start = Histogram(
            "ft_engine_start_seconds", "From a start to the first answer", of, buckets=_LONG, registry=registry
        )
        self._refresh = Histogram(
            "ft_engine_refresh_seconds", "Length of a refresh", of, buckets=_LONG, registry=registry
        )
        self._detection = Histogram(
            "ft_engine_detection_seconds",
            "From the last good probe of an engine that missed one to the decision to kill it",
            of,
            buckets=_LONG,
            registry=registry,
        )

    def serve(self, port: int, host: str = "127.0.0.1") -> int:
        """Answer Prometheus at this port (0: a free one); which it is. EngineError when it is taken."""
        try:
            self._server = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise EngineError(f"metrics cannot be served at {host}:{port}: {error.strerror}") from error
        return int(self._server[0].server_address[1])

    def close(self) -> None:
        """Answer no more."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    # -- the observer ---------------------------------------------------------------------------------------------

    def changed(self, event: EngineEvent) -> None:
        """Take in another state."""
        name, after = event.name, event.after
        self._state.labels(name, event.before.value).set(0)
        self._state.labels(name, after.value).set(1)
        self._states[name] = after
        routed = [each for each, state in self._states.items() if state in (State.SERVING, State.SUSPECT)]
        self._up.labels(name).set(name in routed)
        self._serving.set(len(routed))
        self._retired.set(sum(state is State.RETIRED for state in self._states.values()))
        match after:
            case State.STARTING:
                self._since[name] = event.at
                if event.incarnation > 1:
                    self._restarts.labels(name).inc()
            case State.FAILED:
                reason = _first(_KILL_REASONS, event.reason)
                self._kills.labels(reason).inc()
                if event.before in (State.SERVING, State.SUSPECT) and reason in ("timeout", "answer", "connection"):
                    self._detection.labels(name).observe(event.at - self._answered.get(name, event.at))
                self._forget_version(name)
            case State.SERVING:
                self._answered.setdefault(name, event.at)
            case _:
                pass
        if event.before is State.STARTING and after is not State.FAILED:
            self._start.labels(name).observe(event.at - self._since.get(name, event.at))
        if after not in (State.SERVING, State.SUSPECT):
            self._answered.pop(name, None)

    def probed(self, name: str, seconds: float, problem: str) -> None:
        """Take in the end of a probe of an engine that may have answered none before."""
        if not problem:
            self._probe.labels(name).observe(seconds)
            if self._states.get(name) in (State.SERVING, State.SUSPECT):
                self._answered[name] = monotonic()
        elif self._states.get(name) is not State.STARTING:  # who starts has nobody at its port yet
            self._probe.labels(name).observe(seconds)
            self._missed.labels(name, _first(_PROBE_REASONS, problem)).inc()

    def refreshed(self, name: str, version: str, seconds: float, problem: str) -> None:
        """Take in the end of a refresh."""
        self._refresh.labels(name).observe(seconds)
        if not problem:
            self._forget_version(name)
            self._versions[name] = version
            self._version.labels(name, version).set(1)

    def _forget_version(self, name: str) -> None:
        if name in self._versions:
            self._version.remove(name, self._versions.pop(name))


def _first(kinds: Iterable[tuple[str, str]], text: str) -> str:
    """Give the kind of the first words that are in the text: labels must be few."""
    return next(kind for words, kind in kinds if words in text)
