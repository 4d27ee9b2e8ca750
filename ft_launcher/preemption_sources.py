"""Who can say that this machine will be taken away: the clouds' metadata services, and a file.

A source is a generator of steps: it yields what to ask (`Request`) and is sent the `Answer`, or says what it has found
(`Look`) and is sent a `Woken` when the next look is due. So it never waits itself, and whoever runs it (preemption.py)
can run many of them in one thread, and stop at any moment.
"""

import logging
import os
import stat
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import msgspec

from ft_launcher.metadata_http import LINK_LOCAL, Answer, Request, Unanswered
from ft_launcher.notices import (
    AzureEvent,
    Clear,
    Instant,
    Notice,
    SourceError,
    State,
    azure_events,
    read_aws,
    read_azure,
    read_file,
    read_gcp_maintenance,
    read_gcp_preempted,
)

__all__ = ["AwsSpot", "Azure", "File", "Gcp", "Look", "Source", "Steps", "Woken"]

logger = logging.getLogger(__name__)

SLOWEST = 30.0
"""Seconds between two looks at a source that fails again and again: the shortest warning is as long (GCP, Azure)."""

PATIENCE = 5.0
"""Seconds for an answer of a metadata service, which is on this machine's host and needs milliseconds."""

SETTLING = 0.1
"""Seconds from a file's appearance to its reading: `echo 30 > path` makes it first and writes it then."""

MAX_FILE_BYTES = 256


class Look(NamedTuple):
    """What a source has found."""

    state: State | None
    """None: nothing new."""
    seconds: float
    """Until it wants to look again."""


class Woken(NamedTuple):
    """The next look is due."""

    acknowledge: bool
    """Rather: what was found need not wait for us any longer."""


Answered: TypeAlias = Answer | Unanswered
_Result = TypeVar("_Result")
_Asking: TypeAlias = Generator[Request | Look, Answered | Woken | None, _Result]
Steps: TypeAlias = _Asking[None]


class Source(Protocol):
    """Something that can say that this machine will be taken away."""

    @property
    def name(self) -> str:
        """As in `Notice.source`."""

    @property
    def acknowledges(self) -> bool:
        """Whether the provider is to be told when it need not wait any longer."""

    def steps(self) -> Steps:
        """Look for ever. What it yields first is a `Request` or a `Look`."""


# -- the clouds -------------------------------------------------------------------------------------------------------


class AwsSpot:
    """The interruption notices of an EC2 Spot Instance, asked for with the tokens of IMDSv2."""

    name = "aws"
    acknowledges = False

    def __init__(
        self,
        base_url: str = LINK_LOCAL,
        *,
        token_seconds: int = 21600,
        interval: float = 5.0,
        patience: float = PATIENCE,
    ) -> None:
        """`token_seconds`: how long a token is to be good for, at most 21600; `interval`: as AWS recommends."""
        self._base_url = base_url
        self._patience = patience
        self._token_seconds = token_seconds
        self._interval = interval
        self._token: str | None = None
        self._token_until = 0.0

    def steps(self) -> Steps:
        """Look for ever."""
        return _looking(self._look, self._interval)

    def _look(self) -> _Asking[Look]:
        had_token = self._token is not None
        answer = yield from self._ask()
        if isinstance(answer, Answer) and answer.status == 401 and had_token:
            self._token = None  # not good any more, whatever we were told of its time; a new one may be
            answer = yield from self._ask()
        if isinstance(answer, SourceError):
            return Look(answer, self._interval)
        if answer.status == 401 or answer.at.monotonic + self._interval >= self._token_until:
            self._token = None
        return Look(_placed(self._url, read_aws(answer.status, answer.body, answer.at)), self._interval)

    @property
    def _url(self) -> str:
        return f"{self._base_url}/latest/meta-data/spot/instance-action"

    def _ask(self) -> _Asking[Answer | SourceError]:
        if self._token is None:
            failed = yield from self._fetch_token()
            if failed is not None:
                return failed
        request = Request(self._url, self._patience, headers={"X-aws-ec2-metadata-token": self._token or ""})
        return (yield from _ask(request))

    def _fetch_token(self) -> _Asking[SourceError | None]:
        url = f"{self._base_url}/latest/api/token"
        wish = {"X-aws-ec2-metadata-token-ttl-seconds": str(self._token_seconds)}
        request = Request(url, self._patience, method="PUT", headers=wish)
        # The answer to this request, and only this one, does not travel further than the hop limit.
        hint = " (in a container the hop limit of the instance's metadata must be 2 or more)"
        answer = yield from _ask(request, if_late=hint)
        if isinstance(answer, SourceError):
            return answer
        token = answer.body.decode("ascii", errors="replace")
        if answer.status != 200 or not token or not token.isascii() or not token.isprintable():
            return SourceError(f"{url} answered {answer.status} instead of a token")
        self._token = token
        self._token_until = answer.at.monotonic - answer.seconds + self._token_seconds
        return None


class Gcp:
    """The preemption of a VM of Compute Engine, or (`maintenance`) its termination for maintenance of its host.

    Two keys, so two sources, each of which hears of a change at once: the service answers when the value has changed,
    or after some seconds. Where it will not wait, it is asked each second.
    """

    acknowledges = False

    def __init__(
        self,
        base_url: str = LINK_LOCAL,
        *,
        maintenance: bool = False,
        wait_seconds: int = 10,
        interval: float = 1.0,
        patience: float = PATIENCE,
    ) -> None:
        """`wait_seconds`: how long the service is to wait for a change (whole seconds); `interval`: if it does not.

        Waiting is short because a connection that has died silently tells nothing for so long and `patience` more.
        """
        self._patience = patience
        self.name = "gcp-maintenance" if maintenance else "gcp"
        self._url = f"{base_url}/computeMetadata/v1/instance/{'maintenance-event' if maintenance else 'preempted'}"
        self._read = read_gcp_maintenance if maintenance else read_gcp_preempted
        self._wait_seconds = wait_seconds
        self._interval = interval
        self._etag = ""
        self._can_wait = True
        self._before: State | None = None

    def steps(self) -> Steps:
        """Look for ever."""
        return _looking(self._look, self._interval)

    def _look(self) -> _Asking[Look]:
        etag, self._etag = self._etag, ""
        waits = bool(etag) and self._can_wait
        query = f"?wait_for_change=true&timeout_sec={self._wait_seconds}&last_etag={etag}" if waits else ""
        url = self._url + query
        timeout = self._patience + (self._wait_seconds if waits else 0)
        answer = yield from _ask(Request(url, timeout, headers={"Metadata-Flavor": "Google"}))
        if isinstance(answer, SourceError):
            return Look(answer, self._interval)
        if waits and 400 <= answer.status < 500:
            self._can_wait = False
            return (yield from self._look())
        state = _placed(url, self._read(answer.status, answer.body, answer.at))
        if not isinstance(state, SourceError):
            self._etag = _query_safe(answer.headers.get("etag", ""))
        if isinstance(state, Notice) and isinstance(self._before, Notice):
            state = self._before  # what was announced comes no later for being announced again
        self._before = state
        if not self._can_wait or not self._etag:
            return Look(state, self._interval)
        # After an answer to a request that was to wait, however soon it came, not at once again.
        return Look(state, max(0.0, self._interval - answer.seconds) if waits else 0.0)


def _query_safe(etag: str) -> str:
    return etag if etag.isascii() and etag.isalnum() else ""


class Azure:
    """The scheduled events of an Azure VM.

    `vm_name`: as Azure names it; None: the metadata service is asked for it. `acknowledge`: once all is saved, the
    events are released, which lets them happen at once, to every VM that they name.
    """

    name = "azure"

    def __init__(
        self,
        base_url: str = LINK_LOCAL,
        *,
        vm_name: str | None = None,
        acknowledge: bool = False,
        interval: float = 1.0,
        patience: float = PATIENCE,
        first_patience: float = 150.0,
    ) -> None:
        """`interval`: as Azure recommends; `first_patience`: the first answer may take 2 minutes, say its documents."""
        self._base_url = base_url
        self._url = f"{base_url}/metadata/scheduledevents?api-version=2020-07-01"
        self._vm_name = vm_name
        self.acknowledges = acknowledge
        self._interval = interval
        self._patience = patience
        self._patience_now = max(patience, first_patience)
        self._announced: list[AzureEvent] = []

    def steps(self) -> Steps:
        """Look for ever."""
        return _looking(self._look, self._interval, self._acknowledge)

    def _look(self) -> _Asking[Look]:
        vm_name = yield from self._name()
        if isinstance(vm_name, SourceError):
            return Look(vm_name, self._interval)
        answer = yield from _ask(Request(self._url, self._patience_now, headers=_METADATA))
        if isinstance(answer, SourceError):
            return Look(answer, self._interval)
        self._patience_now = self._patience
        events = azure_events(answer.status, answer.body, vm_name)
        if isinstance(events, SourceError):
            return Look(_placed(self._url, events), self._interval)
        self._announced = [event for event in events if event.is_stop]
        return Look(_placed(self._url, read_azure(events, answer.at)), self._interval)

    def _name(self) -> _Asking[str | SourceError]:
        if self._vm_name is not None:
            return self._vm_name
        url = f"{self._base_url}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        answer = yield from _ask(Request(url, self._patience, headers=_METADATA))
        if isinstance(answer, SourceError):
            return answer
        name = answer.body.decode(errors="replace").strip()
        if answer.status != 200 or not name.isprintable() or not name:
            return SourceError(f"{url} answered {answer.status} instead of this VM's name")
        self._vm_name = name
        return name

    def _acknowledge(self) -> _Asking[None]:
        wish = {"StartRequests": [{"EventId": event.event_id} for event in self._announced]}
        request = Request(self._url, self._patience, "POST", _METADATA, msgspec.json.encode(wish))
        answer = yield from _ask(request)
        what = answer.what if isinstance(answer, SourceError) else f"{self._url} answered {answer.status}"
        if isinstance(answer, SourceError) or answer.status != 200:
            logger.warning("%s: the events were not acknowledged: %s", self.name, what)
        else:
            logger.info("%s: acknowledged: %s", self.name, ", ".join(event.event_id for event in self._announced))


_METADATA = {"Metadata": "true"}


# -- a file -----------------------------------------------------------------------------------------------------------


class File:
    """A path that appears: what a site's own hooks write, and tests. On a file system that answers, so a local one.

    It is looked for, not waited for with inotify, which is silent about what another machine has written.
    """

    acknowledges = False

    def __init__(self, path: str, *, interval: float = 1.0) -> None:
        self.name = f"file:{path}"
        self._path = path
        self._interval = interval

    def steps(self) -> Steps:
        """Look for ever."""
        seen, state = None, None
        while True:
            found = self._found()
            if not isinstance(found, os.stat_result):
                seen, state = None, found
            elif _version(found) != seen:
                now = Instant(time.monotonic(), time.time())
                yield Look(None, SETTLING)
                seen, state = self._read(now)
            yield Look(state, self._interval)

    def _found(self) -> os.stat_result | State:
        try:
            return os.stat(self._path)  # noqa: PTH116 (the path is a text here)
        except FileNotFoundError:
            folder = Path(self._path).parent
            if folder.is_dir():
                return Clear()
            return SourceError(f"{self._path}: there is no directory {folder}")  # mistyped: it would never appear
        except OSError as error:
            return SourceError(f"{self._path}: {error.strerror}")

    def _read(self, now: Instant) -> "tuple[_Version | None, State]":
        found = self._found()
        if not isinstance(found, os.stat_result):
            return None, found
        if not stat.S_ISREG(found.st_mode):  # a pipe would block
            return _version(found), read_file(self._path, b"", now)
        try:
            with Path(self._path).open("rb") as file:
                return _version(found), read_file(self._path, file.read(MAX_FILE_BYTES), now)
        except OSError as error:
            return None, SourceError(f"{self._path} is there: {error.strerror}")


_Version: TypeAlias = tuple[int, int, int]


def _version(found: os.stat_result) -> _Version:
    return found.st_ino, found.st_size, found.st_mtime_ns


# -- how all of them look ---------------------------------------------------------------------------------------------


def _looking(
    look: Callable[[], _Asking[Look]], interval: float, acknowledge: Callable[[], _Asking[None]] | None = None
) -> Steps:
    failures = 0
    while True:
        found = yield from look()
        if isinstance(found.state, SourceError):
            found = found._replace(seconds=min(SLOWEST, interval * 2 ** min(failures, 10)))
            failures += 1
        else:
            failures = 0
        woken = yield found
        if isinstance(woken, Woken) and woken.acknowledge and acknowledge is not None:
            yield from acknowledge()


def _ask(request: Request, *, if_late: str = "") -> _Asking[Answer | SourceError]:
    answered = yield request
    match answered:
        case Answer():
            return answered
        case Unanswered(what, is_late):
            return SourceError(f"{request.url} {what}{if_late if is_late else ''}")
        case _:
            raise TypeError(f"sent {answered!r} for an answer to {request.url}")


def _placed(url: str, state: State) -> State:
    """Add to an error who answered so."""
    return SourceError(f"{url} {state.what}") if isinstance(state, SourceError) else state
