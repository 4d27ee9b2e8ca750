"""Nodes that cannot meet: each says within seconds who is where, and what to change."""

import socket
from contextlib import closing


def test_N12_a_name_that_means_this_machine_itself_elsewhere_is_found_out(job):
    # As Debian's installer writes it for the machine's own name, here copied to another machine.
    job.host("node2").believe("127.0.1.1", "node1")
    job.plan("--rdzv-endpoint", "node1:29400", nodes="2", light=True)
    job.start("node2")
    job.assert_ends(node2=2)
    assert "on node node2 the name node1 means 127.0.1.1" in job.output
    assert "mend /etc/hosts" in job.output


def test_N12_a_host_whose_own_name_is_a_loopback_address_is_found_by_the_others(job):
    job.host("node1").believe("127.0.1.1", "node1")
    job.plan("--rdzv-endpoint", "node1:29400", nodes="2")
    job.start("node1", "node2")
    # A real training: the ranks, too, must have been told an address that others reach.
    job.assert_ends(node1=0, node2=0)
    assert job.ranks(0) == ["node1", "node2"]


def test_N12_a_name_that_nobody_knows_and_a_machine_that_is_down_are_named(job):
    job.plan(nodes="2", light=True, join_timeout="3")
    job.host("node1").cut()
    job.start("node2")
    job.start("node10", flags=["--rdzv-endpoint", "nowhere:29400"])
    job.assert_ends(node2=1, node10=1)
    assert job.endpoints[0] in job.launchers["node2"].output
    assert "the name nowhere cannot be resolved" in job.launchers["node10"].output


def test_N12_an_endpoint_at_which_nobody_listens_is_named(local_job):
    job = local_job
    job.plan(nodes="2", light=True, join_timeout="2")
    job.start("node2")
    job.assert_ends(node2=1)
    assert f"{job.endpoints[0]}: nobody listens there" in job.output


def test_N12_a_port_that_another_program_has_is_named(local_job):
    job = local_job
    with closing(socket.create_server(("127.0.0.1", 0))) as program:
        endpoint = f"127.0.0.1:{program.getsockname()[1]}"
        job.plan("--rdzv-endpoint", endpoint, nodes="2", light=True)
        job.start("node1")
        job.assert_ends(node1=2)
    assert f"--rdzv-endpoint {endpoint}: port" in job.output
    assert "in use by another program" in job.output
