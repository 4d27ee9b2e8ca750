"""Dumps of rollout rounds: written while the samples come, whole under their final name or not there at all.

    rollout_7.pt               round 7, for the template rollout_{rollout_id}.pt
    rollout_eval_7.pt          an evaluation
    rollout_failed_7.pt        a round that raised, or whose process died and that was begun again
    rollout_7.pt.partial       being written, or left by a process that died: readable up to its last sample

A file is a header, a frame for each sample, and a trailer with a digest over all of it.
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import msgspec

from ft_launcher.checkpoint.directory import sync_directory
from ft_launcher.rollout import values
from ft_launcher.rollout.errors import DumpError
from ft_launcher.rollout.foreign import is_foreign, read_foreign
from ft_launcher.rollout.frames import FrameFile
from ft_launcher.rollout.round_file import (
    FORMAT,
    HEADER,
    SAMPLE,
    TRAILER,
    EngineRecord,
    Header,
    LoadedRound,
    Trailer,
    read_round,
)

__all__ = ["PLACEHOLDER", "RolloutDump", "RoundWriter"]

logger = logging.getLogger(__name__)

PLACEHOLDER = "{rollout_id}"
_writing: set[Path] = set()  # by this process: its own locks do not keep it out


class RoundWriter:
    """Takes the samples of one round. May be called from several threads."""

    def __init__(self, file: FrameFile, engines: Mapping[str, EngineRecord]) -> None:
        self.engines = dict(engines)
        """May be changed until the round ends: what its trailer says."""
        self._file = file
        self._count = 0
        self._lock = threading.Lock()

    def append(self, sample: Any) -> None:
        """Write a sample as it is now; it outlives the process when this returns.

        Raises DumpError for what a dump does not hold, and OSError (a full disk); the samples before stay readable.
        """
        payload = values.encode(sample, f"samples[{self._count}]")
        with self._lock:
            self._file.write(SAMPLE, payload)
            self._count += 1

    def extend(self, samples: Iterable[Any]) -> None:
        """Append each."""
        for sample in samples:
            self.append(sample)

    def _end(self, status: Literal["complete", "failed"], error: str) -> None:
        with self._lock:
            trailer = Trailer(
                status=status,
                error=error,
                samples=self._count,
                engines=self.engines,
                ended_utc=_now_utc(),
                sha256=self._file.sha256,
            )
            self._file.write(TRAILER, msgspec.msgpack.encode(trailer))
            self._file.sync()


class RolloutDump:
    """The dumps of one job, at the paths that `template` gives when a round's number stands for {rollout_id}."""

    def __init__(self, template: str, *, allow_overwrite: bool = False) -> None:
        """allow_overwrite: the template needs no {rollout_id}; then each round takes the place of the one before.

        Reading needs it as well for such a template. Raises DumpError.
        """
        if PLACEHOLDER not in template and not allow_overwrite:
            raise DumpError(
                f"{template!r} has no {PLACEHOLDER}: each round would replace the one before; "
                "put it into the path, or allow that"
            )
        self.template = template

    def path(self, rollout_id: int, *, evaluation: bool = False, failed: bool = False) -> Path:
        """Give where this round is, or will be."""
        prefix = ("failed_" if failed else "") + ("eval_" if evaluation else "")
        if PLACEHOLDER in self.template:
            return Path(self.template.replace(PLACEHOLDER, f"{prefix}{rollout_id}"))
        path = Path(self.template)
        return path.with_name(prefix + path.name)

    @contextmanager
    def round(
        self,
        rollout_id: int,
        *,
        evaluation: bool = False,
        meta: Mapping[str, Any] | None = None,
        version: str | None = None,
        engines: Mapping[str, EngineRecord] | None = None,
    ) -> Iterator[RoundWriter]:
        """Write a round; it gets its final name when the block ends, and is kept as failed when the block raises.

        meta: plain values, to know the run by. version, engines: what serves. Raises DumpError and OSError.
        """
        final = self.path(rollout_id, evaluation=evaluation)
        failed = self.path(rollout_id, evaluation=evaluation, failed=True)
        header = Header(
            format_version=FORMAT,
            rollout_id=rollout_id,
            evaluation=evaluation,
            version=version,
            engines=dict(engines or {}),
            meta=dict(meta or {}),
            begun_utc=_now_utc(),
        )
        beginning = _encoded(header)
        with _claimed(_partial(final), failed) as file:
            file.write(HEADER, beginning)
            writer = RoundWriter(file, header.engines)
            try:
                yield writer
            except BaseException as error:
                _keep(writer, file.path, failed, error)
                raise
            writer._end("complete", "")  # noqa: SLF001 - of this module
            _rename(file.path, final)

    def load(
        self,
        rollout_id: int,
        *,
        evaluation: bool = False,
        failed: bool = False,
        partial: bool = False,
        trust: bool = False,
    ) -> LoadedRound:
        """Read a round and verify every byte of it.

        failed: the one that raised. partial: also what a dead process has left of it, up to its last whole sample.
        trust: a file of slime's or vime's (torch.save) may run code of whoever wrote it; without, it is read only where
        it needs none. Raises DumpError.
        """
        path = self.path(rollout_id, evaluation=evaluation, failed=failed)
        if partial and not path.exists() and _partial(path).exists():
            path = _partial(path)
        try:
            if is_foreign(path):
                found, samples = read_foreign(path, trust=trust)
                loaded = LoadedRound(path=path, rollout_id=found, samples=samples, status="foreign")
            else:
                loaded = read_round(path, partial=partial)
        except FileNotFoundError:
            hint = f"; {_partial(path)} is what a dead process has left of it" if _partial(path).exists() else ""
            raise DumpError(f"{path}: there is no such dump{hint}") from None
        except (OSError, ValueError) as error:
            what = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            raise DumpError(f"{path}: {what}") from None
        if PLACEHOLDER in self.template and loaded.rollout_id != rollout_id:
            raise DumpError(f"{path}: it is of round {loaded.rollout_id}, not {rollout_id}")
        return loaded


def _now_utc() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


# -- writing ----------------------------------------------------------------------------------------------------------


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


@contextmanager
def _claimed(partial: Path, failed: Path) -> Iterator[FrameFile]:
    place = partial.absolute()
    if place in _writing:
        raise DumpError(f"{partial} is being written by this process: a round is under way twice")
    for each in reversed([each for each in partial.parents if not each.exists()]):
        each.mkdir(exist_ok=True)
        sync_directory(each.parent)
    _writing.add(place)
    try:
        file = FrameFile(partial, failed)
        try:
            yield file
        finally:
            file.close()
    finally:
        _writing.discard(place)


def _encoded(header: Header) -> bytes:
    values.encode(header.meta, "meta")
    try:
        return msgspec.msgpack.encode(header)
    except TypeError:
        raise DumpError("meta holds a tensor or an array; it may hold plain values only") from None


def _rename(partial: Path, path: Path) -> None:
    partial.rename(path)
    sync_directory(path.parent)


def _keep(writer: RoundWriter, partial: Path, failed: Path, error: BaseException) -> None:
    """Keep a round that raised; what fails in that does not hide why the round did."""
    try:
        writer._end("failed", f"{type(error).__name__}: {error}")  # noqa: SLF001 - of this module
        _rename(partial, failed)
        logger.warning("the samples of the round that failed are in %s", failed)
    except (OSError, ValueError) as second:
        logger.warning("the samples of the round that failed are in %s, as far as they came: %s", partial, second)
