"""Launchers in the bundles of a Ray cluster: who meets whom, who is replaced, and which code is the job's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_launcher.integrations.ray_cluster_plan import Create, Finish, Plan, Start, StopAll, exit_code


def begun(bundles: int = 3, max_replacements: int = 10) -> Plan:
    """Give the plan of a job whose launchers run, at endpoints e0:1, e1:1 and so on."""
    plan = Plan(bundles, max_replacements)
    assert plan.begin() == [Create(bundle, 0) for bundle in range(bundles)]
    for bundle in range(bundles):
        plan.prepared(bundle, f"e{bundle}:1")
    return plan


def test_nobody_starts_before_all_have_a_place_and_then_all_know_each_other() -> None:
    plan = Plan(3, 0)
    assert [*plan.prepared(2, "c"), *plan.prepared(0, "a")] == []
    assert not plan.has_begun
    assert plan.prepared(1, "b") == [Start(bundle, 0, ("a", "b", "c"), joins=False) for bundle in range(3)]
    assert plan.has_begun


def test_who_is_lost_before_the_beginning_is_waited_for() -> None:
    plan = Plan(2, 1)
    plan.prepared(0, "a")
    assert plan.lost(0) == [Create(0, 1)]
    assert plan.prepared(1, "b") == []
    assert plan.prepared(0, "A") == [Start(0, 1, ("A", "b"), joins=False), Start(1, 0, ("A", "b"), joins=False)]


def test_a_replacement_knows_those_that_run_the_oldest_first_and_itself_last() -> None:
    plan = begun()
    assert plan.lost(0) == [Create(0, 1)]
    assert not plan.is_current(0, 0)
    assert plan.prepared(0, "new0:1") == [Start(0, 1, ("e1:1", "e2:1", "new0:1"), joins=True)]
    assert plan.lost(1) == [Create(1, 1)]
    assert plan.prepared(1, "new1:1") == [Start(1, 1, ("e2:1", "new0:1", "new1:1"), joins=True)]


def test_the_port_of_a_lost_one_is_known_on_while_another_on_its_machine_may_be_the_host_there() -> None:
    plan = Plan(3, 10)
    for bundle, endpoint in enumerate(["a:1", "a:2", "b:1"]):
        plan.prepared(bundle, endpoint)
    plan.lost(0)
    assert plan.prepared(0, "c:1") == [Start(0, 1, ("a:2", "b:1", "a:1", "c:1"), joins=True)]
    plan.lost(1)
    assert plan.prepared(1, "d:1") == [Start(1, 1, ("b:1", "c:1", "d:1"), joins=True)]


def test_when_all_are_lost_the_first_to_come_back_begins_again_and_the_others_join_it() -> None:
    plan = begun(2)
    assert [*plan.lost(0), *plan.lost(1)] == [Create(0, 1), Create(1, 1)]
    assert plan.prepared(1, "b:1") == [Start(1, 1, ("b:1",), joins=False)]
    assert plan.prepared(0, "a:1") == [Start(0, 1, ("b:1", "a:1"), joins=True)]


@given(st.lists(st.tuples(st.sampled_from(["lose", "place"]), st.integers(0, 3)), max_size=60))
def test_the_oldest_that_runs_is_known_to_all_that_run(events: list[tuple[str, int]]) -> None:
    plan = begun(4, max_replacements=1000)
    known = {bundle: (f"e{bundle}:1", tuple(f"e{each}:1" for each in range(4))) for bundle in range(4)}
    order = [*range(4)]
    for number, (what, bundle) in enumerate(events):
        if what == "lose" and bundle in known:
            plan.lost(bundle)
            del known[bundle]
            order.remove(bundle)
        elif what == "place" and bundle not in known:
            (start,) = plan.prepared(bundle, f"n{number}:1")
            assert isinstance(start, Start)
            assert start.joins == bool(known)
            assert start.endpoints[-1] == f"n{number}:1"
            known[bundle] = (f"n{number}:1", start.endpoints)
            order.append(bundle)
        for bundle_that_runs in known:
            assert known[order[0]][0] in known[bundle_that_runs][1]
    assert sorted(known) == [bundle for bundle, _ in plan.running()]


def test_a_launcher_that_a_signal_killed_is_replaced_and_one_that_ended_by_itself_is_not() -> None:
    plan = begun()
    assert plan.ended(0, 137) == [Create(0, 1)]
    assert plan.ended(1, 75) == []
    assert plan.running() == [(2, 0)]
    assert plan.ended(2, 1) == [Finish(1)], "a job that has ended waits for no place"


def test_no_more_are_replaced_than_allowed() -> None:
    plan = begun(2, max_replacements=1)
    assert plan.lost(0) == [Create(0, 1)]
    plan.prepared(0, "a")
    assert plan.replacements_left == 0
    assert plan.lost(0) == []
    assert plan.ended(1, 137) == [Finish(1)]


def test_success_is_final_and_the_others_are_given_some_time() -> None:
    plan = begun()
    assert plan.lost(0) == [Create(0, 1)]
    (farewell,) = plan.ended(1, 0)
    assert isinstance(farewell, StopAll)
    assert farewell.after > 0
    assert plan.ended(2, 143) == [Finish(0)]


def test_nobody_is_replaced_after_a_success() -> None:
    plan = begun(2)
    plan.ended(0, 0)
    assert plan.lost(1) == [Finish(0)]


def test_a_bundle_in_which_nothing_can_be_started_is_done_without() -> None:
    plan = begun(2)
    plan.lost(0)
    assert plan.unfit(0) == []
    assert plan.ended(1, 0) == [Finish(0)]


def test_a_signal_stops_all_and_waits_for_those_that_run() -> None:
    plan = begun()
    plan.lost(0)
    assert plan.stopped(15) == [StopAll(0.0)]
    assert plan.is_stopping
    assert not plan.is_current(0, 1)
    assert plan.ended(1, 143) == []
    assert plan.lost(2) == [Finish(143)]


def test_who_left_before_the_signal_has_no_say_in_the_code() -> None:
    plan = begun(2)
    assert plan.ended(0, 75) == []
    plan.stopped(15)
    assert plan.ended(1, 143) == [Finish(143)]


def test_a_signal_before_the_beginning_ends_it_at_once() -> None:
    plan = Plan(2, 10)
    plan.prepared(0, "a")
    assert plan.stopped(2) == [StopAll(0.0), Finish(130)]


@pytest.mark.parametrize(
    ("ends", "signum", "code"),
    [
        ([(1, False), (1, False)], None, 1),
        ([(75, False), (1, False), (1, False)], None, 1),  # a node was excluded before
        ([(75, False), (1, False)], None, 1),
        ([(1, False), (75, True)], None, 1),  # the second came when the job was over
        ([(1, False), (1, False), (0, True)], None, 0),
        ([(93, False), (75, True), (75, True)], None, 93),
        ([], None, 1),
        ([(143, False), (143, False)], 15, 143),
        ([(143, False), (143, False)], 2, 130),
        ([(75, False), (75, False)], 15, 75),  # all ranks have saved
        ([(0, False), (143, False)], 15, 0),
        ([], 1, 129),
    ],
)
def test_the_code_of_the_job(ends: list[tuple[int, bool]], signum: int | None, code: int) -> None:
    assert exit_code(ends, signum) == code
