"""Places in a round and group ranks: a bijection, stable, the same for every order of input."""

import random
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from ft_launcher.errors import UsageError
from ft_launcher.ranks import Candidate, assign, choose, conflict, highest_rank, infra_rank, natural_key

NODES = 6


def node(number, *, infra=None, previous=None, name=None, pid=100, arrival=None):
    return Candidate(
        id=f"id-{number}",
        name=name or f"node{number}",
        pid=pid,
        infra_rank=infra,
        previous_rank=previous,
        arrival=number if arrival is None else arrival,
    )


def subsets(items):
    masks = product((False, True), repeat=len(items))
    return [[item for item, is_in in zip(items, mask, strict=True) if is_in] for mask in masks]


def play(live, max_nodes, last, *, by_infrastructure):
    """Choose and assign one round among `live`, of whom those in `last` had these ranks in the round before."""
    candidates = [replace(each, previous_rank=last.get(each.id)) for each in live]
    chosen, spares = choose(candidates, max_nodes, by_infrastructure=by_infrastructure)
    members = [each for each in candidates if each.id in chosen]
    ranks = assign(members, max_nodes, by_infrastructure=by_infrastructure)
    assert sorted(chosen + spares) == sorted(each.id for each in live)
    assert len(chosen) == min(max_nodes, len(live))
    assert sorted(ranks.values()) == list(range(len(chosen)))
    assert ranks.keys() == set(chosen)
    return ranks


@st.composite
def worlds(draw):
    """Candidates as they could ever come, also with what should not be: one number or last rank for two nodes."""
    some_rank = st.none() | st.integers(0, 9)
    count = draw(st.integers(0, 8))
    names = st.sampled_from(["node1", "node2", "node10", "gpu", "10.0.0.9", "10.0.0.10"])
    return [
        Candidate(
            id=f"id-{number}",
            name=draw(names),
            pid=draw(st.integers(1, 3)),
            infra_rank=draw(some_rank),
            previous_rank=draw(some_rank),
            arrival=draw(st.integers(0, 9)),
        )
        for number in range(count)
    ]


@given(worlds(), st.integers(1, 8), st.booleans())
def test_ranks_are_0_to_k_minus_1_each_once_whatever_the_nodes_claim(nodes, max_nodes, by_infrastructure):
    chosen, spares = choose(nodes, max_nodes, by_infrastructure=by_infrastructure)
    assert len(chosen) == min(max_nodes, len(nodes))
    assert sorted(chosen + spares) == sorted(each.id for each in nodes)
    ranks = assign([each for each in nodes if each.id in chosen], max_nodes, by_infrastructure=by_infrastructure)
    assert ranks.keys() == set(chosen)
    assert sorted(ranks.values()) == list(range(len(chosen)))


@given(worlds(), st.integers(1, 8), st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_the_input_changes_nothing(nodes, max_nodes, by_infrastructure, chance: random.Random):
    shuffled = chance.sample(nodes, len(nodes))
    chosen = choose(nodes, max_nodes, by_infrastructure=by_infrastructure)
    assert choose(shuffled, max_nodes, by_infrastructure=by_infrastructure) == chosen
    assert assign(shuffled[:max_nodes], max_nodes, by_infrastructure=by_infrastructure) == assign(
        sorted(shuffled[:max_nodes], key=lambda each: each.id), max_nodes, by_infrastructure=by_infrastructure
    )


def test_every_input_order_of_equal_names_and_arrivals_gives_one_result():
    nodes = [node(number, name="same", pid=7, arrival=0) for number in range(4)]
    results = {
        (
            tuple(choose(order, 2, by_infrastructure=False)[0]),
            tuple(sorted(assign(order, 4, by_infrastructure=False).items())),
        )
        for order in permutations(nodes)
    }
    assert len(results) == 1


@pytest.mark.parametrize("by_infrastructure", [False, True])
def test_who_had_a_place_and_lives_keeps_it_and_the_same_nodes_their_ranks(by_infrastructure):
    """Every pair of live sets of 6 nodes, with and without numbers, whoever of them had a place before."""
    for numbered in (0, 3, NODES):
        everyone = [node(number, infra=number if number < numbered else None) for number in range(NODES)]
        for max_nodes in (1, 3, NODES):
            for before in subsets(everyone):
                first = play(before, max_nodes, {}, by_infrastructure=by_infrastructure)
                for after in subsets(everyone):
                    second = play(after, max_nodes, first, by_infrastructure=by_infrastructure)
                    assert set(first) & {each.id for each in after} <= set(second)
                third = play(before, max_nodes, first, by_infrastructure=by_infrastructure)
                assert third == first


@given(
    st.lists(st.none() | st.integers(0, 9), min_size=1, max_size=8).map(
        # No number twice: the leader refuses that.
        lambda numbers: [rank if rank not in numbers[:place] else None for place, rank in enumerate(numbers)]
    ),
    st.lists(st.sets(st.integers(0, 7)), min_size=1, max_size=6),
    st.integers(1, 8),
    st.booleans(),
)
def test_a_restart_of_the_same_nodes_moves_nobody_whatever_came_before(numbers, rounds, max_nodes, by_infrastructure):
    everyone = [node(place, infra=rank) for place, rank in enumerate(numbers)]
    last: dict[str, int] = {}
    for alive in rounds:
        live = [each for place, each in enumerate(everyone) if place in alive]
        last = play(live, max_nodes, last, by_infrastructure=by_infrastructure)
        assert play(live, max_nodes, last, by_infrastructure=by_infrastructure) == last
        if by_infrastructure:
            meant = [each for each in live if each.id in last and (each.infra_rank or 0) < max_nodes]
            in_order = sorted((each.infra_rank, last[each.id]) for each in meant if each.infra_rank is not None)
            assert [rank for _, rank in in_order] == sorted(rank for _, rank in in_order)


def test_a_spare_between_closed_up_places_keeps_its_rank_at_a_crash():
    nodes = [node(0, infra=0), node(2, infra=2), node(9, infra=9)]
    lost = node(1, infra=1)
    world = [replace(nodes[0], previous_rank=0), replace(nodes[1], previous_rank=2), replace(nodes[2], previous_rank=3)]
    ranks = assign(world, 5, by_infrastructure=True)
    assert ranks == {"id-0": 0, "id-2": 1, "id-9": 2}
    again = [replace(each, previous_rank=ranks[each.id]) for each in nodes]
    assert assign(again, 5, by_infrastructure=True) == ranks
    assert assign([*again, lost], 5, by_infrastructure=True) == {"id-0": 0, "id-1": 1, "id-2": 2, "id-9": 3}


def test_after_any_loss_whoever_can_keep_its_rank_does():
    everyone = [node(number) for number in range(NODES)]
    for before, after in product(subsets(everyone), repeat=2):
        first = play(before, NODES, {}, by_infrastructure=False)
        second = play(after, NODES, first, by_infrastructure=False)
        for each in after:
            if first.get(each.id, NODES) < len(after):
                assert second[each.id] == first[each.id]


def test_replacements_take_the_ranks_of_the_lost_nodes_and_nobody_else_moves():
    for size in range(1, NODES + 1):
        old = [node(number) for number in range(size)]
        first = play(old, NODES, {}, by_infrastructure=False)
        for kept in subsets(old):
            lost = size - len(kept)
            # Names that come before and after those of the others: order of names must not move anyone.
            new = [node(10 + number, name=f"{'az'[number % 2]}{number}") for number in range(lost)]
            second = play([*kept, *new], NODES, first, by_infrastructure=False)
            assert {each.id: second[each.id] for each in kept} == {each.id: first[each.id] for each in kept}
            gaps = {first[each.id] for each in old if each not in kept}
            assert {second[each.id] for each in new} == gaps


def test_newcomers_fill_the_gaps_in_natural_order_of_their_names():
    kept = node(0, previous=1)
    new = [node(1, name="node10"), node(2, name="node2"), node(3, name="node2", pid=99)]
    ranks = assign([kept, *new], 4, by_infrastructure=False)
    assert ranks == {"id-0": 1, "id-3": 0, "id-2": 2, "id-1": 3}


def test_displaced_nodes_fill_the_gaps_in_order_of_their_last_ranks_before_newcomers():
    nodes = [node(0, previous=5, name="a"), node(1, previous=4, name="z"), node(2, name="0"), node(3, previous=1)]
    assert assign(nodes, 6, by_infrastructure=False) == {"id-3": 1, "id-1": 0, "id-0": 2, "id-2": 3}


def test_a_first_round_without_numbers_is_in_natural_order_of_names():
    names = ["node10", "node2", "node1", "gpu-b3", "gpu-b20"]
    nodes = [node(number, name=name) for number, name in enumerate(names)]
    ranks = assign(nodes, 5, by_infrastructure=False)
    assert sorted(names, key=lambda name: ranks[f"id-{names.index(name)}"]) == [
        "gpu-b3", "gpu-b20", "node1", "node2", "node10",
    ]  # fmt: skip


def test_the_deterministic_assignment_does_not_look_at_numbers():
    for numbers in permutations(range(4)):
        nodes = [node(place, infra=number) for place, number in enumerate(numbers)]
        assert assign(nodes, 4, by_infrastructure=False) == {f"id-{place}": place for place in range(4)}


def test_in_a_full_world_rank_and_number_agree_whatever_was_before():
    for size in range(1, 5):
        for lasts in permutations([None, *range(size)], size):
            nodes = [node(9 - rank, infra=rank, previous=last) for rank, last in enumerate(lasts)]
            ranks = assign(nodes, size, by_infrastructure=True)
            assert ranks == {each.id: each.infra_rank for each in nodes}


def test_in_a_full_world_of_some_numbered_nodes_those_have_their_numbers():
    for numbered in subsets(range(NODES)):
        nodes = [node(number, infra=number if number in numbered else None) for number in range(NODES)]
        for last in ([None] * NODES, list(range(NODES)), list(reversed(range(NODES)))):
            world = [replace(each, previous_rank=rank) for each, rank in zip(nodes, last, strict=True)]
            ranks = assign(world, NODES, by_infrastructure=True)
            assert all(ranks[f"id-{number}"] == number for number in numbered)


def test_numbered_nodes_are_in_the_order_of_their_numbers_whoever_is_missing():
    for live in subsets(range(NODES)):
        nodes = [node(9 - number, infra=number) for number in live]
        ranks = assign(nodes, NODES, by_infrastructure=True)
        assert ranks == {f"id-{9 - number}": rank for rank, number in enumerate(live)}


def test_spares_take_the_places_of_the_lost_and_the_others_keep_their_ranks():
    size = 4
    everyone = [node(number, infra=number) for number in range(NODES)]
    first = play(everyone, size, {}, by_infrastructure=True)
    assert first == {f"id-{number}": number for number in range(size)}
    for live in subsets(everyone):
        if len(live) >= size:
            second = play(live, size, first, by_infrastructure=True)
            kept = [each for each in live if each.id in first]
            assert all(second[each.id] == first[each.id] for each in kept)
            # The lower number gets the lower place, and the next round changes nothing.
            new = [second[each.id] for each in live if each.id in second and each.id not in first]
            assert new == sorted(set(range(size)) - {first[each.id] for each in kept})
            assert play(live, size, second, by_infrastructure=True) == second


def test_a_spare_that_took_a_place_keeps_it_when_another_node_is_replaced():
    last = [node(0, infra=0, previous=0), node(5, infra=5, previous=1), node(2, infra=2, previous=2)]
    lost, newcomer = last[2], node(4, infra=4)
    ranks = assign([last[0], last[1], newcomer], 3, by_infrastructure=True)
    assert ranks == {"id-0": 0, "id-5": 1, "id-4": 2}
    assert lost.id not in ranks


def test_a_spare_gives_back_a_place_that_its_owner_takes_up_again():
    nodes = [node(0, infra=0, previous=0), node(5, infra=5, previous=1), node(1, infra=1), node(3, infra=3, previous=2)]
    assert assign(nodes, 4, by_infrastructure=True) == {"id-0": 0, "id-1": 1, "id-5": 2, "id-3": 3}


def test_of_two_nodes_with_one_number_the_one_that_had_a_rank_has_its_place():
    nodes = [node(1, infra=0), node(2, infra=0, previous=0), node(3, infra=1)]
    assert assign(nodes, 3, by_infrastructure=True) == {"id-2": 0, "id-3": 1, "id-1": 2}


def test_of_two_newcomers_with_one_number_the_first_to_arrive_has_its_place():
    nodes = [node(1, infra=0, arrival=6), node(2, infra=0, arrival=5), node(3, infra=1)]
    for order in permutations(nodes):
        assert assign(order, 3, by_infrastructure=True) == {"id-2": 0, "id-3": 1, "id-1": 2}


def test_spares_without_a_last_rank_fill_the_places_in_order_of_numbers_then_names():
    nodes = [
        node(1, name="node10", arrival=1), node(2, name="node2", arrival=2), node(3, infra=9, arrival=3),
        node(4, infra=8, arrival=4), node(5, infra=1, arrival=5),
    ]  # fmt: skip
    assert assign(nodes, 5, by_infrastructure=True) == {"id-4": 0, "id-5": 1, "id-3": 2, "id-2": 3, "id-1": 4}


def test_a_number_below_0_is_as_good_as_none():
    assert assign([node(1, infra=-1), node(2, infra=0)], 2, by_infrastructure=True) == {"id-2": 0, "id-1": 1}


def test_newcomers_are_chosen_in_order_of_arrival_not_of_names():
    nodes = [node(1, arrival=3), node(2, arrival=2), node(3, arrival=1)]
    assert choose(nodes, 2, by_infrastructure=False) == (["id-3", "id-2"], ["id-1"])


def test_who_had_a_place_keeps_it_and_the_first_to_arrive_is_the_first_spare():
    nodes = [node(1, previous=2), node(2), node(3, previous=0), node(4), node(5, previous=1)]
    chosen, spares = choose(reversed(nodes), 3, by_infrastructure=False)
    assert chosen == ["id-3", "id-5", "id-1"]
    assert spares == ["id-2", "id-4"]


def test_a_late_node_whose_number_has_a_place_waits_when_a_spare_has_taken_it():
    nodes = [node(0, infra=0, previous=0), node(9, infra=9, previous=1), node(1, infra=1)]
    assert choose(nodes, 2, by_infrastructure=True) == (["id-0", "id-9"], ["id-1"])


def test_newcomers_that_the_infrastructure_meant_come_before_those_that_arrived_earlier():
    nodes = [node(0, infra=7), node(1), node(2, infra=1), node(3, infra=0), node(4, infra=3)]
    assert choose(nodes, 3, by_infrastructure=True) == (["id-3", "id-2", "id-0"], ["id-1", "id-4"])
    assert choose(nodes, 3, by_infrastructure=False) == (["id-0", "id-1", "id-2"], ["id-3", "id-4"])


def test_nodes_that_arrived_together_are_chosen_in_natural_order_of_names():
    nodes = [node(number, name=f"node{number}", arrival=0) for number in (10, 2, 1)]
    assert choose(nodes, 2, by_infrastructure=False) == (["id-1", "id-2"], ["id-10"])


def test_numbers_in_names_are_sorted_as_numbers():
    names = ["n", "n-1", "n0", "n1", "n1a", "n2", "n02", "n10", "n10-gpu2", "n10-gpu10", "n" + "9" * 5000, "na"]
    ordered = ["n", "n0", "n1", "n1a", "n02", "n2", "n10", "n10-gpu2", "n10-gpu10", "n" + "9" * 5000, "n-1", "na"]
    assert sorted(names, key=natural_key) == ordered
    assert sorted(["10.0.0.10", "10.0.0.9"], key=natural_key) == ["10.0.0.9", "10.0.0.10"]


@given(st.lists(st.text("ab01-.\u0661\n", max_size=5) | st.text(max_size=5), max_size=3))
def test_the_natural_order_of_names_is_total(names):
    for one, other in product(names, repeat=2):
        assert (natural_key(one) == natural_key(other)) == (one == other)
        assert (natural_key(one) < natural_key(other)) + (natural_key(other) < natural_key(one)) == (one != other)


@given(st.text("ab-.", max_size=3), st.integers(0, 10**6), st.integers(0, 10**6), st.text("ab-.", max_size=3))
def test_two_nodes_of_one_series_are_in_the_order_of_their_numbers(prefix, one, other, suffix):
    ordered = natural_key(f"{prefix}{one}{suffix}") < natural_key(f"{prefix}{other}{suffix}")
    assert ordered == (one < other)


def test_two_live_nodes_with_one_number_are_a_conflict_that_names_both():
    first, second = node(2, infra=1, name="n2", pid=7), node(3, infra=1, name="n3", pid=9)
    assert conflict(second, [node(1, infra=0), first, second], "SLURM_PROCID", 3) == (
        "SLURM_PROCID=1 is claimed by node n2 (pid 7) and by node n3 (pid 9); every node needs a number of its own"
    )


def test_of_several_holders_of_a_number_the_first_to_arrive_is_named():
    holders = [node(number, infra=1) for number in (4, 2, 3)]
    for order in permutations(holders):
        assert "by node node2 (pid 100) and by node node5" in (conflict(node(5, infra=1), order, "GROUP_RANK", 3) or "")


def test_a_number_outside_the_range_is_a_conflict_that_says_the_range():
    assert conflict(node(3, infra=4, name="n3", pid=9), [], "GROUP_RANK", 3) == (
        "GROUP_RANK=4 of node n3 (pid 9) is outside 0..3; number the nodes from 0, or raise the maximum of --nnodes"
    )
    assert conflict(node(3, infra=-1), [], "GROUP_RANK", 3) is not None


def test_nodes_with_numbers_of_their_own_or_none_are_in_no_conflict():
    others = [node(1, infra=0), node(2), node(3, infra=3)]
    assert conflict(node(4, infra=1), others, "SLURM_PROCID", 3) is None
    assert conflict(node(4), others, "SLURM_PROCID", 3) is None
    assert conflict(others[2], others, "SLURM_PROCID", 3) is None


def test_slurms_number_comes_before_group_rank():
    assert infra_rank({"SLURM_PROCID": "2", "GROUP_RANK": "5"}) == (2, "SLURM_PROCID")
    assert infra_rank({"GROUP_RANK": "5", "RANK": "7"}) == (5, "GROUP_RANK")
    assert infra_rank({"SLURM_PROCID": "0"}) == (0, "SLURM_PROCID")
    assert infra_rank({"SLURM_NTASKS": "4", "RANK": "7"}) is None


@pytest.mark.parametrize("value", ["", "-1", "1.0", "one", "0x1", "\u0661", "1_0", "9" * 5000])
@pytest.mark.parametrize("variable", ["SLURM_PROCID", "GROUP_RANK"])
def test_a_number_that_is_none_is_an_error_that_names_the_variable_and_its_value(variable, value):
    with pytest.raises(UsageError) as raised:
        infra_rank({variable: value})
    assert str(raised.value).startswith(f"{variable}={value!r} ")


def test_tasks_of_slurm_beyond_the_maximum_are_in_range():
    assert highest_rank({"SLURM_NTASKS": "6"}, "SLURM_PROCID", 4) == 5
    assert highest_rank({"SLURM_NPROCS": "6"}, "SLURM_PROCID", 4) == 5
    assert highest_rank({"SLURM_NTASKS": "5", "SLURM_NPROCS": "6"}, "SLURM_PROCID", 4) == 4
    assert highest_rank({"SLURM_NTASKS": "2"}, "SLURM_PROCID", 4) == 3
    assert highest_rank({}, "SLURM_PROCID", 4) == 3


def test_slurms_number_of_tasks_says_nothing_about_group_rank():
    assert highest_rank({"SLURM_NTASKS": "6"}, "GROUP_RANK", 4) == 3


def test_a_number_of_tasks_that_is_none_is_an_error_that_names_it():
    with pytest.raises(UsageError, match=r"^SLURM_NTASKS='many' "):
        highest_rank({"SLURM_NTASKS": "many"}, "SLURM_PROCID", 4)
