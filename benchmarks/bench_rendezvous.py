"""How long a round takes to form again when nothing else is in the way: no workers, no launchers, no torch import.

Ours: the leader of the launcher (`exchange.lead` with the real `Job`) beside a real TCPStore server in one process. The
agents are the launcher's own generators (`exchange.append`, `say_ready`, `receive`) on raw sockets, all of them in one
other process (`--processes`), so that thousands fit on a machine; each has one connection on which it is blocked in its
mailbox, and one to write events. One rank fails, all are told to stop, and all say that they are ready: from the first
of them to the moment when the last has its place. What the agents' sockets cost, all on one core here, is in it; what
each would do with its messages on a machine of its own (see `Agent`) is not.

torch: its dynamic rendezvous with its own code, each agent a thread with a TCPStore client of its own, all in
`next_rendezvous` again. What it moves is counted too.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

from harness import quantile
from tcpstore_wire import Connection, check, frames
from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from ft_launcher.causes import Exited, ShutDown
from ft_launcher.exchange import Keys, Leader, Mailbox, Steps, append, gather, lead, perform, receive, say_ready, tidy
from ft_launcher.formation import Settings, Timing
from ft_launcher.policy import NodeState
from ft_launcher.records import Assigned, End, Event, Joined, Message, Node, Ready, Reported, Requested, Stop, Terms
from ft_launcher.rounds import Job
from ft_launcher.seal import Seal

SEAL = Seal(b"a token of 32 bytes for benchmarks")
KEYS = Keys("0123456789abcdef", "0" * 32)
RANKS = 8
"""Of each node."""

TOGETHER = 16
"""So many agents begin to send before the first answers are looked at."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h

SPARE_DESCRIPTORS = 200
"""For what a process has open beside its connections."""


def node(index: int, n: int) -> Node:
    """Give the `index`-th of `n` nodes."""
    return Node(
        id=f"{index:032x}",
        name=f"node{index}.cluster",
        address=f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}",
        pid=1000 + index,
        local_world_size=RANKS,
        terms=Terms(n, n, "any-failed", 1_000_000, torch="2.13"),
    )


def settings(n: int) -> Settings:
    """Give what the leader of `n` nodes is told."""
    return Settings(node(0, n).terms, Timing(), by_infrastructure=False)


def open_store() -> TCPStore:
    """Open a store's server as the launcher does.

    It looks up the name of whoever connects, on its only thread. Where it listens for IPv4, /etc/hosts has the answer
    for 127.0.0.1; where it opens its own socket, for IPv6 too, a resolver is asked for ::ffff:127.0.0.1.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    return TCPStore(
        "127.0.0.1",
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        timeout=timedelta(seconds=60),
    )


# -- ours: the host ---------------------------------------------------------------------------------------------------


def serve(n: int, profile: str) -> None:
    """Run store and leader until the job ends. Prints the port, and at the end what it cost."""
    store = open_store()
    check("127.0.0.1", store.port)
    gc.collect()
    gc.freeze()  # as the launcher does
    leader = Leader(Job(settings(n), node(0, n), time.monotonic()))
    print(store.port, flush=True)
    stopped: SimpleQueue[tuple[int, list[str]]] = SimpleQueue()
    threading.Thread(target=gather_all, args=(store.port, stopped), daemon=True).start()
    steps = lead(KEYS, SEAL, leader, lambda job: job.outcome is not None, lambda *each: stopped.put(each))
    before, leader_before = time.process_time(), time.thread_time()
    if profile:
        import cProfile

        profiler = cProfile.Profile()
        profiler.runcall(perform, steps, store, time.monotonic)
        profiler.dump_stats(profile)
    else:
        perform(steps, store, time.monotonic)
    print(
        json.dumps({"leader": time.thread_time() - leader_before, "process": time.process_time() - before}), flush=True
    )
    sys.stdin.read()  # the agents still read their last messages


def gather_all(port: int, stopped: "SimpleQueue[tuple[int, list[str]]]") -> None:
    """Wait for the nodes of each round that the leader has stopped, as the launcher does."""
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    while True:
        perform(gather(KEYS, SEAL, *stopped.get()), store, time.monotonic)


# -- ours: the agents -------------------------------------------------------------------------------------------------


class Letter:
    """A message that an agent waits for: the steps that read it, and what is sent for them."""

    __slots__ = ("get", "steps", "value", "wait")

    def __init__(self, mailbox: Mailbox) -> None:
        self.steps = receive(KEYS, SEAL, mailbox)
        (self.wait, _, _), (self.get, _, _) = frames(next(self.steps))
        self.value = b""

    def open(self) -> Message | None:
        """Give the message."""
        try:
            self.steps.send(self.value)
        except StopIteration as end:
            message: Message | None = end.value
            return message
        raise SystemExit("a message could not be read at once")


class Agent:
    """One node: the connection on which it waits for mail, and one, perhaps shared, for its events.

    What it sends is sealed and framed before the time is taken, and what it receives is opened afterwards: in a job
    each node does that on a machine of its own, beside the others. What goes over the sockets, and when, is the same.
    """

    __slots__ = ("_is_reading", "_letters", "_pending", "inbox", "node", "outbox", "ready", "used")

    def __init__(self, itself: Node, inbox: Connection, outbox: "Outbox") -> None:
        self.node, self.inbox, self.outbox = itself, inbox.sock, outbox
        self.ready = b""
        self.used: list[str] = []
        self._letters: list[Letter] = []
        self._is_reading = False
        self._pending = b""
        for number in (0, 1):
            self._expect(number)
        self.inbox.send(self._letters[0].wait)

    def _expect(self, number: int) -> None:
        mailbox = Mailbox(self.node.id)
        mailbox.received, mailbox.used = number, self.used
        self._letters.append(Letter(mailbox))

    def tell(self, event: Event) -> None:
        """Append `event` to the log, behind the others."""
        self.outbox.send(append(KEYS, SEAL, event))

    def prepare(self, round_: int) -> None:
        """Get ready to say that it is ready after this round."""
        (frame, _, _), *_ = frames(next(say_ready(KEYS, SEAL, Ready(self.node.id, 40000), round_)))
        self.ready = frame

    def say_ready(self) -> None:
        """Say it."""
        self.outbox.connection.sock.send(self.ready)

    def readable(self) -> bool:
        """Take in what has come, and go on; say whether it was a message."""
        received = self.inbox.recv(4096)
        if not self._is_reading:
            self._is_reading = True
            self.inbox.send(self._letters[0].get)
            return False
        self._pending += received
        if len(self._pending) < 8 or len(self._pending) < 8 + int.from_bytes(self._pending[:8], "little"):
            return False
        self._letters[0].value, self._pending, self._is_reading = self._pending[8:], b"", False
        self.inbox.send(self._letters[1].wait)
        return True

    def open(self, number: int) -> Message | None:
        """Give the message of this number, the last that has come."""
        letter = self._letters.pop(0)
        self._expect(number + 2)
        return letter.open()


class Outbox:
    """A connection on which events go out one after the other. It may belong to several agents, see `Crowd`."""

    __slots__ = ("_waiting", "connection", "is_idle")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._waiting: list[Steps[None]] = []
        self.is_idle = True

    def send(self, steps: Steps[None]) -> None:
        """Go these steps, behind the others."""
        self._waiting.append(steps)
        if self.is_idle:
            self._next(None)

    def readable(self) -> bool:
        """Take in what has come, and go on."""
        self.connection.readable()
        return False

    def _next(self, _: None) -> None:
        self.is_idle = not self._waiting
        if self._waiting:
            self.connection.start(self._waiting.pop(0), self._next)


class Crowd:
    """The agents of one process, on one epoll. Each turn of theirs ends with one message for each of them."""

    def __init__(self, port: int, indices: Sequence[int], n: int, connections: int) -> None:
        """`connections`: how many there may be. Where two per agent are too many, some share one for their events."""
        self._port = port
        self._epoll = select.epoll()
        self._by_fd: dict[int, Callable[[], bool]] = {}
        self._turns = self._arrived = 0
        outboxes = []
        for _ in range(min(len(indices), connections - len(indices))):
            outboxes.append(Outbox(self._connect()))
            self._listen(outboxes[-1].connection, outboxes[-1].readable)
        self.agents = []
        for at, index in enumerate(indices):
            inbox = self._connect()
            self.agents.append(Agent(node(index, n), inbox, outboxes[at % len(outboxes)]))
            self._listen(inbox, self.agents[-1].readable)

    def _connect(self) -> Connection:
        return Connection(("127.0.0.1", self._port))

    def _listen(self, connection: Connection, readable: Callable[[], bool]) -> None:
        self._by_fd[connection.sock.fileno()] = readable
        self._epoll.register(connection.sock, select.EPOLLIN)

    def all(self, send: Callable[[Agent], None]) -> None:
        """Have all agents send something; what they are answered meanwhile is not left lying.

        Or the first ones would take their places in the log long before they write there, as this process, which is
        all of them, comes to that: real agents do not wait for each other.
        """
        for at, agent in enumerate(self.agents):
            send(agent)
            if at % TOGETHER == TOGETHER - 1:
                self._take_in(0)

    def until_all_have(self, kind: type) -> float:
        """Wait until each agent has received a message, and give the instant. It must be one of this kind."""
        while self._arrived < len(self.agents):
            self._take_in(None)
        at = time.monotonic()
        self.settle()
        for agent in self.agents:
            message = agent.open(self._turns)
            if not isinstance(message, kind):
                raise SystemExit(f"node {agent.node.name} was told {message}, not {kind.__name__}")
            if isinstance(message, Assigned):
                check_place(agent.node, message)
        self._turns += 1
        self._arrived = 0
        return at

    def _take_in(self, seconds: float | None) -> bool:
        ready = self._epoll.poll(seconds)
        self._arrived += sum([self._by_fd[fd]() for fd, _ in ready])
        return bool(ready)

    def settle(self) -> None:
        """Take part in what goes on until nothing has come for a while: the agents wait in their mailboxes again."""
        while self._take_in(0.1):
            pass


def check_place(itself: Node, message: Assigned) -> None:
    """Make sure that the node was given the place that it must have."""
    place = (message.group_rank, message.group_world_size, message.rank, message.world_size)
    n = message.group_world_size
    if place != (int(itself.id, 16), n, RANKS * message.group_rank, RANKS * n):
        raise SystemExit(f"node {itself.name} was given a place that is not its own: {message}")


def join(agent: Agent) -> None:
    """Say what a new agent says."""
    agent.tell(Joined(agent.node))
    agent.tell(Ready(agent.node.id, 40000))


def crowd(port: int, first: int, last: int, n: int, connections: int) -> None:
    """Be the agents `first` to `last` - 1: do what comes on stdin, one word a line, and say when it was done."""
    gc.disable()  # as the launcher does not have thousands of agents to collect from
    agents = Crowd(port, range(first, last), n, connections)
    round_ = -1
    print(json.dumps({"at": time.monotonic()}), flush=True)
    for line in sys.stdin:
        began = time.monotonic()
        cpu = time.process_time()
        at = began
        match line.strip():
            case "join":
                agents.all(join)
                at = agents.until_all_have(Assigned)
                round_ += 1
            case "fail":  # one agent, of the first crowd, has a rank that fails
                if first == 0:
                    failed = agents.agents[0].node.id
                    agents.agents[0].tell(Reported(failed, round_, NodeState.FAILED, Exited(1), 0))
                at = agents.until_all_have(Stop)
                for agent in agents.agents:
                    agent.prepare(round_)
            case "ready":
                agents.all(Agent.say_ready)
                at = agents.until_all_have(Assigned)
                round_ += 1
            case "tidy":  # as they do when nothing has come or gone for a second
                agents.all(lambda agent: agent.outbox.send(tidy(agent.used)))
                agents.settle()
            case "end":
                if first == 0:
                    agents.agents[0].tell(Requested(agents.agents[0].node.id, round_, ShutDown()))
                at = agents.until_all_have(End)
        print(json.dumps({"began": began, "at": at, "cpu": time.process_time() - cpu}), flush=True)


class Helper:
    """A process of this script, which speaks in lines."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, __file__, *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def tell(self, word: str) -> None:
        """Have it do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n".encode())
        self._process.stdin.flush()

    def hear(self) -> Any:
        """Wait for its next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the benchmark ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@dataclass
class Figures:
    """Seconds, one per round."""

    join: float = 0.0
    told: list[float] = field(default_factory=list)
    formed: list[float] = field(default_factory=list)
    agents_cpu: list[float] = field(default_factory=list)
    leader_cpu: float = 0.0  # of all, and so on
    store_cpu: float = 0.0


def ours(n: int, rounds: int, processes: int, profile: str) -> Figures:
    """Form `rounds` rounds anew with `n` agents."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_DESCRIPTORS
    if n > limit:
        raise SystemExit(f"{n} agents need as many connections, and `ulimit -Hn` allows for {limit}")
    host = Helper("--serve", n, "--profile", profile)
    crowds: list[Helper] = []
    try:
        port = host.hear()
        edges = [round(n * at / processes) for at in range(processes + 1)]
        for first, last in pairwise(edges):
            share = limit * (last - first) // n
            crowds.append(Helper("--crowd", port, first, last, n, share))
        for each in crowds:
            each.hear()
        figures = Figures(join=_turn(crowds, "join")[0])
        for _ in range(rounds):
            figures.told.append(_turn(crowds, "fail")[0])
            taken, cpu = _turn(crowds, "ready")
            figures.formed.append(taken)
            figures.agents_cpu.append(cpu)
            _turn(crowds, "tidy")
        _turn(crowds, "end")
        cpu = host.hear()
        figures.leader_cpu, figures.store_cpu = cpu["leader"], cpu["process"] - cpu["leader"]
        return figures
    finally:
        for each in [*crowds, host]:
            each.close()


def _turn(crowds: list[Helper], word: str) -> tuple[float, float]:
    """Have all crowds do it; give the seconds from the first beginning to the last end, and the CPU of all."""
    for each in crowds:
        each.tell(word)
    said = [each.hear() for each in crowds]
    return max(each["at"] for each in said) - min(each["began"] for each in said), sum(each["cpu"] for each in said)


# -- torch ------------------------------------------------------------------------------------------------------------


class CountingBackend(C10dRendezvousBackend):
    """torch's backend, which says how often and how much it moved: the values, without torch's frames around them."""

    def __init__(self, store: TCPStore, tally: dict[str, int]) -> None:
        self._tally = tally
        super().__init__(store, "bench")

    def _call_store(self, store_op: str, *args: Any, **kwargs: Any) -> Any:
        result = super()._call_store(store_op, *args, **kwargs)
        self._tally["operations"] += 1  # the counts of threads may get lost against each other, and hardly do
        self._tally["bytes"] += sum(len(each) for each in (*args[1:], result) if isinstance(each, bytes | str))
        return result


@dataclass
class TorchFigures:
    """Seconds, operations and bytes, one per round."""

    formed: list[float] = field(default_factory=list)
    operations: list[int] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)


def torch_dynamic(n: int, rounds: int) -> TorchFigures:
    """Form `rounds` rounds anew with torch's own dynamic rendezvous, `n` threads with a store each."""
    server = open_store()
    tally = {"operations": 0, "bytes": 0}
    handlers = []
    for _ in range(n):
        store = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        parameters = RendezvousParameters("c10d", "127.0.0.1", "bench", n, n, local_addr="127.0.0.1")
        handlers.append(create_handler(store, CountingBackend(store, tally), parameters))
    figures = TorchFigures()
    try:
        for turn in range(rounds + 1):
            tally.update(operations=0, bytes=0)
            begin, ends = threading.Barrier(n + 1), [0.0] * n

            def join(index: int, begin: threading.Barrier = begin, ends: list[float] = ends) -> None:
                begin.wait()
                handlers[index].next_rendezvous()
                ends[index] = time.monotonic()

            threads = [threading.Thread(target=join, args=(index,)) for index in range(n)]
            for thread in threads:
                thread.start()
            began = time.monotonic()
            begin.wait()
            for thread in threads:
                thread.join()
            if turn:  # the first one is no re-rendezvous
                figures.formed.append(max(ends) - began)
                figures.operations.append(tally["operations"])
                figures.moved.append(tally["bytes"])
    finally:
        for handler in handlers:
            handler._stop_heartbeats()
    return figures


# -- the figures ------------------------------------------------------------------------------------------------------


def row(name: str, n: int, seconds: Sequence[float], more: str = "") -> None:
    """Print one line of figures."""
    ordered = sorted(seconds)
    points = "".join(f"{1000 * quantile(ordered, q):>10.1f}" for q in (0.0, 0.5, 0.9, 1.0))
    print(f"{name:<30}{n:>7}{points}{len(ordered):>5}  {more}", flush=True)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--agents", default="16,64,1000,10000", help="how many, with commas between")
    made.add_argument("--torch-agents", default="16,64", help="the same for torch's rendezvous; empty: none")
    made.add_argument("-n", type=int, default=20, help="rounds of ours that are formed anew with each number of agents")
    made.add_argument("--peer-n", type=int, default=10, help="the same for torch's")
    made.add_argument("--processes", type=int, default=1, help="among which our agents are spread")
    made.add_argument("--profile", default="", help="write a profile of the leader to this file; slows it down")
    made.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    made.add_argument("--crowd", type=int, nargs=5, help=argparse.SUPPRESS)
    made.add_argument("--torch-only", type=int, nargs=2, help=argparse.SUPPRESS)
    options = made.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if options.serve is not None or options.crowd is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it may wait for others when its parent is killed
    if options.serve is not None:
        serve(options.serve, options.profile)
        return
    if options.crowd is not None:
        crowd(*options.crowd)
        return
    if options.torch_only is not None:
        print(json.dumps(vars(torch_dynamic(*options.torch_only))))
        os._exit(0)
    # A script that is told to end (by `timeout`, say) ends its processes, as one that is interrupted does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    print(f"{'[ms]':<30}{'agents':>7}{'min':>10}{'median':>10}{'p90':>10}{'max':>10}{'n':>5}")
    numbers = [int(each) for each in options.agents.split(",") if each]
    torch_numbers = [int(each) for each in options.torch_agents.split(",") if each]
    for n in sorted({*numbers, *torch_numbers}):
        if n in numbers:
            taken = ours(n, options.n, options.processes, options.profile)
            scale = 1e6 / n / (options.n + 2)
            cpu = (
                f"CPU [us per agent, round]: leader {scale * taken.leader_cpu:.0f}, store {scale * taken.store_cpu:.0f}"
            )
            row("ours: failure -> all told", n, taken.told)
            agents = 1e6 * quantile(sorted(taken.agents_cpu), 0.5) / n
            row("ours: all Ready -> all placed", n, taken.formed, f"{cpu}, agents {agents:.0f}")
            row("ours: first round, with Joined", n, [taken.join])
        if n in torch_numbers:
            child = subprocess.run(
                [sys.executable, __file__, "--torch-only", str(n), str(options.peer_n)],
                stdout=subprocess.PIPE,
                check=True,
            )
            torchs = TorchFigures(**json.loads(child.stdout))
            operations = quantile(sorted(torchs.operations), 0.5) / n
            moved = quantile(sorted(torchs.moved), 0.5) / n
            what = f"{operations:.1f} operations and {moved:.0f} bytes of values per agent and round"
            row("torch: all in next_rendezvous", n, torchs.formed, what)
            if n in numbers:
                ratio = quantile(sorted(torchs.formed), 0.5) / quantile(sorted(taken.formed), 0.5)
                print(f"{'':<30}{n:>7}  torch / ours, medians: {ratio:.0f}", flush=True)


if __name__ == "__main__":
    main()
