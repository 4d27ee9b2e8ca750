"""Decides by beats and their answers which nodes the host has lost, and whether a node has lost the host.

Between each node and the host there is one TCP connection, the lifeline. The node sends beats on it, and the host
answers them. Its end says that a launcher died, its silence that a machine or the network did.

A node may train for `fence_after` from the *sending* of the last beat that was answered; the host gives it up `limit`
after it *heard* one, which is later. So whatever the network does, a node has stopped its workers before the host has
others start without it, and no two clocks are compared.
"""

import math
from collections import OrderedDict
from enum import Enum
from typing import Literal

import msgspec
from msgspec import Struct

__all__ = [
    "LIFELINE_PROTOCOL",
    "MAX_FRAME_BYTES",
    "Answer",
    "Beat",
    "Beats",
    "Challenge",
    "Evicted",
    "Frames",
    "FromHost",
    "FromNode",
    "Goodbye",
    "Hello",
    "HostSide",
    "HowLost",
    "NodeSide",
    "Refused",
    "WireError",
    "Wish",
    "decode_from_host",
    "decode_from_node",
    "encode",
    "frame",
    "hello_key",
    "host_key",
    "node_key",
]

HowLost = Literal["closed", "silent", "refused", "evicted"]
"""closed: the other process died; silent: no answer in time; refused: never let in; evicted: the host gave us up."""


class Beats(Struct, frozen=True):
    """How often a node says that it is there, and for how long the others wait for it. Seconds."""

    interval: float = 1.0
    limit: float = 5.0
    """After so much silence the host gives a node up."""
    grace: float = 0.5
    """The time to connect again after a connection's end (a middlebox can cause one) before a node counts as dead."""

    @property
    def fence_after(self) -> float:
        """How long a node without answers goes on: an interval less than the host waits, in which its workers die."""
        return self.limit - min(self.interval, self.limit / 4)

    @property
    def every(self) -> float:
        """The time between beats.

        A quarter of the interval, because a cut of the network that began just before a beat takes from the node's
        time also what passed since the beat before: with whole intervals a cut of 3 s could not be survived.
        """
        return self.interval / 4

    @property
    def probe_after(self) -> float:
        """After so much silence a node tries a new connection as well."""
        return min(self.interval * 1.5, self.fence_after / 2)

    @property
    def probe_every(self) -> float:
        """The time between new connections.

        TCP sends again after 0.2, 0.4, 0.8 … s: on a connection that was cut for 3 s the next try comes up to 3.2 s
        later, and with a SYN that was lost after 1, 2, 4 s. The first packet of another connection goes out at once.
        """
        return self.interval / 4


class HostSide:
    """The host's view: which nodes are there. Instants are of one monotonic clock, and never go back."""

    def __init__(self, beats: Beats) -> None:
        self._beats = beats
        # Both by their instants, earliest first: what comes next is known without looking at all nodes.
        self._heard: OrderedDict[str, float] = OrderedDict()
        self._closed: OrderedDict[str, float] = OrderedDict()
        self._forgotten: set[str] = set()
        self._given_up: set[str] = set()
        # How long this process slept in all. The instants above are of a clock that stood still meanwhile.
        self._slept = 0.0

    def heard(self, node: str, now: float) -> bool:
        """Note a sign of life; it makes a node known. False: it was given up, there is no way back."""
        if node in self._given_up:
            return False
        if node not in self._forgotten:
            self._closed.pop(node, None)
            self._heard[node] = now - self._slept
            self._heard.move_to_end(node)
        return True

    def closed(self, node: str, now: float) -> None:
        """Note that the node's last connection has ended."""
        if self._heard.pop(node, None) is not None:
            self._closed[node] = now - self._slept

    def forget(self, node: str) -> None:
        """Never report this node: it said goodbye, or is known to be leaving."""
        self._heard.pop(node, None)
        self._closed.pop(node, None)
        self._forgotten.add(node)

    def is_known(self, node: str) -> bool:
        """Tell whether the node's loss would be reported."""
        return node in self._heard or node in self._closed

    def woke(self, now: float, planned: float) -> None:
        """Note that this process runs at `now`, which it meant to do at `planned` at the latest.

        What it slept longer (stopped, machine overloaded or frozen) is no node's silence, and is given to all.
        """
        slept = now - planned
        if slept > self._beats.interval / 10:  # less is the scheduler's usual delay, and no reason to wait longer
            self._slept += slept

    def due(self) -> float | None:
        """The next instant at which a node may be lost; None: there is none."""
        return min((since + wait + self._slept for since, wait in self._first()), default=None)

    def lost(self, now: float) -> list[tuple[str, HowLost]]:
        """Give up the nodes whose time has passed, and give them."""
        lost: list[tuple[str, HowLost]] = []
        lost += [(node, "closed") for node in self._take(self._closed, self._beats.grace, now)]
        lost += [(node, "silent") for node in self._take(self._heard, self._beats.limit, now)]
        self._given_up.update(node for node, _ in lost)
        return lost

    def _first(self) -> list[tuple[float, float]]:
        ordered = ((self._closed, self._beats.grace), (self._heard, self._beats.limit))
        return [(next(iter(nodes.values())), wait) for nodes, wait in ordered if nodes]

    def _take(self, nodes: OrderedDict[str, float], wait: float, now: float) -> list[str]:
        taken = []
        # The same sum as in `due`: subtracting on the other side may round so that nobody is lost when it is due.
        while nodes and next(iter(nodes.values())) + wait + self._slept <= now:
            taken.append(nodes.popitem(last=False)[0])
        return taken


class Wish(Enum):
    """What a node's side wants done now."""

    BEAT = "send a beat on the lifeline"
    CONNECT = "open one more connection, and greet the host on it"


class NodeSide:
    """The node's view: whether the host is there. Begins without a connection, and as if a beat had been answered."""

    def __init__(self, beats: Beats, now: float) -> None:
        self.lost: HowLost | None = None
        """Once set, it stays, and nothing is wished for any more."""
        self._beats = beats
        self._lease_from = now
        self._pending: OrderedDict[int, float] = OrderedDict()
        self._was_answered = False
        self._has_lifeline = False
        self._beat_at = math.inf
        self._connect_at = now
        self._courtesy_until = -math.inf
        self._may_oversleep = True

    @property
    def state(self) -> Literal["ok", "reconnecting", "lost"]:
        if self.lost is not None:
            return "lost"
        return "ok" if self._has_lifeline else "reconnecting"

    @property
    def lease_until(self) -> float:
        """Until when this node may train, as far as it knows."""
        return self._lease_from + self._beats.fence_after

    def sent(self, number: int, now: float) -> None:
        """Note the sending of a beat or a hello. Numbers grow over all connections."""
        self._pending[number] = now

    def answered(self, number: int, now: float) -> None:
        """Note the answer to a beat or hello. The connection that it came on is the lifeline from now on."""
        if self.lost is not None or number not in self._pending:
            return
        self._lease_from = max(self._lease_from, self._pending[number])
        while self._pending and next(iter(self._pending)) <= number:
            self._pending.popitem(last=False)
        if not self._has_lifeline:
            self._beat_at = now + self._beats.every
        self._has_lifeline = self._was_answered = self._may_oversleep = True
        self._connect_at = now + self._beats.probe_after

    def closed(self, now: float) -> None:
        """Note the end of the lifeline. A middlebox may have cut it, so a new one is tried at once."""
        self._has_lifeline = False
        self._beat_at = math.inf
        self._connect_at = now

    def refused(self) -> None:
        """Note that the host's machine says that nobody listens, or who listens that we do not belong there."""
        # After we were let in once, it means that the host's launcher is gone; a port is never given up otherwise.
        self._lose("closed" if self._was_answered else "refused")

    def evicted(self) -> None:
        """Note the host's word that it has given this node up."""
        self._lose("evicted")

    def woke(self, now: float, planned: float) -> None:
        """Note that this process runs at `now`, which it meant to do at `planned` at the latest.

        Who overslept the end of its lease was not fenced anyway; it asks the host once more before it ends what may
        be well: half an interval, and only once between two answers, so that a slow machine is fenced all the same.
        """
        if now - planned > self._beats.interval / 4 and self._may_oversleep:
            self._may_oversleep = False
            self._courtesy_until = now + self._beats.interval / 2

    def due(self) -> float:
        """The next instant at which something is to be done. Do not ask once the host is lost."""
        return min(self._fence_at, self._beat_at, self._connect_at)

    def wishes(self, now: float) -> list[Wish]:
        """Give what is to be done now, having noted everything that was received; or find that the host is lost."""
        if now >= self._fence_at:
            self._lose("silent")
        if self.lost is not None:
            return []
        wishes = []
        if now >= self._beat_at:
            self._beat_at = now + self._beats.every
            wishes.append(Wish.BEAT)
        if now >= self._connect_at:
            self._connect_at = now + self._beats.probe_every
            wishes.append(Wish.CONNECT)
        return wishes

    @property
    def _fence_at(self) -> float:
        return max(self.lease_until, self._courtesy_until)

    def _lose(self, how: HowLost) -> None:
        if self.lost is None:
            self.lost = how


# -- on the wire ------------------------------------------------------------------------------------------------------

LIFELINE_PROTOCOL = 1
MAX_FRAME_BYTES = 512


class WireError(Exception):
    """What came is no message of a lifeline."""


class Challenge(Struct, tag="challenge", frozen=True, array_like=True):
    """The host's first words, not sealed: seal your hello for this."""

    protocol: int
    nonce: bytes


class Answer(Struct, tag="answer", frozen=True, array_like=True):
    """The hello or beat of this number was heard."""

    number: int


class Evicted(Struct, tag="evicted", frozen=True, array_like=True):
    """The host has given this node up."""


class Refused(Struct, tag="refused", frozen=True, array_like=True):
    """The hello was not accepted; not sealed, since the seals may be what differs."""

    reason: str


class Hello(Struct, tag="hello", frozen=True, array_like=True):
    """The node's first words; its nonce goes into all later seals, so that a replayed host is found out too."""

    number: int
    node: str
    nonce: bytes


class Beat(Struct, tag="beat", frozen=True, array_like=True):
    number: int


class Goodbye(Struct, tag="goodbye", frozen=True, array_like=True):
    """The node leaves, and is not to be missed."""


FromHost = Challenge | Answer | Evicted | Refused
FromNode = Hello | Beat | Goodbye

_encoder = msgspec.msgpack.Encoder()
_from_host: msgspec.msgpack.Decoder[FromHost] = msgspec.msgpack.Decoder(FromHost)
_from_node: msgspec.msgpack.Decoder[FromNode] = msgspec.msgpack.Decoder(FromNode)


def encode(message: FromHost | FromNode) -> bytes:
    """Give a message's bytes."""
    return _encoder.encode(message)


def decode_from_host(body: bytes) -> FromHost:
    """Give the host's message. Raises WireError."""
    try:
        return _from_host.decode(body)
    # msgspec lets UnicodeDecodeError (a ValueError) through for bytes that are not UTF-8.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(str(error)) from None


def decode_from_node(body: bytes) -> FromNode:
    """Give a node's message. Raises WireError."""
    try:
        return _from_node.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(str(error)) from None


def hello_key(challenge: bytes) -> str:
    """What a hello is sealed for."""
    return f"lifeline/{challenge.hex()}/hello"


def node_key(challenge: bytes, nonce: bytes) -> str:
    """What all later messages of the node on this connection are sealed for."""
    return f"lifeline/{challenge.hex()}/{nonce.hex()}/node"


def host_key(challenge: bytes, nonce: bytes) -> str:
    """What the host's messages after the hello are sealed for."""
    return f"lifeline/{challenge.hex()}/{nonce.hex()}/host"


def frame(payload: bytes) -> bytes:
    """Give `payload` as it goes over the connection."""
    return len(payload).to_bytes(2, "big") + payload


class Frames:
    """Cuts what a connection brings into the payloads of its frames."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, received: bytes) -> list[bytes]:
        """Give the payloads that are complete now. Raises WireError when one is longer than MAX_FRAME_BYTES."""
        self._buffer += received
        payloads = []
        while len(self._buffer) >= 2:
            end = 2 + int.from_bytes(self._buffer[:2], "big")
            if end > 2 + MAX_FRAME_BYTES:
                raise WireError(f"a message of {end - 2} bytes, may have {MAX_FRAME_BYTES}")
            if len(self._buffer) < end:
                break
            payloads.append(self._buffer[2:end])
            self._buffer = self._buffer[end:]
        return payloads
