"""A Lightning Trainer whose newest checkpoint is what makes it fail."""

from pathlib import Path

import pytest

TRAINING = str(Path(__file__).with_name("lightning_poisoned.py"))

pytestmark = pytest.mark.timeout(300)


def test_a_training_whose_newest_checkpoint_is_poisoned_goes_on_from_the_one_before_and_finishes(sandbox):
    directory = sandbox.path / "training"
    flags = ("--nproc-per-node", "2", "--max-restarts", "5", "--ft-suspect-after", "2")
    running = sandbox.launch(*flags, TRAINING, str(directory))
    assert running.wait() == 0, running.output
    poisoned, sound = f"{directory}/last.ckpt (step 12)", f"{directory}/epoch=1.ckpt (step 8)"
    resumed = [line.partition("resumed from ")[2] for line in running.lines if "ft_launcher: resumed from " in line]
    assert resumed == ["the beginning", poisoned, poisoned, sound]
    # Not the copy of the suspect, which has the same step.
    assert f"suspect; the next one is told to use {sound}" in running.output
    assert running.output.count(f"last.ckpt is suspect; loading {directory}/epoch=1.ckpt instead") == 1
    for rank in (0, 1):
        assert [line[-1] for line in running.lines if line.startswith(f"rank {rank} epoch")][-2:] == ["2", "3"]
    assert "finished step 16" in running.output
    sandbox.assert_clean()
