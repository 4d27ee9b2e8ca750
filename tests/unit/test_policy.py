"""Restart policies, exhaustively for every state of up to 6 nodes."""

from itertools import permutations, product

import msgspec
import pytest

from ft_launcher.policy import NodeState, Verdict, any_failed, min_healthy

HEALTHY, SUCCEEDED, FAILED, GONE, PREEMPTED = NodeState
LOST = {FAILED, GONE}
ROUNDS = [states for nodes in range(1, 7) for states in product(NodeState, repeat=nodes)]


def later(states):
    """Give every round that differs from this one by one more healthy node that failed or is gone."""
    for place, state in enumerate(states):
        if state is HEALTHY:
            for worse in (FAILED, GONE):
                yield (*states[:place], worse, *states[place + 1 :])


def test_any_failed_restarts_exactly_when_a_node_failed_or_is_gone():
    for states in ROUNDS:
        assert (any_failed(states) is Verdict.RESTART) == bool(LOST & set(states)), states


def test_any_failed_succeeds_exactly_when_all_nodes_have():
    for states in ROUNDS:
        assert (any_failed(states) is Verdict.SUCCEED) == (set(states) == {SUCCEEDED}), states


def test_min_healthy_restarts_exactly_when_too_few_run_or_have_succeeded():
    for states in ROUNDS:
        good = len([state for state in states if state not in LOST])
        for min_nodes in range(1, 7):
            assert (min_healthy(states, min_nodes) is Verdict.RESTART) == (good < min_nodes), states


def test_min_healthy_succeeds_exactly_when_none_runs_and_enough_have_succeeded():
    for states in ROUNDS:
        for min_nodes in range(1, 7):
            expected = not {HEALTHY, PREEMPTED} & set(states) and states.count(SUCCEEDED) >= min_nodes
            assert (min_healthy(states, min_nodes) is Verdict.SUCCEED) == expected, states


def test_min_healthy_with_every_node_needed_is_any_failed():
    for states in [(), *ROUNDS]:
        assert min_healthy(states, len(states)) is any_failed(states), states


def test_a_job_is_preempted_exactly_when_none_runs_enough_ended_well_and_one_of_them_for_a_notice():
    for states in ROUNDS:
        is_over = HEALTHY not in states and PREEMPTED in states
        assert (any_failed(states) is Verdict.PREEMPT) == (is_over and not LOST & set(states)), states
        for min_nodes in range(1, 7):
            good = len([state for state in states if state not in LOST])
            assert (min_healthy(states, min_nodes) is Verdict.PREEMPT) == (is_over and good >= min_nodes), states


def test_the_verdict_does_not_depend_on_the_order_of_the_nodes():
    for states in product(NodeState, repeat=4):
        for other in permutations(states):
            assert any_failed(other) is any_failed(states)
            for min_nodes in range(1, 5):
                assert min_healthy(other, min_nodes) is min_healthy(states, min_nodes)


def test_a_further_failure_never_undoes_a_restart():
    for states in ROUNDS:
        for worse in later(states):
            assert any_failed(states) is not Verdict.RESTART or any_failed(worse) is Verdict.RESTART
            for min_nodes in range(1, 7):
                before, after = min_healthy(states, min_nodes), min_healthy(worse, min_nodes)
                assert before is not Verdict.RESTART or after is Verdict.RESTART, (states, worse)


def test_any_failed_never_goes_on_where_min_healthy_restarts():
    for states in ROUNDS:
        for min_nodes in range(1, len(states) + 1):
            if min_healthy(states, min_nodes) is Verdict.RESTART:
                assert any_failed(states) is Verdict.RESTART, states


def test_a_job_goes_on_only_while_a_node_runs():
    for states in ROUNDS:
        verdicts = {any_failed(states), *(min_healthy(states, min_nodes) for min_nodes in range(1, 7))}
        assert Verdict.CONTINUE not in verdicts or HEALTHY in states, states


@pytest.mark.parametrize("min_nodes", [0, 1, 3])
def test_no_nodes_at_all_are_a_restart_and_never_a_success(min_nodes):
    assert any_failed([]) is Verdict.RESTART
    assert min_healthy([], min_nodes) is Verdict.RESTART


def test_states_may_come_from_a_generator():
    assert any_failed(state for state in (SUCCEEDED, SUCCEEDED)) is Verdict.SUCCEED
    assert min_healthy((state for state in (FAILED, HEALTHY, HEALTHY)), 2) is Verdict.CONTINUE


@pytest.mark.parametrize("state", NodeState)
def test_a_state_survives_the_wire_as_a_word(state):
    line = msgspec.json.encode(state)
    assert line == f'"{state.value}"'.encode()
    assert msgspec.json.decode(line, type=NodeState) is state
