"""What may be set about the fault tolerance of Ray actors, and where it is read from."""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from msgspec import Struct, structs

from ft_launcher.config_file import read_config_file, section_entries
from ft_launcher.config_kinds import Bool, Given, Kind, given_of, read
from ft_launcher.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["UNLIMITED", "RayFaultToleranceConfig"]

UNLIMITED = -1
"""As Ray writes it, of restarts and retries."""


def _number_of_times(text: str) -> int:
    number = int(text)
    if not UNLIMITED <= number <= 1_000_000:
        raise ValueError(text)
    return number


def _steps(text: str) -> float:
    steps = float(text)
    if not 0 < steps < float("inf"):
        raise ValueError(text)
    return steps


_BOOL: Kind = Bool.__metadata__[0]  # type: ignore[attr-defined]  # Annotated has it
_TIMES = Kind(_number_of_times, "a whole number from 0 on, or -1 for no limit", "N")
_STEPS = Kind(_steps, "a number of training steps above 0", "STEPS")

_KINDS = {
    "enable_fault_tolerance": _BOOL,
    "max_restarts": _TIMES,
    "max_task_retries": _TIMES,
    "enable_health_monitoring": _BOOL,
    "health_check_interval": _STEPS,
}
_VARIABLES = {
    "VERL_FAULT_TOLERANCE_ENABLED": "enable_fault_tolerance",
    "VERL_MAX_RESTARTS": "max_restarts",
    "VERL_MAX_TASK_RETRIES": "max_task_retries",
    "VERL_HEALTH_MONITORING_ENABLED": "enable_health_monitoring",
    "VERL_HEALTH_CHECK_INTERVAL": "health_check_interval",
}


class RayFaultToleranceConfig(Struct, frozen=True, kw_only=True):
    """How often an actor is started again, a call sent again, and the actors asked how they are.

    Given to the constructor, values are taken as they are, and UsageError says which one cannot be. `resolve` also
    looks into the environment and a file.
    """

    enable_fault_tolerance: bool = True
    """False: no restart and no retry; an actor that dies stays dead, and its calls raise Ray's error."""
    max_restarts: int = 3
    """Of one actor, or of one gang as a whole; -1: no limit."""
    max_task_retries: int = 2
    """How often one call is sent again because its actor died; -1: no limit."""
    enable_health_monitoring: bool = True
    """False: nobody asks the actors. A death is noticed all the same."""
    health_check_interval: float = 30.0
    """Training steps between two looks at the health of all actors."""

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            checked = read(kind, given_of(value, "", f"{name}="))
            if type(checked) is not type(value) and not (kind is _STEPS and type(value) is int):
                raise UsageError(f"{name}={value!r}: must be {kind.wanted}")

    @classmethod
    def resolve(
        cls,
        path: "str | os.PathLike[str] | None" = None,
        environment: Mapping[str, str] | None = None,
        **explicit: bool | float,
    ) -> "Self":
        """Put the sources together: `explicit` goes before VERL_* variables, these before the file, it before defaults.

        `path`: a YAML file with a `fault_tolerance` section, at any depth. `environment`: None is the process's own.
        Raises UsageError, one line, for what cannot be, whichever source wins.
        """
        found = {} if path is None else _from_file(path)
        for variable, text in (os.environ if environment is None else environment).items():
            if variable in _VARIABLES:
                name = _VARIABLES[variable]
                found[name] = read(_KINDS[name], Given(text, variable, f"{variable}="))
        for name in explicit:
            if name not in _KINDS:
                raise UsageError(f"{name}: no such setting{_nearest(name)}")
        return cls(**(found | explicit))

    @classmethod
    def from_yaml(cls, path: "str | os.PathLike[str]") -> "Self":
        """Read a file, and nothing else. Raises UsageError."""
        return cls.resolve(path, {})

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None) -> "Self":
        """Read the environment, and nothing else. Raises UsageError."""
        return cls.resolve(None, environment)

    def asdict(self) -> dict[str, bool | int | float]:
        """Give the settings by name."""
        return structs.asdict(self)


def _from_file(path: "str | os.PathLike[str]") -> dict[str, Any]:
    found = {}
    for name, given in section_entries(read_config_file(path) or "", str(path)):
        if name not in _KINDS:
            raise UsageError(f"{given.place}: no such key{_nearest(name)}")
        found[name] = read(_KINDS[name], given)
    return found


def _nearest(name: str) -> str:
    near = get_close_matches(name.lower().replace("-", "_"), _KINDS, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_KINDS)}"
