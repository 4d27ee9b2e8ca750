"""A sampler that knows where all ranks are together, so that any number of ranks can go on from there."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

__all__ = ["ResumableSampler"]


class ResumableSampler(Sampler[int]):
    """Gives this rank's share of the indices 0 to `size` - 1, epoch by epoch, from any position on.

    Every epoch has an order of its own, which depends on `seed` and the number of the epoch alone. The ranks take
    turns in it: of the samples that stand next, rank 0 has the first, rank 1 the second. `advance` says how many all
    ranks together have trained on; only they count, not what a data loader has read ahead. After a change of the
    number of ranks, those that go on start where the others have stopped.

    An epoch's last `size` modulo (ranks times batch) samples are given too, so batches may be short at its end; ranks
    need the same number of batches, so `drop_last` leaves out the last less than `world_size` samples.
    """

    def __init__(
        self, size: int, *, rank: int, world_size: int, seed: int = 0, shuffle: bool = True, drop_last: bool = True
    ) -> None:
        """Begin with epoch 0. ValueError where the numbers cannot be meant."""
        if size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"size {size}, rank {rank} and world_size {world_size} do not fit")
        self._size, self._rank, self._world_size = size, rank, world_size
        self._seed, self._shuffle, self._drop_last = seed, shuffle, drop_last
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        """Give how many indices this rank has left in the epoch."""
        return len(range(self.position + self._rank, self._end, self._world_size))

    def __iter__(self) -> Iterator[int]:
        """Give this rank's indices for the rest of the epoch, as it stands now."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        order = torch.randperm(self._size, generator=generator) if self._shuffle else torch.arange(self._size)
        yield from order[self.position : self._end][self._rank :: self._world_size].tolist()

    @property
    def _end(self) -> int:
        left = self._size - self.position
        return self._size - left % self._world_size if self._drop_last else self._size

    def advance(self, samples: int) -> None:
        """Count `samples`, over all ranks, as trained on."""
        self.position = min(self.position + samples, self._size)

    def next_epoch(self) -> None:
        """Go to the begin of the next epoch."""
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Give where all ranks are; the same on all."""
        return {"epoch": self.epoch, "position": self.position, "size": self._size, "seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go there. ValueError for the state of other data or another order."""
        mine = {"size": self._size, "seed": self._seed}
        if differing := [name for name in mine if state_dict[name] != mine[name]]:
            raise ValueError(f"the sampler has {mine}, and the state was saved with another {' and '.join(differing)}")
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]
