"""What a hung rank was doing: the Python stacks it writes on a signal, and what the kernel says of its threads."""

import os
import signal
import time
from contextlib import suppress

from ft_launcher import processes, procfs
from ft_launcher.messages import Speaker
from ft_launcher.processes import Process, Tree
from ft_launcher.watch import Deadline

__all__ = ["Evidence"]

STACKS_SECONDS = 2.0
"""The longest wait for a rank to write its stacks; it takes milliseconds, unless the rank cannot run at all."""

_SETTLED_SECONDS = 0.005
"""Stacks that were asked for this long ago, and are there, are complete: writing 100 threads takes under 1 ms."""


class Evidence:
    """Gathers, shortly before a deadline, what will explain the kill. Owns the descriptor of the stacks file."""

    def __init__(self, rank: Process, marker: str, stacks_fd: int, path: str) -> None:
        self.stacks_fd = stacks_fd
        self._rank = rank
        self._tree = Tree([rank], markers=[marker])
        self.path = path
        self._speaker: Process | None = None
        self._stack_signal = 0
        self._gathered_for: Deadline | None = None
        self._asked_at: float | None = None
        self._kernel = ""
        self.members = [rank]

    def heed(self, speaker: Speaker) -> None:
        """Ask `speaker` for stacks from now on."""
        if self._speaker is not None:
            self._speaker.close()
            self._speaker = None
        self._stack_signal = speaker.stack_signal
        with suppress(ProcessLookupError):  # it has gone again
            self._speaker = Process(speaker.pid)

    def speaker_pid(self) -> int | None:
        """Give the process that speaks for the rank; None when there was none yet, or it has ended."""
        return None if self._speaker is None or self._speaker.is_gone() else self._speaker.pid

    def gather_for(self, due: Deadline) -> None:
        """Look at the rank and its processes, and ask it for its stacks, once for each deadline."""
        if self._gathered_for == due:
            return
        self._gathered_for = due
        self.look()
        self._kernel = procfs.stacks_from_proc(self._rank.pid)
        # A stopped process is continued only when its time is up.
        self._asked_at = None
        entry = procfs.read_entry(self._rank.pid)
        if entry is not None and entry.state != "T":
            self._ask()

    def complete_for(self, due: Deadline) -> None:
        """Return when all is gathered, after 2 s at the latest. A stopped rank is continued for it."""
        self.gather_for(due)
        if self._speaker is None or not self._can_write():
            return
        if self._asked_at is None:
            self._ask()
            self._speaker.send(signal.SIGCONT)
        asked_at = self._asked_at or time.monotonic()
        size = self._size()
        while time.monotonic() - asked_at < STACKS_SECONDS:
            if size and time.monotonic() - asked_at >= _SETTLED_SECONDS:
                return
            # There is no event for a write to a memfd; this wait ends early with the process.
            if not processes.wait_gone([self._speaker.pidfd], 0.001):
                return
            size = self._size()

    def save(self, cause: str) -> None:
        """Write the file that the launcher's message names. A disk that refuses it costs the file, and nothing else."""
        if not self.path:  # the user asked for no log directory (--log-dir /dev/null)
            return
        stacks = os.pread(self.stacks_fd, 1 << 20, 0).decode(errors="replace") or "none: the rank did not write any\n"
        text = f"{cause}\n\n--- Python stacks ---\n{stacks}\n--- threads in the kernel ---\n{self._kernel}"
        with suppress(OSError):
            os.makedirs(os.path.dirname(self.path), exist_ok=True)  # noqa: PTH103, PTH120 - pathlib costs 1 MB
            with open(f"{self.path}.part", "w") as file:  # noqa: PTH123
                file.write(text)
            os.replace(f"{self.path}.part", self.path)  # noqa: PTH105

    def look(self) -> list[Process]:
        """Look for the rank and all that it has started, and give them; they are `members` until the next look."""
        self.members = [self._rank, *self._tree.look()]
        return self.members

    def close(self) -> None:
        """Close all descriptors."""
        self._tree.close()
        if self._speaker is not None:
            self._speaker.close()
        os.close(self.stacks_fd)

    def _ask(self) -> None:
        if self._speaker is None or not self._can_write():
            return
        os.ftruncate(self.stacks_fd, 0)
        os.lseek(self.stacks_fd, 0, os.SEEK_SET)
        self._speaker.send(self._stack_signal)
        self._asked_at = time.monotonic()

    def _can_write(self) -> bool:
        # The default action of a real-time signal is to kill: only where a handler stands is it sent.
        return (
            self._speaker is not None
            and self._stack_signal != 0
            and procfs.catches(self._speaker.pid, self._stack_signal)
        )

    def _size(self) -> int:
        return os.fstat(self.stacks_fd).st_size
