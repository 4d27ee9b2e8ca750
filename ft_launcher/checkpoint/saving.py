"""One save: what is taken from the training, and how it becomes a checkpoint that counts."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.optim import Optimizer

from ft_launcher.checkpoint.directory import Directory
from ft_launcher.checkpoint.errors import CheckpointError
from ft_launcher.checkpoint.files import OnBytes, hashed_file
from ft_launcher.checkpoint.group import Ranks
from ft_launcher.checkpoint.manifest import (
    BestMode,
    FileRecord,
    Manifest,
    best,
    expendable,
    metrics_to_write,
)
from ft_launcher.checkpoint.staging import Staging
from ft_launcher.checkpoint.state import Stateful, check_loadable, is_sharded, random_state

__all__ = ["STATE_FILE", "Backend", "Capture", "Retention", "Saver", "capture", "rank_file"]

logger = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "dcp"]

STATE_FILE = "state.pt"
"""What there is once for all ranks; rank 0 writes it."""


def rank_file(rank: int) -> str:
    """Name the file with what `rank` alone has: its random numbers, and where it is in the data."""
    return f"rank_{rank:05d}.pt"


@dataclass(frozen=True)
class Capture:
    """What is to be saved: by rank 0 for all, by all in pieces (None: the model is in `shared`), by every rank."""

    step: int
    metrics: dict[str, Any]
    shared: dict[str, Any]
    sharded: dict[str, Any] | None
    own: dict[str, Any]

    def staged(self, staging: Staging) -> "Capture":
        """Copy it, so that training may go on."""
        of_all = staging.copy({"shared": self.shared, "own": self.own})
        sharded = None if self.sharded is None else staging.copy_sharded(self.sharded)
        return replace(self, shared=of_all["shared"], sharded=sharded, own=of_all["own"])

    def total_bytes(self) -> int:
        """Give what this rank will write, roughly."""
        return _tensor_bytes([self.shared, self.sharded])


def capture(
    model: nn.Module,
    optimizer: Optimizer | None,
    step: int,
    metrics: Mapping[str, Any] | None,
    scheduler: Stateful | None,
    extra: Any,
    sampler: Stateful | None,
    *,
    backend: Backend,
    is_first: bool,
) -> Capture:
    """Take what is to be saved from its objects; tensors are theirs still. CheckpointError for what cannot be saved."""
    if type(step) is not int or step < 0:
        raise CheckpointError(f"step is {step!r}; it must be a whole number of steps, 0 or more")
    if not isinstance(metrics, Mapping | None):
        raise CheckpointError(f"metrics is {metrics!r}; it must be a dict of numbers by name")
    try:
        written = metrics_to_write(metrics or {})
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    shared: dict[str, Any] = {"extra": extra, "scheduler": None if scheduler is None else scheduler.state_dict()}
    own = {"random": random_state(), "sampler": None if sampler is None else sampler.state_dict()}
    for name, value in {**shared, "sampler": own["sampler"]}.items():
        check_loadable(value, name)
    model_state = get_model_state_dict(model)
    check_loadable(model_state, "model")
    sharded = None
    if backend == "torch" and is_sharded(model_state):
        raise CheckpointError("backend='torch' cannot save a sharded model, whose pieces lie on all ranks; give 'dcp'")
    if backend == "dcp" or (backend == "auto" and is_sharded(model_state)):
        from ft_launcher.checkpoint.sharded import sharded_state

        sharded = sharded_state(model, optimizer)
    elif is_first:
        shared["model"] = model_state
        if optimizer is not None:
            shared["optimizer"] = optimizer.state_dict()
            check_loadable(shared["optimizer"], "optimizer")
    return Capture(step, written, shared if is_first else {}, sharded, own)


class Retention(msgspec.Struct, frozen=True):
    """How many of the newest to keep (None: all), and by which metric the best is kept besides (None: it is not)."""

    keep_last_n: int | None
    metric: str | None
    mode: BestMode


class _Written(msgspec.Struct):
    """What a rank says of its part."""

    files: dict[str, FileRecord]
    problem: str = ""


class _Outcome(msgspec.Struct):
    """What rank 0 says of the whole: where it is, or why it is not."""

    path: str = ""
    problem: str = ""


class Saver:
    """Writes captures into a directory. All ranks call `save`."""

    def __init__(self, directory: Directory, ranks: Ranks, retention: Retention) -> None:
        self._directory = directory
        self._ranks = ranks
        self._retention = retention

    def save(self, what: Capture, on_bytes: OnBytes) -> tuple[Path, list[Path]]:
        """Write, commit, and delete what retention does not keep; where it is, and (on rank 0) what was deleted.

        Raises CheckpointError on all ranks when it could not be saved; nothing of it is left then.
        """
        attempt = self._begin(what.step)
        try:
            said = _Written(self._write(attempt, what, on_bytes))
        # Whatever it is, the other ranks wait for this one's word.
        except Exception as error:  # noqa: BLE001
            said = _Written({}, _text(error))
        except BaseException:  # a signal's, say: this process ends
            if self._ranks.size == 1:
                self._directory.abandon(attempt)
            raise
        all_said = [msgspec.json.decode(each, type=_Written) for each in self._ranks.gather(msgspec.json.encode(said))]
        outcome = _Outcome()
        if self._ranks.is_first:
            outcome = self._commit(attempt, what, all_said)
        outcome = self._hear(outcome)
        if outcome.problem:
            raise _not_saved(what.step, outcome.problem)
        if self._ranks.is_first:
            self._directory.verified = Path(outcome.path)
            self._directory.broken.discard(Path(outcome.path))
            return Path(outcome.path), self._retain()
        return Path(outcome.path), []

    def _begin(self, step: int) -> Path:
        outcome = _Outcome()
        if self._ranks.is_first:
            try:
                self._directory.claim()
                outcome = _Outcome(path=str(self._directory.begin(step)))
            except (OSError, CheckpointError) as error:
                outcome = _Outcome(problem=_text(error))
        outcome = self._hear(outcome)
        if outcome.problem:
            raise _not_saved(step, outcome.problem)
        return Path(outcome.path)

    def _write(self, attempt: Path, what: Capture, on_bytes: OnBytes) -> dict[str, FileRecord]:
        files: dict[str, FileRecord] = {}
        # First what all ranks write together: a rank that failed before would let the others wait.
        if what.sharded is not None:
            from ft_launcher.checkpoint.sharded import write_sharded

            files |= write_sharded(attempt, what.sharded, self._ranks.group, on_bytes)
        parts = {rank_file(self._ranks.rank): what.own}
        if self._ranks.is_first:
            parts[STATE_FILE] = what.shared
        for name, part in parts.items():
            # From another device torch brings a tensor at a time, into memory that it gives back at once.
            with hashed_file(attempt / name, on_bytes, lasts=_is_on_host(part)) as file:
                torch.save(part, file)  # type: ignore[arg-type]  # IO[bytes] is not what it needs of it
            files[name] = file.record()
        return files

    def _commit(self, attempt: Path, what: Capture, all_said: list[_Written]) -> _Outcome:
        problem = "; ".join(f"rank {rank}: {each.problem}" for rank, each in enumerate(all_said) if each.problem)
        if not problem:
            sequence = max((each.sequence for each in self._directory.entries()), default=0) + 1
            manifest = Manifest(
                step=what.step,
                sequence=sequence,
                world_size=self._ranks.size,
                sharded=what.sharded is not None,
                metrics=what.metrics,
                files={name: record for each in all_said for name, record in each.files.items()},
                torch=str(torch.__version__),
                saved_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            try:
                return _Outcome(path=str(self._directory.commit(attempt, manifest)))
            except Exception as error:  # noqa: BLE001 - as above
                problem = _text(error)
        self._directory.abandon(attempt)
        return _Outcome(problem=problem)

    def _retain(self) -> list[Path]:
        keep = self._retention
        deleted = []
        try:
            entries = self._directory.entries()
            whole = [each for each in entries if each.path not in self._directory.broken]
            champion = None if keep.metric is None else best(whole, keep.metric, keep.mode)
            protected = {self._directory.verified, None if champion is None else champion.path} - {None}
            for entry in expendable(
                entries,
                keep_last_n=keep.keep_last_n,
                protected=(each for each in protected if each is not None),
                broken=self._directory.broken,
            ):
                if self._directory.delete(entry):
                    deleted.append(entry.path)  # noqa: PERF401 - those before an error count
        except OSError as error:
            # The checkpoint counts; the next save tries again.
            logger.warning("old checkpoints could not be deleted: %s", error)
        return deleted

    def _hear(self, outcome: _Outcome) -> _Outcome:
        return msgspec.json.decode(self._ranks.hear(msgspec.json.encode(outcome)), type=_Outcome)


def _not_saved(step: int, problem: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint of step {step} was not saved: {problem}")


def _text(error: BaseException) -> str:
    # torch hides the system's error behind its own where a write failed.
    while isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__
    return str(error) or type(error).__name__


def _is_on_host(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.device.type == "cpu"
    if isinstance(value, Mapping):
        return all(map(_is_on_host, value.values()))
    return not isinstance(value, list | tuple | set) or all(map(_is_on_host, value))


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_tensor_bytes, value))
    return 0
