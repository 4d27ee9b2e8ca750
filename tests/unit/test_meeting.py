"""Where nodes meet, on real sockets of this machine's loopback addresses: who is the host, and why nobody is there."""

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from torch._C._distributed_c10d import TCPStore

from ft_launcher.causes import HostLost, Refused, TooFewNodes
from ft_launcher.errors import UsageError
from ft_launcher.formation import Timing
from ft_launcher.host import ANNOUNCEMENT, announcement_seal
from ft_launcher.job_rendezvous import BOUNDED_RESOLVER
from ft_launcher.lifeline import Beats
from ft_launcher.meeting import PATIENCE, Attended, Endpoint, Meeting, NobodyThereError, parse_endpoints
from ft_launcher.records import PROTOCOL, Announcement, Joined, Memory, Ready, Waiting, encode
from tests.conftest import GENEROUS
from tests.unit.leading import World

A, B, C = "127.0.0.2", "127.0.0.3", "127.0.0.4"
QUICK = Timing(join_timeout=0.0, failover_timeout=0.0)
LOOPBACK_BY_NAME = "0x7f000001"  # a name that every resolver takes for 127.0.0.1


@pytest.fixture(autouse=True)
def bounded_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a launcher: torch looks up the name of whoever connects."""
    monkeypatch.setenv("RES_OPTIONS", BOUNDED_RESOLVER)


class Nodes:
    """Nodes of one test, with the endpoints that they were given."""

    def __init__(self) -> None:
        with socket.create_server((A, 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self.attended: list[Attended] = []

    def meeting(self, *hosts: str, run_id: str = "bert", name: str = "n0", **options) -> Meeting:
        world = World(1, 4, endpoints=len(hosts))
        settings = replace(world.settings, timing=options.pop("timing", Timing()))
        node = replace(world.node(name), address=options.pop("address", ""))
        endpoints = [Endpoint(host, self.port) for host in hosts]
        return Meeting(run_id, endpoints, node, settings, Beats(), **{"token": None, **options})

    def attend(self, *hosts: str, memory: Memory | None = None, lost: int | None = None, **options) -> Attended:
        attended = self.meeting(*hosts, **options).attend(memory, lost)
        self.attended.append(attended)
        return attended

    def close(self) -> None:
        for attended in reversed(self.attended):
            attended.link.close()
            if attended.host is not None:
                attended.host.close(0.0)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.close()


def refusal(attend: Callable[[], object]) -> str:
    with pytest.raises(NobodyThereError) as caught:
        attend()
    assert isinstance(caught.value.cause, Refused)
    return caught.value.cause.description


def announce(host: str, port: int, announcement: Announcement | bytes, token: bytes | None = None) -> TCPStore:
    """Run a store that says of itself what it is told."""
    with socket.create_server((host, port)) as listener:
        store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            timeout=timedelta(seconds=GENEROUS),
        )
    body = announcement if isinstance(announcement, bytes) else encode(announcement)
    store.set(ANNOUNCEMENT, announcement_seal(token).seal(ANNOUNCEMENT, body))  # type: ignore[arg-type]
    return store


def said(run_id: str = "bert", **fields) -> Announcement:
    return replace(Announcement(run_id, "an-incarnation", "n7", 777, lifeline_port=1, epoch=0, round=-1), **fields)


# -- the list -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "endpoints"),
    [
        ("a", [("a", 29400)]),
        ("a:1", [("a", 1)]),
        ("a:29400,b:29401,c", [("a", 29400), ("b", 29401), ("c", 29400)]),
        (" a:1 , b:2 ", [("a", 1), ("b", 2)]),
        ("10.0.0.1:65535", [("10.0.0.1", 65535)]),
        ("[::1]:29500", [("::1", 29500)]),
        ("[fe80::1%eth0]", [("fe80::1%eth0", 29400)]),
        ("node-3.cluster.example:0", [("node-3.cluster.example", 0)]),
    ],
)
def test_endpoints_are_read(text: str, endpoints: list[tuple[str, int]]) -> None:
    assert parse_endpoints(text) == endpoints


@pytest.mark.parametrize(
    "text", ["", " ", ",", "a,", ":29400", "a:", "a:x", "a:65536", "a:-1", "a:1:2", "::1", "[::1", "a b:1"]
)
def test_what_is_no_list_of_endpoints_is_said_with_the_flag(text: str) -> None:
    with pytest.raises(UsageError, match="--rdzv-endpoint") as caught:
        parse_endpoints(text)
    assert "host:port" in str(caught.value)


HOSTS = st.one_of(
    st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
)


@given(st.lists(st.builds(Endpoint, HOSTS, st.integers(0, 65535)), min_size=1, max_size=5))
def test_what_is_printed_can_be_read_again(endpoints: list[Endpoint]) -> None:
    assert parse_endpoints(",".join(map(str, endpoints))) == endpoints


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_endpoints(text)
    except UsageError:
        return
    assert found
    assert all(host and 0 <= port <= 65535 for host, port in found)


# -- meeting ------------------------------------------------------------------------------------------------------


def test_the_first_is_the_host_and_the_second_joins_it(nodes: Nodes) -> None:
    first = nodes.attend(A)
    second = nodes.attend(A, name="n1")
    assert first.host is not None
    assert second.host is None
    assert first.where == second.where == Endpoint(A, nodes.port)
    assert second.title == f"n0 ({A}:{nodes.port})"
    assert first.node.id != second.node.id
    assert second.node.address == first.node.address == A or second.node.address.startswith("127.")


def test_they_hear_of_each_other(nodes: Nodes) -> None:
    first, second = nodes.attend(A), nodes.attend(A, name="n1")
    for attended in (first, second):
        attended.link.send(Joined(attended.node))
        attended.link.send(Ready(attended.node.id, 40000))
    late = [nodes.attend(A, name=f"n{number}") for number in (2, 3, 4)]
    for attended in late:
        attended.link.send(Joined(attended.node))
        attended.link.send(Ready(attended.node.id, 40000))
    heard = []
    for attended in (first, second, *late):
        assert select.select([attended.link], [], [], GENEROUS)[0], "no mail"
        heard += attended.link.receive()
    assert sum(isinstance(each, Waiting) for each in heard) == 1, "--nnodes 1:4"


def test_a_given_local_address_is_what_the_others_are_told(nodes: Nodes) -> None:
    assert nodes.attend(A, address="10.1.2.3").node.address == "10.1.2.3"


def test_only_the_second_endpoint_is_taken_when_the_first_stays_empty(nodes: Nodes) -> None:
    began = time.monotonic()
    attended = nodes.attend(A, B, is_host=False)
    assert attended.host is not None
    assert attended.where.host == B
    assert time.monotonic() - began >= PATIENCE


def test_who_lost_the_first_host_looks_at_the_next_endpoint_first(nodes: Nodes) -> None:
    attended = nodes.attend(A, B, C, lost=0, memory=Memory(epoch=0, round=3, nodes=3))
    assert attended.where.host == B
    attended = nodes.attend(A, B, C, lost=0, name="n1", memory=Memory(epoch=0, round=3, nodes=3))
    assert (attended.where.host, attended.host) == (B, None)


def test_who_lost_the_last_endpoints_host_begins_again_with_the_first(nodes: Nodes) -> None:
    assert nodes.attend(A, B, lost=1, memory=Memory(epoch=0, round=3, nodes=3)).where.host == A


def test_who_may_only_join_begins_no_job_and_says_so(nodes: Nodes) -> None:
    with pytest.raises(NobodyThereError) as caught:
        nodes.attend(A, joins_only=True, timing=QUICK)
    assert isinstance(caught.value.cause, TooFewNodes)
    assert "no job was met at --rdzv-endpoint" in caught.value.cause.description
    assert "joins_only" in caught.value.cause.description


def test_who_may_only_join_joins_and_takes_the_jobs_host_over_when_it_is_lost(nodes: Nodes) -> None:
    first = nodes.attend(A, B)
    assert first.host is not None
    second = nodes.attend(A, B, name="n1", joins_only=True)
    assert (second.host, second.where) == (None, first.where)
    memory = Memory(epoch=0, round=3, nodes=3)
    third = nodes.attend(A, B, name="n2", lost=0, memory=memory, joins_only=True)
    assert third.where.host in (A, B)
    third = nodes.attend(C, lost=0, memory=memory, joins_only=True)
    assert third.host is not None


def test_a_host_whose_job_runs_goes_before_one_that_still_waits(nodes: Nodes) -> None:
    stores = [announce(A, nodes.port, said()), announce(B, nodes.port, said(round=4, epoch=1))]
    meeting = nodes.meeting(A, B)
    looks = [meeting._look(index) for index in (0, 1)]
    best = meeting._best([look for look in looks if look is not None], None)
    assert best is looks[1] is not None
    del stores


def test_of_two_hosts_with_a_running_job_the_one_of_the_later_epoch_is_joined(nodes: Nodes) -> None:
    stores = [announce(A, nodes.port, said(round=9, epoch=1)), announce(B, nodes.port, said(round=4, epoch=2))]
    meeting = nodes.meeting(A, B)
    looks = [look for index in (0, 1) if (look := meeting._look(index)) is not None]
    best = meeting._best(looks, None)
    assert best is not None
    assert best.endpoint == 1
    # And one that is older than what this node remembers is none for it.
    assert meeting._best(looks[:1], Memory(epoch=2, round=3)) is None
    del stores


def test_a_host_that_waits_alone_sees_that_the_others_meet_elsewhere(nodes: Nodes) -> None:
    second = nodes.attend(A, B, lost=0, memory=Memory(epoch=0, round=3, nodes=3))
    assert second.where.host == B
    meeting = nodes.meeting(A, B, is_host=False)
    assert not meeting.better_host(second)
    first = nodes.meeting(A, B)
    store = announce(A, nodes.port, said())
    assert meeting.better_host(second)
    assert not first.better_host(second._replace(where=Endpoint(A, nodes.port))), "the other one has not formed either"
    del store


# -- why nobody is there --------------------------------------------------------------------------------------------


def test_N12_an_endpoint_where_nobody_listens_is_named(nodes: Nodes) -> None:
    with pytest.raises(NobodyThereError) as caught:
        nodes.attend(A, is_host=False, timing=QUICK)
    assert isinstance(caught.value.cause, TooFewNodes)
    assert f"{A}:{nodes.port}: nobody listens there" in caught.value.cause.description
    assert "none is on this machine" in caught.value.cause.description


def test_N12_a_name_that_no_resolver_knows_is_named(nodes: Nodes) -> None:
    with pytest.raises(NobodyThereError) as caught:
        nodes.attend("host.invalid", is_host=False, timing=QUICK)
    assert "the name host.invalid" in str(caught.value)


def test_N2_who_lost_the_only_host_says_what_would_have_helped(nodes: Nodes) -> None:
    meeting = nodes.meeting(A, is_host=False)
    cause = meeting._nobody(0, 8.0)
    assert isinstance(cause, HostLost)
    assert f"the rendezvous host at {A}:{nodes.port} was lost" in cause.description
    assert "a:29400,b:29400,c:29400" in cause.description


def test_N12_a_port_that_another_program_has_is_said_at_once(nodes: Nodes) -> None:
    with socket.create_server((A, nodes.port)) as other:

        def answer() -> None:
            while True:
                try:
                    connection, _ = other.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UsageError, match=f"port {nodes.port} of this machine is in use by another program"):
            nodes.attend(A)
        other.shutdown(socket.SHUT_RDWR)


def test_N12_another_jobs_store_at_the_endpoint_is_said_to_be_one(nodes: Nodes) -> None:
    nodes.attend(A)
    words = refusal(lambda: nodes.attend(A, run_id="gpt"))
    assert words == (
        f"--rdzv-id gpt: the launcher on n0 (pid 100) at {A}:{nodes.port} runs job 'bert';"
        " give both the same --rdzv-id, or another port to one of them"
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (b"one token of 16 bytes", b"another token of 16", "has another token"),
        (None, b"another token of 16", "has a token, and this node none"),
        (b"one token of 16 bytes", None, "has another token"),
    ],
)
def test_N12_another_token_is_said(nodes: Nodes, ours: bytes | None, theirs: bytes | None, words: str) -> None:
    nodes.attend(A, token=theirs)
    description = refusal(lambda: nodes.attend(A, token=ours))
    assert words in description
    assert "--ft-token-file" in description


def test_N10_another_protocol_is_said_with_both(nodes: Nodes) -> None:
    store = announce(A, nodes.port, said(protocol=9))
    assert refusal(lambda: nodes.attend(A)) == (
        "the launcher on n7 (pid 777) speaks protocol 9, this one on n0 "
        f"{PROTOCOL}; install the same ft_launcher on both"
    )
    del store


def test_N10_an_announcement_of_a_later_version_is_no_reason_to_crash(nodes: Nodes) -> None:
    store = announce(A, nodes.port, b"\x81\xa3new\x01")
    with pytest.raises(NobodyThereError, match="an ft_launcher of another version answers there"):
        nodes.attend(A, is_host=False, timing=QUICK)
    del store


def test_a_name_that_means_the_loopback_here_but_is_another_nodes_is_refused(nodes: Nodes) -> None:
    with pytest.raises(UsageError) as caught:
        nodes.attend(LOOPBACK_BY_NAME)
    assert str(caught.value) == (
        f"--rdzv-endpoint {LOOPBACK_BY_NAME}:{nodes.port}: on node n0 the name {LOOPBACK_BY_NAME} means 127.0.0.1,"
        f" which is this node itself and not {LOOPBACK_BY_NAME}; mend /etc/hosts here, or give a numeric address"
    )


def test_a_node_whose_own_name_means_the_loopback_is_the_host_for_others_too(nodes: Nodes) -> None:
    """Debian writes 127.0.1.1 for a machine's own name into /etc/hosts."""
    world = World(1, 4)
    node = replace(world.node("n0"), name=LOOPBACK_BY_NAME, address="")
    meeting = Meeting("bert", [Endpoint(LOOPBACK_BY_NAME, nodes.port)], node, world.settings, Beats(), token=None)
    attended = meeting.attend()
    nodes.attended.append(attended)
    assert attended.host is not None
    with socket.create_connection((B, nodes.port), GENEROUS):
        pass  # it listens at all addresses
    others = [line for line in socket.getaddrinfo(socket.gethostname(), None) if not str(line[4][0]).startswith("127.")]
    if others:
        assert not attended.node.address.startswith("127.")


def test_with_is_host_given_the_loopback_is_no_trap(nodes: Nodes) -> None:
    attended = nodes.attend(LOOPBACK_BY_NAME, is_host=True)
    assert attended.host is not None


def test_on_the_loopback_by_address_the_others_are_told_the_loopback(nodes: Nodes) -> None:
    assert nodes.attend("127.0.0.1").node.address == "127.0.0.1"


def test_an_ipv6_endpoint_works_as_well(nodes: Nodes) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    first, second = nodes.attend("::1"), nodes.attend("::1", name="n1")
    assert first.host is not None
    assert second.node.address == "::1"
