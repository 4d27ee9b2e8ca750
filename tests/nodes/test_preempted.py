"""A notice of preemption that comes to one of several nodes, all on this machine, whose ranks keep no pace."""

import os
import signal
from pathlib import Path

import pytest

TRAINER = str(Path(__file__).with_name("preempted_trainer.py"))
ALL = ("node1", "node2", "node3")


@pytest.fixture
def job(local_job):
    return local_job


def plan(job, *options, nodes, restarts=0, flags=(), **conf):
    job.plan(*flags, nodes=nodes, restarts=restarts, work=[TRAINER, str(job.directory), *options], **conf)


def start(job, *nodes):
    """Start the nodes, and wait until their ranks take steps."""
    job.start(*nodes)
    job.wait_reached(0, 4, *nodes)


def saves(job):
    """Give the nodes whose ranks have saved, by step."""
    found: dict[int, list[str]] = {}
    for path in sorted((job.directory / "saves").iterdir()):
        step, node = path.name.split(".")
        found.setdefault(int(step), []).append(node)
    return found


def test_P8_a_notice_on_one_node_stops_both_at_one_step(job):
    plan(job, nodes="2:2")
    start(job, "node1", "node2")
    job.launchers["node2"].send(signal.SIGTERM)
    job.assert_ends(node1=os.EX_TEMPFAIL, node2=os.EX_TEMPFAIL)
    ((step, nodes),) = saves(job).items()
    assert nodes == ["node1", "node2"]
    for node in nodes:
        last = job.launchers[node].lines[-2]
        assert "preempted (SIGTERM at node" in last
        assert f"saved at step {step}; exit code 75: run again to go on" in last
    assert "notice of preemption" not in job.launchers["node1"].output
    assert job.cycles() == [0]


def test_P8_a_warning_that_comes_to_all_nodes_is_one_save_and_the_job_goes_on(job):
    plan(job, "--stay", nodes="2:2")
    start(job, "node1", "node2")
    for node in ("node1", "node2"):
        job.launchers[node].send(signal.SIGUSR1)
    job.assert_ends(node1=0, node2=0)
    assert list(saves(job).values()) == [["node1", "node2"]]
    assert job.cycles() == [0]


def test_a_job_goes_on_without_the_node_that_is_taken_away(job):
    plan(job, nodes="2:3", last_call_timeout="1")
    start(job, *ALL)
    job.launchers["node2"].send(signal.SIGTERM)
    assert job.launchers["node2"].wait() == os.EX_TEMPFAIL
    job.wait_reached(1, 4, "node1", "node3")
    ((step, nodes),) = saves(job).items()
    assert nodes == list(ALL)
    assert job.ranks(1) == ["node1", "node3"]
    assert job.told(1) == (0, "node_preempted", 3)
    reason = next(start.reason for start in job.starts() if start.cycle == 1)
    assert reason.endswith(f"saved at step {step}")
    for node in ("node1", "node3"):
        job.launchers[node].send(signal.SIGINT)
    job.assert_ends(node1=130, node3=130)


def test_a_job_whose_host_is_taken_away_ends_everywhere(job):
    plan(job, nodes="2:3", last_call_timeout="1")
    start(job, *ALL)
    job.launchers["node1"].send(signal.SIGTERM)
    job.assert_ends(node1=os.EX_TEMPFAIL, node2=os.EX_TEMPFAIL, node3=os.EX_TEMPFAIL)
    assert list(saves(job).values()) == [list(ALL)]


def test_a_rank_that_dies_when_it_is_to_save_costs_a_restart_and_the_next_round_saves(job):
    plan(job, "--kill-first", "node1", nodes="2:2", restarts=1)
    start(job, "node1", "node2")
    job.launchers["node2"].send(signal.SIGTERM)
    job.assert_ends(node1=os.EX_TEMPFAIL, node2=os.EX_TEMPFAIL)
    assert job.cycles() == [0, 1]
    assert job.told(1) == (1, "rank_failed", 2)
    assert list(saves(job).values())[-1] == ["node1", "node2"]


def test_a_node_whose_time_is_over_while_it_waits_for_others_ends(job):
    logs = str(job.directory / "logs")  # the stopped node's rank is killed, and its stacks are kept
    plan(job, nodes="2:2", restarts=1, flags=("--term-timeout", "6", "--log-dir", logs))
    start(job, "node1", "node2")
    # Its silence ends the round, before anybody knows where to save.
    job.launchers["node2"].send(signal.SIGSTOP)
    job.launchers["node1"].send(signal.SIGTERM)
    assert job.launchers["node1"].wait() == os.EX_TEMPFAIL
    assert "preempted (SIGTERM at node" in job.launchers["node1"].lines[-2]
    job.launchers["node2"].send(signal.SIGKILL)
    job.assert_ends(node1=os.EX_TEMPFAIL, node2=-signal.SIGKILL)
    assert saves(job) == {}


def test_a_notice_outlives_the_host_whose_leader_knew_it(job):
    """The node to which it came tells the next leader."""
    plan(job, nodes="2:3", restarts=1, endpoints=3, last_call_timeout="1")
    job.start(*ALL)
    job.wait_reached(0, 4, *ALL)
    job.launchers["node1"].send(signal.SIGSTOP)
    job.launchers["node2"].send(signal.SIGTERM)
    job.launchers["node2"].wait_for("notice of preemption: SIGTERM")
    job.launchers["node1"].send(signal.SIGKILL)
    job.assert_ends(node1=-signal.SIGKILL, node2=os.EX_TEMPFAIL, node3=os.EX_TEMPFAIL)
