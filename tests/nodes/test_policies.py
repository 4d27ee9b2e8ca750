"""Who restarts when, and with which ranks: three nodes on this machine, whose ranks do no more than the test says."""

import json
import signal

import pytest

THREE = ("node1", "node2", "node3")
MIN_HEALTHY = ("--ft-restart-policy", "min-healthy")


# -- min-healthy ------------------------------------------------------------------------------------------------------


def test_min_healthy_goes_on_without_a_failed_node_and_ends_with_success_everywhere(local_job):
    job = local_job
    job.plan(*MIN_HEALTHY, nodes="2:3", restarts=0, light=True, faults=["exit:cycle=0,step=3,node=node2"])
    job.hold(0, 4)
    job.start(*THREE)
    job.wait_reached(0, 4, "node1", "node3")
    job.launchers["node2"].wait_for("exited with code 7")
    job.release(0, 4)
    # The failed node as well: what counts is that enough have succeeded.
    job.assert_ends(node1=0, node2=0, node3=0)
    assert job.cycles() == [0]
    assert job.told(0) == (0, "", 0)


def test_min_healthy_restarts_all_nodes_once_when_too_few_are_left(local_job):
    job = local_job
    faults = ["exit:cycle=0,step=3,node=node2", "exit:cycle=0,step=4,node=node3"]
    job.plan(*MIN_HEALTHY, nodes="2:3", restarts=1, light=True, faults=faults)
    job.hold(0, 4, "node3")
    job.hold(0, 5, "node1")
    job.start(*THREE)
    job.launchers["node2"].wait_for("exited with code 7")
    job.wait_reached(0, 5, "node1")
    job.release(0, 4, "node3")
    # The healthy node waits at its gate for ever: only its launcher can have restarted it.
    job.assert_ends(node1=0, node2=0, node3=0)
    assert job.cycles() == [0, 1]
    assert sorted(job.ranks(1)) == list(THREE)
    assert job.told(1) == (1, "rank_failed", 3)


def test_min_healthy_counts_those_that_have_succeeded(local_job):
    job = local_job
    job.plan(*MIN_HEALTHY, nodes="2:3", restarts=0, light=True, faults=["exit:cycle=0,step=3,node=node2"])
    for node in ("node2", "node3"):
        job.hold(0, 3, node)
    job.start(*THREE)
    job.launchers["node1"].wait_for("cycle 0 finished")
    job.release(0, 3, "node2")
    job.launchers["node2"].wait_for("exited with code 7")
    # One has succeeded, one is healthy: two of two.
    job.release(0, 3, "node3")
    job.assert_ends(node1=0, node2=0, node3=0)
    assert job.cycles() == [0]


def test_min_healthy_ends_with_failure_everywhere_when_no_restart_is_left(local_job):
    job = local_job
    faults = ["exit:cycle=0,step=3,node=node2", "exit:cycle=0,step=4,node=node3"]
    job.plan(*MIN_HEALTHY, nodes="2:3", restarts=0, light=True, faults=faults)
    job.hold(0, 5, "node1")
    job.start(*THREE)
    job.assert_ends(node1=1, node2=1, node3=1)
    assert job.cycles() == [0]


def test_min_healthy_goes_on_without_a_lost_node_and_takes_in_no_new_one(local_job):
    job = local_job
    job.plan(*MIN_HEALTHY, nodes="2:3", restarts=1, light=True, faults=["exit:cycle=0,step=3,node=node1"])
    job.hold(0, 3)
    job.hold(1, 3)
    job.start(*THREE)
    job.wait_reached(0, 3, *THREE)
    lost = job.launchers["node3"]
    lost.send(signal.SIGKILL)
    assert lost.wait() == -signal.SIGKILL
    job.start("node3")
    job.launchers["node3"].wait_for("spare")
    assert job.cycles() == [0]
    # Below the minimum now: all restart, and who waited takes part.
    job.release(0, 3)
    job.pass_gate(1, 3, *THREE)
    job.assert_ends(node1=0, node2=0, node3=0)
    assert job.cycles() == [0, 1]
    assert sorted(job.ranks(1)) == list(THREE)


# -- any-failed -------------------------------------------------------------------------------------------------------


def test_a_hung_rank_of_one_node_restarts_the_ranks_of_all(local_job):
    job = local_job
    # Until a rank's first heartbeat another limit holds, so that node1 can wait at its gate.
    limits = ("--ft-initial-rank-heartbeat-timeout", "300", "--ft-rank-heartbeat-timeout", "1")
    logs = ("--log-dir", str(job.sandbox.path / "logs"))  # the stacks of the hung rank stay there
    job.plan(*limits, *logs, nodes="2", light=True, faults=["hang:cycle=0,step=2,node=node2"])
    job.hold(0, 1, "node1")
    job.start("node1", "node2")
    job.assert_ends(node1=0, node2=0)
    assert job.cycles() == [0, 1]
    assert sorted(job.ranks(1)) == ["node1", "node2"]
    assert job.told(1) == (1, "rank_hung", 2)


# -- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["SLURM_PROCID", "GROUP_RANK"])
def test_the_infrastructure_says_which_rank_a_node_has_in_every_round(local_job, variable):
    job = local_job
    log_dir = job.sandbox.path / "logs"
    job.plan("--log-dir", str(log_dir), nodes="3", light=True, faults=["exit:cycle=0,step=2,rank=1"])
    job.hold(0, 2)
    for number, node in ((2, "node1"), (0, "node2"), (1, "node3")):
        job.start(node, **{variable: str(number)})
    job.pass_gate(0, 2, *THREE)
    job.assert_ends(node1=0, node2=0, node3=0)
    assert job.cycles() == [0, 1]
    for cycle in (0, 1):
        assert job.ranks(cycle) == ["node2", "node3", "node1"]
    # Written once for all nodes, and said once in each round, by the host.
    placement = json.loads((log_dir / "placement.json").read_text())
    pids = {node: launcher.pid for node, launcher in job.launchers.items()}
    assert [node["pid"] for node in placement["nodes"]] == [pids["node2"], pids["node3"], pids["node1"]]
    assert [node["ranks"] for node in placement["nodes"]] == [[0], [1], [2]]
    assert placement["round"] == 1
    assert [line.count(variable) for line in job.output.splitlines() if "placement of round" in line] == [1, 1]


def test_a_flag_lets_the_nodes_find_their_ranks_among_themselves(local_job):
    job = local_job
    job.plan("--ft-use-infra-group-rank", "False", nodes="3", light=True, faults=["exit:cycle=0,step=2,rank=1"])
    job.hold(0, 2)
    for number, node in ((2, "node1"), (0, "node2"), (1, "node3")):
        job.start(node, SLURM_PROCID=str(number))
    job.pass_gate(0, 2, *THREE)
    job.assert_ends(node1=0, node2=0, node3=0)
    first = job.ranks(0)
    assert sorted(first) == list(THREE)
    assert job.ranks(1) == first


def test_nodes_with_different_numbers_of_workers_have_ranks_without_gaps(local_job):
    job = local_job
    job.plan(nodes="3", light=True)
    for node, ranks, number in (("node1", 1, 0), ("node2", 3, 1), ("node3", 2, 2)):
        job.start(node, flags=["--nproc-per-node", str(ranks)], SLURM_PROCID=str(number))
    job.assert_ends(node1=0, node2=0, node3=0)
    assert job.ranks(0) == ["node1", "node2", "node2", "node2", "node3", "node3"]


@pytest.mark.parametrize(
    ("number", "said"),
    [("1", "SLURM_PROCID=1 is claimed by node"), ("7", "SLURM_PROCID=7 of node")],
    ids=["twice", "out of range"],
)
def test_N8_two_nodes_of_one_number_or_one_out_of_range_end_all_and_are_named(local_job, number, said):
    job = local_job
    job.plan(nodes="3", light=True)
    for node, own in (("node1", "0"), ("node2", "1")):
        job.start(node, SLURM_PROCID=own)
        job.launchers[node].wait_for("joined job")  # who comes to a job that has ended finds nobody
    job.start("node3", SLURM_PROCID=number)
    job.assert_ends(node1=2, node2=2, node3=2)
    assert job.cycles() == []
    for launcher in job.launchers.values():
        assert said in launcher.output
        for culprit in ("node2", "node3") if number == "1" else ("node3",):
            assert f"(pid {job.launchers[culprit].pid})" in launcher.output


# -- nodes that do not fit together -----------------------------------------------------------------------------------


def test_N9_N10_a_node_that_does_not_fit_is_told_why_and_disturbs_nobody(local_job):
    job = local_job
    job.plan(nodes="2:3", light=True, last_call_timeout="1", join_timeout="20")
    job.hold(0, 3)
    job.start("node1", "node2", FT_TOKEN="ours")
    job.wait_reached(0, 3, "node1", "node2")

    def refused(*flags, token="ours", change=""):
        # Versions are changed in the launcher before its first line: there is no second installation to take.
        folder = job.directory / f"changed-{len(change)}"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(f"import sys\nif 'ft_launcher' in sys.orig_argv:\n    {change or 0}\n")
        odd = job.start("node3", flags=flags, FT_TOKEN=token, PYTHONPATH=str(folder))
        assert odd.wait() == 2, odd.output
        assert token not in odd.output
        return odd.output

    said = refused("--nnodes", "2:4")
    assert "has --nnodes 2:4, node" in said
    assert "has 2:3; give both the same" in said
    assert "--max-restarts 7" in refused("--max-restarts", "7")
    assert "--ft-restart-policy min-healthy" in refused("--ft-restart-policy", "min-healthy")
    assert "--rdzv-id" in refused("--rdzv-id", "another-job")
    assert "another token" in refused(token="theirs")
    for change in ("import torch; torch.__version__ = '0.99'", "import ft_launcher.records as r; r.PROTOCOL = 99"):
        said = refused(change=change)
        assert "99" in said
        assert "install the same" in said
    job.release(0, 3)
    job.assert_ends(node1=0, node2=0)
    assert job.cycles() == [0]
    assert sorted(job.ranks(0)) == ["node1", "node2"]  # asserts that the ranks were not given the secret
    assert "ours" not in job.launchers["node1"].output
