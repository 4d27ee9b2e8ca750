"""A Trainer of Hugging Face on two ranks: it survives every fault, and learns its timeouts."""

import json
import re

import pytest

from ft_launcher.integrations.hf_trainer import COMPLETE, last_checkpoint
from ft_launcher.integrations.progress import LEAST_SECONDS
from tests.integrations.conftest import (
    assert_sections_learned_limit_the_next_run,
    hugging_face,
    result,
    train_disturbed,
    train_preempted,
    train_undisturbed,
)

pytestmark = pytest.mark.timeout(900)  # of which the shared trainings take what the machine needs


@pytest.fixture(scope="module")
def undisturbed(new_sandbox):
    """What a training, watched by its heartbeats, to which nothing happened has said, and what it has learned."""
    training = hugging_face(new_sandbox())
    output = train_undisturbed(training, "--callback", json.dumps({"calculate_timeouts": True}), sections=None)
    return output, json.loads((training.sandbox.path / "training" / "ft_state" / "_ft_state.json").read_text())


@pytest.fixture(scope="module")
def trained(new_sandbox):
    return train_disturbed(
        hugging_face(new_sandbox()),
        *("--callback", json.dumps({"autoresume": True, "calculate_timeouts": True})),
        *("--steps-per-run", "17"),
        *("--fault", "hang@step:rank=0,step=18,restart=0"),
        *("--fault", "kill@step:rank=1,step=22,restart=1"),
        *("--fault", "hang@validation:rank=1,step=24,restart=2"),
        *("--fault", "hang@saving:rank=0,step=28,restart=3"),
        in_first_run=["--step-time", "0.65"],
    )


def test_a_training_that_fails_in_every_phase_ends_with_the_parameters_of_an_undisturbed_one(trained, undisturbed):
    resumed = [line.rpartition("-")[2] for line in trained.output.splitlines() if line.startswith("resuming from")]
    # The last start finds checkpoint 28 too, which has its name and no optimizer.
    assert resumed[1:] == ["16", "16", "20", "20", "24"]
    assert trained.result == result(undisturbed[0])


def test_the_loop_of_a_job_script_ends_at_the_finished_flag(trained):
    ends = [line for line in trained.output.splitlines() if line.startswith(("run ", "finished after"))]
    assert ends == ["run 1 ended orderly", "run 2 ended orderly", "finished after 2 runs: max_steps=28 reached"]


def test_the_sections_learned_in_one_run_limit_the_next_one(trained):
    assert_sections_learned_limit_the_next_run(trained)


def test_heartbeats_are_sent_and_learned_from_where_no_sections_are_configured(undisturbed):
    learned = undisturbed[1]["current_timeouts"]
    assert learned["heartbeat"]["were_calculated"]
    assert LEAST_SECONDS <= learned["heartbeat"]["subsequent"] != 100
    assert learned["heartbeat"]["initial"] == 100
    assert learned["section"]["calculated_sections"] == []


def test_the_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (8, 16, 100, 112):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_checkpoint(tmp_path) is None
    for step in (8, 100, 16):
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


POISONED = """
import os, sys
from ft_launcher.integrations.hf_trainer import last_checkpoint
last = last_checkpoint("run")
print("goes on from", last, flush=True)
os._exit(last == os.path.join("run", "checkpoint-16"))
"""


def test_a_checkpoint_from_which_ranks_fail_again_and_again_is_left_out(sandbox):
    for step in (8, 16):
        (sandbox.path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        (sandbox.path / "run" / f"checkpoint-{step}" / COMPLETE).touch()
    running = sandbox.launch("--max-restarts", "3", "--ft-suspect-after", "2", sandbox.script(POISONED))
    assert running.wait() == 0, running.output
    given = [line.rpartition("-")[2] for line in running.lines if line.startswith("goes on from run/checkpoint-")]
    assert given == ["16", "16", "8"]
    sandbox.assert_clean()


def test_a_training_that_is_preempted_saves_and_goes_on_where_it_saved(new_sandbox, undisturbed):
    preempted, resumed = train_preempted(hugging_face(new_sandbox()))
    assert re.search(r"saved .*/checkpoint-\d+, before the machine is taken away", preempted), preempted
    assert "exit code 75: run again" in preempted
    assert result(resumed) == result(undisturbed[0])
