"""What all ranks must know of each other to calculate the same timeouts: maxima over the default process group."""

import zlib
from collections.abc import Sequence

from ft_launcher.errors import RankMonitorClientError

__all__ = ["all_ready", "largest_over_ranks"]


def all_ready(*, ready: bool, names: Sequence[str]) -> bool:
    """Say whether every rank is ready. A collective: all ranks must call it.

    Raises RankMonitorClientError on every rank when they do not bring the same `names`.
    """
    digest = float(zlib.crc32("\0".join(names).encode()))
    not_ready, highest, lowest = _reduce_max([0.0 if ready else 1.0, digest, -digest])
    if highest != -lowest:
        raise RankMonitorClientError(f"the ranks have different sections; this one has {', '.join(names) or 'none'}")
    return not_ready == 0.0


def largest_over_ranks(seconds: Sequence[float]) -> list[float]:
    """Give for each place the largest value that any rank has there. A collective: all ranks must call it."""
    return _reduce_max(seconds)


def _reduce_max(values: Sequence[float]) -> list[float]:
    # Only here does a rank's client need torch.
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RankMonitorClientError("timeouts are calculated over all ranks: call init_process_group() first")
    tensor = torch.tensor(values, dtype=torch.float64, device=_device(dist.get_backend()))
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    result: list[float] = tensor.cpu().tolist()
    return result


def _device(backend: str) -> str:
    # "cpu:gloo,cuda:nccl" and the like reduce tensors of the host as well.
    return "cuda" if "nccl" in backend and "gloo" not in backend else "cpu"
