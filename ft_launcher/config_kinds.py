"""What may be written for a setting, and how its value is read from text.

Every source is read as text, a file's scalars too: YAML 1.1 makes 90 of `1:30` and 8 of `010`.
"""

import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, NamedTuple, get_args

import msgspec

from ft_launcher.errors import UsageError

__all__ = [
    "Bool",
    "FilePath",
    "Given",
    "Grace",
    "Interval",
    "Kind",
    "LinkTemplate",
    "LogLevel",
    "Number",
    "SectionTimeouts",
    "Signal",
    "SignalNames",
    "SourceNames",
    "Switch",
    "Timeout",
    "given_of",
    "one_of",
    "or_null",
    "read",
    "shown",
    "unique",
]

_MAX_NAME_BYTES, _MAX_NAMES = 64, 256  # what a rank's page holds (page.py, which does I/O)
_TOO_LONG = 1e9  # 31 years: nobody means it, and its nanoseconds still fit a stamp of 64 bits


class Given(NamedTuple):
    """What one source says about one setting, not read yet."""

    value: "str | list[tuple[str, Given]] | None"
    """Text, a mapping's entries as they stand, or None for a list, which no setting takes."""
    origin: str
    label: str
    """How an error begins, up to the value: `ft.yaml:7: fault_tolerance.log_level: `, `--ft-log-level `."""

    @property
    def place(self) -> str:
        """How an error begins that is not about the value."""
        return self.label.rstrip(":= ")

    @property
    def written(self) -> str:
        """The place and the value, on one line whatever the value is."""
        match self.value:
            case None:
                return f"{self.label}a list"
            case str(text):
                return self.label + shown(text)
            case _:
                return f"{self.label}a mapping"


def shown(text: str, *, at_most: int = 80) -> str:
    """Give a text that others wrote so that it stays on one line."""
    if text.isprintable() and 0 < len(text) <= at_most:
        return text
    return repr(text) if len(text) <= at_most else f"{text[:at_most]!r}..."


def given_of(value: object, origin: str, label: str) -> Given:
    """Give a Python value as one would write it."""
    match value:
        case None:
            return Given("null", origin, label)
        case Mapping():
            place = Given(None, origin, label).place
            entries = [
                (str(name), given_of(each, origin, f"{place}.{shown(str(name))}: "))  # as in a file
                for name, each in value.items()
            ]
            return Given(entries, origin, label)
        case list() | tuple() | set():
            return Given(None, origin, label)
        case signal.Signals():
            return Given(value.name, origin, label)
        case _:
            return Given(str(value), origin, label)


def unique(entries: list[tuple[str, Given]]) -> dict[str, Given]:
    """Give the entries by name. Raises UsageError when one is there twice."""
    found: dict[str, Given] = {}
    for name, given in entries:
        if name in found:
            raise UsageError(f"{given.place}: given twice, first at {found[name].origin}")
        found[name] = given
    return found


class Kind(NamedTuple):
    """What may be written for a setting."""

    read: Callable[[str], object]
    """Raises ValueError or KeyError when it is not of this kind. (Of a mapping: reads one of its values)."""
    wanted: str
    """The same in words, to follow "must be"."""
    metavar: str
    """What stands for the value in help; empty when the flag takes none."""
    write: Callable[[Any], str] = str


def read(kind: Kind, given: Given) -> object:
    """Read what was given. Raises UsageError."""
    if kind is _TIMEOUTS:
        return _section_timeouts(given)
    if isinstance(given.value, str):
        with suppress(ValueError, KeyError):
            return kind.read(given.value.strip())
    raise UsageError(f"{given.written}: must be {kind.wanted}")


def _section_timeouts(given: Given) -> dict[str, object]:
    if given.value is None:
        raise UsageError(f"{given.written}: must be {_TIMEOUTS.wanted}")
    entries = unique(list(_pairs(given)) if isinstance(given.value, str) else given.value)
    for name in entries:
        # Names go into log lines; a lone surrogate, which has no UTF-8, is not printable either.
        if not name.isprintable() or not 0 < len(name.encode()) <= _MAX_NAME_BYTES:
            raise UsageError(
                f"{given.label}{shown(name)}: the name of a section must be"
                f" 1 to {_MAX_NAME_BYTES} bytes of printable UTF-8"
            )
    if len(entries) > _MAX_NAMES:
        raise UsageError(f"{given.place}: {len(entries)} sections; {_MAX_NAMES} are the most")
    return {name: read(_TIMEOUT, entry) for name, entry in entries.items()}


def _pairs(given: Given) -> Iterator[tuple[str, Given]]:
    """Take `name:duration,name:duration` apart, as the peer's flag has it."""
    text = str(given.value).strip()
    for pair in text.split(",") if text.lower() not in _NULL else ():
        name, colon, timeout = (part.strip() for part in pair.partition(":"))
        if not colon or ":" in timeout:
            raise UsageError(f"{given.written}: must be {_TIMEOUTS.wanted}")
        yield name, Given(timeout, given.origin, f"{given.written}: {shown(name)}: ")


_DURATION = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)(ms|s|m|h)?")


def _seconds(text: str) -> float:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(text)
    number = float(match[1])
    seconds = number / 1000 if match[2] == "ms" else number * {"m": 60, "h": 3600}.get(match[2], 1)
    if seconds >= _TOO_LONG:
        raise ValueError(text)
    return seconds


def _seconds_above_zero(text: str) -> float:
    seconds = _seconds(text)
    if seconds == 0:
        raise ValueError(text)
    return seconds


def _written_seconds(seconds: float) -> str:
    for unit, length in (("h", 3600), ("m", 60)):
        if seconds and seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s" if seconds == int(seconds) else f"{seconds!r}s"


def _factor(text: str) -> float:
    number = float(text)
    if not 1 <= number <= 1000:  # below 1 a calculated timeout kills ranks that do as they always did
        raise ValueError(text)
    return number


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1000):
        raise ValueError(text)
    return int(text)


_KEEPS_RUNNING = {"SIGCHLD", "SIGCONT", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGWINCH"}


def _signal(text: str) -> signal.Signals:
    found = signal.Signals(int(text)) if text.isdecimal() else signal.Signals[text.upper()]
    if found.name in _KEEPS_RUNNING:
        raise ValueError(text)
    return found


_WARNS = ("SIGTERM", "SIGUSR1", "SIGUSR2")


def _signal_names(text: str) -> str:
    if text.lower() == "off":
        return "off"
    names = list(dict.fromkeys(name.strip().upper() for name in text.split(",")))
    if not set(names) <= set(_WARNS):
        raise ValueError(text)
    return ",".join(names)


def _source_names(text: str) -> str:
    from ft_launcher.notices import source_names  # with all that reads dates: 5 ms in each rank

    return ",".join(source_names(text))


# Of the logging module, which a rank monitor never loads: 0.9 MB.
_LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
_OTHER_LEVELS = {"DBG": 10, "WARN": 30, "FATAL": 50}


def _level(text: str) -> int:
    named = {**_LEVELS, **_OTHER_LEVELS}.get(text.upper())
    level = int(text) if named is None else named
    if not 10 <= level <= 50:
        raise ValueError(text)
    return level


def _written_level(level: int) -> str:
    return next((name for name, number in _LEVELS.items() if number == level), str(level))


_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def _bool(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(text)
    return text.lower() in _TRUE


def _path(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError(text)
    return text


def _template(text: str) -> str:
    if "{dev_name}" not in _path(text):
        raise ValueError(text)
    return text


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()  # which YAML reads as the same text


def _written_timeouts(timeouts: Mapping[str, float | None]) -> str:
    entries = (f"{_quoted(name)}: {_TIMEOUT.write(timeout)}" for name, timeout in timeouts.items())
    return f"{{{', '.join(entries)}}}"


_NULL = ("", "null", "none", "~")


def or_null(kind: Kind) -> Kind:
    """Allow `null` too, which is None."""
    return Kind(
        lambda text: None if text.lower() in _NULL else kind.read(text),
        f"{kind.wanted} or null",
        kind.metavar,
        lambda value: "null" if value is None else kind.write(value),
    )


def one_of(literal: Any) -> Kind:
    """Allow the words of a `Literal`."""
    words = get_args(literal)
    return Kind({word: word for word in words}.__getitem__, " or ".join(words), f"{{{','.join(words)}}}")


_INTERVAL = Kind(_seconds_above_zero, "a duration above 0 (90, 90s, 5m, 1h)", "DURATION", _written_seconds)
_TIMEOUT = or_null(_INTERVAL)
_TIMEOUTS = Kind(
    _TIMEOUT.read,
    "durations by section (step:90s,eval:5m)",
    "NAME:DURATION,...",
    _written_timeouts,
)
_BOOL = Kind(_bool, "true or false", "BOOL", lambda value: str(value).lower())

Interval = Annotated[float, _INTERVAL]
Grace = Annotated[float, Kind(_seconds, "a duration (90, 90s, 5m, 1h)", "DURATION", _written_seconds)]
Timeout = Annotated[float | None, _TIMEOUT]
SectionTimeouts = Annotated[dict[str, float | None], _TIMEOUTS]
Count = Annotated[int | None, or_null(Kind(_count, "a whole number from 1 to 1000", "COUNT"))]
Number = Annotated[float, Kind(_factor, "a number from 1 to 1000", "NUMBER", repr)]
Signal = Annotated[
    signal.Signals,
    Kind(_signal, "a signal that ends a process (SIGTERM, SIGKILL)", "SIGNAL", lambda value: str(value.name)),
]
SignalNames = Annotated[
    str | None,
    or_null(Kind(_signal_names, "off, or SIGTERM, SIGUSR1, SIGUSR2 with commas between", "SIGNALS")),
]
SourceNames = Annotated[
    str | None,
    or_null(
        Kind(_source_names, "aws, gcp, azure, azure-acknowledge or file:/path, with commas between", "SOURCES", _quoted)
    ),
]
LogLevel = Annotated[
    int,
    Kind(_level, "debug, info, warning, error, critical or a number from 10 to 50", "LEVEL", _written_level),
]
Bool = Annotated[bool, _BOOL]
Switch = Annotated[bool, _BOOL._replace(metavar="")]
FilePath = Annotated[str | None, or_null(Kind(_path, "a path", "PATH", _quoted))]
LinkTemplate = Annotated[
    str | None,
    or_null(Kind(_template, "a path with {dev_name} in it", "TEMPLATE", _quoted)),
]
