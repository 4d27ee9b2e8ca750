"""From which checkpoint the ranks of several nodes go on, all on this machine: the same on all nodes."""

import re
import signal
from pathlib import Path

import pytest

TRAINER = str(Path(__file__).parent.parent / "processes" / "ladder_trainer.py")


@pytest.fixture
def job(local_job):
    return local_job


def plan(job, *options, nodes="2:2", restarts=20, flags=(), **conf):
    job.plan(*flags, nodes=nodes, restarts=restarts, work=[TRAINER, str(job.directory), *options], **conf)


def told(job, node):
    """Give by round what the ranks of a node were told. In a round that was soon over perhaps nothing."""
    return dict(re.findall(r"^cycle (\d+) rank \d+ is told (.*)$", job.launchers[node].output, re.MULTILINE))


def test_all_nodes_are_told_the_same_though_one_saves_and_reports_and_another_fails(job):
    plan(
        job,
        *("--die-at", "31:1", "--poison", "30", "--dies-of-poison", "1", "--first-rank-reports"),
        flags=("--ft-suspect-after", "2"),
    )
    job.start("node1", "node2")
    job.assert_ends(node1=0, node2=0)
    for node in ("node1", "node2"):
        assert {"0": "None"} | told(job, node) == {"0": "None", "1": "None", "2": "None", "3": "(20, ['30'])"}
    outputs = [job.launchers[node].output for node in ("node1", "node2")]
    assert [output.count(": suspect; the next one is told to use") for output in outputs] == [1, 0]
    # Each launcher says what its ranks have said.
    assert [output.count("ft_launcher: resumed from") for output in outputs] == [4, 0]


def test_the_end_of_the_ladder_ends_all_nodes(job):
    plan(job, "--die-at", "31:1", "--dies-from", "1", "--stubborn", flags=("--ft-suspect-after", "1"))
    job.start("node1", "node2")
    job.assert_ends(node1=1, node2=1)
    for node in ("node1", "node2"):
        assert "no checkpoint is left to go on from: " in job.launchers[node].lines[-2]


def test_nodes_that_come_and_leave_and_are_lost_make_no_checkpoint_suspect(job):
    saves = job.directory / "saves"
    saves.mkdir()
    (saves / "30").write_text("food")
    plan(job, "--stay-from", "0", nodes="1:3", flags=("--ft-suspect-after", "1"), last_call_timeout="0")
    job.start("node1")
    job.launchers["node1"].wait_for("cycle 0 rank 0 goes on from 30")
    job.start("node2")
    job.launchers["node2"].wait_for("cycle 1 rank 1 goes on from 30")
    job.launchers["node2"].send(signal.SIGINT)
    job.launchers["node1"].wait_for("cycle 2 rank 0 goes on from 30")
    job.start("node3")
    job.launchers["node3"].wait_for("cycle 3 rank 1 goes on from 30")
    job.launchers["node3"].send(signal.SIGKILL)
    job.launchers["node1"].wait_for("cycle 4 rank 0 goes on from 30")
    job.launchers["node1"].send(signal.SIGINT)
    job.assert_ends(node1=130, node2=130, node3=-signal.SIGKILL)
    assert set(told(job, "node1").values()) == {"None"}


def test_another_host_knows_what_is_suspect(job):
    options = ("--die-at", "31:1", "--poison", "30", "--dies-of-poison", "1", "--stay-from", "2")
    plan(job, *options, nodes="2:3", endpoints=3, flags=("--ft-suspect-after", "1"))
    job.start("node1", "node2", "node3")
    for node in job.nodes:
        job.launchers[node].wait_for("goes on from 20")
    job.launchers["node1"].send(signal.SIGKILL)
    for node in ("node2", "node3"):
        job.launchers[node].wait_for("cycle 3 rank")
        assert told(job, node)["3"] == "(20, ['30'])"
        job.launchers[node].wait_for("goes on from 20", count=2)
    for node in ("node2", "node3"):
        job.launchers[node].send(signal.SIGINT)
    job.assert_ends(node1=-signal.SIGKILL, node2=130, node3=130)
