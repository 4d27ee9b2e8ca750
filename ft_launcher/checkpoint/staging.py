"""Copies on the host of what is to be saved, so that training goes on while they are written."""

import copy
from collections import Counter, OrderedDict
from typing import Any

import torch

__all__ = ["Staging"]


class Staging:
    """Copies trainings, one after the other, into the same memory: fresh memory costs more than to fill it.

    A copy is good until the next one is made. From an accelerator, which writes to it by itself, memory is pinned.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], torch.Tensor] = {}
        self._sharded: Any = None

    def copy(self, value: Any) -> Any:
        """Copy dicts, lists, tuples and sets, and the tensors in them."""
        copied = self._copy(value, ())
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copied

    def copy_sharded(self, state: dict[str, Any]) -> dict[str, Any]:
        """Copy what `sharded_state` gave."""
        # Only here, as to import it costs seconds.
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        # It keeps no memory but pinned memory.
        self._sharded = self._sharded or BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())
        copied: dict[str, Any] = self._sharded.stage(state)
        return copied

    def _copy(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value.detach(), place)
        if type(value) is Counter:
            return Counter(value)
        if isinstance(value, dict):
            copied = {key: self._copy(each, (*place, key)) for key, each in value.items()}
            return OrderedDict(copied) if type(value) is OrderedDict else copied
        if type(value) in (list, tuple):
            return type(value)(self._copy(each, (*place, index)) for index, each in enumerate(value))
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: torch.Tensor, place: tuple[Any, ...]) -> torch.Tensor:
        kept = self._tensors.get(place)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._tensors[place] = kept
        return kept.copy_(tensor, non_blocking=True)
