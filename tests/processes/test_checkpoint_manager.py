"""The checkpoint manager of a single process: what comes back, what is refused, what is kept."""

import argparse
import json
import logging
import math
import os
import random
import re
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from ft_launcher.checkpoint import CheckpointError, CheckpointManager, ResumableSampler
from ft_launcher.checkpoint.directory import Directory, Lease
from ft_launcher.checkpoint.manifest import MANIFEST, decode
from tests.processes.checkpoint_trainings import Training, resign

BACKENDS = ["torch", "dcp"]
FILES = {
    "torch": ["manifest.json", "rank_00000.pt", "state.pt"],
    "dcp": ["manifest.json", "rank_00000.pt", "sharded/.metadata", "sharded/__0_0.distcp", "state.pt"],
}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: what is tested here does not depend on the disk, and a busy one takes minutes to sync it all."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as path:
        yield Path(path)


class Small:
    """A model and an optimizer, the cheapest there are, whose parameters say which step they are of."""

    def __init__(self, value: float = 0.0) -> None:
        self.model = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.set(value)

    def set(self, value: float) -> None:
        with torch.no_grad():
            for each in self.model.parameters():
                each.fill_(value)

    @property
    def value(self) -> float:
        (value,) = {each for parameter in self.model.parameters() for each in parameter.flatten().tolist()}
        return float(value)

    def save(self, manager: CheckpointManager, step: int, metrics: Any = None, **more: Any) -> None:
        """Save parameters that are `step`."""
        self.set(step)
        manager.save(self.model, self.optimizer, step, metrics, **more)


@pytest.fixture
def small() -> Small:
    return Small()


def names(directory: Path) -> list[str]:
    return sorted(each.name for each in directory.iterdir())


def files(checkpoint: Path) -> list[str]:
    return sorted(str(each.relative_to(checkpoint)) for each in checkpoint.rglob("*") if each.is_file())


# -- C1: what comes back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "optimizer"), [("torch", "adam"), ("torch", "sgd"), ("dcp", "adam"), ("dcp", "sgd")]
)
@pytest.mark.parametrize("schedule", ["multistep", "onecycle", "sequential", "plateau"])
def test_C1_a_resumed_training_goes_on_bit_by_bit(tmp_path, backend, optimizer, schedule):
    with CheckpointManager(tmp_path, backend=backend) as manager:
        training = Training(schedule=schedule, optimizer=optimizer)
        training.train(3)
        training.save(manager)
        expected = training.train(16)  # over the end of an epoch
    with CheckpointManager(tmp_path, backend=backend) as manager:
        resumed = Training(schedule=schedule, optimizer=optimizer, seed=5)
        assert resumed.train(3) != expected[:3]
        assert resumed.resume(manager) is not None
        assert resumed.train(16) == expected
        assert resumed.digest() == training.digest()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("async_save", [False, True])
def test_C1_a_training_is_the_same_with_saves_and_without(tmp_path, backend, async_save):
    undisturbed = Training()
    expected = undisturbed.train(8)
    saved = Training()
    with CheckpointManager(tmp_path, backend=backend, async_save=async_save) as manager:
        losses = []
        for _ in range(8):
            saved.save(manager)  # also before the first step, when the optimizer has no state yet
            losses += saved.train(1)
    assert losses == expected
    assert saved.digest() == undisturbed.digest()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradients", [False, True])
def test_C1_a_training_saved_before_its_first_step_is_resumed_as_it_began(tmp_path, backend, gradients):
    training, resumed = Training(), Training(seed=3)
    for each in (training, resumed):
        if gradients:
            each.model(torch.ones(2, 4)).sum().backward()
    with CheckpointManager(tmp_path, backend=backend) as manager:
        training.save(manager)
        expected = training.train(5)
        resumed.resume(manager)
        assert resumed.train(5) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_C1_an_optimizers_state_is_loaded_also_where_there_are_gradients_already(tmp_path, backend):
    training, resumed = Training(), Training(seed=3)
    training.train(3)
    resumed.model(torch.ones(2, 4)).sum().backward()
    with CheckpointManager(tmp_path, backend=backend) as manager:
        training.save(manager)
        resumed.resume(manager)
    assert resumed.digest() == training.digest()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_gives_back_what_else_was_saved(tmp_path, small, backend):
    extra: dict[Any, Any] = {
        "kinds": ["text", b"bytes", bytearray(b"more"), 1, 1.5, True, None, 1j, torch.Size([2]), torch.float16],
        "device": torch.device("cpu"),
        ("key", 1): OrderedDict(a=1, b={1, 2}),
        "counter": Counter("aab"),
        "tensor": torch.arange(6).reshape(2, 3)[:, ::2],
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    for is_async in (False, True):
        with CheckpointManager(tmp_path, backend=backend) as manager:
            metrics = {"loss": torch.tensor(0.5), "none": None, "nan": math.nan, "count": 3, "inf": -math.inf}
            small.save(manager, 4, metrics, extra=extra, blocking=not is_async)
            restored = manager.load_latest(small.model, small.optimizer)
        assert restored is not None
        assert restored.step == restored["step"] == 4
        assert restored.path == tmp_path / "step_00000004"
        assert math.isnan(restored.metrics.pop("nan"))
        assert restored["metrics"] == {"loss": 0.5, "count": 3.0, "inf": -math.inf}
        assert restored.extra.keys() == extra.keys()
        for name, value in extra.items():
            loaded = restored.extra[name]
            assert type(loaded) is type(value)
            same = torch.equal(loaded, value) if isinstance(value, torch.Tensor) else loaded == value
            assert same, name
        assert [type(each) for each in restored.extra["kinds"]] == [type(each) for each in extra["kinds"]]
        with pytest.raises(KeyError):
            restored["nothing"]


def test_random_numbers_stay_as_they_are_where_that_is_wanted(tmp_path, small):
    with CheckpointManager(tmp_path) as manager:
        small.save(manager, 1)
        expected = [torch.rand(1).item(), np.random.rand(), random.random()]
        before = torch.get_rng_state().tolist(), np.random.get_state(legacy=False), random.getstate()
        manager.load_latest(small.model, restore_rng=False)
        after = torch.get_rng_state().tolist(), np.random.get_state(legacy=False), random.getstate()
        assert str(after) == str(before)
        manager.load_latest(small.model)
        assert [torch.rand(1).item(), np.random.rand(), random.random()] == expected


def test_nothing_is_loaded_from_a_directory_that_is_empty_or_absent(tmp_path, small):
    for path in (tmp_path, tmp_path / "absent" / "deeper"):
        with CheckpointManager(path) as manager:
            assert manager.load_latest(small.model, small.optimizer) is None
            assert manager.load_best(small.model, small.optimizer) is None
            assert manager.steps() == []
            with pytest.raises(CheckpointError, match="no whole checkpoint of step 3"):
                manager.load(3, small.model)
    assert not (tmp_path / "absent").exists()
    with CheckpointManager(tmp_path / "absent" / "deeper") as manager:
        small.save(manager, 1)
        assert manager.load_best(small.model) is None
        assert manager.steps() == [1]


def test_a_reader_makes_no_file(tmp_path, small):
    with CheckpointManager(tmp_path) as manager:
        small.save(manager, 1)
    (tmp_path / ".lock").unlink()
    before = names(tmp_path)
    with CheckpointManager(tmp_path) as manager:
        manager.load_latest(small.model)
        assert names(tmp_path) == before


# -- C3: damage -----------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


DAMAGE = {
    "flipped": _flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "empty": lambda path: os.truncate(path, 0),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize(("backend", "name"), [(backend, name) for backend in BACKENDS for name in FILES[backend]])
def test_C3_a_damaged_file_of_the_newest_falls_back_one_is_named_and_touches_nothing(tmp_path, caplog, backend, name):
    for kind, damage in DAMAGE.items():
        caplog.clear()
        directory = tmp_path / kind
        with CheckpointManager(directory, backend=backend) as manager:
            training = Training()
            digests = {}
            for _ in range(2):
                training.train(1)
                training.save(manager)
                digests[training.step] = training.digest()
            newest = directory / "step_00000002"
            assert files(newest) == FILES[backend]
            damage(newest / name)
            other = Training(seed=1)
            other.train(1)
            before = other.digest(), other.sampler.state_dict(), torch.get_rng_state().tolist()
            with pytest.raises(CheckpointError, match="no whole checkpoint of step 2"):
                manager.load(2, other.model, other.optimizer, other.scheduler, sampler=other.sampler)
            assert (other.digest(), other.sampler.state_dict(), torch.get_rng_state().tolist()) == before
            (said,) = [each.message for each in caplog.records if each.levelno >= logging.WARNING]
            assert said.startswith(f"passing over {newest}: {name}: ")
            restored = other.resume(manager)
            assert restored is not None
            assert restored.step == 1
            assert other.digest() == digests[1]
        assert files(newest) == [each for each in FILES[backend] if kind != "deleted" or each != name], (
            "looking repairs"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_C3_each_of_500_random_bits_is_noticed(tmp_path, backend):
    with CheckpointManager(tmp_path, backend=backend) as manager:
        training = Training()
        training.train(2)
        training.save(manager)
        place = tmp_path / "step_00000002"
        sizes = [(place / name).stat().st_size for name in FILES[backend]]
        draw = random.Random(0)
        # Half of the bits where all stand, half evenly over the files: most bits are in one of them.
        chosen = draw.choices(FILES[backend], weights=sizes, k=250) + draw.choices(FILES[backend], k=250)
        unnoticed = []
        logging.disable(logging.WARNING)
        try:
            for name in chosen:
                with (place / name).open("r+b") as file:
                    bit = draw.randrange(os.fstat(file.fileno()).st_size * 8)
                    byte = os.pread(file.fileno(), 1, bit // 8)[0]
                    os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)
                    if manager.load_latest(training.model, training.optimizer) is not None:
                        unnoticed.append((name, bit))
                    os.pwrite(file.fileno(), bytes([byte]), bit // 8)
        finally:
            logging.disable(logging.NOTSET)
        assert unnoticed == []
        assert manager.load_latest(training.model, training.optimizer) is not None


def test_C3_where_all_are_damaged_nothing_is_loaded(tmp_path, small):
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            small.save(manager, step)
            _flip(tmp_path / f"step_{step:08d}" / "state.pt")
        small.set(9)
        assert manager.load_latest(small.model, small.optimizer) is None
        assert small.value == 9
        # What is broken does not count as one of the newest.
        small.save(manager, 3)
        assert manager.load_latest(small.model) is not None


def test_files_of_the_right_size_are_trusted_where_that_is_wanted(tmp_path, small):
    with CheckpointManager(tmp_path, verify="size") as manager:
        small.save(manager, 1)
        small.save(manager, 2)
        os.truncate(tmp_path / "step_00000002" / "rank_00000.pt", 10)
        restored = manager.load_latest(small.model)
        assert restored is not None
        assert restored.step == 1


# -- C4: retention --------------------------------------------------------------------------------------------------


def test_C4_the_newest_two_and_the_best_are_kept(tmp_path, small):
    losses: list[Any] = [
        {"loss": 5.0}, {"loss": math.nan}, {"loss": 2.0}, None, {"loss": 2.0}, {"loss": -math.inf}, {"accuracy": 0.0},
        {"loss": None}, {"loss": torch.tensor(3.0)}, {"loss": math.nan},
    ]  # fmt: skip
    with CheckpointManager(tmp_path, keep_last_n=2) as manager:
        seen = []
        for step, metrics in enumerate(losses, start=1):
            small.save(manager, step, metrics)
            seen.append(manager.steps())
        assert seen == [
            [1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [5, 6, 7], [5, 7, 8], [5, 8, 9], [5, 9, 10],
        ]  # fmt: skip
    assert names(tmp_path) == [".lock", "step_00000005", "step_00000009", "step_00000010"]
    with CheckpointManager(tmp_path, keep_last_n=2) as manager:  # which knows only what stands there
        small.save(manager, 11, {"loss": 2.5})
        assert manager.steps() == [5, 10, 11]
        restored = manager.load_best(small.model, small.optimizer)
        assert restored is not None
        assert (restored.step, restored.metrics, small.value) == (5, {"loss": 2.0}, 5)
        small.save(manager, 12, {"loss": 1.0})
        small.save(manager, 13)
        assert manager.steps() == [12, 13]


def test_C4_the_highest_is_the_best_where_that_is_wanted(tmp_path, small):
    with CheckpointManager(tmp_path, keep_last_n=1, best_metric="accuracy", best_mode="max") as manager:
        for step, accuracy in enumerate([0.5, 0.9, 0.7, 0.9, 0.8], start=1):
            small.save(manager, step, {"accuracy": accuracy, "loss": accuracy})
        assert manager.steps() == [4, 5]
        assert manager.load_best(small.model)["step"] == 4  # type: ignore[index]


def test_C4_without_save_best_only_the_newest_are_kept(tmp_path, small):
    with CheckpointManager(tmp_path, keep_last_n=2, save_best=False) as manager:
        for step in range(1, 6):
            small.save(manager, step, {"loss": step})
        assert manager.steps() == [4, 5]


def test_C4_all_are_kept_where_no_number_is_given(tmp_path, small):
    with CheckpointManager(tmp_path, keep_last_n=None) as manager:
        for step in range(6):
            small.save(manager, step)
        assert manager.steps() == list(range(6))


def test_C4_a_broken_best_gives_way_to_the_next_best(tmp_path, small, caplog):
    with CheckpointManager(tmp_path, keep_last_n=4) as manager:
        for step, loss in enumerate([2.0, 1.0, 3.0, 4.0], start=1):
            small.save(manager, step, {"loss": loss})
        _flip(tmp_path / "step_00000002" / "state.pt")
        restored = manager.load_best(small.model)
        assert restored is not None
        assert restored.step == 1
        assert f"passing over {tmp_path / 'step_00000002'}: state.pt" in caplog.text
        for step in (5, 6, 7, 8):
            small.save(manager, step, {"loss": 9.0})
        assert manager.steps() == [1, 5, 6, 7, 8]


def test_C4_with_one_kept_there_is_always_one_also_beside_training(tmp_path, small):
    with CheckpointManager(tmp_path, keep_last_n=1, async_save=True) as manager:
        for step in range(1, 6):
            small.save(manager, step)
            assert manager.steps()[-1:] >= [step - 1][: step - 1]
        manager.wait()
        assert manager.steps() == [5]
    assert names(tmp_path) == [".lock", "step_00000005"]


def test_what_somebody_reads_is_kept_until_it_was_read(tmp_path, small):
    with CheckpointManager(tmp_path, keep_last_n=1) as manager:
        small.save(manager, 1)
        lease = Lease(Directory(tmp_path).entries()[0])
        small.save(manager, 2)
        small.save(manager, 3)
        assert manager.steps() == [1, 3]
        lease.close()
        small.save(manager, 4)
        assert manager.steps() == [4]


def test_after_a_rewind_the_newly_saved_is_the_latest(tmp_path, small):
    with CheckpointManager(tmp_path, keep_last_n=10) as manager:
        for step in (10, 20, 30, 40):
            small.save(manager, step)
        manager.load(20, small.model, small.optimizer)
        assert small.value == 20
        small.set(-1)
        manager.save(small.model, small.optimizer, 30)  # in place of the other step 30
        assert manager.steps() == [10, 20, 30, 40]
    with CheckpointManager(tmp_path, keep_last_n=2) as manager:
        restored = manager.load_latest(small.model, small.optimizer)
        assert restored is not None
        assert (restored.step, small.value) == (30, -1)
        small.save(manager, 35)
        assert manager.steps() == [30, 35], "40 is older"


def test_a_step_that_is_saved_again_replaces_the_first(tmp_path, small):
    with CheckpointManager(tmp_path) as manager:
        small.save(manager, 7)
        small.set(3)
        manager.save(small.model, small.optimizer, 7)
        manager.load_latest(small.model)
    assert small.value == 3
    assert names(tmp_path) == [".lock", "step_00000007"]


# -- C5: beside training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_C5_what_changes_right_after_an_asynchronous_save_is_not_in_it(tmp_path, backend):
    model = nn.Sequential(nn.Linear(500, 500), nn.BatchNorm1d(500))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 500)).sum().backward()
    optimizer.step()
    extra: dict[str, Any] = {"list": [1, 2], "tensor": torch.zeros(1000)}
    sampler = ResumableSampler(10, rank=0, world_size=1)
    state = [*model.state_dict().values(), extra["tensor"]]
    state += [each for of_one in optimizer.state.values() for each in of_one.values()]
    expected = [each.clone() for each in state]
    with CheckpointManager(tmp_path, async_save=True, backend=backend) as manager:
        manager.save(model, optimizer, 1, extra=extra, sampler=sampler)
        with torch.no_grad():
            for each in state:
                each.fill_(7)
        extra["list"].append(3)
        sampler.advance(3)
        manager.wait()
        restored = manager.load_latest(model, optimizer, sampler=sampler)
    assert restored is not None
    assert restored.extra["list"] == [1, 2]
    assert sampler.position == 0
    loaded = [*model.state_dict().values(), restored.extra["tensor"]]
    loaded += [each for of_one in optimizer.state.values() for each in of_one.values()]
    assert all(torch.equal(one, other) for one, other in zip(loaded, expected, strict=True))


def test_C5_an_error_beside_training_comes_once_with_the_next_call(tmp_path, small, caplog):
    (tmp_path / "file").write_text("")
    calls = {
        "save": lambda manager: small.save(manager, 2, blocking=True),
        "wait": lambda manager: manager.wait(),
        "load": lambda manager: manager.load_latest(small.model),
        "close": lambda manager: manager.close(),
    }
    for call in calls.values():
        manager = CheckpointManager(tmp_path / "file", async_save=True)
        small.save(manager, 1)
        with pytest.raises(CheckpointError, match=r"step 1 was not saved: .*Not a directory"):
            call(manager)
        manager.wait()
        manager.close()
    assert "the checkpoint of step 1 was not saved" in caplog.text, "a person sees it at once"


def test_C5_a_save_waits_for_the_one_in_flight(tmp_path, small):
    large = nn.Linear(2000, 2000)
    with CheckpointManager(tmp_path, keep_last_n=9) as manager:
        for step in (1, 2, 3):
            manager.save(large, None, step, blocking=False)
            assert manager.steps() >= list(range(1, step))
        small.save(manager, 4)
        assert manager.steps() == [1, 2, 3, 4]


def test_C5_closing_waits_for_the_save_in_flight(tmp_path):
    manager = CheckpointManager(tmp_path, async_save=True)
    manager.save(nn.Linear(1000, 1000), None, 1)
    manager.close()
    assert manager.steps() == [1]
    manager.close()
    with pytest.raises(CheckpointError, match="the manager is closed"):
        manager.save(nn.Linear(1, 1), None, 2)


def test_an_exception_in_the_block_is_the_one_that_is_seen_and_the_save_in_flight_is_whole(tmp_path, small):
    def fail(directory: Path) -> None:
        with CheckpointManager(directory, async_save=True) as manager:
            small.save(manager, 1)
            raise ZeroDivisionError

    (tmp_path / "file").write_text("")
    for directory in (tmp_path, tmp_path / "file"):
        with pytest.raises(ZeroDivisionError):
            fail(directory)
    with CheckpointManager(tmp_path) as manager:
        assert manager.load_latest(small.model) is not None
        small.save(manager, 2)


# -- C10: two managers ----------------------------------------------------------------------------------------------


def test_C10_the_second_manager_may_read_but_not_save(tmp_path, small):
    with CheckpointManager(tmp_path) as first, CheckpointManager(tmp_path) as second:
        small.save(first, 1)
        with pytest.raises(CheckpointError) as refused:
            small.save(second, 2)
        assert str(refused.value) == (
            f"the checkpoint of step 2 was not saved: {tmp_path}: another manager of this process writes checkpoints "
            "here; give every job, and every manager, its own directory"
        )
        small.set(9)
        restored = second.load_latest(small.model)
        assert restored is not None
        assert (restored.step, small.value) == (1, 1)
        small.save(first, 3)
        first.close()
        small.save(second, 4)
        assert second.steps() == [1, 3, 4]


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "value", "allowed"),
    [
        ("keep_last_n", 0, "None or at least 1"),
        ("best_mode", "lowest", "'min' or 'max'"),
        ("backend", "fsdp", "'auto', 'torch' or 'dcp'"),
        ("verify", "none", "'full' or 'size'"),
        ("save_interval", 0, "None or at least 1 step"),
        ("save_interval_seconds", 0.0, "None or more than 0 s"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, what, value, allowed):
    with pytest.raises(CheckpointError, match=f"^{what} is {value!r}; it must be {re.escape(allowed)}$"):
        CheckpointManager(tmp_path, **{what: value})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"step": -1}, "step is -1; it must be a whole number of steps, 0 or more"),
        ({"step": 1.0}, "step is 1.0; it must be"),
        ({"step": True}, "step is True; it must be"),
        ({"step": torch.tensor(1)}, "step is tensor(1); it must be"),
        ({"metrics": {"loss": "0.5"}}, "metrics['loss'] is '0.5'; it must be a number or None"),
        ({"metrics": {"loss": torch.ones(2)}}, "metrics['loss'] is tensor([1., 1.]); it must be a number or None"),
        ({"metrics": [0.5]}, "metrics is [0.5]; it must be a dict of numbers by name"),
        ({"extra": argparse.Namespace(a=1)}, "extra is a argparse.Namespace, which cannot be loaded safely; save"),
        ({"extra": {"a": [1, np.float64(2)]}}, "extra['a'][1] is a numpy.float64, which"),
        ({"extra": {"path": Path("x")}}, "extra['path'] is a pathlib."),
        ({"extra": {np.int64(1): 1}}, "a key of extra is a numpy.int64, which"),
        ({"extra": np.zeros(2)}, "extra is a numpy.ndarray, which"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_when_it_is_saved(tmp_path, small, more, sentence):
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(CheckpointError) as refused:
            manager.save(small.model, small.optimizer, **({"step": 1} | more))
        assert str(refused.value).startswith(sentence)
        assert names(tmp_path) == []
        small.save(manager, 1)


class Opinionated(nn.Linear):
    """A model whose state is more than tensors."""

    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_models_state_that_could_not_be_loaded_again_is_refused_when_it_is_saved(tmp_path, backend):
    model = Opinionated(2, 1)
    with CheckpointManager(tmp_path, backend=backend) as manager:
        model.extra = {"seen": 3}
        manager.save(model, None, 1)
        model.extra = argparse.Namespace()
        with pytest.raises(CheckpointError, match=r"model\['_extra_state'\] is a argparse.Namespace"):
            manager.save(model, None, 2)
        model.extra = {"seen": 0}  # torch wants pieces where it shall put pieces
        manager.load_latest(model)
        assert model.extra == {"seen": 3}


def _others() -> dict[str, tuple[Any, str]]:
    """Give trainings that a checkpoint of Training() is not of, and what is said."""
    others: list[Any] = [Training(seed=1) for _ in range(5)]
    wider, deeper, shallower, optimizer, data = others
    wider.model[3] = nn.Linear(8, 3)
    wider.optimizer = torch.optim.AdamW(wider.model.parameters())
    deeper.model.append(nn.Linear(2, 2))
    deeper.optimizer = torch.optim.AdamW(deeper.model.parameters())
    shallower.model = shallower.model[:3]
    shallower.optimizer = torch.optim.AdamW(shallower.model.parameters())
    optimizer.optimizer = torch.optim.AdamW([{"params": [each]} for each in optimizer.model.parameters()])
    data.sampler = ResumableSampler(65, rank=0, world_size=1)
    return {
        "wider": (wider, "3.weight is (2, 8) there, (3, 8) here"),
        "deeper": (deeper, "it has no 4.bias and 1 more"),
        "shallower": (shallower, "it has 3.bias and 1 more besides"),
        "optimizer": (optimizer, "another optimizer: loaded state dict has a different number of parameter groups"),
        "data": (data, "the state was saved with another size"),
    }


@pytest.mark.parametrize("kind", ["wider", "deeper", "shallower", "optimizer", "data"])
def test_a_checkpoint_of_another_training_is_refused_with_nothing_touched(tmp_path, kind):
    training = Training()
    training.train(2)
    other, sentence = _others()[kind]
    with CheckpointManager(tmp_path) as manager:
        training.save(manager)
        before = (
            other.digest(),
            other.scheduler.state_dict(),
            other.sampler.state_dict(),
            torch.get_rng_state().tolist(),
        )
        with pytest.raises(CheckpointError, match=f"cannot be loaded: .*{re.escape(sentence)}"):
            other.resume(manager)
    after = other.digest(), other.scheduler.state_dict(), other.sampler.state_dict(), torch.get_rng_state().tolist()
    assert after == before


@pytest.mark.parametrize("kind", ["wider", "deeper"])
def test_a_sharded_checkpoint_of_another_model_is_refused_with_the_model_untouched(tmp_path, kind):
    training = Training()
    training.train(2)
    other, _ = _others()[kind]
    before = {name: each.clone() for name, each in other.model.state_dict().items()}
    with CheckpointManager(tmp_path, backend="dcp") as manager:
        training.save(manager)
        with pytest.raises(CheckpointError, match=r"cannot be loaded: .*does not fit this model: rank 0: "):
            other.resume(manager)
    assert all(torch.equal(each, before[name]) for name, each in other.model.state_dict().items())


def test_what_the_checkpoint_does_not_hold_is_named(tmp_path):
    training = Training()
    with CheckpointManager(tmp_path) as manager:
        manager.save(training.model, None, 1)
        before = training.digest()
        for more, sentence in [
            ({"optimizer": training.optimizer}, "the checkpoint holds no optimizer; give optimizer=None"),
            ({"scheduler": training.scheduler}, "the checkpoint holds no scheduler"),
            ({"sampler": training.sampler}, "the checkpoint holds no sampler"),
        ]:
            with pytest.raises(CheckpointError, match=sentence):
                manager.load_latest(training.model, **more)
        assert training.digest() == before
        assert manager.load_latest(training.model) is not None


def test_a_rank_without_its_process_group_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        CheckpointError, match=r"^WORLD_SIZE is 2, but there is no process group; make the manager after"
    ):
        CheckpointManager(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    CheckpointManager(tmp_path).close()


# -- hostile files --------------------------------------------------------------------------------------------------


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _poisoned(place: Path, name: str, trap: Path, training: Training) -> None:
    import pickle

    from torch.distributed.checkpoint.state_dict_saver import save

    from ft_launcher.checkpoint.sharded import sharded_state

    if name.endswith(".pt"):
        state = torch.load(place / name, weights_only=True)
        torch.save(state | {"extra": Hostile(trap), "random": Hostile(trap)}, place / name)
    elif name.endswith(".metadata"):
        (place / name).write_bytes(pickle.dumps(Hostile(trap)))
    else:
        state = sharded_state(training.model, training.optimizer)
        state["optimizer"]["param_groups"][0]["lr"] = Hostile(trap)
        save(state, checkpoint_id=place / "sharded", no_dist=True)


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("torch", "state.pt"),
        ("torch", "rank_00000.pt"),
        ("dcp", "state.pt"),
        ("dcp", "sharded/.metadata"),
        ("dcp", "sharded/__0_0.distcp"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing checkpoint")
def test_code_in_a_checkpoint_is_not_run_though_its_manifest_fits(tmp_path, backend, name):
    trap = tmp_path / "trap"
    training = Training()
    training.train(1)
    with CheckpointManager(tmp_path / "checkpoints", backend=backend) as manager:
        training.save(manager)
        place = tmp_path / "checkpoints" / "step_00000001"
        _poisoned(place, name, trap, training)
        resign(place)
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            training.resume(manager)
    assert not trap.exists()


def test_a_manifest_made_to_fit_is_believed(tmp_path, small):
    """Else the test above would prove nothing."""
    with CheckpointManager(tmp_path) as manager:
        small.save(manager, 1, extra=1)
        place = tmp_path / "step_00000001"
        state = torch.load(place / "state.pt", weights_only=True)
        torch.save(state | {"extra": 2}, place / "state.pt")
        assert manager.load_latest(small.model) is None
        resign(place)
        restored = manager.load_latest(small.model)
        assert restored is not None
        assert restored.extra == 2


# -- when to save ---------------------------------------------------------------------------------------------------


def test_maybe_save_saves_once_in_every_interval_also_when_steps_are_skipped(tmp_path, small):
    with CheckpointManager(tmp_path, keep_last_n=None, save_interval=10) as manager:
        steps = [1, 5, 9, 12, 15, 19, 20, 21, 45, 49, 50]
        saved = [step for step in steps if manager.maybe_save(small.model, None, step)]
        assert saved == manager.steps() == [12, 20, 45, 50]
        manager.load(20, small.model)
        assert [step for step in (21, 29, 30) if manager.maybe_save(small.model, None, step)] == [30]
    with CheckpointManager(tmp_path, save_interval=10) as manager:
        manager.load_latest(small.model)
        assert not manager.maybe_save(small.model, None, 39)
        assert manager.maybe_save(small.model, None, 40)


def test_maybe_save_saves_when_its_seconds_are_over(tmp_path, small):
    with CheckpointManager(tmp_path, save_interval_seconds=1e-9) as manager:
        assert manager.maybe_save(small.model, None, 1)
    with CheckpointManager(tmp_path, save_interval_seconds=1e9) as manager:
        assert not manager.maybe_save(small.model, None, 2)
    with CheckpointManager(tmp_path) as manager:
        assert not manager.maybe_save(small.model, None, 3)


# -- the manifest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_manifest_names_every_file_and_says_what_the_checkpoint_is(tmp_path, small, backend):
    with CheckpointManager(tmp_path, backend=backend) as manager:
        small.save(manager, 3, {"loss": 0.25})
    place = tmp_path / "step_00000003"
    manifest = decode((place / MANIFEST).read_bytes())
    assert sorted([MANIFEST, *manifest.files]) == files(place) == FILES[backend]
    assert (manifest.step, manifest.sequence, manifest.world_size) == (3, 1, 1)
    assert (manifest.sharded, manifest.metrics, manifest.torch) == (backend == "dcp", {"loss": 0.25}, torch.__version__)
    assert msgspec.to_builtins(manifest) == json.loads((place / MANIFEST).read_text())["manifest"]


def test_a_model_saved_whole_loads_with_either_backend_and_one_saved_in_pieces_too(tmp_path, small):
    for saved in BACKENDS:
        with CheckpointManager(tmp_path / saved, backend=saved) as manager:  # type: ignore[arg-type]
            small.save(manager, 3)
        for loaded in BACKENDS:
            small.set(0)
            with CheckpointManager(tmp_path / saved, backend=loaded) as manager:  # type: ignore[arg-type]
                assert manager.load_latest(small.model, small.optimizer) is not None
            assert small.value == 3
