"""A notice of preemption on one node: all ranks save at the same step, and the launcher ends as what it was told."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.conftest import Sandbox, free_port

TRAINER = str(Path(__file__).with_name("preempted_trainer.py"))


class Job:
    """A training of two ranks that saves for notices (preempted_trainer.py), and what it has left."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.directory = sandbox.path / "job"
        self.directory.mkdir()

    def start(self, *options: str, flags: tuple[str, ...] = (), **env: str):
        command = ["--nproc-per-node", "2", "--max-restarts", "3", *flags, TRAINER, str(self.directory), *options]
        return self.sandbox.launch(*command, **env)

    def saves(self) -> dict[int, list[int]]:
        """Give the ranks that have saved, by step."""
        found: dict[int, list[int]] = {}
        for path in sorted(self.directory.glob("saved.*")):
            _, step, rank = path.name.split(".")
            found.setdefault(int(step), []).append(int(rank))
        return found

    @property
    def checkpoint(self) -> int:
        return int(json.loads((self.directory / "checkpoint.json").read_text())["step"])


@pytest.fixture
def job(sandbox):
    return Job(sandbox)


def test_P5_sigterm_saves_the_same_step_on_all_ranks_uses_no_restart_and_the_next_run_goes_on(job):
    first = job.start()
    first.wait_for("at step 5", count=2)
    first.send(signal.SIGTERM)
    assert first.wait() == os.EX_TEMPFAIL, first.output
    ((step, ranks),) = job.saves().items()
    assert ranks == [0, 1]
    assert job.checkpoint == step
    assert (
        f"preempted (SIGTERM at node {os.uname().nodename}): saved at step {step}; exit code 75: run again to go on"
        in (first.lines[-2])
    )
    assert "notice of preemption: SIGTERM, 30.0 s left" in first.output
    assert first.output.count("started rank 0") == 1
    job.sandbox.assert_clean()
    second = job.start("--steps", str(step + 5))
    assert second.wait() == 0, second.output
    assert second.output.count(f"begins at step {step}") == 2
    job.sandbox.assert_clean()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_P6_a_warning_saves_and_the_job_goes_on_and_neither_ranks_nor_monitors_die_of_it(job, number):
    running = job.start("--stay", "--end-after-saves", "1")
    running.wait_for("at step 5", count=2)
    # As Slurm does: to each process of the step.
    for pid in job.sandbox.pids():
        if pid != running.pid:
            os.kill(pid, number)
    running.send(number)
    assert running.wait() == 0, running.output
    ((_, ranks),) = job.saves().items()
    assert ranks == [0, 1]
    assert "replacing" not in running.output
    assert running.output.count("started rank 0") == 1
    job.sandbox.assert_clean()


def test_P6_a_rank_that_never_asks_survives_a_warning(sandbox):
    script = sandbox.script(
        "import os, time\n"
        "print('this is', os.getpid(), flush=True)\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n"
        "print('done', flush=True)\n"
    )
    running = sandbox.launch(script)
    pid = int(running.wait_for("this is ").split()[2])
    os.kill(pid, signal.SIGUSR1)
    running.send(signal.SIGUSR1)
    running.wait_for("all ranks save at step 0")
    (sandbox.path / "go").touch()
    assert running.wait() == 0, running.output
    sandbox.assert_clean()


def test_P6_a_rank_that_has_a_handler_hears_a_warning_itself(sandbox):
    """The launcher keeps it from ranks that are about to start only."""
    script = sandbox.script(
        "import os, signal, time\n"
        "heard = []\n"
        "assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN\n"
        "assert not {signal.SIGUSR1, signal.SIGUSR2} & signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))\n"
        "print('this is', os.getpid(), flush=True)\n"
        "while not heard: time.sleep(0.01)\n"
        "print('heard', flush=True)\n"
    )
    running = sandbox.launch(script)
    os.kill(int(running.wait_for("this is ").split()[2]), signal.SIGUSR1)
    assert running.wait() == 0, running.output
    assert "heard" in running.output
    sandbox.assert_clean()


KEEPS = """
import os, signal, subprocess, sys
from ft_launcher.noticing import Notices
from ft_launcher.signals import StopSignals

notices = Notices()
signals = StopSignals("SIGTERM", notices)
with signals.kept_from_ranks(has_shim=sys.argv[1] == "shim"):
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        child.send_signal(number)
        os.kill(os.getpid(), number)
child.stdin.close()
print("the child ended with", child.wait())
os.kill(os.getpid(), signal.SIGUSR2)
print("heard", [each.what for each in notices.take()])
"""


@pytest.mark.parametrize(("kind", "heard"), [("shim", ["SIGUSR1", "SIGUSR2", "SIGUSR2"]), ("function", ["SIGUSR2"])])
def test_P6_a_rank_that_is_being_started_survives_a_warning_and_the_launcher_hears_it(sandbox, kind, heard):
    """Without the shim, which functions have not, one that comes at that very moment is lost."""
    running = sandbox.start(sys.executable, sandbox.script(KEEPS), kind)
    assert running.wait() == 0, running.output
    assert "the child ended with 0" in running.output
    assert f"heard {heard}" in running.output


def test_P7_a_storm_of_signals_during_a_save_is_one_save(job):
    running = job.start("--stay", "--end-after-saves", "1", "--save-until", "storm-is-over")
    running.wait_for("at step 5", count=2)
    running.send(signal.SIGUSR1)
    running.wait_for("is saving", count=2)
    for count in range(50):
        running.send((signal.SIGUSR1, signal.SIGTERM)[count % 2])
    running.wait_for("notice of preemption: SIGTERM")
    (job.directory / "storm-is-over").touch()
    assert running.wait() == 0, running.output
    ((step, ranks),) = job.saves().items()
    assert ranks == [0, 1]
    assert job.checkpoint == step
    job.sandbox.assert_clean()


def test_a_warning_after_the_save_is_another_notice(job):
    running = job.start("--stay", "--end-after-saves", "2")
    running.wait_for("at step 5", count=2)
    running.send(signal.SIGUSR1)
    running.wait_for("all ranks of this node have saved")
    running.send(signal.SIGUSR2)
    assert running.wait() == 0, running.output
    assert [ranks for _, ranks in sorted(job.saves().items())] == [[0, 1], [0, 1]]
    job.sandbox.assert_clean()


def test_at_the_end_of_the_time_what_is_left_is_ended_and_named(job):
    running = job.start("--stay", "--save-until", "never", "--save-at-once", "0", flags=("--term-timeout", "4"))
    running.wait_for("at step 5", count=2)
    running.send(signal.SIGTERM)
    assert running.wait() == 143, running.output
    assert "not saved yet: rank 1 (pid" in running.output
    ended = running.wait_for("the time that SIGTERM gave is over")
    assert "saving since step" in ended
    assert "rank 1 (pid" in ended
    assert "rank 0 (pid" not in ended
    job.sandbox.assert_clean()


def test_at_the_end_of_the_time_a_job_that_has_saved_is_preempted_though_its_ranks_go_on(job):
    running = job.start("--stay", flags=("--term-timeout", "4"))
    running.wait_for("at step 5", count=2)
    running.send(signal.SIGTERM)
    assert running.wait() == os.EX_TEMPFAIL, running.output
    assert "the time that SIGTERM gave is over; all ranks have saved" in running.output
    assert len(job.saves()) == 1
    job.sandbox.assert_clean()


def test_a_warning_has_the_grace_that_the_configuration_gives_it(job):
    running = job.start("--stay", flags=("--ft-preemption-grace", "4"))
    running.wait_for("at step 5", count=2)
    running.send(signal.SIGUSR1)
    assert running.wait() == os.EX_TEMPFAIL, running.output
    job.sandbox.assert_clean()


def test_sigterm_ends_a_job_whose_ranks_do_not_listen_as_torchrun_does(job):
    running = job.start("--deaf", "1")
    running.wait_for("at step 5", count=2)
    running.send(signal.SIGTERM)
    assert running.wait() == 143, running.output
    assert job.saves() == {}
    job.sandbox.assert_clean()


def test_sigterm_that_goes_to_the_ranks_too_is_no_failure_of_theirs(job):
    """As with Slurm's scancel."""
    running = job.start()
    pids = [int(running.wait_for(f"rank {rank} has pid").split()[-1]) for rank in (0, 1)]
    running.wait_for("at step 5", count=2)
    running.send(signal.SIGSTOP)
    running.send(signal.SIGTERM)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    running.send(signal.SIGCONT)
    assert running.wait() == 143, running.output
    assert running.output.count("started rank 0") == 1
    job.sandbox.assert_clean()


def test_sigterm_that_is_always_a_notice_waits_for_ranks_that_still_start(job):
    running = job.start("--begin-when", "begin", flags=("--ft-preemption-signals", "SIGTERM"))
    running.wait_for("has pid", count=2)
    running.send(signal.SIGTERM)
    running.wait_for("all ranks save at step 0")
    (job.directory / "begin").touch()
    assert running.wait() == os.EX_TEMPFAIL, running.output
    assert job.saves() == {0: [0, 1]}
    job.sandbox.assert_clean()


def test_sigterm_that_is_always_a_notice_and_finds_no_rank_has_nothing_to_save(sandbox):
    flags = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}")
    running = sandbox.launch(*flags, "--ft-preemption-signals", "SIGTERM", sandbox.script("print('hello')"))
    running.wait_for("this node is the host")
    running.send(signal.SIGTERM)
    assert running.wait() == os.EX_TEMPFAIL, running.output
    assert "preempted (SIGTERM); exit code 75: run again to go on" in running.output
    sandbox.assert_clean()


def test_a_signal_that_is_no_notice_by_configuration_is_none(job):
    running = job.start("--end-after-saves", "1", "--stay", flags=("--ft-preemption-signals", "SIGUSR2"))
    running.wait_for("at step 5", count=2)
    running.send(signal.SIGUSR1)
    running.send(signal.SIGUSR2)
    assert running.wait() == 0, running.output
    assert "SIGUSR1" not in running.output
    job.sandbox.assert_clean()
    other = job.start(flags=("--ft-preemption-signals", "off"))
    other.wait_for("at step", count=2)
    other.send(signal.SIGUSR2)
    other.send(signal.SIGTERM)
    assert other.wait() == 143, other.output
    job.sandbox.assert_clean()


def test_a_source_gives_notice(job):
    path = job.sandbox.path / "preempt"
    running = job.start(flags=("--ft-preemption-sources", f"file:{path}"))
    running.wait_for("at step 5", count=2)
    path.write_text("20")
    assert running.wait() == os.EX_TEMPFAIL, running.output
    ((_, ranks),) = job.saves().items()
    assert ranks == [0, 1]
    assert f"notice of preemption: file:{path}" in running.output
    job.sandbox.assert_clean()


def test_a_rank_that_fails_after_a_notice_is_restarted_and_then_saves(job):
    running = job.start("--fail-once-saving")
    running.wait_for("at step 5", count=2)
    running.send(signal.SIGTERM)
    assert running.wait() == os.EX_TEMPFAIL, running.output
    assert running.output.count("started rank 0") == 2
    last = max(job.saves())
    assert job.saves()[last] == [0, 1]
    job.sandbox.assert_clean()


def test_a_monitor_that_dies_while_its_rank_waits_costs_no_answer(job):
    """The rank connects to the next one, and its page says what the former one was told."""
    running = job.start("--begin-when", "begin", flags=("--ft-preemption-signals", "SIGTERM"))
    running.wait_for("has pid", count=2)
    for pid in job.sandbox.pids():
        if b"rank_monitor_server" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    running.wait_for("replacing it", count=2)
    running.send(signal.SIGTERM)
    (job.directory / "begin").touch()
    assert running.wait() == os.EX_TEMPFAIL, running.output
    ((_, ranks),) = job.saves().items()
    assert ranks == [0, 1]
    job.sandbox.assert_clean()


# -- the client and its monitor ---------------------------------------------------------------------------------------


def test_a_rank_waits_for_the_step_and_hears_it_from_its_monitor(watch):
    launcher = watch(rank_heartbeat_timeout=None)
    rank = launcher.start_connected()
    rank.run("exec('import ft_launcher.rank_monitor_client as module; module.SAVE_STEP_SECONDS = 1000.0')")
    assert not rank.run("client.should_checkpoint(7)")
    assert launcher.monitors.progress()[0].asked == 7
    assert launcher.monitors.all_listen()
    launcher.monitors.give_notice(1)
    rank.begin("client.should_checkpoint(8)")
    launcher.until(lambda: launcher.monitors.progress()[0].asked == 8, "the rank asks")
    assert not rank.has_answered()
    launcher.monitors.save_at(9)
    assert not rank.answer()
    assert rank.run("client.should_checkpoint(9)")
    assert launcher.monitors.progress()[0].saving == 1
    assert launcher.monitors.progress()[0].saved == 0
    assert not rank.run("client.should_checkpoint(9)")
    assert not rank.run("client.should_checkpoint(10)")
    assert launcher.monitors.progress()[0].saved == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_waits_hears_the_step_though_its_monitor_dies_or_is_stuck(watch, number):
    launcher = watch(rank_heartbeat_timeout=None)
    rank = launcher.start_connected()
    launcher.monitors.give_notice(1)
    rank.begin("client.should_checkpoint(8)")
    launcher.until(lambda: launcher.monitors.progress()[0].asked == 8, "the rank asks")
    launcher.signal_monitor(number)
    launcher.monitors.save_at(8)
    assert rank.answer()


def test_a_rank_that_nobody_tells_the_step_goes_on_in_the_end(watch):
    launcher = watch(rank_heartbeat_timeout=None)
    rank = launcher.start_connected()
    rank.run("exec('import ft_launcher.rank_monitor_client as module; module.SAVE_STEP_SECONDS = 0.1')")
    launcher.monitors.give_notice(1)
    assert not rank.run("client.should_checkpoint(8)")
    launcher.monitors.save_at(9)
    assert not rank.run("client.should_checkpoint(9)"), "others may have passed that step too"
    assert launcher.monitors.progress()[0].saved == 0
    launcher.monitors.give_notice(2)
    launcher.monitors.save_at(10)
    assert rank.run("client.should_checkpoint(10)")


def test_a_rank_leaves_with_the_code_for_another_start(watch):
    launcher = watch(rank_heartbeat_timeout=None)
    rank = launcher.start_connected()
    launcher.monitors.give_notice(1)
    launcher.monitors.save_at(0)
    assert rank.run("client.should_checkpoint(8)")
    rank.begin("client.exit_for_preemption()")
    assert rank.wait() == os.EX_TEMPFAIL
    progress = launcher.monitors.progress()[0]
    assert progress.is_leaving
    assert progress.saved == 1
    launcher.monitors.ranks_ended()
    assert launcher.monitors.progress()[0] == progress, "it is known behind the end of the rank, too"


def test_a_forked_child_is_never_told_to_save(watch):
    launcher = watch(rank_heartbeat_timeout=None)
    rank = launcher.start_connected()
    launcher.monitors.give_notice(1)
    launcher.monitors.save_at(0)
    assert rank.run("client.should_checkpoint(8)")
    assert not rank.run("client.should_checkpoint(9)")
    assert rank.run("in_child(lambda: client.should_checkpoint(10))") == "False"
    assert launcher.monitors.progress()[0].asked == 9


def test_a_client_that_has_not_begun_says_so_and_one_without_a_launcher_says_no(watch, sandbox):
    rank = watch().start()
    for call in ("client.should_checkpoint(1)", "client.exit_for_preemption()"):
        rank.begin(call)
        assert "call init_workload_monitoring() first" in rank.answer_or_error()
    script = sandbox.script(
        "from ft_launcher import connect\n"
        "client = connect()\n"
        "print(client.should_checkpoint(1), flush=True)\n"
        "client.exit_for_preemption()\n"
    )
    alone = sandbox.start(sys.executable, script)
    assert alone.wait() == os.EX_TEMPFAIL
    assert alone.lines[0] == "False"
