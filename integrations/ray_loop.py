"""One thread that does what others post to it, and what is due: all that concerns one actor or gang happens in it."""

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from math import inf
from typing import Any

__all__ = ["Loop"]

logger = logging.getLogger(__name__)


class Loop:
    """Start it, post to it from any thread, and close it."""

    def __init__(self, name: str) -> None:
        self._posted: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._due: list[tuple[float, int, Callable[[], Any]]] = []
        self._count = itertools.count()
        self._closing = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, do: Callable[[], Any]) -> None:
        """Have it done after what was posted before; at once, in this thread, where the loop has ended."""
        with self._closing:
            if not self._is_closed:
                self._posted.put(do)
                return
        do()

    def later(self, seconds: float, do: Callable[[], Any]) -> None:
        """Have it done then, `inf` never; only from within the loop."""
        if seconds < inf:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._count), do))

    def close(self) -> None:
        """Do what was posted, and end; what is due later is left undone."""
        with self._closing:
            self._is_closed = True
            self._posted.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                do = self._posted.get(timeout=self._wait())
            except queue.Empty:
                do = heapq.heappop(self._due)[2]
            if do is None:
                return
            try:
                do()
            except Exception:
                logger.exception("%s: an error of the supervision itself", self._thread.name)

    def _wait(self) -> float | None:
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
