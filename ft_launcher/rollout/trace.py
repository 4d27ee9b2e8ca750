"""What each sample of a rollout spent its time on: spans and events, written as JSON lines while they happen.

    with tracing("trace.jsonl"):
        with trace_sample(12):
            async with trace_span("reward", verifier="unit tests") as span:
                span["passed"] = True

Times are those of time.monotonic_ns(): a clock that is set in the middle changes no duration. One line at the begin
says what the wall clock said. A span's end is written however it ends, on cancellation too. Nothing here raises into
the rollout, and without `tracing` all of it does nothing.
"""

import asyncio
import functools
import inspect
import itertools
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from ft_launcher.rollout.trace_records import FORMAT, Anchor, Begin, End, Event, Status

__all__ = [
    "Tracer",
    "bind_trace",
    "trace_context",
    "trace_event",
    "trace_function",
    "trace_sample",
    "trace_span",
    "tracing",
]

logger = logging.getLogger(__name__)
_F = TypeVar("_F", bound=Callable[..., Any])


class _Place(Struct, frozen=True):
    """Where in the samples' work this code is."""

    sample: str | None = None
    group: str | None = None
    attempt: int = 0
    span: str | None = None


_place: ContextVar[_Place] = ContextVar("ft_trace_place", default=_Place())  # noqa: B039 - frozen
_encoder = msgspec.json.Encoder(enc_hook=repr)


class Tracer:
    """Writes to one file, from any thread; after a fork the child writes there too, under ids of its own."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        """Append to `path`. clock, wall: nanoseconds. OSError where that cannot be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._clock, self._wall = clock, wall
        # A line is written by one call: those of other threads and processes stand before or after it.
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._is_torn = os.fstat(self._descriptor).st_size > 0
        self._has_complained = False
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._process = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._write(Anchor(format=FORMAT, process=self._process, pid=self._pid, at=self._clock(), wall=self._wall()))

    def begin(self, name: str, place: _Place, attributes: Mapping[str, Any]) -> str:
        """Write that a span begins; its id."""
        if os.getpid() != self._pid:
            self._begin()
        span = f"{self._process}-{next(self._numbers)}"
        self._write(
            Begin(
                span=span,
                parent=place.span,
                name=name,
                sample=place.sample,
                group=place.group,
                attempt=place.attempt,
                at=self._clock(),
                attributes=dict(attributes),
            )
        )
        return span

    def end(self, span: str, status: Status, attributes: Mapping[str, Any]) -> None:
        """Write that a span has ended."""
        self._write(End(span=span, status=status, at=self._clock(), attributes=dict(attributes)))

    def event(self, name: str, place: _Place, attributes: Mapping[str, Any]) -> None:
        """Write that something happened, in a span or outside."""
        self._write(
            Event(span=place.span, name=name, sample=place.sample, at=self._clock(), attributes=dict(attributes))
        )

    def _write(self, record: Anchor | Begin | End | Event) -> None:
        try:
            # After a line that came only in part another begins: that one alone is lost.
            line = b"\n" * self._is_torn + _encoder.encode(record) + b"\n"
            self._is_torn = os.write(self._descriptor, line) < len(line)
        except Exception as error:  # noqa: BLE001 - a full disk, an attribute whose repr raises: no reason to end a rollout
            self._is_torn = True
            if not self._has_complained:
                self._has_complained = True
                logger.warning("%s: a line of the trace could not be written: %s", self._path, error)

    def close(self) -> None:
        """Close the file; what is written later is lost."""
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


_tracer: Tracer | None = None


@contextmanager
def tracing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have all spans and events of this process written to a file in this block; added to what is there.

    Where the file cannot be written, a warning says so and the block runs without. RuntimeError inside another one.
    """
    global _tracer
    if _tracer is not None:
        raise RuntimeError("this process is being traced already; `tracing` is for the outermost code")
    try:
        _tracer = Tracer(Path(path))
    except OSError as error:
        logger.warning("%s: there will be no trace: %s", path, error.strerror or error)
    try:
        yield
    finally:
        tracer, _tracer = _tracer, None
        if tracer is not None:
            tracer.close()


class trace_span:
    """A part of the work, for `with` and `async with`; it is a mapping to add attributes to: `span["tokens"] = 12`."""

    def __init__(self, name: str, **attributes: Any) -> None:
        self._name = name
        self._attributes = attributes
        self._added: dict[str, Any] = {}
        self._tracer: Tracer | None = None
        self._span = ""
        self._token: Token[_Place] | None = None

    def __setitem__(self, name: str, value: Any) -> None:
        self._added[name] = value

    def _where(self) -> _Place:
        return _place.get()

    def __enter__(self) -> "trace_span":
        self._tracer = _tracer
        if self._tracer is not None:
            place = self._where()
            self._span = self._tracer.begin(self._name, place, self._attributes)
            self._token = _place.set(msgspec.structs.replace(place, span=self._span))
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if self._tracer is None or self._token is None:
            return
        with suppress(ValueError):  # closed by the collector, in a context of its own
            _place.reset(self._token)
        status = _status(error)
        if status == "error" and "error" not in self._added:
            self._added["error"] = _words(error)
        self._tracer.end(self._span, status, self._added)
        self._tracer = self._token = None

    async def __aenter__(self) -> "trace_span":
        return self.__enter__()

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.__exit__(kind, error, traceback)


class trace_sample(trace_span):
    """All work on one sample: what is traced in this block, and in tasks that it starts, belongs to it."""

    def __init__(
        self, sample: object, *, group: object = None, attempt: int = 0, name: str = "sample", **attributes: Any
    ) -> None:
        """sample, group: what they are known by, as text or numbers. attempt: counted by the caller."""
        super().__init__(name, **attributes)
        self._sample = _Place(str(sample), None if group is None else str(group), attempt)

    def _where(self) -> _Place:
        return msgspec.structs.replace(self._sample, span=_place.get().span)


def trace_event(name: str, **attributes: Any) -> None:
    """Write that something happened now, in the span around."""
    if _tracer is not None:
        _tracer.event(name, _place.get(), attributes)


def trace_function(name: str | None = None, **attributes: Any) -> Callable[[_F], _F]:
    """Make each call of a function, or of a coroutine function, a span. None: the function's name.

    TypeError for a generator: its caller's time would be counted as its own.
    """

    def traced(function: _F) -> _F:
        called = name or function.__qualname__
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{called} is a generator; use trace_span within it")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                async with trace_span(called, **attributes):
                    return await function(*args, **kwargs)

            return call_async  # type: ignore[return-value] # of the same signature

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with trace_span(called, **attributes):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value] # of the same signature

    return traced


def trace_context() -> dict[str, Any]:
    """Give where this code is as plain values, to be sent to another process for `bind_trace`."""
    return msgspec.structs.asdict(_place.get())


@contextmanager
def bind_trace(context: Mapping[str, Any]) -> Iterator[None]:
    """Go on where `trace_context` was called; what that did not give is ignored."""
    try:
        place = msgspec.convert(dict(context), _Place)
    except (ValueError, TypeError) as error:
        logger.warning("this is not of trace_context(): %s", error)
        place = _place.get()
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def _status(error: BaseException | None) -> Status:
    match error:
        case None:
            return "ok"
        case asyncio.CancelledError() | GeneratorExit():  # the latter: a coroutine that is thrown away
            return "cancelled"
        case TimeoutError() | asyncio.TimeoutError():  # two kinds until Python 3.11
            return "timeout"
        case _:
            return "error"


def _words(error: BaseException | None) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - somebody's __str__
        return type(error).__name__


if __name__ == "__main__":
    from ft_launcher.rollout.trace_command import main

    sys.exit(main())
