"""Notices of preemption on their way to the agent, from handlers of signals and from the thread that asks sources."""

import os
import time
from collections import deque
from typing import NamedTuple

from ft_launcher.notices import Notice, State

__all__ = ["Notices", "Received"]


class Received(NamedTuple):
    """A notice, and when it came; `until`: the end, None: not known. Instants of `time.monotonic()`."""

    what: str
    at: float
    signum: int | None = None
    until: float | None = None


class Notices:
    """A queue that wakes who waits at `fileno`. Anybody puts something in; the main thread takes it out.

    Never closed: a signal may come as long as the process lives.
    """

    def __init__(self) -> None:
        self._waiting: deque[Received] = deque()
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """Give the descriptor that is readable when there is something to `take`."""
        return self._eventfd

    def put_signal(self, number: int, name: str) -> None:
        """A signal came. For its handler."""
        self._put(Received(name, time.monotonic(), signum=number))

    def put_state(self, _source: str, state: State) -> None:
        """A source says something else than before. From any thread."""
        if isinstance(state, Notice):
            self._put(Received(f"{state.source}: {state.description}", time.monotonic(), until=state.deadline))

    def take(self) -> list[Received]:
        """Give what has come since."""
        try:
            os.eventfd_read(self._eventfd)
        except BlockingIOError:
            return []
        taken = []
        while self._waiting:
            taken.append(self._waiting.popleft())
        return taken

    def _put(self, received: Received) -> None:
        self._waiting.append(received)
        os.eventfd_write(self._eventfd, 1)
