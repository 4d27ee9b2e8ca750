"""What a source of preemption notices says: nothing yet, no notice, a notice, or an error; never less than it knows.

Pure: what a provider or a file answered goes in, a `State` comes out. Whatever is not understood is a `SourceError`;
`Clear` needs the very answer that the provider documents for it. What the providers say is told at `read_aws`,
`read_gcp_preempted`, `read_gcp_maintenance` and `read_azure`, each with its source.
"""

import math
from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple, TypeAlias

import msgspec
from msgspec import Struct

__all__ = [
    "GCP_GRACE",
    "SOURCES_WANTED",
    "AzureEvent",
    "Clear",
    "Instant",
    "Notice",
    "SourceError",
    "State",
    "Unknown",
    "azure_events",
    "is_same",
    "read_aws",
    "read_azure",
    "read_file",
    "read_gcp_maintenance",
    "read_gcp_preempted",
    "source_names",
]

GCP_GRACE = 30.0
"""Seconds from the preemption of a Spot VM to its end, at best (Compute Engine, "Preemption process")."""

SOURCES_WANTED = "aws, gcp, azure, azure-acknowledge or file:/path"
"""What a user may name, in words, to follow "must be"."""

_WORDS = ("aws", "gcp", "azure", "azure-acknowledge")
_FILE = "file:"

SAME_WITHIN = 1.0
"""Deadlines that differ by fewer seconds are one: each look computes it anew, and the wall clock is being adjusted."""


class Unknown(Struct, frozen=True, tag="unknown"):
    """The source has not answered yet."""


class Clear(Struct, frozen=True, tag="clear"):
    """The source has answered that no notice is there."""


class Notice(Struct, frozen=True, tag="notice"):
    """This machine will be taken away, stopped or started anew."""

    kind: str
    """What will happen, in one word: of AWS "terminate", "stop", "hibernate"; of GCP "preempt", "terminate"; of Azure
    "preempt", "terminate", "redeploy", "reboot"; of a file "file"."""
    source: str
    """Who says so: "aws", "gcp", "gcp-maintenance", "azure", "file:/path"."""
    deadline: float | None
    """When it will happen, in seconds of this machine's `time.monotonic()`. None: not known, or past."""
    description: str
    """What was said, for a person: part of a sentence, on one line."""


class SourceError(Struct, frozen=True, tag="error"):
    """The source did not answer, or not as it should: whether there is a notice is not known."""

    what: str
    """What went wrong, for a person: part of a sentence, on one line; begins with the URL or path once a source
    (preemption_sources.py) has made it."""


State: TypeAlias = Unknown | Clear | Notice | SourceError


class Instant(NamedTuple):
    """One moment on both clocks: providers name times of the wall clock, deadlines are monotonic."""

    monotonic: float
    wall: float
    """Seconds since 1970, UTC."""


def is_same(before: State, after: State) -> bool:
    """Say whether a source says what it has said before, be its deadline computed anew."""
    match before, after:
        case Notice(deadline=float(old)), Notice(deadline=float(new)) if abs(new - old) < SAME_WITHIN:
            return msgspec.structs.replace(before, deadline=new) == after
        case _:
            return before == after


# -- what a user writes -----------------------------------------------------------------------------------------------


def source_names(text: str) -> tuple[str, ...]:
    """Give the sources that a user has named, with commas between them, each once.

    Raises ValueError with what is wrong, to follow the name of the setting.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(","))) if text.strip() else ()
    for name in names:
        if name not in _WORDS and not _names_file(name):
            raise ValueError(f"{_shown(name)}: must be {SOURCES_WANTED}{_advice(name)}")
    if {"azure", "azure-acknowledge"} <= set(names):
        raise ValueError("azure, azure-acknowledge: give one of them; the second acknowledges what it has found")
    return names


def _names_file(name: str) -> bool:
    # A relative path would be another file wherever a launcher is started.
    return name.startswith(_FILE + "/") and name.isprintable()


def _advice(name: str) -> str:
    from difflib import get_close_matches  # 3 ms, for an error only

    if name.lower().startswith("file"):
        nearest: list[str] = ["file:/path, with an absolute path"]
    else:
        nearest = get_close_matches(name.lower().replace("_", "-"), _WORDS, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


# -- AWS --------------------------------------------------------------------------------------------------------------


class _InstanceAction(Struct):
    action: str
    time: str = ""


def read_aws(status: int, body: bytes, now: Instant) -> State:
    """Read an answer of `/latest/meta-data/spot/instance-action` (EC2, "Spot Instance interruption notices").

    404: no notice. 200: what will be done, two minutes ahead; of "hibernate" at once.
    """
    if status == 404:
        return Clear()
    if status != 200:
        return _unexpected(status, body)
    try:
        said = msgspec.json.decode(body, type=_InstanceAction)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _unexpected(status, body)
    if said.action not in ("terminate", "stop", "hibernate"):
        return _unexpected(status, body)
    return _notice("aws", said.action, _iso_time(said.time), now, f"EC2 will {said.action} this Spot Instance")


def _iso_time(text: str) -> datetime | None:
    try:
        return msgspec.convert(text, datetime)
    except msgspec.ValidationError:
        return None


# -- GCP --------------------------------------------------------------------------------------------------------------


def read_gcp_preempted(status: int, body: bytes, now: Instant) -> State:
    """Read an answer of `/computeMetadata/v1/instance/preempted` (Compute Engine, "Spot VMs"): TRUE or FALSE."""
    match status, body.strip():
        case 200, b"FALSE":
            return Clear()
        case 200, b"TRUE":
            said = f"Compute Engine preempts this VM, which ends in about {GCP_GRACE:g} s"
            return Notice("preempt", "gcp", now.monotonic + GCP_GRACE, said)
        case _:
            return _unexpected(status, body)


def read_gcp_maintenance(status: int, body: bytes, now: Instant) -> State:  # noqa: ARG001 (as the others)
    """Read an answer of `/computeMetadata/v1/instance/maintenance-event` (Compute Engine, "Host maintenance").

    The time until a termination depends on the type of machine, from 60 s to an hour, and is not said: no deadline.
    """
    match status, body.strip():
        case 200, b"NONE" | b"MIGRATE_ON_HOST_MAINTENANCE":  # a migration is a pause, which heartbeats outlast
            return Clear()
        case 200, b"TERMINATE_ON_HOST_MAINTENANCE":
            said = "Compute Engine will terminate this VM for maintenance of its host"
            return Notice("terminate", "gcp-maintenance", None, said)
        case _:
            return _unexpected(status, body)


# -- Azure ------------------------------------------------------------------------------------------------------------

_STOPS = ("preempt", "terminate", "redeploy", "reboot")


class AzureEvent(Struct, rename="pascal"):
    """A scheduled event (Azure, "Scheduled Events", version 2020-07-01)."""

    event_id: str
    event_type: str
    resources: list[str]
    event_status: str = ""
    not_before: str = ""
    """As HTTP has dates; empty once it has started."""

    @property
    def kind(self) -> str:
        """What it does, in our spelling."""
        return self.event_type.lower()

    @property
    def is_stop(self) -> bool:
        """Whether the VM stops, rather than only pauses."""
        return self.kind in _STOPS

    def names(self, vm_name: str) -> bool:
        """Say whether it is about this VM: every VM of a set is told of the events of all."""
        return vm_name.casefold() in map(str.casefold, self.resources)


class _AzureDocument(Struct, rename="pascal"):
    events: list[AzureEvent]


def azure_events(status: int, body: bytes, vm_name: str) -> list[AzureEvent] | SourceError:
    """Read an answer of `/metadata/scheduledevents`: the events of this VM."""
    if status != 200:
        return _unexpected(status, body)
    try:
        events = msgspec.json.decode(body, type=_AzureDocument).events
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _unexpected(status, body)
    return [event for event in events if event.names(vm_name)]


def read_azure(events: Iterable[AzureEvent], now: Instant) -> State:
    """Say what the events of this VM mean for it: the first of those that stop it.

    A "Freeze" is a pause of some seconds. An event of a type that is not known is an error, but no reason to overlook
    another one.
    """
    events = list(events)
    notices = [_of_event(event, now) for event in events if event.is_stop]
    if notices:
        return min(notices, key=lambda notice: math.inf if notice.deadline is None else notice.deadline)
    strange = [event.event_type for event in events if event.kind != "freeze"]
    return SourceError(f"announced an event of the unknown type {_shown(strange[0])}") if strange else Clear()


def _of_event(event: AzureEvent, now: Instant) -> Notice:
    said = f"Azure will {event.kind} this VM (event {_shown(event.event_id)}, {_shown(event.event_status)})"
    return _notice("azure", event.kind, _http_time(event.not_before), now, said)


def _http_time(text: str) -> datetime | None:
    from email.utils import parsedate_to_datetime  # 5 ms, which nobody else needs

    try:
        return parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):  # which of them, differs between releases of Python
        return None


# -- a file -----------------------------------------------------------------------------------------------------------


def read_file(path: str, content: bytes, now: Instant) -> Notice:
    """Read the content of a file that is there: the seconds until the end, or nothing.

    That it is there is the notice; whatever else is written in it takes nothing from that.
    """
    text = content.decode(errors="replace").strip()
    seconds = _seconds(text)
    if seconds is not None:
        said = f"{path} is there and gives {seconds:g} s"
    else:
        said = f"{path} is there" + (f"; {_shown(text)} in it is not a number of seconds" if text else "")
    return Notice("file", _FILE + path, None if seconds is None else now.monotonic + seconds, said)


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


# -- of all -----------------------------------------------------------------------------------------------------------


def _notice(source: str, kind: str, at: datetime | None, now: Instant, said: str) -> Notice:
    if at is None or at.tzinfo is None:
        return Notice(kind, source, None, f"{said}, no time given")
    left = at.timestamp() - now.wall
    # A time that has passed, while we still run, is no time to stop saving at.
    return Notice(kind, source, now.monotonic + left if left > 0 else None, f"{said} at {at.isoformat(' ')}")


def _unexpected(status: int, body: bytes) -> SourceError:
    return SourceError(f"answered {status} with {body[:60]!r}" if body else f"answered {status}")


def _shown(text: str) -> str:
    return text if text.isprintable() and 0 < len(text) <= 60 else repr(text[:60])
