"""The rounds of many nodes in virtual time, and the client that the benchmarks speak to a store with."""

import importlib
import json
import math
import sys
import time
from pathlib import Path

import pytest

from ft_launcher.exchange import Add, CompareSet, Delete, Get, MultiGet, MultiSet, Wait, perform

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
COSTS = {"add": 4e-6, "compare_set": 4e-6, "wait": 4e-6, "get": 4e-6, "delete": 4e-6}


@pytest.fixture
def simulation(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("simulate_rendezvous")
    for name in ("simulate_rendezvous", "bench_rendezvous", "tcpstore_wire", "harness"):
        sys.modules.pop(name, None)


@pytest.fixture
def simulate(simulation):
    costs = simulation.Costs(**COSTS, wake=1e-6, per_key=2e-7, per_byte=1e-9)
    return lambda n: simulation.simulate(n, costs, 50e-6, with_leader_cpu=False)


def test_a_node_makes_as_many_requests_in_a_round_of_4_as_in_one_of_200(simulate):
    few, many = simulate(4), simulate(200)
    # The node with the failure has written one event more than the others.
    assert sorted(set(few.node_requests)) == sorted(set(many.node_requests)) == [8, 10]
    assert few.node_requests.count(10) == many.node_requests.count(10) == 1


def test_a_node_moves_as_many_bytes_in_a_round_of_4_as_in_one_of_200(simulate):
    few, many = simulate(4), simulate(200)
    # But for the digits of greater numbers.
    assert max(many.node_bytes) < 1.05 * max(few.node_bytes)


def test_what_all_move_in_a_round_grows_with_their_number(simulation, simulate):
    numbers = [25, 50, 100, 200]
    outcomes = [simulate(n) for n in numbers]
    assert simulation.slope(numbers, [each.moved for each in outcomes]) == pytest.approx(1, abs=0.05)
    assert simulation.slope(numbers, [each.requests for each in outcomes]) == pytest.approx(1, abs=0.05)


def test_the_benchmarks_client_and_torchs_understand_the_same(simulation):
    store = simulation.open_store()
    importlib.import_module("tcpstore_wire").check("127.0.0.1", store.port)


def test_the_recorded_costs_are_those_that_the_simulation_asks_for(simulation):
    recorded = json.loads(simulation.RECORDED.read_text())
    assert all(value >= 0 for value in vars(simulation.Costs(**recorded["seconds"])).values())


def test_the_model_of_the_store_gives_what_torchs_store_gives(simulation):
    """Each operation of exchange.py, on both."""

    def steps():
        seen = []
        for operation in (
            Add("count", 2),
            Add("count", 0),
            CompareSet("slot", b"first"),
            CompareSet("slot", b"second"),
            Get("slot"),
            MultiSet(["a", "b"], [b"1", b""]),
            MultiGet(["a", "b"], 1.0),
            MultiGet(["a", "missing"], 0.05),
            Wait(["b"], 1.0),
            Wait(["a", "b"], math.inf),
            Wait(["a", "missing"], 0.05),
            Wait(["missing"], 0.0),
            Wait(["a", "b"], 0.0),
        ):
            result = yield operation
            seen.append(result)
        yield Delete("a")  # says whether there was something, which nobody looks at, and torch's does not tell
        seen.append((yield Wait(["a"], 0.05)))
        return seen

    theirs = perform(steps(), simulation.open_store(), time.monotonic)
    world = simulation.World()
    costs = simulation.Costs(**COSTS, wake=1e-6, per_key=2e-7, per_byte=1e-9)
    client = simulation.Client(world, simulation.ModelStore(world, costs, 50e-6), lambda: 0.0)
    ended: list[list[object]] = []
    client.start(steps(), ended.append)
    world.run(lambda: bool(ended))
    assert ended == [theirs]
