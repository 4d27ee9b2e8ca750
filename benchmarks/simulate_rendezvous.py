"""What a round costs with up to 10,000 nodes: the launcher's own code in virtual time, on a model of torch's store.

The nodes run `exchange.append`, `say_ready` and `receive`, the host `lead` with the real `Job` and `gather`; the store
is a model: a server that takes one request after the other, each for as long as a real TCPStore needed for it. Those
costs are in tcpstore_costs.json beside this file; `--measure` takes them anew. Requests and bytes are counted as they
would be on the wire, for every node and for the leader; they do not depend on the costs but for how many events the
leader finds at once. Prints a table, says how the sums grow, and draws them (`--plot`).
"""

import argparse
import gc
import heapq
import json
import math
import os
import select
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_rendezvous import KEYS, SEAL, node, open_store, settings
from tcpstore_wire import Connection, answer_bytes, frames, perform_one

from ft_launcher.causes import Exited
from ft_launcher.exchange import (
    Add,
    CompareSet,
    Delete,
    Get,
    Leader,
    Mailbox,
    MultiGet,
    MultiSet,
    Now,
    Operation,
    Steps,
    Wait,
    append,
    gather,
    lead,
    receive,
    say_ready,
    tidy,
)
from ft_launcher.policy import NodeState
from ft_launcher.records import Assigned, Event, Joined, Message, Ready, Reported, Stop
from ft_launcher.rounds import Job

RECORDED = Path(__file__).with_name("tcpstore_costs.json")

# -- what a real store needs ------------------------------------------------------------------------------------------

BODY = b"x" * 150
"""As long as the records that are exchanged."""

MANY = 100
"""Keys of a request that has several, where they are measured."""


@dataclass(frozen=True)
class Costs:
    """Seconds of the server's CPU."""

    add: float
    compare_set: float
    wait: float  # for a key that is there
    get: float
    delete: float
    wake: float  # of one blocked WAIT
    per_key: float  # of a MULTI_SET, MULTI_GET or WAIT of many keys
    per_byte: float

    def of(self, operation: Operation, index: int, moved: int) -> float:
        """Give the time for the `index`-th request of an operation, with so many bytes both ways."""
        match operation:
            case Add():
                base = self.add
            case CompareSet():
                base = self.compare_set
            case Delete():
                base = self.delete
            case MultiSet(keys, _) | MultiGet(keys, _):
                base = self.wait + self.per_key * len(keys)
            case Wait(keys, _):
                base = self.wait + self.per_key * (len(keys) - 1)
            case Get() if index:
                base = self.get
            case _:
                base = self.wait
        return base + self.per_byte * max(0, moved - 2 * len(BODY))


def serve() -> None:
    """Be a store; say how much CPU its thread has used whenever a line comes."""
    store = open_store()
    print(store.port, flush=True)
    for _ in sys.stdin:
        print(time.process_time() - time.thread_time(), flush=True)


class _Server:
    def __init__(self) -> None:
        command = [sys.executable, __file__, "--serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def cpu(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(repeats: int) -> Costs:
    """Have a real TCPStore do each kind of request `repeats` times from several connections, and give what it used."""
    server = _Server()
    try:
        connections = [Connection(("127.0.0.1", server.port)) for _ in range(MANY)]

        def cost(make: Callable[[int], Operation]) -> float:
            before = server.cpu()
            for first in range(0, repeats, MANY):
                _all(connections, [make(first + at) for at in range(MANY)])
            return (server.cpu() - before) / repeats

        add = cost(lambda _: Add("count", 1))
        compare_set = cost(lambda at: CompareSet(f"slot/{at}", BODY))
        wait = cost(lambda at: Wait([f"slot/{at}"], 1.0))
        get = cost(lambda at: Get(f"slot/{at}")) - wait
        delete = cost(lambda at: Delete(f"slot/{at}"))
        names = [f"many/{at}" for at in range(MANY)]
        before = server.cpu()
        for _ in range(repeats // MANY):
            perform_one(connections[0], MultiSet(names, [BODY] * MANY))
            perform_one(connections[0], MultiGet(names, 1.0))
        per_key = (server.cpu() - before) / repeats / 3  # a MULTI_SET, a WAIT and a MULTI_GET
        large = b"x" * 100_000
        before = server.cpu()
        for at in range(repeats // 10):
            perform_one(connections[0], CompareSet(f"large/{at}", large))
        per_byte = max(0.0, ((server.cpu() - before) / (repeats // 10) - compare_set) / (2 * len(large)))
        before = server.cpu()
        for at in range(repeats // MANY):
            keys = [f"wake/{at}/{each}" for each in range(MANY)]
            ended: list[Any] = []
            for connection, key in zip(connections[1:], keys[1:], strict=True):
                connection.start(_one(Wait([key], 60.0)), ended.append)
            perform_one(connections[0], MultiSet(keys, [b""] * MANY))
            _until(connections, ended, MANY - 1)
        wake = max(0.0, (server.cpu() - before) / repeats - wait - per_key)
        return Costs(add, compare_set, wait, get, delete, wake, per_key, per_byte)
    finally:
        server.close()


def _one(operation: Operation) -> Generator[Operation, Any, Any]:
    return (yield operation)


def _all(connections: Sequence[Connection], operations: Sequence[Operation]) -> None:
    ended: list[Any] = []
    for connection, operation in zip(connections, operations, strict=True):
        connection.start(_one(operation), ended.append)
    _until(connections, ended, len(operations))


def _until(connections: Sequence[Connection], ended: list[Any], wanted: int) -> None:
    by_fd = {each.sock.fileno(): each for each in connections}
    with select.epoll() as epoll:
        for fd in by_fd:
            epoll.register(fd, select.EPOLLIN)
        while len(ended) < wanted:
            for fd, _ in epoll.poll(10):
                by_fd[fd].readable()


# -- virtual time -----------------------------------------------------------------------------------------------------


class World:
    """A clock, and what happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, when: float, then: Callable[..., None], *arguments: Any) -> None:
        """Have something happen."""
        self._count += 1
        heapq.heappush(self._events, (when, self._count, then, arguments))

    def run(self, done: Callable[[], bool]) -> None:
        """Let time pass until `done`."""
        while not done():
            if not self._events:
                raise RuntimeError("nothing is going to happen any more: somebody waits for ever")
            self.now, _, then, arguments = heapq.heappop(self._events)
            then(*arguments)


@dataclass
class _Blocked:
    """A WAIT whose keys are not all there."""

    client: "Client"
    missing: int
    is_over: bool = False


class ModelStore:
    """What torch's TCPStore does with the requests of exchange.py, one after the other."""

    def __init__(self, world: World, costs: Costs, latency: float) -> None:
        """`latency`: seconds that a message is on its way."""
        self._world, self._costs, self.latency = world, costs, latency
        self._free_at = 0.0
        self.busy = 0.0
        self._values: dict[str, bytes] = {}
        self._counters: dict[str, int] = defaultdict(int)
        self._blocked: dict[str, list[_Blocked]] = defaultdict(list)

    def request(self, client: "Client", operation: Operation, index: int, moved: int) -> None:
        """Take in a request that is sent now."""
        begins = max(self._world.now + self.latency, self._free_at)
        self._work(begins, self._costs.of(operation, index, moved))
        self._world.at(self._free_at, self._serve, client, operation, index)

    def _work(self, begins: float, seconds: float) -> None:
        self._free_at = begins + seconds
        self.busy += seconds

    def _serve(self, client: "Client", operation: Operation, index: int) -> None:
        match operation:
            case Add(key, amount):
                self._counters[key] += amount
                self._answer(client, self._counters[key])
            case CompareSet(key, value):
                if key not in self._values:
                    self._set(key, value)
                self._answer(client, self._values[key])
            case MultiSet(keys, values):
                for key, value in zip(keys, values, strict=True):
                    self._set(key, value)
            case Delete(key):
                self._answer(client, int(self._values.pop(key, None) is not None))
            case Get(key) if index:
                self._answer(client, self._values[key])
            case MultiGet(keys, _) if index:
                self._answer(client, [self._values[key] for key in keys])
            case Get(key):
                self._wait(client, [key], math.inf)
            case Wait(keys, seconds) | MultiGet(keys, seconds):
                self._wait(client, keys, seconds)
            case Now():
                raise TypeError("no store is asked for the time")

    def _wait(self, client: "Client", keys: Sequence[str], seconds: float) -> None:
        missing = [key for key in keys if key not in self._values]
        if not missing:
            self._answer(client, True)
            return
        blocked = _Blocked(client, len(missing))
        for key in missing:
            self._blocked[key].append(blocked)
        if seconds < math.inf:
            self._world.at(self._world.now + seconds, self._give_up, blocked)

    def _give_up(self, blocked: _Blocked) -> None:
        if not blocked.is_over:
            blocked.is_over = True
            self._answer(blocked.client, False)

    def _set(self, key: str, value: bytes) -> None:
        self._values[key] = value
        for blocked in self._blocked.pop(key, ()):
            blocked.missing -= 1
            if not blocked.missing and not blocked.is_over:
                blocked.is_over = True
                self._work(max(self._world.now, self._free_at), self._costs.wake)
                self._world.at(self._free_at, self._answer, blocked.client, True)

    def _answer(self, client: "Client", result: object) -> None:
        self._world.at(self._world.now + self.latency, client.answered, result)


class Client:
    """A connection to the model: it runs generators of exchange.py, and counts."""

    def __init__(self, world: World, store: ModelStore, cpu: Callable[[], float]) -> None:
        """`cpu`: gives the seconds of CPU that the step just made has used on this node."""
        self._world, self._store, self._cpu = world, store, cpu
        self.requests = self.moved = 0
        self._frames: list[tuple[bytes, int, int]] = []

    def start(self, steps: Generator[Operation, Any, Any], on_end: Callable[[Any], None]) -> None:
        """Begin to run `steps`; `on_end` is called with what they give."""
        self._steps, self._on_end = steps, on_end
        self._advance(None)

    def answered(self, result: Any) -> None:
        """Take in the answer to the last request."""
        _, shape, _ = self._frames[self._index]
        values = result if isinstance(result, list) else [result] if isinstance(result, bytes) else []
        self.moved += answer_bytes(shape, values)
        self._index += 1
        if result is False or self._index == len(self._frames):
            # A read whose WAIT was in vain gives None, as torch's does after its timeout.
            in_vain = result is False and isinstance(self._operation, MultiGet)
            self._advance(None if in_vain else result)
        else:
            self._send()

    def _advance(self, result: Any) -> None:
        while True:
            self._cpu()
            try:
                operation = self._steps.send(result)
            except StopIteration as end:
                self._world.at(self._world.now + self._cpu(), self._on_end, end.value)
                return
            spent = self._cpu()
            if isinstance(operation, Now):
                result = self._world.now
                continue
            self._operation, self._frames, self._index = operation, frames(operation), 0
            self._world.at(self._world.now + spent, self._send)
            return

    def _send(self) -> None:
        frame, _, answers = self._frames[self._index]
        self.requests += 1
        self.moved += len(frame)
        # A value that comes back is as long as one of those that went there, which is all that the cost is about.
        self._store.request(self, self._operation, self._index, len(frame) * (1 + bool(answers)))
        if not answers:
            self._advance(None)


class SimulatedNode:
    """One node: a connection for its mailbox, and one for its events."""

    def __init__(self, world: World, store: ModelStore, index: int, n: int, on_message: Callable[..., None]) -> None:
        self.node = node(index, n)
        self._on_message = on_message
        self.inbox, self.outbox = (Client(world, store, _node_cpu) for _ in range(2))
        self._mailbox = Mailbox(self.node.id)
        self._outgoing: list[Steps[None]] = []
        self._listen()

    @property
    def requests(self) -> int:
        """So many requests it has made."""
        return self.inbox.requests + self.outbox.requests

    @property
    def moved(self) -> int:
        """So many bytes went to it and came from it."""
        return self.inbox.moved + self.outbox.moved

    def send(self, event: Event) -> None:
        """Append `event` to the log, behind the others."""
        self._go(append(KEYS, SEAL, event))

    def say_ready(self, round_: int) -> None:
        """Say so after the round that the leader has stopped."""
        self._go(say_ready(KEYS, SEAL, Ready(self.node.id, 40000), round_))

    def tidy(self) -> None:
        """Delete what it has read, as it does when nothing has come or gone for a while."""
        self._go(tidy(self._mailbox.used))

    def _go(self, steps: Steps[None]) -> None:
        self._outgoing.append(steps)
        if len(self._outgoing) == 1:
            self._next()

    def _next(self) -> None:
        self.outbox.start(self._outgoing[0], self._sent)

    def _sent(self, _: None) -> None:
        del self._outgoing[0]
        if self._outgoing:
            self._next()

    def _listen(self) -> None:
        self.inbox.start(receive(KEYS, SEAL, self._mailbox), self._received)

    def _received(self, message: Message | None) -> None:
        self._listen()
        self._on_message(self, message)


NODE_SECONDS = 50e-6
"""From an answer to the next request on a node: torch's client, Python, and the switch to its thread."""


def _node_cpu() -> float:
    return NODE_SECONDS / 2  # asked for twice a step


class _LeaderCpu:
    """What the leader has really used since it was asked last."""

    def __init__(self) -> None:
        self._last = time.thread_time()

    def __call__(self) -> float:
        before, self._last = self._last, time.thread_time()
        return self._last - before


# -- what is simulated ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """A round that was formed anew: a rank failed, all stopped, all were ready, all had their places."""

    nodes: int
    node_requests: list[int] = field(default_factory=list)  # of each node
    node_bytes: list[int] = field(default_factory=list)
    leader_requests: int = 0
    leader_bytes: int = 0
    told: float = 0.0  # seconds from the failure until the last knew
    formed: float = 0.0  # seconds from the first Ready until the last had its place
    store_busy: float = 0.0

    @property
    def requests(self) -> int:
        """Of all together."""
        return sum(self.node_requests) + self.leader_requests

    @property
    def moved(self) -> int:
        """Bytes of all together."""
        return sum(self.node_bytes) + self.leader_bytes


def simulate(n: int, costs: Costs, latency: float, *, with_leader_cpu: bool = True) -> Outcome:
    """Have `n` nodes join, fail once and form again. Without the leader's CPU it is the same at every run."""
    world = World()
    store = ModelStore(world, costs, latency)
    leader = Leader(Job(settings(n), node(0, n), world.now))
    leading, gathering = (Client(world, store, _LeaderCpu() if with_leader_cpu else _node_cpu) for _ in range(2))

    def on_stop(round_: int, node_ids: list[str]) -> None:
        gathering.start(gather(KEYS, SEAL, round_, node_ids), lambda _: None)

    leading.start(lead(KEYS, SEAL, leader, lambda _: False, on_stop), lambda _: None)
    seen: dict[type, int] = defaultdict(int)
    ranks: set[int] = set()

    def on_message(itself: SimulatedNode, message: Message) -> None:
        seen[type(message)] += 1
        if isinstance(message, Assigned):
            ranks.add(message.group_rank)
        elif isinstance(message, Stop):
            itself.say_ready(message.round)

    nodes = [SimulatedNode(world, store, index, n, on_message) for index in range(n)]
    for each in nodes:
        each.send(Joined(each.node))
        each.send(Ready(each.node.id, 40000))
    world.run(lambda: seen[Assigned] == n)
    _rest(world, nodes)
    seen.clear()
    ranks.clear()
    before = [(each.requests, each.moved) for each in nodes]
    host = (leading, gathering)
    host_before = sum(each.requests for each in host), sum(each.moved for each in host)
    busy, began = store.busy, world.now
    outcome = Outcome(n)
    nodes[-1].send(Reported(nodes[-1].node.id, 0, NodeState.FAILED, Exited(1), 8 * n - 8))
    world.run(lambda: seen[Stop] == n)
    outcome.told = world.now - began
    began = world.now
    world.run(lambda: seen[Assigned] == n)
    outcome.formed = world.now - began
    _rest(world, nodes)
    if ranks != set(range(n)):
        raise RuntimeError(f"{len(ranks)} of {n} group ranks were given")
    outcome.node_requests = [each.requests - was for each, (was, _) in zip(nodes, before, strict=True)]
    outcome.node_bytes = [each.moved - was for each, (_, was) in zip(nodes, before, strict=True)]
    outcome.leader_requests = sum(each.requests for each in host) - host_before[0]
    outcome.leader_bytes = sum(each.moved for each in host) - host_before[1]
    outcome.store_busy = store.busy - busy
    return outcome


def _rest(world: World, nodes: Sequence[SimulatedNode]) -> None:
    """Let what is on its way arrive, and the nodes tidy up, so that everybody waits."""
    for each in nodes:
        world.at(world.now + 1.0, each.tidy)
    until: list[bool] = []
    world.at(world.now + 5.0, until.append, True)
    world.run(lambda: bool(until))


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Give the exponent with which `ys` grow: 1 is linear."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    x_mean, y_mean = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)


# -- the plot ---------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, PANEL, GAP = 860, 360, 70, 50, 320, 110
BLUE, ORANGE, INK, GRID = "#2563a8", "#c2571a", "#333", "#ddd"


def draw(outcomes: Sequence[Outcome]) -> str:
    """Give an SVG: what a node costs, and what all cost together, over the number of nodes."""
    xs = [each.nodes for each in outcomes]
    per_node = [each.requests / each.nodes for each in outcomes]
    per_node_bytes = [each.moved / each.nodes / 1000 for each in outcomes]
    sums = [each.requests for each in outcomes]
    sum_bytes = [each.moved / 1000 for each in outcomes]
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *_panel(LEFT, "per node, the leader's work shared out", xs, [(per_node, BLUE), (per_node_bytes, ORANGE)]),
        *_panel(LEFT + PANEL + GAP, "all together", xs, [(sums, BLUE), (sum_bytes, ORANGE)], is_log=True),
        f'<text x="{LEFT}" y="{HEIGHT - 12}" fill="{BLUE}">\u25cf requests to the store</text>',
        f'<text x="{LEFT + 190}" y="{HEIGHT - 12}" fill="{ORANGE}">\u25cf kilobytes moved</text>',
        f'<text x="{LEFT + PANEL + GAP}" y="{HEIGHT - 12}">dashed: proportional to the number of nodes</text>',
        "</svg>",
    ]
    return "\n".join(body) + "\n"


Series = tuple[Sequence[float], str]


def _panel(left: int, title: str, xs: Sequence[int], series: list[Series], *, is_log: bool = False) -> list[str]:
    """Draw one of them. `is_log`: with a logarithmic scale, and lines of proportional growth."""
    bottom = HEIGHT - 80
    values = [value for each, _ in series for value in each]
    low = 10.0 ** math.floor(math.log10(min(values))) if is_log else 0.0
    high = 10.0 ** math.ceil(math.log10(max(values))) if is_log else math.ceil(max(values) / 2) * 2.0

    def x(value: float) -> float:
        return left + PANEL * math.log(value / xs[0]) / math.log(xs[-1] / xs[0])

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if is_log else value / high
        return bottom - (bottom - TOP) * share

    ticks = [low * 10**at for at in range(round(math.log10(high / low)) + 1)] if is_log else range(0, int(high) + 1, 2)
    parts = [f'<text x="{left}" y="{TOP - 18}" font-weight="bold">{title}</text>']
    for tick in ticks:
        parts.append(f'<line x1="{left}" x2="{left + PANEL}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="{GRID}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:,.0f}</text>')
    for each in xs:
        if math.log10(each).is_integer():
            parts.append(f'<text x="{x(each):.1f}" y="{bottom + 18}" text-anchor="middle">{each:,}</text>')
    parts.append(f'<text x="{left + PANEL / 2}" y="{bottom + 36}" text-anchor="middle">nodes</text>')
    for points, colour in series:
        if is_log:
            ends = (points[0], points[0] * xs[-1] / xs[0])
            line = f'x1="{x(xs[0]):.1f}" x2="{x(xs[-1]):.1f}" y1="{y(ends[0]):.1f}" y2="{y(min(ends[1], high)):.1f}"'
            parts.append(f'<line {line} stroke="{colour}" stroke-dasharray="4 4" opacity="0.6"/>')
        else:
            path = " ".join(f"{x(each):.1f},{y(value):.1f}" for each, value in zip(xs, points, strict=True))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for each, value in zip(xs, points, strict=True):
            parts.append(f'<circle cx="{x(each):.1f}" cy="{y(value):.1f}" r="3.5" fill="{colour}"/>')
    return parts


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--nodes", default="10,20,50,100,200,500,1000,2000,5000,10000", help="with commas between")
    made.add_argument("--latency", type=float, default=50e-6, help="seconds from a node to the store; so many back")
    made.add_argument("--measure", action="store_true", help=f"measure a store now, and write {RECORDED.name}")
    made.add_argument("--repeats", type=int, default=20_000, help="requests of each kind for --measure")
    made.add_argument("--plot", type=Path, help="write an SVG here")
    made.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.serve:
        serve()
        return
    if options.measure:
        record = {"load": os.getloadavg()[0], "repeats": options.repeats, "seconds": vars(measure(options.repeats))}
        RECORDED.write_text(json.dumps(record, indent=1) + "\n")
    record = json.loads(RECORDED.read_text())
    costs = Costs(**record["seconds"])
    micros = ", ".join(f"{name} {1e6 * value:.3g}" for name, value in vars(costs).items())
    print(f"costs of a store [us of its CPU]: {micros} (load {record['load']:.1f} when measured)")
    print("one round that is formed anew: a rank fails, all are told, stop, are ready and have their places")
    print(f"{'':>7}{'requests of a node':>20}{'bytes of a node':>18}{'leader':>10}{'':>12}{'all together':>22}", end="")
    print(f"{'virtual time [ms]':>34}")
    print(f"{'nodes':>7}{'median':>12}{'max':>8}{'median':>11}{'max':>7}{'requests':>11}{'bytes':>11}", end="")
    print(f"{'requests':>11}{'bytes':>11}{'told':>10}{'formed':>11}{'store busy':>13}")
    gc.disable()  # a collection among the simulated nodes would be counted as work of the leader
    outcomes = []
    for n in map(int, options.nodes.split(",")):
        each = simulate(n, costs, options.latency)
        outcomes.append(each)
        requests, moved = sorted(each.node_requests), sorted(each.node_bytes)
        print(f"{n:>7}{requests[n // 2]:>12}{requests[-1]:>8}{moved[n // 2]:>11}{moved[-1]:>7}", end="")
        print(f"{each.leader_requests:>11}{each.leader_bytes:>11}{each.requests:>11}{each.moved:>11}", end="")
        print(f"{1000 * each.told:>10.2f}{1000 * each.formed:>11.2f}{1000 * each.store_busy:>13.2f}", flush=True)
    if len(outcomes) > 1:
        xs = [each.nodes for each in outcomes]
        for what, values in (
            ("requests", [each.requests for each in outcomes]),
            ("bytes", [each.moved for each in outcomes]),
        ):
            share = [value / n for value, n in zip(values, xs, strict=True)]
            print(f"{what} of all together grow as n^{slope(xs, values):.3f}: ", end="")
            print(f"{min(share):.2f} to {max(share):.2f} for each node")
    if options.plot:
        options.plot.write_text(draw(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
