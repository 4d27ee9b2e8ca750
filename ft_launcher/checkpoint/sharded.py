"""States in pieces, through torch.distributed.checkpoint, with every file hashed and nothing unpickled but its types.

Its files stand in a directory of their own, `sharded/`. The seams used (the file system of a writer, the metadata of a
reader, the bytes of a planner) are pinned in tests/torch_contract.
"""

import io
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from ft_launcher.checkpoint.errors import CheckpointError
from ft_launcher.checkpoint.files import HashedFile, OnBytes
from ft_launcher.checkpoint.manifest import FileRecord

__all__ = ["FOLDER", "read_sharded", "sharded_state", "write_sharded"]

FOLDER = "sharded"


def sharded_state(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """Give this rank's part of the model's and the optimizer's state, under names that any sharding shares."""
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        if not optimizer.state:
            _begin(model, optimizer)
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state


def _begin(model: nn.Module, optimizer: Optimizer) -> None:
    # To have a state to give, torch lets an optimizer that has none make a step with gradients of zero, though not
    # where there are others: then what is saved could not be loaded, and a load would drop the state.
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    gradients = [each.grad for each in parameters]
    for parameter in parameters:
        parameter.grad = None
    get_optimizer_state_dict(model, optimizer)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    # That step must not count: Adam corrects its averages by the number of steps.
    for of_parameter in optimizer.state.values():
        if isinstance(step := of_parameter.get("step"), torch.Tensor):
            step.zero_()
        elif step is not None:
            of_parameter["step"] = 0


def write_sharded(
    directory: Path, state: dict[str, Any], group: dist.ProcessGroup | None, on_bytes: OnBytes
) -> dict[str, FileRecord]:
    """Write this rank's part below `directory`, on the disk on return; the records of what this rank wrote.

    A collective over `group` (None: a single process). Raises CheckpointError on all ranks when one cannot write.
    """
    files = _HashingFileSystem(on_bytes)
    writer = FileSystemWriter(directory / FOLDER)
    writer.fs = files
    _be_silent()
    try:
        save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # a BaseException
        raise CheckpointError(_first_failure(error)) from error
    return {f"{FOLDER}/{name}": record for name, record in files.records.items()}


def read_sharded(
    directory: Path, model: nn.Module, optimizer: Optimizer | None, group: dist.ProcessGroup | None
) -> None:
    """Put back what `write_sharded` wrote, whatever the number of ranks was. A collective over `group`."""
    state = sharded_state(model, optimizer)
    _be_silent()
    try:
        load(
            state,
            storage_reader=_TypesOnlyReader(directory / FOLDER),
            planner=_WeightsOnlyPlanner(),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise CheckpointError(f"the checkpoint does not fit this model: {_first_failure(error)}") from error
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _be_silent() -> None:
    # torch warns whoever uses it without a process group, which is meant here. The filter stays: to take it away again
    # would undo what another thread does to the filters meanwhile.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def _first_failure(error: CheckpointException) -> str:
    failures = {rank: failure[0] for rank, failure in error.failures.items()}
    rank = min(failures)
    return f"rank {rank}: {failures[rank]}"


class _HashingFileSystem(FileSystem):
    def __init__(self, on_bytes: OnBytes) -> None:
        self.records: dict[str, FileRecord] = {}
        self._on_bytes = on_bytes

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        # The writer has it on the disk before it closes it (sync_files).
        with HashedFile(Path(path), self._on_bytes) as file:
            yield file
        self.records[Path(path).name] = file.record()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _TypesOnlyReader(FileSystemReader):
    """torch unpickles the metadata whatever stands in it; here it must be metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002 - torch's signature
        with self.fs.create_stream(self._get_metadata_path(), "rb") as file:
            metadata: Metadata = _TypesOnly(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TypesOnly(pickle.Unpickler):
    _ALLOWED = frozenset(
        {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_metadata = module == dcp_metadata.__name__ and isinstance(getattr(dcp_metadata, name, None), type)
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_metadata and not is_dtype and (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's metadata")
        return super().find_class(module, name)


class _WeightsOnlyPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # torch's loads anything here; what is loaded safely and written again is loaded safely by it, too.
        if read_item.type is not LoadItemType.BYTE_IO:
            raise CheckpointError("bytes for what is a tensor here")
        torch.load(value, map_location="cpu", weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
