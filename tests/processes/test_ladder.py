"""From which checkpoint ranks go on, under real launchers: the ladder goes down, and has an end."""

import os
import re
import signal
from pathlib import Path

import pytest

from ft_launcher import ResumeHint
from ft_launcher.ladder import HINT_ENV, Checkpoint
from ft_launcher.messages import CheckpointSaved, RankReported, ResumedFrom
from ft_launcher.page import Slot
from tests.processes.conftest import RankError

TRAINER = str(Path(__file__).with_name("ladder_trainer.py"))


@pytest.fixture
def train(sandbox):
    """Start a launcher with flags, and ladder_trainer.py with options."""
    directory = sandbox.path / "job"
    directory.mkdir()

    def start(*options, flags=(), **env):
        return sandbox.launch("--max-restarts", "20", *flags, TRAINER, str(directory), *options, **env)

    return start


def went_on_from(output, rank=0):
    """Give the step that each attempt went on from, and got so far that it could say so."""
    return [int(step) for step in re.findall(rf"^cycle \d+ rank {rank} goes on from (\d+)$", output, re.MULTILINE)]


def resumed(output):
    return re.findall(r"ft_launcher: resumed from (.*)", output)


def test_a_job_whose_newest_checkpoint_is_poisoned_goes_on_from_the_one_before_and_finishes(sandbox, train):
    running = train("--die-at", "31:1", "--poison", "30", flags=("--nproc-per-node", "2"))
    assert running.wait() == 0, running.output
    saves = sandbox.path / "job" / "saves"
    # One line for an attempt, not for each rank; the rank that said so was killed in the moment after.
    assert resumed(running.output) == ["the beginning", *[f"{saves}/30 (step 30)"] * 3, f"{saves}/20 (step 20)"]
    assert went_on_from(running.output) == [0, 20]
    (warning,) = [line for line in running.lines if "suspect" in line]
    assert warning.endswith(
        f"3 attempts from {saves}/30 (step 30) failed before a step beyond it: suspect; the next one is told to use"
        f" {saves}/20 (step 20)"
    )
    assert "cycle 4 rank 1 is told (20, ['30'])" in running.output
    sandbox.assert_clean()


@pytest.mark.parametrize(("style", "code"), [("torchrun", 1), ("classified", 93)])
def test_a_job_that_fails_from_all_its_checkpoints_and_from_the_beginning_ends_with_a_sentence(
    sandbox, train, style, code
):
    flags = ("--ft-suspect-after", "1", "--ft-exit-codes", style)
    running = train("--die-at", "31:1", "--dies-from", "1", flags=flags)
    assert running.wait() == code, running.output
    saves = sandbox.path / "job" / "saves"
    tried = ", ".join(f"{saves}/{step} (step {step}) was tried once" for step in (30, 20, 10))
    assert running.lines[-2].endswith(
        f"FAILED: no checkpoint is left to go on from: {tried}; each attempt failed before a step beyond;"
        " so did one from the beginning"
    )
    assert resumed(running.output)[-1] == "the beginning"
    assert "restart 5" not in running.output
    sandbox.assert_clean()


def test_a_job_that_takes_no_hint_ends_after_one_more_attempt(sandbox, train):
    flags = ("--ft-suspect-after", "2", "--nproc-per-node", "2")
    running = train("--die-at", "31:1", "--poison", "30", "--stubborn", flags=flags)
    assert running.wait() == 1, running.output
    assert "/30 (step 30) was tried 3 times; each attempt failed" in running.lines[-2]
    assert "restart 4" not in running.output
    sandbox.assert_clean()


@pytest.mark.parametrize("ask", [(), ("--ask",)])
def test_a_job_that_takes_a_step_beyond_its_checkpoint_is_not_suspected_however_often_it_fails(sandbox, train, ask):
    running = train("--die-at", "11:6", *ask, flags=("--ft-suspect-after", "2"))
    assert running.wait() == 0, running.output
    assert went_on_from(running.output) == [0, 10, 10, 10, 10, 10, 10]
    assert "suspect" not in running.output
    sandbox.assert_clean()


def test_without_suspect_after_the_restarts_alone_are_counted(sandbox, train):
    running = train("--die-at", "31:1", "--poison", "30", flags=("--ft-suspect-after", "null", "--max-restarts", "5"))
    assert running.wait() == 1, running.output
    assert running.output.count("is told None") == 6
    sandbox.assert_clean()


def test_a_hint_of_an_outer_job_is_not_the_inner_ones(sandbox, train):
    running = train("--steps", "1", **{HINT_ENV: '{"path": null, "step": null, "suspects": ["/outer"]}'})
    assert running.wait() == 0, running.output
    assert "rank 0 is told None" in running.output
    sandbox.assert_clean()


# -- between a rank and its launcher ------------------------------------------------------------------------------


def test_a_report_is_with_the_launcher_when_the_call_returns_though_the_rank_dies_then(watch):
    watch = watch()
    rank = watch.start()
    rank.begin("client.report_resume('/c/30', 30) and client.report_checkpoint('/c/40', 40); os._exit(0)")
    assert rank.wait() == 0
    assert watch.next(RankReported) == RankReported(rank.pid, ResumedFrom(1, Checkpoint("/c/30", 30)))
    assert watch.next(RankReported) == RankReported(rank.pid, CheckpointSaved(2, Checkpoint("/c/40", 40)))


def test_a_report_survives_a_monitor_that_is_replaced(watch):
    watch = watch()
    rank = watch.start_connected()
    watch.signal_monitor(signal.SIGKILL)
    assert rank.run("client.report_resume('/c/30', 30)") is True
    assert watch.next(RankReported).report.checkpoint == Checkpoint("/c/30", 30)


def test_a_report_that_nobody_takes_is_an_error_in_the_log_and_none_of_the_rank(watch):
    watch = watch()
    rank = watch.start_connected()
    watch.signal_monitor(signal.SIGSTOP)
    assert rank.run_without_launcher("client.report_resume('/c/30', 30)") is False
    watch.signal_monitor(signal.SIGCONT)
    assert rank.run("client.report_resume('/c/30', 30)") is True


OVERHEAR = """
import logging
said, handler = [], logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("ft_launcher").addHandler(handler)
"""


def test_a_rank_that_is_being_stopped_does_not_wait_for_an_answer_that_cannot_come(watch):
    watch = watch()
    rank = watch.start_connected()
    rank.run(OVERHEAR)
    watch.monitors.ranks_ended()
    # No word of 10 s in which nobody answered.
    assert rank.run_without_launcher("[client.report_checkpoint('/c/30', 30), said]") == [False, []]


def test_a_child_reports_nothing_for_its_parent(watch):
    watch = watch()
    rank = watch.start_connected()
    assert rank.run("in_child(lambda: client.report_resume('/c/30', 30))") == "False"
    assert watch.all_heard(RankReported) == []


def test_a_step_that_a_rank_reports_is_in_its_page(watch):
    watch = watch()
    rank = watch.start_connected()
    assert watch.monitors.progress()[0].step == -1
    rank.run("client.report_step(41)")
    assert watch.monitors.progress()[0].step == 41
    rank.run("client.should_checkpoint(43)")
    assert watch.monitors.progress()[0].step == 43
    assert watch._watched(0).page.stamps[Slot.STEP] == 42
    rank.run("client.shutdown_workload_monitoring()")
    with pytest.raises(RankError, match="monitoring is off"):
        rank.run("client.report_step(42)")


def test_paths_are_told_as_absolute_text_and_urls_as_they_are(watch):
    watch = watch()
    rank = watch.start()
    rank.run("os.chdir('/tmp'); client.report_resume(Path('../tmp/c/'), ctypes.c_int8(7).value)")
    assert watch.next(RankReported).report.checkpoint == Checkpoint("/tmp/c", 7)
    rank.run("client.report_checkpoint('s3://b/../c', None)")
    assert watch.next(RankReported).report.checkpoint == Checkpoint("s3://b/../c")
    rank.run("client.report_resume(None)")
    assert watch.next(RankReported).report.checkpoint == Checkpoint(None, 0)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ("report_resume(None, 5)", "report_resume(None, 5): without a checkpoint the step is 0"),
        ("report_resume('/c', -1)", "checkpoint /c: step -1 must be 0 or more"),
        (
            "report_checkpoint('/' + 'ä' * 256, 1)",
            f"checkpoint '/{'ä' * 79}': the path must be printable, and have 512 bytes at most",
        ),
        (
            "report_checkpoint('/c\\n', 1)",
            "checkpoint '/c\\n': the path must be printable, and have 512 bytes at most",
        ),
        (
            "report_checkpoint('/\\udcff', 1)",
            "checkpoint '/\\udcff': the path must be printable, and have 512 bytes at most",
        ),
    ],
)
def test_a_path_or_step_that_cannot_be_one_is_refused(watch, call, complaint):
    watch = watch()
    rank = watch.start_connected()
    with pytest.raises(RankError) as raised:
        rank.run(f"client.{call}")
    assert str(raised.value) == f"RankMonitorClientError: {complaint}"


def test_the_hint_comes_from_the_launcher(watch):
    watch = watch()
    rank = watch.start()
    assert rank.run("client.resume_hint()") is None
    text = '{"path": "/c/20", "step": 20, "suspects": ["/c/30"]}'
    rank.run(f"os.environ[{HINT_ENV!r}] = {text!r}")
    assert rank.run("repr(client.resume_hint())") == repr(ResumeHint("/c/20", 20, ("/c/30",)))
    rank.run(f"os.environ[{HINT_ENV!r}] = '[]'")
    with pytest.raises(RankError, match=f"{HINT_ENV} is not what the launcher put there"):
        rank.run("client.resume_hint()")


def test_a_client_without_the_launcher_has_no_hint_and_tells_nobody():
    assert HINT_ENV not in os.environ
    from ft_launcher import connect

    client = connect()
    assert client.resume_hint() is None
    assert client.report_resume("/c/30", 30) is False
    assert client.report_checkpoint("/c/30", 30) is False
    client.report_step(31)
