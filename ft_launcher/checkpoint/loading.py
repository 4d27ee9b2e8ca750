"""One load: which checkpoint all ranks take, and how its contents come back."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import nn
from torch.optim import Optimizer

from ft_launcher.checkpoint.bar import progress
from ft_launcher.checkpoint.directory import Directory, Lease
from ft_launcher.checkpoint.errors import CheckpointError
from ft_launcher.checkpoint.files import Verify, problems
from ft_launcher.checkpoint.group import Ranks
from ft_launcher.checkpoint.manifest import Entry, Manifest, metrics_of
from ft_launcher.checkpoint.saving import STATE_FILE, rank_file
from ft_launcher.checkpoint.state import Stateful, read, restore_random, restore_whole, sampler_state

__all__ = ["Loader", "Restored", "Target"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """What was saved besides what was restored in place. `restored["step"]` is `restored.step`, and so on."""

    step: int
    metrics: dict[str, float]
    extra: Any
    path: Path

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)


@dataclass(frozen=True)
class Target:
    """What is to be restored in place; None: it stays as it is."""

    model: nn.Module
    optimizer: Optimizer | None
    scheduler: Stateful | None
    sampler: Stateful | None
    random: bool


@contextmanager
def _undone_on_error(target: Stateful | None) -> Iterator[None]:
    before = None if target is None else copy.deepcopy(target.state_dict())
    try:
        yield
    except BaseException:
        if target is not None:
            target.load_state_dict(before)
        raise


class _Offer(msgspec.Struct, tag="offer"):
    """Rank 0: try this one."""

    path: str
    manifest: Manifest


class _Nothing(msgspec.Struct, tag="nothing"):
    """Rank 0: there is none (left)."""


class _Refusal(msgspec.Struct, tag="refusal"):
    """Rank 0: nothing is to be loaded, and why."""

    sentence: str


_decode = msgspec.json.Decoder(_Offer | _Nothing | _Refusal).decode


class Loader:
    """Restores trainings from a directory. All ranks call `load`."""

    def __init__(self, directory: Directory, ranks: Ranks, verify: Verify, *, shows: bool) -> None:
        self._directory = directory
        self._ranks = ranks
        self._verify = verify
        self._shows = shows

    def load(
        self,
        candidates: Callable[[], Sequence[Entry]],
        target: Target,
        chosen: Callable[[Path, int], None] = lambda _path, _step: None,
    ) -> Restored | None:
        """Restore the first of the `candidates` (rank 0's) that every rank finds whole; None when none is.

        `chosen` is told before the training is touched. Raises what `candidates` raises, on all ranks, and
        CheckpointError when the checkpoint cannot be put into this training.
        """
        queue: list[Entry] | None = None
        while True:
            lease: Lease | None = None
            offer: _Offer | _Nothing | _Refusal = _Nothing()
            if self._ranks.is_first:
                try:
                    queue = list(candidates()) if queue is None else queue
                    offer, lease = self._next(queue, candidates)
                except (CheckpointError, OSError) as error:
                    offer = _Refusal(str(error))
            try:
                offer = _decode(self._ranks.hear(msgspec.json.encode(offer)))
                if isinstance(offer, _Refusal):
                    raise CheckpointError(offer.sentence)
                if isinstance(offer, _Nothing):
                    return None
                restored = self._restored(offer, target, chosen)
                if restored is None:
                    if lease is not None and not lease.holds():
                        queue = None  # it was saved anew while it was read
                    continue
                # Where a file system has no locks, it may have been deleted or replaced while it was read.
                if self._ranks.hear(b"" if lease is None or lease.holds() else b"gone"):
                    queue = None
                    continue
                return restored
            finally:
                if lease is not None:
                    lease.close()

    def _next(
        self, queue: list[Entry], candidates: Callable[[], Sequence[Entry]]
    ) -> tuple[_Offer | _Nothing, Lease | None]:
        while queue:
            entry = queue.pop(0)
            if entry.manifest is None:
                logger.warning("passing over %s: %s", entry.path, entry.problem)
                continue
            try:
                return _Offer(str(entry.path), entry.manifest), Lease(entry)
            except FileNotFoundError:
                # A writer beside us: it has committed another one, which this list may not have.
                queue[:] = candidates()
        return _Nothing(), None

    def _restored(self, offer: _Offer, target: Target, chosen: Callable[[Path, int], None]) -> Restored | None:
        path, manifest = Path(offer.path), offer.manifest
        if found := self._problems(path, manifest):
            if self._ranks.is_first:
                logger.warning("passing over %s: %s", path, "; ".join(found))
                self._directory.broken.add(path)
            return None
        chosen(path, manifest.step)
        contents = self._agreed(path, lambda: self._read(path, manifest, target))
        shared, own_random, sampler = contents

        def put_back() -> None:
            # First what may refuse without having been asked, and can be undone.
            with _undone_on_error(target.scheduler), _undone_on_error(target.sampler):
                if target.scheduler is not None:
                    target.scheduler.load_state_dict(shared["scheduler"])
                if target.sampler is not None:
                    target.sampler.load_state_dict(sampler)
                if manifest.sharded:
                    from ft_launcher.checkpoint.sharded import read_sharded

                    read_sharded(path, target.model, target.optimizer, self._ranks.group)
                else:
                    restore_whole(target.model, target.optimizer, shared)
            if target.random and own_random is not None:
                restore_random(own_random)

        self._agreed(path, put_back)
        if self._ranks.is_first:
            self._directory.verified = path
        return Restored(manifest.step, metrics_of(manifest), shared["extra"], path)

    def _problems(self, path: Path, manifest: Manifest) -> list[str]:
        """Say what any rank finds wrong. Each verifies a share of the files: together they read every byte once."""
        share = sorted(manifest.files)[self._ranks.rank :: self._ranks.size]
        total = sum(manifest.files[name].bytes for name in share)
        with progress(f"verifying step {manifest.step}", total, shown=self._shows and self._ranks.is_first) as on_bytes:
            mine = problems(path, manifest, share, verify=self._verify, on_bytes=on_bytes)
        said = self._ranks.gather(msgspec.json.encode(mine))
        return [each for of_rank in said for each in msgspec.json.decode(of_rank, type=list[str])]

    def _read(self, path: Path, manifest: Manifest, target: Target) -> tuple[dict[str, Any], Any, Any]:
        """Give what is once for all ranks, this rank's random numbers (None: there was no such rank), its sampler."""
        shared = read(path / STATE_FILE)
        if target.scheduler is not None and shared["scheduler"] is None:
            raise CheckpointError("the checkpoint holds no scheduler")
        rank, size = self._ranks.rank, self._ranks.size
        own_random = None
        if target.random and rank < manifest.world_size:
            own_random = read(path / rank_file(rank))["random"]
        elif target.random:
            logger.warning("rank %d draws its own random numbers: %d ranks saved theirs", rank, manifest.world_size)
        if target.sampler is None:
            return shared, own_random, None
        of_ranks = [read(path / rank_file(each))["sampler"] for each in range(manifest.world_size)]
        if any(each is None for each in of_ranks):
            raise CheckpointError("the checkpoint holds no sampler")
        return shared, own_random, sampler_state(of_ranks, rank, size)

    def _agreed(self, path: Path, work: Callable[[], Any]) -> Any:
        """Do it, and raise CheckpointError on all ranks when it failed on one."""
        result, problem, cause = None, "", None
        try:
            result = work()
        # Whatever it is, the other ranks wait for this one's word.
        except Exception as error:  # noqa: BLE001
            problem, cause = str(error) or type(error).__name__, error
        said = [each.decode() for each in self._ranks.gather(problem.encode())]
        if any(said):
            rank = next(rank for rank, each in enumerate(said) if each)
            where = f"rank {rank}: " if self._ranks.size > 1 else ""
            raise CheckpointError(f"{path} cannot be loaded: {where}{said[rank]}") from cause
        return result
