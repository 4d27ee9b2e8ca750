"""The seams of torch.distributed.checkpoint that the checkpoint manager leans on, against the installed torch."""

import inspect
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STATE = {"tensor": torch.arange(6.0), "number": 3, "nested": {"half": torch.ones(2, dtype=torch.bfloat16)}}


class Recording(FileSystem):
    """Notes what goes through it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def create_stream(self, path, mode):
        self.calls.append((mode, Path(path).name))
        return super().create_stream(path, mode)

    def rename(self, path, new_path):
        self.calls.append(("rename", f"{Path(path).name} {Path(new_path).name}"))
        super().rename(path, new_path)


def saved(path: Path) -> list[tuple[str, str]]:
    files = Recording()
    writer = FileSystemWriter(path)
    writer.fs = files
    save(dict(STATE), storage_writer=writer, no_dist=True)
    return files.calls


def test_all_that_a_writer_writes_goes_through_its_file_system_and_is_renamed_by_it(tmp_path):
    calls = saved(tmp_path)
    written = {name for mode, name in calls if mode == "wb"}
    renamed = dict(name.split(" ") for mode, name in calls if mode == "rename")
    assert {each.name for each in tmp_path.iterdir()} == {renamed.get(name, name) for name in written}
    assert ".metadata" in {each.name for each in tmp_path.iterdir()}


def test_a_writer_syncs_its_files_and_stages_a_copy_of_a_state(tmp_path):
    assert inspect.signature(FileSystemWriter.__init__).parameters["sync_files"].default is True
    tensor = torch.zeros(3)
    staged = FileSystemWriter("", sync_files=False).stage({"tensor": tensor, "list": [tensor]})
    tensor.fill_(1)
    assert staged["tensor"].sum() == staged["list"][0].sum() == 0


def test_a_reader_asks_its_file_system_for_the_metadata_and_knows_their_path(tmp_path):
    saved(tmp_path)
    reader = FileSystemReader(tmp_path)
    assert Path(reader._get_metadata_path()) == tmp_path / ".metadata"
    assert hasattr(reader, "load_id")
    assert isinstance(reader.read_metadata(), dcp_metadata.Metadata)


def test_the_metadata_are_a_pickle_of_a_few_types(tmp_path):
    saved(tmp_path)
    found = set()

    class Noting(pickle.Unpickler):
        def find_class(self, module, name):
            found.add((module, name))
            return super().find_class(module, name)

    with (tmp_path / ".metadata").open("rb") as file:
        assert isinstance(Noting(file).load(), dcp_metadata.Metadata)
    others = {each for each in found if each[0] != dcp_metadata.__name__}
    assert others <= {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch", "float32"),
        ("torch", "bfloat16"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
    }


def test_bytes_reach_the_planner_and_tensors_do_not_pass_it_by_pickle(tmp_path):
    saved(tmp_path)
    seen = []

    class Noting(DefaultLoadPlanner):
        def load_bytes(self, read_item, value):
            assert read_item.type is LoadItemType.BYTE_IO
            seen.append(torch.load(value, weights_only=True))
            value.seek(0)
            super().load_bytes(read_item, value)

    state = {"tensor": torch.zeros(6), "number": 0, "nested": {"half": torch.zeros(2, dtype=torch.bfloat16)}}
    load(state, storage_reader=FileSystemReader(tmp_path), planner=Noting(), no_dist=True)
    assert seen == [3]
    assert state["number"] == 3
    assert torch.equal(state["tensor"], STATE["tensor"])  # type: ignore[arg-type]


def test_what_fails_is_told_by_rank_in_a_base_exception(tmp_path):
    assert issubclass(CheckpointException, BaseException)
    assert not issubclass(CheckpointException, Exception)
    saved(tmp_path)
    with pytest.raises(CheckpointException) as failed:
        load({"unknown": torch.zeros(1)}, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert isinstance(failed.value.failures[0][0], RuntimeError)
    assert "unknown" in str(failed.value.failures[0][0])


@pytest.mark.filterwarnings("default:torch.distributed is disabled")
def test_a_save_without_a_process_group_warns_in_these_words(tmp_path):
    with pytest.warns(UserWarning, match=r"^torch\.distributed is disabled, unavailable or uninitialized"):
        save(dict(STATE), checkpoint_id=tmp_path, no_dist=True)
