"""One request to a metadata service: a real socket, at whose other end the test does what servers do, and do wrong."""

import select
import socket
from collections.abc import Iterator

import pytest

from ft_launcher.addresses import LOOPBACK, listen
from ft_launcher.metadata_http import MAX_BYTES, Answer, Exchange, Request, Unanswered
from tests.conftest import GENEROUS


class Service:
    """The other end of one exchange."""

    def __init__(self) -> None:
        self.listener = listen(LOOPBACK, 0)
        self.url = f"http://{LOOPBACK}:{self.listener.getsockname()[1]}"
        self.connection: socket.socket | None = None
        self.exchange: Exchange | None = None

    def ask(self, path: str = "/x", timeout: float = GENEROUS, **asked: object) -> bytes:
        """Begin an exchange, and give what has arrived of it."""
        self.exchange = Exchange(Request(self.url + path, timeout, **asked))  # type: ignore[arg-type]
        assert self.step() is None
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(GENEROUS)
        return self.connection.recv(65536)

    def step(self) -> Answer | Unanswered | None:
        """Wait for what the exchange waits for, and let it go on."""
        assert self.exchange is not None
        wanted = self.exchange.socket
        is_write = self.exchange.interest == 2
        ready = select.select([] if is_write else [wanted], [wanted] if is_write else [], [], GENEROUS)
        assert any(ready), "nothing has come"
        return self.exchange.step()

    def send(self, text: bytes) -> Answer | Unanswered | None:
        assert self.connection is not None
        self.connection.sendall(text)
        return self.step()

    def hang_up(self) -> Answer | Unanswered | None:
        assert self.connection is not None
        self.connection.close()
        return self.step()

    def close(self) -> None:
        for each in (self.exchange, self.connection, self.listener):
            if each is not None:
                each.close()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


def body(answered: Answer | Unanswered | None) -> bytes:
    assert isinstance(answered, Answer), answered
    return answered.body


def what(answered: Answer | Unanswered | None) -> str:
    assert isinstance(answered, Unanswered), answered
    return answered.what


def test_a_request_is_written_as_http_has_it(service: Service) -> None:
    head, _, sent = service.ask("/a?b=c", method="POST", headers={"Metadata": "true"}, body=b"{}").partition(
        b"\r\n\r\n"
    )
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /a?b=c HTTP/1.1"
    assert {f"Host: {service.url.removeprefix('http://')}", "Metadata: true", "Content-Length: 2"} <= set(lines)
    assert sent == b"{}"


def test_an_answer_that_comes_byte_by_byte_is_whole_with_its_last_one(service: Service) -> None:
    service.ask()
    text = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: e1\r\n\r\nFALSE"
    for at in range(len(text) - 1):
        assert service.send(text[at : at + 1]) is None
    answer = service.send(text[-1:])
    assert isinstance(answer, Answer)
    assert (answer.status, answer.body, answer.headers["etag"]) == (200, b"FALSE", "e1")


def test_an_answer_in_chunks_is_put_together(service: Service) -> None:
    service.ask()
    assert service.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nFAL\r\n") is None
    assert body(service.send(b"2\r\nSE\r\n0\r\n\r\n")) == b"FALSE"


def test_an_answer_without_length_ends_with_the_connection(service: Service) -> None:
    service.ask()
    assert service.send(b"HTTP/1.0 200 OK\r\n\r\nFAL") is None
    assert service.send(b"SE") is None
    assert body(service.hang_up()) == b"FALSE"


def test_an_answer_without_body_needs_no_end(service: Service) -> None:
    service.ask()
    answer = service.send(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert isinstance(answer, Answer)
    assert (answer.status, answer.body) == (204, b"")


def test_continue_is_not_the_answer(service: Service) -> None:
    service.ask()
    assert service.send(b"HTTP/1.1 100 Continue\r\n\r\n") is None
    assert body(service.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")) == b"x"


@pytest.mark.parametrize(
    "text",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nFALSE",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nFALSE",
    ],
)
def test_half_an_answer_is_none(service: Service, text: bytes) -> None:
    service.ask()
    assert service.send(text) is None
    assert what(service.hang_up()) == "closed the connection in the middle of its answer"


@pytest.mark.parametrize("text", [b"SSH-2.0-OpenSSH\r\n\r\n", b"\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n"])
def test_what_is_not_http_is_shown(service: Service, text: bytes) -> None:
    service.ask()
    assert what(service.send(text)).startswith("answered what is not HTTP: b'")


def test_a_head_that_never_ends_is_no_answer(service: Service) -> None:
    service.ask()
    assert service.send(b"HTTP/1.1 200 OK\r\nA: b\r\n") is None
    assert isinstance(service.hang_up(), Unanswered)


def test_a_connection_that_is_closed_is_no_answer(service: Service) -> None:
    service.ask()
    assert what(service.hang_up()) == "closed the connection without an answer"


def test_an_endless_answer_is_cut_off(service: Service) -> None:
    service.ask()
    answered = service.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while answered is None:
        answered = service.send(b"x" * 65536)
    assert what(answered) == f"answered more than {MAX_BYTES} bytes"


def test_an_answer_that_trickles_is_given_up_in_time(service: Service) -> None:
    service.ask(timeout=0.2)
    answered = service.send(b"HTTP/1.1 200 OK\r\n")
    sent = 0
    while answered is None:
        answered = service.send(b"A: b\r\n")
        sent += 1
        assert sent < MAX_BYTES
    assert isinstance(answered, Unanswered)
    assert answered.is_late


def test_a_port_where_nobody_listens_refuses(service: Service) -> None:
    service.listener.close()
    service.exchange = Exchange(Request(service.url, GENEROUS))
    assert what(service.step()) == "refused the connection"
