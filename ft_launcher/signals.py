"""The signals that end the launcher: the first raises, its echoes do not, and somebody who insists is heard."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.elastic.multiprocessing.api import SignalException

from ft_launcher.errors import UsageError

__all__ = ["StopSignals"]

SAME_SECONDS = 1.0
"""The same wish may come several times within a moment: Slurm signals the launcher, and srun forwards it as well."""


class StopSignals:
    """Handles the signals of --signals-to-handle by raising SignalException, in place of torch's own handlers."""

    def __init__(self, names: str) -> None:
        """Handle them from now on. Raises UsageError for what is not a signal's name."""
        self._numbers = [_number(name.strip(), names) for name in names.split(",")]
        self._last_at = -SAME_SECONDS
        self._is_held = False
        self._waiting: signal.Signals | None = None
        # Torch hands this list to its process contexts, which would register handlers of their own.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = names
        self.install()
        # Warnings of a scheduler (Slurm's --signal) are meant for the ranks; the launcher must not die of them.
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, signal.SIG_IGN)

    def install(self) -> None:
        """Handle the signals again, after torch has put its handlers in place."""
        for number in self._numbers:
            signal.signal(number, self._receive)

    def ignore(self) -> None:
        """Ignore them from now on: only the clean-up is left, and it is short."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a signal raise only at the end of this block: half of what it makes could not be undone."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._waiting is not None:
            raise SignalException(f"signal {self._waiting}", sigval=self._waiting)

    def _receive(self, number: int, _frame: object) -> None:
        # Nothing is logged here: a handler may interrupt the logging of something else.
        now = time.monotonic()
        if now - self._last_at < SAME_SECONDS:
            return
        self._last_at = now
        if self._is_held:
            self._waiting = signal.Signals(number)
            return
        raise SignalException(f"signal {number}", sigval=signal.Signals(number))


def _number(name: str, names: str) -> signal.Signals:
    try:
        return signal.Signals[name]
    except KeyError:
        raise UsageError(f"--signals-to-handle {names}: {name or 'nothing'} is not a signal's name") from None
