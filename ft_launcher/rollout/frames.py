"""A file of frames that is written from start to end: each is whole or not there, each bit is covered.

    magic | kind, length, CRC-32 of these and the payload | payload | kind, …

Whatever kills the writer, all frames before the last are readable; a digest over all of them stands in the last one.
"""

import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from time import monotonic
from typing import NamedTuple
from weakref import WeakSet

from ft_launcher.rollout.errors import DumpError

__all__ = ["MAGIC", "Frame", "FrameError", "FrameFile", "read_frames"]

MAGIC = b"ft-rollout-dump\n"
_HEAD = struct.Struct(">cQI")
_SYNC_BYTES = 4 * 1024 * 1024
_SYNC_SECONDS = 1.0
"""What may be lost with the machine, of what was appended; with the process nothing is."""


class FrameError(ValueError):
    """From here on the file is not what was written, or not all of it."""


class Frame(NamedTuple):
    """`sha256`: of all that stands before this frame in the file."""

    kind: bytes
    payload: bytes
    sha256: str


_open: "WeakSet[FrameFile]" = WeakSet()


class FrameFile:
    """A new file, from the first frame to the last; one process holds it."""

    def __init__(self, path: Path, aside: Path) -> None:
        """Begin it. What a dead writer has left at `path` is kept as `aside`.

        Raises DumpError while another process writes there, and OSError where that cannot be.
        """
        self.path = path
        self._file = _claimed(path)
        try:
            if os.fstat(self._file.fileno()).st_size:
                path.rename(aside)
                self._file.close()
                self._file = _claimed(path)
            self._file.write(MAGIC)
        except BaseException:
            self._file.close()
            raise
        self._sha256 = hashlib.sha256(MAGIC)
        self._end = len(MAGIC)
        self._synced_at, self._synced_end = monotonic(), 0
        _open.add(self)

    @property
    def sha256(self) -> str:
        """Of all that was written so far."""
        return self._sha256.hexdigest()

    def write(self, kind: bytes, payload: bytes) -> None:
        """Append a frame: when this returns it outlives the process. OSError: it is not there, the others are."""
        head = kind + struct.pack(">Q", len(payload))
        head += struct.pack(">I", zlib.crc32(payload, zlib.crc32(head)))
        try:
            _write_all(self._file.fileno(), head, payload)
        except OSError:
            self._file.truncate(self._end)  # what could be written of it
            raise
        self._sha256.update(head)
        self._sha256.update(payload)
        self._end += len(head) + len(payload)
        if self._end - self._synced_end >= _SYNC_BYTES or monotonic() - self._synced_at >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Have it on the disk."""
        os.fsync(self._file.fileno())
        self._synced_at, self._synced_end = monotonic(), self._end

    def close(self) -> None:
        """Let go of it."""
        self._file.close()


def _let_go() -> None:
    for file in list(_open):
        file.close()


# A forked child (a data loader's worker) would write into the same place, and hold the lock for as long as it lives.
os.register_at_fork(after_in_child=_let_go)


def _claimed(path: Path) -> FileIO:
    file = path.open("a+b", buffering=0)
    try:
        # Not lockf: this process would give that up whenever it has read the file.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever wrote there may have given it its final name since it was opened here.
        if os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
    except (BlockingIOError, PermissionError, FileNotFoundError):
        pass
    except BaseException:
        file.close()
        raise
    file.close()
    raise DumpError(f"{path} is being written by another process")


def _write_all(descriptor: int, head: bytes, payload: bytes) -> None:
    written = os.writev(descriptor, (head, payload))
    rest = memoryview(head + payload)[written:] if written < len(head) + len(payload) else b""
    while rest:  # one call writes 2 GiB at most
        rest = rest[os.write(descriptor, rest) :]


def read_frames(path: Path) -> Iterator[Frame]:
    """Give the frames of a file.

    Raises FrameError after the last whole one when something else follows, and OSError.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(MAGIC)) != MAGIC:
            raise FrameError("it does not begin as a dump does")
        sha256 = hashlib.sha256(MAGIC)
        while (left := size - file.tell()) > 0:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                raise FrameError(f"it ends within a frame at byte {size - left}")
            kind, length, crc = _HEAD.unpack(head)
            # Compared before it is read: a broken length is not to ask for all memory.
            payload = file.read(length) if length <= left - _HEAD.size else b""
            if len(payload) < length:
                raise FrameError(f"it ends within a frame at byte {size - left}, or the frame's length is broken")
            if zlib.crc32(payload, zlib.crc32(head[:-4])) != crc:
                raise FrameError(f"the frame at byte {size - left} has changed since it was written")
            yield Frame(kind, payload, sha256.hexdigest())
            sha256.update(head)
            sha256.update(payload)
