"""Gangs of Ray actors under a real Ray and a real gloo: one member fails, all start anew."""

import os
import signal
import threading
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from ray.exceptions import RayActorError

from ft_launcher.errors import UsageError
from ft_launcher.integrations.ray_actors import (
    ActorGang,
    ActorMetrics,
    GangRestartedError,
    Limits,
    RayFaultToleranceConfig,
    RestartsExhaustedError,
    torch_process_group,
)
from tests.ray_local import local_ray
from tests.test_fault_tolerance_integration import Notes, kill, wait_until

CONFIG = RayFaultToleranceConfig()
STEPS, SAVED_EVERY = 8, 3


@pytest.fixture(scope="module", autouse=True)
def a_ray():
    with local_ray():
        yield


@pytest.fixture
def notes(tmp_path):
    return Notes(tmp_path)


class Trainer:
    """Fits a line with the mean of all ranks' gradients; saves every few steps."""

    def __init__(self, notes, faults=()):
        import torch

        self.torch = torch
        self.notes, self.faults = notes, dict(faults)
        self.weight = torch.zeros(3, dtype=torch.float64)
        notes.add("pids", os.getpid())

    def restore(self):
        path = self.notes.directory / "checkpoint.pt"
        if not path.exists():
            return 0
        state = self.torch.load(path, weights_only=True)
        self.weight = state["weight"]
        return state["step"]

    def train(self, step):
        import torch.distributed as dist

        rank = dist.get_rank()
        fault = self.faults.get(f"{rank}:{step}")
        if fault is not None and not self.notes.read(fault):
            self.notes.add(fault, os.getpid())
            FAULTS[fault]()
        generator = self.torch.Generator().manual_seed(1000 * step + rank)
        sample = self.torch.randn(3, dtype=self.torch.float64, generator=generator)
        gradient = (self.weight @ sample - sample.sum()) * sample
        dist.all_reduce(gradient)
        self.weight -= 0.1 * gradient
        if rank == 0:
            self.notes.add("steps", step)
            if (step + 1) % SAVED_EVERY == 0:
                path = self.notes.directory / "checkpoint.pt"
                self.torch.save({"weight": self.weight, "step": step + 1}, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").rename(path)
        return self.weight.tolist()


def fail():
    raise RuntimeError("uncorrectable")


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: threading.Event().wait(),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": fail,
}


def restore(trainer):
    return trainer.restore()


def gang_of(notes, faults=(), size=2, **settings):
    settings.setdefault("config", CONFIG)
    return ActorGang(
        Trainer, size, (notes, faults), role="actor_rollout", setup=torch_process_group(), restore=restore, **settings
    )


def train(gang):
    weights: list[list[float]] = []

    def do(step):
        weights[:] = gang.call("train", step)

    gang.run(do, STEPS)
    assert weights[0] == weights[1]
    return weights[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with gang_of(Notes(tmp_path_factory.mktemp("undisturbed"))) as gang:
        return train(gang)


LIMITS = Limits(ping_every=0.2, ping_timeout=3, missed_pings=2, calls={"train": 15})


@pytest.mark.parametrize(
    ("fault", "where", "resumed_at"),
    [("kill", "1:4", 3), ("kill", "0:2", 0), ("hang", "1:4", 3), ("stop", "0:7", 6), ("raise", "1:4", 3)],
)
def test_Y9_a_gang_that_loses_a_member_resumes_at_the_last_saved_step_and_ends_with_the_same_weights(
    notes, undisturbed, fault, where, resumed_at
):
    metrics = ActorMetrics(roles=("actor_rollout",))
    with gang_of(notes, {where: fault}, metrics=metrics, limits=LIMITS) as gang:
        assert train(gang) == undisturbed
        assert gang.restarts == 1
        assert len(set(notes.read("pids"))) == 4  # all of them are new
    step = int(where.partition(":")[2])
    assert notes.read("steps") == [str(each) for each in (*range(step), *range(resumed_at, STEPS))]
    emitted = metrics.emit(1)
    assert (emitted["actor_failures/total"], emitted["actor_restarts/total"]) == (1, 1)


def test_a_gang_that_was_lost_between_two_calls_says_so_to_the_next_one(notes):
    with gang_of(notes) as gang:
        assert gang.ready() == 0
        for step in range(4):
            gang.call("train", step)
        first = gang.pids
        kill(first[1])
        wait_until(lambda: gang.is_healthy and not set(gang.pids) & set(first))
        assert gang.check().result() is True
        with pytest.raises(GangRestartedError, match=r"rank 1 \(pid .*at step 3") as raised:
            gang.call("train", 4)
        assert raised.value.step == 3
        gang.call("train", 3)
        assert notes.read("steps") == ["0", "1", "2", "3", "3"]


def test_a_gang_has_one_budget_and_each_rendezvous_its_own_port(notes):
    def note(trainer, rendezvous):
        trainer.notes.add("ports", rendezvous.master_port)
        trainer.notes.add("restarts", rendezvous.restart)

    config = RayFaultToleranceConfig(max_restarts=2)
    with ActorGang(Trainer, 2, (notes,), config=config, setup=note, role="critic") as gang:
        gang.ready(60)
        for _ in range(2):
            kill(gang.pids[0])
            with pytest.raises(GangRestartedError):
                gang.call("restore")
        kill(gang.pids[1])
        with pytest.raises(RestartsExhaustedError, match=r"critic: rank 1 .*no restart left of 2"):
            gang.call("restore")
        with pytest.raises(RestartsExhaustedError):
            gang.call("restore")
    assert sorted(notes.read("restarts")) == ["0", "0", "1", "1", "2", "2"]
    assert len(set(notes.read("ports"))) == 3
    assert len(set(notes.read("pids"))) == 6


def test_members_that_were_restored_at_different_steps_are_not_let_train(notes):
    def restore_apart(trainer):
        return int(os.environ["RANK"])

    config = RayFaultToleranceConfig(max_restarts=1)
    with (
        ActorGang(Trainer, 2, (notes,), config=config, restore=restore_apart) as gang,
        pytest.raises(RestartsExhaustedError, match="different steps: rank 0 at 0, rank 1 at 1; no restart left of 1"),
    ):
        gang.ready(60)


def test_a_setup_that_raises_the_first_time_is_the_callers_error(notes):
    def refuse(trainer, rendezvous):
        raise ValueError("no such backend")

    with (
        ActorGang(Trainer, 2, (notes,), config=CONFIG, setup=refuse) as gang,
        pytest.raises(ValueError, match="no such backend"),
    ):
        gang.ready(60)


def test_a_closed_gang_leaves_no_process_and_gives_its_places_back(notes):
    gang = gang_of(notes)
    gang.ready()
    pids = gang.pids
    assert ray.available_resources()["CPU"] == 2
    waiting = gang.submit("train", 0)
    gang.close()
    wait_until(lambda: waiting.done())
    with pytest.raises(RayActorError, match="closed"):
        gang.call("train", 0)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    wait_until(lambda: ray.available_resources().get("CPU") == 4)


def test_a_gang_of_nobody_is_refused():
    with pytest.raises(UsageError, match="size=0: must be 1 or more"):
        ActorGang(Trainer, 0, config=CONFIG)
