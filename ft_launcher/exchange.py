"""How nodes and leader talk over a store: the steps of both sides, as generators that yield the store's operations.

Whoever runs them (`perform` on a torch store, a simulation in virtual time, a benchmark on bare sockets) sends back
each operation's result. A node appends its events to one log, which the leader reads in order; the leader writes into
a mailbox for each node. So a node has a constant number of operations in a round, whatever the number of nodes.
"""

import logging
from collections.abc import Callable, Generator
from datetime import timedelta
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import msgspec

from ft_launcher.records import Event, Message, decode_event, decode_message, encode
from ft_launcher.rounds import Job
from ft_launcher.seal import Seal, SealBrokenError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

__all__ = ["Add", "CompareSet", "Delete", "Get", "Keys", "MultiGet", "MultiSet", "Now", "Operation", "Steps", "Wait",
           "append", "close_mailbox", "fill_gap", "lead", "perform", "receive"]  # fmt: skip

logger = logging.getLogger(__name__)

GAP_SECONDS = 0.2
"""A node that has taken its place in the log fills it within microseconds, or has died in between."""

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
    """Says whether the key exists within so many seconds (inf: as soon as it does)."""

    key: str
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


def receive(keys: Keys, seal: Seal, node_id: str, number: int) -> Steps[Message | None]:
    """Give the `number`-th message for the node, None when the mailbox was closed. ValueError for a forged one."""
    if number:
        yield Delete(keys.mail(node_id, number - 1))  # only now, so that the message need not wait for it
    key = keys.mail(node_id, number)
    value = yield Get(key)
    try:
        body = seal.open(key, value)
        return None if body == _CLOSED else decode_message(body)
    except (ValueError, msgspec.MsgspecError):
        yield Delete(key)  # the leader's own may still come
        raise


def close_mailbox(keys: Keys, seal: Seal, node_id: str, number: int) -> Steps[None]:
    """End the `receive` of this number."""
    key = keys.mail(node_id, number)
    yield CompareSet(key, seal.seal(key, _CLOSED))


class Leader:
    """What the leader has read and written so far. `job` is its state."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.next_slot = 1
        self.forged = 0
        self.sent: dict[str, int] = {}


def lead(keys: Keys, seal: Seal, leader: Leader, on_change: Callable[[Job], bool]) -> Steps[None]:
    """Read events and write messages until `on_change`, called after each batch, says that the work is done."""
    job = leader.job
    while True:
        now = yield Now()
        if (yield Wait(keys.log(leader.next_slot), max(0.0, job.due() - now) if job.due() < inf else inf)):
            events = yield from _read(keys, seal, leader)
            now = yield Now()
            for event in events:
                job.apply(event, now)
        else:
            now = yield Now()
        yield from _write(keys, seal, leader, job.decide(now))
        if on_change(job):
            return


def _write(keys: Keys, seal: Seal, leader: Leader, mail: list[tuple[str, Message]]) -> Steps[None]:
    for start in range(0, len(mail), MAIL_AT_ONCE):
        names, values = [], []
        for node_id, message in mail[start : start + MAIL_AT_ONCE]:
            number = leader.sent.get(node_id, 0)
            leader.sent[node_id] = number + 1
            key = keys.mail(node_id, number)
            names.append(key)
            values.append(seal.seal(key, encode(message)))
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
    events = []
    for name, value in zip(names, values or (), strict=False):
        if value == _GAP:
            continue
        try:
            events.append(decode_event(seal.open(name, value)))
        except (SealBrokenError, msgspec.MsgspecError, ValueError):
            leader.forged += 1
    return events


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


_LONG = timedelta(days=20)  # torch hands the milliseconds to poll(2), whose argument has 32 bits


def _perform(operation: Operation, store: "TCPStore", now: Callable[[], float]) -> Any:
    match operation:
        case Now():
            return now()
        case Add(key, amount):
            return store.add(key, amount)
        case CompareSet(key, desired):
            return store.compare_set(key, "", desired)  # type: ignore[arg-type]  # torch takes bytes too
        case Get(key):
            value: bytes | None = None
            while value is None:
                value = _unless_late(store, inf, lambda: store.get(key))
            return value
        case Wait(key, seconds):
            return _is_there([key], seconds, store)
        case MultiGet(keys, seconds):
            return _unless_late(store, seconds, lambda: store.multi_get(keys))
        case MultiSet(keys, values):
            store.multi_set(keys, values)  # type: ignore[attr-defined]  # torch's stub has forgotten it
        case Delete(key):
            store.delete_key(key)
    return None


def _is_there(keys: list[str], seconds: float, store: "TCPStore") -> bool:
    if seconds <= 0:
        return bool(store.check(keys))
    return _unless_late(store, seconds, lambda: store.wait(keys) or True) is not None


def _unless_late(store: "TCPStore", seconds: float, read: Callable[[], _T]) -> _T | None:
    """Give what `read` reads, None when that is not there within so many seconds.

    Torch's get waits by itself for as long as the store's timeout says: one round trip less than after a wait.
    """
    from torch.distributed import DistStoreError

    store.set_timeout(_LONG if seconds == inf else timedelta(seconds=seconds))
    try:
        return read()
    except DistStoreError:
        return None
