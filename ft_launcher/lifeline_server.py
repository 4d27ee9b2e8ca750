"""The host's end of all lifelines: answers the beats of the nodes, and reports the nodes that are lost."""

import errno
import functools
import ipaddress
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from ft_launcher.lifeline import (
    LIFELINE_PROTOCOL,
    Answer,
    Beat,
    Beats,
    Challenge,
    Evicted,
    Frames,
    FromHost,
    FromNode,
    Goodbye,
    Hello,
    HostSide,
    Refused,
    WireError,
    decode_from_node,
    encode,
    frame,
    hello_key,
    host_key,
    node_key,
)
from ft_launcher.seal import Seal, SealBrokenError

__all__ = ["LifelineServer"]

log = logging.getLogger(__name__)

HELLO_SECONDS = 2.0
"""A connection without a hello for so long is closed: it is a port scan, or a health check."""

MAX_STRANGERS = 512
"""More connections without a hello than these are not kept: the oldest goes, so that a node still gets in."""

MAX_LINES = 16
"""Connections of one node that are kept: as many as it can have tried before it gives the host up."""

CLOSE_SECONDS = 5.0
"""`close` waits so long for a report that is under way."""


class _Connection:
    """A connection that was accepted, and who it turned out to be."""

    def __init__(self, accepted: socket.socket, peer: str) -> None:
        self.socket = accepted
        self.peer = peer
        self.challenge = secrets.token_bytes(16)
        self.frames = Frames()
        self.is_open = True
        self.node: str | None = None
        self.node_key = self.host_key = ""


class LifelineServer:
    """Listens at `host` ("": all addresses), at a port that the system chooses.

    `on_lost(node, how)`, how "closed" or "silent", is called once for each node that is lost, from a thread of this
    object, which answers no beats meanwhile.
    """

    def __init__(self, host: str, beats: Beats, seal: Seal, on_lost: Callable[[str, str], None]) -> None:
        self._listener = _listen(host)
        self.port: int = self._listener.getsockname()[1]
        self.refused = 0
        """How many connections did not present a valid hello."""
        self._beats = beats
        self._seal = seal
        self._on_lost = on_lost
        self._side = HostSide(beats)
        self._strangers: dict[_Connection, float] = {}  # with the instants by which a hello must have come; in order
        self._lines: dict[str, list[_Connection]] = {}
        self._to_forget: deque[str] = deque()
        self._address_seen: str | None = None
        self._empty = threading.Event()
        self._empty.set()
        self._closing = False
        self._now = time.monotonic()  # of the turn: what is done in it is as of then
        self._accept_again_at: float | None = None
        self._lock = threading.Lock()
        self._wake: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ, functools.partial(os.eventfd_read, self._wake))
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._thread = threading.Thread(target=self._run, name="lifeline-server", daemon=True)
        self._thread.start()

    def address_seen(self) -> str | None:
        """Give this machine's address as nodes on other machines reach it; None: no such node has connected yet."""
        return self._address_seen

    def forget(self, node: str) -> None:
        """Never report this node: it has left, or is known to be leaving."""
        self._to_forget.append(node)
        self._notify()

    def wait_empty(self, seconds: float) -> bool:
        """Wait until no node is connected any more, `seconds` at most, and tell whether that is so."""
        return self._empty.wait(seconds)

    def close(self) -> None:
        """Close all connections: the nodes that are still there find that the host is gone. Reports nothing more."""
        self._closing = True
        self._notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)

    def _notify(self) -> None:
        with self._lock:
            if self._wake is not None:
                os.eventfd_write(self._wake, 1)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except Exception:
            # All connections close below, so that the nodes learn at once that nobody watches any more.
            log.exception("the host's watch over the other nodes has failed")
        finally:
            self._listener.close()
            for connection in [*self._strangers, *(line for lines in self._lines.values() for line in lines)]:
                connection.socket.close()
            self._selector.close()
            self._empty.set()
            with self._lock:
                if self._wake is not None:
                    os.close(self._wake)
                self._wake = None

    def _turn(self) -> None:
        planned = self._next_instant()
        ready = self._selector.select(max(0.0, planned - time.monotonic()))
        self._now = time.monotonic()
        self._side.woke(self._now, planned)
        for key, _ in ready:
            key.data()
        while self._to_forget:
            self._side.forget(self._to_forget.popleft())
        for node, how in self._side.lost(self._now):
            self._give_up(node, how)
        while self._strangers and next(iter(self._strangers.values())) <= self._now:
            self._refuse(next(iter(self._strangers)), f"no hello within {HELLO_SECONDS:g} s")
        if self._accept_again_at is not None and self._accept_again_at <= self._now:
            self._accept_again_at = None
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _next_instant(self) -> float:
        # An interval at most, so that a sleep of this process shows within one: see HostSide.woke. It counts from the
        # last turn's beginning: counted from now, a sleep in the middle of that turn would go unseen.
        stranger = next(iter(self._strangers.values()), None)
        instants = (self._now + self._beats.interval, self._side.due(), stranger, self._accept_again_at)
        return min(instant for instant in instants if instant is not None)

    def _accept(self) -> None:
        while True:
            try:
                accepted, peer = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # it has gone already
            except OSError as error:
                self._stop_accepting(error)
                return
            connection = _Connection(accepted, _plain(peer[0]))
            accepted.setblocking(False)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(accepted, selectors.EVENT_READ, functools.partial(self._read, connection))
            self._strangers[connection] = self._now + HELLO_SECONDS
            self._send(connection, Challenge(LIFELINE_PROTOCOL, connection.challenge))
            if len(self._strangers) > MAX_STRANGERS:
                self._refuse(next(iter(self._strangers)), f"no hello, and {MAX_STRANGERS} others wait")

    def _stop_accepting(self, error: OSError) -> None:
        """Pause, since the socket stays readable and would keep this thread busy, and make room for who comes then."""
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            raise error
        log.warning("nodes cannot connect for now: %s", error.strerror)
        for connection in list(self._strangers):
            self._drop(connection)
        self._selector.unregister(self._listener)
        self._accept_again_at = self._now + self._beats.interval / 4

    def _read(self, connection: _Connection) -> None:
        if not connection.is_open:
            return  # by what came on another one in the same turn
        try:
            received = connection.socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._drop(connection)
            return
        try:
            for payload in connection.frames.feed(received):
                if connection.is_open:  # what came before this one may have ended it
                    self._take(connection, payload)
        except (WireError, SealBrokenError) as error:
            if connection.node is None:
                # Only then: a node takes this for final, and it must not end one whose hello was lost on the way.
                self._send(connection, Refused(str(error)))
            self._refuse(connection, str(error))

    def _take(self, connection: _Connection, payload: bytes) -> None:
        if connection.node is None:
            self._greet(connection, decode_from_node(self._open_hello(connection, payload)))
            return
        match decode_from_node(self._seal.open(connection.node_key, payload)):
            case Beat(number=number):
                self._answer(connection, connection.node, number)
            case Goodbye():
                self._side.forget(connection.node)
                for line in list(self._lines[connection.node]):
                    self._drop(line)
            case Hello():
                raise WireError("a second hello")

    def _open_hello(self, connection: _Connection, payload: bytes) -> bytes:
        try:
            return self._seal.open(hello_key(connection.challenge), payload)
        except SealBrokenError:
            raise SealBrokenError("its token or its run id is not this job's") from None

    def _greet(self, connection: _Connection, hello: FromNode) -> None:
        if not isinstance(hello, Hello):
            raise WireError("no hello")
        del self._strangers[connection]
        connection.node = hello.node
        connection.node_key = node_key(connection.challenge, hello.nonce)
        connection.host_key = host_key(connection.challenge, hello.nonce)
        self._empty.clear()
        lines = self._lines.setdefault(hello.node, [])
        lines.append(connection)
        if len(lines) > MAX_LINES:
            self._drop(lines[0])
        if self._address_seen is None:
            self._address_seen = _address_for_others(connection)
        self._answer(connection, hello.node, hello.number)

    def _answer(self, connection: _Connection, node: str, number: int) -> None:
        if self._side.heard(node, self._now):
            self._send(connection, Answer(number))
        else:
            self._send(connection, Evicted())
            self._drop(connection)

    def _give_up(self, node: str, how: str) -> None:
        # A node that was only cut off or stopped finds this when it is back. What is sent to a machine that is gone
        # stays with the kernel for a while, and is no concern of ours.
        for line in list(self._lines.get(node, [])):
            self._send(line, Evicted())
            self._drop(line)
        try:
            self._on_lost(node, how)
        except Exception:
            log.exception("the loss of node %s (%s) could not be reported", node, how)

    def _refuse(self, connection: _Connection, reason: str) -> None:
        if self.refused == 0:
            log.warning("refused a connection to port %d from %s: %s", self.port, connection.peer, reason)
        self.refused += 1
        self._drop(connection)

    def _send(self, connection: _Connection, message: FromHost) -> None:
        payload = encode(message)
        if connection.node is not None:
            payload = self._seal.seal(connection.host_key, payload)
        packet = frame(payload)
        try:
            # All or nothing: no node leaves so much unread that the socket is full, and waiting for one is out of
            # the question.
            is_sent = connection.is_open and connection.socket.send(packet) == len(packet)
        except OSError:
            is_sent = False
        if not is_sent:
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        if not connection.is_open:
            return
        connection.is_open = False
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._strangers.pop(connection, None)
        if connection.node is None:
            return
        lines = self._lines[connection.node]
        lines.remove(connection)
        if not lines:
            del self._lines[connection.node]
            self._side.closed(connection.node, self._now)
        if not self._lines:
            self._empty.set()


def _listen(host: str) -> socket.socket:
    if host:
        family, _, _, _, address = socket.getaddrinfo(
            host, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
        )[0]
        listener = socket.create_server((str(address[0]), 0), family=family, backlog=4096)
    elif socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0), backlog=4096)
    listener.setblocking(False)
    return listener


def _plain(address: str) -> str:
    """Give an IPv4 address that an IPv6 socket shows as such."""
    return address.removeprefix("::ffff:")


def _address_for_others(connection: _Connection) -> str | None:
    own = _plain(connection.socket.getsockname()[0])
    kind = ipaddress.ip_address(own)
    # From this machine every address of it can be reached, from others perhaps not; and link-local ones mean
    # nothing without the name of the other's interface.
    return None if own == connection.peer or kind.is_loopback or kind.is_link_local else own
