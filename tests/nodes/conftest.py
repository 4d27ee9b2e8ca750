"""Jobs on several nodes: hosts of their own, or all on this machine, with a journal of who trained when as what."""

import fcntl
import json
import os
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from tests.conftest import Running, Sandbox, free_port
from tests.nodes.hosts import Host, network

TRAINER = str(Path(__file__).with_name("trainer.py"))

QUICK = {
    "keep_alive_interval": "0.5",
    "min_uptime": "0",
    "last_call_timeout": "20",
    "join_timeout": "30",
    "failover_timeout": "20",
}
"""--rdzv-conf of tests: sooner where a test would wait for it, and a last call that slow machines can answer."""


class Start(msgspec.Struct, frozen=True):
    """What one process of a training saw when it started (trainer.py)."""

    cycle: int
    rank: int
    world: int
    group_rank: int
    node: str
    host: str
    pid: int
    born: str
    restarts: int
    reason: str
    previous_world: int
    torch_restarts: int
    still_alive: list[str]
    secrets: list[str]


class Machine:
    """This machine, as the place of one more node."""

    def __init__(self, sandbox: Sandbox, name: str) -> None:
        self.name = name
        self.address = "127.0.0.1"
        self._sandbox = sandbox

    def launch(self, *arguments: str, **env: str) -> Running:
        """Start ft_launcher with `arguments` here."""
        return self._sandbox.launch(*arguments, **env)


class Job:
    """One job on up to three nodes."""

    def __init__(self, sandbox: Sandbox, places: Sequence[Machine | Host], ports: Sequence[int]) -> None:
        self.sandbox = sandbox
        self.places = {place.name: place for place in places}
        self.nodes = list(self.places)
        self.directory = sandbox.path / "job"
        self.journal = self.directory / "journal"
        self.gates = self.directory / "gates"
        for each in (self.journal, self.gates):
            each.mkdir(parents=True)
        self.endpoints = [f"{place.address}:{port}" for place, port in zip(places, ports, strict=True)]
        self.launchers: dict[str, Running] = {}
        self._flags: list[str] = []
        self._conf: dict[str, str] = {}
        self._work: list[str] = []
        self._held: dict[str, int] = {}

    def plan(
        self,
        *flags: str,
        nodes: str = "2:3",
        restarts: int = 1,
        endpoints: int = 1,
        light: bool = False,
        quick: bool = True,
        faults: Sequence[str] = (),
        work: Sequence[str] = (),
        **conf: str,
    ) -> None:
        """Decide what `start` starts: the flags of ft_launcher, `conf` for --rdzv-conf, and what is trained.

        Without `quick` whatever `conf` leaves open has its default, as users have it. `work`: another script than
        trainer.py, and its arguments.
        """
        self._flags = [
            *("--nnodes", nodes, "--nproc-per-node", "1", "--max-restarts", str(restarts)),
            *("--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", ",".join(self.endpoints[:endpoints])),
            *flags,
        ]
        self._conf = (QUICK if quick else {}) | conf
        self._work = [TRAINER, str(self.directory), *(["--light"] if light else [])]
        self._work += [word for fault in faults for word in ("--fault", fault)]
        self._work = [*work] or self._work

    def start(self, *nodes: str, flags: Sequence[str] = (), **env: str) -> Running:
        """Start the launchers of `nodes`, with more `flags` behind those of the plan; give the last one."""
        for node in nodes:
            conf = dict(self._conf)
            if isinstance(self.places[node], Machine):
                # Here the endpoint is every launcher's own address; the tests want to know whom they kill.
                conf["is_host"] = str(node == self.nodes[0]).lower()
            settings = ["--rdzv-conf", ",".join(f"{key}={value}" for key, value in conf.items())] if conf else []
            # Torch makes that directory in every process that trains, wherever it is told to.
            own = {"TEST_NODE": node, "TORCHINDUCTOR_CACHE_DIR": str(self.directory / "inductor")}
            command = [*settings, *self._flags, *flags, *self._work]
            self.launchers[node] = self.places[node].launch(*command, **own | env)
        return self.launchers[nodes[-1]]

    def host(self, node: str) -> Host:
        """Give the host of a node, where it has one."""
        place = self.places[node]
        assert isinstance(place, Host)
        return place

    # -- what happens, and when ---------------------------------------------------------------------------------------

    def hold(self, cycle: int, step: int, node: str = "") -> None:
        """Close the gate before a step: ranks (of one node) wait there until `release`."""
        name = _gate(cycle, step, node)
        self._held[name] = os.open(self.gates / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._held[name], fcntl.LOCK_EX)

    def release(self, cycle: int, step: int, node: str = "") -> None:
        """Open the gate, for those who wait and for those who come later."""
        os.close(self._held.pop(_gate(cycle, step, node)))

    def wait_reached(self, cycle: int, step: int, *nodes: str) -> None:
        """Wait until a rank of each of `nodes` has come to a step of a round."""
        for node in nodes:
            self.launchers[node].wait_for(f"cycle {cycle} step {step} ")

    def pass_gate(self, cycle: int, step: int, *nodes: str) -> None:
        """Open the gate when a rank of each of `nodes` has come to it."""
        self.wait_reached(cycle, step, *nodes)
        self.release(cycle, step)

    def close(self) -> None:
        """Open all gates."""
        for fd in self._held.values():
            os.close(fd)
        self._held = {}

    # -- what the ranks saw -------------------------------------------------------------------------------------------

    def starts(self) -> list[Start]:
        """Give what each process wrote when it started, in the order of rounds and ranks."""
        lines = [path.read_text().partition("\n")[0] for path in self.journal.iterdir()]
        starts = [msgspec.json.decode(line, type=Start) for line in lines if line]
        return sorted(starts, key=lambda start: (start.cycle, start.rank))

    def ranks(self, cycle: int) -> list[str]:
        """Give the nodes of a round in the order of their ranks; assert what is true of every round."""
        there = [start for start in self.starts() if start.cycle == cycle]
        assert [start.rank for start in there] == list(range(len(there))), there
        assert len({(start.node, start.group_rank) for start in there}) == len({start.node for start in there}), there
        assert [start.group_rank for start in there] == sorted(start.group_rank for start in there), there
        assert {start.world for start in there} <= {len(there)}, there
        assert len({(start.restarts, start.reason, start.previous_world) for start in there}) <= 1, there
        assert [start for start in there if start.still_alive or start.secrets] == []
        return [start.node for start in there]

    def told(self, cycle: int) -> tuple[int, str, int]:
        """Give what the ranks of a round were told: counted restarts, the reason's kind, ranks of the round before."""
        start = next(start for start in self.starts() if start.cycle == cycle)
        return start.restarts, start.reason.partition(":")[0], start.previous_world

    def cycles(self) -> list[int]:
        """Give the rounds in which somebody trained."""
        return sorted({start.cycle for start in self.starts()})

    def pid(self, cycle: int, node: str) -> int:
        """Give the process of a node in a round."""
        return next(start.pid for start in self.starts() if (start.cycle, start.node) == (cycle, node))

    # -- the end ------------------------------------------------------------------------------------------------------

    def assert_ends(self, **codes: int) -> None:
        """Wait for the ends of the launchers, `node1=0` and so on; nothing of the job may be left."""
        found = {node: self.launchers[node].wait() for node in codes}
        assert found == codes
        self.sandbox.assert_clean()

    def assert_trained_like(self, undisturbed: list[float]) -> None:
        """Assert that the parameters at the end are those of an undisturbed run."""
        trained = json.loads((self.directory / "final.json").read_text())
        assert len(trained) == len(undisturbed)
        assert max(abs(ours - theirs) for ours, theirs in zip(trained, undisturbed, strict=True)) < 1e-9

    @property
    def output(self) -> str:
        """All that the launchers said."""
        return "\n".join(f"--- {node}\n{running.output}" for node, running in self.launchers.items())

    def monitor_of(self, node: str) -> int:
        """Give the process that watches a node's rank."""
        for path in Path("/proc").iterdir():
            if not path.name.isdigit():
                continue
            try:
                parent = re.search(r"\nPPid:\s(\d+)", (path / "status").read_text())
                command = (path / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended
            if parent and int(parent[1]) == self.launchers[node].pid and b"rank_monitor_server" in command:
                return int(path.name)
        raise AssertionError("no monitor")


def _gate(cycle: int, step: int, node: str) -> str:
    return f"{cycle}.{step}" + (f".{node}" if node else "")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failed test all that its job wrote: of what an assertion compares, pytest shows a part."""
    report = yield
    fixtures = getattr(item, "funcargs", {})
    if report.failed:
        report.sections += [(name, fixtures[name].output) for name in ("job", "local_job", "slurm") if name in fixtures]
    return report


@pytest.fixture
def hosts(sandbox: Sandbox) -> Iterator[list[Host]]:
    """Three hosts, with a network between them."""
    with network(sandbox) as hosts:
        yield hosts


@pytest.fixture
def job(sandbox: Sandbox, hosts: list[Host]) -> Iterator[Job]:
    """A job on three hosts."""
    with ExitStack() as stack:
        job = Job(sandbox, hosts, [29400] * len(hosts))
        stack.callback(job.close)
        yield job


@pytest.fixture
def local_job(sandbox: Sandbox) -> Iterator[Job]:
    """A job of three nodes on this machine: for tests in which no network is cut, and for users who are not root."""
    with ExitStack() as stack:
        ports = [free_port() for _ in range(3)]
        job = Job(sandbox, [Machine(sandbox, f"node{number}") for number in (1, 2, 3)], ports)
        stack.callback(job.close)
        yield job


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[float]]:
    """The parameters that the training ends with when nothing happens, and nothing but Python runs it."""
    path = tmp_path_factory.mktemp("undisturbed")
    (path / "job" / "journal").mkdir(parents=True)
    sandbox = Sandbox(path)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    training = sandbox.start(sys.executable, TRAINER, str(path / "job"), **alone)
    assert training.wait() == 0, training.output
    yield json.loads((path / "job" / "final.json").read_text())
    sandbox.close()
