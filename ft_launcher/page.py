"""The shared page through which a rank tells its monitor that it moves: monotonic stamps, and names for sections.

One page (a memfd) per process of a rank. The rank alone writes it, but for `LOOKED`, its monitor's own sign of life
towards the launcher, and `LEASE`, `NOTICE`, `SAVE_AT` and `STOPPED`, the launcher's. Every stamp is one aligned 8-byte
store of `time.monotonic_ns()`, whose zero point all processes of a boot share; 0 means never. The slots behind the
stamps are numbers of notices of preemption, and steps plus 1, so that 0 means none. Nothing here blocks, and the page
outlives its readers.
"""

import fcntl
import mmap
import os
import time
from contextlib import suppress
from enum import IntEnum

from ft_launcher.watch import Progress, Stamps

__all__ = ["MAX_NAME_BYTES", "MAX_SECTIONS", "PAGE_BYTES", "Slot", "StampPage", "create_page"]

MAX_SECTIONS = 256
"""Different section names that one process of a rank may use: ten times what the largest known user has."""
MAX_NAME_BYTES = 64

_FIRST_SECTION = 24  # behind the slots below, and a few more
_NAMES_AT = 8 * (_FIRST_SECTION + MAX_SECTIONS)
PAGE_BYTES = _NAMES_AT + MAX_SECTIONS * MAX_NAME_BYTES
_NS = 1e-9


class Slot(IntEnum):
    """Where the stamps stand that are not a section's."""

    HEARTBEAT = 0
    IDLE_SINCE = 1  # the last moment at which the last open section was closed, or monitoring began
    CONNECTED = 2
    TEARDOWN = 3  # monitoring was shut down, or the rank is handling an error
    RECONNECTED = 4  # monitoring began anew after it was shut down: the startup clock starts again here
    LOOKED = 5  # the monitor's
    LEASE = 6  # the launcher's: until when the rank may go on without news of the other nodes
    SECTIONS = 7  # how many names are in use: a count, not a stamp
    ASKED = 8  # the step that the rank asked about last, plus 1
    NOTICE = 9  # the launcher's: the number of the notice that is to be heeded, 0: none
    SAVE_AT = 10  # the launcher's: the first step at which to save for it, plus 1; 0: not known yet
    SAVING = 11  # the number of the last notice for which the rank was told to save
    SAVING_AT = 12  # and the step, plus 1
    SAVED = 13  # the number of the last notice that the rank has done with
    LEAVING = 14  # the rank ends for a notice
    STEP = 15  # the last step that the rank has reported, plus 1
    STOPPED = 16  # the launcher's: it is about to stop the rank, and nobody listens to it any more


def create_page() -> int:
    """Give the descriptor of a new page, all zero. The caller closes it.

    Raises OSError when neither memfd nor an unlinked file in /dev/shm can be had.
    """
    if hasattr(os, "memfd_create"):
        page = os.memfd_create("ft_launcher_page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:  # pragma: no cover - a C library older than memfd (glibc 2.27)
        import tempfile

        with tempfile.TemporaryFile() as file:
            page = os.dup(file.fileno())
    os.ftruncate(page, PAGE_BYTES)
    # A rank that shortened it would end the launcher and the monitor by SIGBUS. Only a memfd can be sealed.
    with suppress(OSError):
        fcntl.fcntl(page, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return page


class StampPage:
    """A mapped page. `stamps[slot] = time.monotonic_ns()` is how a rank writes it."""

    def __init__(self, fd: int) -> None:
        """Map the page behind `fd`, which stays the caller's (-1: a page of this process alone).

        Raises ValueError when it is too short.
        """
        self.fd = fd
        self._map = mmap.mmap(fd, PAGE_BYTES)
        self.stamps = memoryview(self._map).cast("B")[:_NAMES_AT].cast("q")
        self.slots: dict[str, int] = {}
        """Where each section's stamp stands that was used so far."""

    def close(self) -> None:
        """Unmap the page."""
        self.stamps.release()
        self._map.close()

    def begin(self) -> None:
        """Say that monitoring begins, and forget what an earlier program of the same rank wrote."""
        now = time.monotonic_ns()
        if self.stamps[Slot.CONNECTED]:
            # First: from here on the silence of this rank counts from now, not from the start of its process.
            self.stamps[Slot.RECONNECTED] = now
        self.stamps[Slot.IDLE_SINCE] = now
        self.slots.clear()
        self.stamps[Slot.SECTIONS] = 0
        for index in range(_FIRST_SECTION, _FIRST_SECTION + MAX_SECTIONS):
            self.stamps[index] = 0
        self.stamps[Slot.HEARTBEAT] = 0
        self.stamps[Slot.CONNECTED] = now
        self.stamps[Slot.TEARDOWN] = 0

    def copy_from(self, other: "StampPage") -> None:
        """Take over all that `other` says, but for what the monitor or an earlier program of the rank wrote here."""
        was_connected = self.stamps[Slot.CONNECTED]
        others = (Slot.LOOKED, Slot.LEASE, Slot.NOTICE, Slot.SAVE_AT, Slot.STOPPED)
        of_others = {slot: self.stamps[slot] for slot in others}
        self._map[:] = other._map[:]  # noqa: SLF001 - another page
        for slot, value in of_others.items():
            self.stamps[slot] = value
        if was_connected:
            self.stamps[Slot.RECONNECTED] = self.stamps[Slot.CONNECTED]
        self.slots = dict(other.slots)

    def section_slot(self, name: str) -> int:
        """Give the slot of section `name`, a new one on its first use.

        Raises ValueError when the name is empty or longer than 64 bytes, or is the 257th.
        """
        slot = self.slots.get(name)
        return self._add(name) if slot is None else slot

    def _add(self, name: str) -> int:
        text = name.encode()
        count = self.stamps[Slot.SECTIONS]
        if not 0 < len(text) <= MAX_NAME_BYTES:
            raise ValueError(
                f"a section's name has 1 to {MAX_NAME_BYTES} bytes of UTF-8, {name[:80]!r} has {len(text)}"
            )
        if count >= MAX_SECTIONS:
            raise ValueError(
                f"section {name!r} would be number {count + 1}; {MAX_SECTIONS} different names are allowed"
            )
        at = _NAMES_AT + count * MAX_NAME_BYTES
        self._map[at : at + MAX_NAME_BYTES] = text.ljust(MAX_NAME_BYTES, b"\0")
        # The count last: a reader believes only names below it.
        self.stamps[Slot.SECTIONS] = count + 1
        self.slots[name] = _FIRST_SECTION + count
        return _FIRST_SECTION + count

    def read(self) -> Stamps:
        """Give what the page says now; whatever a confused rank may have written there, this does not raise."""
        stamps = self.stamps
        count = min(max(stamps[Slot.SECTIONS], 0), MAX_SECTIONS)
        # Each stamp is read once: a section that is closed between two reads would be open since 0, and so be late.
        since = stamps[_FIRST_SECTION : _FIRST_SECTION + count].tolist()
        opened = {self._name(i): each * _NS for i, each in enumerate(since) if each > 0}
        return Stamps(
            heartbeat=_seconds(stamps[Slot.HEARTBEAT]),
            idle_since=_seconds(stamps[Slot.IDLE_SINCE]),
            connected=_seconds(stamps[Slot.CONNECTED]),
            reconnected=_seconds(stamps[Slot.RECONNECTED]),
            teardown=_seconds(stamps[Slot.TEARDOWN]),
            lease=_seconds(stamps[Slot.LEASE]),
            used_sections=count > 0,
            open_sections=opened,
        )

    def progress(self) -> Progress:
        """Give what the page says about steps and notices."""
        stamps = self.stamps
        return Progress(
            asked=stamps[Slot.ASKED] - 1,
            step=max(stamps[Slot.STEP], stamps[Slot.ASKED]) - 1,
            saving=stamps[Slot.SAVING],
            saving_at=stamps[Slot.SAVING_AT] - 1,
            saved=stamps[Slot.SAVED],
            is_leaving=stamps[Slot.LEAVING] != 0,
        )

    def looked(self) -> float | None:
        """When the monitor looked last, in seconds of `time.monotonic()`."""
        return _seconds(self.stamps[Slot.LOOKED])

    def _name(self, index: int) -> str:
        at = _NAMES_AT + index * MAX_NAME_BYTES
        return self._map[at : at + MAX_NAME_BYTES].rstrip(b"\0").decode(errors="replace")


def _seconds(stamp: int) -> float | None:
    return stamp * _NS if stamp > 0 else None
