"""How nodes and leader talk over a store: the steps of both sides, as generators that yield the store's operations.

Whoever runs them (`perform` on a torch store, a simulation in virtual time, a benchmark on bare sockets) sends back
each operation's result. A node appends its events to one log, which the leader reads in order; the leader writes into
a mailbox for each node. So a node has a constant number of operations in a round, whatever the number of nodes.

One event has a way of its own, since all nodes send it at once while everybody waits: that a node is ready again after
the leader has stopped a round. The leader knows of whom to expect it, so each of them only sets a key of its own, which
the store does not answer; the store itself counts them, for the one connection that waits for them all (`gather`).
"""

import logging
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from math import ceil, inf
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import msgspec

from ft_launcher.records import (
    Assigned,
    Event,
    GroupReady,
    Message,
    Ready,
    Stop,
    decode_event,
    decode_message,
    encode,
)
from ft_launcher.rounds import Job
from ft_launcher.seal import Seal, SealBrokenError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

__all__ = [
    "Add",
    "CompareSet",
    "Delete",
    "Get",
    "Keys",
    "Mailbox",
    "MultiGet",
    "MultiSet",
    "Now",
    "Operation",
    "Steps",
    "Wait",
    "append",
    "close_mailbox",
    "fill_gap",
    "gather",
    "lead",
    "perform",
    "receive",
    "say_ready",
    "tidy",
]

logger = logging.getLogger(__name__)

GAP_SECONDS = 0.2
"""A node that has taken its place in the log fills it within microseconds, or has died in between."""

GROUP = 128
"""Least nodes whose readiness the leader is told of at once: it reads what these said while the next ones say it."""

GROUPS = 8
"""Most groups of a round. For each of them the leader looks through all nodes, so more would cost the square of n."""

MAIL_AT_ONCE = 128
"""Messages that the leader writes in one operation: the store delivers them while the next ones are sealed."""

_GAP = b"gap"
_CLOSED = b"closed"


class Add(NamedTuple):
    """Gives the new value of the counter."""

    key: str
    amount: int


class CompareSet(NamedTuple):
    """Sets a key that does not exist; gives what it holds then."""

    key: str
    value: bytes


class Get(NamedTuple):
    """Gives the value, as soon as there is one."""

    key: str


class MultiGet(NamedTuple):
    """Gives the values, or None if they are not all there within so many seconds."""

    keys: list[str]
    seconds: float


class MultiSet(NamedTuple):
    """Sets all of them."""

    keys: list[str]
    values: list[bytes]


class Delete(NamedTuple):
    """Removes a key."""

    key: str


class Wait(NamedTuple):
    """Says whether all of the keys exist within so many seconds (inf: as soon as they do)."""

    keys: list[str]
    seconds: float


class Now(NamedTuple):
    """Gives the time of a monotonic clock in seconds."""


Operation: TypeAlias = Add | CompareSet | Get | MultiGet | MultiSet | Delete | Wait | Now
_T = TypeVar("_T")
Steps: TypeAlias = Generator[Operation, Any, _T]


class Keys:
    """The names in the store of one job under one host."""

    def __init__(self, prefix: str, incarnation: str) -> None:
        self._root = f"{prefix}/{incarnation}"
        self.count = f"{self._root}/count"

    def log(self, slot: int) -> str:
        """Give the place of the `slot`-th event, from 1 on."""
        return f"{self._root}/log/{slot}"

    def mail(self, node_id: str, number: int) -> str:
        """Give the place of the `number`-th message to a node, from 0 on."""
        return f"{self._root}/mail/{node_id}/{number}"

    def ready(self, node_id: str, round_: int) -> str:
        """Give the place where a node says that it is ready again after this round."""
        return f"{self._root}/ready/{node_id}/{round_}"


def append(keys: Keys, seal: Seal, event: Event) -> Steps[None]:
    """Tell the leader of `event`."""
    body = encode(event)
    while True:
        key = keys.log((yield Add(keys.count, 1)))
        value = seal.seal(key, body)
        # The leader gives a place up that stays empty for long; then another one is taken.
        if (yield CompareSet(key, value)) == value:
            return


def fill_gap(keys: Keys, slot: int) -> Steps[None]:
    """Let the leader go on behind `slot`, should the node that took it have died before it wrote."""
    yield CompareSet(keys.log(slot), _GAP)


def say_ready(keys: Keys, seal: Seal, ready: Ready, round_: int) -> Steps[None]:
    """Tell the leader, which has stopped the round, that no worker of it runs here any more."""
    key = keys.ready(ready.node, round_)
    yield MultiSet([key], [seal.seal(key, encode(ready))])


def gather(keys: Keys, seal: Seal, round_: int, node_ids: Sequence[str]) -> Steps[None]:
    """Wait until all of these nodes have said that they are ready after the round; tell the leader, group by group."""
    size = _group_size(len(node_ids))
    for start in range(0, len(node_ids), size):
        yield Wait([keys.ready(node_id, round_) for node_id in node_ids[start : start + size]], inf)
        yield from append(keys, seal, GroupReady(round_, start))


def _group_size(nodes: int) -> int:
    """Say how many of so many nodes a `GroupReady` is about, but for the last one."""
    return max(GROUP, ceil(nodes / GROUPS))


class Mailbox:
    """What a node has read of its mail."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.received = 0
        self.used: list[str] = []
        """Names in the store that nobody reads any more."""


def receive(keys: Keys, seal: Seal, mailbox: Mailbox) -> Steps[Message | None]:
    """Give the next message for the node, None when the mailbox was closed. ValueError for a forged one."""
    key = keys.mail(mailbox.node_id, mailbox.received)
    value = yield Get(key)
    try:
        body = seal.open(key, value)
        message = None if body == _CLOSED else decode_message(body)
    except (ValueError, msgspec.MsgspecError):
        yield Delete(key)  # the leader's own may still come
        raise
    mailbox.received += 1
    mailbox.used.append(key)
    if isinstance(message, Assigned) and message.memory.round > 0:
        mailbox.used.append(keys.ready(mailbox.node_id, message.memory.round - 1))
    return message


def tidy(used: list[str]) -> Steps[None]:
    """Delete what a node has read. When nothing else goes on: while a round forms, the store has enough to do."""
    while used:
        yield Delete(used.pop())


def close_mailbox(keys: Keys, seal: Seal, mailbox: Mailbox) -> Steps[None]:
    """End the `receive` that is going on."""
    key = keys.mail(mailbox.node_id, mailbox.received)
    yield CompareSet(key, seal.seal(key, _CLOSED))


class Leader:
    """What the leader has read and written so far. `job` is its state."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.next_slot = 1
        self.forged = 0
        self.sent: dict[str, int] = {}
        self.stopped_round = -1
        self.told: list[str] = []
        """The ids of the nodes that were told to stop this round."""
        self.awaited: dict[str, str] = {}
        """Where those of them that have not been heard yet will say that they are ready, by their ids."""


def lead(
    keys: Keys,
    seal: Seal,
    leader: Leader,
    on_change: Callable[[Job], bool],
    on_stop: Callable[[int, list[str]], None],
) -> Steps[None]:
    """Read events and write messages until `on_change`, called after each batch, says that the work is done.

    `on_stop` has somebody else `gather` the nodes with these ids after this round.
    """
    job = leader.job
    while True:
        now = yield Now()
        if (yield Wait([keys.log(leader.next_slot)], max(0.0, job.due() - now))):
            events = yield from _read(keys, seal, leader)
        else:
            # What is due is to give up on nodes that do not come: then it matters which those are.
            come = []
            for node_id, name in leader.awaited.items():
                if (yield Wait([name], 0.0)):
                    come.append(node_id)
            events = yield from _read_ready(seal, leader, come)
        now = yield Now()
        for event in events:
            job.apply(event, now)
        mail = job.decide(now)
        told = [node_id for node_id, message in mail if isinstance(message, Stop)]
        if told and job.memory.round != leader.stopped_round:
            leader.stopped_round, leader.told = job.memory.round, told
            leader.awaited = {node_id: keys.ready(node_id, job.memory.round) for node_id in leader.told}
            on_stop(job.memory.round, leader.told)
        yield from _write(keys, seal, leader, mail)
        is_done = on_change(job)
        yield from _excuse(leader, everybody=is_done or job.outcome is not None)
        if is_done:
            return


def _excuse(leader: Leader, *, everybody: bool) -> Steps[None]:
    """Have nobody wait for nodes that are gone, or have said in the log that they are ready."""
    excused = [each for each in leader.awaited if everybody or not leader.job.is_stopping(each)]
    if excused:
        names = [leader.awaited.pop(node_id) for node_id in excused]
        yield MultiSet(names, [_GAP] * len(names))


def _write(keys: Keys, seal: Seal, leader: Leader, mail: list[tuple[str, Message]]) -> Steps[None]:
    for start in range(0, len(mail), MAIL_AT_ONCE):
        names, values = [], []
        for node_id, message in mail[start : start + MAIL_AT_ONCE]:
            number = leader.sent.get(node_id, 0)
            leader.sent[node_id] = number + 1
            key = keys.mail(node_id, number)
            names.append(key)
            values.append(seal.seal(key, encode(message)))
        if start:
            # Not before the store has taken in the last ones, as the sealing was faster: its socket would be full, and
            # then it is up to 0.2 s (TCP's least timeout) until the kernel asks again whether there is room.
            yield Add(keys.count, 0)
        yield MultiSet(names, values)


def _read(keys: Keys, seal: Seal, leader: Leader) -> Steps[list[Event]]:
    """Give all events that have come since, in their order; what nobody sealed is left out and counted."""
    last = yield Add(keys.count, 0)
    names = [keys.log(slot) for slot in range(leader.next_slot, last + 1)]
    if not names:
        # Somebody wrote there without counting, so it was no node.
        names = [keys.log(leader.next_slot)]
        last = leader.next_slot
    values = yield MultiGet(names, GAP_SECONDS)
    if values is None:
        for name in names:
            yield CompareSet(name, _GAP)
        values = yield MultiGet(names, GAP_SECONDS)
    leader.next_slot = last + 1
    events: list[Event] = []
    for name, value in zip(names, values or (), strict=False):
        event = _opened(seal, leader, name, value)
        if isinstance(event, GroupReady):
            if event.round == leader.stopped_round:
                end = event.start + _group_size(len(leader.told))
                events += yield from _read_ready(seal, leader, leader.told[event.start : end])
        elif event is not None:
            events.append(event)
    return events


def _read_ready(seal: Seal, leader: Leader, node_ids: Sequence[str]) -> Steps[list[Event]]:
    """Give what those of these nodes have said in their own places that are awaited."""
    awaited = [(each, leader.awaited[each]) for each in node_ids if each in leader.awaited]
    events: list[Event] = []
    values = (yield MultiGet([name for _, name in awaited], GAP_SECONDS)) if awaited else None
    if values is None:
        return events
    for (node_id, name), value in zip(awaited, values, strict=True):
        del leader.awaited[node_id]
        event = _opened(seal, leader, name, value)
        if isinstance(event, Ready) and event.node == node_id:
            events.append(event)
        else:
            leader.job.ask_again(node_id)
    return events


def _opened(seal: Seal, leader: Leader, name: str, value: bytes) -> Event | None:
    if value == _GAP:
        return None
    try:
        return decode_event(seal.open(name, value))
    except (SealBrokenError, msgspec.MsgspecError, ValueError):
        leader.forged += 1
        return None


def perform(steps: Steps[_T], store: "TCPStore", now: Callable[[], float]) -> _T:
    """Run the steps on a torch store to their end. Raises torch's DistError when the store is gone."""
    result: Any = None
    while True:
        try:
            operation = steps.send(result)
        except StopIteration as end:
            value: _T = end.value
            return value
        result = _perform(operation, store, now)


_LONGEST_SECONDS = 20 * 86400.0  # torch hands the milliseconds to poll(2), whose argument has 32 bits


def _perform(operation: Operation, store: "TCPStore", now: Callable[[], float]) -> Any:
    match operation:
        case Now():
            return now()
        case Add(key, amount):
            return store.add(key, amount)
        case CompareSet(key, desired):
            return store.compare_set(key, "", desired)  # type: ignore[arg-type]  # torch takes bytes too
        case Get(key):
            return _unless_late(store, inf, lambda: store.get(key))
        case Wait(keys, seconds) if seconds <= 0:
            return store.check(keys)
        case Wait(keys, seconds):
            return _unless_late(store, seconds, lambda: store.wait(keys) or True) is not None
        case MultiGet(keys, seconds):
            return _unless_late(store, seconds, lambda: store.multi_get(keys))
        case MultiSet(keys, values):
            store.multi_set(keys, values)  # type: ignore[attr-defined]  # torch's stub has forgotten it
        case Delete(key):
            store.delete_key(key)
    return None


def _unless_late(store: "TCPStore", seconds: float, read: Callable[[], _T]) -> _T | None:
    """Give what `read` reads, None when that is not there within so many seconds (inf: never None).

    Torch's get waits by itself for as long as the store's timeout says: one round trip less than after a wait.
    """
    from torch.distributed import DistStoreError

    store.set_timeout(timedelta(seconds=min(seconds, _LONGEST_SECONDS)))
    while True:
        try:
            return read()
        except DistStoreError:
            if seconds < inf:
                return None
