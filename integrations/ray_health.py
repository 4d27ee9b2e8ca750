"""Looks at the health of all actors every so many training steps, and emits the metrics of each step."""

from collections.abc import Iterable
from typing import Any

from ft_launcher.integrations.ray_config import RayFaultToleranceConfig
from ft_launcher.integrations.ray_metrics import ActorMetrics
from ft_launcher.integrations.ray_supervised import Supervised

__all__ = ["HealthMonitor"]


class HealthMonitor:
    """Call `step` once in each training step. (What hangs is found without: each actor is pinged all the time.)"""

    def __init__(
        self, watched: Iterable[Supervised[Any]], config: RayFaultToleranceConfig, metrics: ActorMetrics
    ) -> None:
        self._watched = tuple(watched)
        self._config, self._metrics = config, metrics
        self._is_on = config.enable_fault_tolerance and config.enable_health_monitoring
        self._last = 0

    def look(self) -> dict[str, bool]:
        """Ask all of them, side by side: which roles are healthy. It takes at most the longest `ping_timeout`."""
        answers = [(each.role, each.check()) for each in self._watched]
        health: dict[str, bool] = {}
        for role, answer in answers:
            health[role] = answer.result() and health.get(role, True)
        return health

    def step(self, step: int) -> dict[str, float]:
        """Emit the metrics of this step, and give them; with health in the first step of each `health_check_interval`.

        A training may go back to earlier steps: intervals that it comes through again have their look again.
        """
        interval = self._config.health_check_interval
        is_due = self._is_on and step // interval != self._last // interval
        self._last = step
        return self._metrics.emit(step, self.look() if is_due else None)
