"""What a rank says and hears of checkpoints (ladder.py): their names as all know them, and the launcher's hint."""

import operator
import os

import msgspec

from ft_launcher.errors import RankMonitorClientError
from ft_launcher.ladder import HINT_ENV, MAX_PATH_BYTES, Checkpoint, ResumeHint

__all__ = ["checkpoint", "checkpoint_path", "given_hint"]


def checkpoint_path(path: "str | os.PathLike[str]") -> str:
    """Give the text by which a checkpoint is known: an absolute path, links not followed, or a URL as it is."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)  # noqa: PTH100 (Path.absolute leaves ".." in it)


def checkpoint(path: "str | os.PathLike[str]", step: int | None) -> Checkpoint:
    """Give the record of a checkpoint. Raises RankMonitorClientError for a path or a step that cannot be one."""
    text = checkpoint_path(path)
    # What is not printable has no place in a log line, and a lone surrogate none in UTF-8 either.
    if not text.isprintable() or len(text.encode()) > MAX_PATH_BYTES:
        raise RankMonitorClientError(
            f"checkpoint {text[:80]!r}: the path must be printable, and have {MAX_PATH_BYTES} bytes at most"
        )
    number = None if step is None else operator.index(step)  # numpy and torch have integers of their own
    if number is not None and not 0 <= number < 2**63:
        raise RankMonitorClientError(f"checkpoint {text}: step {step} must be 0 or more")
    return Checkpoint(text, number)


def given_hint() -> ResumeHint | None:
    """Give the hint in this process's environment, if there is one. Raises RankMonitorClientError."""
    text = os.environ.get(HINT_ENV)
    try:
        return msgspec.json.decode(text, type=ResumeHint) if text else None
    except msgspec.MsgspecError as error:
        raise RankMonitorClientError(f"{HINT_ENV} is not what the launcher put there: {error}") from None
