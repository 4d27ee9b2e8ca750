"""Checkpoints that cannot be lost: written whole or not at all, verified before they are used.

Only what is used is loaded: the command `ft_checkpoint` reads directories without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_launcher.checkpoint.errors import CheckpointError
    from ft_launcher.checkpoint.manager import CheckpointManager, Restored
    from ft_launcher.checkpoint.sampler import ResumableSampler

__all__ = ["CheckpointError", "CheckpointManager", "Restored", "ResumableSampler"]

_WHERE = {
    "CheckpointError": "errors",
    "CheckpointManager": "manager",
    "ResumableSampler": "sampler",
    "Restored": "manager",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ft_launcher.checkpoint.{_WHERE[name]}"), name)
