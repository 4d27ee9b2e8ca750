"""What the Lightning callbacks tell ft_launcher, whatever happens in a Trainer."""

import logging
import re
import sys
from pathlib import Path

import pytest

from ft_launcher.integrations.simulated_faults import SimulatedFaultParams, simulate
from tests.integrations.conftest import LIMITS

CASES = str(Path(__file__).with_name("lightning_cases.py"))

STEP = "+step -step"
SAVE = "+checkpointing -checkpointing"
FITTED = f"+setup -setup {STEP} {STEP} {STEP} {STEP} {SAVE} shutdown"  # a sanity check, two steps, validation, a save


def launch(sandbox, mode, *flags, sections=LIMITS, **env):
    """Run the cases of a mode."""
    (sandbox.path / "cases").mkdir()
    (sandbox.path / "ft.yaml").write_text(f"fault_tolerance:\n  rank_section_timeouts: {sections}\n")
    flags = ("--ft-cfg-path", str(sandbox.path / "ft.yaml"), "--log-dir", str(sandbox.path / "logs"), *flags)
    return sandbox.launch(*flags, CASES, mode, str(sandbox.path / "cases"), **env)


def told(output):
    return dict(re.findall(r"^case (.+?): (.*)$", output, re.MULTILINE))


def test_every_section_is_closed_whatever_ends_it_and_the_flag_is_made_when_nothing_is_left(sandbox):
    running = launch(sandbox, "cases", FAULT_TOL_FINISHED_FLAG_FILE=str(sandbox.path / "flag"))
    assert running.wait() == 0, running.output
    begun = f"+setup -setup {STEP}"
    cases = told(running.output)
    beats = cases.pop("heartbeats").split()
    assert beats == ["beat"] * (len(beats) - 1) + ["shutdown"]
    assert len(beats) > 8
    assert cases == {
        "fit": FITTED,
        "weights only": FITTED,
        "skipped epoch": f"{begun} {STEP} {STEP} {SAVE} shutdown",
        "save in a step": f"{begun} {STEP} {SAVE} {STEP} {STEP} {SAVE} {STEP} {STEP} {SAVE} shutdown",
        "validate": f"+setup -setup {STEP} {STEP} shutdown",
        "test": f"+setup -setup {STEP} {STEP} shutdown",
        "predict": f"+setup -setup {STEP} {STEP} shutdown",
        "error in a step": f"{begun} +step abort asked -step shutdown RuntimeError",
        "error in validation": f"{begun} {STEP} {STEP} +step abort -step shutdown RuntimeError",
        "error in a save": f"{begun} {STEP} {STEP} {STEP} {SAVE} abort shutdown RuntimeError",
        "error in a hook": f"{begun} {STEP} abort shutdown RuntimeError",
        "graceful stop": f"{begun} {STEP} shutdown SystemExit",
        "exit with a code": f"{begun} {STEP} abort asked shutdown SystemExit",
        "Ctrl-C": f"{begun} {STEP} abort shutdown SystemExit",  # Lightning's, for the KeyboardInterrupt
        "policy that fails": f"{begun} {STEP} abort asked shutdown RuntimeError",
        "policy of nonsense": f"{begun} {STEP} abort asked shutdown RuntimeError",
        "complete by epochs": f"{FITTED} flag: max_epochs=1 reached",
        "complete by steps": cases["complete by steps"],
        "complete by early stopping": cases["complete by early stopping"],
        "nothing left": f"{begun} shutdown flag: nothing was left to train",
        "time was over": f"{begun} shutdown flag: nothing was left to train",
        "early exit of NeMo's timer": f"{begun} +step -step shutdown",
        "exit of NeMo's timer": f"{begun} {STEP} shutdown",
        "other package": f"+setup -setup {STEP} {STEP} shutdown",
    }
    assert cases["complete by steps"].endswith("shutdown flag: max_steps=3 reached")
    assert cases["complete by early stopping"].endswith("shutdown flag: stopped early")
    sandbox.assert_clean()


def test_a_configuration_that_does_not_fit_is_an_error_that_says_what_is_missing(sandbox):
    flags = ("--ft-rank-heartbeat-timeout", "null", "--ft-initial-rank-heartbeat-timeout", "null")
    running = launch(sandbox, "misfits", *flags, sections="{setup: 100, step: 100, data: 100}")
    assert running.wait() == 0, running.output
    cases = told(running.output)
    assert cases["sections"].endswith(
        "shutdown ValueError: rank_section_timeouts must have the sections checkpointing, setup, step and no other; "
        "it has data, setup, step"
    )
    assert "shutdown ValueError: nothing would watch the heartbeats: set initial_rank" in cases["heartbeats"]
    assert "shutdown ValueError: autoresume=True needs the variable FAULT_TOL_FINISHED_FLAG_FILE" in cases["flag"]
    assert "shutdown ValueError: calculated timeouts are kept in a local file" in cases["directory"]
    sandbox.assert_clean()


def test_a_policy_ends_the_job_and_the_loop_around_it(sandbox):
    flag = sandbox.path / "flag"
    running = launch(sandbox, "request", "--max-restarts", "3", FAULT_TOL_FINISHED_FLAG_FILE=str(flag))
    assert running.wait() == 1, running.output
    assert running.wait_for("asks: ShutdownWorkload ('the loss is NaN')")
    assert "restart 1" not in running.output
    assert flag.read_text() == "shut down: the loss is NaN\n"
    sandbox.assert_clean()


def test_simulated_faults_happen_and_are_survived(sandbox):
    # It may fall on any moment: between the sections the ranks wait for each other too.
    flags = ("--nproc-per-node", "2", "--max-restarts", "3", "--ft-rank-out-of-section-timeout", "5")
    running = launch(sandbox, "simulated", *flags, sections="{setup: 5, step: 5, checkpointing: 5}")
    assert "rank_killed at rank 1" in running.wait_for("simulated fault:")
    assert "killed by signal 9" in running.wait_for("ft_launcher: rank 1")
    assert "rank_hung at rank " in running.wait_for("simulated fault:", count=2)
    running.wait_for("restart 2 of 3")
    assert running.wait() == 0, running.output
    assert running.output.count("simulated fault:") == 2
    assert "timeout 5 s; killing" in running.output
    sandbox.assert_clean()


def test_a_callback_made_before_any_lightning_is_loaded_does_nothing_without_ft_launcher(sandbox):
    script = sandbox.script(
        """
from ft_launcher.integrations.ptl_callback import FaultToleranceCallback, FaultToleranceSectionsCallback
callbacks = [FaultToleranceCallback(True, True), FaultToleranceSectionsCallback(True, True)]
import lightning.pytorch
import lightning.pytorch.demos.boring_classes
import pytorch_lightning
import pytorch_lightning.demos.boring_classes
for package in (lightning.pytorch, pytorch_lightning):
    for callback in callbacks:
        trainer = package.Trainer(callbacks=callback, accelerator="cpu", max_steps=2, logger=False)
        save = trainer.save_checkpoint
        trainer.fit(package.demos.boring_classes.BoringModel())
        assert trainer.save_checkpoint == save
        print("trained", trainer.global_step, isinstance(callbacks[0], FaultToleranceCallback), flush=True)
"""
    )
    flag = sandbox.path / "flag"
    running = sandbox.start(sys.executable, script, FAULT_TOL_FINISHED_FLAG_FILE=str(flag))
    assert running.wait() == 0, running.output
    assert running.output.count("trained 2 True") == 4
    assert not flag.exists()
    assert not (sandbox.path / "ft_state").exists()
    sandbox.assert_clean()


def test_a_simulated_fault_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="fault_type='rank_dead': must be one of rank_killed, rank_hung, random"):
        SimulatedFaultParams("rank_dead", 1.0)
    with pytest.raises(ValueError, match="must not be negative"):
        SimulatedFaultParams("random", -1.0)
    with pytest.raises(ValueError, match=r"simulated_fault_params=\{'fault'"):
        SimulatedFaultParams.of({"fault": "random", "base_delay": 1})
    with pytest.raises(ValueError, match="rank_to_fail=2: there are 2 ranks"):
        simulate(SimulatedFaultParams("random", 1.0, rank_to_fail=2), 2, logging.getLogger("test"))
    given = SimulatedFaultParams.of({"fault_type": "random", "base_delay": 1, "rand_delay": 2})
    assert given == SimulatedFaultParams("random", 1, 2)


def test_a_random_fault_falls_on_a_random_rank_and_is_of_either_kind():
    params = SimulatedFaultParams("random", 1000.0, 500.0)
    timers = [simulate(params, 2, logging.getLogger("test")) for _ in range(40)]
    mine = [timer for timer in timers if timer is not None]
    for timer in mine:
        timer.cancel()
    assert 0 < len(mine) < 40  # this process is rank 0 of the two
    assert all(1000.0 <= timer.interval <= 1500.0 for timer in mine)
    assert len({timer.interval for timer in mine}) > 1
