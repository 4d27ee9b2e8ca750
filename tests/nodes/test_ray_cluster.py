"""A job on a Ray cluster of three nodes, all on this machine: what is lost is placed again, and the job goes on."""

import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import GENEROUS, MARK, Running, Sandbox, wait_until_gone
from tests.nodes.conftest import QUICK, TRAINER, Job

ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")

from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from ft_launcher.errors import UsageError
from ft_launcher.integrations import ray_cluster_command
from ft_launcher.integrations.ray_cluster import run_on_ray
from ft_launcher.integrations.ray_cluster_node import LauncherNode
from ft_launcher.integrations.ray_cluster_request import read_request
from ft_launcher.launcher import get_args_parser

SMALL: dict[str, Any] = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
SOON = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}
"""Of Ray's system configuration: a machine that went silent is dead for Ray after six seconds, not after a minute."""


class RayJob(Job):
    """A job whose driver is ft_ray. `Job` has its journal and its gates."""

    def __init__(self, sandbox: Sandbox, cluster: Cluster) -> None:
        super().__init__(sandbox, [], [])
        self.cluster = cluster

    def drive(
        self, *flags: str, behind: Sequence[str] = (), work: Sequence[str] = (), nodes: str = "2:3", **conf: str
    ) -> Running:
        """Start ft_ray."""
        passed = ("FT_TEST_RUN", "TMPDIR", "XDG_RUNTIME_DIR", "PYTHONWARNINGS", "OMP_NUM_THREADS")
        settings = ",".join(f"{key}={value}" for key, value in (QUICK | conf).items())
        self.launchers["driver"] = self.sandbox.start(
            *(
                sys.executable,
                "-m",
                ray_cluster_command.__name__,
                "--address",
                self.cluster.address,
                "--nnodes",
                nodes,
                *flags,
            ),
            *(word for name in passed if name in self.sandbox.env for word in ("--env", name)),
            *("--env", f"TORCHINDUCTOR_CACHE_DIR={self.directory / 'inductor'}"),
            *("--", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-conf", settings, *behind),
            *(work or (TRAINER, str(self.directory))),
        )
        return self.launchers["driver"]

    @property
    def driver(self) -> Running:
        return self.launchers["driver"]

    def at(self, cycle: int, step: int, ranks: int) -> None:
        """Wait until so many ranks have come to a step of a round."""
        self.driver.wait_for(f"cycle {cycle} step {step} ", ranks)

    def host(self) -> int:  # type: ignore[override]  # here a bundle has it
        """Give the bundle whose launcher is the host of the rendezvous, first or now."""
        self.driver.wait_for("this node is the host")
        line = next(line for line in reversed(self.driver.lines) if "this node is the host" in line)
        return int(line.removeprefix("[").partition(" ")[0])

    def node_of(self, bundle: int) -> Any:
        """Give the node of Ray's cluster on which a bundle is."""
        (group,) = (each for each in placement_group_table().values() if each["state"] != "REMOVED")
        node_id = group["bundles_to_node_id"][bundle]
        return next(node for node in self.cluster.worker_nodes if node.node_id == node_id)

    def lose(self, bundle: int) -> None:
        """Take the node of a bundle away, as if its machine had gone silent, and wait until Ray has noticed."""
        node = self.node_of(bundle)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        there = raylet.children(recursive=True)
        raylet.suspend()  # it says goodbye to nobody
        for number in (signal.SIGSTOP, signal.SIGKILL):  # so that nobody of them sees the end of another
            for each in there:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(number)
        self.driver.wait_for("was lost: ")
        self.cluster.remove_node(node, allow_graceful=False)

    def worlds(self) -> list[int]:
        """Give how many ranks each round had; assert what is true of every round."""
        for cycle in self.cycles():
            there = [start for start in self.starts() if start.cycle == cycle]
            assert [start.rank for start in there] == list(range(there[0].world)), there
            assert [start for start in there if start.still_alive or start.secrets] == []
        return [sum(start.cycle == cycle for start in self.starts()) for cycle in self.cycles()]

    def ends(self, code: int, *, leaves_files: bool = False) -> None:
        """Wait for the end; nothing is left of it (but files of who had no time to remove them)."""
        assert self.driver.wait() == code
        assert wait_until_gone(self.sandbox.pids(), GENEROUS) == []
        if not leaves_files:
            self.sandbox.assert_clean(GENEROUS)
        assert {each["state"] for each in placement_group_table().values()} <= {"REMOVED"}


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Cluster]:
    # Short: the paths of Ray's sockets are below it.
    directory = tempfile.mkdtemp(prefix="r", dir="/tmp")
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "temp_dir": directory, "_system_config": SOON, **SMALL},
        shutdown_at_exit=False,
    )
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(directory)


@pytest.fixture
def cluster(three_nodes: Cluster) -> Cluster:
    """Three nodes with a CPU each, beside the head, which has none."""
    while len(three_nodes.worker_nodes) > 3:
        three_nodes.remove_node(next(iter(three_nodes.worker_nodes)))
    while len(three_nodes.worker_nodes) < 3:
        three_nodes.add_node(num_cpus=1, **SMALL)
    return three_nodes


@pytest.fixture
def job(sandbox: Sandbox, cluster: Cluster) -> Iterator[RayJob]:
    job = RayJob(sandbox, cluster)
    yield job
    job.close()


def test_a_job_that_loses_a_node_goes_on_with_the_others_and_is_three_again_when_ray_has_another(job, undisturbed):
    job.hold(0, 3)
    job.hold(1, 5)
    job.drive()
    job.at(0, 3, 3)
    job.lose((job.host() + 1) % 3)
    job.at(1, 5, 2)
    job.cluster.add_node(num_cpus=1, **SMALL)
    job.at(2, 5, 3)
    job.ends(0, leaves_files=True)
    assert job.worlds() == [3, 2, 3]
    assert [job.told(cycle) for cycle in (1, 2)] == [(1, "node_lost", 3), (1, "node_joined", 2)]
    assert "it joins the others" in job.driver.output
    job.assert_trained_like(undisturbed)


def test_the_host_of_the_rendezvous_is_lost_and_a_node_to_spare_takes_its_place(job, undisturbed):
    job.cluster.add_node(num_cpus=1, **SMALL)
    job.hold(0, 3)
    job.hold(1, 5)
    job.drive()
    job.at(0, 3, 3)
    # Only Ray's own process of the node ends: its workers follow, and the launcher says goodbye.
    job.cluster.remove_node(job.node_of(job.host()), allow_graceful=False)
    job.driver.wait_for("it joins the others")
    job.driver.wait_for("this node is the host", 2)
    # Whether the two have begun without the third by then is a matter of milliseconds; they do not end without it.
    job.driver.wait_for("started rank 2 (", 2)
    job.release(1, 5)
    job.ends(0)
    assert job.driver.output.count("(9 left)") == 1
    assert (job.worlds()[0], job.worlds()[-1]) == (3, 3)
    job.assert_trained_like(undisturbed)


WAITS = """
import os, signal, sys, time
def leave(number, frame):
    os.write(1, b"saving\\n")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
signal.signal(signal.SIGTERM, leave)
os.write(1, b"waiting\\n")
while True:
    signal.pause()
"""


def test_a_rank_that_fails_for_good_ends_the_job_with_its_cause_and_the_launchers_code(job, sandbox):
    script = sandbox.script("raise SystemExit(7)")
    job.drive(nodes="2", behind=["--max-restarts", "0"], work=[script])
    job.ends(1)
    assert "exited with code 7" in job.driver.output


def test_a_driver_that_is_told_to_end_leaves_time_to_save_and_then_nothing(job, sandbox):
    job.drive(nodes="2", work=[sandbox.script(WAITS)])
    job.driver.wait_for("waiting", 2)
    job.driver.send(signal.SIGTERM)
    job.ends(143)
    assert job.driver.output.count("saving") == 2


def test_a_driver_that_is_killed_leaves_nothing(job, sandbox):
    saved = sandbox.path / "saved"
    script = sandbox.script(WAITS.replace('os.write(1, b"saving\\n")', f"open({str(saved)!r}, 'w').close()"))
    job.drive(nodes="1", work=[script])
    job.driver.wait_for("waiting")
    job.driver.send(signal.SIGKILL)
    job.ends(-signal.SIGKILL)
    assert saved.exists()


def test_a_launcher_whose_actor_is_killed_ends_with_its_ranks_and_another_one_begins(job, sandbox):
    flag = sandbox.path / "begun"
    script = sandbox.script(f"""
import os, pathlib, signal
flag = pathlib.Path({str(flag)!r})
if not flag.exists():
    flag.write_text(str(os.getpid()))
    os.write(1, b"first\\n")
    signal.pause()
os.write(1, f"second, {{os.path.exists('/proc/' + flag.read_text())}}\\n".encode())
os.write(1, f"threads: {{os.environ.get('OMP_NUM_THREADS')}}\\n".encode())
""")
    sandbox.env.pop("OMP_NUM_THREADS")
    job.drive(nodes="1", work=[script])
    job.driver.wait_for("first")
    (actor,) = (pid for pid in psutil.pids() if is_actor(pid))
    os.kill(actor, signal.SIGKILL)
    job.driver.wait_for("second, False")
    job.ends(0)
    assert "(9 left)" in job.driver.output
    assert "] threads: None" in job.driver.output, "Ray's number is for one process, not for each of the ranks"


def is_actor(pid: int) -> bool:
    with suppress(psutil.Error):
        return "ray::LauncherNode" in " ".join(psutil.Process(pid).cmdline())
    return False


def test_files_that_ray_brings_are_found_and_its_environment_is_that_of_the_ranks(job, sandbox):
    files = sandbox.path / "files"
    files.mkdir()
    (files / "brought.py").write_text("import os; print(os.environ['BROUGHT'], os.environ['OMP_NUM_THREADS'])")
    settings = sandbox.path / "env.yaml"
    settings.write_text(f"working_dir: {files}\nenv_vars: {{BROUGHT: 'as well', OMP_NUM_THREADS: '3'}}\n")
    job.sandbox.env.pop("OMP_NUM_THREADS")
    job.drive("--runtime-env", str(settings), nodes="1", work=["brought.py"])
    job.ends(0)
    assert "] as well 3" in job.driver.output


def test_a_job_for_which_there_is_no_room_says_what_was_asked_and_what_there_is(job):
    job.drive(
        *("--bundle", "CPU=2,hammer=1", "--placement-timeout", "1s"),
        nodes="1:2",
        behind=["--ft-exit-codes", "classified"],
        work=["train.py"],
    )
    job.ends(75)
    line = job.driver.wait_for("--placement-timeout: no room within 1 s")
    assert "2 x {CPU 2, hammer 1} (STRICT_SPREAD)" in line
    assert "the cluster has CPU 3 (3 free), hammer 0 (0 free) on 4 nodes" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "the script are missing"),
        ("--bundel CPU=1 -- train.py", "--bundel: no such flag; did you mean --bundle?"),
        ("train.py", "train.py: must stand behind --"),
        ("--nproc-per-node 2 -- train.py", "--nproc-per-node: no such flag; ft_launcher's stand behind --"),
        ("--bundle CPUs=1 -- train.py", "--bundle CPUs=1: CPUs: did you mean CPU?"),
        ("--bundle CPU=x -- train.py", "--bundle CPU=x: must be NAME=NUMBER"),
        ("--bundle CPU=0 -- train.py", "--bundle CPU=0: must be a resource of Ray"),
        ("--bundle CPU=1,CPU=2 -- train.py", "CPU is given twice"),
        (
            "--strategy strict_spred -- train.py",
            "--strategy strict_spred: must be one of STRICT_SPREAD, SPREAD, PACK; did",
        ),
        ("--placement-timeout soon -- train.py", "--placement-timeout soon: must be a duration above 0"),
        ("--max-replacements -1 -- train.py", "--max-replacements -1: must be a whole number"),
        ("--env NOBODY_SET_THIS -- train.py", "--env NOBODY_SET_THIS: no such variable"),
        ("--runtime-env no.yaml -- train.py", "--runtime-env no.yaml: No such file"),
        (
            "--log-level inf -- train.py",
            "--log-level inf: must be one of debug, info, warning, error; did you mean info?",
        ),
        ("--nnodes 3:2 -- train.py", "--nnodes 3:2: must be a number from 1 on, or MIN:MAX"),
        ("--address ray://head:10001 -- train.py", "ray job submit -- ft_ray"),
        ("-- --nnodes 2 train.py", "--nnodes: does not belong behind --"),
        ("-- --rdzv-endpoint a:1 train.py", "--rdzv-endpoint: does not belong behind --"),
        ("-- --standalone train.py", "--standalone: does not belong behind --"),
        ("-- --rdzv-conf join_timeout=3,is_host=1 train.py", "--rdzv-conf is_host: is for ft_ray"),
        ("-- --nproc-pr-node 2 train.py", "did you mean --nproc-per-node?"),
        ("-- --nproc-per-node 0 train.py", "--nproc-per-node 0: must be"),
        ("-- --nproc-per-node 1", "training_script"),
        ("-- --ft-cfg-path no.yaml train.py", "no.yaml"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_placed(capsys, arguments, words):
    assert ray_cluster_command.main(arguments.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith("ft_ray: ")
    assert words in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_process_that_is_connected_runs_a_job_and_stays_connected(cluster, sandbox, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    env = {name: sandbox.env[name] for name in (MARK, "TMPDIR", "XDG_RUNTIME_DIR")}
    assert run_on_ray(["--no-python", "sh", "-c", "echo here; echo there >&2; exit 3"], env=env) == 1
    assert ray.is_initialized()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert {each["state"] for each in placement_group_table().values()} <= {"REMOVED"}
    sandbox.assert_clean(GENEROUS)
    said = capsys.readouterr()
    assert re.search(r"^\[0 [\w.-]+\] here$", said.out, re.MULTILINE)
    assert re.search(r"^\[0 [\w.-]+\] there$", said.err, re.MULTILINE)
    with pytest.raises(UsageError, match=r"--bundle: GPU .*whole"):
        run_on_ray(["train.py"], bundle={"GPU": 1.5})


def test_an_address_at_which_no_cluster_is_costs_no_minutes(sandbox):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        driver = sandbox.start(sys.executable, "-m", ray_cluster_command.__name__, "--address", address, "--", "x.py")
        assert driver.wait() == 2
    line = driver.wait_for("ft_ray: ")
    assert line.startswith(f"ft_ray: --address {address}: no Ray cluster answers there (")


def test_flags_of_the_script_are_its_own():
    request = read_request(
        ["--nproc-per-node", "2", "--rdzv-conf", "min_uptime=1", "train.py", "--nnodes", "7", "--", "x"],
        nnodes="2:3",
        bundle={"CPU": 1.0},
        strategy="PACK",
        placement_timeout=None,
        max_replacements=0,
        address="auto",
    )
    given = request.arguments("run", ["a:1", "b:2"], joins=True)
    cut = given.index("train.py")
    assert given[cut:] == ["train.py", "--nnodes", "7", "--", "x"]
    parsed = get_args_parser().parse_args(given)
    assert (parsed.nnodes, parsed.rdzv_endpoint, parsed.nproc_per_node) == ("2:3", "a:1,b:2", "2")
    assert parsed.rdzv_conf == "min_uptime=1,joins_only=1"


def test_a_node_without_the_working_directory_says_so():
    assert LauncherNode().prepare("/no/such/folder")[3] == "/no/such/folder: no such directory on this node"


def test_the_document_names_every_flag():
    text = (Path(__file__).parents[2] / "docs" / "ray_cluster.md").read_text(encoding="utf-8")
    flags = re.findall(r"^  (?:-h, )?(--[\w-]+)", ray_cluster_command._parser().format_help(), re.MULTILINE)
    assert len(flags) > 8
    assert [flag for flag in flags if flag != "--help" and f"`{flag}" not in text] == []


def test_what_was_heard_is_repeated_until_it_was_taken(sandbox):
    node = LauncherNode()
    node.start(["--help"], {MARK: sandbox.mark}, str(sandbox.path), 1.0)
    pieces, code = node.hear(0)
    assert node.hear(0) == (pieces, code)
    taken = 1
    while code is None:
        more, code = node.hear(taken)
        pieces, taken = pieces + more, taken + 1
    assert code == 0
    assert b"--nnodes" in b"".join(piece for is_error, piece in pieces if not is_error)
    sandbox.assert_clean()
