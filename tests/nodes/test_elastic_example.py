"""The elastic example: nodes come and go, a rank is killed, and what was trained on is what should have been."""

import os
import re
import runpy
import signal
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest

from ft_launcher.checkpoint import ResumableSampler
from tests.conftest import Running

REPOSITORY = Path(__file__).resolve().parent.parent.parent
EXAMPLE = str(REPOSITORY / "examples" / "elastic_training.py")
LIMITS = ("--ft-cfg-path", str(REPOSITORY / "configs" / "ft.yaml"))

INTERVAL = 4  # steps from one checkpoint to the next
BATCH, SAMPLES = 120, 1440  # of the example
EPOCH = SAMPLES // BATCH

Timeline = list[dict[int, list[int]]]
"""By rounds: the samples that all ranks together trained on, by steps."""


@pytest.fixture
def job(local_job):
    return local_job


def recorded(directory: Path) -> Timeline:
    rounds: dict[int, dict[int, list[int]]] = {}
    for path in directory.iterdir():
        steps = rounds.setdefault(int(path.name.split("-")[1]), {})
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # it was killed while it wrote the last one
                step, samples = line.split(":")
                steps.setdefault(int(step), []).extend(map(int, samples.split()))
    return [rounds[each] for each in sorted(rounds)]


def kept(timeline: Timeline) -> dict[int, list[int]]:
    """Give what was trained on at each step that counts, and assert that no round has thrown away too much."""
    steps: dict[int, list[int]] = {}
    for one in timeline:
        begin = min(one)
        assert sorted(one) == list(range(begin, max(one) + 1))
        assert begin <= max(steps, default=0) + 1, "a step was left out"
        thrown_away = [step for step in steps if step >= begin]
        assert len(thrown_away) <= INTERVAL
        for step in thrown_away:
            del steps[step]
        steps |= one
    return steps


def wait_for_steps(running: Running) -> None:
    """Wait until an epoch more was trained on: the example says so at every fifth step."""
    said = sum(" loss " in line for line in running.lines)
    running.wait_for(" loss ", count=said + EPOCH // 5 + 1)


def test_L2_from_one_node_to_two_and_back_every_sample_is_trained_on_once_in_an_epoch(job):
    record, checkpoints = job.directory / "record", job.directory / "checkpoints"
    options = ["--steps", "1000000", "--step-time", "0.03", "--checkpoint-every", str(INTERVAL)]
    options += ["--record", str(record), "--checkpoint-dir", str(checkpoints)]
    job.plan(*LIMITS, nodes="1:2", restarts=3, last_call_timeout="1", work=[EXAMPLE, *options])
    first = job.start("node1")
    first.wait_for("step 5 ")
    second = job.start("node2")
    first.wait_for("with 2 ranks")
    wait_for_steps(first)
    second.send(signal.SIGKILL)
    first.wait_for("with 1 ranks", count=2)
    wait_for_steps(first)
    first.send(signal.SIGTERM)
    job.assert_ends(node1=os.EX_TEMPFAIL, node2=-signal.SIGKILL)

    timeline = recorded(record)
    ranks = Counter(int(path.name.split("-")[1]) for path in record.iterdir())
    assert [count for count, _ in groupby(ranks[each] for each in sorted(ranks))] == [1, 2, 1]
    begins = [min(each) for each in timeline]
    assert begins == sorted(begins)
    steps = kept(timeline)
    last = max(steps)
    assert sorted(steps) == list(range(1, last + 1))
    assert last > EPOCH
    for begin in range(1, last + 1, EPOCH):
        epoch = [steps[step] for step in range(begin, min(begin + EPOCH, last + 1))]
        assert {len(batch) for batch in epoch} == {BATCH}
        assert len({sample for batch in epoch for sample in batch}) == BATCH * len(epoch)
    # A notice throws nothing away.
    assert (checkpoints / f"step_{last:08d}").is_dir()


def test_L1_a_training_whose_rank_is_killed_ends_with_the_loss_of_an_undisturbed_one(sandbox):
    jobs = []
    for name, pause in (("disturbed", "0.2"), ("undisturbed", "0")):
        flags = ("--nproc-per-node", "2", "--max-restarts", "3", "--log-dir", name + "-logs", *LIMITS)
        options = ("--steps", "20", "--step-time", pause, "--checkpoint-every", str(INTERVAL))
        # Torch makes that directory in every process that trains, wherever it is told to.
        env = {"TORCHINDUCTOR_CACHE_DIR": str(sandbox.path / "inductor")}
        jobs.append(sandbox.launch(*flags, EXAMPLE, *options, "--checkpoint-dir", str(sandbox.path / name), **env))
    disturbed = jobs[0]
    found = re.search(r"rank 1 \(pid (\d+)\)", disturbed.wait_for("started rank 0"))
    assert found
    disturbed.wait_for("step 5 loss")
    os.kill(int(found[1]), signal.SIGKILL)
    disturbed.wait_for("restart 1 of 3")
    assert "from step 0 on" not in disturbed.wait_for("on with 2 ranks", count=2)
    ends = []
    for each in jobs:
        assert each.wait() == 0, each.output
        ends.append(each.wait_for("finished step 20 loss"))
    assert ends[0] == ends[1]
    assert "restart 2" not in disturbed.output
    sandbox.assert_clean()


@pytest.mark.parametrize("position", [0, 2 * BATCH])
def test_any_number_of_ranks_shares_the_same_batches(position):
    shares = runpy.run_path(EXAMPLE)["Shares"]
    for world_size in range(1, 12):
        batches: list[list[int]] = [[] for _ in range((SAMPLES - position) // BATCH)]
        sizes = []
        for rank in range(world_size):
            sampler = ResumableSampler(SAMPLES, rank=rank, world_size=world_size, drop_last=False)
            sampler.advance(position)
            mine = list(shares(sampler, rank, world_size))
            sizes += [len(each) for each in mine]
            for batch, share in zip(batches, mine, strict=True):
                batch += share
        assert max(sizes) - min(sizes) <= 1
        alone = ResumableSampler(SAMPLES, rank=0, world_size=1)
        alone.advance(position)
        order = list(alone)
        assert [sorted(each) for each in batches] == [
            sorted(order[begin : begin + BATCH]) for begin in range(0, len(order), BATCH)
        ]
