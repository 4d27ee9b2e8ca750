"""A rank's connection to its monitor: connect, say hello, ask, and do it again when the monitor was replaced.

The monitor's listening socket is kept open by the launcher, so that a connection made while there is no monitor waits
in its queue for the next one. Every wait here has an end.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ft_launcher.errors import RankMonitorClientError
from ft_launcher.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL,
    CheckpointSaved,
    ControlRequested,
    Hello,
    LimitsSet,
    ProtocolError,
    Refused,
    RequestAcknowledged,
    ResumedFrom,
    ToRank,
    Welcome,
    decode_to_rank,
    encode,
)

__all__ = ["Greeting", "MonitorGoneError", "RankLink"]


Result = TypeVar("Result")


class MonitorGoneError(Exception):
    """No answer from a monitor within the time given."""


class Greeting:
    """What the monitor handed over: its configuration (msgpack), and two descriptors that are the caller's to close."""

    def __init__(self, config: bytes, page_fd: int, stacks_fd: int) -> None:
        self.config = config
        self.page_fd = page_fd
        self.stacks_fd = stacks_fd


class RankLink:
    """The connection of this process to the monitor that listens at `path`. Not thread-safe: callers hold a lock."""

    def __init__(self, path: str, stack_signal: int) -> None:
        self._path = Path(path)
        self._hello = encode(Hello(protocol=PROTOCOL, stack_signal=stack_signal))
        self._socket: socket.socket | None = None
        self._number = 0

    def greet(self, within: float) -> Greeting:
        """Connect and say hello, again and again for `within` seconds.

        Raises MonitorGoneError when nobody answered, RankMonitorClientError when the monitor refused this process.
        """
        return self._persist(self._greet_once, within)

    def ask(self, question: LimitsSet | ControlRequested | ResumedFrom | CheckpointSaved, within: float) -> None:
        """Send `question`, and repeat it on a new connection until it has been acknowledged.

        Raises MonitorGoneError when that took longer than `within` seconds.
        """

        def ask_once(deadline: float) -> None:
            if self._socket is None:
                greeting = self._greet_once(deadline)
                os.close(greeting.page_fd)
                os.close(greeting.stacks_fd)
            self._send(encode(question), deadline)
            self._await_acknowledgement(question.number, deadline)

        self._persist(ask_once, within)

    def hear_until(self, is_so: Callable[[], bool], within: float) -> bool:
        """Take messages until `is_so`, which a message of the monitor's announces; False when that took too long."""

        def hear(deadline: float) -> bool:
            # Asked anew behind each connection: what the monitor before has said to nobody is so by now.
            while not is_so():
                if self._socket is None:
                    greeting = self._greet_once(deadline)
                    os.close(greeting.page_fd)
                    os.close(greeting.stacks_fd)
                else:
                    self._receive(deadline)
            return True

        try:
            return self._persist(hear, within)
        except (MonitorGoneError, RankMonitorClientError):
            return is_so()

    def next_number(self) -> int:
        """Give a number that no other request of this process has."""
        self._number += 1
        return self._number

    def close(self) -> None:
        """Close the connection, if there is one."""
        closing, self._socket = self._socket, None
        if closing is not None:
            with suppress(OSError):  # the script has closed all descriptors, as daemons do
                closing.close()

    def _persist(self, attempt: Callable[[float], Result], within: float) -> Result:
        deadline = time.monotonic() + within
        while True:
            try:
                return attempt(deadline)
            except (OSError, EOFError) as error:
                self.close()
                if time.monotonic() >= deadline:
                    raise MonitorGoneError(f"no answer at {self._path}: {error}") from error
                # Needed only where connecting fails at once: the launcher is gone, and this process soon will be.
                time.sleep(0.02)

    def _greet_once(self, deadline: float) -> Greeting:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._wait_at_most(deadline)
        # Through the directory's descriptor: a socket's address has room for 107 bytes only.
        directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.connect(f"/proc/self/fd/{directory}/{self._path.name}")
        finally:
            os.close(directory)
        self._send(self._hello, deadline)
        answer, descriptors = self._receive(deadline)
        match answer:
            case Welcome(config=config) if len(descriptors) == 2:
                return Greeting(bytes(config), *descriptors)
            case Refused(reason=reason):
                self.close()
                raise RankMonitorClientError(f"the rank monitor refused this process: {reason}")
            case _:
                raise OSError(f"unexpected answer {answer!r}")

    def _await_acknowledgement(self, number: int, deadline: float) -> None:
        while True:
            answer, _ = self._receive(deadline)
            match answer:
                case RequestAcknowledged(number=done) if done == number:
                    return
                case Refused(reason=reason):
                    raise RankMonitorClientError(f"the rank monitor refused the request: {reason}")
                case _:
                    continue

    def _send(self, packet: bytes, deadline: float) -> None:
        assert self._socket is not None  # noqa: S101 - for the type checker
        self._wait_at_most(deadline)
        self._socket.sendall(packet)

    def _receive(self, deadline: float) -> tuple[ToRank, list[int]]:
        assert self._socket is not None  # noqa: S101 - for the type checker
        self._wait_at_most(deadline)
        packet, descriptors, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        if not packet:
            raise EOFError("the monitor closed the connection")
        try:
            return decode_to_rank(packet), descriptors
        except ProtocolError as error:
            raise OSError(f"not a message: {error}") from error

    def _wait_at_most(self, deadline: float) -> None:
        assert self._socket is not None  # noqa: S101 - for the type checker
        # 0 would mean non-blocking; a deadline that has passed still allows what can be done at once.
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
