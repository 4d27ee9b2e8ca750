"""How long a round takes to form again when nothing else is in the way: no workers, no launchers, no torch import.

Ours: the leader of the launcher (`exchange.lead` with the real `Job`) beside a real TCPStore server in one process. The
agents are the launcher's own generators (`exchange.append`, `exchange.receive`) on raw sockets, all of them in one
other process (`--processes`), so that thousands fit on a machine; each has one connection on which it is blocked in its
mailbox, and one to write events. One rank fails, all are told to stop, and all say Ready: from the first of them to the
moment when the last has its place. The agents' own work, all on one core here, is in it.

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
from typing import Any

from harness import quantile
from tcpstore_wire import Connection, check
from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from ft_launcher.causes import Exited, ShutDown
from ft_launcher.exchange import Keys, Leader, append, lead, perform, receive
from ft_launcher.formation import Settings, Timing
from ft_launcher.policy import NodeState
from ft_launcher.records import Assigned, End, Joined, Message, Node, Ready, Reported, Requested, Stop, Terms
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
    leader = Leader(Job(settings(n), node(0, n), time.monotonic()))
    print(store.port, flush=True)
    steps = lead(KEYS, SEAL, leader, lambda job: job.outcome is not None)
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


# -- ours: the agents -------------------------------------------------------------------------------------------------


class Agent:
    """One node: what it has received, and the two connections."""

    __slots__ = ("_crowd", "_number", "inbox", "node", "outbox")

    def __init__(self, crowd: "Crowd", itself: Node, inbox: Connection, outbox: "Outbox") -> None:
        self._crowd, self.node, self.inbox, self.outbox = crowd, itself, inbox, outbox
        self._number = 0

    def listen(self) -> None:
        """Wait for the next message, as Link does."""
        self.inbox.start(receive(KEYS, SEAL, self.node.id, self._number), self._received)

    def _received(self, message: Message | None) -> None:
        self._number += 1
        if not isinstance(message, End):
            self.listen()
        self._crowd.count(self, message)


class Outbox:
    """A connection on which events go out one after the other. It may belong to several agents, see `Crowd`."""

    __slots__ = ("_events", "connection", "is_idle")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._events: list[Any] = []
        self.is_idle = True

    def send(self, event: Any) -> None:
        """Append `event` to the log, behind the others."""
        self._events.append(event)
        if self.is_idle:
            self._next(None)

    def _next(self, _: None) -> None:
        self.is_idle = not self._events
        if self._events:
            self.connection.start(append(KEYS, SEAL, self._events.pop(0)), self._next)


class Crowd:
    """The agents of one process, on one epoll."""

    def __init__(self, port: int, indices: Sequence[int], n: int, connections: int) -> None:
        """`connections`: how many there may be. Where two per agent are too many, some share one for their events."""
        self._epoll = select.epoll()
        self._by_fd: dict[int, Connection] = {}
        self._seen: dict[type, int] = {}
        outboxes = [Outbox(self._connect(port)) for _ in range(min(len(indices), connections - len(indices)))]
        self.agents = [
            Agent(self, node(index, n), self._connect(port), outboxes[at % len(outboxes)])
            for at, index in enumerate(indices)
        ]
        for agent in self.agents:
            agent.listen()

    def _connect(self, port: int) -> Connection:
        connection = Connection(("127.0.0.1", port))
        self._by_fd[connection.sock.fileno()] = connection
        self._epoll.register(connection.sock, select.EPOLLIN)
        return connection

    def count(self, agent: Agent, message: Message | None) -> None:
        """Note that `agent` has received `message`."""
        self._seen[type(message)] = self._seen.get(type(message), 0) + 1
        if isinstance(message, Assigned):
            place = (message.group_rank, message.group_world_size, message.rank, message.world_size)
            n = message.group_world_size
            if place != (int(agent.node.id, 16), n, RANKS * message.group_rank, RANKS * n):
                raise SystemExit(f"node {agent.node.name} was given a place that is not its own: {message}")

    def send(self, *events: Callable[[Agent], Any]) -> None:
        """Have all agents send these events; what they are answered meanwhile is not left lying.

        Or the first ones would take their places in the log long before they write there, as this process, which is
        all of them, comes to that: real agents do not wait for each other.
        """
        for at, agent in enumerate(self.agents):
            for event in events:
                agent.outbox.send(event(agent))
            if at % TOGETHER == TOGETHER - 1:
                for fd, _ in self._epoll.poll(0):
                    self._by_fd[fd].readable()

    def until_all_have(self, kind: type) -> float:
        """Wait until each agent has received a message of this kind once more, and give the instant."""
        wanted, by_fd, poll = len(self.agents), self._by_fd, self._epoll.poll
        while self._seen.get(kind, 0) < wanted:
            for fd, _ in poll():
                by_fd[fd].readable()
        at = time.monotonic()
        del self._seen[kind]
        self._settle()
        return at

    def _settle(self) -> None:
        """Take part in what goes on until nothing has come for a while: the agents wait in their mailboxes again."""
        while ready := self._epoll.poll(0.1):
            for fd, _ in ready:
                self._by_fd[fd].readable()


def ready(agent: Agent) -> Ready:
    """Give what an agent says whose workers have stopped."""
    return Ready(agent.node.id, 40000)


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
                agents.send(lambda agent: Joined(agent.node), ready)
                at = agents.until_all_have(Assigned)
                round_ += 1
            case "fail":  # one agent, of the first crowd, has a rank that fails
                if first == 0:
                    failed = agents.agents[0].node.id
                    agents.agents[0].outbox.send(Reported(failed, round_, NodeState.FAILED, Exited(1), 0))
                at = agents.until_all_have(Stop)
            case "ready":
                agents.send(ready)
                at = agents.until_all_have(Assigned)
                round_ += 1
            case "end":
                if first == 0:
                    agents.agents[0].outbox.send(Requested(agents.agents[0].node.id, round_, ShutDown()))
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
