"""What a checkpoint holds of a training, taken from its objects and put back into them.

Nothing here touches a file but `read` and `written`, and nothing of the training is changed before everything that is
to be put back has been compared with what is there.
"""

import random
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim import Optimizer

from ft_launcher.checkpoint.errors import CheckpointError

__all__ = [
    "Stateful",
    "check_loadable",
    "is_sharded",
    "random_state",
    "read",
    "restore_random",
    "restore_whole",
    "sampler_state",
]


class Stateful(Protocol):
    """A scheduler, a sampler, a data loader: whatever gives its state and takes it back."""

    def state_dict(self) -> Any:
        """Give the state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take it back."""


# -- what may be saved ----------------------------------------------------------------------------------------------

_PLAIN = (str, bytes, bytearray, int, float, complex, type(None), torch.Tensor, torch.Size, torch.dtype, torch.device)


def check_loadable(value: object, name: str) -> None:
    """Raise CheckpointError for what torch.load(weights_only=True) would refuse, at the save and not at the resume."""
    # By exact type: numpy's float64 is a float, but is written as numpy's.
    if type(value) in _PLAIN or type(value) is bool or isinstance(value, torch.Tensor):
        return
    if type(value) in (dict, OrderedDict, Counter):
        for key, each in value.items():  # type: ignore[attr-defined]
            check_loadable(key, f"a key of {name}")
            check_loadable(each, f"{name}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, each in enumerate(value):  # type: ignore[arg-type]
            check_loadable(each, f"{name}[{index}]")
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(
            f"{name} is a {kind}, which cannot be loaded safely; save numbers, text, tensors, and dicts, lists, tuples "
            "and sets of them"
        )


def is_sharded(state: Mapping[str, Any]) -> bool:
    """Say whether a model's state lies in pieces on the ranks, as FSDP's does."""
    # By name: to import them costs seconds, and who has such a tensor has imported them.
    return any(type(value).__name__ in ("DTensor", "ShardedTensor") for value in state.values())


# -- random numbers and data ----------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """Give the state of Python's, numpy's and torch's generators (the current accelerator's too)."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = legacy
    state = {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (str(kind), torch.tensor(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def sampler_state(of_ranks: Sequence[Any], rank: int, world_size: int) -> Any:
    """Give the sampler's state for `rank` out of what the ranks of the checkpoint saved.

    With as many ranks as then, each has its own again. With another number the state must say where all ranks are
    together, as ResumableSampler's does, and so be the same on all; else CheckpointError.
    """
    if len(of_ranks) == world_size:
        return of_ranks[rank]
    if any(not _same(each, of_ranks[0]) for each in of_ranks):
        raise CheckpointError(
            f"the sampler's state was saved by {len(of_ranks)} ranks, each with its own, and {world_size} ranks cannot "
            "share it; use a sampler whose state is the same on all ranks, as ft_launcher.checkpoint.ResumableSampler"
        )
    return of_ranks[0]


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


# -- a whole model --------------------------------------------------------------------------------------------------


def read(path: Path) -> Any:
    """Load a file without running code that stands in it. What it raises depends on the damage."""
    with torch.serialization.safe_globals([Counter]):
        return torch.load(path, map_location="cpu", weights_only=True)


def restore_whole(model: nn.Module, optimizer: Optimizer | None, saved: Mapping[str, Any]) -> None:
    """Put a model's and an optimizer's state back. CheckpointError, with both unchanged, when they do not fit."""
    now = get_model_state_dict(model)
    if is_sharded(now):
        raise CheckpointError(
            "the checkpoint was saved by a model in one piece, and this one is sharded; save with backend='dcp' from "
            "the beginning to load either way"
        )
    if difference := _difference(now, saved["model"]):
        raise CheckpointError(f"the checkpoint is of another model: {difference}")
    if optimizer is not None:
        if "optimizer" not in saved:
            raise CheckpointError("the checkpoint holds no optimizer; give optimizer=None to load the model alone")
        try:
            optimizer.load_state_dict(saved["optimizer"])  # compares before it changes anything
        except ValueError as error:
            raise CheckpointError(f"the checkpoint is of another optimizer: {error}") from None
    set_model_state_dict(model, dict(saved["model"]))


def _difference(now: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    missing, unknown = sorted(now.keys() - saved.keys()), sorted(saved.keys() - now.keys())
    if missing:
        return f"it has no {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    if unknown:
        return f"it has {unknown[0]}" + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "") + " besides"
    for name, value in now.items():
        if isinstance(value, torch.Tensor) and value.shape != saved[name].shape:
            return f"{name} is {tuple(saved[name].shape)} there, {tuple(value.shape)} here"
    return ""
