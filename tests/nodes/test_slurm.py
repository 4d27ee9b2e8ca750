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

QUESTIONS = 10**6
"""So many numbers has a step of the trainer, as it asks on while it waits."""

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
    assert job.wait() == {"COMPLETED"}
    assert undisturbed in job.output
    assert "restart 1 of 5" in job.output
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_several_nodes_train_with_the_ranks_that_slurm_says(cluster, undisturbed):
    job = submit(cluster, "several_nodes.sbatch")
    assert job.wait() == {"COMPLETED"}
    assert sorted(places(job)) == [("0", "2", "n1"), ("1", "2", "n2")]
    assert undisturbed in job.output
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_a_crash_on_one_node_restarts_the_ranks_of_all(cluster, undisturbed):
    job = submit(cluster, "several_nodes.sbatch", "--crash-at", "3")
    assert job.wait() == {"COMPLETED"}
    assert sorted(places(job)) == [("0", "2", "n1")] * 2 + [("1", "2", "n2")] * 2
    assert undisturbed in job.output
    assert job.records("Restarts") == ["0"]
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_a_job_without_spares_starts_again_on_other_nodes_when_one_is_lost(cluster, sandbox, undisturbed):
    job = submit(cluster, "several_nodes.sbatch", "--wait-at", "4")
    job.wait_for("waits at step 4", count=2)
    cluster.node("n2").kill()
    job.wait_for("waits at step 4", count=4)
    go(sandbox)
    assert job.wait() == {"COMPLETED"}
    assert sorted(places(job)[2:]) == [("0", "2", "n1"), ("1", "2", "n3")]
    assert undisturbed in job.output
    assert job.records("Restarts") == ["1"]


def test_a_spare_takes_the_place_of_a_lost_node(cluster, sandbox, undisturbed):
    job = submit(cluster, "with_spares.sbatch", "--wait-at", "4")
    job.wait_for("waits at step 4", count=2)
    lost = next(node for _, _, node in places(job) if node != "n1")  # on which Slurm runs the script itself
    cluster.node(lost).kill()
    job.wait_for("waits at step 4", count=4)
    go(sandbox)
    assert job.wait() == {"COMPLETED"}
    assert {node for _, _, node in places(job)} == {"n1", "n2", "n3"}
    assert undisturbed in job.output
    assert job.records("Restarts") == ["0"]
    cluster.assert_nothing_runs(*{"n1", "n2", "n3"} - {lost})


def test_the_others_go_on_when_the_node_of_the_script_is_lost(cluster, sandbox):
    job = submit(cluster, "with_spares.sbatch", "--wait-at", "4", SPARES="0", MIN_NODES="2")
    job.wait_for("waits at step 4", count=3)
    cluster.node("n1").kill()
    job.wait_for("waits at step 4", count=5)
    assert sorted((world, node) for _, world, node in places(job)) == [("2", "n2"), ("2", "n3"), *THREE]
    go(sandbox)
    # Without the script nobody can tell Slurm how the job ended: the launchers only give its nodes back.
    assert job.wait() == {"CANCELLED"}
    assert "finished step 8" in job.output
    assert job.records("Restarts") == ["0"]
    cluster.assert_nothing_runs("n2", "n3")


@pytest.mark.parametrize("script", ["several_nodes.sbatch", "autoresume.sbatch"])
def test_a_cancelled_job_saves_and_does_not_come_back(cluster, sandbox, script):
    """Its ranks listen and live on after SIGTERM, so that its launchers end with 75.

    The script, too, lives on: it would if the ranks had saved before its SIGTERM came, which Slurm sends last.
    """
    before = sandbox.script("trap : TERM\n", "before.sh")
    job = submit(cluster, script, "--wait-at", "4", "--ignore-term", BASH_ENV=before)
    job.wait_for("waits at step 4", count=2)
    cluster.control("scancel", job.number)
    cluster.assert_nothing_runs("n1", "n2", "n3")
    assert job.wait() == {"CANCELLED"}
    assert_all_saved(job)
    assert "from step 4" not in job.output
    assert job.records("Restarts") == ["0"]


def test_a_cancelled_job_ends_whose_ranks_die_of_sigterm(cluster):
    job = submit(cluster, "with_spares.sbatch", "--wait-at", "4")
    job.wait_for("waits at step 4", count=2)
    cluster.control("scancel", job.number)
    cluster.assert_nothing_runs("n1", "n2", "n3")
    assert job.wait() == {"CANCELLED"}
    assert job.records("Restarts") == ["0"]


def test_a_cancelled_job_does_not_come_back_though_the_node_of_its_script_is_lost(cluster):
    job = submit(cluster, "with_spares.sbatch", "--wait-at", "4", "--ignore-term", SPARES="0", MIN_NODES="2")
    job.wait_for("waits at step 4", count=3)
    cluster.node("n1").kill()
    job.wait_for("waits at step 4", count=5)
    cluster.control("scancel", job.number)
    cluster.assert_nothing_runs("n2", "n3")
    assert job.wait() == {"CANCELLED"}
    assert_all_saved(job)
    assert job.records("Restarts") == ["0"]


def test_a_job_that_is_pushed_aside_saves_and_comes_back(cluster, sandbox, undisturbed):
    job = submit(cluster, "with_spares.sbatch", "--wait-at", "4")
    job.wait_for("waits at step 4", count=2)
    everything = ("--partition=urgent", "--nodes=3", "--exclusive")
    urgent = cluster.submit(Path(sandbox.script("#!/bin/bash\necho urgent\n", "urgent.sbatch")), options=everything)
    job.wait_for("back to the queue")
    assert_all_saved(job)
    go(sandbox)
    assert urgent.wait() == {"COMPLETED"}
    assert_finishes_from_step_4(job, undisturbed)
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_P9_a_job_saves_on_the_warning_of_its_end_and_goes_on_from_there(cluster, sandbox, undisturbed):
    job = submit(cluster, "several_nodes.sbatch", "--wait-at", "4")
    job.wait_for("waits at step 4", count=2)
    # Slurm looks every 30 s whose time is over in less than that and the 180 s of --signal: it warns at its next look.
    set_time_limit(cluster, job, minutes=3)
    job.wait_for("back to the queue")
    assert_all_saved(job)
    set_time_limit(cluster, job, minutes=60)  # or the next start, too, would be warned at once
    go(sandbox)
    assert_finishes_from_step_4(job, undisturbed)
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_a_warning_ends_nothing_that_is_still_starting(cluster, undisturbed):
    job = submit(cluster, "with_spares.sbatch")  # which has a shell around each launcher
    for name in ("n1", "n2", "n3"):
        cluster.wait_until(lambda name=name: has_launcher(cluster, name), lambda name=name: f"a launcher on {name}")
    warn(cluster, job)
    # One that hears it nevertheless has its ranks save, and they begin again.
    assert job.wait() == {"COMPLETED"}
    assert undisturbed in job.output
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_one_node_saves_on_a_warning_and_goes_on_from_there(cluster, sandbox, undisturbed):
    job = submit(cluster, "one_node.sbatch", "--wait-at", "4", RANKS_PER_NODE="2")
    job.wait_for("waits at step 4", count=2)
    warn(cluster, job)
    job.wait_for("back to the queue")
    assert_all_saved(job)
    go(sandbox)
    assert_finishes_from_step_4(job, undisturbed)
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_a_job_goes_on_after_warnings_until_the_flag_is_there(cluster, sandbox, undisturbed):
    job = submit(cluster, "autoresume.sbatch", "--wait-at", "4")
    job.wait_for("waits at step 4", count=2)
    warn(cluster, job)
    job.wait_for("the last of which ended with 75; back to the queue")
    assert_all_saved(job)
    go(sandbox)
    assert_finishes_from_step_4(job, undisturbed)
    assert (sandbox.path / "train.finished").exists()
    late = submit(cluster, "autoresume.sbatch", options=("--dependency=singleton",))
    assert late.wait() == {"COMPLETED"}
    assert "finished already" in late.output
    cluster.assert_nothing_runs("n1", "n2", "n3")


def test_the_elements_of_an_array_go_on_one_after_the_other(cluster, sandbox, undisturbed):
    job = submit(cluster, "autoresume.sbatch", "--wait-at", "4", options=("--array=1-3%1",))
    job.wait_for("waits at step 4", count=2)
    warn(cluster, job)
    job.wait_for("the next element of the array goes on")
    assert_all_saved(job)
    go(sandbox)
    job.wait_for("finished already")
    job.wait()
    assert job.records("ExitCode").count("75:0") == 1
    assert job.output.count("from step 4") == 2
    assert undisturbed in job.output
    assert job.output.count("finished step") == 1
    assert set(job.records("Restarts")) == {"0"}
    cluster.assert_nothing_runs("n1", "n2", "n3")


def warn(cluster: Slurm, job: Job) -> None:
    """Send what --signal=USR1@180 has Slurm send, to the same processes."""
    # Of the step: for an element of an array as a whole, Slurm 22.05 sends it and says that it could not.
    cluster.control("scancel", "--signal=USR1", f"{job.running()}.0")


def has_launcher(cluster: Slurm, name: str) -> bool:
    return any("bin/ft_launcher --nnodes" in command for command in cluster.node(name).processes())


def set_time_limit(cluster: Slurm, job: Job, *, minutes: int) -> None:
    cluster.control("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")


def assert_all_saved(job: Job) -> None:
    """Both ranks of the first start have saved step 4, and no more; so the launchers say too."""
    assert job.output.count("was warned, and has saved step 4") == 2
    said = set(re.findall(r"preempted \(.*\): saved at step (\d+); exit code 75", job.output))
    assert len(said) == 1
    assert int(said.pop()) // QUESTIONS == 4
    assert "restart 1 of" not in job.output


def assert_finishes_from_step_4(job: Job, undisturbed: str) -> None:
    """The second start has begun with what the first one has saved for the warning."""
    job.wait_for("finished step")
    assert job.wait() == {"COMPLETED"}
    assert job.output.count("from step 4") == 2
    assert undisturbed in job.output
    assert job.records("Restarts") == ["1"]
