"""What is lost of a job on three hosts, and what the others make of it: everybody, every time, ends as he should."""

import os
import signal

import pytest

from tests.conftest import GENEROUS, wait_until_gone

ALL = ("node1", "node2", "node10")


def test_N4_a_killed_monitor_and_a_link_cut_for_three_seconds_cost_no_restart(job, undisturbed):
    job.plan(restarts=0, keep_alive_interval="1", keep_alive_max_attempt="5")
    job.hold(0, 2)
    job.start(*ALL)
    job.wait_reached(0, 2, *ALL)
    os.kill(job.monitor_of("node2"), signal.SIGKILL)
    job.launchers["node2"].wait_for("monitor")
    with job.host("node10").cut_for(3.0):
        job.release(0, 2)
    job.assert_ends(node1=0, node2=0, node10=0)
    assert job.cycles() == [0]
    assert job.ranks(0) == ["node1", "node2", "node10"]
    assert job.told(0) == (0, "", 0)
    assert [start.host for start in job.starts()] == job.ranks(0)
    job.assert_trained_like(undisturbed)


def test_B6_a_failure_counts_once_although_the_ranks_of_all_nodes_fail_of_it(job, undisturbed):
    # No gate: the others are in the all-reduce with the one that fails, or come to it, and fail as well.
    job.plan(restarts=2, faults=["kill:cycle=0,step=3,rank=1", "exit:cycle=1,step=4,rank=0"])
    job.start(*ALL)
    job.assert_ends(node1=0, node2=0, node10=0)
    assert job.cycles() == [0, 1, 2]
    for cycle in job.cycles():
        assert job.ranks(cycle) == ["node1", "node2", "node10"]
        assert job.told(cycle) == (cycle, "rank_failed" if cycle else "", 3 if cycle else 0)
    assert "killed by signal 9 (SIGKILL)" in job.launchers["node2"].output
    assert "exited with code 7" in job.launchers["node1"].output
    job.assert_trained_like(undisturbed)


def test_N7_a_killed_launcher_is_missed_at_once_and_a_new_one_on_its_host_joins(job, undisturbed):
    job.plan(restarts=1)
    job.hold(0, 3)
    job.hold(1, 4)
    job.start(*ALL)
    job.wait_reached(0, 3, *ALL)
    # The survivors' ranks wait at a gate: no failed collective tells them.
    killed = job.launchers["node2"]
    killed.send(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    job.release(0, 3)
    job.wait_reached(1, 4, "node1", "node10")
    assert job.ranks(1) == ["node1", "node10"]
    assert job.told(1) == (1, "node_lost", 3)
    job.start("node2")
    job.wait_reached(2, 4, *ALL)
    job.release(1, 4)
    job.assert_ends(node1=0, node2=0, node10=0)
    # Who stays keeps the rank that he has by now; the newcomer gets what is free.
    assert job.ranks(2) == ["node1", "node10", "node2"]
    assert job.told(2) == (1, "node_joined", 2)
    assert job.cycles() == [0, 1, 2]
    job.assert_trained_like(undisturbed)


def test_L5_a_stopped_launcher_is_given_up_and_joins_again_when_it_goes_on(job, undisturbed):
    # In a folder of its own: the stacks of the rank whose launcher slept stay there.
    job.plan("--log-dir", str(job.sandbox.path / "logs"), restarts=1)
    job.hold(0, 3)
    job.hold(1, 4)
    job.start(*ALL)
    job.wait_reached(0, 3, *ALL)
    job.launchers["node10"].send(signal.SIGSTOP)
    job.wait_reached(1, 3, "node1", "node2")
    job.release(0, 3)
    job.wait_reached(1, 4, "node1", "node2")
    assert job.ranks(1) == ["node1", "node2"]
    assert job.told(1) == (1, "node_lost", 3)
    job.launchers["node10"].send(signal.SIGCONT)
    job.wait_reached(2, 4, *ALL)
    job.release(1, 4)
    job.assert_ends(node1=0, node2=0, node10=0)
    assert job.ranks(2) == ["node1", "node2", "node10"]
    assert job.told(2) == (1, "node_joined", 2)
    assert job.cycles() == [0, 1, 2]
    job.assert_trained_like(undisturbed)


def test_N3_a_host_cut_off_for_good_stops_its_ranks_before_the_others_start_without_it(job, undisturbed):
    job.plan(restarts=1)
    job.hold(0, 3)
    job.start(*ALL)
    job.wait_reached(0, 3, *ALL)
    job.host("node10").cut()
    job.wait_reached(1, 3, "node1", "node2")
    job.release(0, 3)
    job.assert_ends(node1=0, node2=0, node10=1)
    # That no rank of round 0 was alive then is asserted for every round.
    assert job.ranks(1) == ["node1", "node2"]
    assert job.told(1) == (1, "node_lost", 3)
    assert job.cycles() == [0, 1]
    assert "node10" in job.launchers["node1"].output
    assert job.endpoints[0] in _last_words(job, "node10")
    job.assert_trained_like(undisturbed)


def test_N5_a_host_whose_packets_are_lost_on_one_way_only_is_as_good_as_cut_off(job):
    job.plan(restarts=1, light=True)
    job.hold(0, 3)
    job.start(*ALL)
    job.wait_reached(0, 3, *ALL)
    job.host("node2").lose_what_goes_to(job.host("node1"))
    job.wait_reached(1, 3, "node1", "node10")
    job.release(0, 3)
    job.assert_ends(node1=0, node2=1, node10=0)
    assert job.ranks(1) == ["node1", "node10"]
    assert job.told(1) == (1, "node_lost", 3)
    assert job.cycles() == [0, 1]


def test_N1_N14_a_machine_that_loses_power_is_replaced_by_the_spare(job, undisturbed):
    job.plan(nodes="2:2", restarts=1)
    job.hold(0, 3)
    job.start("node1", "node2")
    job.wait_reached(0, 3, "node1", "node2")
    job.start("node10")
    job.launchers["node10"].wait_for("spare")
    job.host("node2").lose_power()
    job.release(0, 3)
    job.assert_ends(node1=0, node10=0)
    assert job.ranks(0) == ["node1", "node2"]
    assert job.ranks(1) == ["node1", "node10"]
    assert job.told(1) == (1, "node_lost", 2)
    assert job.cycles() == [0, 1]
    job.assert_trained_like(undisturbed)


@pytest.mark.parametrize("style", ["torchrun", "classified"])
def test_N2_without_the_only_store_host_every_node_ends_and_says_why(job, style):
    job.plan("--ft-exit-codes", style, light=True)
    job.hold(0, 3)
    job.start(*ALL)
    job.wait_reached(0, 3, *ALL)
    if style == "torchrun":
        job.host("node1").lose_power()
    else:
        job.launchers["node1"].send(signal.SIGKILL)
    code = {"torchrun": 1, "classified": 75}[style]
    for node in ("node2", "node10"):
        assert job.launchers[node].wait() == code
    job.sandbox.assert_clean()
    assert job.cycles() == [0]
    for node in ("node2", "node10"):
        assert job.endpoints[0] in _last_words(job, node)


def test_N2_N3_at_the_defaults_the_ranks_on_both_sides_stop_when_the_only_store_host_is_cut_off(job):
    job.plan(light=True, quick=False)
    job.hold(0, 3)
    job.start(*ALL)
    job.wait_reached(0, 3, *ALL)
    job.host("node1").cut()
    for node in ("node2", "node10"):
        assert job.launchers[node].wait() == 1
        last = job.launchers[node].lines[-2]  # before the mark of the end
        assert f"the rendezvous host at {job.endpoints[0]} was lost" in last
        assert "no other endpoint is known" in last
    assert wait_until_gone([job.pid(0, node) for node in ALL], GENEROUS) == []
    # The host's own rank has stopped as well; its launcher waits for others until `join_timeout`: 600 s.
    job.host("node1").lose_power()
    job.assert_ends(node2=1, node10=1)
    assert job.cycles() == [0]


def test_a_lost_store_host_is_left_behind_when_there_are_more_endpoints(job, undisturbed):
    job.plan(restarts=1, endpoints=3)
    job.hold(0, 3)
    job.start(*ALL)
    job.wait_reached(0, 3, *ALL)
    job.host("node1").lose_power()
    job.wait_reached(1, 3, "node2", "node10")
    job.release(0, 3)
    job.assert_ends(node2=0, node10=0)
    assert job.ranks(1) == ["node2", "node10"]
    assert job.told(1) == (1, "host_lost", 3)
    assert job.cycles() == [0, 1]
    job.assert_trained_like(undisturbed)


def test_N3_a_store_host_that_is_cut_off_trains_no_more_while_the_others_meet_elsewhere(job):
    job.plan(nodes="1:3", restarts=2, endpoints=3, light=True, failover_timeout="8", join_timeout="8")
    job.hold(0, 3)
    job.hold(1, 3)
    job.start(*ALL)
    job.wait_reached(0, 3, *ALL)
    job.host("node1").cut()
    job.wait_reached(1, 3, "node2", "node10")
    assert job.ranks(1) == ["node2", "node10"]
    assert job.told(1) == (1, "host_lost", 3)
    # One node is enough for --nnodes 1:3, but one of three (or of two) cannot know that the others have stopped.
    assert job.launchers["node1"].wait() == 1
    job.launchers["node2"].send(signal.SIGKILL)
    job.assert_ends(node10=1)
    assert job.cycles() == [0, 1]
    assert job.endpoints[1] in _last_words(job, "node10")


def _last_words(job, node):
    return "\n".join(job.launchers[node].lines[-8:])
