"""Calculated timeouts: never below what was seen, smoothed over runs, the same through a checkpoint."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_launcher.timeouts import (
    HeartbeatTimeouts,
    Observed,
    SectionTimeouts,
    calculated_heartbeats,
    calculated_sections,
    for_process_group,
    from_state,
    next_timeout,
    with_calculated_heartbeats,
    with_calculated_sections,
)

SPANS = st.floats(min_value=0.001, max_value=10_000)


def test_the_first_calculation_is_the_longest_interval_times_the_factor():
    found = calculated_heartbeats(Observed(initial=3, heartbeat=2), Observed(), 5.0, HeartbeatTimeouts(initial=3600))
    assert found == HeartbeatTimeouts(initial=15, subsequent=10, were_calculated=True)
    assert found.are_valid


def test_a_second_calculation_goes_half_way():
    current = HeartbeatTimeouts(initial=15, subsequent=10, were_calculated=True)
    found = calculated_heartbeats(Observed(initial=3, heartbeat=4), Observed(initial=3, heartbeat=4), 5.0, current)
    assert found.subsequent == 15


@given(SPANS, st.lists(SPANS, min_size=1, max_size=20), st.floats(1.0, 10.0))
def test_many_quiet_runs_never_make_a_rare_long_phase_a_hang(long_phase, later, factor):
    timeout = next_timeout(long_phase, long_phase, factor, None, current_was_calculated=False)
    for seen in later:
        timeout = next_timeout(seen, max(long_phase, seen), factor, timeout, current_was_calculated=True)
        assert timeout >= long_phase * min(factor, 2.0)
        assert timeout >= seen * min(factor, 2.0)


def test_only_the_selected_sections_are_calculated():
    current = SectionTimeouts(section={"step": 60.0, "setup": None}, out_of_section=30.0)
    found = calculated_sections(Observed(sections={"step": 2.0, "setup": 9.0}), Observed(), 5.0, current, ["step"])
    assert found.section == {"step": 10.0, "setup": None}
    assert (found.out_of_section, found.is_out_of_section_calculated) == (30.0, False)
    assert found.calculated_sections == {"step"}
    assert not found.were_calculated
    assert not found.are_valid


@given(st.lists(st.none() | SPANS), SPANS)
def test_a_process_group_outlasts_every_limit_and_the_grace_by_a_minute_and_waits_as_long_as_nccls(limits, grace):
    timeout = for_process_group(limits, grace)
    if set(limits) <= {None}:
        assert timeout is None
    else:
        assert timeout is not None
        over = [timeout - grace - limit for limit in limits if limit is not None]
        assert min(over) >= 59.999  # floats
        assert timeout == 600 or min(over) <= 60.001
        assert timeout >= 600


def test_the_state_survives_json():
    heartbeat = HeartbeatTimeouts(initial=15, subsequent=10, were_calculated=True)
    section = SectionTimeouts(section={"step": 1.5}, out_of_section=2.0, calculated_sections=frozenset({"step"}))
    observed = Observed(heartbeat=2.0, sections={"step": 0.3})
    state = {
        "current_timeouts": {"heartbeat": msgspec.to_builtins(heartbeat), "section": msgspec.to_builtins(section)},
        "observed": observed.as_dict(),
    }
    assert from_state(json.loads(json.dumps(state))) == (heartbeat, section, observed)


@pytest.mark.parametrize("state", [{}, {"current_timeouts": 3}, {"current_timeouts": {"heartbeat": {"initial": "x"}}}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="not a state of RankMonitorClient"):
        from_state(state)


def test_a_loaded_limit_that_was_only_configured_does_not_override_the_file():
    from_file = SectionTimeouts(section={"step": 7.0, "setup": 60.0}, out_of_section=30.0)
    loaded = SectionTimeouts(
        section={"step": 2.0, "setup": 1.0}, out_of_section=1.0, calculated_sections=frozenset({"step"})
    )
    found = with_calculated_sections(from_file, loaded)
    assert (found.section, found.out_of_section) == ({"step": 2.0, "setup": 60.0}, 30.0)
    configured = HeartbeatTimeouts(initial=1.0, subsequent=1.0)
    current = HeartbeatTimeouts(initial=9.0, subsequent=9.0)
    assert with_calculated_heartbeats(current, configured) is current
