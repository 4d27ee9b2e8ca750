"""A node's connection to the host of its job: what it says goes out in order, what the leader says wakes it."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import TypeVar, cast

import msgspec
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from ft_launcher.exchange import Keys, Mailbox, Steps, append, close_mailbox, perform, receive, say_ready, tidy
from ft_launcher.lifeline import Beats
from ft_launcher.lifeline_client import Lifeline
from ft_launcher.records import Event, Message, Ready
from ft_launcher.seal import Seal, SealBrokenError

__all__ = ["CONNECT_SECONDS", "HostGone", "Link", "bounded", "connect_store"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

QUIET_SECONDS = 1.0
"""When nothing has come or gone for so long, what was read is deleted from the store."""

CONNECT_SECONDS = 5.0
"""For a connection to a store whose port has answered: a frozen host answers with its kernel only."""

FORGED_LIMIT = 5
"""After so many messages that nobody sealed, somebody else writes in the store, and nothing there can be relied on."""


class HostGone(msgspec.Struct, frozen=True):
    """The host cannot be reached any more, and how that was noticed: the lifeline's words, or "forged"."""

    how: str


def connect_store(address: str, port: int, seconds: float = CONNECT_SECONDS) -> TCPStore:
    """Give a client of the store there. Raises torch's DistError, TimeoutError where somebody listens and is silent."""
    # Torch limits the time of the connection and not that of the handshake after it.
    return bounded(
        lambda: TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds)),
        seconds,
    )


def bounded(call: Callable[[], _T], seconds: float) -> _T:
    """Give the result of `call`, on a thread that is left behind with TimeoutError when that takes too long."""
    done: list[tuple[_T | None, Exception | None]] = []

    def run() -> None:
        try:
            done.append((call(), None))
        except Exception as error:  # noqa: BLE001 (raised below)
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="ft_launcher call")
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    result, error = done[0]
    if error is not None:
        raise error
    return cast("_T", result)


class Link:
    """Three threads: one sends, one waits for mail, and the lifeline's. None of them ever makes the launcher wait."""

    def __init__(
        self,
        where: tuple[str, int],
        lifeline_port: int,
        node_id: str,
        keys: Keys,
        seal: Seal,
        beats: Beats,
        on_lease: Callable[[float], None] | None = None,
    ) -> None:
        """Connect to the host at the numeric address and port `where`. Raises DistError or OSError."""
        self._keys, self._seal = keys, seal
        self._news: deque[Message | HostGone] = deque()
        self._gone = threading.Event()
        self._outgoing: SimpleQueue[Steps[None] | None] = SimpleQueue()
        self._mailbox = Mailbox(node_id)
        self._is_closing = False
        self._outbox = connect_store(*where)
        self._inbox = connect_store(*where)
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.lifeline = Lifeline(where[0], lifeline_port, node_id, beats, seal, self._lost, on_lease)
        try:
            self.local_address: str = self.lifeline.local_address(CONNECT_SECONDS)
        except BaseException:
            self.lifeline.close()
            os.close(self._eventfd)
            raise
        self._threads = [
            threading.Thread(target=target, name=f"ft_launcher {name}", daemon=True)
            for name, target in (("outbox", self._send_all), ("inbox", self._receive_all))
        ]
        for thread in self._threads:
            thread.start()

    # -- for the launcher -----------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Give the descriptor that is readable when there is something to `receive`."""
        return self._eventfd

    def send(self, event: Event) -> None:
        """Tell the leader, soon."""
        self._outgoing.put(append(self._keys, self._seal, event))

    def say_ready(self, ready: Ready, round_: int) -> None:
        """Tell the leader, which has stopped this round, behind what was sent before."""
        self._outgoing.put(say_ready(self._keys, self._seal, ready, round_))

    def receive(self) -> list[Message | HostGone]:
        """Give what has come since."""
        try:
            os.eventfd_read(self._eventfd)
        except BlockingIOError:
            return []
        news = []
        while self._news:
            news.append(self._news.popleft())
        return news

    def close(self) -> None:
        """Say goodbye on the lifeline, behind all that was sent, and end the threads where the host still answers."""
        self._outgoing.put(None)
        is_gone = self._gone.is_set()
        for thread in () if is_gone else self._threads:
            thread.join(CONNECT_SECONDS)
        # A goodbye stands for the Left that was sent: a host that never got that must miss this node.
        self.lifeline.close(goodbye=not is_gone)
        # A thread that still waits for a host that is gone may write to it: the descriptor stays open for that one.
        if not any(thread.is_alive() for thread in self._threads):
            os.close(self._eventfd)

    # -- the threads ----------------------------------------------------------------------------------------------

    def _tell(self, news: Message | HostGone) -> None:
        self._news.append(news)
        os.eventfd_write(self._eventfd, 1)

    def _lost(self, how: str) -> None:
        if not self._gone.is_set():
            self._gone.set()
            self._tell(HostGone(how))

    def _send_all(self) -> None:
        # The inbox could have waited with a limit; but when one gives up, torch's store looks at all others that wait.
        while True:
            try:
                steps = self._outgoing.get(timeout=QUIET_SECONDS if self._mailbox.used else None)
            except Empty:
                steps = tidy(self._mailbox.used)
            if steps is None:
                break
            if not self._send_one(steps):
                return
        # First: the inbox looks at it behind each message.
        self._is_closing = True
        self._send_one(close_mailbox(self._keys, self._seal, self._mailbox))

    def _send_one(self, steps: Steps[None]) -> bool:
        try:
            perform(steps, self._outbox, time.monotonic)
        except DistError:
            self._lost("closed")
            return False
        return True

    def _receive_all(self) -> None:
        forged = 0
        while True:
            try:
                message = perform(receive(self._keys, self._seal, self._mailbox), self._inbox, time.monotonic)
            except (SealBrokenError, msgspec.MsgspecError, ValueError):
                forged += 1
                logger.warning("somebody else wrote into this node's mailbox in the store; ignored")
                if forged >= FORGED_LIMIT:
                    self._lost("forged")
                    return
                continue
            except DistError:
                self._lost("closed")
                return
            if message is None:
                return
            self._tell(message)
            self._outgoing.put(_nothing())  # so that the outbox sees that there is something to tidy up
            if self._is_closing:
                return  # this message stood where the end of the mailbox was to be written


def _nothing() -> Steps[None]:
    yield from ()
