"""What the answers of metadata services and a file's content mean, whatever they are."""

import json
import math
from datetime import datetime, timezone
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ft_launcher.errors import UsageError
from ft_launcher.metadata_http import LINK_LOCAL, base_url
from ft_launcher.notices import (
    GCP_GRACE,
    Clear,
    Instant,
    Notice,
    SourceError,
    State,
    azure_events,
    is_same,
    read_aws,
    read_azure,
    read_file,
    read_gcp_maintenance,
    read_gcp_preempted,
    source_names,
)
from ft_launcher.preemption import AwsSpot, Azure, File, Gcp, parse_sources

NOW = Instant(monotonic=1000.0, wall=datetime(2026, 11, 21, 12, 0, 0, tzinfo=timezone.utc).timestamp())
VM = "trainer_3"

statuses = st.integers(100, 599) | st.sampled_from([200, 404])
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["Events", "action", "time"]), inner),
    max_leaves=12,
)
bodies = (
    st.binary(max_size=200)
    | values.map(lambda value: json.dumps(value).encode())
    | st.sampled_from([b"TRUE", b"FALSE", b"NONE", b"true", b"false", b"0", b"FALSE.", b"<html>FALSE</html>", b"null"])
)


def action(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def event(kind: str, *resources: str, not_before: str = "Sat, 21 Nov 2026 12:00:30 GMT", **fields: object) -> object:
    return {
        "EventId": "A1",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": resources or (VM,),
        "EventStatus": "Scheduled",
        "NotBefore": not_before,
        **fields,
    }


def azure(status: int, body: bytes) -> State:
    events = azure_events(status, body, VM)
    return events if isinstance(events, SourceError) else read_azure(events, NOW)


def events(*announced: object) -> State:
    return azure(200, json.dumps({"DocumentIncarnation": 1, "Events": announced}).encode())


def notice(state: State) -> Notice:
    assert isinstance(state, Notice), state
    return state


# -- junk -------------------------------------------------------------------------------------------------------------


def sane(state: State) -> None:
    match state:
        case Notice(deadline=deadline):
            assert deadline is None or NOW.monotonic <= deadline < math.inf
            assert state.description.isprintable()
        case SourceError(what):
            assert what.isprintable()
            assert len(what) < 400


@given(statuses, bodies)
@example(200, b"")
def test_P1_only_404_of_aws_is_clear(status: int, body: bytes) -> None:
    state = read_aws(status, body, NOW)
    sane(state)
    assert isinstance(state, Clear) == (status == 404)


@given(statuses, bodies)
def test_P2_only_FALSE_of_gcp_is_clear(status: int, body: bytes) -> None:
    state = read_gcp_preempted(status, body, NOW)
    sane(state)
    assert isinstance(state, Clear) == (status == 200 and body.strip() == b"FALSE")
    assert isinstance(state, Notice) == (status == 200 and body.strip() == b"TRUE")


@given(statuses, bodies | st.just(b"MIGRATE_ON_HOST_MAINTENANCE"))
def test_P2_only_NONE_and_a_migration_are_clear(status: int, body: bytes) -> None:
    state = read_gcp_maintenance(status, body, NOW)
    sane(state)
    assert isinstance(state, Clear) == (status == 200 and body.strip() in (b"NONE", b"MIGRATE_ON_HOST_MAINTENANCE"))


@given(statuses, bodies | values.map(lambda value: json.dumps({"Events": [value]}).encode()))
@example(200, b'{"Events": null}')
@example(200, b'{"events": []}')
@example(200, b'{"Events": [{}]}')
def test_P3_only_a_list_without_an_event_for_us_is_clear(status: int, body: bytes) -> None:
    state = azure(status, body)
    sane(state)
    if isinstance(state, Clear):
        assert status == 200
        assert isinstance(json.loads(body)["Events"], list)


@given(st.binary(max_size=256))
def test_a_file_that_is_there_is_a_notice_whatever_is_in_it(content: bytes) -> None:
    sane(read_file("/run/preempt", content, NOW))


@given(
    st.lists(
        st.builds(
            event,
            st.sampled_from(["Preempt", "Terminate", "Redeploy", "Reboot", "Freeze", "Vanish"]),
            st.sampled_from([VM, VM.upper(), "trainer_4", "trainer_33"]),
            not_before=st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)).map(
                lambda when: format_datetime(when.replace(tzinfo=timezone.utc), usegmt=True)
            )
            | st.text(),
            EventStatus=st.sampled_from(["Scheduled", "Started"]),
        ),
        max_size=6,
    )
)
def test_P3_a_stop_of_this_vm_is_always_found_among_others(announced: list[dict[str, Any]]) -> None:
    state = events(*announced)
    sane(state)
    ours = {each["EventType"].lower() for each in announced if each["Resources"][0].lower() == VM}
    if ours & {"preempt", "terminate", "redeploy", "reboot"}:
        assert notice(state).kind in ours
    else:
        assert isinstance(state, SourceError if "vanish" in ours else Clear)


# -- what is documented -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["terminate", "stop", "hibernate"])
def test_P1_aws_names_the_action_and_its_time(kind: str) -> None:
    found = notice(read_aws(200, action(action=kind, time="2026-11-21T12:02:00Z"), NOW))
    assert (found.kind, found.source, found.deadline) == (kind, "aws", NOW.monotonic + 120)
    assert "2026-11-21 12:02:00" in found.description


@pytest.mark.parametrize("time", ["2026-11-21T11:59:59Z", "soon", "", "2026-11-21T12:02:00", None])
def test_P1_a_time_that_is_past_or_unreadable_is_no_deadline_but_a_notice(time: str | None) -> None:
    fields = {"action": "terminate"} | ({} if time is None else {"time": time})
    assert notice(read_aws(200, action(**fields), NOW)).deadline is None


def test_P1_a_time_with_an_offset_is_that_moment() -> None:
    found = notice(read_aws(200, action(action="stop", time="2026-11-21T13:01:00+01:00"), NOW))
    assert found.deadline == NOW.monotonic + 60


@pytest.mark.parametrize(
    ("status", "body"),
    [(401, b"Unauthorized"), (403, b""), (500, b""), (200, b"<html>"), (200, action(action="dance")), (302, b"")],
)
def test_P1_other_answers_of_aws_are_errors_that_show_them(status: int, body: bytes) -> None:
    state = read_aws(status, body, NOW)
    assert isinstance(state, SourceError)
    assert str(status) in state.what


def test_P2_a_preempted_vm_of_gcp_has_half_a_minute() -> None:
    found = notice(read_gcp_preempted(200, b"TRUE\n", NOW))
    assert (found.kind, found.source, found.deadline) == ("preempt", "gcp", NOW.monotonic + GCP_GRACE)


def test_P2_a_termination_for_maintenance_has_no_known_time() -> None:
    found = notice(read_gcp_maintenance(200, b"TERMINATE_ON_HOST_MAINTENANCE", NOW))
    assert (found.kind, found.source, found.deadline) == ("terminate", "gcp-maintenance", None)


@pytest.mark.parametrize("kind", ["Preempt", "Terminate", "Redeploy", "Reboot"])
def test_P3_an_event_that_stops_this_vm_is_a_notice(kind: str) -> None:
    found = notice(events(event(kind)))
    assert (found.kind, found.source, found.deadline) == (kind.lower(), "azure", NOW.monotonic + 30)
    assert "A1" in found.description


def test_P3_an_event_that_has_started_has_no_deadline() -> None:
    assert notice(events(event("Reboot", not_before="", EventStatus="Started"))).deadline is None


def test_P3_a_freeze_is_not_a_stop() -> None:
    assert events(event("Freeze")) == Clear()


def test_P3_an_event_of_another_vm_is_none_of_ours() -> None:
    assert events(event("Preempt", "trainer_4", "trainer_33")) == Clear()
    assert notice(events(event("Preempt", "trainer_4", VM.upper()))).kind == "preempt"


def test_P3_of_several_events_the_first_to_come_counts() -> None:
    later, sooner = event("Reboot", not_before="Sat, 21 Nov 2026 12:15:00 GMT"), event("Preempt")
    assert notice(events(later, sooner)).kind == notice(events(sooner, later)).kind == "preempt"


def test_P3_an_event_of_an_unknown_type_is_an_error_that_hides_no_notice() -> None:
    assert isinstance(events(event("Vanish")), SourceError)
    assert notice(events(event("Vanish"), event("Preempt"))).kind == "preempt"
    assert events(event("Vanish", "trainer_4")) == Clear()


@pytest.mark.parametrize(
    ("content", "seconds"),
    [(b"", None), (b"\n", None), (b"30", 30), (b" 1.5 \n", 1.5), (b"90s\n", 90), (b"0", 0)]
    + [(text, None) for text in (b"soon", b"-1", b"nan", b"inf", b"30 40", b"\xff\xfe")],
)
def test_a_file_may_name_the_seconds_that_are_left(content: bytes, seconds: float | None) -> None:
    found = read_file("/run/preempt", content, NOW)
    assert found.deadline == (None if seconds is None else NOW.monotonic + seconds)
    assert (found.kind, found.source) == ("file", "file:/run/preempt")
    assert ("not a number" in found.description) == (seconds is None and bool(content.strip()))


def test_a_notice_whose_deadline_was_computed_anew_is_the_same() -> None:
    one = Notice("stop", "aws", 50.0, "x")
    assert is_same(one, Notice("stop", "aws", 50.4, "x"))
    assert not is_same(one, Notice("stop", "aws", 60.0, "x"))
    assert not is_same(one, Notice("stop", "aws", None, "x"))
    assert not is_same(one, Notice("terminate", "aws", 50.0, "x"))
    assert not is_same(one, Clear())
    assert is_same(SourceError("x"), SourceError("x"))
    assert not is_same(SourceError("x"), SourceError("y"))


# -- what a user writes -----------------------------------------------------------------------------------------------


def test_sources_are_named_in_one_text() -> None:
    assert source_names("aws, gcp,file:/run/preempt,aws") == ("aws", "gcp", "file:/run/preempt")
    assert source_names(" ") == ()


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("asw", "asw: must be aws, gcp, azure, azure-acknowledge or file:/path; did you mean aws?"),
        ("aws,azure_acknowledge", "azure_acknowledge: must be .*; did you mean azure-acknowledge?"),
        ("AZURE", "did you mean azure?"),
        ("file:preempt", "file:preempt: must be .*; did you mean file:/path, with an absolute path?"),
        ("file", "did you mean file:/path"),
        ("slurm-controller", "slurm-controller: must be aws, gcp, azure, azure-acknowledge or file:/path$"),
        ("aws,,gcp", "'': must be"),
        ("azure,azure-acknowledge", "give one of them"),
    ],
)
def test_another_name_is_refused_with_what_is_allowed(text: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice.replace("?", r"\?")):
        source_names(text)
    with pytest.raises(UsageError, match=r"^preemption sources: "):
        parse_sources(text, {})


def test_named_sources_are_made_where_the_environment_says() -> None:
    sources = parse_sources(
        ["aws", "gcp", "azure-acknowledge", "file:/run/preempt"], {"FT_METADATA_AWS_URL": "http://127.0.0.1:81/"}
    )
    assert [type(source) for source in sources] == [AwsSpot, Gcp, Gcp, Azure, File]
    assert [source.name for source in sources] == ["aws", "gcp", "gcp-maintenance", "azure", "file:/run/preempt"]
    assert [source.acknowledges for source in sources] == [False, False, False, True, False]
    assert not parse_sources("azure", {})[0].acknowledges


@pytest.mark.parametrize("variable", ["FT_METADATA_AWS_URL", "FT_METADATA_GCP_URL", "FT_METADATA_AZURE_URL"])
def test_each_service_has_a_variable_and_a_bad_one_is_named(variable: str) -> None:
    source = variable.split("_")[2].lower()
    with pytest.raises(UsageError, match=f"{variable}=https://a: must be http:// with a numeric address"):
        parse_sources(source, {variable: "https://a"})
    parse_sources(source, {variable: ""})


@pytest.mark.parametrize(
    "url", [LINK_LOCAL, "http://localhost:8080", "http://[fd00:ec2::254]", "http://metadata.google.internal"]
)
def test_a_metadata_service_has_a_numeric_address_or_a_known_name(url: str) -> None:
    assert base_url(url + "/") == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "169.254.169.254",
        "https://127.0.0.1",
        "http://",
        "http://example.com",
        "http://1.2.3",
        "http://[::1",
        "http://127.0.0.1:0",
        "http://127.0.0.1:99999",
        "http://127.0.0.1/?a=b",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/\r\nX: y",
        "http://a@127.0.0.1",
    ],
)
def test_what_is_no_such_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (the caller says what is wrong)
        base_url(url)
