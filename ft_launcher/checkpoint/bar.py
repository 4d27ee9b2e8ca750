"""A progress bar for saves and loads that take long, where a person looks at a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from ft_launcher.checkpoint.files import OnBytes

__all__ = ["progress"]

LONG_SECONDS = 1.0
"""What is done sooner needs no bar."""


@contextmanager
def progress(what: str, total_bytes: int, *, shown: bool) -> Iterator[OnBytes]:
    """Show how many of `total_bytes` the block has told of; only where `shown`, on a terminal, and after a second."""
    if not shown or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(what, total=total_bytes)
    begun = monotonic()

    def on_bytes(count: int) -> None:
        bar.advance(task, count)
        if not bar.live.is_started and monotonic() - begun > LONG_SECONDS:
            bar.start()

    try:
        yield on_bytes
    finally:
        bar.stop()
