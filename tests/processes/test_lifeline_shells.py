"""Lifelines between real processes, over real sockets."""

import os
import queue
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest

from ft_launcher.lifeline import (
    LIFELINE_PROTOCOL,
    Answer,
    Beat,
    Beats,
    Challenge,
    Frames,
    FromHost,
    FromNode,
    Goodbye,
    Hello,
    Refused,
    decode_from_host,
    decode_from_node,
    encode,
    frame,
    hello_key,
    host_key,
    node_key,
)
from ft_launcher.lifeline_client import Lifeline
from ft_launcher.lifeline_server import MAX_STRANGERS, LifelineServer
from ft_launcher.seal import Seal
from tests.conftest import GENEROUS, Running, Sandbox

TOKEN = b"the token of this test"
PATIENT = Beats(interval=1.0, limit=4 * GENEROUS, grace=0.05)
"""Whoever is lost with these was found by the end of its connection, never by silence."""
QUICK = Beats(interval=0.2, limit=1.0, grace=0.1)

NODE = """
import subprocess, sys, threading
from ft_launcher.lifeline import Beats
from ft_launcher.lifeline_client import Lifeline
from ft_launcher.seal import Seal

token, port, name, interval, limit, how = sys.argv[1:]
end = threading.Event()
last = [0.0]

def lost(how):
    print("lost", how, flush=True)
    end.set()

def leased(until):
    if last[0] and until - last[0] > 2.0:
        print("goes on", flush=True)
    last[0] = until

lifeline = Lifeline(
    "127.0.0.1", int(port), name, Beats(float(interval), float(limit)), Seal(token.encode()), lost, leased
)
lifeline.local_address(60)
if how == "with a worker":
    subprocess.Popen(["sleep", "1000"], close_fds=False)
print("connected", flush=True)
if how == "and leaves":
    lifeline.close()
    print("closed", flush=True)
end.wait()
"""

HOST = """
import resource, sys, threading
from ft_launcher.lifeline import Beats
from ft_launcher.lifeline_server import LifelineServer
from ft_launcher.seal import Seal

token, interval, limit, descriptors = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(descriptors),) * 2)
beats = Beats(float(interval), float(limit), 0.1)
server = LifelineServer("", beats, Seal(token.encode()), lambda node, how: print("lost", node, how, flush=True))
print("port", server.port, flush=True)
threading.Event().wait()
"""


class Nodes:
    """A host in the test's process, or in one of its own, and nodes in processes."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.losses: queue.Queue[tuple[str, str]] = queue.Queue()
        self._close: list[Callable[[], None]] = []

    def host(self, beats: Beats, address: str = "127.0.0.1") -> LifelineServer:
        server = LifelineServer(address, beats, Seal(TOKEN), lambda node, how: self.losses.put((node, how)))
        self._close.append(server.close)
        return server

    def host_process(self, beats: Beats, descriptors: int = 1000) -> tuple[Running, int]:
        """Start a host in a process of its own, and give it and its port."""
        script = self.sandbox.script(HOST, "host.py")
        settings = map(str, (TOKEN.decode(), beats.interval, beats.limit, descriptors))
        running = self.sandbox.start(sys.executable, script, *settings)
        return running, int(running.wait_for("port ").split()[1])

    def node(self, port: int, name: str, beats: Beats = PATIENT, how: str = "and stays") -> Running:
        """Start a node, and wait until it is connected."""
        script = self.sandbox.script(NODE, "node.py")
        settings = map(str, (TOKEN.decode(), port, name, beats.interval, beats.limit, how))
        running = self.sandbox.start(sys.executable, script, *settings)
        running.wait_for("connected")
        return running

    def lifeline(
        self, port: int, name: str = "node", address: str = "127.0.0.1", beats: Beats = PATIENT
    ) -> tuple[Lifeline, "queue.Queue[str]"]:
        """Give a lifeline of the test's process, and where it says how the host was lost."""
        lost: queue.Queue[str] = queue.Queue()
        lifeline = Lifeline(address, port, name, beats, Seal(TOKEN), lost.put)
        self._close.append(lifeline.close)
        return lifeline, lost

    def peer(self, port: int) -> "Peer":
        peer = Peer(port)
        self._close.append(peer.socket.close)
        return peer

    def proxy(self, port: int) -> "Proxy":
        proxy = Proxy(port)
        self._close.append(proxy.close)
        return proxy

    def next_loss(self) -> tuple[str, str]:
        return self.losses.get(timeout=GENEROUS)

    def assert_nobody_was_lost(self, port: int) -> None:
        """See that a node that dies now is the next one that is reported."""
        self.assert_losses(port, [])

    def assert_losses(self, port: int, losses: list[tuple[str, str]]) -> None:
        """See that these were reported, and nothing more."""
        self.node(port, "sentinel").send(signal.SIGKILL)
        expected = [*losses, ("sentinel", "closed")]
        assert [self.next_loss() for _ in expected] == expected

    def close(self) -> None:
        for close in reversed(self._close):
            close()


@pytest.fixture
def nodes(sandbox: Sandbox) -> Iterator[Nodes]:
    nodes = Nodes(sandbox)
    yield nodes
    nodes.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("lifeline")] == []


class Peer:
    """A connection to a host that says what the test wants."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=GENEROUS)
        self._frames = Frames()
        self._received: list[bytes] = []
        challenge = decode_from_host(self._next())
        assert isinstance(challenge, Challenge)
        self.challenge, self.nonce = challenge.nonce, os.urandom(16)

    def hello(self, name: str = "peer", token: bytes = TOKEN) -> bytes:
        """Give the packet of a hello on this connection."""
        body = encode(Hello(1, name, self.nonce))
        return frame(Seal(token).seal(hello_key(self.challenge), body))

    def send(self, message: FromNode) -> None:
        key = node_key(self.challenge, self.nonce)
        self.socket.sendall(frame(Seal(TOKEN).seal(key, encode(message))))

    def enter(self, name: str) -> "Peer":
        self.socket.sendall(self.hello(name))
        assert self.answer() == Answer(1)
        return self

    def answer(self) -> FromHost:
        return decode_from_host(Seal(TOKEN).open(host_key(self.challenge, self.nonce), self._next()))

    def refusal(self) -> str:
        """Give why this connection was refused, having seen that it was closed."""
        refused = decode_from_host(self._next())
        assert isinstance(refused, Refused)
        self.assert_closed()
        return refused.reason

    def assert_closed(self) -> None:
        with suppress(ConnectionResetError):  # something of ours was not read any more
            assert self.socket.recv(4096) == b""

    def _next(self) -> bytes:
        while not self._received:
            received = self.socket.recv(4096)
            assert received, "the host closed the connection"
            self._received = self._frames.feed(received)
        return self._received.pop(0)


class Proxy:
    """A middlebox between a node and the host, which can reset its connections, or swallow all that they bring."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.accepted = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._swallowed: list[tuple[socket.socket, socket.socket]] = []
        self._wake, self._waker = socket.socketpair()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="lifeline proxy")
        self._thread.start()

    def reset(self) -> None:
        """Reset both ends of all connections that there are."""
        with self._lock:
            for end in (end for pair in self._pairs for end in pair):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()
            self._pairs.clear()
        self._waker.send(b"x")

    def swallow(self) -> None:
        """Let nothing through any more on the connections that there are; new ones are not concerned."""
        with self._lock:
            self._swallowed += self._pairs
            self._pairs.clear()
        self._waker.send(b"x")

    def close(self) -> None:
        self._is_open = False
        self._waker.send(b"x")
        self._thread.join()
        for end in (end for pair in self._pairs + self._swallowed for end in pair):
            end.close()
        for each in (self._listener, self._wake, self._waker):
            each.close()

    def _run(self) -> None:
        while self._is_open:
            with self._lock:
                other = {a: b for pair in self._pairs for a, b in (pair, pair[::-1])}
            for ready in select.select([self._listener, self._wake, *other], [], [])[0]:
                if ready is self._wake:
                    self._wake.recv(1)
                elif ready is self._listener:
                    self._accept()
                else:
                    with self._lock:
                        self._forward(ready, other[ready])

    def _accept(self) -> None:
        accepted, _ = self._listener.accept()
        with self._lock:
            self._pairs.append((accepted, socket.create_connection(("127.0.0.1", self._target))))
        self.accepted.release()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        if not any(source in pair for pair in self._pairs):
            return
        try:
            received = source.recv(4096)
            target.sendall(received)
        except OSError:
            received = b""
        if not received:
            self._pairs = [pair for pair in self._pairs if source not in pair]
            source.close()
            target.close()


# -- nodes that are lost, and nodes that are not ----------------------------------------------------------------------


def test_a_node_that_is_killed_is_reported_as_closed(nodes: Nodes) -> None:
    port = nodes.host(PATIENT).port
    nodes.node(port, "a").send(signal.SIGKILL)
    assert nodes.next_loss() == ("a", "closed")


def test_a_worker_does_not_keep_the_connection_of_its_launcher_open(nodes: Nodes) -> None:
    port = nodes.host(PATIENT).port
    nodes.node(port, "a", how="with a worker").send(signal.SIGKILL)
    assert nodes.next_loss() == ("a", "closed")


def test_a_stopped_node_is_reported_as_silent_and_learns_it_when_it_goes_on(nodes: Nodes) -> None:
    port = nodes.host(QUICK).port
    node = nodes.node(port, "a", QUICK)
    node.send(signal.SIGSTOP)
    assert nodes.next_loss() == ("a", "silent")
    node.send(signal.SIGCONT)
    assert node.wait_for("lost") == "lost evicted"


def test_a_node_that_was_given_up_is_not_let_in_again(nodes: Nodes) -> None:
    port = nodes.host(PATIENT).port
    nodes.node(port, "a").send(signal.SIGKILL)
    nodes.next_loss()
    _, lost = nodes.lifeline(port, "a")
    assert lost.get(timeout=GENEROUS) == "evicted"


def test_a_node_that_says_goodbye_is_not_reported(nodes: Nodes) -> None:
    server = nodes.host(PATIENT)
    node = nodes.node(server.port, "a", how="and leaves")
    node.wait_for("closed")
    assert server.wait_empty(GENEROUS)
    node.send(signal.SIGKILL)
    nodes.assert_nobody_was_lost(server.port)


def test_a_node_that_the_host_forgets_is_not_reported(nodes: Nodes) -> None:
    server = nodes.host(PATIENT)
    node = nodes.node(server.port, "a")
    server.forget("a")
    node.send(signal.SIGKILL)
    nodes.assert_nobody_was_lost(server.port)


def test_the_host_can_wait_until_all_nodes_have_left(nodes: Nodes) -> None:
    server = nodes.host(PATIENT)
    lifelines = [nodes.lifeline(server.port, name)[0] for name in "abc"]
    for lifeline in lifelines:
        lifeline.local_address(GENEROUS)
    for lifeline in lifelines:
        assert not server.wait_empty(0)
        lifeline.close()
    assert server.wait_empty(GENEROUS)


def test_a_connection_that_a_middlebox_resets_is_replaced(nodes: Nodes) -> None:
    server = nodes.host(Beats(1.0, 4 * GENEROUS, grace=GENEROUS))
    proxy = nodes.proxy(server.port)
    lifeline, lost = nodes.lifeline(proxy.port, beats=Beats(0.2, 2 * GENEROUS))
    lifeline.local_address(GENEROUS)
    assert proxy.accepted.acquire(timeout=GENEROUS)
    for _ in range(3):
        before = lifeline.lease_until
        proxy.reset()
        assert proxy.accepted.acquire(timeout=GENEROUS)
        wait_until_renewed(lifeline, before)
    assert lost.empty()
    assert nodes.losses.empty()


def test_a_connection_that_became_silent_is_replaced(nodes: Nodes) -> None:
    server = nodes.host(PATIENT)
    proxy = nodes.proxy(server.port)
    lifeline, lost = nodes.lifeline(proxy.port, beats=Beats(0.2, 2 * GENEROUS))
    lifeline.local_address(GENEROUS)
    assert proxy.accepted.acquire(timeout=GENEROUS)
    proxy.swallow()
    before = lifeline.lease_until
    assert proxy.accepted.acquire(timeout=GENEROUS)
    wait_until_renewed(lifeline, before)
    assert lost.empty()
    # The old connection ends, and that is nobody's loss.
    nodes.assert_nobody_was_lost(server.port)


def wait_until_renewed(lifeline: Lifeline, before: float) -> None:
    deadline = time.monotonic() + GENEROUS
    pause = threading.Event()
    while lifeline.lease_until <= before:
        assert time.monotonic() < deadline, "no answer any more"
        pause.wait(0.01)


# -- hosts that are lost ----------------------------------------------------------------------------------------------


def test_when_the_host_closes_all_nodes_hear_it(nodes: Nodes) -> None:
    server = nodes.host(PATIENT)
    running = [nodes.node(server.port, name) for name in "ab"]
    server.close()
    assert [node.wait_for("lost") for node in running] == ["lost closed"] * 2
    assert nodes.losses.empty()


def test_a_host_that_is_killed_is_lost_at_once(nodes: Nodes) -> None:
    host, port = nodes.host_process(PATIENT)
    lifeline, lost = nodes.lifeline(port)
    lifeline.local_address(GENEROUS)
    host.send(signal.SIGKILL)
    assert lost.get(timeout=GENEROUS) == "closed"


def test_a_host_that_stops_is_lost_when_the_lease_is_over(nodes: Nodes) -> None:
    host, port = nodes.host_process(PATIENT)
    lifeline, lost = nodes.lifeline(port, beats=QUICK)
    lifeline.local_address(GENEROUS)
    host.send(signal.SIGSTOP)
    assert lost.get(timeout=GENEROUS) == "silent"
    assert time.monotonic() >= lifeline.lease_until
    host.send(signal.SIGCONT)
    assert host.wait_for("lost") == "lost node closed"


def let_pass(seconds: float) -> None:
    """Let time pass, where its passing is what the test is about."""
    threading.Event().wait(seconds)


def test_nobody_is_given_up_when_host_and_node_stood_still(nodes: Nodes) -> None:
    host, port = nodes.host_process(Beats(interval=1.0, limit=3.0))
    node = nodes.node(port, "a", Beats(interval=2.0, limit=4.5))  # which makes a lease of 3.4 s
    witness = nodes.node(port, "witness")
    node.send(signal.SIGSTOP)
    host.send(signal.SIGSTOP)
    let_pass(4.0)
    host.send(signal.SIGCONT)
    node.send(signal.SIGCONT)
    node.wait_for("goes on")
    witness.send(signal.SIGKILL)
    assert host.wait_for("lost") == "lost witness closed"
    assert not any("lost" in line for line in node.lines)


def test_nobody_is_given_up_for_the_time_that_a_report_takes(nodes: Nodes) -> None:
    beats = Beats(interval=0.5, limit=2.0, grace=0.05)
    reported, may_go_on = threading.Event(), threading.Event()

    def report(node: str, how: str) -> None:
        nodes.losses.put((node, how))
        reported.set()
        may_go_on.wait(GENEROUS)

    with closing(LifelineServer("127.0.0.1", beats, Seal(TOKEN), report)) as server:
        node = nodes.node(server.port, "a")
        nodes.node(server.port, "b").send(signal.SIGKILL)
        assert reported.wait(GENEROUS)
        node.send(signal.SIGSTOP)  # so that nothing of it lies in the host's buffers either
        let_pass(2.5)
        may_go_on.set()
        node.send(signal.SIGCONT)
        node.wait_for("goes on")
        nodes.assert_losses(server.port, [("b", "closed")])


# -- the first connection ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("listening", "address"), [("", "127.0.0.1"), ("", "::1"), ("127.0.0.1", "127.0.0.1")])
def test_a_node_learns_its_own_address(nodes: Nodes, listening: str, address: str) -> None:
    if address == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    server = nodes.host(PATIENT, listening)
    lifeline, _ = nodes.lifeline(server.port, address=address)
    assert lifeline.local_address(GENEROUS) == address
    assert server.address_seen() is None  # nodes of this machine do not tell how others reach it


def test_where_nobody_listens_the_reason_is_given(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    lifeline, lost = nodes.lifeline(port)
    with pytest.raises(ConnectionError, match=rf"host at 127\.0\.0\.1 port {port}: Connection refused"):
        lifeline.local_address(GENEROUS)
    assert lost.get(timeout=GENEROUS) == "refused"


def test_where_somebody_else_listens_the_node_gives_up_in_time(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it never says anything
        lifeline, lost = nodes.lifeline(listener.getsockname()[1], beats=QUICK)
        with pytest.raises(ConnectionError, match="no answer"):
            lifeline.local_address(GENEROUS)
        assert lost.get(timeout=GENEROUS) == "silent"


def test_a_node_with_another_token_is_told_so(nodes: Nodes) -> None:
    server = nodes.host(PATIENT)
    lost: queue.Queue[str] = queue.Queue()
    lifeline = Lifeline("127.0.0.1", server.port, "a", PATIENT, Seal(b"another token"), lost.put)
    with pytest.raises(ConnectionError, match="its token or its run id is not this job's"):
        lifeline.local_address(GENEROUS)
    assert lost.get(timeout=GENEROUS) == "refused"
    lifeline.close()


def test_a_host_that_has_not_the_token_is_not_believed(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        lifeline, lost = nodes.lifeline(listener.getsockname()[1], beats=QUICK)
        accepted, _ = listener.accept()
        with accepted:
            challenge = b"0" * 16
            accepted.sendall(frame(encode(Challenge(LIFELINE_PROTOCOL, challenge))))
            hello = decode_from_node(Seal(TOKEN).open(hello_key(challenge), Frames().feed(accepted.recv(4096))[0]))
            assert isinstance(hello, Hello)
            key = host_key(challenge, hello.nonce)
            accepted.sendall(frame(Seal(b"another token").seal(key, encode(Answer(hello.number)))))
            with pytest.raises(ConnectionError):
                lifeline.local_address(GENEROUS)
        assert lost.get(timeout=GENEROUS) == "silent"


def test_a_host_of_another_version_is_named_as_the_reason(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        lifeline, lost = nodes.lifeline(listener.getsockname()[1])
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(frame(encode(Challenge(LIFELINE_PROTOCOL + 1, b"0" * 16))))
            with pytest.raises(ConnectionError, match="protocol 2 of the lifeline, this node 1"):
                lifeline.local_address(GENEROUS)
        assert lost.get(timeout=GENEROUS) == "refused"


def test_a_name_is_not_looked_up(nodes: Nodes) -> None:
    with pytest.raises(OSError, match="not known"):
        Lifeline("localhost", 1, "a", PATIENT, Seal(TOKEN), print)


# -- strangers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy_port(nodes: Nodes) -> Iterator[int]:
    """A host with a node that is not to be disturbed by anything."""
    server = nodes.host(PATIENT)
    lifeline, lost = nodes.lifeline(server.port, "undisturbed")
    lifeline.local_address(GENEROUS)
    yield server.port
    wait_until_renewed(lifeline, lifeline.lease_until)
    assert lost.empty()
    nodes.assert_nobody_was_lost(server.port)


@pytest.mark.parametrize(
    "bytes_",
    [frame(b""), frame(b"x"), frame(os.urandom(100)), frame(encode(Goodbye())), frame(b"\0" * 512)],
    ids=["empty", "one", "noise", "unsealed", "full"],
)
def test_a_stranger_with_a_bad_hello_is_told_and_closed(nodes: Nodes, busy_port: int, bytes_: bytes) -> None:
    peer = nodes.peer(busy_port)
    peer.socket.sendall(bytes_)
    assert peer.refusal() == "its token or its run id is not this job's"


def test_a_message_that_is_too_long_is_refused_unread(nodes: Nodes, busy_port: int) -> None:
    peer = nodes.peer(busy_port)
    peer.socket.sendall(b"\xff\xff" + b"x" * 1000)
    assert "may have 512" in peer.refusal()


def test_a_http_request_is_refused(nodes: Nodes, busy_port: int) -> None:
    peer = nodes.peer(busy_port)
    peer.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert "may have 512" in peer.refusal()


def test_a_forged_hello_is_refused(nodes: Nodes, busy_port: int) -> None:
    peer = nodes.peer(busy_port)
    peer.socket.sendall(peer.hello("undisturbed", token=b"guessed"))
    assert "token" in peer.refusal()


def test_a_replayed_hello_is_refused(nodes: Nodes, busy_port: int) -> None:
    recorded = nodes.peer(busy_port).hello("undisturbed")
    peer = nodes.peer(busy_port)
    peer.socket.sendall(recorded)
    assert "token" in peer.refusal()


def test_half_a_hello_and_none_at_all_are_closed_in_time(nodes: Nodes, busy_port: int) -> None:
    peers = [nodes.peer(busy_port) for _ in range(2)]
    peers[0].socket.sendall(peers[0].hello()[:30])
    for peer in peers:
        peer.assert_closed()


def test_more_idle_strangers_than_are_kept_do_not_keep_a_node_out(nodes: Nodes, busy_port: int) -> None:
    strangers = [nodes.peer(busy_port) for _ in range(MAX_STRANGERS // 2)]
    assert nodes.lifeline(busy_port, "another")[0].local_address(GENEROUS)
    strangers += [nodes.peer(busy_port) for _ in range(MAX_STRANGERS)]
    strangers[0].assert_closed()
    assert nodes.lifeline(busy_port, "one more")[0].local_address(GENEROUS)


def test_a_node_that_sends_nonsense_loses_its_connection(nodes: Nodes) -> None:
    server = nodes.host(PATIENT)
    peer = nodes.peer(server.port).enter("peer")
    peer.socket.sendall(frame(b"nonsense" * 8))
    peer.assert_closed()
    assert nodes.next_loss() == ("peer", "closed")
    assert server.refused == 1


def test_a_beat_of_another_connection_is_nonsense(nodes: Nodes) -> None:
    server = nodes.host(PATIENT)
    one, two = (nodes.peer(server.port).enter(name) for name in ("one", "two"))
    two.socket.sendall(frame(Seal(TOKEN).seal(node_key(one.challenge, one.nonce), encode(Beat(2)))))
    two.assert_closed()
    assert nodes.next_loss() == ("two", "closed")
    one.send(Beat(2))
    assert one.answer() == Answer(2)


def test_a_node_is_lost_with_the_last_of_its_connections(nodes: Nodes) -> None:
    server = nodes.host(PATIENT)
    one, two = (nodes.peer(server.port).enter("peer") for _ in range(2))
    one.socket.close()
    nodes.assert_nobody_was_lost(server.port)
    two.socket.close()
    assert nodes.next_loss() == ("peer", "closed")


def test_a_host_without_free_descriptors_goes_on(nodes: Nodes) -> None:
    host, port = nodes.host_process(Beats(0.2, 100.0), descriptors=40)
    node = nodes.node(port, "a")
    strangers = [socket.create_connection(("127.0.0.1", port), timeout=GENEROUS) for _ in range(60)]
    for stranger in strangers:  # each one is closed, at the latest without a hello
        while stranger.recv(4096):
            continue
        stranger.close()
    nodes.node(port, "b").send(signal.SIGKILL)
    assert host.wait_for("lost") == "lost b closed"
    assert not any("lost" in line for line in node.lines)
