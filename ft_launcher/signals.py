"""The signals to the launcher: notices of preemption are passed on, the others end it.

Of those that end it the first raises, its echoes do not, and somebody who insists is heard.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.distributed.elastic.multiprocessing.api import SignalException

from ft_launcher.errors import UsageError
from ft_launcher.noticing import Notices

__all__ = ["StopSignals"]

SAME_SECONDS = 1.0
"""The same wish may come several times within a moment: Slurm signals the launcher, and srun forwards it as well."""


_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """Handles the signals of --signals-to-handle by raising SignalException, in place of torch's own handlers.

    Those that are notices of preemption are put into `notices` instead.
    """

    def __init__(self, names: str, notices: Notices, as_notices: tuple[signal.Signals, ...] | None = None) -> None:
        """Handle them from now on. `as_notices`: which of all signals are notices; None: SIGUSR1 and SIGUSR2, and
        SIGTERM while all ranks listen. Raises UsageError for what is not a signal's name.
        """
        self._numbers = [_number(name.strip(), names) for name in names.split(",")]
        self._notices = notices
        if as_notices is None:
            self._as_notices = {number for number in _WARNINGS if number not in self._numbers}
            self._if_all_listen = {signal.SIGTERM}
        else:
            self._as_notices, self._if_all_listen = set(as_notices), set()
        self._passed_on: set[int] = set()
        self.had_nothing_to_save = False
        """A notice has ended the launcher, as no rank ran."""
        self.ranks_run: Callable[[], bool] = lambda: False
        """Ranks run here, or have ended well."""
        self.all_listen: Callable[[], bool] = lambda: False
        """All ranks that run here ask whether to save."""
        self._last_at = -SAME_SECONDS
        self._is_held = False
        self._waiting: signal.Signals | None = None
        # Torch hands this list to its process contexts, which would register handlers of their own.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = names
        self.install()
        # Warnings of a scheduler (Slurm's --signal) are never meant to end the launcher. Not before the line above:
        # what is ignored for a moment is lost, although it was blocked.
        for number in _WARNINGS:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, signal.SIG_IGN)

    def let_through(self) -> None:
        """Receive what came before there was anybody to receive it (__main__.py). May raise as a signal does."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, *_WARNINGS})

    def install(self) -> None:
        """Handle the signals again, after torch has put its handlers in place."""
        for number in {*self._numbers, *self._as_notices}:
            signal.signal(number, self._receive)

    def ignore(self) -> None:
        """Ignore them from now on: only the clean-up is left, and it is short."""
        for number in {*self._numbers, *self._as_notices}:
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def kept_from_ranks(self, *, has_shim: bool) -> Iterator[None]:
        """Start ranks in this block: SIGUSR1 and SIGUSR2 shall not end them before they ignore them.

        A handler of this process is none in theirs. exec_shim.py lets through what is blocked here, when it ignores
        them; without it they are ignored from the start, and here too for so long.
        """
        if has_shim:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _WARNINGS)
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _WARNINGS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

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
        if self._is_notice(number):
            self._passed_on.add(number)
            self._notices.put_signal(number, signal.Signals(number).name)
            return
        now = time.monotonic()
        if now - self._last_at < SAME_SECONDS:
            return
        self._last_at = now
        self.had_nothing_to_save = number in self._as_notices or number in self._passed_on
        if self._is_held:
            self._waiting = signal.Signals(number)
            return
        raise SignalException(f"signal {number}", sigval=signal.Signals(number))

    def _is_notice(self, number: int) -> bool:
        if number not in self._numbers:
            return True
        if number in self._as_notices or number in self._passed_on:
            return self.ranks_run()
        return number in self._if_all_listen and self.all_listen()


def _number(name: str, names: str) -> signal.Signals:
    try:
        return signal.Signals[name]
    except KeyError:
        raise UsageError(f"--signals-to-handle {names}: {name or 'nothing'} is not a signal's name") from None
