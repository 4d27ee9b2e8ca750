"""Files that are hashed while they are written, on the disk before they count, and verified before they are used."""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ft_launcher.checkpoint.manifest import FileRecord, Manifest

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["HashedFile", "OnBytes", "Verify", "hashed_file", "problems"]

OnBytes = Callable[[int], None]
"""Told how many bytes more were written or read."""

Verify = Literal["full", "size"]

_COPIED_BYTES = 256 * 1024
"""Up to this size a piece is copied before it is hashed in the background: that costs less than to wait for it."""
_READ_BYTES = 4 * 1024 * 1024


class HashedFile(io.RawIOBase):
    """A new file for writing from start to end, hashed beside: both work without the interpreter's lock.

    `lasts`: what is written in large pieces stays as it is until the file is closed, as the tensors of a model on the
    host do; then nothing waits for the hashing but the end.
    """

    def __init__(self, path: Path, on_bytes: OnBytes, *, lasts: bool = False) -> None:
        super().__init__()
        self._file = path.open("xb", buffering=1024 * 1024)
        self._sha256 = hashlib.sha256()
        self._bytes = 0
        self._on_bytes = on_bytes
        self._lasts = lasts
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ft_sha256")

    def writable(self) -> bool:
        """Say yes."""
        return True

    def write(self, data: "Buffer", /) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        is_small = len(view) <= _COPIED_BYTES
        hashing = self._hasher.submit(self._sha256.update, bytes(view) if is_small else view)
        try:
            self._file.write(view)
        finally:
            if not is_small and not self._lasts:
                hashing.result()
        self._bytes += len(view)
        self._on_bytes(len(view))
        return len(view)

    def tell(self) -> int:
        """Give how many bytes were written."""
        return self._bytes

    def fileno(self) -> int:
        """Give the descriptor, with all that was written behind it."""
        self._file.flush()
        return self._file.fileno()

    def flush(self) -> None:
        """Hand to the system what was written."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Close the file. OSError when the rest cannot be written."""
        if not self.closed:
            self._hasher.shutdown()
            try:
                self._file.close()
            finally:
                super().close()

    def record(self) -> FileRecord:
        """Give what the manifest is to say of the file, once it is closed."""
        return FileRecord(bytes=self._bytes, sha256=self._sha256.hexdigest())


@contextmanager
def hashed_file(path: Path, on_bytes: OnBytes, *, lasts: bool = False) -> Iterator[HashedFile]:
    """Open a new file, and have it on the disk when the block ends without an error."""
    with HashedFile(path, on_bytes, lasts=lasts) as file:
        yield file
        os.fsync(file.fileno())


def problems(
    directory: Path, manifest: Manifest, names: Iterable[str], *, verify: Verify, on_bytes: OnBytes
) -> list[str]:
    """Say what is wrong with these files of a checkpoint; nothing: they are as they were written."""
    return [
        f"{name}: {problem}"
        for name in names
        if (problem := _problem(directory / name, manifest.files[name], verify, on_bytes))
    ]


def _problem(path: Path, record: FileRecord, verify: Verify, on_bytes: OnBytes) -> str:
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"it has {size} bytes, not {record.bytes}"
        if verify == "size":
            return ""
        digest = _sha256(path, size, on_bytes)
    except OSError as error:
        return error.strerror or str(error)
    return "" if digest == record.sha256 else "its bytes have changed since it was written"


def _sha256(path: Path, size_bytes: int, on_bytes: OnBytes) -> str:
    sha256 = hashlib.sha256()
    # Most files are small, and to clear buffers takes longer than to hash those.
    buffers = [bytearray(min(max(size_bytes, 1), _READ_BYTES)) for _ in range(2)]
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as hasher:
        hashing = None
        # One piece is read while the one before is hashed.
        while size := file.readinto(buffers[0]):
            if hashing is not None:
                hashing.result()
            hashing = hasher.submit(sha256.update, memoryview(buffers[0])[:size])
            buffers.reverse()
            on_bytes(size)
        if hashing is not None:
            hashing.result()
    return sha256.hexdigest()
