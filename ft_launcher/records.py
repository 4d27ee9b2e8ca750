"""What nodes write into the store for each other: events for the leader, and messages from it to one node."""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from ft_launcher.causes import Cause
from ft_launcher.ladder import Attempt, Ladder
from ft_launcher.policy import NodeState

__all__ = [
    "PROTOCOL",
    "Announcement",
    "Assigned",
    "End",
    "Event",
    "GroupReady",
    "Held",
    "Joined",
    "Leave",
    "Left",
    "Lost",
    "Memory",
    "Message",
    "Node",
    "Noticed",
    "Prepare",
    "Ready",
    "Reason",
    "ReasonKind",
    "Reported",
    "Requested",
    "SaveAt",
    "Saved",
    "Stop",
    "Terms",
    "Waiting",
    "decode_announcement",
    "decode_event",
    "decode_message",
    "encode",
]

PROTOCOL = 3
"""Raised by one with every change that an older launcher would misunderstand; nodes with another one are refused."""

Text = Annotated[str, Meta(max_length=4096)]
Name = Annotated[str, Meta(max_length=256)]
Count = Annotated[int, Meta(ge=0)]


class Terms(Struct, frozen=True):
    """What all nodes of a job must have been given alike."""

    min_nodes: int
    max_nodes: int
    restart_policy: Name
    max_restarts: int
    protocol: int = PROTOCOL
    torch: Name = ""  # major and minor version: the ranks of another one may not understand each other


class Node(Struct, frozen=True):
    """One launcher, as the others know it."""

    id: Name
    name: Name  # of the host
    address: Name  # numeric, at which its workers' store can be reached
    pid: int
    local_world_size: int
    terms: Terms
    role: Name = "default"
    infra_rank: int | None = None
    infra_source: Name = ""  # the variable that said so
    highest_rank: int = 0  # that the infrastructure can have given

    @property
    def title(self) -> str:
        """How it is called in sentences."""
        return f"{self.name} (pid {self.pid})"


ReasonKind: TypeAlias = Literal[
    "",
    "node_joined",
    "node_left",
    "node_preempted",
    "node_excluded",
    "rank_failed",
    "rank_hung",
    "node_lost",
    "host_lost",
]  # the later ones more likely are the cause of the earlier ones


class Reason(Struct, frozen=True):
    """Why workers are started anew."""

    kind: ReasonKind
    sentence: Text = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.sentence}" if self.kind else ""


class Memory(Struct, frozen=True, omit_defaults=True):
    """What every node remembers of the job, so that it can go on when its host is lost."""

    epoch: int = 0  # of the host that formed the round
    round: int = -1  # the last one formed
    restarts: int = 0  # counted ones so far
    nodes: int = 0  # that took part in the round
    voters: int = 0  # that were there when it formed, spares too: half of them decide who goes on without whom
    world_size: int = 0  # its ranks
    excluded: tuple[tuple[str, str], ...] = ()  # ids and names of nodes
    ladder: Ladder | None = None  # what is known of checkpoints; None: nobody has reported one


# -- events: a node writes them, the leader reads them ------------------------------------------------------------


class Joined(Struct, frozen=True, tag=True):
    """A launcher has come, for the first time or from a host that was lost."""

    node: Node
    memory: Memory | None = None
    group_rank: int | None = None  # in the round of the memory; None: it was a spare there


class Ready(Struct, frozen=True, tag=True, omit_defaults=True):
    """No worker of this node runs; it can take part in the next round."""

    node: Name
    store_port: int  # at which it would open the workers' store
    attempt: Attempt | None = None  # what its ranks said in the last round about checkpoints


class Reported(Struct, frozen=True, tag=True):
    """The workers of this node have all ended, or one of them has failed."""

    node: Name
    round: int
    state: NodeState
    cause: Cause | None = None
    rank: int | None = None  # the global rank that the cause is about


class Requested(Struct, frozen=True, tag=True):
    """A rank, or the launcher about its own node, wants out: Excluded is about the node, ShutDown about the job."""

    node: Name
    round: int
    cause: Cause


class Left(Struct, frozen=True, tag=True):
    """Goodbye: the launcher is about to end, and no worker of it runs."""

    node: Name
    reason: Text = ""


class Noticed(Struct, frozen=True, tag=True):
    """This node was told that its work is to be saved now, as it is about to be taken away, or for another reason."""

    node: Name
    what: Text  # "SIGTERM"; what a cloud says
    seconds: float | None = None  # that are left; None: nobody knows


class Held(Struct, frozen=True, tag=True):
    """The ranks of this node know of the notice: none passes a later step than these before it is told where to save.

    `step`: the latest that one of them has asked about; -1: none has asked yet.
    """

    node: Name
    round: int
    notice: int
    step: int


class Saved(Struct, frozen=True, tag=True):
    """The ranks of this node have gone on after saving, or have ended. `step`: where they were told to; -1: nowhere."""

    node: Name
    round: int
    notice: int
    step: int


class Lost(Struct, frozen=True, tag=True):
    """The host's lifeline server gives a node up."""

    node: Name
    how: Name


class GroupReady(Struct, frozen=True, tag=True):
    """The host's own word: a group of the nodes that were told to stop this round have said that they are ready."""

    round: int
    start: int  # of the group, among them


Event: TypeAlias = GroupReady | Joined | Ready | Reported | Requested | Left | Noticed | Held | Saved | Lost

# -- messages: the leader writes them, one node reads them ----------------------------------------------------------


class Assigned(Struct, frozen=True, tag=True):
    """A round has formed, and this is the node's place in it."""

    group_rank: int
    group_world_size: int
    rank: int  # of its first worker
    world_size: int
    role_rank: int
    role_world_size: int
    store_address: Name  # where group rank 0 opens the store of the workers
    store_port: int
    prev_world_size: int
    reason: Reason
    memory: Memory  # whose round is this one


class Waiting(Struct, frozen=True, tag=True):
    """There is no place for the node now; it stays as a spare."""

    round: int
    nodes: int  # that take part
    memory: Memory | None = None  # of a round that formed while the node was there


class Stop(Struct, frozen=True, tag=True):
    """The round is over: stop the workers and say Ready."""

    round: int
    reason: Reason


class Prepare(Struct, frozen=True, tag=True):
    """A notice has come, the job's `notice`-th: let the ranks wait at their next step, and say Held."""

    round: int
    notice: int
    what: Text
    name: Name  # of the node that it came to
    seconds: float | None = None  # that are left


class SaveAt(Struct, frozen=True, tag=True):
    """All ranks save at this step, or the first one after it that they ask about."""

    round: int
    notice: int
    step: int


class Leave(Struct, frozen=True, tag=True):
    """The job goes on without this node."""

    cause: Cause


class End(Struct, frozen=True, tag=True):
    """The job is over for everybody; without a cause it has succeeded."""

    cause: Cause | None
    origin: Name = ""  # the node where it came from


Message: TypeAlias = Assigned | Waiting | Stop | Prepare | SaveAt | Leave | End


class Announcement(Struct, frozen=True):
    """What stands at a known place of the host's store: whose it is."""

    run_id: Name
    incarnation: Name
    name: Name
    pid: int
    lifeline_port: int
    epoch: int  # that its next round will have
    round: int  # the last one formed by this host; -1: none yet
    protocol: int = PROTOCOL


_encoder = msgspec.msgpack.Encoder()
_event: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Event)
_message: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Message)
_announcement = msgspec.msgpack.Decoder(Announcement)


def encode(record: Event | Message | Announcement) -> bytes:
    """Give the bytes of `record`."""
    return _encoder.encode(record)


def decode_event(body: bytes) -> Event:
    """Read an event. ValueError for anything else, as with the others."""
    event: Event = _event.decode(body)
    return event


def decode_message(body: bytes) -> Message:
    """Read a message of the leader."""
    message: Message = _message.decode(body)
    return message


def decode_announcement(body: bytes) -> Announcement:
    """Read what a host says of itself."""
    return _announcement.decode(body)
