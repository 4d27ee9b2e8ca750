"""The watch: which deadline comes first, for every combination of stamps and limits."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ft_launcher.watch import Deadline, Lag, Limits, Stamps, deadline, evidence_at, next_look

INSTANTS = st.floats(min_value=100.0, max_value=1000.0)
SPANS = st.none() | st.floats(min_value=0.01, max_value=500.0)
NAMES = st.sampled_from(["setup", "step", "checkpointing", "other"])
LIMITS = st.builds(
    Limits,
    startup=SPANS,
    initial=SPANS,
    heartbeat=SPANS,
    sections=st.dictionaries(NAMES, SPANS),
    out_of_section=SPANS,
    teardown=SPANS,
)
STAMPS = st.builds(
    Stamps,
    heartbeat=st.none() | INSTANTS,
    idle_since=st.none() | INSTANTS,
    connected=st.none() | INSTANTS,
    reconnected=st.none() | INSTANTS,
    teardown=st.none() | INSTANTS,
    used_sections=st.booleans(),
    open_sections=st.dictionaries(NAMES, INSTANTS),
)
EVERY = Limits(startup=1, initial=2, heartbeat=3, sections={"outer": 4, "inner": 5}, out_of_section=6, teardown=7)


def due(stamps: Stamps, limits: Limits = EVERY, *, job_connected: bool = True, lags: tuple[Lag, ...] = ()) -> Deadline:
    found = deadline(stamps, limits, 100.0, job_connected=job_connected, lags=lags)
    assert found is not None
    return found


def test_without_limits_there_is_no_deadline():
    stamps = Stamps(heartbeat=1, idle_since=1, connected=1, open_sections={"step": 1}, used_sections=True)
    assert deadline(stamps, Limits(), 100.0, job_connected=True) is None


def test_R7_a_late_outer_section_is_not_hidden_by_an_open_inner_one():
    stamps = Stamps(connected=100, used_sections=True, open_sections={"outer": 100, "inner": 103.9})
    found = due(stamps)
    assert (found.at, found.what) == (104, "section 'outer' open")


def test_a_section_without_a_limit_hides_no_other():
    stamps = Stamps(connected=100, used_sections=True, open_sections={"outer": 100, "unlimited": 50})
    assert due(stamps).at == 104


@given(STAMPS, LIMITS, NAMES, INSTANTS)
def test_one_more_open_section_never_puts_a_deadline_off(stamps, limits, name, since):
    # But for the time outside of sections, which does not count while one is open.
    if name in stamps.open_sections or stamps.teardown is not None or not stamps.open_sections:
        return
    before = deadline(stamps, limits, 100.0, job_connected=True)
    more = Stamps(
        **{f: getattr(stamps, f) for f in stamps.__struct_fields__}
        | {"open_sections": {**stamps.open_sections, name: since}}
    )
    after = deadline(more, limits, 100.0, job_connected=True)
    assert before is None or (after is not None and after.at <= before.at)


@given(STAMPS, LIMITS, st.booleans())
def test_the_deadline_is_the_minimum_over_all_that_count(stamps, limits, job_connected):
    expected = []
    if stamps.teardown is not None:
        expected = [(stamps.teardown, limits.teardown)]
    else:
        if stamps.heartbeat is None and not stamps.used_sections:
            since = stamps.reconnected if stamps.reconnected is not None else 100.0
            expected.append((since, limits.startup))
            if job_connected:
                expected.append((since, limits.initial))
        if stamps.heartbeat is not None:
            expected.append((stamps.heartbeat, limits.heartbeat))
        expected += [(since, limits.sections.get(name)) for name, since in stamps.open_sections.items()]
        sections = stamps.used_sections or stamps.heartbeat is None
        if stamps.idle_since is not None and not stamps.open_sections and sections:
            expected.append((stamps.idle_since, limits.out_of_section))
    instants = [since + limit for since, limit in expected if limit is not None]
    found = deadline(stamps, limits, 100.0, job_connected=job_connected)
    assert (found.at if found else None) == (min(instants) if instants else None)


def test_a_silent_rank_has_no_deadline_before_any_rank_has_connected():
    assert deadline(Stamps(), Limits(initial=5), 100.0, job_connected=False) is None
    assert due(Stamps(), Limits(initial=5)).at == 105


def test_the_startup_timeout_counts_even_if_nobody_ever_connects():
    assert due(Stamps(), Limits(startup=5), job_connected=False).at == 105


def test_the_first_section_ends_the_startup_as_a_heartbeat_does():
    limits = Limits(startup=5, initial=5)
    assert deadline(Stamps(connected=101, used_sections=True), limits, 100.0, job_connected=True) is None
    assert deadline(Stamps(connected=101, heartbeat=101), limits, 100.0, job_connected=True) is None


def test_R10_after_shutdown_only_the_teardown_timeout_counts():
    stamps = Stamps(heartbeat=1, idle_since=1, connected=1, open_sections={"outer": 1}, teardown=200)
    found = due(stamps)
    assert (found.at, found.what) == (207, "not ended after it stopped its monitoring")
    assert deadline(stamps, Limits(heartbeat=1), 100.0, job_connected=True) is None


def test_monitoring_begun_again_counts_from_then():
    assert due(Stamps(connected=150, reconnected=150), Limits(initial=5)).at == 155


def test_time_outside_of_sections_counts_only_while_none_is_open():
    limits = Limits(out_of_section=6)
    assert due(Stamps(idle_since=110, used_sections=True), limits).at == 116
    with_one_open = Stamps(idle_since=110, used_sections=True, open_sections={"step": 111})
    assert deadline(with_one_open, limits, 100.0, job_connected=True) is None


def test_a_script_that_only_sends_heartbeats_has_no_outside_of_sections():
    limits = Limits(heartbeat=100, out_of_section=6)
    assert due(Stamps(connected=110, idle_since=110), limits).at == 116
    assert due(Stamps(connected=110, idle_since=110, heartbeat=111), limits).at == 211
    assert due(Stamps(connected=110, idle_since=110, heartbeat=111, used_sections=True), limits).at == 116


@given(STAMPS, LIMITS, st.lists(st.builds(Lag, ended_at=INSTANTS, seconds=st.floats(0.25, 10)), max_size=3))
def test_M6_lags_of_the_watcher_never_bring_a_deadline_forward(stamps, limits, lags):
    without = deadline(stamps, limits, 100.0, job_connected=True)
    late = deadline(stamps, limits, 100.0, job_connected=True, lags=tuple(lags))
    assert (without is None) == (late is None)
    if without is not None and late is not None:
        assert without.at <= late.at <= without.at + sum(lag.seconds for lag in lags) + 1e-6


def test_M6_a_wait_is_given_that_part_of_a_lag_which_it_has_seen():
    lag = Lag(ended_at=150, seconds=2)
    assert due(Stamps(heartbeat=147), lags=(lag,)).at == 152
    assert due(Stamps(heartbeat=149), lags=(lag,)).at == 153
    assert due(Stamps(heartbeat=151), lags=(lag,)).at == 154


@given(STAMPS, LIMITS, INSTANTS, st.floats(0.1, 10))
def test_no_look_comes_later_than_anything_it_could_miss(stamps, limits, now, at_most):
    found = deadline(stamps, limits, 100.0, job_connected=True)
    look = next_look(found, limits, now, at_most=at_most)
    assert now <= look <= now + at_most
    smallest = limits.smallest()
    if smallest is not None:
        assert look <= now + smallest / 2
    if found is not None:
        assert look <= max(found.at, now)
        if now < evidence_at(found):
            assert look <= evidence_at(found)


@given(LIMITS, INSTANTS)
def test_a_rank_without_deadlines_is_looked_at_no_more_often_than_asked(limits, now):
    smallest = limits.smallest()
    expected = now + (2.0 if smallest is None else min(2.0, smallest / 2))
    assert next_look(None, limits, now, at_most=2.0) == expected


@given(STAMPS, LIMITS, INSTANTS, st.lists(st.builds(Lag, ended_at=INSTANTS, seconds=st.floats(0.25, 10)), max_size=3))
def test_N3_a_lease_that_ended_is_a_deadline_in_every_phase_and_no_lag_extends_it(stamps, limits, lease, lags):
    with_lease = structs.replace(stamps, lease=lease)
    found = due(with_lease, limits, lags=tuple(lags))
    assert found.at <= lease
    assert found.at == lease or not found.is_fence
    assert deadline(stamps, limits, 100.0, job_connected=True) is None or not due(stamps, limits).is_fence


def test_N3_a_fenced_rank_is_told_apart_from_a_hung_one():
    found = due(Stamps(lease=101, teardown=100))
    assert (found.at, found.is_fence) == (101, True)
    assert found.sentence(102) == "its node lost contact with the other nodes, which may start anew without it"


def test_the_sentence_says_what_for_how_long_and_the_limit():
    found = Deadline(at=112, since=100, limit=12, what="section 'step' open")
    assert found.sentence(112.3) == "section 'step' open for 12.3 s, timeout 12 s"
    assert Deadline(at=100.2, since=100, limit=0.2, what="no heartbeat").sentence(100.21) == (
        "no heartbeat for 0.21 s, timeout 0.2 s"
    )
