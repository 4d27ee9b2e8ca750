"""What a rank answers when it asks whether to save at this step: the same on all ranks at the same step.

Before it looks for a notice, a rank writes into its page the step that it asks about; before the launcher reads the
page, it writes the notice there. So no rank is at a later step than its launcher has read, or it has seen the notice
and waits. One more than the latest step of all ranks is ahead of every rank, and there they save.
"""

from collections.abc import Callable
from typing import Protocol

from ft_launcher.page import Slot

__all__ = ["UNCONNECTED", "Answers"]

UNCONNECTED = -1
"""Stands for a notice in a page that no launcher reads or writes yet."""

# Plain numbers, as an IntEnum is slow as an index.
_NOTICE = int(Slot.NOTICE)
_SAVE_AT = int(Slot.SAVE_AT)


class Stamps(Protocol):
    """The numbers of a page, by slot."""

    def __getitem__(self, slot: int, /) -> int: ...

    def __setitem__(self, slot: int, value: int, /) -> None: ...


class Answers:
    """What one process of a rank was answered. A notice that is `done` concerns it no more."""

    def __init__(self) -> None:
        self.done = 0
        self._told = 0

    def answer(self, stamps: Stamps, step: int, is_known: Callable[[], bool]) -> bool:
        """Say whether to save now, where the notice in the page is not done with.

        `is_known` waits until the page says at which step to save; False: that took too long.
        """
        notice = stamps[_NOTICE]
        self.finish(stamps)
        if stamps[Slot.SAVED] >= notice:
            self.done = self._told = notice  # by this process, or by the one before it that spoke for the rank
            return False
        if not stamps[_SAVE_AT] and not is_known():
            # From here on this rank passes steps that nobody counts on. The launcher says that it has not saved.
            self.done = self._told = notice
            return False
        if step + 1 < stamps[_SAVE_AT]:
            return False
        self._told = notice
        stamps[Slot.SAVING_AT] = step + 1
        stamps[Slot.SAVING] = notice
        return True

    def finish(self, stamps: Stamps) -> None:
        """Take note that the rank has gone on since it was told to save, or is about to end."""
        if self._told != self.done:
            self.done = stamps[Slot.SAVED] = self._told
