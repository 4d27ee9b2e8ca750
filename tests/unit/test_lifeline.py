"""The lifeline's decisions: by themselves, and both ends over a modelled TCP for simulated days."""

import heapq
import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ft_launcher.lifeline import (
    MAX_FRAME_BYTES,
    Answer,
    Beat,
    Beats,
    Challenge,
    Evicted,
    Frames,
    FromHost,
    FromNode,
    Goodbye,
    Hello,
    HostSide,
    NodeSide,
    Refused,
    WireError,
    Wish,
    decode_from_host,
    decode_from_node,
    encode,
    frame,
)

BEATS = Beats()
DAY = 24 * 3600.0

# -- the host's side --------------------------------------------------------------------------------------------------


def test_a_silent_node_is_given_up_after_the_limit_and_not_before() -> None:
    host = HostSide(BEATS)
    host.heard("a", 10.0)
    assert host.due() == 15.0
    assert host.lost(14.99) == []
    assert host.lost(15.0) == [("a", "silent")]
    assert host.due() is None


def test_a_node_whose_connection_ended_is_given_up_after_the_grace() -> None:
    host = HostSide(BEATS)
    host.heard("a", 10.0)
    host.closed("a", 11.0)
    assert host.due() == 11.5
    assert host.lost(11.5) == [("a", "closed")]


def test_a_node_that_connects_again_within_the_grace_is_not_lost() -> None:
    host = HostSide(BEATS)
    host.heard("a", 10.0)
    host.closed("a", 11.0)
    assert host.heard("a", 11.4)
    assert host.lost(16.0) == []
    assert host.due() == 16.4


def test_a_node_that_was_given_up_stays_so() -> None:
    host = HostSide(BEATS)
    host.heard("a", 0.0)
    host.lost(5.0)
    assert not host.heard("a", 5.1)
    assert not host.is_known("a")
    assert host.lost(100.0) == []


def test_a_node_that_was_forgotten_is_answered_and_never_lost() -> None:
    host = HostSide(BEATS)
    host.heard("a", 0.0)
    host.forget("a")
    assert host.heard("a", 1.0)
    host.closed("a", 2.0)
    assert host.lost(100.0) == []


def test_nobody_is_given_up_for_the_hosts_own_sleep() -> None:
    host = HostSide(BEATS)
    host.heard("a", 0.0)
    host.woke(20.0, planned=1.0)
    assert host.lost(20.0) == []
    assert host.due() == 24.0  # the second before the sleep counts


def test_the_sleep_of_a_host_is_not_given_to_what_comes_after_it() -> None:
    host = HostSide(BEATS)
    host.heard("a", 0.0)
    host.woke(20.0, planned=1.0)
    host.heard("b", 20.0)
    assert host.lost(25.0) == [("a", "silent"), ("b", "silent")]


class HostMachine(RuleBasedStateMachine):
    """HostSide against a list of instants that is searched for each question."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.host = HostSide(BEATS)
        self.heard: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.forgotten: set[str] = set()
        self.gone: set[str] = set()

    nodes = st.sampled_from("abcd")

    def _deadlines(self) -> dict[str, float]:
        silent = {node: at + BEATS.limit for node, at in self.heard.items()}
        return silent | {node: at + BEATS.grace for node, at in self.ended.items()}

    @rule(node=nodes)
    def hear(self, node: str) -> None:
        assert self.host.heard(node, self.now) == (node not in self.gone)
        if node not in self.gone | self.forgotten:
            self.heard[node] = self.now
            self.ended.pop(node, None)

    @rule(node=nodes)
    def end(self, node: str) -> None:
        self.host.closed(node, self.now)
        if node in self.heard:
            del self.heard[node]
            self.ended[node] = self.now

    @rule(node=nodes)
    def forget(self, node: str) -> None:
        self.host.forget(node)
        self.heard.pop(node, None)
        self.ended.pop(node, None)
        self.forgotten.add(node)

    @rule(seconds=st.sampled_from([0.0, 0.25, 0.5, 1.0, 5.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds

    @rule(seconds=st.sampled_from([0.05, 0.5, 4.0, 30.0]))
    def oversleep(self, seconds: float) -> None:
        planned, self.now = self.now, self.now + seconds
        self.host.woke(self.now, planned)
        if seconds > BEATS.interval / 10:
            self.heard = {node: at + seconds for node, at in self.heard.items()}
            self.ended = {node: at + seconds for node, at in self.ended.items()}

    @rule()
    def judge(self) -> None:
        due = {node for node, at in self._deadlines().items() if at <= self.now + 1e-9}
        expected = {(node, "closed" if node in self.ended else "silent") for node in due}
        lost = self.host.lost(self.now + 1e-9)
        assert set(lost) == expected
        assert len(lost) == len(expected)
        for node in due:
            self.heard.pop(node, None)
            self.ended.pop(node, None)
        self.gone |= due

    @invariant()
    def agree_on_what_is_next(self) -> None:
        due = self.host.due()
        assert due == pytest.approx(min(self._deadlines().values())) if self._deadlines() else due is None
        assert {node for node in "abcd" if self.host.is_known(node)} == set(self._deadlines())


TestHost = HostMachine.TestCase

# -- the node's side --------------------------------------------------------------------------------------------------


def connected(now: float = 0.0) -> NodeSide:
    node = NodeSide(BEATS, now)
    assert node.wishes(now) == [Wish.CONNECT]
    node.sent(1, now)
    node.answered(1, now)
    return node


def test_a_node_beats_four_times_an_interval() -> None:
    node = connected()
    assert node.state == "ok"
    assert node.due() == 0.25
    assert node.wishes(0.25) == [Wish.BEAT]
    assert node.due() == 0.5


def test_the_lease_counts_from_the_sending_of_what_was_answered() -> None:
    node = connected()
    node.sent(2, 1.0)
    node.sent(3, 1.2)
    node.answered(2, 3.0)
    assert node.lease_until == 5.0
    node.answered(3, 3.1)
    assert node.lease_until == 5.2
    node.answered(2, 3.2)  # twice, or on an older connection
    assert node.lease_until == 5.2


def test_a_node_without_answers_tries_new_connections_and_then_gives_up() -> None:
    node = connected()
    wishes = {}
    while node.lost is None:
        now = node.due()
        wishes[now] = node.wishes(now)
    assert node.lost == "silent"
    assert now == node.lease_until == 4.0
    assert node.due() <= now
    connects = [at for at, wished in wishes.items() if Wish.CONNECT in wished]
    assert connects == [1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75]
    assert node.wishes(10.0) == []


def test_a_late_answer_ends_the_trying() -> None:
    node = connected()
    node.sent(2, 1.0)
    assert Wish.CONNECT in node.wishes(1.6)
    node.answered(2, 1.7)
    assert Wish.CONNECT not in node.wishes(3.1)


def test_the_end_of_the_connection_makes_a_node_connect_at_once_and_not_beat() -> None:
    node = connected()
    node.closed(0.1)
    assert (node.state, node.due()) == ("reconnecting", 0.1)
    assert node.wishes(0.1) == [Wish.CONNECT]
    assert node.wishes(0.3) == []
    assert node.wishes(0.35) == [Wish.CONNECT]
    node.sent(2, 0.4)
    node.answered(2, 0.4)
    assert (node.state, node.wishes(0.65)) == ("ok", [Wish.BEAT])


def test_a_refused_connection_means_that_the_hosts_launcher_died() -> None:
    node = connected()
    node.closed(0.1)
    node.refused()
    assert (node.lost, node.state) == ("closed", "lost")


def test_a_node_that_was_never_let_in_is_refused() -> None:
    node = NodeSide(BEATS, 0.0)
    node.refused()
    assert node.lost == "refused"


def test_a_node_that_nobody_answers_at_first_gives_up_after_the_same_time() -> None:
    node = NodeSide(BEATS, 7.0)
    assert node.wishes(10.9) == [Wish.CONNECT]
    assert node.wishes(11.0) == []
    assert node.lost == "silent"


def test_an_evicted_node_stays_evicted() -> None:
    node = connected()
    node.evicted()
    node.closed(0.2)
    node.refused()
    node.sent(2, 0.3)
    node.answered(2, 0.3)
    assert node.lost == "evicted"


def test_a_node_that_overslept_its_lease_asks_once_more() -> None:
    node = connected()
    node.woke(6.0, planned=0.25)
    assert node.wishes(6.0) == [Wish.BEAT, Wish.CONNECT]
    node.sent(2, 6.0)
    node.answered(2, 6.1)
    assert (node.state, node.lease_until) == ("ok", 10.0)


def test_a_node_that_overslept_its_lease_and_gets_no_answer_is_fenced_soon() -> None:
    node = connected()
    node.woke(6.0, planned=0.25)
    assert node.wishes(6.4)
    node.woke(6.8, planned=6.5)  # slow, but that buys no more time
    assert node.wishes(6.8) == []
    assert node.lost == "silent"


@given(st.floats(0.01, 100), st.floats(0.01, 500))
def test_with_any_settings_a_node_is_fenced_before_it_is_given_up(interval: float, limit: float) -> None:
    beats = Beats(interval, limit)
    assert 0 < beats.probe_after < beats.fence_after < beats.limit


# -- on the wire ------------------------------------------------------------------------------------------------------

TO_NODE: list[FromHost] = [Challenge(1, b"0" * 16), Answer(7), Evicted(), Refused("no")]
TO_HOST: list[FromNode] = [Hello(1, "abc", b"0" * 16), Beat(2**40), Goodbye()]


def test_messages_come_out_as_they_went_in() -> None:
    assert [decode_from_host(encode(message)) for message in TO_NODE] == TO_NODE
    assert [decode_from_node(encode(message)) for message in TO_HOST] == TO_HOST


@given(st.binary(max_size=MAX_FRAME_BYTES) | st.sampled_from([encode(message) for message in TO_NODE]))
def test_what_is_no_message_of_a_node_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        decode_from_node(body)


def test_a_text_that_is_not_utf_8_is_refused() -> None:
    body = encode(Hello(1, "abc", b"0" * 16)).replace(b"abc", b"\xff\xfe\xfd")
    with pytest.raises(WireError):
        decode_from_node(body)


@given(st.lists(st.binary(max_size=MAX_FRAME_BYTES), max_size=6), st.data())
def test_frames_come_out_however_the_bytes_are_cut(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frame(payload) for payload in payloads)
    frames = Frames()
    found = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += frames.feed(stream[:size])
        stream = stream[size:]
    assert found == payloads


def test_a_frame_that_is_too_long_is_refused_before_it_has_come() -> None:
    with pytest.raises(WireError, match="513 bytes, may have 512"):
        Frames().feed((513).to_bytes(2, "big"))


# -- both ends over a network -----------------------------------------------------------------------------------------


class Clock:
    """Virtual time: what is to happen, in its order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, instant: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (instant, next(self._order), event))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = until


class Network:
    """The way between one node and the host: packets are lost, late, or cut off altogether."""

    def __init__(self, seed: str, loss: float, delay: Callable[[random.Random], float]) -> None:
        self.random = random.Random(seed)
        self.loss = loss
        self._delay = delay
        self.gone_at = math.inf
        """From then on nothing comes through."""
        self.deaf_at = math.inf
        """From then on nothing comes through to the node."""
        self.cut_every = math.inf
        self.cut_seconds = 0.0
        self._phase = self.random.random()

    def passes(self, now: float, *, to_node: bool) -> bool:
        """Tell whether a packet that is sent now arrives."""
        if now >= self.gone_at or (to_node and now >= self.deaf_at):
            return False
        if (now / self.cut_every + self._phase) % 1.0 * self.cut_every < self.cut_seconds:
            return False
        return self.random.random() >= self.loss

    def delay(self) -> float:
        return self._delay(self.random)

    def syn(self, now: float) -> float:
        """Give when a connection that is begun now stands, at the node: SYNs are sent after 0, 1, 3, 7 … s."""
        for exponent in range(6):
            there, back = self.delay(), self.delay()
            if self.passes(now, to_node=False) and self.passes(now + there, to_node=True):
                return now + there + back
            now += 2.0**exponent
        return math.inf


class Stream:
    """One direction of a TCP connection: all arrives, in order, and late when packets are lost."""

    def __init__(self, network: Network, *, to_node: bool) -> None:
        self._network = network
        self._to_node = to_node
        self._arrived = 0.0
        self._may_send = 0.0

    def arrival(self, now: float) -> float:
        """Give when what is written now arrives: it is sent again after 0.2, 0.4, 0.8 … s.

        Behind a packet that has to be sent again, nothing is sent before that one was acknowledged.
        """
        now = max(now, self._may_send)
        for exponent in range(10):
            if self._network.passes(now, to_node=self._to_node):
                self._arrived = max(self._arrived, now + self._network.delay())
                if exponent:
                    self._may_send = self._arrived + self._network.delay()
                return self._arrived
            now += 0.2 * 2.0**exponent
        self._may_send = math.inf
        return math.inf


class Line:
    """One connection of a node with the host."""

    def __init__(self, network: Network) -> None:
        self.to_host = Stream(network, to_node=False)
        self.to_node = Stream(network, to_node=True)
        self.is_open = True


class SimulatedHost:
    """What LifelineServer does, around the same decisions."""

    def __init__(self, clock: Clock, beats: Beats) -> None:
        self.clock = clock
        self.side = HostSide(beats)
        self.lost: dict[str, tuple[str, float]] = {}

    def heard(self, node: "SimulatedNode", line: Line, number: int) -> None:
        now = self.clock.now
        is_new = not self.side.is_known(node.name)
        if self.side.heard(node.name, now):
            self.clock.at(line.to_node.arrival(now), lambda: node.answered(line, number))
        if is_new:
            self._plan()

    def _plan(self) -> None:
        due = self.side.due()
        if due is not None:
            self.clock.at(due, self._judge)

    def _judge(self) -> None:
        lost = self.side.lost(self.clock.now)
        self.lost |= {node: (how, self.clock.now) for node, how in lost}
        due = self.side.due()
        if due is not None:
            # The next one to be judged has been heard since, mostly: so this is no event for each beat.
            self.clock.at(due, self._judge)


class SimulatedNode:
    """What Lifeline does, around the same decisions."""

    def __init__(self, name: str, clock: Clock, host: SimulatedHost, network: Network, beats: Beats) -> None:
        self.name = name
        self.clock, self.host, self.network = clock, host, network
        self.side = NodeSide(beats, clock.now)
        self.fenced_at: float | None = None
        self.connections = 0
        self._number = 0
        self._line: Line | None = None
        self._attempts: list[Line] = []
        self._planned = clock.now
        clock.at(clock.now, self._turn)

    def _turn(self) -> None:
        if self._has_lost_it() or self.clock.now < self._planned:
            return
        for wish in self.side.wishes(self.clock.now):
            if wish is Wish.BEAT and self._line is not None:
                self._send(self._line)
            elif wish is Wish.CONNECT:
                self._connect()
        if self._has_lost_it():
            self.fenced_at = self.clock.now
        else:
            self._plan()

    def _has_lost_it(self) -> bool:
        return self.side.lost is not None

    def _plan(self) -> None:
        self._planned = self.side.due()
        self.clock.at(self._planned, self._turn)

    def _connect(self) -> None:
        line = Line(self.network)
        self._attempts.append(line)
        self.connections += 1
        stands = self.network.syn(self.clock.now)
        # The host accepts with the node's first packet, its challenge comes back, and that makes the node say hello.
        accepted = line.to_host.arrival(stands)
        challenged = line.to_node.arrival(accepted)
        self.clock.at(challenged, lambda: self._send(line))

    def _send(self, line: Line) -> None:
        if line.is_open and self.side.lost is None:
            self._number += 1
            number = self._number
            self.side.sent(number, self.clock.now)
            arrival = line.to_host.arrival(self.clock.now)
            self.clock.at(arrival, lambda: self.host.heard(self, line, number))

    def answered(self, line: Line, number: int) -> None:
        if not line.is_open or self.side.lost is not None:
            return
        self.side.answered(number, self.clock.now)
        if self._line is not line:
            if self._line is not None:
                self._line.is_open = False
            self._line = line
            self._attempts.remove(line)
            self._plan()
        for attempt in self._attempts:
            attempt.is_open = False
        self._attempts.clear()


def lan(source: random.Random) -> float:
    """A tenth of a millisecond mostly, and now and then a switch's full queue, up to 400 ms."""
    return source.uniform(0.2, 0.4) if source.random() < 0.001 else source.uniform(0.00005, 0.0005)


def far(source: random.Random) -> float:
    """Anything up to 400 ms, for each packet anew."""
    return source.uniform(0.001, 0.4)


def simulate(
    count: int, seed: str, delay: Callable[[random.Random], float], change: Callable[[Network], None], seconds: float
) -> tuple[SimulatedHost, list[SimulatedNode]]:
    """Have `count` nodes, each over a network with 1 % loss and what else `change` makes of it, for `seconds`."""
    clock = Clock()
    host = SimulatedHost(clock, BEATS)
    nodes = []
    for number in range(count):
        network = Network(f"{seed} {number}", 0.01, delay)
        change(network)
        nodes.append(SimulatedNode(str(number), clock, host, network, BEATS))
    clock.run(seconds)
    return host, nodes


def assert_undisturbed(host: SimulatedHost, nodes: list[SimulatedNode]) -> None:
    assert host.lost == {}
    assert [node.fenced_at for node in nodes] == [None] * len(nodes)
    assert all(host.side.is_known(node.name) for node in nodes)


def test_a_simulated_day_of_lost_packets_and_cuts_of_3_seconds_evicts_and_fences_nobody() -> None:
    def cut(network: Network) -> None:
        network.cut_every, network.cut_seconds = 600.0, 3.0

    host, nodes = simulate(2, "day", lan, cut, DAY)
    assert_undisturbed(host, nodes)
    # Each cut was noticed, so the day was no idle one.
    assert all(node.connections > DAY / 600 for node in nodes)


def test_a_cut_of_3_seconds_in_each_minute_of_6_hours_evicts_and_fences_nobody() -> None:
    def cut(network: Network) -> None:
        network.cut_every, network.cut_seconds = 60.0, 3.0

    assert_undisturbed(*simulate(2, "cuts", lan, cut, DAY / 4))


def test_6_hours_of_packets_up_to_400_ms_late_evicts_and_fences_nobody() -> None:
    assert_undisturbed(*simulate(2, "late", far, lambda network: None, DAY / 4))


@pytest.mark.parametrize("delay", [lan, far])
def test_a_node_that_vanishes_is_fenced_an_interval_before_it_is_lost_and_lost_in_time(
    delay: Callable[[random.Random], float],
) -> None:
    def vanish(network: Network) -> None:
        network.gone_at = network.random.uniform(10.0, 40.0)

    host, nodes = simulate(300, "vanish", delay, vanish, 60.0)
    for node in nodes:
        how, lost_at = host.lost[node.name]
        assert how == "silent"
        assert lost_at <= node.network.gone_at + BEATS.limit + 0.5
        assert node.side.lost == "silent"
        assert node.fenced_at is not None
        assert node.fenced_at + BEATS.interval <= lost_at + 1e-9


def test_a_node_that_hears_nothing_any_more_fences_itself_though_the_host_hears_it() -> None:
    def deafen(network: Network) -> None:
        network.deaf_at = network.random.uniform(10.0, 40.0)

    host, nodes = simulate(100, "deaf", lan, deafen, 60.0)
    for node in nodes:
        assert node.fenced_at is not None
        assert node.fenced_at <= node.network.deaf_at + BEATS.fence_after
        assert node.fenced_at + BEATS.interval <= host.lost[node.name][1] + 1e-9
