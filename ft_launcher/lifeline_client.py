"""A node's end of its lifeline: sends beats, connects anew when no answer comes, and says when the host is lost."""

import errno
import functools
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ft_launcher.lifeline import (
    LIFELINE_PROTOCOL,
    Answer,
    Beat,
    Beats,
    Challenge,
    Evicted,
    Frames,
    FromNode,
    Goodbye,
    Hello,
    NodeSide,
    Refused,
    WireError,
    Wish,
    decode_from_host,
    encode,
    frame,
    hello_key,
    host_key,
    node_key,
)
from ft_launcher.seal import Seal, SealBrokenError

__all__ = ["Lifeline"]

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 16
"""Connections that are tried at once, the lifeline left out; more than are begun before the host counts as lost."""

GOODBYE_SECONDS = 1.0
"""How long `close` waits for the host to have heard the goodbye."""

CLOSE_SECONDS = 5.0
"""`close` waits so long for a callback that is under way."""


class Lifeline:
    """The connection of node `node_id` to the host at the numeric `address`, which it tries to keep.

    `on_lost(how)` is called once when the host is lost, from a thread of this object: "closed" (its launcher died),
    "silent" (no answer for so long that it may have given us up), "evicted" (it has given us up) or "refused" (it never
    let us in). `on_lease(until)` is called with each answer: until then this node may train.
    """

    def __init__(
        self,
        address: str,
        port: int,
        node_id: str,
        beats: Beats,
        seal: Seal,
        on_lost: Callable[[str], None],
        on_lease: Callable[[float], None] | None = None,
    ) -> None:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        self._family, self._address = found[0][0], found[0][4]
        self._name = f"{address} port {port}"
        self._node = node_id
        self._seal = seal
        self._on_lost = on_lost
        self._on_lease = on_lease
        self._side = NodeSide(beats, time.monotonic())
        self._number = 0
        self._lifeline: _Connection | None = None
        self._attempts: list[_Connection] = []
        self._local_address: str | None = None
        self._reason = "no answer"
        self._settled = threading.Event()
        self._closing = False
        self._says_goodbye = True
        self._lock = threading.Lock()
        self._wake: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ, functools.partial(os.eventfd_read, self._wake))
        self._thread = threading.Thread(target=self._run, name="lifeline", daemon=True)
        self._thread.start()

    def local_address(self, timeout: float) -> str:
        """Wait for the first connection, and give this node's address on it.

        Raises ConnectionError, with the reason, when there is none within `timeout` seconds.
        """
        self._settled.wait(timeout)
        if self._local_address is None:
            raise ConnectionError(f"no connection to the host at {self._name}: {self._reason}")
        return self._local_address

    @property
    def lease_until(self) -> float:
        """Until when this node may train, as far as it knows."""
        return self._side.lease_until

    def close(self, *, goodbye: bool = True) -> None:
        """Say goodbye, so that the host does not miss this node, and end the connection. Without it, it is missed."""
        self._says_goodbye = goodbye
        self._closing = True
        with self._lock:
            if self._wake is not None:
                os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        how = "silent"
        try:
            while not self._closing and self._side.lost is None:
                self._turn()
            how = self._side.lost or how
        except Exception:
            log.exception("the watch over the host has failed; it counts as lost")
        finally:
            self._end()
        if not self._closing:
            self._on_lost(how)

    def _end(self) -> None:
        if self._closing and self._says_goodbye and self._side.lost is None and self._lifeline is not None:
            self._say_goodbye(self._lifeline)
        for connection in [*self._attempts, *([self._lifeline] if self._lifeline is not None else [])]:
            connection.socket.close()
        self._selector.close()
        with self._lock:
            if self._wake is not None:
                os.close(self._wake)
            self._wake = None
        self._settled.set()

    def _say_goodbye(self, connection: "_Connection") -> None:
        with suppress(OSError):  # the host is gone, or does not answer: then there is nobody to say it to
            connection.socket.settimeout(GOODBYE_SECONDS)
            connection.socket.sendall(connection.packet(self._seal, Goodbye()))
            connection.socket.shutdown(socket.SHUT_WR)
            # Closing now could reset the connection, with answers in it unread, before the host has read this.
            while connection.socket.recv(4096):
                continue

    def _turn(self) -> None:
        planned = self._side.due()
        ready = self._selector.select(max(0.0, planned - time.monotonic()))
        self._side.woke(time.monotonic(), planned)
        for key, _ in ready:
            key.data()
        if self._closing:
            return
        for wish in self._side.wishes(time.monotonic()):
            match wish:
                case Wish.BEAT:
                    self._beat()
                case Wish.CONNECT:
                    self._connect()

    def _beat(self) -> None:
        if self._lifeline is not None:
            self._send(self._lifeline, Beat(self._next_number()))

    def _connect(self) -> None:
        if len(self._attempts) >= MAX_ATTEMPTS:
            self._drop(self._attempts[0])
        try:
            connection = _Connection(socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        except OSError as error:  # no descriptor is left now; the next attempt may find one
            self._reason = str(error)
            return
        self._attempts.append(connection)
        self._selector.register(
            connection.socket, selectors.EVENT_WRITE, functools.partial(self._connected, connection)
        )
        try:
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.socket.connect(self._address)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(connection, error)

    def _connected(self, connection: "_Connection") -> None:
        if not connection.is_open:
            return
        error = connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._fail(connection, OSError(error, os.strerror(error)))
            return
        self._selector.modify(connection.socket, selectors.EVENT_READ, functools.partial(self._read, connection))

    def _read(self, connection: "_Connection") -> None:
        if not connection.is_open:
            return
        try:
            received = connection.socket.recv(4096)
            if not received:
                raise ConnectionError("it closed the connection")
            for payload in connection.frames.feed(received):
                if connection.is_open:  # what came before this one may have ended it
                    self._take(connection, payload)
        except BlockingIOError:
            return
        except (OSError, WireError, SealBrokenError) as error:
            self._fail(connection, error)

    def _take(self, connection: "_Connection", payload: bytes) -> None:
        if connection.challenge is None:
            self._greet(connection, decode_from_host(payload))
            return
        match decode_from_host(self._open(connection, payload)):
            case Answer(number=number):
                self._answered(connection, number)
            case Evicted():
                self._side.evicted()
            case Refused(reason=reason):
                self._reason = reason
                self._side.refused()
            case Challenge():
                raise WireError("a second challenge")

    def _open(self, connection: "_Connection", payload: bytes) -> bytes:
        try:
            return self._seal.open(connection.host_key, payload)
        except SealBrokenError:
            # The host could not seal for us what it says when it cannot open our hello.
            if connection is not self._lifeline and isinstance(decode_from_host(payload), Refused):
                return payload
            raise

    def _greet(self, connection: "_Connection", challenge: object) -> None:
        if not isinstance(challenge, Challenge):
            raise WireError("no challenge")
        if challenge.protocol != LIFELINE_PROTOCOL:
            self._reason = f"it speaks protocol {challenge.protocol} of the lifeline, this node {LIFELINE_PROTOCOL}"
            self._side.refused()
            return
        nonce = secrets.token_bytes(16)
        connection.challenge = challenge.nonce
        connection.send_key = hello_key(challenge.nonce)
        connection.host_key = host_key(challenge.nonce, nonce)
        self._send(connection, Hello(self._next_number(), self._node, nonce))
        connection.send_key = node_key(challenge.nonce, nonce)

    def _answered(self, connection: "_Connection", number: int) -> None:
        self._side.answered(number, time.monotonic())
        if self._lifeline is not connection:
            # It is dropped after the change: it is not the lifeline whose end would count.
            old, self._lifeline = self._lifeline, connection
            self._attempts.remove(connection)
            if old is not None:
                self._drop(old)
        for attempt in list(self._attempts):
            self._drop(attempt)
        if self._local_address is None:
            self._local_address = connection.socket.getsockname()[0].removeprefix("::ffff:")
            self._settled.set()
        if self._on_lease is not None:
            self._on_lease(self._side.lease_until)

    def _next_number(self) -> int:
        # The instant is taken before the sending: the host cannot have heard it earlier, so our lease ends in time.
        self._number += 1
        self._side.sent(self._number, time.monotonic())
        return self._number

    def _send(self, connection: "_Connection", message: FromNode) -> None:
        packet = connection.packet(self._seal, message)
        try:
            is_sent = connection.socket.send(packet) == len(packet)
        except OSError as error:
            self._fail(connection, error)
            return
        if not is_sent:
            self._fail(connection, BlockingIOError(errno.EAGAIN, "the connection takes no more"))

    def _fail(self, connection: "_Connection", error: Exception) -> None:
        self._reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if connection is self._lifeline:
            self._lifeline = None
            self._side.closed(time.monotonic())
        elif isinstance(error, ConnectionRefusedError):
            self._side.refused()
        self._drop(connection)

    def _drop(self, connection: "_Connection") -> None:
        if not connection.is_open:
            return
        if connection in self._attempts:
            self._attempts.remove(connection)
        connection.is_open = False
        self._selector.unregister(connection.socket)
        connection.socket.close()


class _Connection:
    """One connection to the host, from the first packet on."""

    def __init__(self, connecting: socket.socket) -> None:
        self.socket = connecting
        self.frames = Frames()
        self.is_open = True
        self.challenge: bytes | None = None
        self.send_key = self.host_key = ""

    def packet(self, seal: Seal, message: FromNode) -> bytes:
        """Give a message as it goes over this connection."""
        return frame(seal.seal(self.send_key, encode(message)))
