"""What became of the actors, in numbers: failures, restarts and health by role, for any sink."""

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["ROLES", "ActorMetrics", "Sink", "to_json_lines", "to_prometheus", "to_tensorboard"]

logger = logging.getLogger(__name__)

ROLES = ("actor_rollout", "critic", "ref_policy")
"""Of a PPO job; a metric of each is there from the first step on."""

Sink = Callable[[Mapping[str, float], int], Any]
"""Takes the metrics by name, and the training step."""


class ActorMetrics:
    """Counts, and tells the sinks. It may be used from any thread.

    `actor_failures/<role>` and `actor_restarts/<role>`: since the emission before; `…/total`: their sum over the roles;
    `…/<role>_cumulative`: since the start. `actor_health/<role>`: 1 while all actors of the role are healthy, else 0.
    """

    def __init__(self, sinks: Iterable[Sink] = (), roles: Collection[str] = ROLES) -> None:
        self._sinks = tuple(sinks)
        self._roles = dict.fromkeys(roles)
        self._lock = threading.Lock()
        self._counted = {"actor_failures": Counter[str](), "actor_restarts": Counter[str]()}
        self._emitted = {"actor_failures": Counter[str](), "actor_restarts": Counter[str]()}

    def failed(self, role: str) -> None:
        """Count a death, or a kill because of a hang."""
        self._count("actor_failures", role)

    def restarted(self, role: str) -> None:
        """Count a restart."""
        self._count("actor_restarts", role)

    def _count(self, what: str, role: str) -> None:
        with self._lock:
            self._roles.setdefault(role)
            self._counted[what][role] += 1

    def emit(self, step: int, health: Mapping[str, bool] | None = None) -> dict[str, float]:
        """Tell the sinks, and give, what was counted up to this step; `health` by role, where somebody has looked."""
        metrics: dict[str, float] = {}
        with self._lock:
            for what, counted in self._counted.items():
                emitted = self._emitted[what]
                for role in self._roles:
                    metrics[f"{what}/{role}"] = counted[role] - emitted[role]
                metrics[f"{what}/total"] = counted.total() - emitted.total()
                for role in self._roles:
                    metrics[f"{what}/{role}_cumulative"] = counted[role]
                self._emitted[what] = counted.copy()
        metrics |= {f"actor_health/{role}": int(is_healthy) for role, is_healthy in (health or {}).items()}
        for sink in self._sinks:
            try:
                sink(metrics, step)
            except Exception:
                logger.exception("a sink of metrics failed at step %d; the training goes on", step)
        return metrics


def to_json_lines(path: str | Path) -> Sink:
    """Append a line to a file for each emission: `step`, and the metrics by name."""

    def sink(metrics: Mapping[str, float], step: int) -> None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    return sink


def to_tensorboard(writer: Any) -> Sink:
    """Write scalars with a `torch.utils.tensorboard.SummaryWriter`, or whatever has its `add_scalar`."""

    def sink(metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return sink


def to_prometheus(registry: Any = None) -> Sink:
    """Keep `ft_ray_actor_failures_total{role}`, `ft_ray_actor_restarts_total{role}` and `ft_ray_actor_health{role}`.

    `registry`: a prometheus_client.CollectorRegistry; None is the process's own.
    """
    from prometheus_client import REGISTRY, Counter, Gauge

    registry = REGISTRY if registry is None else registry
    counters = {
        "actor_failures": Counter("ft_ray_actor_failures", "Ends of Ray actors", ["role"], registry=registry),
        "actor_restarts": Counter("ft_ray_actor_restarts", "Restarts of Ray actors", ["role"], registry=registry),
    }
    health = Gauge("ft_ray_actor_health", "1 while all actors of the role answer", ["role"], registry=registry)

    def sink(metrics: Mapping[str, float], _step: int) -> None:
        for name, value in metrics.items():
            what, _, role = name.partition("/")
            if what == "actor_health":
                health.labels(role).set(value)
            elif role != "total" and not role.endswith("_cumulative"):
                counters[what].labels(role).inc(value)

    return sink
