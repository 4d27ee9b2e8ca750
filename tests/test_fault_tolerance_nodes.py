"""Ray actors and gangs whose machine is lost: a cluster of several nodes, all on this machine."""

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster

from ft_launcher.integrations.ray_actors import ActorGang, RayFaultToleranceConfig, SupervisedActor
from tests.test_fault_tolerance_integration import Notes

SOON = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
"""Of Ray's system configuration: a node that has vanished is dead for Ray after a second, not after ten."""

PLACES: dict[str, Any] = {"num_cpus": 0, "resources": {"place": 2}, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head, and one node with two places."""
    directory = tempfile.mkdtemp(prefix="r", dir="/tmp")
    head = {"num_cpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**head, "_system_config": SOON, "temp_dir": directory},
        shutdown_at_exit=False,
    )
    try:
        cluster.add_node(**PLACES)
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(directory)


class Guest:
    def __init__(self, notes):
        self.notes = notes
        notes.add("pids", os.getpid())

    def stay(self):
        """Return in the second process only."""
        self.notes.add("nodes", ray.get_runtime_context().get_node_id())
        if len(self.notes.read("nodes")) == 1:
            threading.Event().wait()
        return "there"

    def node(self):
        return ray.get_runtime_context().get_node_id()


def move(cluster):
    """Add a node with places, and take the other one away."""
    (first,) = cluster.worker_nodes
    cluster.add_node(**PLACES)
    cluster.remove_node(first, allow_graceful=False)


def test_an_actor_whose_machine_is_lost_comes_back_on_another_and_its_call_is_not_to_blame(cluster, tmp_path):
    notes, config = Notes(tmp_path), RayFaultToleranceConfig()
    options = {"num_cpus": 0, "resources": {"place": 1}}
    with SupervisedActor(Guest, (notes,), config=config, options=options, poison_after=1) as actor:
        call = actor.submit("stay")
        notes.wait_for("nodes")
        move(cluster)
        assert call.result() == "there"
        assert actor.restarts == 1
    assert len(set(notes.read("nodes"))) == 2


def test_a_gang_whose_machine_is_lost_comes_back_on_another(cluster, tmp_path):
    config = RayFaultToleranceConfig()
    with ActorGang(Guest, 2, (Notes(tmp_path),), config=config, bundle={"place": 1}) as gang:
        gang.ready(60)
        before = set(gang.call("node"))
        move(cluster)
        nodes: list[set[str]] = []
        gang.run(lambda _step: nodes.append(set(gang.call("node"))), stop=1)
        while nodes[-1] == before:  # its death has not come through yet
            gang.run(lambda _step: nodes.append(set(gang.call("node"))), stop=1)
        assert gang.restarts == 1
        assert len(nodes[-1]) == len(before) == 1
