"""The directory of checkpoints on the disk: attempts, the rename that commits one, and what may be swept away.

    step_00001000/            a committed checkpoint
    .tmp-step_00001000-…      an attempt; nobody reads it
    .replaced-step_00001000   what stood at a step that is saved anew, between two renames; counts while nothing else
                              stands at the step
    .trash-…                  being deleted
    broken-step_00001000-…    set aside, by a person
    .lock                     held by the process that writes here

A single process, that of rank 0, calls what writes.
"""

import fcntl
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec

from ft_launcher.checkpoint.errors import CheckpointError
from ft_launcher.checkpoint.manifest import MANIFEST, Entry, Manifest, ManifestError, decode, encode, step_name, step_of

__all__ = ["Directory", "Lease"]

logger = logging.getLogger(__name__)

_TEMPORARY = ".tmp-"
_REPLACED = ".replaced-"
_TRASH = ".trash-"
_ASIDE = "broken-"
_LOCK = ".lock"


class _Owner(msgspec.Struct):
    host: str
    pid: int


class Lease:
    """A reader's hold on a checkpoint: while it lasts, no retention deletes it."""

    def __init__(self, entry: Entry) -> None:
        """Take it. Raises FileNotFoundError when the checkpoint is gone or was replaced meanwhile."""
        self._path = entry.path / MANIFEST
        self._file = self._path.open("rb")
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH)
        except OSError:
            pass  # a file system without locks: the look at the end remains
        except BaseException:
            self._file.close()
            raise
        if not self.holds():
            self._file.close()
            raise FileNotFoundError(f"{entry.path} was deleted or replaced")

    def holds(self) -> bool:
        """Say whether the checkpoint still stands where it stood."""
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Give it back."""
        self._file.close()


class Directory:
    """The checkpoints below `path`, and what this process has found out about them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.verified: Path | None = None  # the last one written here, or loaded
        self.broken: set[Path] = set()
        self._remover: ThreadPoolExecutor | None = None
        self._lock: IO[str] | None = None
        self._has_swept = False

    # -- reading --------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Give all committed checkpoints, by step. An absent directory has none; OSError where it cannot be read."""
        while True:
            found = self._look()
            # What was listed and is gone was deleted by a writer that has committed another since: that was not listed.
            if all(each is not None or os.path.lexists(path) for path, each in found.items()):
                return [each for each in found.values() if each is not None]

    def _look(self) -> dict[Path, Entry | None]:
        try:
            names = {each.name for each in self.path.iterdir()}
        except FileNotFoundError:
            return {}
        found = {step: name for name in names if (step := step_of(name)) is not None}
        for name in names:
            step = step_of(name.removeprefix(_REPLACED)) if name.startswith(_REPLACED) else None
            if step is not None:
                found.setdefault(step, name)
        return {self.path / name: self._entry(step, self.path / name) for step, name in sorted(found.items())}

    def _entry(self, step: int, path: Path) -> Entry | None:
        try:
            manifest = decode((path / MANIFEST).read_bytes())
        except (OSError, ManifestError) as error:
            if not path.is_dir():
                return None  # deleted since it was listed, or no checkpoint
            what = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            return Entry(path, step, None, f"{MANIFEST}: {what}")
        if manifest.step != step:
            return Entry(path, step, None, f"{MANIFEST}: it is of step {manifest.step}")
        return Entry(path, step, manifest)

    def leftovers(self) -> list[Path]:
        """Give what dead writers have left behind, sorted by name."""
        with suppress(FileNotFoundError):
            return sorted(
                each
                for each in self.path.iterdir()
                if each.name.startswith((_TEMPORARY, _TRASH)) or self._is_superseded(each)
            )
        return []

    def _is_superseded(self, path: Path) -> bool:
        return path.name.startswith(_REPLACED) and (self.path / path.name.removeprefix(_REPLACED)).exists()

    # -- one writer -----------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Become the one that writes here, until `release`, and sweep away what dead writers have left.

        Raises CheckpointError when another process, or another manager of this one, writes here, and OSError.
        """
        if self._lock is None:
            for each in reversed([each for each in (self.path, *self.path.parents) if not each.exists()]):
                each.mkdir(exist_ok=True)
                sync_directory(each.parent)
            self._lock = self._locked()
        if not self._has_swept:
            self._has_swept = True  # unless something fails in it: then the next save tries again
            self._sweep()

    def release(self) -> None:
        """Let others write here, when all that was to be deleted is."""
        if self._remover is not None:
            self._remover.shutdown()
            self._remover = None
        if self._lock is not None:
            _claimed.discard((os.getpid(), _identity(os.fstat(self._lock.fileno()))))
            self._lock.close()
            self._lock = None

    def sweep_if_free(self) -> None:
        """Sweep, unless somebody writes here or this process may not."""
        if self._lock is not None:
            return
        with suppress(CheckpointError, OSError):
            # Without need a mere reader does not take the lock: a writer that came in that moment would be refused.
            if self.leftovers():
                self.claim()
        self.release()

    def _locked(self) -> IO[str]:
        path = self.path / _LOCK
        # The locks of the kind below do not keep two managers of one process apart, and whoever opens and closes the
        # file gives up what the process holds. A forked child (a data loader's worker that outlives its rank) does not
        # inherit them, which flock's would be; it does inherit the set.
        if path.exists() and (os.getpid(), _identity(path.stat())) in _claimed:
            raise self._is_claimed("another manager of this process")
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with file:
                file.seek(0)
                raise self._is_claimed(_owner(file.read())) from None
        except BaseException:
            file.close()
            raise
        _claimed.add((os.getpid(), _identity(os.fstat(file.fileno()))))
        # For the sentence that others read, and no more: a full disk does not keep us from the lock.
        with suppress(OSError):
            file.truncate(0)
            os.write(file.fileno(), msgspec.json.encode(_Owner(socket.gethostname(), os.getpid())))
        return file

    def _is_claimed(self, owner: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {owner} writes checkpoints here; give every job, and every manager, its own directory"
        )

    def _sweep(self) -> None:
        if self._remover is not None:
            self._remover.submit(int).result()  # what it is at is not left over
        for path in self.leftovers():
            self._remove(path)  # a save does not fail for what is in nobody's way
        for path in self.path.glob(f"{_REPLACED}*"):
            if self._is_superseded(path):
                continue
            try:
                path.rename(self.path / path.name.removeprefix(_REPLACED))
                sync_directory(self.path)
            except OSError as error:
                self._has_swept = False
                logger.warning("%s could not be given its name back: %s", path, error)

    # -- writing --------------------------------------------------------------------------------------------------

    def begin(self, step: int) -> Path:
        """Make the directory of a new attempt to save `step`. OSError where that cannot be."""
        attempt = self.path / f"{_TEMPORARY}{step_name(step)}-{secrets.token_hex(4)}"
        attempt.mkdir()
        return attempt

    def commit(self, attempt: Path, manifest: Manifest) -> Path:
        """Make the attempt the checkpoint of its step; its files must be on the disk. OSError before it counts."""
        with (attempt / MANIFEST).open("xb") as file:
            file.write(encode(manifest))
            file.flush()
            os.fsync(file.fileno())
        for folder in sorted({attempt, *((attempt / name).parent for name in manifest.files)}, reverse=True):
            sync_directory(folder)
        place = self.path / step_name(manifest.step)
        replaced = self.path / f"{_REPLACED}{place.name}"
        if place.exists():
            place.rename(replaced)
        try:
            attempt.rename(place)  # the commit
        except OSError:
            with suppress(OSError):  # there was none; or it counts where it is
                replaced.rename(place)
            raise
        sync_directory(self.path)
        if replaced.exists():
            try:
                self._delete(replaced)
            except OSError as error:
                self._has_swept = False
                logger.warning("%s could not be deleted: %s", replaced, error)
        return place

    def abandon(self, attempt: Path) -> None:
        """Take away an attempt that will not be committed."""
        shutil.rmtree(attempt, ignore_errors=True)
        self._has_swept = False  # something may be left, also of the commit: the next save sweeps

    def set_aside(self, path: Path) -> Path:
        """Give a checkpoint a name under which nobody looks for one. CheckpointError while somebody writes here."""
        self.claim()
        try:
            aside = self.path / f"{_ASIDE}{path.name.lstrip('.')}-{secrets.token_hex(4)}"
            path.rename(aside)
            sync_directory(self.path)
        finally:
            self.release()
        return aside

    def delete(self, entry: Entry) -> bool:
        """Delete a checkpoint, unless somebody reads it: at once by name, and its files soon.

        OSError where that cannot be.
        """
        with _nobody_reads(entry.path) as free:
            if free:
                self._delete(entry.path)
        return free

    def _delete(self, path: Path) -> None:
        # Its name goes first, so that a death in the middle leaves no checkpoint with files missing.
        trash = self.path / f"{_TRASH}{path.name.lstrip('.')}-{secrets.token_hex(4)}"
        path.rename(trash)
        # What it takes to delete 1 GB, 0.1 s, is no business of the one who saves.
        self._remover = self._remover or ThreadPoolExecutor(max_workers=1, thread_name_prefix="ft_remover")
        self._remover.submit(self._remove, trash)

    def _remove(self, trash: Path) -> None:
        try:
            shutil.rmtree(trash)
        except OSError as error:
            self._has_swept = False
            logger.warning("%s could not be deleted: %s", trash, error)


def sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _nobody_reads(path: Path) -> Iterator[bool]:
    try:
        file = (path / MANIFEST).open("rb")
    except FileNotFoundError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks; readers look at the end whether they read what they meant to
        yield True


_claimed: set[tuple[int, tuple[int, int]]] = set()  # who holds which lock files, of this process and its parents


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _owner(text: str) -> str:
    try:
        owner = msgspec.json.decode(text.encode(), type=_Owner)
    except ValueError:
        return "another process"
    return f"process {owner.pid} on {owner.host}"
