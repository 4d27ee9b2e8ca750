"""The launcher's voice on stderr: lines that start with its name, and never make it wait."""

import contextlib
import logging
import select
import sys
from typing import TextIO

__all__ = ["open_console", "say"]


class _Console(logging.Handler):
    """Writes to stderr when it takes a line at once. A reader that stopped reading must not stop the launcher."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # Writable means room for 4096 bytes in a pipe: more than a line has.
            if not select.select([], [self._stream], [], 0)[1]:
                self._dropped += 1
                return
            text = f"ft_launcher: {self.format(record)}"
            if self._dropped:
                text = f"ft_launcher: {self._dropped} lines were lost here\n{text}"
                self._dropped = 0
            self._stream.write(text.encode(errors="replace").decode(errors="replace")[:4000] + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # closed, or its reader is gone
            self._dropped += 1


def open_console(level: int) -> None:
    """Send what the package logs at `level` or above to stderr."""
    logger = logging.getLogger("ft_launcher")
    logger.handlers.clear()
    if sys.stderr is not None:
        logger.addHandler(_Console(sys.stderr))
    logger.setLevel(level)
    logger.propagate = False


def say(text: str) -> None:
    """Write a report of several lines to stderr, if somebody reads there."""
    with contextlib.suppress(OSError, ValueError):  # closed, or its reader is gone
        if sys.stderr is not None and select.select([], [sys.stderr], [], 0)[1]:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
