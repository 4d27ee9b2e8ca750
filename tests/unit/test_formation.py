"""When rounds form, exhaustively for up to 6 nodes, and that two halves of a cut network never both go on."""

from collections.abc import Iterator
from itertools import pairwise, product
from math import inf

import pytest
from msgspec.structs import replace

from ft_launcher.formation import Gathering, forms_at, quorum, stronger, terms_conflict
from ft_launcher.records import PROTOCOL, Node, Reason, ReasonKind, Terms

LAST_CALL = 30.0
SINCE = 100.0
NODES = 6


def gatherings() -> Iterator[Gathering]:
    """Give every situation of up to 6 live nodes, spares and late ones among them; excluded ones are no longer live."""
    for min_nodes in range(1, NODES + 1):
        for max_nodes, live in product(range(min_nodes, NODES + 1), range(NODES + 1)):
            for ready, first in product(range(live + 1), (True, False)):
                for expected in (None, *range(min_nodes, max_nodes + 1)):
                    for old, old_needed in {(0, 0), *((ready, needed) for needed in range(1, 5))}:
                        yield Gathering(
                            ready=ready,
                            live=live,
                            min_nodes=min_nodes,
                            max_nodes=max_nodes,
                            first=first,
                            enough_since=SINCE if ready >= min_nodes else None,
                            expected=expected,
                            old=old,
                            old_needed=old_needed,
                        )


ALL = list(gatherings())


def test_fewer_than_the_fewest_never_form_a_round_and_more_always_do_in_the_end() -> None:
    for g in ALL:
        enough = g.ready >= g.min_nodes and g.old >= g.old_needed
        everybody_stopped = g.ready == g.live
        assert (forms_at(g, LAST_CALL) < inf) == (enough and (g.first or everybody_stopped)), g


def test_a_first_round_waits_for_the_last_call_unless_nobody_else_can_come_in() -> None:
    for g in ALL:
        at = forms_at(g, LAST_CALL)
        if g.first and at < inf:
            complete = g.ready >= g.max_nodes or (g.expected is not None and g.ready >= g.expected)
            assert at == (-inf if complete else SINCE + LAST_CALL), g


def test_a_later_round_forms_at_once_when_all_live_nodes_have_stopped_and_never_before() -> None:
    for g in ALL:
        if not g.first:
            # Not even with max_nodes ready: a spare would take the place of a node that is still stopping.
            enough = g.min_nodes <= g.ready == g.live and g.old >= g.old_needed
            assert forms_at(g, LAST_CALL) == (-inf if enough else inf), g


def test_one_more_ready_node_never_delays_a_round() -> None:
    for g in ALL:
        if g.ready < g.live:
            more = replace(g, ready=g.ready + 1, old=g.old + 1, enough_since=g.enough_since or SINCE)
            assert forms_at(more, LAST_CALL) <= forms_at(g, LAST_CALL), g


def test_an_expected_number_of_nodes_makes_a_first_round_earlier_and_never_later() -> None:
    for g in ALL:
        assert forms_at(g, LAST_CALL) <= forms_at(replace(g, expected=None), LAST_CALL), g


def test_who_needs_nodes_of_the_last_round_does_not_start_with_others_instead() -> None:
    for g in ALL:
        if g.old < g.old_needed:
            assert forms_at(g, LAST_CALL) == inf, g


# -- two halves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoints", [2, 3])
def test_two_disjoint_parts_of_the_last_round_never_both_go_on(endpoints: int) -> None:
    for last in range(1, NODES + 1):
        # Each node is with the old host, at another endpoint, with a third part, or lost.
        for places in product(range(4), repeat=last):
            with_host, elsewhere, third = (places.count(part) for part in range(3))
            going_on = [with_host >= quorum(last, rebuilt=False, endpoints=endpoints)]
            going_on += [part >= quorum(last, rebuilt=True, endpoints=endpoints) for part in (elsewhere, third)]
            assert sum(going_on) <= 1, (last, places)


@pytest.mark.parametrize("endpoints", [2, 3])
def test_a_majority_that_is_together_goes_on_wherever_it_is(endpoints: int) -> None:
    for last in range(1, NODES + 1):
        for together in range(last // 2 + 1, last + 1):
            assert together >= quorum(last, rebuilt=False, endpoints=endpoints)
            assert together >= quorum(last, rebuilt=True, endpoints=endpoints)


@pytest.mark.parametrize("endpoints", [2, 3])
def test_of_two_equal_halves_the_one_with_the_host_goes_on(endpoints: int) -> None:
    for half in (1, 2, 3):
        assert half >= quorum(2 * half, rebuilt=False, endpoints=endpoints)
        assert half < quorum(2 * half, rebuilt=True, endpoints=endpoints)


def test_with_one_endpoint_nobody_can_go_on_elsewhere_so_nobody_is_needed() -> None:
    for last, rebuilt in product(range(NODES + 1), (True, False)):
        assert quorum(last, rebuilt=rebuilt, endpoints=1) == 0


def test_nodes_that_have_left_for_good_are_missed_by_neither_part() -> None:
    """`Job` takes them off the quorum of the part that they were with: still never two go on."""
    for last in range(1, NODES + 1):
        for places in product(range(5), repeat=last):
            here, gone_here, there, gone_there = (places.count(part) for part in range(4))
            host = here >= quorum(last, rebuilt=False, endpoints=3) - gone_here
            other = there >= quorum(last, rebuilt=True, endpoints=3) - gone_there
            assert not (host and other), (last, places)


# -- what all nodes must have been told alike -----------------------------------------------------------------------

TERMS = Terms(min_nodes=2, max_nodes=4, restart_policy="any-failed", max_restarts=3, torch="2.13")
HOST = Node(id="1", name="a", address="10.0.0.1", pid=11, local_world_size=8, terms=TERMS)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"min_nodes": 3}, "has --nnodes 3:4, node a (pid 11) has 2:4; give both the same"),
        ({"max_nodes": 5}, "has --nnodes 2:5, node a (pid 11) has 2:4; give both the same"),
        ({"restart_policy": "p"}, "has --ft-restart-policy p, node a (pid 11) has any-failed; give both the same"),
        ({"max_restarts": 0}, "has --max-restarts 0, node a (pid 11) has 3; give both the same"),
        ({"torch": "2.4"}, "has torch 2.4, node a (pid 11) has 2.13; install the same torch on both"),
        (
            {"protocol": 7},
            f"has ft_launcher protocol 7, node a (pid 11) has {PROTOCOL}; install the same ft_launcher on both",
        ),
    ],
)
def test_what_two_nodes_were_told_differently_is_said_with_both_names(told: dict[str, int | str], words: str) -> None:
    joiner = Node(id="2", name="b", address="", pid=22, local_world_size=8, terms=replace(TERMS, **told))
    assert terms_conflict(HOST, joiner) == f"node b (pid 22) {words}"


def test_nodes_may_differ_in_what_is_their_own() -> None:
    joiner = Node(id="2", name="b", address="fe80::1", pid=22, local_world_size=4, terms=TERMS, role="eval")
    assert terms_conflict(HOST, joiner) is None
    assert terms_conflict(HOST, HOST) is None


KINDS: list[ReasonKind] = [
    "",
    "node_joined",
    "node_left",
    "node_excluded",
    "rank_failed",
    "rank_hung",
    "node_lost",
    "host_lost",
]


def test_the_reason_that_more_likely_caused_the_other_is_kept() -> None:
    for weak, strong in pairwise(KINDS):
        assert stronger(Reason(weak, "x"), Reason(strong, "y")) == Reason(strong, "y")
        assert stronger(Reason(strong, "y"), Reason(weak, "x")) == Reason(strong, "y")


def test_of_two_equal_reasons_the_first_is_kept() -> None:
    for kind in KINDS:
        assert stronger(Reason(kind, "first"), Reason(kind, "second")).sentence == "first"
