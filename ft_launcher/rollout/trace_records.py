"""The lines of a trace, and the spans that are read from them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from ft_launcher.errors import FtLauncherError

__all__ = ["FORMAT", "Anchor", "Begin", "End", "Event", "Mark", "Span", "Status", "Trace", "TraceError", "read_trace"]

FORMAT = 1
"""Raised by one with every change that an older reader would misunderstand."""

Status = Literal["ok", "error", "cancelled", "timeout"]


class TraceError(FtLauncherError):
    """This is no trace that can be read; the text is one sentence for a person."""


class Anchor(Struct, tag="anchor", tag_field="kind", frozen=True, kw_only=True):
    """A process begins to write. `wall`: what its wall clock said then, in ns since 1970."""

    format: int
    process: str
    pid: int
    at: int
    wall: int


class Begin(Struct, tag="begin", tag_field="kind", frozen=True, kw_only=True, omit_defaults=True):
    """A span begins. Ids begin with that of the process and a dash. `at`: ns of its monotonic clock."""

    span: str
    name: str
    at: int
    parent: str | None = None
    sample: str | None = None
    group: str | None = None
    attempt: int = 0
    attributes: dict[str, Any] = msgspec.field(default_factory=dict)


class End(Struct, tag="end", tag_field="kind", frozen=True, kw_only=True, omit_defaults=True):
    """A span has ended."""

    span: str
    status: Status
    at: int
    attributes: dict[str, Any] = msgspec.field(default_factory=dict)


class Event(Struct, tag="event", tag_field="kind", frozen=True, kw_only=True, omit_defaults=True):
    """Something happened."""

    name: str
    at: int
    span: str | None = None
    sample: str | None = None
    attributes: dict[str, Any] = msgspec.field(default_factory=dict)


class Span(Struct, kw_only=True):
    """A span as it was read. Times in ns of the monotonic clock, which all processes of a machine share.

    `status` is "open" where its process died, or has not ended it yet; then it ends with the trace.
    """

    id: str
    parent: str | None
    name: str
    sample: str | None
    group: str | None
    attempt: int
    begin: int
    end: int
    status: Status | Literal["open"]
    attributes: dict[str, Any]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end - self.begin) / 1e9


class Mark(Struct, kw_only=True):
    """An event as it was read."""

    name: str
    sample: str | None
    at: int
    attributes: dict[str, Any]


class Trace(Struct, kw_only=True):
    """All that a file says. `unreadable`: lines that are torn or are none of ours."""

    spans: list[Span]
    events: list[Mark]
    anchor: Anchor
    unreadable: int

    def samples(self) -> list[list[Span]]:
        """Give the spans of each sample, by their begin; the sample that took longest first."""
        found: dict[str, list[Span]] = {}
        for span in self.spans:
            if span.sample is not None:
                found.setdefault(span.sample, []).append(span)
        return sorted(found.values(), key=duration, reverse=True)


def duration(spans: list[Span]) -> float:
    """Seconds from the first begin to the last end."""
    return (max(each.end for each in spans) - min(each.begin for each in spans)) / 1e9


def read_trace(path: Path) -> Trace:
    """Read a trace, also one that is being written. Raises TraceError."""
    spans: dict[str, Span] = {}
    events: list[Mark] = []
    anchor: Anchor | None = None
    unreadable, last = 0, 0
    for record in _records(path):
        if record is None:
            unreadable += 1
            continue
        last = max(last, record.at)
        match record:
            case Anchor():
                if record.format != FORMAT:
                    raise TraceError(f"{path}: it has format {record.format}; this ft_launcher reads format {FORMAT}")
                anchor = anchor or record
            case Begin():
                spans[record.span] = _opened(record)
            case End():
                if record.span in spans:
                    span = spans[record.span]
                    span.end, span.status = record.at, record.status
                    span.attributes |= record.attributes
            case Event():
                events.append(Mark(name=record.name, sample=record.sample, at=record.at, attributes=record.attributes))
    if anchor is None:
        raise TraceError(f"{path}: it is no trace: no line of it says when it began")
    for span in spans.values():
        if span.status == "open":
            span.end = max(last, span.begin)
    ordered = sorted(spans.values(), key=lambda each: (each.begin, -each.end))
    return Trace(spans=ordered, events=events, anchor=anchor, unreadable=unreadable)


def _records(path: Path) -> Iterator[Anchor | Begin | End | Event | None]:
    decoder: msgspec.json.Decoder[Anchor | Begin | End | Event] = msgspec.json.Decoder(Anchor | Begin | End | Event)
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    try:
                        yield decoder.decode(line)
                    except (ValueError, RecursionError):
                        yield None
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from None


def _opened(record: Begin) -> Span:
    return Span(
        id=record.span,
        parent=record.parent,
        name=record.name,
        sample=record.sample,
        group=record.group,
        attempt=record.attempt,
        begin=record.at,
        end=record.at,
        status="open",
        attributes=dict(record.attributes),
    )
