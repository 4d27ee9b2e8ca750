"""What the ranks tell each other about a checkpoint, over a gloo group of its own.

A group of its own, as the model's collectives run while a checkpoint is saved in the background; on one group they
would meet. Bytes only: no pickle.
"""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ft_launcher.checkpoint.errors import CheckpointError

__all__ = ["Ranks"]

LIMIT = timedelta(hours=2)
"""How long ranks wait for one that still writes or verifies. The rank monitor's timeouts are what ends a hang."""


class Ranks:
    """The ranks of the default process group; a process without one is alone."""

    def __init__(self) -> None:
        """Make the group. A collective: all ranks must call it in the same order.

        Raises CheckpointError where the launcher has started other ranks, but they have no process group yet: each
        would take itself for the only one.
        """
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            if self.size > 1:
                self.group = dist.new_group(backend="gloo", timeout=LIMIT)
                # A rank that closes it at once would cut off those that are still connecting.
                dist.barrier(group=self.group)
        elif (started := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise CheckpointError(
                f"WORLD_SIZE is {started}, but there is no process group; make the manager after init_process_group()"
            )

    @property
    def is_first(self) -> bool:
        """This is rank 0, which decides and commits."""
        return self.rank == 0

    def hear(self, said: bytes) -> bytes:
        """Give what rank 0 said. A collective."""
        if self.group is None:
            return said
        size = torch.tensor([len(said)])
        dist.broadcast(size, src=0, group=self.group)
        data = _tensor(said) if self.is_first else torch.empty(int(size), dtype=torch.uint8)
        if len(data):
            dist.broadcast(data, src=0, group=self.group)
        return _bytes(data)

    def gather(self, said: bytes) -> Sequence[bytes]:
        """Give what every rank said, by rank. A collective."""
        if self.group is None:
            return [said]
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(said)]), group=self.group)
        longest = max(int(size) for size in sizes)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(said)] = _tensor(said)
        all_of_them = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        if longest:
            dist.all_gather(all_of_them, mine, group=self.group)
        return [_bytes(each[: int(size)]) for each, size in zip(all_of_them, sizes, strict=True)]

    def close(self) -> None:
        """Leave the group. All ranks must call it."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _bytes(data: torch.Tensor) -> bytes:
    return bytes(data.numpy().tobytes())
