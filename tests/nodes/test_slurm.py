"""The scripts of configs/slurm as they are, on a real Slurm: runs, crashes, lost nodes, warnings, requeues."""

import re
from pathlib import Path

import pytest

from tests.conftest import Sandbox
from tests.nodes.slurm import Job, Slurm, slurm

__all__ = ["slurm"]

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SCRIPTS = REPOSITORY / "configs" / "slurm"
TRAINER = str(Path(__file__).with_name("slurm_trainer.py"))


THREE = [("3", "n1"), ("3", "n2"), ("3", "n3")]


@pytest.fixture
def cluster(slurm: Slurm, sandbox: Sandbox) -> Slurm:
    """A cluster, and what the scripts expect in the directory of the job."""
    sandbox.script("fault_tolerance: {rank_section_timeouts: {step: 60}}\n", "ft.yaml")
    sandbox.env["RANKS_PER_NODE"] = "1"
    return slurm


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The last line of a training of two ranks that nothing has disturbed."""
    sandbox = Sandbox(tmp_path_factory.mktemp("undisturbed"))
    job = sandbox.launch("--nproc-per-node", "2", TRAINER)
    try:
        assert job.wait() == 0, job.output
        return job.wait_for("finished step")
    finally:
        sandbox.close()


def submit(cluster: Slurm, script: str, *arguments: str, options: tuple[str, ...] = (), **env: str) -> Job:
    return cluster.submit(SCRIPTS / script, TRAINER, *arguments, options=options, **env)


def places(job: Job) -> list[tuple[str, str, str]]:
    """Rank, world size and node of each start of a rank, in the order of their starts."""
    return re.findall(r"start: rank (\d+) of (\d+) on (\w+)", job.output)


def go(sandbox: Sandbox) -> None:
    """Let the ranks go on that wait."""
    (sandbox.path / "go").touch()


def test_one_node_trains_on_after_a_crash(cluster, undisturbed):
    job = submit(cluster, "one_node.sbatch", "--crash-at", "3", RANKS_PER_NODE="2")
    assert job.wait() == {"COMPLETED"}, job
    assert undisturbed in job.output
    assert "restart 1 of 5" in job.output
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_several_nodes_train_with_the_ranks_that_slurm_says(cluster, undisturbed):
    job = submit(cluster, "several_nodes.sbatch")
    assert job.wait() == {"COMPLETED"}, job
    assert sorted(places(job)) == [("0", "2", "n1"), ("1", "2", "n2")]
    assert undisturbed in job.output
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_a_crash_on_one_node_restarts_the_ranks_of_all(cluster, undisturbed):
    job = submit(cluster, "several_nodes.sbatch", "--crash-at", "3")
    assert job.wait() == {"COMPLETED"}, job
    assert sorted(places(job)) == [("0", "2", "n1")] * 2 + [("1", "2", "n2")] * 2, job
    assert undisturbed in job.output
    assert job.records("Restarts") == ["0"]
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_a_job_without_spares_starts_again_on_other_nodes_when_one_is_lost(cluster, sandbox, undisturbed):
    job = submit(cluster, "several_nodes.sbatch", "--wait-at", "4")
    job.wait_for("waits at step 4", count=2)
    cluster.node("n2").kill()
    job.wait_for("waits at step 4", count=4)
    go(sandbox)
    assert job.wait() == {"COMPLETED"}, job
    assert sorted(places(job)[2:]) == [("0", "2", "n1"), ("1", "2", "n3")], job
    assert undisturbed in job.output
    assert job.records("Restarts") == ["1"]


def test_a_spare_takes_the_place_of_a_lost_node(cluster, sandbox, undisturbed):
    job = submit(cluster, "with_spares.sbatch", "--wait-at", "4")
    job.wait_for("waits at step 4", count=2)
    lost = next(node for _, _, node in places(job) if node != "n1")  # on which Slurm runs the script itself
    cluster.node(lost).kill()
    job.wait_for("waits at step 4", count=4)
    go(sandbox)
    assert job.wait() == {"COMPLETED"}, job
    assert {node for _, _, node in places(job)} == {"n1", "n2", "n3"}
    assert undisturbed in job.output
    assert job.records("Restarts") == ["0"]
    cluster.assert_nothing_runs(*{"n1", "n2", "n3"} - {lost})


def test_the_others_go_on_when_the_node_of_the_script_is_lost(cluster, sandbox):
    job = submit(cluster, "with_spares.sbatch", "--wait-at", "4", SPARES="0", MIN_NODES="2")
    job.wait_for("waits at step 4", count=3)
    cluster.node("n1").kill()
    job.wait_for("waits at step 4", count=5)
    assert sorted((world, node) for _, world, node in places(job)) == [("2", "n2"), ("2", "n3"), *THREE], job
    go(sandbox)
    # Without the script nobody can tell Slurm how the job ended: the launchers only give its nodes back.
    assert job.wait() == {"CANCELLED"}, job
    assert "finished step 8" in job.output
    assert job.records("Restarts") == ["0"]
    cluster.assert_nothing_runs("n2", "n3")


@pytest.mark.parametrize("script", ["with_spares.sbatch", "preemption.sbatch"])
def test_a_cancelled_job_saves_and_does_not_come_back(cluster, script):
    job = submit(cluster, script, "--wait-at", "4")
    job.wait_for("waits at step 4", count=2)
    cluster.control("scancel", job.number)
    cluster.assert_nothing_runs("n1", "n2", "n3")
    assert job.wait() == {"CANCELLED"}, job
    assert "from step 4" not in job.output
    assert job.output.count("has saved step 4") == 2, job
    assert job.records("Restarts") == ["0"]


def test_a_job_that_is_pushed_aside_saves_and_comes_back(cluster, sandbox, undisturbed):
    job = submit(cluster, "preemption.sbatch", "--wait-at", "4")
    job.wait_for("waits at step 4", count=2)
    everything = ("--partition=urgent", "--nodes=3", "--exclusive")
    urgent = cluster.submit(Path(sandbox.script("#!/bin/bash\necho urgent\n", "urgent.sbatch")), options=everything)
    job.wait_for("has saved step 4", count=2)
    go(sandbox)
    assert urgent.wait() == {"COMPLETED"}, urgent
    job.wait_for("finished step")
    assert job.wait() == {"COMPLETED"}, job
    assert job.output.count("from step 4") == 2
    assert undisturbed in job.output
    assert job.records("Restarts") == ["1"]
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_a_job_whose_time_is_over_goes_on_until_the_flag_is_there(cluster, sandbox, undisturbed):
    job = submit(cluster, "autoresume.sbatch", "--wait-at", "4")
    job.wait_for("waits at step 4", count=2)
    cluster.control("scancel", "--signal=TERM", job.number)  # as Slurm does it for --signal=TERM@180
    job.wait_for("back to the queue")
    go(sandbox)
    job.wait_for("finished step")
    assert job.wait() == {"COMPLETED"}, job
    assert undisturbed in job.output
    assert (sandbox.path / "train.finished").exists()
    assert job.records("Restarts") == ["1"]
    late = submit(cluster, "autoresume.sbatch", options=("--dependency=singleton",))
    assert late.wait() == {"COMPLETED"}, late
    assert "finished already" in late.output
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_the_elements_of_an_array_go_on_one_after_the_other(cluster, sandbox, undisturbed):
    job = submit(cluster, "autoresume.sbatch", "--wait-at", "4", options=("--array=1-3%1",))
    job.wait_for("waits at step 4", count=2)
    cluster.control("scancel", "--signal=TERM", f"{job.running()}.0")
    job.wait_for("the next element of the array goes on")
    go(sandbox)
    job.wait_for("finished already")
    job.wait()
    assert undisturbed in job.output
    assert job.output.count("finished step") == 1
    assert set(job.records("Restarts")) == {"0"}
    cluster.assert_nothing_runs("n1", "n2", "n3")
