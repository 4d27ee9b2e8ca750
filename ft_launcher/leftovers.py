"""Removes what a launcher leaves on the disk, also from a monitor when the launcher was killed; so it stays light."""

import os
from contextlib import suppress

__all__ = ["prune_empty", "remove_run_dir"]


def remove_run_dir(path: str, name: str) -> None:
    """Remove socket `name` from the run directory `path`, and the directory too if it was the last."""
    with suppress(OSError):
        os.unlink(os.path.join(path, name))  # noqa: PTH108, PTH118 - a monitor runs this: pathlib costs 1 MB
    with suppress(OSError):
        os.rmdir(path)  # noqa: PTH106


def prune_empty(path: str) -> None:
    """Remove the directory `path` unless some file under it says something: logs and evidence stay, shells go."""
    if not path:
        return
    for directory, _, names in os.walk(path):
        if any(os.path.getsize(os.path.join(directory, name)) for name in names):  # noqa: PTH118, PTH202
            return
    # Loading it costs a monitor 2 MB, and this is its last act.
    import shutil

    shutil.rmtree(path, ignore_errors=True)
