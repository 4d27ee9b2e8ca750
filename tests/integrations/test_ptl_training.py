"""A Lightning Trainer on two ranks, with each callback: it survives every fault, and learns its timeouts."""

import re

import pytest

from ft_launcher.integrations.progress import LEAST_SECONDS
from tests.integrations.conftest import (
    assert_sections_learned_limit_the_next_run,
    lightning,
    result,
    train_disturbed,
    train_preempted,
    train_undisturbed,
)

pytestmark = pytest.mark.timeout(900)  # of which the shared trainings take what the machine needs


@pytest.fixture(scope="module")
def undisturbed(new_sandbox):
    """The last line of a training to which nothing happened."""
    return result(train_undisturbed(lightning(new_sandbox()), "--epochs", "7"))


def disturbed(new_sandbox, monitoring, package):
    return train_disturbed(
        lightning(new_sandbox(), package),
        *("--epochs", "7", "--epochs-per-run", "4"),
        *("--monitoring", monitoring, "--autoresume", "--calculate-timeouts"),
        *("--fault", "hang:rank=0,step=18,restart=0"),
        *("--fault", "kill:rank=1,step=22,restart=1"),
        *("--validation-fault", "hang:rank=1,step=24,restart=2"),
        *("--saving-fault", "hang:rank=0,step=28,restart=3"),
        in_first_run=["--step-time", "0.65"],
    )


@pytest.fixture(scope="module")
def with_sections(new_sandbox):
    return disturbed(new_sandbox, "sections", "lightning")


@pytest.fixture(scope="module")
def with_heartbeats(new_sandbox):
    return disturbed(new_sandbox, "heartbeats", "pytorch_lightning")


@pytest.fixture(params=["with_sections", "with_heartbeats"])
def trained(request):
    return request.getfixturevalue(request.param)


def test_a_training_that_fails_in_every_phase_ends_with_the_parameters_of_an_undisturbed_one(trained, undisturbed):
    resumed = [line for line in trained.output.splitlines() if line.startswith("resumed from")]
    assert resumed == [f"resumed from step {step}" for step in (16, 16, 20, 20, 24)]
    assert trained.result == undisturbed


def test_the_loop_of_a_job_script_goes_on_after_a_graceful_stop_and_ends_at_the_finished_flag(trained):
    ends = [line for line in trained.output.splitlines() if line.startswith(("run ", "finished after"))]
    assert ends == ["run 1 ended orderly", "run 2 ended orderly", "finished after 2 runs: max_epochs=7 reached"]


def test_the_sections_learned_in_one_run_limit_the_next_one(with_sections):
    assert_sections_learned_limit_the_next_run(with_sections)


def test_the_heartbeats_learned_in_one_run_limit_the_next_one(with_heartbeats):
    first, second = (state["current_timeouts"]["heartbeat"] for state in with_heartbeats.learned)
    assert first["were_calculated"]
    assert first["initial"] == 100  # until a run has loaded a checkpoint
    assert LEAST_SECONDS <= second["initial"] != 100
    assert 5 * 0.65 <= first["subsequent"] != 100
    kills = with_heartbeats.kills()
    assert {rank for rank, _, _ in kills} == {"0", "1"}
    assert kills[0][1:] == ("no heartbeat", pytest.approx(first["subsequent"], rel=0.01))
    assert 100 not in [seconds for _, _, seconds in kills]


@pytest.mark.parametrize(("monitoring", "package"), [("sections", "pytorch_lightning"), ("heartbeats", "lightning")])
def test_a_training_that_is_preempted_saves_and_goes_on_where_it_saved(new_sandbox, monitoring, package):
    training = lightning(new_sandbox(), package)
    preempted, resumed = train_preempted(training, "--epochs", "7", "--monitoring", monitoring)
    saved = re.search(r"saved .*/last-preempted\.ckpt at step (\d+)", preempted)
    assert saved, preempted
    assert "exit code 75: run again" in preempted
    assert f"resumed from step {saved[1]}" in resumed
    # Not the same bits: Lightning begins the epoch anew, with other batches, unless the loader can tell its state.
    assert result(resumed)
