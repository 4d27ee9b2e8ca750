"""Nodes and leader over a real store: all rounds, gaps in the log, forged records, and a constant cost a node."""

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from math import inf
from queue import SimpleQueue
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from ft_launcher.causes import Exited
from ft_launcher.exchange import (
    GROUP,
    GROUPS,
    Add,
    CompareSet,
    Delete,
    Get,
    Keys,
    Leader,
    Mailbox,
    MultiGet,
    MultiSet,
    Now,
    Operation,
    Steps,
    Wait,
    append,
    close_mailbox,
    fill_gap,
    gather,
    lead,
    perform,
    receive,
    say_ready,
    tidy,
)
from ft_launcher.job_rendezvous import BOUNDED_RESOLVER
from ft_launcher.policy import NodeState
from ft_launcher.records import Assigned, End, Event, Joined, Left, Lost, Message, Ready, Reported, Stop, encode
from ft_launcher.rounds import Job
from ft_launcher.seal import SEAL_BYTES, Seal, SealBrokenError
from tests.conftest import GENEROUS
from tests.unit.leading import World

SEAL = Seal(b"a token of the job's own")
KEYS = Keys("0123456789abcdef", "one-incarnation")
_T = TypeVar("_T")


def client(server: TCPStore) -> TCPStore:
    return TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=GENEROUS))


def start_store() -> TCPStore:
    """Start a store as the host does, on a socket of IPv4: else torch looks up the names of ::ffff:127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        return TCPStore(
            "127.0.0.1",
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            timeout=timedelta(seconds=GENEROUS),
        )


@pytest.fixture(autouse=True)
def bounded_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a launcher: torch looks up the name of whoever connects."""
    monkeypatch.setenv("RES_OPTIONS", BOUNDED_RESOLVER)


@pytest.fixture
def server() -> TCPStore:
    """A store such as the host runs."""
    return start_store()


def run(work: Callable[[], _T]) -> "Future[_T]":
    """Do the work on a thread of its own."""
    future: Future[_T] = Future()

    def target() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (handed to the test, whatever it is)
            future.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    return future


def counted(steps: Steps[_T], operations: Counter[str], sizes: list[int] | None = None) -> Steps[_T]:
    """Count the operations, and the bytes of all values that are read and written."""
    result: Any = None
    while True:
        try:
            operation = steps.send(result)
        except StopIteration as end:
            value: _T = end.value
            return value
        operations[type(operation).__name__] += 1
        result = yield operation
        if sizes is not None:
            sizes += [len(each) for each in (result, getattr(operation, "value", None)) if isinstance(each, bytes)]


class Node(threading.Thread):
    """A node as its launcher would drive it, on a connection of its own."""

    def __init__(self, world: World, name: str, store: TCPStore, keys: Keys = KEYS, seal: Seal = SEAL) -> None:
        super().__init__(daemon=True)
        self.name = name
        self.world, self.store, self.keys, self.seal = world, store, keys, seal
        self.operations: Counter[str] = Counter()
        self.sizes: list[int] = []
        self.places: list[Assigned] = []
        self.end: End | None = None
        self.mailbox = Mailbox(name)

    def go(self, steps: Steps[_T]) -> _T:
        return perform(counted(steps, self.operations, self.sizes), self.store, time.monotonic)

    def tell(self, event: Event) -> None:
        self.go(append(self.keys, self.seal, event))

    def hear(self) -> Message | None:
        return self.go(receive(self.keys, self.seal, self.mailbox))

    def be_ready(self, round_: int) -> None:
        self.go(say_ready(self.keys, self.seal, Ready(self.name, 40000), round_))

    def enter(self) -> None:
        self.tell(Joined(self.world.node(self.name)))
        self.tell(Ready(self.name, 40000))

    def run(self) -> None:
        """Train; whose group rank is the round's number fails, until nobody has that rank."""
        self.enter()
        while True:
            match self.hear():
                case Assigned() as place:
                    self.places.append(place)
                    round_ = place.memory.round
                    if round_ == place.group_rank:
                        self.tell(Reported(self.name, round_, NodeState.FAILED, Exited(round_), place.rank))
                    elif round_ >= place.group_world_size:
                        self.tell(Reported(self.name, round_, NodeState.SUCCEEDED))
                case Stop(round_):
                    self.be_ready(round_)
                case End() as end:
                    self.end = end
                    self.tell(Left(self.name))
                    return


def start_leader(
    world: World, server: TCPStore, keys: Keys = KEYS, until: Callable[[Job], bool] | None = None
) -> tuple[Leader, "Future[None]"]:
    """Lead until the job has ended and all have left, and gather the nodes between the rounds."""
    leader = Leader(Job(world.settings, world.node("n0"), time.monotonic()))
    is_done: Callable[[Job], bool] = until or (lambda job: job.outcome is not None and job.is_empty)
    stopped: SimpleQueue[tuple[int, list[str]] | None] = SimpleQueue()
    one, other = client(server), client(server)

    def lead_all() -> None:
        steps = lead(keys, SEAL, leader, is_done, lambda *each: stopped.put(each))
        perform(steps, one, time.monotonic)
        stopped.put(None)
        gathered.result(GENEROUS)

    def gather_all() -> None:
        while (each := stopped.get()) is not None:
            perform(gather(keys, SEAL, *each), other, time.monotonic)

    gathered = run(gather_all)
    return leader, run(lead_all)


def nobody_stops(_: int, __: list[str]) -> None:
    raise AssertionError("nobody was to be stopped")


def play(server: TCPStore, count: int, keys: Keys = KEYS) -> tuple[Leader, list[Node]]:
    """Let `count` nodes come at once, and train to the end."""
    world = World(count, count, max_restarts=count)
    leader, led = start_leader(world, server, keys)
    nodes = [Node(world, f"n{number}", client(server), keys) for number in range(count)]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join(GENEROUS)
        assert not node.is_alive(), f"{node.name}: {node.places} {leader.job.memory}"
    led.result(GENEROUS)
    return leader, nodes


def test_eight_nodes_have_the_same_rounds_and_the_same_end(server: TCPStore) -> None:
    leader, nodes = play(server, 8)
    for round_ in range(9):
        places = [node.places[round_] for node in nodes]
        assert sorted(each.group_rank for each in places) == list(range(8))
        assert [each.group_rank for each in places] == list(range(8)), "everybody keeps its rank"
        assert {each.memory for each in places} == {places[0].memory}
        assert (places[0].memory.round, places[0].memory.restarts) == (round_, round_)
        assert len({(each.store_address, each.store_port, each.reason) for each in places}) == 1
    assert all(len(node.places) == 9 for node in nodes)
    assert {node.end for node in nodes} == {End(None)}
    assert leader.forged == 0


def test_V5_64_nodes_that_come_at_once_have_the_same_constant_cost(server: TCPStore) -> None:
    costs, most_bytes = {}, {}
    connections = [client(server) for _ in range(8)]
    for count in (4, 16, 64):
        world = World(count, count)
        keys = Keys("0123456789abcdef", f"with-{count}")
        leader = Leader(Job(world.settings, world.node("n0"), time.monotonic()))
        is_formed: Callable[[Job], bool] = lambda job: job.memory.round == 0  # noqa: E731
        steps = lead(keys, SEAL, leader, is_formed, nobody_stops)
        led = run(lambda: perform(steps, client(server), time.monotonic))  # noqa: B023
        nodes = [Node(world, f"n{number}", connections[number % 8], keys) for number in range(count)]
        comings = [run(lambda those=nodes[first::8]: [node.enter() for node in those]) for first in range(8)]  # type: ignore[misc]
        for coming in comings:
            coming.result(GENEROUS)
        led.result(GENEROUS)
        places = [node.hear() for node in nodes]
        assert sorted(each.group_rank for each in places if isinstance(each, Assigned)) == list(range(count))
        costs[count] = {tuple(sorted(node.operations.items())) for node in nodes}
        most_bytes[count] = max(sum(node.sizes) for node in nodes)
    assert costs[4] == costs[16] == costs[64] == {(("Add", 2), ("CompareSet", 2), ("Get", 1))}
    # One byte more for each digit more of a count.
    assert most_bytes[64] < most_bytes[4] + 64


def test_a_node_has_the_same_cost_in_each_round(server: TCPStore) -> None:
    for count in (2, 8):
        keys = Keys("0123456789abcdef", f"with-{count}")
        _, nodes = play(server, count, keys)
        for node in nodes:
            rounds = len(node.places)
            # Joined, ready for the first time; one failure, and success; left. And then ready for the other rounds.
            assert node.operations["Add"] == node.operations["CompareSet"] == 2 + 2 + 1
            assert node.operations["MultiSet"] == rounds - 1
            assert node.operations["Get"] == 2 * rounds
            assert len(node.mailbox.used) == 2 * rounds + rounds - 1


# -- between two rounds -------------------------------------------------------------------------------------------


class Between:
    """Nodes that have trained together and were told to stop, since the first one has failed."""

    def __init__(self, server: TCPStore, names: str, min_nodes: int = 2, join_timeout: float = 600.0) -> None:
        self.world = World(min_nodes, len(names.split()))
        timing = replace(self.world.settings.timing, join_timeout=join_timeout)
        self.world.settings = replace(self.world.settings, timing=timing)
        self.leader, self.led = start_leader(self.world, server)
        connection = client(server)  # one for all, since they do one thing after the other
        self.nodes = [Node(self.world, name, connection) for name in names.split()]
        for node in self.nodes:
            node.enter()
        for node in self.nodes:
            assert isinstance(node.hear(), Assigned)
        self.fail()

    def fail(self) -> None:
        first = self.nodes[0]
        first.tell(Reported(first.name, self.leader.job.memory.round, NodeState.FAILED, Exited(1), 0))
        for node in self.nodes:
            assert isinstance(node.hear(), Stop)

    def form_again(self, *nodes: Node, round_: int = 1) -> None:
        """These, and nobody else, have a place in this round."""
        for rank, node in enumerate(nodes):
            place = node.hear()
            assert isinstance(place, Assigned), place
            assert (place.memory.round, place.group_rank, place.group_world_size) == (round_, rank, len(nodes))

    def end(self) -> None:
        """All is well; and then there is nobody who waits."""
        for node in self.nodes:
            node.tell(Reported(node.name, self.leader.job.memory.round, NodeState.SUCCEEDED))
        for node in self.nodes:
            node.tell(Left(node.name))
        self.led.result(GENEROUS)


@pytest.mark.parametrize(("count", "groups"), [(2 * GROUP + 1, 3), (GROUPS * GROUP + 1, GROUPS)])
def test_nodes_are_heard_in_groups_and_in_few_however_many_they_are(server: TCPStore, count: int, groups: int) -> None:
    between = Between(server, " ".join(f"n{number}" for number in range(count)), min_nodes=count)
    before = between.leader.next_slot
    for node in reversed(between.nodes):
        node.be_ready(0)
    between.form_again(*between.nodes)
    assert between.leader.next_slot - before == groups
    assert between.leader.forged == 0
    between.end()


@pytest.mark.parametrize("how", [Lost("n2", "its launcher died"), Left("n2")])
@pytest.mark.parametrize("is_early", [True, False])
def test_a_node_that_goes_while_all_stop_is_not_waited_for(server: TCPStore, how: Event, *, is_early: bool) -> None:
    between = Between(server, "n0 n1 n2")
    n0, n1, _ = between.nodes
    if is_early:
        n0.tell(how)
    n0.be_ready(0)
    n1.be_ready(0)
    if not is_early:
        n0.tell(how)
    between.form_again(n0, n1)
    between.nodes.pop()
    between.end()


def test_a_node_that_was_ready_before_it_was_told_to_stop_says_so_in_the_log(server: TCPStore) -> None:
    between = Between(server, "n0 n1")
    n0, n1 = between.nodes
    n1.tell(Ready("n1", 40000))
    n0.be_ready(0)
    between.form_again(n0, n1)
    # What the store was asked to wait for then is not mistaken for the end of the next round.
    between.fail()
    n1.be_ready(1)
    n0.be_ready(1)
    between.form_again(n0, n1, round_=2)
    between.end()


@pytest.mark.parametrize("kind", ["garbage", "another node's", "another round's", "no readiness", "gap"])
def test_V4_a_node_whose_readiness_was_forged_is_asked_again(server: TCPStore, kind: str) -> None:
    between = Between(server, "n0 n1")
    n0, n1 = between.nodes
    key = KEYS.ready("n1", 0)
    forged = {
        "garbage": b"garbage",
        "another node's": SEAL.seal(key, encode(Ready("n0", 1))),
        "another round's": SEAL.seal(KEYS.ready("n1", 7), encode(Ready("n1", 1))),
        "no readiness": SEAL.seal(key, encode(Left("n1"))),
        "gap": b"gap",
    }
    client(server).set(key, forged[kind])  # type: ignore[arg-type]
    n0.be_ready(0)
    assert isinstance(n1.hear(), Stop)
    n1.tell(Ready("n1", 40000))
    between.form_again(n0, n1)
    between.end()


def test_who_has_not_stopped_is_named_when_the_time_is_over(server: TCPStore) -> None:
    between = Between(server, "n0 n1 n2", join_timeout=0.5)
    n0, n1, n2 = between.nodes
    n0.be_ready(0)
    n2.be_ready(0)
    for node in (n0, n2):
        end = node.hear()
        assert isinstance(end, End)
        assert "3 nodes are there (n0, n1, n2), and n1 did not stop its workers" in str(end.cause)
    assert isinstance(n1.hear(), End)
    between.end()


# -- the log ------------------------------------------------------------------------------------------------------


def take_a_slot(store: TCPStore, event: Event) -> tuple[Steps[None], CompareSet]:
    """Let a node do the first half of telling: it has a place in the log, and nothing is there."""
    steps = append(KEYS, SEAL, event)
    add = next(steps)
    assert isinstance(add, Add)
    compare_set = steps.send(store.add(add.key, add.amount))
    assert isinstance(compare_set, CompareSet)
    return steps, compare_set


def test_a_node_that_dies_in_the_middle_of_telling_does_not_stop_the_others(server: TCPStore) -> None:
    world = World(2, 2)
    store = client(server)
    take_a_slot(store, Joined(world.node("n9")))
    leader, led = start_leader(world, server)
    nodes = [Node(world, name, client(server)) for name in ("n0", "n1")]
    for node in nodes:
        node.start()
    # As the host does when a lifeline ends.
    perform(append(KEYS, SEAL, Lost("n9", "its launcher died")), store, time.monotonic)
    perform(fill_gap(KEYS, leader.next_slot), store, time.monotonic)
    for node in nodes:
        node.join(GENEROUS)
    led.result(GENEROUS)
    assert {node.end for node in nodes} == {End(None)}
    assert leader.forged == 0


def test_a_gap_among_what_has_come_is_closed_by_the_leader_itself(server: TCPStore) -> None:
    world, store = World(2, 2), client(server)
    tell = lambda event: perform(append(KEYS, SEAL, event), store, time.monotonic)  # noqa: E731
    tell(Joined(world.node("n0")))
    take_a_slot(store, Joined(world.node("n9")))
    tell(Ready("n0", 1))
    tell(Joined(world.node("n1")))
    tell(Ready("n1", 1))
    leader = Leader(Job(world.settings, world.node("n0"), time.monotonic()))
    perform(lead(KEYS, SEAL, leader, lambda job: job.memory.round == 0, nobody_stops), store, time.monotonic)
    assert leader.next_slot == 6
    assert [node.id for node in leader.job.nodes] == ["n0", "n1"]


def test_who_was_too_slow_for_its_place_in_the_log_takes_another(server: TCPStore) -> None:
    store = client(server)
    steps, compare_set = take_a_slot(store, Left("n9"))
    perform(fill_gap(KEYS, 1), store, time.monotonic)
    again = steps.send(store.compare_set(compare_set.key, "", compare_set.value))  # type: ignore[arg-type]
    assert again == Add(KEYS.count, 1)
    second = steps.send(store.add(KEYS.count, 1))
    assert second == CompareSet(KEYS.log(2), SEAL.seal(KEYS.log(2), encode(Left("n9"))))


def test_a_full_place_is_not_made_a_gap(server: TCPStore) -> None:
    store = client(server)
    perform(append(KEYS, SEAL, Left("n9")), store, time.monotonic)
    perform(fill_gap(KEYS, 1), store, time.monotonic)
    assert SEAL.open(KEYS.log(1), store.get(KEYS.log(1))) == encode(Left("n9"))


def test_the_leader_wakes_when_something_is_due_although_nothing_is_told(server: TCPStore) -> None:
    world, store = World(1, 2), client(server)
    timing = replace(world.settings.timing, last_call_timeout=0.2)
    leader = Leader(Job(replace(world.settings, timing=timing), world.node("n0"), time.monotonic()))
    for event in (Joined(world.node("n0")), Ready("n0", 1)):
        perform(append(KEYS, SEAL, event), store, time.monotonic)
    perform(lead(KEYS, SEAL, leader, lambda job: job.memory.round == 0, nobody_stops), store, time.monotonic)
    message = perform(receive(KEYS, SEAL, Mailbox("n0")), store, time.monotonic)
    assert isinstance(message, Assigned)


# -- what a store holds that no node wrote ----------------------------------------------------------------------------


class Table:
    """A store without waiting, for what would take a real one minutes: whoever waits for what is not there, ends."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.count = 0

    def perform(self, steps: Steps[Any]) -> None:
        result: Any = None
        try:
            while True:
                result = self._operation(steps.send(result))
        except (StopIteration, TimeoutError):
            return

    def _operation(self, operation: Operation) -> Any:
        match operation:
            case Now():
                return 0.0
            case Add(_, amount):
                self.count += amount
                return self.count
            case CompareSet(key, value):
                return self.values.setdefault(key, value)
            case Wait(keys, _):
                if not all(key in self.values for key in keys):
                    raise TimeoutError
                return True
            case MultiGet(keys, _):
                return [self.values[key] for key in keys] if all(key in self.values for key in keys) else None
            case MultiSet(keys, values):
                self.values |= dict(zip(keys, values, strict=True))
            case Get(key):
                return self.values[key]
            case Delete(key):
                del self.values[key]
        return None


def forgeries(count: int, world: World) -> Iterator[tuple[str, bytes]]:
    """Give so many places of the log with values that no node of this job wrote there."""
    chance = random.Random(4)
    other_job, other_run = Seal(b"the token of another job"), Keys("0123456789abcdef", "another-incarnation")
    event = encode(Lost("n0", "forged"))
    genuine = SEAL.seal(KEYS.log(count + 1), encode(Joined(world.node("n0"))))
    kinds: list[Callable[[int], bytes]] = [
        lambda _: chance.randbytes(chance.randrange(200)),
        lambda slot: SEAL.seal(KEYS.log(slot), event)[: chance.randrange(40)],
        lambda slot: SEAL.seal(KEYS.log(slot), event) + b"\0",
        lambda slot: flipped(SEAL.seal(KEYS.log(slot), event), chance),
        lambda _: event,  # without a seal
        lambda slot: other_job.seal(KEYS.log(slot), event),
        lambda slot: SEAL.seal(KEYS.log(slot + 1), event),  # replayed from another place
        lambda slot: SEAL.seal(other_run.log(slot), event),  # and from an earlier run of the job
        lambda _: SEAL.seal(KEYS.mail("n0", 0), event),
        lambda _: genuine,
        lambda _: bytes(SEAL_BYTES),
        lambda _: b"",
        lambda slot: SEAL.seal(KEYS.log(slot), chance.randbytes(40)),  # by a node that has gone mad
        lambda slot: SEAL.seal(KEYS.log(slot), encode(End(None))),  # no event
    ]
    for slot in range(1, count + 1):
        yield KEYS.log(slot), kinds[slot % len(kinds)](slot)


def flipped(value: bytes, chance: random.Random) -> bytes:
    """Give the value with one bit changed."""
    changed = bytearray(value)
    changed[chance.randrange(len(value))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def test_V4_of_100000_forged_records_none_is_accepted_and_all_are_counted() -> None:
    world, table = World(1, 1), Table()
    table.values = dict(forgeries(100_000, world))
    table.count = 100_000
    leader = Leader(Job(world.settings, world.node("n0"), 0.0))
    table.perform(lead(KEYS, SEAL, leader, lambda job: False, nobody_stops))
    assert leader.forged == 100_000
    assert leader.next_slot == 100_001
    assert list(leader.job.nodes) == []
    assert leader.job.outcome is None
    assert not [key for key in table.values if "/mail/" in key]


def test_V4_what_nodes_tell_between_forged_records_is_heard_in_its_order() -> None:
    world, table = World(2, 2), Table()
    events: list[Event] = [Joined(world.node("n0")), Ready("n0", 1), Joined(world.node("n1")), Ready("n1", 1)]
    forged = dict(forgeries(1000, world))
    for slot, event in zip((3, 400, 401, 990), events, strict=True):
        forged[KEYS.log(slot)] = SEAL.seal(KEYS.log(slot), encode(event))
    table.values, table.count = forged, 1000
    leader = Leader(Job(world.settings, world.node("n0"), 0.0))
    table.perform(lead(KEYS, SEAL, leader, lambda job: False, nobody_stops))
    assert leader.forged == 996
    assert leader.job.memory.round == 0


def test_V4_strangers_that_write_into_the_log_without_counting_stop_nobody(server: TCPStore) -> None:
    world, stranger = World(2, 2), client(server)
    for slot in (1, 2, 3, 7):
        stranger.set(KEYS.log(slot), "garbage")
    leader, led = start_leader(world, server)
    nodes = [Node(world, name, client(server)) for name in ("n0", "n1")]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join(GENEROUS)
    led.result(GENEROUS)
    assert {node.end for node in nodes} == {End(None)}
    assert leader.forged >= 4


def test_V4_a_forged_message_is_refused_and_the_leaders_own_still_comes(server: TCPStore) -> None:
    store, stranger = client(server), client(server)
    key = KEYS.mail("n0", 0)
    stop = encode(End(None))
    elsewhere = [SEAL.seal(other, stop) for other in (KEYS.mail("n1", 0), KEYS.mail("n0", 1))]
    for forged in (b"garbage", b"closed", b"gap", b"", stop, *elsewhere, bytes(40)):
        stranger.set(key, forged)  # type: ignore[arg-type]
        with pytest.raises(SealBrokenError):
            perform(receive(KEYS, SEAL, Mailbox("n0")), store, time.monotonic)
    stranger.set(key, SEAL.seal(key, b"sealed nonsense"))  # type: ignore[arg-type]
    with pytest.raises(ValueError):  # noqa: PT011 (msgspec's own)
        perform(receive(KEYS, SEAL, Mailbox("n0")), store, time.monotonic)
    stranger.set(key, SEAL.seal(key, stop))  # type: ignore[arg-type]
    assert perform(receive(KEYS, SEAL, Mailbox("n0")), store, time.monotonic) == End(None)


def test_V1_what_an_earlier_job_has_left_in_the_store_is_never_read(server: TCPStore) -> None:
    earlier = Keys("0123456789abcdef", "an-earlier-incarnation")
    play(server, 2, earlier)  # with nodes of the same names
    touched: list[str] = []

    def watched(steps: Steps[_T]) -> Steps[_T]:
        result: Any = None
        while True:
            try:
                operation = steps.send(result)
            except StopIteration as end:
                value: _T = end.value
                return value
            names = getattr(operation, "keys", None) or getattr(operation, "key", [])
            touched.extend([names] if isinstance(names, str) else names)
            result = yield operation

    world, store = World(2, 2), client(server)
    leader = Leader(Job(world.settings, world.node("n0"), time.monotonic()))
    for name in ("n0", "n1"):
        for event in (Joined(world.node(name)), Ready(name, 1)):
            perform(watched(append(KEYS, SEAL, event)), store, time.monotonic)
    perform(watched(lead(KEYS, SEAL, leader, lambda job: job.memory.round == 0, nobody_stops)), store, time.monotonic)
    for name in ("n0", "n1"):
        message = perform(watched(receive(KEYS, SEAL, Mailbox(name))), store, time.monotonic)
        assert isinstance(message, Assigned)
        assert message.memory.restarts == 0
    assert all(key.startswith("0123456789abcdef/one-incarnation/") for key in touched)
    assert leader.forged == 0


def test_what_was_read_is_deleted_when_there_is_time_for_it(server: TCPStore) -> None:
    store, mailbox = client(server), Mailbox("n0")
    first, second = KEYS.mail("n0", 0), KEYS.mail("n0", 1)
    for key in (first, second):
        store.set(key, SEAL.seal(key, encode(End(None))))  # type: ignore[arg-type]
    assert perform(receive(KEYS, SEAL, mailbox), store, time.monotonic) == End(None)
    perform(tidy(mailbox.used), store, time.monotonic)
    assert not store.check([first])
    assert store.check([second])
    assert perform(receive(KEYS, SEAL, mailbox), store, time.monotonic) == End(None)


class Impatient(TCPStore):
    """A connection on which even the longest wait is soon over; `tries` tells of each."""

    tries: "SimpleQueue[str]"

    def set_timeout(self, timeout: timedelta) -> None:
        super().set_timeout(min(timeout, timedelta(seconds=0.05)))

    def get(self, key: str) -> bytes:
        self.tries.put(key)
        return super().get(key)

    def wait(self, keys: list[str]) -> None:  # type: ignore[override]
        self.tries.put(keys[0])
        super().wait(keys)


@pytest.mark.parametrize("operation", [Get("key"), Wait(["key"], inf)])
def test_a_wait_without_an_end_outlasts_the_longest_that_torch_can_wait(server: TCPStore, operation: Operation) -> None:
    waiting = Impatient("127.0.0.1", server.port, is_master=False)
    waiting.tries = SimpleQueue()

    def steps() -> Steps[object]:
        return (yield operation)

    result = run(lambda: perform(steps(), waiting, time.monotonic))
    for _ in range(3):
        waiting.tries.get(timeout=GENEROUS)
    client(server).set("key", "there")
    assert result.result(GENEROUS) in (b"there", True)


def test_who_waits_for_mail_is_woken_when_the_mailbox_is_closed(server: TCPStore) -> None:
    waiting, store = client(server), client(server)
    message = run(lambda: perform(receive(KEYS, SEAL, Mailbox("n0")), waiting, time.monotonic))
    perform(close_mailbox(KEYS, SEAL, Mailbox("n0")), store, time.monotonic)
    assert message.result(GENEROUS) is None


def test_mail_that_has_come_is_not_lost_by_closing_the_mailbox(server: TCPStore) -> None:
    store = client(server)
    key = KEYS.mail("n0", 0)
    store.set(key, SEAL.seal(key, encode(End(None))))  # type: ignore[arg-type]
    perform(close_mailbox(KEYS, SEAL, Mailbox("n0")), store, time.monotonic)
    assert perform(receive(KEYS, SEAL, Mailbox("n0")), store, time.monotonic) == End(None)


def test_the_loss_of_the_store_is_no_timeout() -> None:
    server = start_store()
    world = World(1, 1)
    one, other = client(server), client(server)
    leader = Leader(Job(world.settings, world.node("n0"), time.monotonic()))
    waits: list[Future[Any]] = [
        run(lambda: perform(receive(KEYS, SEAL, Mailbox("n0")), one, time.monotonic)),
        run(lambda: perform(lead(KEYS, SEAL, leader, lambda job: False, nobody_stops), other, time.monotonic)),
    ]
    del server
    for each in waits:
        with pytest.raises(DistError):
            each.result(GENEROUS)
