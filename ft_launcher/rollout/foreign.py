"""Dumps of slime and vime: one torch.save of {"rollout_id": …, "samples": […]}, which is a pickle."""

import pickle
import warnings
from pathlib import Path
from typing import Any

from ft_launcher.rollout.errors import DumpError

__all__ = ["is_foreign", "read_foreign"]

_BEGINNINGS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip file; a bare pickle


def is_foreign(path: Path) -> bool:
    """Say whether torch.save, or pickle, wrote it. OSError where it cannot be read."""
    with path.open("rb") as file:
        return file.read(4).startswith(_BEGINNINGS)


def read_foreign(path: Path, *, trust: bool) -> tuple[int, list[Any]]:
    """Give the number of the round, and its samples. Raises DumpError, and ValueError for a damaged file."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the protocol of a pickle that it then refuses
            content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust:
            raise ValueError(f"it cannot be read: {_first_line(error)}") from None
        raise DumpError(
            f"{path}: it was written by torch.save, and more than tensors and plain values is in it: to load it runs "
            "code of whoever wrote it; say that you trust it (trust=True, --load-debug-rollout-data-trust)"
        ) from None
    except (RuntimeError, EOFError, KeyError, ImportError, AttributeError) as error:
        raise ValueError(f"it cannot be read: {_first_line(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("samples"), list):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not a call
            "it is no dump of slime's or vime's: those hold rollout_id and a list of samples"
        )
    found = content.get("rollout_id")
    # An evaluation is "eval_7" there.
    number = str(found).removeprefix("eval_")
    if not number.isdecimal():
        raise ValueError(f"its rollout_id is {found!r}; it must be a number")
    return int(number), content["samples"]


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
