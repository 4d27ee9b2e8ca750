"""The settings of an engine supervisor and of its engines, from Python or a YAML file."""

from math import inf

from msgspec import Struct

from ft_launcher.errors import UsageError

__all__ = ["EngineConfig", "out_of_range"]


class EngineConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How engines are watched. Times in seconds."""

    health_check_first_wait: float = 300.0
    """Missed probes do not count for so long after an engine's start, until its first answered one while it serves."""
    health_check_interval: float = 10.0
    """From the begin of one sweep over all engines to the next."""
    health_check_timeout: float = 5.0
    """Within which a probe must be answered, from the connection to the last byte."""
    health_check_failures: int = 1
    """Probes missed in a row after which an engine is killed. 1 as the documents promise; 3 is more patient."""
    mass_failure_fraction: float = 0.5
    """When more than this part of the engines fails at once, look once more before killing: it may be the network."""
    startup_timeout: float = 1800.0
    ready_interval: float = 0.5
    """Between two looks whether an engine that starts answers."""
    max_restarts: int = 3
    """Of one engine within `restart_window`; then it is retired."""
    restart_window: float = 3600.0
    backoff_first: float = 1.0
    """Least time from one restart to the next, of an engine that has not served in between; it doubles."""
    backoff_most: float = 60.0
    min_serving: int = 1
    """With fewer engines alive, restart at once instead of after the round."""
    term_grace: float = 10.0
    """From SIGTERM to SIGKILL."""
    refresh_timeout: float = 600.0

    def backoff(self, failures: int) -> float:
        """Give the least time between the last start and the next after so many failures in a row."""
        return (
            min(self.backoff_most, self.backoff_first * 2.0 ** max(0, min(failures, 30) - 2)) if failures > 1 else 0.0
        )

    def check(self) -> None:
        """Raise UsageError for what cannot be meant."""
        for name in self.__struct_fields__:
            if problem := out_of_range(name, getattr(self, name)):
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be {problem}")


_AT_LEAST_0 = {"health_check_first_wait", "restart_window", "backoff_first", "backoff_most", "term_grace"}
_COUNTS = {"health_check_failures": 1, "max_restarts": 0, "min_serving": 0}


def out_of_range(name: str, value: float) -> str:
    """Say what a setting must be, when it is not: empty when it is."""
    if name in _COUNTS:
        least = _COUNTS[name]
        return "" if isinstance(value, int) and value >= least else f"a whole number, {least} or more"
    if name == "mass_failure_fraction":
        return "" if 0 <= value <= 1 else "a number from 0 to 1"
    if name in _AT_LEAST_0:
        return "" if 0 <= value < inf else "a number of seconds, 0 or more"
    return "" if value > 0 else "a number of seconds above 0"
