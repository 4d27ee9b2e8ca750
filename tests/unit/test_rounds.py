"""What a leader says to what happens: the known cases, by the ids that they have in the list of faults."""

from collections.abc import Iterator, Sequence
from itertools import pairwise, permutations
from math import inf

import pytest
from msgspec.structs import replace

from ft_launcher.causes import Excluded, HostLost, Hung, NodeLost, Refused, ShutDown, TooFewNodes
from ft_launcher.placing import numbered_by
from ft_launcher.records import (
    Assigned,
    End,
    Event,
    Joined,
    Leave,
    Left,
    Lost,
    Memory,
    Message,
    Ready,
    Reported,
    Requested,
    Stop,
    Waiting,
)
from ft_launcher.rounds import STRAGGLERS
from tests.unit.leading import CRASH, DIED, FAILED, SUCCEEDED, TIMING, World


def three(**options) -> World:
    """Give three nodes that train, with --nnodes 2:3."""
    world = World(2, 3, **options)
    world.come("n0", "n1", "n2")
    assert world.ranks == {"n0": 0, "n1": 1, "n2": 2}
    return world


def batches(events: Sequence[Event]) -> Iterator[list[list[Event]]]:
    """Give all ways in which the leader can hear of the events: each alone, all at once, and everything between."""
    for cuts in range(2 ** (len(events) - 1)):
        parts: list[list[Event]] = [[events[0]]]
        for place, event in enumerate(events[1:]):
            if cuts >> place & 1:
                parts.append([event])
            else:
                parts[-1].append(event)
        yield parts


def stopped(said: Sequence[tuple[str, Message]]) -> list[str]:
    return sorted(node_id for node_id, message in said if isinstance(message, Stop))


def test_all_that_a_place_says_is_right_for_nodes_with_different_workers_and_roles() -> None:
    world = World(3, 3)
    nodes = {
        "n0": world.node("n0", workers=2),
        "n1": replace(world.node("n1", workers=3), role="eval"),
        "n2": world.node("n2", workers=4),
    }
    world.tell(
        *(Joined(node) for node in nodes.values()), *(Ready(name, 5000 + place) for place, name in enumerate(nodes))
    )
    found = [world.assigned(name) for name in nodes]
    assert [(each.group_rank, each.rank, each.role_rank, each.role_world_size) for each in found] == [
        (0, 0, 0, 6),
        (1, 2, 0, 3),
        (2, 5, 2, 6),
    ]
    assert {(each.world_size, each.group_world_size, each.prev_world_size) for each in found} == {(9, 3, 0)}
    assert {(each.store_address, each.store_port) for each in found} == {("10.0.0.0", 5000)}
    assert [(each.group_rank, each.node.name, each.rank) for each in world.job.placement.places] == [
        (0, "n0", 0),
        (1, "n1", 2),
        (2, "n2", 5),
    ]


def test_a_first_round_waits_for_the_last_call_from_when_enough_were_ready() -> None:
    world = World(2, 3)
    world.come("n0")
    world.wait(100)
    world.come("n1")
    world.wait(29.9)
    assert not world.mail
    world.wait(0.2)
    assert world.assigned("n0").group_world_size == 2


def test_one_more_node_does_not_prolong_the_last_call() -> None:
    world = World(2, 4)
    world.come("n0", "n1")
    world.wait(20)
    world.come("n2")
    world.wait(9.9)
    assert not world.mail
    world.wait(0.2)
    assert world.assigned("n2").group_world_size == 3


def test_the_last_call_begins_anew_when_there_were_too_few_meanwhile() -> None:
    world = World(2, 3)
    world.come("n0", "n1")
    world.wait(20)
    world.tell(Lost("n1", DIED))
    world.wait(20)
    world.come("n2")
    world.wait(29.9)
    assert not world.mail
    world.wait(0.2)
    assert world.ranks == {"n0": 0, "n2": 1}


def test_a_first_round_does_not_wait_for_more_than_the_scheduler_starts() -> None:
    world = World(2, 4, expected=3)
    world.come("n0", "n1")
    assert not world.ranks
    world.come("n2")
    assert len(world.ranks) == 3


def test_a_crash_stops_all_nodes_and_all_start_again_with_their_ranks() -> None:
    world = three()
    assert stopped(world.report("n1", FAILED)) == ["n0", "n1", "n2"]
    stop = world.mail["n2"][-1]
    assert stop == Stop(0, world.job.reason)
    assert str(world.job.reason) == "rank_failed: rank 0 (node n1): exited with code 7"
    world.ready("n2", "n0")
    assert not world.ranks
    world.ready("n1")
    assert world.ranks == {"n0": 0, "n1": 1, "n2": 2}
    again = world.assigned("n1")
    assert (again.memory.restarts, again.memory.round, again.prev_world_size) == (1, 1, 6)
    assert again.reason.kind == "rank_failed"


def test_a_report_about_an_earlier_round_changes_nothing() -> None:
    world = three()
    world.report("n1", FAILED)
    world.ready("n0", "n1", "n2")
    assert world.tell(Reported("n2", 0, FAILED, CRASH, 0)) == []


def test_all_succeed_and_all_are_told() -> None:
    world = three()
    assert world.report("n0", SUCCEEDED) == world.report("n2", SUCCEEDED) == []
    assert world.report("n1", SUCCEEDED) == [(name, End(None)) for name in ("n0", "n1", "n2")]


def test_without_restarts_left_all_end_with_the_cause_and_who_it_was() -> None:
    world = three(max_restarts=0)
    world.report("n1", FAILED)
    assert {world.mail[name][-1] for name in ("n0", "n1", "n2")} == {End(CRASH, "rank 0 (node n1)")}


def test_the_cause_of_the_end_is_the_strongest_of_what_happened_at_once() -> None:
    world = three(max_restarts=0)
    hung = Hung("no heartbeat")
    world.tell(world.reported("n1"), world.reported("n0", cause=hung), world.reported("n2"))
    assert world.job.outcome == End(hung, "rank 0 (node n0)")


def test_a_spare_hears_that_it_waits_and_replaces_a_lost_node_at_once() -> None:
    world = three()
    world.come("n3")
    assert world.mail["n3"] == [Waiting(0, 3)]
    assert stopped(world.tell(Lost("n1", DIED))) == ["n0", "n2"]
    world.ready("n0", "n2")
    assert world.ranks == {"n0": 0, "n3": 1, "n2": 2}
    assert str(world.assigned("n3").reason) == "node_lost: node n1 was lost: its launcher died"


def test_a_spare_hears_once_of_each_round_that_it_waits() -> None:
    world = three()
    world.report("n0", FAILED)
    world.come("n3")
    world.ready("n0", "n1", "n2")
    world.tell(Lost("n9", DIED))
    assert world.mail["n3"] == [Waiting(1, 3, world.assigned("n0").memory)]


def test_a_spare_does_not_displace_a_node_that_is_slow_to_stop() -> None:
    world = three()
    world.come("n3")
    world.report("n0", FAILED)
    world.ready("n0", "n1")
    world.wait(300)
    assert not world.ranks
    world.ready("n2")
    assert world.ranks == {"n0": 0, "n1": 1, "n2": 2}
    waiting = world.mail["n3"][-1]
    assert isinstance(waiting, Waiting)
    assert (waiting.round, waiting.nodes) == (1, 3)
    assert waiting.memory is not None, "it was there, and counts when the host is lost"
    assert (waiting.memory.nodes, waiting.memory.voters) == (3, 4)


def test_a_node_that_never_stops_ends_the_job_and_is_named() -> None:
    world = three()
    world.report("n0", FAILED)
    world.ready("n0", "n1")
    world.wait(601)
    cause = world.outcome_of("n0")
    assert isinstance(cause, TooFewNodes)
    assert "n2 did not stop its workers" in cause.description


def test_a_surplus_node_neither_ends_nor_restarts_anything() -> None:
    world = three()
    world.come("n3", "n4", "n5")
    world.wait(10_000)
    assert [type(each) for each in world.mail["n0"]] == [Assigned]
    world.tell(Lost("n4", DIED), Left("n3", "bye"))
    assert [type(each) for each in world.mail["n0"]] == [Assigned]


def test_a_node_that_stopped_for_itself_restarts_the_others() -> None:
    world = three()
    assert stopped(world.tell(Ready("n1", 1))) == ["n0", "n2"]
    world.ready("n0", "n2")
    assert (world.restarts, world.assigned("n0").reason.kind) == (1, "node_lost")


# -- membership, restarts and the budget ---------------------------------------------------------------------------


def test_V2_a_late_node_waits_until_the_round_is_old_enough_and_then_joins_uncounted() -> None:
    world = World(1, 3, max_restarts=0)
    world.come("n0")
    world.wait(31)
    world.wait(2)
    world.come("n1")
    assert world.mail["n1"] == [Waiting(0, 1)]
    world.wait(1.9)
    assert [type(each) for each in world.mail["n0"]] == [Assigned]
    world.wait(0.2)
    assert [type(each) for each in world.mail["n0"]] == [Assigned, Stop]
    world.ready("n0")
    assert world.ranks == {"n0": 0, "n1": 1}
    assert world.restarts == 0
    assert str(world.assigned("n0").reason) == "node_joined: node n1 joined"


def test_V2_a_stream_of_newcomers_restarts_at_most_once_in_the_least_uptime() -> None:
    world = World(1, 5)
    world.come("n0")
    world.wait(30)
    starts = [world.now]
    for name in ("n1", "n2", "n3", "n4"):
        world.come(name)
        world.wait(TIMING.min_uptime)
        world.ready(*(each for each in world.mail if isinstance(world.mail[each][-1], Stop)))
        starts.append(world.now)
    assert all(later - earlier >= TIMING.min_uptime for earlier, later in pairwise(starts))
    assert len(world.ranks) == 5


def test_V2_with_upscaling_disabled_a_late_node_waits_for_the_next_restart() -> None:
    world = World(1, 3, upscaling=False)
    world.come("n0")
    world.wait(30)
    world.come("n1")
    world.wait(1000)
    assert [type(each) for each in world.mail["n0"]] == [Assigned]
    world.report("n0", FAILED)
    world.ready("n0")
    assert world.ranks == {"n0": 0, "n1": 1}


def test_a_newcomer_does_not_make_ranks_that_have_finished_run_again() -> None:
    world = World(2, 3)
    world.come("n0", "n1")
    world.wait(30)
    world.report("n0", SUCCEEDED)
    world.come("n2")
    world.wait(1000)
    assert [type(each) for each in world.mail["n1"]] == [Assigned]


def test_V3_who_comes_after_the_end_is_told_how_it_ended() -> None:
    for state, cause in ((SUCCEEDED, None), (FAILED, CRASH)):
        world = World(1, 1, max_restarts=0)
        world.come("n0")
        world.report("n0", state)
        assert world.tell(Joined(world.node("n1"))) == [("n1", world.job.outcome)]
        assert world.outcome_of("n1") == cause
        assert world.tell(Ready("n1", 1)) == []


def test_V8_two_nodes_exclude_themselves_in_the_same_round() -> None:
    for first, second in permutations(["n1", "n2"]):
        for parts in batches([three().excluded(first), three().excluded(second)]):
            world = three(max_restarts=0)
            world.come("n3", "n4")
            for part in parts:
                world.tell(*part)
            world.ready("n0")
            assert world.outcome_of("n1") == world.outcome_of("n2") == Excluded("ECC errors")
            assert world.ranks == {"n0": 0, "n3": 1, "n4": 2}
            assert world.restarts == 0
            assert set(world.job.memory.excluded) == {("n1", "n1"), ("n2", "n2")}


def test_V8_two_nodes_whose_ranks_fail_of_what_they_are_excluded_for_cost_no_restart() -> None:
    fails: list[Event] = [three().reported(name) for name in ("n1", "n2")]
    asks: list[Event] = [three().excluded(name) for name in ("n1", "n2")]
    for events in permutations([*fails, *asks]):
        for parts in batches(events):
            world = three()
            world.come("n3", "n4")
            for part in parts:
                world.tell(*part)
            world.ready("n0")
            assert world.restarts == 0, parts
            assert world.ranks == {"n0": 0, "n3": 1, "n4": 2}
            assert world.assigned("n0").reason.kind == "node_excluded"


def test_V8_another_node_that_failed_for_itself_is_counted_all_the_same() -> None:
    model = three()
    own: Event = model.reported("n0")
    happened: list[Event] = [own, model.reported("n1"), model.excluded("n1")]
    for events in permutations(happened):
        for parts in batches(events):
            world = three()
            for part in parts:
                world.tell(*part)
            heard_in_time = own in parts[0]
            world.ready("n0", "n2")
            # What comes after the stop is a consequence of it, and not looked at.
            assert world.restarts in ({1} if heard_in_time else {0, 1}), parts
            assert world.ranks == {"n0": 0, "n2": 1}


def test_V8_all_nodes_exclude_themselves_and_each_ends_with_its_own_reason() -> None:
    events = [three().excluded(name) for name in ("n0", "n1", "n2")]
    for order in permutations(events):
        for parts in batches(order):
            world = World(1, 3)
            world.come("n0", "n1", "n2")
            for part in parts:
                world.tell(*part)
            assert {world.outcome_of(name) for name in ("n0", "n1", "n2")} == {Excluded("ECC errors")}
            assert world.job.outcome is not None
            assert world.job.outcome.cause == Excluded("ECC errors")
            assert world.job.is_empty


def test_V8_when_too_few_are_left_the_others_end_and_are_told_why() -> None:
    world = three()
    world.tell(world.excluded("n1"))
    world.tell(world.excluded("n2"))
    cause = world.outcome_of("n0")
    assert cause == TooFewNodes(
        "node n2 was excluded (a rank asked to exclude this node: ECC errors);"
        " 1 node is left, and --nnodes asks for 2 at least"
    )


def test_V8_an_excluded_node_is_refused_when_its_launcher_is_started_again() -> None:
    world = three()
    world.tell(world.excluded("n1"))
    world.ready("n0", "n2")
    assert world.tell(Joined(world.node("n1", "n1-again"))) == [
        ("n1-again", Leave(Excluded("node n1 was excluded from this job before")))
    ]
    assert world.tell(Ready("n1-again", 1)) == []


def test_V8_another_launcher_on_the_machine_of_an_excluded_one_goes_on() -> None:
    world = World(1, 3)
    two = [world.node("n1", "n1-first"), world.node("n1", "n1-second")]
    world.tell(*(Joined(node) for node in (world.node("n0"), *two)))
    world.ready("n0", "n1-first", "n1-second")
    second = world.assigned("n1-second")
    world.tell(world.excluded("n1-first"))
    world.tell(Joined(world.node("n1", "n1-again"), second.memory, second.group_rank))  # it was cut off for a moment
    world.ready("n0", "n1-again")
    assert sorted(world.ranks) == ["n0", "n1-again"]


def test_V8_an_excluded_node_whose_link_broke_before_it_heard_is_refused_too() -> None:
    world = three()
    memory = world.assigned("n1").memory
    world.tell(world.excluded("n1"))
    assert [type(each) for _, each in world.tell(Joined(world.node("n1", "n1-again"), memory, 1))] == [Leave]


@pytest.mark.parametrize("max_restarts", [0, 3])
def test_V10_shutdown_racing_with_a_crash_a_success_and_another_shutdown(max_restarts: int) -> None:
    one, other = ShutDown("loss is NaN"), ShutDown("time is up")
    model = three()
    events: list[Event] = [
        model.reported("n0"),
        model.reported("n1", SUCCEEDED, None),
        model.requested("n1", one),
        model.requested("n2", other),
        Lost("n0", DIED),
    ]
    for order in permutations(events):
        if order.index(events[1]) > order.index(events[2]):
            continue  # one node's words arrive in their order
        for parts in batches(order):
            world = three(max_restarts=max_restarts)
            for part in parts:
                world.tell(*part)
            ends = {name: [each for each in world.mail[name] if isinstance(each, End)] for name in ("n1", "n2")}
            assert ends == {"n1": [world.job.outcome], "n2": [world.job.outcome]}, parts
            assert all(isinstance(world.mail[name][-1], End) for name in ends)
            first = one if order.index(events[2]) < order.index(events[3]) else other
            requests_at_once = {events[2], events[3]} & set(parts[0])
            if max_restarts or requests_at_once:
                assert world.outcome_of("n1") == first, parts
            else:
                assert world.outcome_of("n1") in (first, CRASH, NodeLost("n0", DIED)), parts


def test_V10_a_shutdown_after_the_success_of_all_changes_nothing() -> None:
    for order in permutations(("n0", "n1", "n2")):
        world = three()
        for name in order:
            world.report(name, SUCCEEDED)
        assert world.tell(world.requested("n0", ShutDown())) == []
        assert world.job.outcome == End(None)


def test_V10_an_exclusion_after_the_end_changes_nothing() -> None:
    world = three()
    world.tell(world.requested("n0", ShutDown()))
    assert world.tell(world.excluded("n1"), world.requested("n0", HostLost("the host has ended"))) == []
    assert world.job.outcome == End(ShutDown(), "node n0")


def test_V10_a_shutdown_between_two_rounds_is_heeded_and_one_for_an_earlier_round_is_not() -> None:
    world = three()
    world.report("n0", FAILED)
    world.tell(Requested("n1", 0, ShutDown("enough")))
    assert world.job.outcome == End(ShutDown("enough"), "node n1")
    world = three()
    world.report("n0", FAILED)
    world.ready("n0", "n1", "n2")
    assert world.tell(Requested("n1", 0, ShutDown("enough"))) == []


def test_the_host_that_must_go_without_another_endpoint_ends_the_job() -> None:
    world = three()
    world.tell(Requested("n0", 0, HostLost("the rendezvous host has ended (SIGTERM)")))
    assert {world.outcome_of(name) for name in ("n0", "n1", "n2")} == {
        HostLost("the rendezvous host has ended (SIGTERM)")
    }


def test_V12_too_few_after_the_time_to_join_are_named() -> None:
    world = World(3, 4)
    world.come("n10", "n2")
    world.wait(599.9)
    assert not world.mail
    world.wait(0.2)
    expected = TooFewNodes("after 600 s 2 nodes are there (n2, n10), and --nnodes asks for 3 at least")
    assert world.outcome_of("n2") == world.outcome_of("n10") == expected


def test_V12_later_rounds_have_their_own_time_to_join() -> None:
    world = World(3, 3)
    world.come("n0", "n1", "n2")
    world.wait(10_000)
    world.tell(Lost("n1", DIED))
    world.ready("n0", "n2")
    world.wait(599.9)
    assert world.job.outcome is None
    world.come("n3")
    assert world.ranks == {"n0": 0, "n3": 1, "n2": 2}


def test_B4_a_launcher_that_rejoins_fast_does_not_get_a_new_budget() -> None:
    world = World(2, 2, max_restarts=3)
    world.come("n0", "n1")
    for attempt in range(3):
        world.tell(Lost(world.last[-1][0] if attempt else "n1", DIED))
        world.tell(Joined(world.node("n1", f"n1-{attempt}")), Ready(f"n1-{attempt}", 1))
        world.ready("n0")
        assert world.ranks == {"n0": 0, f"n1-{attempt}": 1}
        assert world.restarts == attempt + 1
    world.tell(Lost("n1-2", DIED))
    assert world.outcome_of("n0") == NodeLost("n1", DIED)


def test_B5_joins_goodbyes_and_exclusions_cost_nothing() -> None:
    world = World(1, 3, max_restarts=0)
    world.come("n0", "n1", "n2")
    world.tell(Left("n2", "SIGTERM"))
    world.ready("n0", "n1")
    assert (world.assigned("n0").reason.kind, world.restarts) == ("node_left", 0)
    world.wait(5)
    world.come("n3")
    world.ready("n0", "n1")
    assert (world.assigned("n0").reason.kind, world.restarts) == ("node_joined", 0)
    world.tell(world.excluded("n3"))
    world.ready("n0", "n1")
    assert (world.assigned("n0").reason.kind, world.restarts) == ("node_excluded", 0)
    assert world.job.memory.round == 3
    world.report("n1", FAILED)
    assert world.outcome_of("n0") == CRASH


@pytest.mark.parametrize("seen", ["only the loss", "the others' ranks fail first", "the others' ranks fail after it"])
def test_B6_the_count_equals_the_kills(seen: str) -> None:
    world = World(2, 3, max_restarts=100)
    world.come("n0", "n1", "n2")
    for kill in range(1, 21):
        victim = world.job.placement.places[kill % 3].node.id
        consequences = [world.reported(name) for name in world.ranks if name != victim] if "fail" in seen else []
        if "first" in seen:
            for each in consequences:
                world.tell(each)
            world.tell(Lost(victim, DIED))
        else:
            world.tell(Lost(victim, DIED))
            for each in consequences:
                world.tell(each)
        world.come(f"n{10 + kill}")
        world.ready(*(name for name in list(world.mail) if isinstance(world.mail[name][-1], Stop) and name != victim))
        assert len(world.ranks) == 3
        assert world.restarts == kill
        assert world.assigned(f"n{10 + kill}").reason.kind == "node_lost"


def test_B6_a_kill_while_an_uncounted_restart_gathers_is_counted() -> None:
    world = World(1, 3, max_restarts=1)
    world.come("n0", "n1", "n2")
    world.tell(Left("n2", "SIGTERM"))
    world.tell(Lost("n1", DIED))
    world.ready("n0")
    assert (world.restarts, world.assigned("n0").reason.kind) == (1, "node_lost")
    world = World(1, 3, max_restarts=0)
    world.come("n0", "n1", "n2")
    world.tell(Left("n2", "SIGTERM"), Lost("n1", DIED))
    assert world.outcome_of("n0") == NodeLost("n1", DIED)


def test_B6_several_kills_in_one_round_are_one_restart() -> None:
    for parts in batches([Lost("n1", DIED), three().reported("n0"), Lost("n2", DIED)]):
        world = World(1, 3)
        world.come("n0", "n1", "n2")
        for part in parts:
            world.tell(*part)
        world.ready("n0")
        assert (world.restarts, world.job.memory.round) == (1, 1)


def test_B6_the_loss_of_a_spare_between_two_rounds_is_not_counted() -> None:
    world = three(max_restarts=0)
    world.come("n3", "n4")
    world.tell(Left("n2", "SIGTERM"))
    world.ready("n0", "n1")
    assert "n3" in world.ranks
    world.tell(Left("n3", "SIGTERM"))
    world.tell(Lost("n4", DIED))  # it was there when the round formed, as a spare
    world.ready("n0", "n1")
    assert world.ranks == {"n0": 0, "n1": 1}
    assert (world.restarts, world.assigned("n0").reason.kind) == (0, "node_left")


def test_B6_the_loss_of_a_spare_is_no_restart() -> None:
    world = three(max_restarts=0)
    world.come("n3")
    assert world.tell(Lost("n3", DIED)) == []


# -- a launcher that comes back before the leader knows that it was gone -------------------------------------------


def test_N7_a_launcher_that_rejoins_before_its_loss_is_known_takes_its_own_place_again() -> None:
    for by_infrastructure in (True, False):
        world = World(2, 3, by_infrastructure=by_infrastructure)
        numbers = {"n0": 0, "n1": 1, "n2": 2}
        world.tell(*(Joined(world.node(name, "", number)) for name, number in numbers.items()))
        world.ready(*numbers)
        again = Joined(world.node("n1", "n1-again", 1), world.assigned("n1").memory, 1)
        assert stopped(world.tell(again)) == ["n0", "n1-again", "n2"]
        world.tell(Ready("n1-again", 1))
        world.tell(Lost("n1", "nothing was heard of it"))
        world.ready("n0", "n2")
        assert world.ranks == {"n0": 0, "n1-again": 1, "n2": 2}
        assert world.restarts == 1


def test_N8_two_nodes_with_the_same_number_end_the_job_before_it_has_begun() -> None:
    world = World(2, 2, by_infrastructure=True)
    world.tell(Joined(world.node("n0", "", 1)))
    world.tell(Joined(world.node("n1", "", 1)))
    cause = world.outcome_of("n0")
    assert isinstance(cause, Refused)
    assert cause == world.outcome_of("n1")
    assert cause.description.startswith("SLURM_PROCID=1 is claimed by node n0 (pid 100) and by node n1 (pid 101)")
    assert cause.description.endswith("(nothing was started)")
    assert world.job.warnings


def test_N8_once_the_job_runs_only_the_newcomer_is_refused() -> None:
    world = World(1, 2, by_infrastructure=True)
    world.tell(Joined(world.node("n0", "", 0)), Ready("n0", 1))
    world.wait(30)
    world.tell(Joined(world.node("n1", "", 0)))
    assert isinstance(world.outcome_of("n1"), Refused)
    assert [type(each) for each in world.mail["n0"]] == [Assigned]
    world.tell(Lost("n0", DIED))
    world.tell(Joined(world.node("n1", "n1-again", 0)), Ready("n1-again", 1))
    assert world.ranks == {"n1-again": 0}, "the number is free again"
    world.tell(Joined(world.node("n2", "", 0)))
    assert isinstance(world.outcome_of("n2"), Refused), "and then taken again"


def test_N9_a_node_that_was_told_otherwise_is_refused_as_well() -> None:
    world = three()
    stranger = replace(world.node("n7"), terms=replace(world.terms, max_nodes=5))
    world.tell(Joined(stranger))
    cause = world.outcome_of("n7")
    assert isinstance(cause, Refused)
    assert "--nnodes 2:5" in cause.description


def numbered(world: World) -> str:
    return numbered_by(world.job.placement, by_infrastructure=world.job.settings.by_infrastructure)


def test_it_is_said_what_the_ranks_follow() -> None:
    world = World(1, 1, by_infrastructure=True)
    world.tell(Joined(world.node("n0", "", 0)), Ready("n0", 1))
    assert numbered(world) == "numbered by SLURM_PROCID"
    world = World(1, 1, by_infrastructure=True)
    world.come("n0")
    assert numbered(world) == "numbered by names (no SLURM_PROCID or GROUP_RANK)"
    world = World(1, 1)
    world.come("n0")
    assert numbered(world) == "numbered by names"


# -- min-healthy (semantics of nvidia-resiliency-ext 0.5.0) ---------------------------------------------------------


def healthy_of_three(min_nodes: int = 2, **options) -> World:
    world = World(min_nodes, 3, policy="min-healthy", **options)
    world.come("n0", "n1", "n2")
    assert len(world.ranks) == 3
    return world


def test_min_healthy_a_failed_node_stays_failed_while_enough_others_run() -> None:
    world = healthy_of_three()
    assert world.report("n1", FAILED) == []
    world.wait(10_000)
    assert all(len(world.mail[name]) == 1 for name in ("n0", "n1", "n2"))
    assert world.restarts == 0


def test_min_healthy_below_the_fewest_all_restart_and_it_counts_once() -> None:
    world = healthy_of_three()
    world.report("n1", FAILED)
    assert stopped(world.report("n2", FAILED)) == ["n0", "n1", "n2"]
    world.ready("n0", "n1", "n2")
    assert world.ranks == {"n0": 0, "n1": 1, "n2": 2}
    assert world.restarts == 1


def test_min_healthy_succeeded_nodes_count_as_well_and_run_again_when_there_are_too_few() -> None:
    world = healthy_of_three()
    world.report("n0", SUCCEEDED)
    assert world.report("n1", FAILED) == []
    assert stopped(world.report("n2", FAILED)) == ["n0", "n1", "n2"]


def test_min_healthy_all_end_with_success_when_none_runs_and_enough_have_succeeded() -> None:
    for order in permutations([("n0", SUCCEEDED), ("n1", FAILED), ("n2", SUCCEEDED)]):
        world = healthy_of_three()
        for name, state in order:
            world.report(name, state)
        assert {name: world.mail[name][-1] for name in ("n0", "n1", "n2")} == dict.fromkeys(
            ("n0", "n1", "n2"), End(None)
        )


def test_min_healthy_with_none_running_and_too_few_successes_all_restart() -> None:
    for order in permutations([("n0", SUCCEEDED), ("n1", FAILED), ("n2", FAILED)]):
        world = healthy_of_three()
        for name, state in order:
            world.report(name, state)
        assert {world.mail[name][-1] for name in ("n0", "n1", "n2")} == {Stop(0, world.job.reason)}


def test_min_healthy_a_lost_node_counts_as_failed_and_one_that_had_succeeded_as_success() -> None:
    world = healthy_of_three()
    world.report("n0", SUCCEEDED)
    assert world.tell(Lost("n0", DIED)) == []
    assert world.tell(Lost("n1", DIED)) == []
    assert world.report("n2", SUCCEEDED) == [("n2", End(None))]


def test_min_healthy_newcomers_and_failed_nodes_that_are_ready_again_never_interrupt() -> None:
    world = healthy_of_three()
    world.tell(Lost("n1", DIED))
    world.come("n3")
    world.wait(10_000)
    assert [type(each) for each in world.mail["n0"]] == [Assigned]
    world.report("n2", FAILED)
    world.ready("n0", "n2")
    assert world.ranks == {"n0": 0, "n3": 1, "n2": 2}, "the newcomer has the place of the lost node"


def test_min_healthy_without_restarts_left_all_fail_with_the_strongest_cause() -> None:
    world = healthy_of_three(max_restarts=0)
    world.tell(Lost("n1", DIED))
    world.report("n2", FAILED)
    assert {world.outcome_of(name) for name in ("n0", "n2")} == {NodeLost("n1", DIED)}


def test_min_healthy_a_goodbye_that_leaves_too_few_restarts_uncounted() -> None:
    world = healthy_of_three(min_nodes=3, max_restarts=0)
    assert stopped(world.tell(Left("n1", "SIGTERM"))) == ["n0", "n2"]
    world.come("n3")
    world.ready("n0", "n2")
    assert world.restarts == 0


def test_any_failed_counts_one_restart_for_a_failure_and_ends_without_any_left() -> None:
    world = three(max_restarts=1)
    world.report("n0", FAILED)
    world.ready("n0", "n1", "n2")
    assert world.restarts == 1
    world.report("n2", FAILED)
    assert world.outcome_of("n0") == CRASH


# -- another host --------------------------------------------------------------------------------------------------


def rebuilt(memory: Memory, *, endpoints: int = 3, **options) -> World:
    return World(1, 4, memory=memory, endpoints=endpoints, endpoint=1, **options)


def rejoin(world: World, name: str, memory: Memory, group_rank: int) -> None:
    world.tell(Joined(world.node(name), memory, group_rank), Ready(name, 40000))


FOUR = Memory(epoch=1, round=5, restarts=2, nodes=4, voters=4, world_size=8, excluded=(("x", "n9"),))


def test_N2_who_meets_at_another_endpoint_keeps_ranks_and_exclusions_and_counts_one_restart() -> None:
    world = rebuilt(FOUR, max_restarts=9)
    for name, rank in (("n3", 3), ("n1", 1), ("n2", 2)):
        rejoin(world, name, FOUR, rank)
    world.wait(TIMING.settle - 0.1)
    assert not world.ranks, "the lost host may still be stopping its workers"
    world.wait(0.2)
    assert world.ranks == {"n3": 0, "n1": 1, "n2": 2}, "the gap is filled by the rank that is too high now"
    found = world.assigned("n1")
    assert found.memory == Memory(2, 6, 3, 3, 3, 6, FOUR.excluded)
    assert (found.prev_world_size, found.reason.kind) == (8, "host_lost")
    world.report("n1", FAILED)
    world.ready("n1", "n2", "n3")
    assert world.assigned("n1").memory == Memory(2, 7, 4, 3, 3, 6, FOUR.excluded), "and then goes on as any other"
    assert [type(each) for _, each in world.tell(Joined(world.node("n9")))] == [Leave]


def test_N2_without_all_others_the_stragglers_are_waited_for_a_moment() -> None:
    memory = replace(FOUR, nodes=5, voters=5)
    world = rebuilt(memory)
    for name, rank in (("n1", 1), ("n2", 2), ("n3", 3)):
        rejoin(world, name, memory, rank)
    world.wait(TIMING.settle + STRAGGLERS - 0.1)
    assert not world.ranks
    world.wait(0.2)
    assert len(world.ranks) == 3


@pytest.mark.parametrize("here", [1, 2])
def test_N3_half_of_the_last_round_or_less_does_not_go_on_elsewhere(here: int) -> None:
    world = rebuilt(FOUR)
    for rank in range(1, here + 1):
        rejoin(world, f"n{rank}", FOUR, rank)
    world.come("n7", "n8")  # newcomers are no substitute: the others may go on with newcomers of their own
    world.wait(TIMING.failover_timeout - 0.1)
    assert not world.ranks
    world.wait(0.2)
    cause = world.outcome_of("n1")
    assert isinstance(cause, TooFewNodes)
    assert (
        f"of those of the last round {here}, of which 3 are needed" in cause.description
        or "more than half" in cause.description
    )


def test_N3_a_host_that_is_left_with_less_than_half_gives_up_and_with_half_goes_on() -> None:
    for lost, is_lost in ((1, False), (2, False), (3, True)):
        world = World(1, 4, endpoints=3)
        world.come("n0", "n1", "n2", "n3")
        for rank in range(1, lost + 1):
            world.tell(Lost(f"n{rank}", "nothing was heard of it"))
        assert world.job.is_lost is is_lost
        world.ready("n0")
        assert ("n0" in world.ranks) is (not is_lost and lost == 3)


def test_N3_late_nodes_that_leave_again_make_the_others_no_less_needed() -> None:
    world = World(1, 4, endpoints=3)
    world.come("n0", "n1", "n2", "n3")
    world.come("n4", "n5")
    world.tell(Left("n4", "SIGTERM"), world.excluded("n5"))
    world.tell(*(Lost(f"n{rank}", "nothing was heard of it") for rank in (1, 2, 3)))
    assert world.job.is_lost


def test_N3_who_left_for_good_counts_in_the_round_that_it_left_only() -> None:
    world = World(1, 4, endpoints=3)
    world.come("n0", "n1", "n2", "n3")
    world.tell(Left("n3", "SIGTERM"))
    world.ready("n0", "n1", "n2")
    world.tell(*(Lost(f"n{rank}", "nothing was heard of it") for rank in (1, 2)))
    assert world.job.is_lost


def test_N3_a_host_that_others_are_still_on_their_way_to_does_not_give_up() -> None:
    world = rebuilt(FOUR)
    rejoin(world, "n1", FOUR, 1)
    assert not world.job.is_lost


def test_N3_nodes_that_left_for_good_are_not_missed() -> None:
    world = World(1, 4, endpoints=3)
    world.come("n0", "n1", "n2", "n3")
    world.tell(Left("n1", "SIGTERM"), world.excluded("n2"), Left("n3", "SIGTERM"))
    assert not world.job.is_lost
    world.ready("n0")
    assert world.ranks == {"n0": 0}


def test_a_host_that_never_took_part_learns_from_the_first_that_did() -> None:
    world = World(1, 4, endpoints=3, endpoint=1, max_restarts=5)
    world.come("n8")
    world.wait(20)
    for name, rank in (("n1", 1), ("n2", 2), ("n3", 3)):
        rejoin(world, name, FOUR, rank)
    assert not world.ranks, "the lost host may still be stopping its workers"
    world.wait(TIMING.settle + STRAGGLERS)
    assert world.ranks == {"n8": 0, "n1": 1, "n2": 2, "n3": 3}
    assert world.assigned("n8").memory == Memory(2, 6, 3, 4, 4, 8, FOUR.excluded)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_newest_memory_is_taken_whoever_brings_it(order: tuple[int, ...]) -> None:
    older = Memory(epoch=0, round=9, restarts=1, nodes=4, voters=4, world_size=8, excluded=())
    newer = Memory(epoch=1, round=6, restarts=3, nodes=3, voters=3, world_size=6, excluded=(("x", "n9"),))
    world = rebuilt(older, max_restarts=9)
    joins = [("n0", older, 1), ("n1", newer, 1), ("n2", newer, 2)]
    for place in order:
        rejoin(world, *joins[place])
    world.wait(TIMING.settle + STRAGGLERS)
    assert world.assigned("n1").memory == Memory(2, 7, 4, 3, 3, 6, newer.excluded)
    assert world.ranks == {"n0": 0, "n1": 1, "n2": 2}, "an older rank does not count"


def test_a_round_of_the_same_number_under_another_host_is_not_the_last_round() -> None:
    other = replace(FOUR, epoch=0)
    world = rebuilt(FOUR)
    rejoin(world, "n1", FOUR, 1)
    rejoin(world, "n2", FOUR, 2)
    rejoin(world, "n5", other, 3)
    world.wait(TIMING.settle + STRAGGLERS + 1)
    assert not world.ranks, "two of four are not more than half"


def test_a_lost_host_without_restarts_left_ends_the_job() -> None:
    world = rebuilt(FOUR, max_restarts=FOUR.restarts)
    for rank in (1, 2, 3):
        rejoin(world, f"n{rank}", FOUR, rank)
    world.wait(TIMING.settle)
    assert world.outcome_of("n1") == TooFewNodes(
        "the rendezvous host was lost, and all restarts of --max-restarts are used"
    )


def test_with_several_endpoints_a_first_round_needs_so_many_that_none_starts_elsewhere() -> None:
    for endpoint, needed in ((0, 2), (1, 3)):
        world = World(1, 4, endpoints=3, endpoint=endpoint)
        for count in range(1, 5):
            world.come(f"n{count}")
            world.wait(31)
            assert bool(world.ranks) == (count == needed)
            if count == needed:
                break


def test_nothing_is_due_when_the_job_runs_or_is_over() -> None:
    world = three()
    assert world.job.due() == inf
    world.tell(world.requested("n0", ShutDown()))
    assert world.job.due() == inf
    assert not world.job.is_empty
    world.tell(*(Left(name, "the job is over") for name in ("n0", "n1", "n2")))
    assert world.job.is_empty


def test_spares_that_were_there_decide_too_who_goes_on() -> None:
    """Two nodes that train, and a spare: when the host dies, the other one and the spare are most of the three."""
    two = World(2, 2, endpoints=3)
    two.come("n0", "n1", "n2")
    two.report("n0", FAILED)
    two.ready("n0", "n1")
    waiting = two.mail["n2"][-1]
    assert isinstance(waiting, Waiting)
    memory = waiting.memory
    assert memory is not None
    assert (memory, memory.voters, memory.nodes) == (two.assigned("n1").memory, 3, 2)
    world = World(2, 2, memory=memory, endpoints=3, endpoint=1)
    world.tell(Joined(world.node("n1"), memory, 1), Joined(world.node("n2"), memory, None))
    world.ready("n1", "n2")
    world.wait(TIMING.settle + STRAGGLERS)
    assert world.ranks == {"n2": 0, "n1": 1}


def test_spares_that_were_there_keep_the_host_from_giving_up() -> None:
    world = World(2, 2, endpoints=3)
    world.come("n0", "n1", "n2", "n3")
    world.report("n0", FAILED)
    world.ready("n0", "n1")
    world.tell(Lost("n1", "nothing was heard of it"), Lost("n3", "nothing was heard of it"))
    assert not world.job.is_lost
    world.ready("n0")
    assert world.ranks == {"n0": 0, "n2": 1}


def test_who_came_after_the_round_had_formed_does_not_decide() -> None:
    world = World(2, 3, endpoints=3)
    world.come("n0", "n1", "n2")
    world.come("n3", "n4")
    world.tell(Lost("n1", "nothing was heard of it"), Lost("n2", "nothing was heard of it"))
    world.ready("n0")
    assert world.job.is_lost
    assert not world.ranks
