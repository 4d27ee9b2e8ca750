"""One HTTP request to a metadata service, over a socket that never blocks and never goes through a proxy.

`urllib` and `http.client` block, so that a service that does not answer (Azure's first answer takes two minutes) would
need a thread of its own for each source, which nothing can end. Here `http.client` only reads what has been received.
"""

import errno
import http.client
import ipaddress
import os
import selectors
import socket
import time
from collections.abc import Mapping
from io import BytesIO
from typing import NamedTuple
from urllib.parse import urlsplit

from ft_launcher.addresses import LOOPBACK, family_of
from ft_launcher.notices import Instant

__all__ = ["LINK_LOCAL", "Answer", "Exchange", "Request", "Unanswered", "base_url"]

LINK_LOCAL = "http://169.254.169.254"
"""Where AWS, GCP and Azure have their metadata service."""

MAX_BYTES = 1 << 20
"""No answer is that long: Azure's names each VM of a set in each event, the others are a few words."""

# Names would have to be looked up, which blocks, and depends on a DNS server that may be the one thing that is down.
_ADDRESSES = {"localhost": LOOPBACK, "metadata.google.internal": "169.254.169.254"}


_CUT_OFF = "closed the connection in the middle of its answer"


class Request(NamedTuple):
    """What to ask."""

    url: str
    """http://ADDRESS[:PORT]/path, as `base_url` accepts it."""
    timeout: float
    """Seconds for all of it: connecting, asking, and the whole answer."""
    method: str = "GET"
    headers: Mapping[str, str] = {}
    body: bytes = b""


class Answer(NamedTuple):
    """What came back, whatever the status."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    at: Instant
    seconds: float
    """How long it took."""


class Unanswered(NamedTuple):
    """No answer came, or none of HTTP."""

    what: str
    """To follow the URL: "refused the connection"."""
    is_late: bool = False
    """Whether the time was up."""


def base_url(text: str) -> str:
    """Check a metadata service's URL, and give it without a slash at its end. Raises ValueError."""
    parts = urlsplit(text)  # raises ValueError itself for a bad IPv6 address, and at .port
    host = parts.hostname or ""
    if parts.scheme != "http" or parts.query or parts.fragment or parts.username is not None or not text.isprintable():
        raise ValueError(text)
    if host not in _ADDRESSES:
        ipaddress.ip_address(host)
    if parts.port == 0 or " " in text:
        raise ValueError(text)
    return text.rstrip("/")


class Exchange:
    """A request under way. Whoever opens it waits for `interest` on `socket`, calls `step`, and closes it."""

    def __init__(self, request: Request) -> None:
        parts = urlsplit(request.url)
        host = _ADDRESSES.get(parts.hostname or "", parts.hostname or "")
        self._request = request
        self._began_at = time.monotonic()
        self._unsent = _written(request, parts.netloc, f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}")
        self._received = b""
        self._failed_at_once = 0
        self._is_connecting = True
        # Raises OSError where there is no IPv6, and when there are too many open files.
        self.socket = socket.socket(family_of(host), socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        result = self.socket.connect_ex((host, parts.port or http.client.HTTP_PORT))
        if result not in (0, errno.EINPROGRESS):
            self._failed_at_once = result

    @property
    def due_at(self) -> float:
        """When it is to be given up (`time.monotonic()`)."""
        return self._began_at + self._request.timeout

    @property
    def interest(self) -> int:
        """What to wait for on the socket: an event mask of `selectors`."""
        return selectors.EVENT_WRITE if self._unsent else selectors.EVENT_READ

    def step(self) -> Answer | Unanswered | None:
        """Do what can be done without waiting, and give the answer when it is whole. None: not yet."""
        try:
            return self._step()
        except BlockingIOError:
            pass
        except OSError as error:
            return Unanswered(_said(error.errno))
        except (http.client.HTTPException, ValueError):
            return Unanswered(f"answered what is not HTTP: {self._received[:60]!r}")
        if time.monotonic() >= self.due_at:
            return Unanswered(f"did not answer within {self._request.timeout:g} s", is_late=True)
        return None

    def close(self) -> None:
        """End it, answered or not."""
        self.socket.close()

    def _step(self) -> Answer | Unanswered | None:
        if self._is_connecting:
            failed = self._failed_at_once or self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failed:
                return Unanswered(_said(failed))
        while self._unsent:
            try:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            except OSError as error:
                if error.errno == errno.ENOTCONN:  # asked before the connection was there
                    raise BlockingIOError from None
                raise
            self._is_connecting = False
        while True:
            piece = self.socket.recv(65536)
            self._received += piece
            if len(self._received) > MAX_BYTES:
                return Unanswered(f"answered more than {MAX_BYTES} bytes")
            answer = self._answer(is_whole=not piece)
            if answer is not None:
                return answer

    def _answer(self, *, is_whole: bool) -> Answer | Unanswered | None:
        """Read what has come so far; when `is_whole`, nothing will follow. Raises HTTPException, ValueError."""
        if not self._received and is_whole:
            return Unanswered("closed the connection without an answer")
        if b"\r\n\r\n" not in self._received:
            # Half a head would do for http.client; but of AWS, 404 alone would mean that no notice is there.
            return Unanswered(_CUT_OFF) if is_whole else None
        # It wants a socket for `makefile` alone.
        response = http.client.HTTPResponse(_Received(self._received), method=self._request.method)  # type: ignore[arg-type]
        try:
            response.begin()
            if response.length is None and not response.chunked and not is_whole:
                return None  # ends with the connection
            body = response.read()
        except (http.client.IncompleteRead, http.client.RemoteDisconnected):
            if is_whole:
                return Unanswered(_CUT_OFF)
            return None
        finally:
            response.close()
        now = Instant(time.monotonic(), time.time())
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status, headers, body, now, now.monotonic - self._began_at)


class _Received:
    def __init__(self, received: bytes) -> None:
        self._received = received

    def makefile(self, mode: str) -> BytesIO:  # noqa: ARG002 (as a socket has it)
        return BytesIO(self._received)


def _written(request: Request, host: str, target: str) -> bytes:
    headers = {"Host": host, "User-Agent": "ft_launcher", "Accept": "*/*", "Connection": "close", **request.headers}
    if request.body or request.method != "GET":
        headers["Content-Length"] = str(len(request.body))
    lines = [f"{request.method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + request.body


def _said(number: int | None) -> str:
    match number:
        case errno.ECONNREFUSED:
            return "refused the connection"
        case errno.ECONNRESET | errno.EPIPE:
            return "closed the connection without an answer"
        case _:
            return f"cannot be reached: {os.strerror(number or 0)}"
