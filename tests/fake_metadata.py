"""Metadata services of AWS, GCP and Azure as their documents describe them: real HTTP on loopback, rules enforced.

They differ from the real ones in that nothing happens by itself: a test says what is announced, and when.
"""

import itertools
import json
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs, urlsplit

from tests.conftest import GENEROUS

Fake = TypeVar("Fake", bound="FakeMetadata")

AWS_TOKEN = "/latest/api/token"
AWS_ACTION = "/latest/meta-data/spot/instance-action"
GCP_INSTANCE = "/computeMetadata/v1/instance/"
AZURE_EVENTS = "/metadata/scheduledevents"
AZURE_NAME = "/metadata/instance/compute/name"


class Asked(NamedTuple):
    """A request, and what it was answered with."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    status: int
    """0: none was sent."""


class Reply(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


class Silence(Exception):
    """There is to be no answer."""


class FakeMetadata(ABC):
    """An HTTP server on loopback; whoever opens it closes it, which also ends the requests that it holds back."""

    def __init__(self) -> None:
        self.news = threading.Condition()
        self.asked: list[Asked] = []
        self.overriding: Reply | None = None
        """What everything is answered with instead."""
        self.is_closing = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake.serve(self)

            do_PUT = do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (its name there)
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = False  # server_close waits for its handlers
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that has gone away

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Its poll is for `shutdown` alone.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fake metadata")
        self._thread.start()

    def __enter__(self: Fake) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        with self.news:
            self.is_closing = True
            self.news.notify_all()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in handler.headers.items()}
        body = handler.rfile.read(int(headers.get("content-length", 0)))
        try:
            reply = self.overriding or self.reply(handler.command, parts.path, query, headers, body)
        except Silence:
            handler.close_connection = True
            reply = Reply(0)
        with self.news:
            self.asked.append(Asked(handler.command, parts.path, query, headers, reply.status))
            self.news.notify_all()
        if reply.status:
            handler.send_response(reply.status)
            for name, value in reply.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(reply.body)))
            handler.end_headers()
            handler.wfile.write(reply.body)

    @abstractmethod
    def reply(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Reply:
        """Answer a request, which has these headers in small letters."""

    def hold(self, until: Callable[[], bool], seconds: float = GENEROUS) -> None:
        """Hold a request back. Raises Silence when the server closes meanwhile. Call with `news` held."""
        self.news.wait_for(lambda: self.is_closing or until(), seconds)
        if self.is_closing:
            raise Silence

    def wait_asked(self, wanted: Callable[[Asked], bool], count: int = 1) -> list[Asked]:
        """Wait until so many such requests were answered, and give them."""
        with self.news:

            def found() -> list[Asked]:
                return [asked for asked in self.asked if wanted(asked)]

            if not self.news.wait_for(lambda: len(found()) >= count, GENEROUS):
                raise AssertionError(f"not asked so within {GENEROUS} s, but: {self.asked}")
            return found()

    def count(self) -> int:
        """How many requests were answered so far."""
        with self.news:
            return len(self.asked)


class Stranger(FakeMetadata):
    """Something else in the place of a metadata service, that answers everything alike."""

    def __init__(self, answer: Reply) -> None:
        super().__init__()
        self._answer = answer

    def reply(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Reply:
        return self._answer


class FakeAws(FakeMetadata):
    """IMDSv2 with tokens required."""

    def __init__(self) -> None:
        self._tokens: dict[str, float] = {}
        self._action: bytes | None = None
        self.is_beyond_hop_limit = False
        """As in a container: the answer to PUT does not arrive."""
        self.gives_bad_tokens = False
        super().__init__()

    def announce(self, action: str, time: str | None) -> None:
        with self.news:
            self._action = json.dumps({"action": action} | ({} if time is None else {"time": time})).encode()

    def revoke_tokens(self) -> None:
        with self.news:
            self._tokens.clear()

    def reply(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Reply:
        with self.news:
            if path == AWS_TOKEN:
                return self._token(method, headers)
            good_until = self._tokens.get(headers.get("x-aws-ec2-metadata-token", ""), 0.0)
            if good_until <= time.monotonic():
                return Reply(401, b"Unauthorized")
            if path == AWS_ACTION and method == "GET" and self._action is not None:
                return Reply(200, self._action)
            return Reply(404, b"Not Found")

    def _token(self, method: str, headers: dict[str, str]) -> Reply:
        if method != "PUT":
            return Reply(405)
        if "x-forwarded-for" in headers:  # it came through a proxy
            return Reply(403)
        wish = headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if not wish.isdecimal() or not 1 <= int(wish) <= 21600:
            return Reply(400)
        if self.is_beyond_hop_limit:
            self.hold(lambda: False)
        token = secrets.token_urlsafe(40) + "=="
        if not self.gives_bad_tokens:
            self._tokens[token] = time.monotonic() + int(wish)
        return Reply(200, token.encode(), {"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": wish})


class FakeGcp(FakeMetadata):
    """The metadata server of Compute Engine, which waits for changes."""

    def __init__(self) -> None:
        self._values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self._etags = {name: secrets.token_hex(8) for name in self._values}
        self.refuses_to_wait = False
        self.gives_etags = True
        self.waiting = 0
        super().__init__()

    def set(self, name: str, value: str) -> None:
        with self.news:
            self._values[name] = value
            self._etags[name] = secrets.token_hex(8)
            self.news.notify_all()

    def wait_until_held(self, count: int) -> None:
        """Wait until so many requests wait for a change."""
        with self.news:
            assert self.news.wait_for(lambda: self.waiting >= count, GENEROUS), f"{self.waiting} wait"

    def reply(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Reply:
        if headers.get("metadata-flavor") != "Google" or "x-forwarded-for" in headers:
            return Reply(403)
        name = path.removeprefix(GCP_INSTANCE)
        with self.news:
            if name not in self._values or method != "GET":
                return Reply(404)
            if query.get("wait_for_change") == "true":
                if self.refuses_to_wait:
                    return Reply(400)
                self._wait(name, query)
            etag = {"ETag": self._etags[name]} if self.gives_etags else {}
            return Reply(200, self._values[name].encode(), {"Metadata-Flavor": "Google"} | etag)

    def _wait(self, name: str, query: dict[str, str]) -> None:
        known = query.get("last_etag", self._etags[name])
        self.waiting += 1
        self.news.notify_all()
        try:
            self.hold(lambda: self._etags[name] != known, float(query.get("timeout_sec", GENEROUS)))
        finally:
            self.waiting -= 1


class FakeAzure(FakeMetadata):
    """The instance metadata and the scheduled events of an Azure VM."""

    def __init__(self, vm_name: str) -> None:
        self._vm_name = vm_name
        self._events: list[dict[str, object]] = []
        self._incarnations = itertools.count(1)
        self.acknowledged: list[str] = []
        self.first_call_seconds = 0.0
        """How long the first look at the events takes, which switches the service on."""
        super().__init__()

    def announce(self, event_type: str, resources: list[str], not_before: str, status: str = "Scheduled") -> str:
        """Give the event's id."""
        event_id = secrets.token_hex(8).upper()
        with self.news:
            self._events.append(
                {
                    "EventId": event_id,
                    "EventType": event_type,
                    "ResourceType": "VirtualMachine",
                    "Resources": resources,
                    "EventStatus": status,
                    "NotBefore": not_before,
                    "Description": "",
                    "EventSource": "Platform",
                    "DurationInSeconds": -1,
                }
            )
        return event_id

    def reply(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Reply:
        if headers.get("metadata") != "true" or "x-forwarded-for" in headers or "api-version" not in query:
            return Reply(400, b'{"error": "Bad request"}')
        with self.news:
            if path == AZURE_NAME and query.get("format") == "text":
                return Reply(200, self._vm_name.encode())
            if path != AZURE_EVENTS:
                return Reply(404)
            if method == "POST":
                return self._start(body)
            slow, self.first_call_seconds = self.first_call_seconds, 0.0
            if slow:
                self.hold(lambda: False, slow)
            document = {"DocumentIncarnation": next(self._incarnations), "Events": self._events}
            return Reply(200, json.dumps(document).encode(), {"Content-Type": "application/json; charset=utf-8"})

    def _start(self, body: bytes) -> Reply:
        wanted = [each["EventId"] for each in json.loads(body)["StartRequests"]]
        known = {event["EventId"]: event for event in self._events}
        if not wanted or any(each not in known for each in wanted):
            return Reply(400)
        for each in wanted:
            known[each] |= {"EventStatus": "Started", "NotBefore": ""}
        self.acknowledged += wanted
        return Reply(200)
