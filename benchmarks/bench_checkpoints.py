"""What a checkpoint of 1 GB costs beside torch's own: saving, the standstill of an asynchronous save, verifying.

One process, a linear model and Adam; each round takes every way once, in turn, and begins with a quiet disk.

save       torch.save of the same state into a new file, fsync of it and of its directory; CheckpointManager.save
standstill how long dcp.async_save and CheckpointManager.save(blocking=False) keep the caller; both are waited for
verify     reading every byte of a checkpoint that is not in the page cache, without and with its verification
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from ft_launcher.checkpoint import CheckpointManager
from ft_launcher.checkpoint.files import problems
from ft_launcher.checkpoint.manifest import MANIFEST, decode

LAYERS = 16


class Training:
    """A model and an Adam whose states have `total_bytes` together, and which has taken one step."""

    def __init__(self, total_bytes: int) -> None:
        width = int((total_bytes / 4 / 3 / LAYERS) ** 0.5)
        self.model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.model(torch.ones(1, width)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def touch_memory() -> None:
    """Use what memory is free once: a virtual machine's first use of a page costs more than all that follow."""
    torch.empty(max(psutil.virtual_memory().available - 4 * 10**9, 0), dtype=torch.uint8).fill_(1)


def plain(training: Training, folder: Path, step: int) -> None:
    path = folder / f"plain-{step}.pt"
    torch.save(training.state(), path)
    for each in (path, folder):
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def uncached(folder: Path) -> list[Path]:
    """Give the files below, none of which is in the page cache any more."""
    files = [each for each in sorted(folder.rglob("*")) if each.is_file()]
    for each in files:
        descriptor = os.open(each, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return files


def read(files: list[Path]) -> None:
    buffer = bytearray(4 * 1024 * 1024)
    for each in files:
        with each.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def verify(folder: Path) -> None:
    manifest = decode((folder / MANIFEST).read_bytes())
    if found := problems(folder, manifest, manifest.files, verify="full", on_bytes=lambda _: None):
        raise SystemExit("; ".join(found))


def rounds(training: Training, folder: Path, n: int) -> dict[str, list[float]]:
    """Measure `n` rounds; the first, in which files and buffers are new to the system, is left out."""
    taken: dict[str, list[float]] = {}
    manager = CheckpointManager(folder / "ours", keep_last_n=1, save_best=False, show_progress=False)
    group = dist.new_group(backend="gloo")

    def measure(name: str, work: Callable[[], object]) -> None:
        os.sync()
        taken.setdefault(name, []).append(seconds(work))

    for step in range(n + 1):
        pending = []

        def dcp_async(step: int = step, pending: list = pending) -> None:
            model, optimizer = get_state_dict(training.model, training.optimizer)
            state = {"model": model, "optimizer": optimizer}
            pending.append(dcp.async_save(state, checkpoint_id=folder / f"dcp-{step}", process_group=group))

        def ours(blocking: bool, step: int) -> None:
            manager.save(training.model, training.optimizer, step, blocking=blocking)

        def dcp_and_wait(pending: list = pending) -> None:
            measure("dcp.async_save", dcp_async)
            pending[0].result()

        def ours_and_wait(step: int = step) -> None:
            measure("ours, asynchronous", lambda: ours(False, 2 * step + 1))
            manager.wait()

        saves = [
            lambda step=step: measure("torch.save and fsync", lambda: plain(training, folder, step)),
            lambda step=step: measure("ours", lambda: ours(True, 2 * step)),
        ]
        standstills = [dcp_and_wait, ours_and_wait]
        for pair in (saves, standstills):
            # Who comes second finds memory that the first one has used.
            for each in pair if step % 2 else reversed(pair):
                each()
        checkpoint = folder / "ours" / f"step_{2 * step + 1:08d}"
        measure("reading", lambda path=checkpoint: read(uncached(path)))
        measure("reading and verifying", lambda path=checkpoint: (uncached(path), verify(path)))
        measure("verifying from the page cache", lambda path=checkpoint: verify(path))
        (folder / f"plain-{step}.pt").unlink()
        shutil.rmtree(folder / f"dcp-{step}")
    manager.close()
    return {name: values[1:] for name, values in taken.items()}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("-n", type=int, default=7, help="rounds (7)")
    made.add_argument("--megabytes", type=int, default=1000, help="size of the state (1000)")
    made.add_argument("--folder", type=Path, help="where to write (a temporary directory)")
    options = made.parse_args()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", rank=0, world_size=1)
    touch_memory()
    training = Training(options.megabytes * 10**6)
    with tempfile.TemporaryDirectory(prefix="ftb_", dir=options.folder) as folder:
        taken = rounds(training, Path(folder), options.n)
    dist.destroy_process_group()
    gigabytes = options.megabytes / 1000
    for name, values in taken.items():
        middle = statistics.median(values)
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:30} median {middle:6.2f} s ({spread}), {gigabytes / middle:5.2f} GB/s")
    for ours, other in (
        ("ours", "torch.save and fsync"),
        ("ours, asynchronous", "dcp.async_save"),
        ("reading and verifying", "reading"),
    ):
        pairs = [mine / theirs for mine, theirs in zip(taken[ours], taken[other], strict=True)]
        print(f"{ours} / {other}: {statistics.median(pairs):.2f} (median of {len(pairs)} rounds)")


if __name__ == "__main__":
    main()
