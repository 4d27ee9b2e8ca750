"""Nodes that come, leave, are put out, or end the job, on three hosts with a training that must not notice."""

import pytest

ALL = ("node1", "node2", "node10")


def test_B5_V7_a_node_is_added_and_another_one_put_out_and_neither_costs_a_restart(job, undisturbed):
    job.plan(restarts=0, last_call_timeout="1", faults=["exclude:cycle=1,step=3,node=node2"])
    job.hold(0, 3)
    job.hold(2, 4)
    job.start("node1", "node2")
    job.wait_reached(0, 3, "node1", "node2")
    job.start("node10")
    job.launchers["node2"].wait_for("cycle 1 fault exclude")
    job.release(0, 3)
    put_out = job.launchers["node2"]
    assert put_out.wait() == 1
    # Its host is out for the rest of the job, whoever starts a launcher there.
    job.wait_reached(2, 4, "node1", "node10")
    back = job.start("node2")
    assert back.wait() == 1
    assert "node node2 was excluded from this job before" in back.output
    job.release(2, 4)
    job.assert_ends(node1=0, node10=0)
    assert job.ranks(0) == ["node1", "node2"]
    assert job.told(0) == (0, "", 0)
    assert job.ranks(1) == ["node1", "node2", "node10"]
    assert job.told(1) == (0, "node_joined", 2)
    # Who stays keeps what is left of the ranks; the gap is filled.
    assert job.ranks(2) == ["node1", "node10"]
    assert job.told(2) == (0, "node_excluded", 3)
    assert job.cycles() == [0, 1, 2]
    for launcher in (put_out, job.launchers["node1"], job.launchers["node10"]):
        assert "node2 feels ill" in launcher.output
    job.assert_trained_like(undisturbed)


def test_V6_a_node_that_asks_to_be_put_out_and_crashes_is_replaced_by_the_spare(job, undisturbed):
    job.plan("--ft-exit-codes", "classified", nodes="2:2", restarts=0, faults=["exclude-exit:cycle=0,step=3,rank=1"])
    job.hold(0, 3)
    job.start("node1", "node2")
    job.wait_reached(0, 3, "node1", "node2")
    job.start("node10")
    job.launchers["node10"].wait_for("spare")
    job.release(0, 3)
    job.assert_ends(node1=0, node2=75, node10=0)
    assert job.ranks(0) == ["node1", "node2"]
    assert job.ranks(1) == ["node1", "node10"]
    assert job.told(1) == (0, "node_excluded", 2)
    assert job.cycles() == [0, 1]
    job.assert_trained_like(undisturbed)


def test_V11_a_rank_that_asks_to_shut_down_ends_all_nodes(job):
    job.plan("--ft-exit-codes", "classified", restarts=3, faults=["shutdown:cycle=0,step=3,rank=2"])
    # The others wait where nothing but their launcher can end them.
    job.hold(0, 3, "node1")
    job.hold(0, 3, "node2")
    job.start(*ALL)
    job.assert_ends(node1=93, node2=93, node10=93)
    assert job.cycles() == [0]
    for node in ALL:
        assert "a rank asked to shut the job down: node10 feels ill" in job.launchers[node].output


# -- on this machine, where no network has a part in it ---------------------------------------------------------------


def test_V6_a_job_that_is_left_with_too_few_nodes_ends_everywhere_and_says_so(local_job):
    job = local_job
    job.plan(
        *("--ft-exit-codes", "classified"),
        nodes="2:2",
        restarts=3,
        light=True,
        faults=["exclude:cycle=0,step=2,node=node2"],
        last_call_timeout="1",
    )
    job.hold(0, 2, "node1")
    job.start("node1", "node2")
    job.assert_ends(node1=75, node2=75)
    assert job.cycles() == [0]
    for node in ("node1", "node2"):
        assert "a rank asked to exclude this node: node2 feels ill" in job.launchers[node].output


@pytest.mark.parametrize("who", ["two of three", "all"])
def test_V8_nodes_that_ask_at_once_to_be_put_out_are_all_put_out(local_job, who):
    job = local_job
    excluded = ["node2", "node3"] if who == "two of three" else ["node1", "node2", "node3"]
    faults = [f"exclude:cycle=0,step=2,node={node}" for node in excluded]
    job.plan("--ft-exit-codes", "classified", nodes="1:3", restarts=0, light=True, faults=faults)
    job.hold(0, 2)
    job.start("node1", "node2", "node3")
    job.pass_gate(0, 2, "node1", "node2", "node3")
    if who == "all":
        job.assert_ends(node1=75, node2=75, node3=75)
    else:
        job.assert_ends(node1=0, node2=75, node3=75)
        assert job.ranks(job.cycles()[-1]) == ["node1"]
        assert job.told(job.cycles()[-1])[0] == 0
    assert len(job.cycles()) <= len(excluded) + 1


def test_V9_the_store_host_puts_itself_out_and_keeps_the_store_until_the_others_are_done(local_job):
    job = local_job
    job.plan(
        *("--ft-exit-codes", "classified"),
        nodes="2:3",
        restarts=0,
        light=True,
        faults=["exclude:cycle=0,step=2,node=node1"],
    )
    job.hold(0, 2, "node2")
    job.hold(0, 2, "node3")
    job.start("node1", "node2", "node3")
    job.assert_ends(node1=75, node2=0, node3=0)
    assert sorted(job.ranks(1)) == ["node2", "node3"]
    assert job.told(1) == (0, "node_excluded", 3)
    assert job.cycles() == [0, 1]


def test_V2_V3_who_comes_too_many_or_too_late_waits_and_ends_with_the_job(local_job):
    job = local_job
    job.plan(nodes="2:2", restarts=1, light=True, faults=["exit:cycle=0,step=3,rank=0"])
    job.hold(0, 3)
    job.hold(1, 3)
    job.start("node1", "node2")
    job.wait_reached(0, 3, "node1", "node2")
    job.start("node3")
    job.launchers["node3"].wait_for("spare")
    job.release(0, 3)
    # A round with more live nodes than have a place in it.
    job.pass_gate(1, 3, "node1", "node2")
    job.assert_ends(node1=0, node2=0, node3=0)
    assert sorted(job.ranks(1)) == ["node1", "node2"]
    assert job.told(1) == (1, "rank_failed", 2)


def test_V12_a_job_that_too_few_nodes_join_ends_and_names_who_came(local_job):
    job = local_job
    job.plan("--ft-exit-codes", "classified", nodes="2:3", light=True, join_timeout="2")
    job.start("node1")
    job.assert_ends(node1=75)
    assert "1 of 2" in job.output or "1 node" in job.output


def test_B4_the_count_of_restarts_is_one_for_all_nodes_and_no_newcomer_resets_it(local_job):
    job = local_job
    job.plan(
        nodes="2:2",
        restarts=2,
        light=True,
        faults=["exit:cycle=0,step=2,rank=0", "exit:cycle=2,step=3,rank=0", "exit:cycle=2,step=3,rank=1"],
    )
    job.hold(1, 2)
    job.hold(2, 3)
    job.start("node1", "node2")
    job.wait_reached(1, 2, "node1", "node2")
    killed = job.launchers["node2"]
    killed.send(9)
    assert killed.wait() == -9
    job.start("node2")
    job.wait_reached(2, 3, "node1", "node2")
    assert [job.told(cycle)[0] for cycle in (0, 1, 2)] == [0, 1, 2]
    job.release(1, 2)
    job.release(2, 3)
    job.assert_ends(node1=1, node2=1)
    assert job.cycles() == [0, 1, 2]
