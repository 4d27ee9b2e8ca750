"""Watches over the sources of preemption notices: one thread a node, which asks metadata services and looks at files.

with Watcher(parse_sources("aws,file:/run/preempt", os.environ), on_change) as watcher: ...
"""

import logging
import os
import selectors
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from types import TracebackType
from typing import TypeAlias

from ft_launcher.errors import UsageError
from ft_launcher.metadata_http import LINK_LOCAL, Answer, Exchange, Request, Unanswered, base_url
from ft_launcher.notices import Clear, Notice, SourceError, State, Unknown, is_same, source_names
from ft_launcher.preemption_sources import AwsSpot, Azure, File, Gcp, Look, Source, Woken

__all__ = [
    "AwsSpot",
    "Azure",
    "Clear",
    "File",
    "Gcp",
    "Notice",
    "Source",
    "SourceError",
    "State",
    "Unknown",
    "Watcher",
    "parse_sources",
]

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 1.0
"""`close` waits so long for a callback, or a look at a file, that is under way."""

OnChange: TypeAlias = Callable[[str, State], None]


def parse_sources(names: str | Iterable[str], environment: Mapping[str, str]) -> list[Source]:
    """Give the sources that a user has named: a list of names, or a text with commas between them. Does no I/O.

    Names: "aws", "gcp", "azure", "azure-acknowledge", "file:/path". The environment may say where the metadata services
    are (FT_METADATA_AWS_URL, FT_METADATA_GCP_URL, FT_METADATA_AZURE_URL). Raises UsageError.
    """
    try:
        found = source_names(names if isinstance(names, str) else ",".join(names))
    except ValueError as error:
        raise UsageError(f"preemption sources: {error}") from None
    return [source for name in found for source in _sources(name, environment)]


def _sources(name: str, environment: Mapping[str, str]) -> list[Source]:
    if name.startswith("file:"):
        return [File(name.removeprefix("file:"))]
    url = _service(environment, f"FT_METADATA_{name.partition('-')[0].upper()}_URL")
    match name:
        case "aws":
            return [AwsSpot(url)]
        case "gcp":
            return [Gcp(url), Gcp(url, maintenance=True)]
        case _:
            return [Azure(url, acknowledge=name == "azure-acknowledge")]


def _service(environment: Mapping[str, str], variable: str) -> str:
    text = environment.get(variable, "")
    try:
        return base_url(text) if text else LINK_LOCAL
    except ValueError:
        wanted = "http:// with a numeric address or localhost, and a port if not 80"
        raise UsageError(f"{variable}={text}: must be {wanted}") from None


class Watcher:
    """Asks the sources, each at its own pace, in one thread ("preemption"), until `close`.

    `on_change(source's name, state)` is called on that thread with each change of a source's state; every source is
    `Unknown` at first. Errors are logged here, once a change; a notice is not: that is for whoever hears of it.
    Without sources there is no thread.
    """

    def __init__(self, sources: Sequence[Source], on_change: OnChange) -> None:
        self._on_change = on_change
        self._watched = [_Watched(source) for source in sources]
        self._is_closing = False
        self._is_to_acknowledge = False
        self._acknowledged = threading.Event()
        self._lock = threading.Lock()
        self._wake_fd: int | None = None
        self._thread: threading.Thread | None = None
        if sources:
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._wake_fd, selectors.EVENT_READ)
            self._thread = threading.Thread(target=self._run, name="preemption", daemon=True)
            self._thread.start()

    @property
    def states(self) -> dict[str, State]:
        """The sources' states by name, as of now."""
        return {watched.name: watched.state for watched in self._watched}

    def acknowledge(self, seconds: float = 2.0) -> None:
        """Tell the providers that asked to be told ("azure-acknowledge") that they need not wait: all is saved.

        It is about the notices that are there now. Waits at most so long for it to be heard; does nothing when no such
        source has a notice.
        """
        if not self._is_closing and any(watched.wants_acknowledgement for watched in self._watched):
            self._acknowledged.clear()
            self._is_to_acknowledge = True
            self._wake()
            self._acknowledged.wait(seconds)

    def close(self) -> None:
        """End the thread at once, whatever it waits for."""
        self._is_closing = True
        self._wake()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wake(self) -> None:
        with self._lock:
            if self._wake_fd is not None:
                os.eventfd_write(self._wake_fd, 1)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            for watched in self._watched:
                self._advance(watched, None)
            while not self._is_closing:
                self._turn()
        except Exception:
            logger.exception("nobody looks for preemption notices any more")
            for watched in self._watched:
                self._say(watched, SourceError("is no longer asked"))
        finally:
            self._end()

    def _end(self) -> None:
        for watched in self._watched:
            self._leave(watched)
            watched.steps.close()
        self._selector.close()
        with self._lock:
            if self._wake_fd is not None:
                os.close(self._wake_fd)
                self._wake_fd = None
        self._acknowledged.set()

    def _turn(self) -> None:
        due_at = min(watched.due_at for watched in self._watched)
        timeout = None if due_at == inf else max(0.0, due_at - time.monotonic())
        ready = {key.fd for key, _ in self._selector.select(timeout)}
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        if self._is_to_acknowledge:
            self._is_to_acknowledge = False
            for watched in self._watched:
                watched.is_to_acknowledge = watched.wants_acknowledgement
        now = time.monotonic()
        for watched in self._watched:
            if self._is_closing:
                return
            if watched.exchange is None:
                if watched.due_at <= now or watched.is_to_acknowledge:
                    self._look_again(watched)
            elif watched.due_at <= now or watched.exchange.socket.fileno() in ready:
                self._step(watched, watched.exchange)

    def _look_again(self, watched: "_Watched") -> None:
        acknowledge, watched.is_to_acknowledge = watched.is_to_acknowledge, False
        watched.is_acknowledging |= acknowledge
        self._advance(watched, Woken(acknowledge))

    def _step(self, watched: "_Watched", exchange: Exchange) -> None:
        answered = exchange.step()
        if answered is None:
            self._selector.modify(exchange.socket, exchange.interest)
        else:
            self._leave(watched)
            self._advance(watched, answered)

    def _advance(self, watched: "_Watched", sent: Answer | Unanswered | Woken | None) -> None:
        """Let a source go on until it waits."""
        while True:
            try:
                wish = next(watched.steps) if sent is None else watched.steps.send(sent)
            except Exception:
                # An error of ours; the other sources may still save the job.
                logger.exception("%s: no longer asked for preemption notices", watched.name)
                watched.due_at = inf
                self._say(watched, SourceError("is no longer asked"))
                return
            match wish:
                case Look(state, seconds):
                    self._found(watched, state, seconds)
                    return
                case Request():
                    failed = self._ask(watched, wish)
                    if failed is None:
                        return
                    sent = failed

    def _found(self, watched: "_Watched", state: State | None, seconds: float) -> None:
        watched.due_at = time.monotonic() + (0.0 if watched.is_to_acknowledge else seconds)
        if watched.is_acknowledging:
            watched.is_acknowledging = False
            if not any(each.is_acknowledging or each.is_to_acknowledge for each in self._watched):
                self._acknowledged.set()
        if state is not None and not is_same(watched.state, state):
            self._say(watched, state)

    def _ask(self, watched: "_Watched", request: Request) -> Unanswered | None:
        try:
            watched.exchange = Exchange(request)
        except OSError as error:
            return Unanswered(f"cannot be reached: {error.strerror}")
        self._selector.register(watched.exchange.socket, watched.exchange.interest)
        watched.due_at = watched.exchange.due_at
        return None

    def _leave(self, watched: "_Watched") -> None:
        if watched.exchange is not None:
            self._selector.unregister(watched.exchange.socket)
            watched.exchange.close()
            watched.exchange = None

    def _say(self, watched: "_Watched", state: State) -> None:
        before, watched.state = watched.state, state
        match state:
            case SourceError(what):
                logger.warning("%s: whether a preemption is announced is not known: %s", watched.name, what)
            case Clear() if not isinstance(before, Clear):
                logger.info("%s: answers that no preemption is announced", watched.name)
        try:
            self._on_change(watched.name, state)
        except Exception:
            logger.exception("%s: its state %s was not heard", watched.name, state)


class _Watched:
    """A source, and how far it is."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.steps = source.steps()
        self.state: State = Unknown()
        self.exchange: Exchange | None = None
        """What it asks; None: it waits for its next look."""
        self.due_at = inf
        """When the exchange is given up, or the next look is due."""
        self.is_to_acknowledge = False
        self.is_acknowledging = False
        self._acknowledges = source.acknowledges

    @property
    def wants_acknowledgement(self) -> bool:
        return self._acknowledges and isinstance(self.state, Notice)
