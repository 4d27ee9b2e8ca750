"""Small trainings that draw on everything a checkpoint holds, and what processes of the tests do with them.

Losses and digests are compared bit by bit, so they are given as text: float.hex(), sha256.
"""

import ctypes
import hashlib
import logging
import os
import random
import resource
import select
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from ft_launcher.checkpoint import CheckpointError, CheckpointManager, Restored, ResumableSampler
from ft_launcher.checkpoint.bar import progress
from ft_launcher.checkpoint.manifest import MANIFEST, FileRecord, decode, encode

# What is imported here is imported once, before the forks: torch and the manager import these when they need them.
import torch._dynamo  # isort: skip
from ft_launcher.checkpoint import sharded  # noqa: F401  isort: skip

SAMPLES = 64
BATCH = 4


def join(store: str, rank: int, size: int) -> None:
    """Become a rank of a group of `size`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Training:
    """A training whose every step draws on dropout, three generators, the data's order and a schedule."""

    def __init__(
        self, kind: str = "plain", schedule: str = "multistep", optimizer: str = "adam", seed: int = 0
    ) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(seed)  # the same parameters on all ranks
        # FSDP lets every rank have its own averages of a BatchNorm, and torch saves those of one.
        norm = nn.LayerNorm(8) if kind == "fsdp" else nn.BatchNorm1d(8)
        model: nn.Module = nn.Sequential(nn.Linear(4, 8), norm, nn.Dropout(0.3), nn.Linear(8, 2))
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        elif kind == "fsdp":
            mesh = init_device_mesh("cpu", (self.size,))
            for part in model.children():
                if isinstance(part, nn.Linear):
                    fully_shard(part, mesh=mesh)
            fully_shard(model, mesh=mesh)
        self.model = model
        self.optimizer = (
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            if optimizer == "sgd"
            else torch.optim.AdamW(model.parameters(), lr=0.01)
        )
        self.scheduler = _schedule(schedule, self.optimizer)
        self.sampler = ResumableSampler(SAMPLES, rank=self.rank, world_size=self.size)
        torch.manual_seed(seed * 100 + self.rank)
        np.random.seed(seed * 100 + self.rank)
        random.seed(seed * 100 + self.rank)
        self._batches: Iterator[torch.Tensor] = iter(())
        self.step = 0

    def train(self, steps: int) -> list[str]:
        """Train, and give the losses."""
        return [self._train() for _ in range(steps)]

    def _train(self) -> str:
        indices = next(self._batches, None)
        if indices is None:
            if not len(self.sampler):
                self.sampler.next_epoch()
            # torch draws a seed for workers from the global generator for each iterator, also where there are none.
            self._batches = iter(DataLoader(range(SAMPLES), BATCH, sampler=self.sampler, generator=torch.Generator()))  # type: ignore[arg-type]
            indices = next(self._batches)
        data = torch.stack([torch.sin(indices * (each + 1.0)) for each in range(4)], dim=1)
        data += torch.randn(data.shape) * 0.1 + float(np.random.normal()) * 0.1 + random.random() * 0.1
        self.optimizer.zero_grad()
        loss = self.model(data).pow(2).mean()
        loss.backward()
        self.optimizer.step()
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss.item())
        else:
            self.scheduler.step()
        self.sampler.advance(len(indices) * self.size)
        self.step += 1
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return f"{loss.item().hex()} {rates}"

    def save(self, manager: CheckpointManager, **more: Any) -> None:
        manager.save(self.model, self.optimizer, self.step, scheduler=self.scheduler, sampler=self.sampler, **more)

    def resume(self, manager: CheckpointManager) -> Restored | None:
        """Go on from the newest checkpoint."""
        restored = manager.load_latest(self.model, self.optimizer, self.scheduler, sampler=self.sampler)
        self.step = 0 if restored is None else restored.step
        self._batches = iter(())
        return restored

    def digest(self) -> str:
        """Give a digest of this rank's part of the model and of the optimizer."""
        sha256 = hashlib.sha256()
        tensors = [*self.model.state_dict().values()]
        for state in self.optimizer.state.values():
            tensors += [each for each in state.values() if isinstance(each, torch.Tensor)]
        for each in tensors:
            sha256.update(_local(each).detach().contiguous().numpy().tobytes())
        return sha256.hexdigest()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _schedule(name: str, optimizer: torch.optim.Optimizer) -> Any:
    if name == "multistep":
        return lr_scheduler.MultiStepLR(optimizer, [2, 4, 6, 6])
    if name == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=40)
    if name == "sequential":
        parts = [lr_scheduler.LinearLR(optimizer, total_iters=4), lr_scheduler.CosineAnnealingLR(optimizer, 20)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


def resign(checkpoint: Path) -> None:
    """Make a manifest that fits the files as they are, as somebody could who may write there."""
    manifest = decode((checkpoint / MANIFEST).read_bytes())
    files = {
        name: FileRecord(
            bytes=(checkpoint / name).stat().st_size,
            sha256=hashlib.sha256((checkpoint / name).read_bytes()).hexdigest(),
        )
        for name in manifest.files
    }
    (checkpoint / MANIFEST).write_bytes(encode(msgspec.structs.replace(manifest, files=files)))


# -- what processes of the tests do ---------------------------------------------------------------------------------


def _names(directory: str) -> list[str]:
    return sorted(each.name for each in Path(directory).iterdir())


def _refused(call: Callable[[], Any]) -> str:
    """Give what the manager raises."""
    try:
        call()
    except CheckpointError as error:
        return str(error)
    raise AssertionError("no CheckpointError")


def _evaluated(training: Training) -> str:
    """Give the loss over fixed data, which does not depend on the number of ranks."""
    training.model.eval()
    with torch.no_grad():
        loss = training.model(torch.arange(80.0).sin().reshape(20, 4)).pow(2).mean()
    training.model.train()
    return str(loss.item().hex())


def round_trip(directory: str, kind: str, async_save: bool) -> dict[str, Any]:
    """Save while training goes on, and resume in other objects."""
    with CheckpointManager(directory, async_save=async_save) as manager:
        training = Training(kind)
        training.train(3)
        evaluated = _evaluated(training)
        training.save(manager)
        expected = training.train(12)
    with CheckpointManager(directory) as manager:
        resumed = Training(kind, seed=5)
        resumed.resume(manager)
        at_resume = _evaluated(resumed)
        losses = resumed.train(12)
    return {
        "evaluated": [evaluated, at_resume],
        "losses": [expected, losses],
        "digests": [training.digest(), resumed.digest()],
    }


def resume(directory: str, kind: str) -> dict[str, Any]:
    """Resume, and say where it is and how good."""
    with CheckpointManager(directory) as manager:
        training = Training(kind, seed=7)
        restored = training.resume(manager)
        assert restored is not None
        evaluated = _evaluated(training)
        training.train(1)
        return {"step": restored.step, "evaluated": evaluated, "sampler": training.sampler.state_dict()}


def fall_back(directory: str, kind: str, damaged: str) -> int:
    """Save twice, damage a file of the second, and load."""
    with CheckpointManager(directory) as manager:
        training = Training(kind)
        for _ in range(2):
            training.train(1)
            training.save(manager)
        if training.rank == 0:
            path = Path(directory, "step_00000002", damaged)
            whole = bytearray(path.read_bytes())
            whole[-1] ^= 1
            path.write_bytes(whole)
        dist.barrier()
        restored = training.resume(manager)
        assert restored is not None
        return restored.step


def cannot_capture(directory: str, async_save: bool) -> list[str]:
    """Rank 1 has something that cannot be saved; then the ranks are at different steps; then all is well."""
    with CheckpointManager(directory, async_save=async_save) as manager:
        training = Training("ddp")
        bad = Path("x") if training.rank == 1 else 1
        said = [_refused(lambda: training.save(manager, extra=bad))]
        training.step = 5 + training.rank
        said.append(_refused(lambda: training.save(manager)))
        training.step = 7
        training.save(manager)
        manager.wait()
        return [*said, str(manager.steps())]


def cannot_write(directory: str, kind: str, async_save: bool) -> list[str]:
    """Rank 1 may write no large files; then it may."""
    with CheckpointManager(directory, async_save=async_save) as manager:
        training = Training(kind)
        training.train(1)
        training.save(manager)
        manager.wait()
        training.train(1)
        if training.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        said = _refused(lambda: _save_whole(training, manager))
        if training.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        dist.barrier()
        found = [said, str(manager.steps()), str([name for name in _names(directory) if name.startswith(".tmp")])]
        training.train(1)
        training.save(manager)
        manager.wait()
        return [*found, str(manager.steps())]


def _save_whole(training: Training, manager: CheckpointManager) -> None:
    training.save(manager)
    manager.wait()


def maybe_save(directory: str, seconds: list[float]) -> bool:
    """Ask with other seconds on every rank."""
    training = Training("ddp")
    with CheckpointManager(directory, save_interval_seconds=seconds[training.rank]) as manager:
        return manager.maybe_save(training.model, training.optimizer, 1)


def raise_in_block(directory: str, who: list[int]) -> None:
    """Some ranks end in the middle of the block, with a save in flight; the others go on to save."""
    with CheckpointManager(directory, async_save=True) as manager:
        training = Training("ddp")
        training.step = 1
        training.save(manager)
        if training.rank in who:
            raise ZeroDivisionError
        training.step = 2
        training.save(manager)
        manager.wait()


def refuse_pieces_in_one(directory: str) -> str:
    """Ask for one piece of a sharded model."""
    with CheckpointManager(directory, backend="torch") as manager:
        training = Training("fsdp")
        return _refused(lambda: training.save(manager))


class OwnPosition:
    """A sampler that says where its own rank is, as most do."""

    def __init__(self, position: int) -> None:
        self.position = position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.position = state_dict["position"]


def own_positions(directory: str) -> int:
    """Save and load a sampler of that kind."""
    model = nn.Linear(1, 1)
    sampler = OwnPosition(dist.get_rank() + 10)
    with CheckpointManager(directory) as manager:
        manager.save(model, None, 1, sampler=sampler)
        sampler.position = 0
        manager.load_latest(model, sampler=sampler)
    return sampler.position


def open_again_and_again(directory: str) -> list[int]:
    """Open managers that are closed at once, as one does that only wants to know what is there."""
    for _ in range(60):
        with CheckpointManager(directory) as manager:
            found = manager.steps()
    return found


def resume_own_position(directory: str) -> str:
    """Try to go on with another number of ranks."""
    with CheckpointManager(directory) as manager:
        return _refused(lambda: manager.load_latest(nn.Linear(1, 1), sampler=OwnPosition(0)))


def steps(directory: str) -> list[int]:
    """Load what is there, and give the steps."""
    with CheckpointManager(directory) as manager:
        restored = manager.load_latest(Training().model)
        found = manager.steps()
    assert ([] if restored is None else [restored.step]) == found[-1:]
    return found


def save_and_load(directory: str) -> None:
    """Save and load."""
    with CheckpointManager(directory) as manager:
        manager.save(nn.Linear(2, 2), None, 1)
        manager.load_latest(nn.Linear(2, 2))


def loaded_by_workers() -> list[list[int]]:
    """Give a data loader's samples after 4 of 20, and those of a sampler that was resumed there."""
    sampler = ResumableSampler(40, rank=1, world_size=2)
    loader = iter(DataLoader(range(40), batch_size=4, sampler=sampler, num_workers=2, prefetch_factor=4))  # type: ignore[arg-type]
    next(loader)
    sampler.advance(8)
    resumed = ResumableSampler(40, rank=1, world_size=2)
    resumed.load_state_dict(sampler.state_dict())
    return [[index for batch in loader for index in batch.tolist()], list(resumed)]


# -- disks ----------------------------------------------------------------------------------------------------------

_CLONE_NEWNS, _MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 0x20000, 1, 32, 0x4000, 1 << 18


def _mount(directory: str, flags: int = 0, options: str = "") -> bool:
    """Mount a file system of this process's own there; False where it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not flags & _MS_REMOUNT and (
        libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    ):
        return False
    return not libc.mount(b"none", directory.encode(), b"tmpfs", flags, options.encode())


def fill_disk(directory: str, backend: Any, async_save: bool) -> dict[str, Any] | None:
    """Save until the disk is full, make room, and save again."""
    if not _mount(directory, options="size=1m"):
        return None
    model = nn.Linear(200, 200)  # 160 kB
    with CheckpointManager(directory, keep_last_n=None, backend=backend, async_save=async_save) as manager:

        def save(step: int) -> None:
            nn.init.constant_(model.weight, step)
            manager.save(model, None, step)
            manager.wait()

        saved = 0
        said = ""
        while not said:
            try:
                save(saved + 1)
                saved += 1
            except CheckpointError as error:
                said = str(error)
        names = _names(directory)
        restored = manager.load_latest(model)
        assert restored is not None
        found = {"said": said, "saved": saved, "names": names, "loaded": [restored.step, model.weight.mean().item()]}
        shutil.rmtree(f"{directory}/step_00000001")
        save(saved + 1)
        return found | {"steps": manager.steps()}


def write_to_read_only(directory: str) -> dict[str, Any] | None:
    """Save to what can be read only, and when it can be written again."""
    if not _mount(directory):
        return None
    model = nn.Linear(2, 2)
    with CheckpointManager(directory) as manager:
        manager.save(model, None, 1)
    _mount(directory, _MS_REMOUNT | _MS_RDONLY)
    with CheckpointManager(directory) as manager:
        said = _refused(lambda: manager.save(model, None, 2))
        loaded = manager.load_latest(model) is not None
        _mount(directory, _MS_REMOUNT)
        manager.save(model, None, 3)
        return {"said": said, "loaded": loaded, "steps": manager.steps(), "names": _names(directory)}


# -- terminals ------------------------------------------------------------------------------------------------------


def show_progress(terminal: str, enough: str) -> None:
    """Show a bar on the terminal until `enough` can be read from."""
    go = os.open(enough, os.O_RDONLY | os.O_NONBLOCK)
    with _on(terminal), progress("saving step 1", 100, shown=True) as on_bytes:
        on_bytes(50)
        while not select.select([go], [], [], 0)[0] or not os.read(go, 1):
            on_bytes(0)


def save_on_terminal(terminal: str, directory: str) -> None:
    """Save and load what takes no time, and say so on the terminal."""
    with _on(terminal), CheckpointManager(directory) as manager:
        model = nn.Linear(2, 2)
        manager.save(model, None, 1)
        manager.load_latest(model)
        sys.stderr.write("end\n")


@contextmanager
def _on(terminal: str) -> Iterator[None]:
    with Path(terminal).open("w") as file, redirect_stderr(file):
        yield
