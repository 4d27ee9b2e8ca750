"""The watcher and its sources against metadata services that enforce their rules, against files, and against silence.

P1 to P4 are the acceptance tests of that name; the services are fakes, everything between them and the watcher is real.
"""

import logging
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import TypeVar
from urllib.error import HTTPError

import pytest

from ft_launcher.addresses import LOOPBACK, listen
from ft_launcher.notices import GCP_GRACE, Clear, Notice, SourceError, State, Unknown
from ft_launcher.preemption import AwsSpot, Azure, File, Gcp, Source, Watcher, parse_sources
from ft_launcher.preemption_sources import Look, Steps
from tests.conftest import GENEROUS, Sandbox
from tests.fake_metadata import (
    AWS_ACTION,
    AWS_TOKEN,
    AZURE_EVENTS,
    AZURE_NAME,
    GCP_INSTANCE,
    Asked,
    Fake,
    FakeAws,
    FakeAzure,
    FakeGcp,
    Reply,
    Stranger,
)

VM = "trainer_3"
SOON = 0.02
"""Seconds between two looks here: the providers' seconds would only make the tests longer."""

Kind = TypeVar("Kind", Clear, Notice, SourceError)


class Watch:
    """A watcher, and all that it has said."""

    def __init__(self, *sources: Source) -> None:
        self._news = threading.Condition()
        self.said: list[tuple[str, State]] = []
        self.watcher = Watcher(sources, self._hear)

    def _hear(self, name: str, state: State) -> None:
        with self._news:
            self.said.append((name, state))
            self._news.notify_all()

    def wait_for(self, kind: type[Kind], name: str | None = None, count: int = 1) -> Kind:
        """Wait until a source has said so, for the `count`-th time."""
        with self._news:

            def found() -> list[Kind]:
                return [state for said, state in self.said if isinstance(state, kind) and name in (None, said)]

            if not self._news.wait_for(lambda: len(found()) >= count, GENEROUS):
                raise AssertionError(f"no {kind.__name__} within {GENEROUS} s, but: {self.said}")
            return found()[count - 1]

    @property
    def kinds(self) -> list[str]:
        with self._news:
            return [type(state).__name__ for _, state in self.said]


@pytest.fixture
def watch() -> Iterator[Callable[..., Watch]]:
    """Watch sources until the end of the test, which no thread and no descriptor outlives."""
    before = descriptors()
    watches: list[Watch] = []

    def begin(*sources: Source) -> Watch:
        watches.append(Watch(*sources))
        return watches[-1]

    yield begin
    for each in watches:
        each.watcher.close()
    assert not threads()
    assert descriptors() <= before


@pytest.fixture
def serve(watch) -> Iterator[Callable[[Fake], Fake]]:
    """Let a fake serve until the end of the test, when the watch loses it."""
    with ExitStack() as fakes:

        def begin(fake: Fake) -> Fake:
            fakes.enter_context(fake)
            return fake

        yield begin


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "preemption"]


def utc_in(seconds: float) -> datetime:
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


def aws_time(seconds: float) -> str:
    return utc_in(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def azure_time(seconds: float) -> str:
    return format_datetime(utc_in(seconds), usegmt=True)


def seconds_left(notice: Notice) -> float:
    assert notice.deadline is not None
    return notice.deadline - time.monotonic()


def at(path: str, method: str = "GET", status: int | None = None) -> Callable[[Asked], bool]:
    return lambda asked: (asked.path, asked.method) == (path, method) and status in (None, asked.status)


def status_of(url: str, method: str = "GET", **headers: str) -> int:
    """Ask as another program would."""
    request = urllib.request.Request(url, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=GENEROUS) as answer:
            return int(answer.status)
    except HTTPError as error:
        with error:
            return error.code


# -- P1: AWS ----------------------------------------------------------------------------------------------------------


def test_P1_the_fake_refuses_what_aws_refuses(serve) -> None:
    aws = serve(FakeAws())
    assert status_of(aws.url + AWS_ACTION) == 401  # as IMDSv1 asks
    assert status_of(aws.url + AWS_ACTION, X_aws_ec2_metadata_token="guessed") == 401
    assert status_of(aws.url + AWS_TOKEN, "PUT") == 400
    assert status_of(aws.url + AWS_TOKEN, "PUT", X_aws_ec2_metadata_token_ttl_seconds="21601") == 400
    lifetime = {"X_aws_ec2_metadata_token_ttl_seconds": "60"}
    assert status_of(aws.url + AWS_TOKEN, "PUT", **lifetime, X_Forwarded_For="10.0.0.1") == 403
    assert status_of(aws.url + AWS_TOKEN, "PUT", **lifetime) == 200


def test_P1_a_notice_of_aws_is_found_with_a_token(watch, serve) -> None:
    aws = serve(FakeAws())
    seen = watch(AwsSpot(aws.url, interval=SOON))
    seen.wait_for(Clear, "aws")
    aws.announce("terminate", aws_time(120))
    notice = seen.wait_for(Notice)
    assert (notice.kind, notice.source) == ("terminate", "aws")
    assert 60 < seconds_left(notice) <= 120
    aws.wait_asked(at(AWS_ACTION, status=200), 5)
    assert seen.kinds == ["Clear", "Notice"]  # said once, however often it is found
    assert len(aws.wait_asked(at(AWS_TOKEN, "PUT"))) == 1
    assert not [asked for asked in aws.asked if asked.status == 401]


def test_P1_a_token_is_renewed_before_it_ends(watch, serve) -> None:
    aws = serve(FakeAws())
    seen = watch(AwsSpot(aws.url, token_seconds=2, interval=0.3))
    aws.wait_asked(at(AWS_TOKEN, "PUT"), 3)
    aws.announce("stop", aws_time(120))
    assert seen.wait_for(Notice).kind == "stop"
    assert seen.kinds == ["Clear", "Notice"]


def test_P1_a_token_that_is_revoked_is_renewed_and_nobody_notices(watch, serve) -> None:
    aws = serve(FakeAws())
    seen = watch(AwsSpot(aws.url, interval=SOON))
    seen.wait_for(Clear)
    aws.revoke_tokens()
    aws.wait_asked(at(AWS_TOKEN, "PUT"), 2)
    aws.wait_asked(at(AWS_ACTION, status=404), 2)
    assert seen.kinds == ["Clear"]


def test_P1_401_in_spite_of_a_new_token_is_an_error_never_clear(watch, serve) -> None:
    aws = serve(FakeAws())
    aws.gives_bad_tokens = True
    seen = watch(AwsSpot(aws.url, interval=SOON))
    assert "401" in seen.wait_for(SourceError).what
    aws.wait_asked(at(AWS_TOKEN, "PUT"), 3)  # each look tries anew
    assert seen.kinds == ["SourceError"]
    aws.gives_bad_tokens = False
    seen.wait_for(Clear)


def test_P1_beyond_the_hop_limit_the_error_names_it(watch, serve) -> None:
    aws = serve(FakeAws())
    aws.is_beyond_hop_limit = True
    seen = watch(AwsSpot(aws.url, interval=SOON, patience=0.1))
    assert "hop limit" in seen.wait_for(SourceError).what


def test_P1_an_instance_that_hibernates_at_once_has_no_deadline(watch, serve) -> None:
    aws = serve(FakeAws())
    aws.announce("hibernate", None)
    notice = watch(AwsSpot(aws.url, interval=SOON)).wait_for(Notice)
    assert (notice.kind, notice.deadline) == ("hibernate", None)


# -- P2: GCP ----------------------------------------------------------------------------------------------------------


def test_P2_the_fake_refuses_what_gcp_refuses(serve) -> None:
    gcp = serve(FakeGcp())
    assert status_of(gcp.url + GCP_INSTANCE + "preempted") == 403
    assert status_of(gcp.url + GCP_INSTANCE + "preempted", Metadata_Flavor="Google", X_Forwarded_For="10.0.0.1") == 403
    assert status_of(gcp.url + GCP_INSTANCE + "preempted", Metadata_Flavor="Google") == 200


def test_P2_a_preemption_of_gcp_is_heard_of_while_waiting_for_it(watch, serve) -> None:
    gcp = serve(FakeGcp())
    seen = watch(Gcp(gcp.url, wait_seconds=int(GENEROUS)))
    seen.wait_for(Clear, "gcp")
    gcp.wait_until_held(1)
    gcp.set("preempted", "TRUE")
    notice = seen.wait_for(Notice)
    assert (notice.kind, notice.source) == ("preempt", "gcp")
    assert 0 < seconds_left(notice) <= GCP_GRACE
    answered = gcp.wait_asked(at(GCP_INSTANCE + "preempted"), 2)
    assert len(answered) == 2  # FALSE at once, TRUE when it came: nothing was asked in between
    assert seen.kinds == ["Clear", "Notice"]


def test_P2_when_nothing_changes_it_waits_again(watch, serve) -> None:
    gcp = serve(FakeGcp())
    seen = watch(Gcp(gcp.url, wait_seconds=1, interval=SOON))
    gcp.wait_asked(lambda asked: "wait_for_change" in asked.query, 2)
    gcp.wait_until_held(1)
    assert seen.kinds == ["Clear"]


@pytest.mark.parametrize("lacks", ["waiting", "etags"])
def test_P2_where_the_service_cannot_wait_it_is_asked_again_and_again(watch, serve, lacks: str) -> None:
    gcp = serve(FakeGcp())
    gcp.refuses_to_wait, gcp.gives_etags = lacks == "waiting", lacks != "etags"
    seen = watch(Gcp(gcp.url, interval=SOON))
    gcp.wait_asked(lambda asked: asked.status == 200 and not asked.query, 3)
    gcp.set("preempted", "TRUE")
    assert seen.wait_for(Notice).kind == "preempt"
    assert seen.kinds == ["Clear", "Notice"]


def test_P2_maintenance_that_ends_the_vm_is_a_notice_and_a_migration_is_none(watch, serve) -> None:
    gcp = serve(FakeGcp())
    seen = watch(*parse_sources("gcp", {"FT_METADATA_GCP_URL": gcp.url}))
    gcp.wait_until_held(2)
    gcp.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    gcp.wait_asked(at(GCP_INSTANCE + "maintenance-event"), 2)
    gcp.wait_until_held(2)
    assert seen.kinds == ["Clear", "Clear"]
    gcp.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    assert seen.wait_for(Notice, "gcp-maintenance").kind == "terminate"
    assert seen.watcher.states["gcp"] == Clear()


# -- P3: Azure --------------------------------------------------------------------------------------------------------


def test_P3_the_fake_refuses_what_azure_refuses(serve) -> None:
    azure = serve(FakeAzure(VM))
    assert status_of(azure.url + AZURE_EVENTS + "?api-version=2020-07-01") == 400
    assert status_of(azure.url + AZURE_EVENTS, Metadata="true") == 400
    assert status_of(azure.url + AZURE_EVENTS + "?api-version=2020-07-01", Metadata="true") == 200


def test_P3_a_slow_first_answer_is_waited_for_and_disturbs_no_other_source(watch, serve, tmp_path: Path) -> None:
    azure = serve(FakeAzure(VM))
    azure.first_call_seconds = 1.0
    path = tmp_path / "preempt"
    path.touch()
    seen = watch(Azure(azure.url, vm_name=VM, patience=0.3, interval=GENEROUS), File(str(path), interval=SOON))
    seen.wait_for(Notice, f"file:{path}")
    assert seen.watcher.states["azure"] == Unknown()
    seen.wait_for(Clear, "azure")
    assert seen.kinds == ["Notice", "Clear"]


def test_P3_events_of_others_and_pauses_are_no_notice_and_a_stop_of_this_vm_is(watch, serve) -> None:
    azure = serve(FakeAzure(VM))
    azure.announce("Preempt", ["trainer_4", "trainer_33"], azure_time(30))
    azure.announce("Freeze", [VM], azure_time(900))
    seen = watch(Azure(azure.url, interval=SOON))
    azure.wait_asked(at(AZURE_EVENTS), 3)
    assert seen.kinds == ["Clear"]
    azure.announce("Preempt", ["trainer_4", VM], azure_time(30))
    notice = seen.wait_for(Notice)
    assert (notice.kind, notice.source) == ("preempt", "azure")
    assert 0 < seconds_left(notice) <= 30
    assert len(azure.wait_asked(at(AZURE_NAME))) == 1


def test_P3_a_name_that_was_given_is_not_asked_for(watch, serve) -> None:
    azure = serve(FakeAzure("another"))
    azure.announce("Reboot", [VM], azure_time(900))
    assert watch(Azure(azure.url, vm_name=VM, interval=SOON)).wait_for(Notice).kind == "reboot"
    assert not [asked for asked in azure.asked if asked.path == AZURE_NAME]


def test_P3_nothing_is_acknowledged_unless_asked_for(watch, serve) -> None:
    azure = serve(FakeAzure(VM))
    azure.announce("Preempt", [VM], azure_time(30))
    seen = watch(*parse_sources("azure", {"FT_METADATA_AZURE_URL": azure.url}))
    seen.wait_for(Notice)
    seen.watcher.acknowledge()
    azure.wait_asked(at(AZURE_EVENTS), 2)
    assert azure.acknowledged == []
    assert not [asked for asked in azure.asked if asked.method == "POST"]


def test_P3_this_vms_events_are_acknowledged_when_all_is_saved_and_not_before(watch, serve) -> None:
    azure = serve(FakeAzure(VM))
    azure.announce("Preempt", ["trainer_4"], azure_time(30))
    ours = azure.announce("Preempt", [VM, "trainer_4"], azure_time(30))
    azure.announce("Freeze", [VM], azure_time(900))
    seen = watch(Azure(azure.url, acknowledge=True, interval=SOON))
    seen.wait_for(Notice)
    azure.wait_asked(at(AZURE_EVENTS), 3)
    assert azure.acknowledged == []
    seen.watcher.acknowledge(GENEROUS)
    assert azure.acknowledged == [ours]
    azure.wait_asked(at(AZURE_EVENTS), azure.count())
    assert azure.acknowledged == [ours]


def test_P3_without_a_notice_there_is_nothing_to_acknowledge(watch, serve) -> None:
    azure = serve(FakeAzure(VM))
    seen = watch(Azure(azure.url, acknowledge=True, interval=SOON))
    seen.wait_for(Clear)
    seen.watcher.acknowledge(GENEROUS)
    azure.wait_asked(at(AZURE_EVENTS), azure.count() + 2)
    assert not [asked for asked in azure.asked if asked.method == "POST"]
    later = azure.announce("Preempt", [VM], azure_time(30))
    seen.wait_for(Notice)
    azure.wait_asked(at(AZURE_EVENTS), azure.count() + 2)
    assert azure.acknowledged == []  # what came after was not meant
    seen.watcher.acknowledge(GENEROUS)
    assert azure.acknowledged == [later]


def test_P3_an_acknowledgement_that_is_not_heard_is_told_and_holds_nobody(watch, serve, caplog) -> None:
    azure = serve(FakeAzure(VM))
    azure.announce("Preempt", [VM], azure_time(30))
    seen = watch(Azure(azure.url, acknowledge=True, interval=GENEROUS))
    seen.wait_for(Notice)
    azure.overriding = Reply(500)
    seen.watcher.acknowledge(GENEROUS)
    assert "azure: the events were not acknowledged" in caplog.text


def test_P3_an_acknowledgement_during_a_look_is_not_left_until_the_next_one(watch, serve) -> None:
    azure = serve(FakeAzure(VM))
    ours = azure.announce("Preempt", [VM], azure_time(30))
    seen = watch(Azure(azure.url, acknowledge=True, interval=2 * GENEROUS))
    seen.wait_for(Notice)
    azure.first_call_seconds = 0.5  # of the look that follows an acknowledgement
    seen.watcher.acknowledge(0.0)
    azure.wait_asked(at(AZURE_EVENTS, "POST"))
    seen.watcher.acknowledge(GENEROUS)
    assert azure.acknowledged == [ours, ours]


# -- P4: no metadata service, and whatever else stands in its place ----------------------------------------------------


def all_of(url: str, **settings: float) -> list[Source]:
    return [
        AwsSpot(url, interval=SOON, **settings),  # type: ignore[arg-type]
        Gcp(url, interval=SOON, **settings),  # type: ignore[arg-type]
        Azure(url, interval=SOON, first_patience=0, **settings),  # type: ignore[arg-type]
    ]


@pytest.fixture
def silent() -> Iterator[str]:
    """A service that takes every connection and never says a word."""
    with listen(LOOPBACK, 0) as listener:
        yield f"http://{LOOPBACK}:{listener.getsockname()[1]}"


@pytest.fixture
def black_hole() -> Iterator[str]:
    """An address that does not even answer to a connection: the queue of its listener is full."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen(0)
        waiting = []
        try:
            for _ in range(16):
                waiting.append(socket.socket())
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(listener.getsockname())
            yield f"http://{LOOPBACK}:{listener.getsockname()[1]}"
        finally:
            for each in waiting:
                each.close()


@pytest.fixture
def nobody() -> Iterator[str]:
    """A port that refuses."""
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        yield f"http://{LOOPBACK}:{taken.getsockname()[1]}"


@pytest.mark.parametrize("where", ["silent", "black_hole", "nobody"])
def test_P4_without_a_metadata_service_the_state_is_an_error_never_clear(watch, request, where: str) -> None:
    url = request.getfixturevalue(where)
    seen = watch(*all_of(url, patience=0.1))
    said = "refused the connection" if where == "nobody" else "did not answer within 0.1 s"
    for name in ("aws", "gcp", "azure"):
        error = seen.wait_for(SourceError, name)
        assert error.what.startswith(url)
        assert said in error.what
    assert set(seen.kinds) == {"SourceError"}


@pytest.mark.parametrize("where", ["silent", "black_hole"])
def test_P4_a_service_that_hangs_holds_up_no_other_source_and_not_the_end(
    watch, request, tmp_path: Path, where: str
) -> None:
    path = tmp_path / "preempt"
    hour = 3600.0
    seen = watch(*all_of(request.getfixturevalue(where), patience=hour), File(str(path), interval=SOON))
    seen.wait_for(Clear, f"file:{path}")
    path.write_text("30")
    assert 0 < seconds_left(seen.wait_for(Notice)) <= 30
    assert {seen.watcher.states[name] for name in ("aws", "gcp", "azure")} == {Unknown()}
    seen.watcher.close()
    assert not threads()  # though it could have waited for an hour


def test_P4_an_error_is_logged_once_and_so_is_its_end(watch, serve, caplog) -> None:
    caplog.set_level(logging.INFO, "ft_launcher")
    aws = serve(FakeAws())
    aws.overriding = Reply(500)
    seen = watch(AwsSpot(aws.url, interval=SOON))
    aws.wait_asked(lambda asked: asked.status == 500, 4)
    aws.overriding = None
    seen.wait_for(Clear)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("ft_launcher")]
    assert lines == [
        f"aws: whether a preemption is announced is not known: {aws.url}{AWS_TOKEN} answered 500 instead of a token",
        "aws: answers that no preemption is announced",
    ]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, b"<html>Please log in</html>"),
        Reply(200, b""),
        Reply(302, b"", {"Location": "http://127.0.0.1:1/"}),
        Reply(403),
        Reply(503),
    ],
    ids=lambda reply: f"{reply.status}-{reply.body[:6].decode()}",
)
def test_P4_whatever_answers_in_its_place_is_an_error(watch, serve, reply: Reply) -> None:
    other = serve(Stranger(reply))
    seen = watch(*all_of(other.url))
    for name in ("aws", "gcp", "azure"):
        assert other.url in seen.wait_for(SourceError, name).what
    other.wait_asked(lambda _: True, 10)
    assert set(seen.kinds) == {"SourceError"}


def test_P4_a_proxy_is_not_used(watch, serve, monkeypatch) -> None:
    aws = serve(FakeAws())
    with listen(LOOPBACK, 0) as proxy:
        url = f"http://{LOOPBACK}:{proxy.getsockname()[1]}"
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, url)
        seen = watch(AwsSpot(aws.url, interval=SOON))
        seen.wait_for(Clear)
        aws.wait_asked(at(AWS_ACTION), 3)
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_P4_an_error_after_a_notice_is_said_and_so_is_the_notice_again(watch, serve) -> None:
    aws = serve(FakeAws())
    aws.announce("terminate", aws_time(120))
    seen = watch(AwsSpot(aws.url, interval=SOON))
    first = seen.wait_for(Notice)
    aws.overriding = Reply(503)
    seen.wait_for(SourceError)
    aws.overriding = None
    assert seen.wait_for(Notice, count=2).kind == first.kind
    assert seen.kinds == ["Notice", "SourceError", "Notice"]


# -- the watcher itself -----------------------------------------------------------------------------------------------


class Broken:
    """A source with an error of its own."""

    name = "broken"
    acknowledges = False

    def steps(self) -> Steps:
        yield Look(Clear(), SOON)
        raise RuntimeError("this source is broken")


def test_a_source_that_breaks_is_an_error_and_the_others_go_on(watch, tmp_path: Path, caplog) -> None:
    path = tmp_path / "preempt"
    seen = watch(Broken(), File(str(path), interval=SOON))
    seen.wait_for(SourceError, "broken")
    path.touch()
    seen.wait_for(Notice)
    assert caplog.text.count("RuntimeError: this source is broken") == 1
    assert caplog.text.count("broken: no longer asked for preemption notices") == 1


def test_a_listener_that_breaks_does_not_end_the_watch(tmp_path: Path, caplog) -> None:
    path = tmp_path / "preempt"
    noticed = threading.Event()

    def hear(name: str, state: State) -> None:
        if isinstance(state, Notice):
            noticed.set()
        raise RuntimeError("this listener is broken")

    with Watcher([File(str(path), interval=SOON)], hear):
        path.touch()
        assert noticed.wait(GENEROUS)
    assert "this listener is broken" in caplog.text
    assert not threads()


def test_the_listener_may_close_the_watch(tmp_path: Path) -> None:
    ended = threading.Event()
    is_there = threading.Event()

    def hear(name: str, state: State) -> None:
        is_there.wait(GENEROUS)
        watcher.close()
        ended.set()

    watcher = Watcher([File(str(tmp_path / "preempt"))], hear)
    is_there.set()
    assert ended.wait(GENEROUS)
    watcher.close()
    watcher.close()
    assert not threads()


def test_without_sources_there_is_no_thread(watch) -> None:
    seen = watch()
    assert not threads()
    assert seen.watcher.states == {}
    seen.watcher.acknowledge(GENEROUS)


def test_an_address_that_cannot_be_reached_is_an_error(watch) -> None:
    seen = watch(AwsSpot("http://[fe80::1]", interval=SOON))  # link-local, and no link named
    assert "cannot be reached: " in seen.wait_for(SourceError).what


NO_DESCRIPTOR = """
import os, resource, threading
from ft_launcher.preemption import AwsSpot, SourceError, Watcher

said = threading.Event()

def hear(name, state):
    print(state.what if isinstance(state, SourceError) else state, flush=True)
    said.set()

opened = max(map(int, os.listdir("/proc/self/fd")))  # that of the listing itself, which is free again
resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 2, opened + 2))  # two for the watcher, none for a request
with Watcher([AwsSpot("http://127.0.0.1:1")], hear):
    said.wait(60)
"""


def test_when_there_is_no_descriptor_left_it_is_an_error_of_the_source(sandbox: Sandbox) -> None:
    running = sandbox.start(sys.executable, "-c", NO_DESCRIPTOR)
    assert running.wait() == 0
    assert "http://127.0.0.1:1/latest/api/token cannot be reached: Too many open files" in running.output
