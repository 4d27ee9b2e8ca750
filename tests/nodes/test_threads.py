"""Public threads of users whose job did not survive, each as a test that shows the outcome they asked for."""

import signal

THREE = ("node1", "node2", "node3")


def test_pytorch_111646_a_lost_agent_scales_the_job_down_without_any_collective_failing(local_job):
    """The agents logged missed keep-alives, and went on waiting for NCCL to time out."""
    job = local_job
    job.plan(nodes="2:3", light=True)
    job.hold(0, 3)
    job.start(*THREE)
    job.wait_reached(0, 3, *THREE)
    job.launchers["node3"].send(signal.SIGKILL)
    # Ranks of round 0 wait where nothing but their own launcher can end them.
    job.wait_reached(1, 3, "node1", "node2")
    job.release(0, 3)
    job.assert_ends(node1=0, node2=0)
    assert sorted(job.ranks(1)) == ["node1", "node2"]
    assert job.told(1) == (1, "node_lost", 3)


def test_pytorch_67742_agents_that_are_asked_to_stop_leave_and_the_others_go_on(local_job):
    """A SIGINT or SIGTERM to one agent closed the rendezvous, and took the whole job down."""
    job = local_job
    job.plan(nodes="1:3", restarts=0, light=True)
    for cycle in (0, 1, 2):
        job.hold(cycle, 3)
    job.start(*THREE)
    job.wait_reached(0, 3, *THREE)
    job.launchers["node3"].send(signal.SIGTERM)
    job.wait_reached(1, 3, "node1", "node2")
    job.launchers["node2"].send(signal.SIGINT)
    job.wait_reached(2, 3, "node1")
    for cycle in (0, 1, 2):
        job.release(cycle, 3)
    job.assert_ends(node1=0, node2=128 + signal.SIGINT, node3=128 + signal.SIGTERM)
    assert job.told(1) == (0, "node_left", 3)
    assert job.told(2) == (0, "node_left", 2)
    assert job.ranks(2) == ["node1"]


def test_pytorch_147064_a_node_that_left_comes_back_and_no_return_gets_around_the_count(local_job):
    """It was met by RendezvousClosedError; or, quick enough, restarted for ever with --max-restarts=0."""
    job = local_job
    job.plan(nodes="2:2", restarts=0, light=True, faults=["exit:cycle=1,step=3,node=node2"])
    job.hold(0, 3)
    job.hold(1, 3)
    job.start("node1", "node2")
    job.wait_reached(0, 3, "node1", "node2")
    leaver = job.launchers["node2"]
    leaver.send(signal.SIGTERM)
    assert leaver.wait() == 128 + signal.SIGTERM
    job.start("node2")
    job.pass_gate(1, 3, "node1", "node2")
    # The peer of a node that fails does not hang, and the job ends where no restart is left.
    job.assert_ends(node1=1, node2=1)
    assert job.cycles() == [0, 1]
    assert sorted(job.ranks(1)) == ["node1", "node2"]
    assert job.told(1)[0] == 0
    assert "RendezvousClosedError" not in job.output


def test_pytorch_108158_all_workers_are_told_the_same_count_of_restarts(local_job):
    """Only the workers of the agent whose worker had failed saw a count above 0."""
    job = local_job
    faults = ["exit:cycle=0,step=2,rank=1", "exit:cycle=1,step=2,rank=2"]
    job.plan(nodes="3", restarts=2, light=True, faults=faults)
    job.hold(0, 2)
    job.hold(1, 2)
    job.start(*THREE)
    job.pass_gate(0, 2, *THREE)
    job.pass_gate(1, 2, *THREE)
    job.assert_ends(node1=0, node2=0, node3=0)
    for cycle in (0, 1, 2):
        assert len(job.ranks(cycle)) == 3  # asserts that all were told the same
        assert job.told(cycle)[0] == cycle
    assert [start.torch_restarts for start in job.starts() if start.cycle == 0] == [0, 0, 0]


def test_pytorch_76287_a_job_ends_although_a_worker_elsewhere_does_not_want_to(local_job):
    """Hung workers kept the agents of a crashed job for eight hours, and Slurm from starting it again."""
    job = local_job
    faults = [
        "stubborn:cycle=0,step=2,node=node2",
        "stubborn:cycle=0,step=2,node=node1",
        "exit:cycle=0,step=2,node=node3",
    ]
    job.plan("--shutdown-timeout", "1", nodes="3", restarts=0, light=True, faults=faults)
    job.hold(0, 2, "node3")
    job.start(*THREE)
    for node in ("node1", "node2"):
        job.launchers[node].wait_for("cycle 0 is stubborn")
    job.release(0, 2, "node3")
    job.assert_ends(node1=1, node2=1, node3=1)


def test_nvidia_resiliency_ext_348_a_hot_spare_never_closes_the_rendezvous(local_job):
    """A round with more live agents than places closed it for good, and killed the whole job."""
    job = local_job
    faults = ["exit:cycle=0,step=3,rank=0", "exit:cycle=1,step=3,rank=1"]
    job.plan(nodes="2:2", restarts=3, light=True, faults=faults)
    for cycle in (0, 1, 2):
        job.hold(cycle, 3)
    job.start("node1", "node2")
    job.wait_reached(0, 3, "node1", "node2")
    job.start("node3")
    job.launchers["node3"].wait_for("spare")
    job.release(0, 3)
    job.pass_gate(1, 3, "node1", "node2")
    job.wait_reached(2, 3, "node1", "node2")
    # Now the spare is needed.
    job.launchers["node2"].send(signal.SIGKILL)
    job.launchers["node3"].wait_for("cycle 3 step 3 ")
    job.release(2, 3)
    job.assert_ends(node1=0, node3=0)
    assert [sorted(job.ranks(cycle)) for cycle in (0, 1, 2, 3)] == [*[["node1", "node2"]] * 3, ["node1", "node3"]]
    assert job.told(3) == (3, "node_lost", 2)
