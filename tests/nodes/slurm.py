"""A real Slurm for tests: a controller and three nodes, each a machine of its own to all that runs on it.

A machine is a set of namespaces: processes, network, mounts and host name. Its first process is a shell that waits for
the end of its standard input. So a machine dies as a whole when that shell is killed, when the fixture ends, and also
when the test run itself is killed; and nothing of it has a name on the real machine: no network namespace, no bridge,
no entry in /etc, no process that could escape.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import GENEROUS, Sandbox, marked_processes, wait_until_gone

NODES = ("n1", "n2", "n3")
CONTROLLER = "control"
ADDRESSES = {CONTROLLER: "10.78.0.254", **{name: f"10.78.0.{i}" for i, name in enumerate(NODES, start=1)}}
"""Nobody outside the machines' own network sees them, so any number of such clusters may run side by side."""

NEEDED = {
    "slurm-wlm": ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue"),
    "munge": ("munged",),
    "iproute2": ("ip",),
    "util-linux": ("unshare", "nsenter"),
}
"""The programs, by their packages in Debian."""

PATIENCE = 200.0
"""Seconds after which a test gives up waiting: Slurm takes 15 of them to see that a node is gone."""

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=control
AuthType=auth/munge
# A requeued job waits until the credentials of its last start have expired: 120 s by default.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
SlurmUser=root
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdSpoolDir={directory}/spool/%n
StateSaveLocation={directory}/state
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
# As on a cluster with cgroups, a step is all that descends from its tasks, whatever its session.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
# A machine that is gone is `down` after this many seconds: 300 by default.
SlurmdTimeout=6
MessageTimeout=4
TCPTimeout=1
# Longer than with_spares.sbatch looks for the node of its script; 30 by default.
KillWait=20
MpiDefault=none
# A cluster looks at its queue every minute; tests would only wait.
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
# The nodes are as large as they are said to be, whatever there really is.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-3] CPUs=8 RealMemory=2000 Gres=gpu:8 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=usual Nodes=n[1-3] Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-3] PriorityTier=2
"""

MACHINE = """\
hostname "$0"
mount --bind "$1" /etc/hosts
ip link set lo up
echo ready
while read -r _; do :; done  # until the end of the input, and with it of the machine
"""

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}
OF_THE_CLUSTER = ("bash", "slurmctld", "slurmd", "slurmstepd", "munged", "sbatch", "scontrol", "slurmscriptd")


class Machine:
    """A machine inside this one, with its own processes, network, name and /etc/hosts."""

    def __init__(self, name: str, hosts: Path, environ: dict[str, str]) -> None:
        self.name = name
        self.environ = environ
        isolated = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(
            [*isolated, "bash", "-euc", MACHINE, name, str(hosts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environ,
        )
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline()
        if said != b"ready\n":
            rest = (said + self._holder.stdout.read()).decode(errors="replace")
            self.close()
            raise OSError(f"no namespaces can be made here: {rest.strip()}")
        self.pid = int(Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()[0])

    def run(self, *command: str, cwd: Path | None = None, **env: str) -> str:
        """Run a command on this machine, and give its output; a failure raises with it."""
        entered = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--ipc", "--pid"]
        ended = subprocess.run(
            [*entered, "bash", "-euc", 'cd "$0" && exec "$@"', str(cwd or "/"), *command],
            env=self.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=GENEROUS,
            check=False,
        )
        if ended.returncode != 0:
            raise RuntimeError(f"{self.name}: {' '.join(command)}: exit code {ended.returncode}: {ended.stdout}")
        return ended.stdout

    def network(self, *arguments: str) -> None:
        """Run `ip` in this machine's network, but with the real machine's process ids."""
        command = ["nsenter", f"--target={self.pid}", "--net", "ip", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=GENEROUS, check=False)
        if ended.returncode != 0:
            raise OSError(f"no network can be made here: {' '.join(arguments)}: {ended.stderr.strip()}")

    def processes(self) -> list[str]:
        """Give the command lines of all that runs on this machine and is no part of the cluster."""
        inside = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "ns" / "pid").readlink() == inside:
                    command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    if (entry / "comm").read_text().strip() not in OF_THE_CLUSTER and command[0]:
                        found.append(f"{entry.name}: {' '.join(command)}")
            except OSError:
                continue  # it has ended
        return found

    def kill(self) -> None:
        """Lose the machine: everything on it dies at once."""
        os.kill(self.pid, signal.SIGKILL)  # the first process of a pid namespace takes all others along
        self._holder.wait(GENEROUS)

    def close(self) -> None:
        if self._holder.poll() is None:
            self._holder.kill()
            self._holder.wait(GENEROUS)
        for pipe in (self._holder.stdin, self._holder.stdout):
            assert pipe is not None
            pipe.close()


class Job:
    """A job of the cluster."""

    def __init__(self, slurm: "Slurm", number: str, output: Path) -> None:
        self.number = number
        self._slurm = slurm
        self._output = output

    @property
    def output(self) -> str:
        """All that the job has written, over all its starts, also into files of its nodes."""
        of_nodes = sorted(self._output.parent.glob(f"*-{self.number}.*.log"))
        return "".join(each.read_text(errors="replace") for each in (self._output, *of_nodes) if each.exists())

    def records(self, field: str) -> list[str]:
        """What the controller knows: `JobState`, `ExitCode`, `Restarts` or the like, of each element of an array."""
        shown = self._slurm.control("scontrol", "show", "job", "--oneliner", self.number)
        return re.findall(rf"\b{field}=(\S+)", shown)

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until the job has written `text` this often."""
        self._slurm.wait_until(lambda: self.output.count(text) >= count, lambda: f"{count} times {text!r}")

    def wait(self) -> set[str]:
        """Wait for the end of the job, requeues included, and give the last state of it or of all its elements."""
        self._slurm.wait_until(lambda: self._states() <= ENDED, lambda: f"the end of job {self.number}", pause=0.3)
        return self._states()

    def running(self) -> str:
        """Give the number of what runs: the job's own, or that of an element of an array."""
        running = ("squeue", "--noheader", "--states=running", "--format=%A", f"--jobs={self.number}")
        return self._slurm.control(*running).strip()

    def _states(self) -> set[str]:
        return set(self.records("JobState"))


class Slurm:
    """A cluster of three nodes and a controller; all its files are in one directory."""

    def __init__(self, sandbox: Sandbox, directory: Path) -> None:
        self.directory = directory
        self._sandbox = sandbox
        self._machines: dict[str, Machine] = {}
        self._jobs: list[Job] = []

    def start(self) -> None:
        """Bring up the machines, their network and the daemons, and wait until the nodes are there."""
        hosts = self._write_files()
        self._sandbox.env["SLURM_CONF"] = str(self.directory / "slurm.conf")
        for name in ADDRESSES:
            self._machines[name] = Machine(name, hosts, self._sandbox.env)
        self._wire()
        self._start_daemons()
        self.wait_until(lambda: self._idle() == len(NODES), lambda: f"all nodes idle\n{self.logs()}", pause=0.2)

    def _write_files(self) -> Path:
        (self.directory / "spool").mkdir(parents=True)
        (self.directory / "state").mkdir()
        (self.directory / "slurm.conf").write_text(CONFIGURATION.format(directory=self.directory))
        (self.directory / "gres.conf").write_text(f"Name=gpu File={self.directory}/gpu[0-7]\n")
        for number in range(8):
            (self.directory / f"gpu{number}").symlink_to("/dev/null")  # Slurm counts devices, and looks at no more
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        hosts = self.directory / "hosts"
        lines = ["127.0.0.1 localhost", "::1 localhost", *(f"{address} {name}" for name, address in ADDRESSES.items())]
        hosts.write_text("".join(f"{line}\n" for line in lines))
        return hosts

    def _wire(self) -> None:
        controller = self._machines[CONTROLLER]
        controller.network("link", "add", "bridge", "type", "bridge")
        controller.network("link", "set", "bridge", "up")
        controller.network("addr", "add", f"{ADDRESSES[CONTROLLER]}/24", "dev", "bridge")
        for name in NODES:
            node = self._machines[name]
            peer = ["peer", "name", "eth0", "netns", str(node.pid)]
            controller.network("link", "add", f"to-{name}", "type", "veth", *peer)
            controller.network("link", "set", f"to-{name}", "master", "bridge", "up")
            node.network("addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
            node.network("link", "set", "eth0", "up")

    def _start_daemons(self) -> None:
        controller = self._machines[CONTROLLER]
        endings = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        paths = [f"--{flag}={self.directory}/munge.{ending}" for flag, ending in endings.items()]
        # --force: munged does not like a directory that is closed to others, as pytest's are.
        controller.run("munged", "--force", *paths)
        controller.run("slurmctld", "-c")
        for name in NODES:
            self._machines[name].run("slurmd")

    def _idle(self) -> int:
        try:
            return self.control("sinfo", "--noheader", "--Node", "--partition=usual", "--states=idle").count("\n")
        except RuntimeError:
            return 0  # the controller is not yet there

    def control(self, *command: str, **env: str) -> str:
        """Run a command on the controller's machine, and give its output."""
        return self._machines[CONTROLLER].run(*command, cwd=self._sandbox.path, **env)

    def node(self, name: str) -> Machine:
        return self._machines[name]

    def submit(self, script: Path, *arguments: str, options: tuple[str, ...] = (), **env: str) -> Job:
        """Give a batch script to sbatch, in the test's directory, with `env` added to its environment."""
        output = self._sandbox.path / f"{script.stem}.out"
        words = ["sbatch", "--parsable", f"--output={output}", *options, str(script), *arguments]
        self._jobs.append(Job(self, self.control(*words, **env).split()[-1], output))
        return self._jobs[-1]

    def assert_nothing_runs(self, *names: str) -> None:
        """Fail unless all processes of jobs end on these machines, within seconds."""

        def left() -> list[str]:
            return [each for name in names for each in self._machines[name].processes()]

        self.wait_until(lambda: not left(), lambda: f"the end of {left()}")

    def wait_until(self, is_so: Callable[[], bool], what: Callable[[], str], pause: float = 0.05) -> None:
        """Wait for a state that tells nobody when it comes about: a job's, or a file's."""
        deadline = time.monotonic() + PATIENCE
        clock = threading.Event()
        while not is_so():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {PATIENCE} s: {what()}")
            clock.wait(pause)

    @property
    def output(self) -> str:
        """All that the jobs have written, and the last lines of each daemon."""
        return "\n".join([*(f"--- job {job.number}\n{job.output}" for job in self._jobs), "--- daemons", self.logs()])

    def logs(self) -> str:
        """Give the last lines of each daemon."""
        logs = sorted(self.directory.glob("*.log"))
        return "\n".join(f"{log.name}: {line}" for log in logs for line in log.read_text().splitlines()[-8:])

    def close(self) -> None:
        for machine in self._machines.values():
            machine.close()
        left = wait_until_gone(marked_processes(self._sandbox.mark), GENEROUS)
        assert not left, f"still running: {left}"


def why_not() -> str | None:
    """Give the reason why no cluster can be had here; None when it can."""
    if os.geteuid() != 0:
        return "a Slurm of virtual nodes needs root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    for package, programs in NEEDED.items():
        for program in programs:
            if shutil.which(program, path=path) is None:
                return f"{program} is missing (Debian's package {package})"
    return None


@pytest.fixture
def slurm(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm of its own for one test, gone with all that ran on it at the end of the test."""
    if reason := why_not():
        pytest.skip(reason)
    sandbox.env["PATH"] = f"{Path(sys.executable).parent}:{sandbox.env['PATH']}:/usr/sbin:/sbin"
    cluster = Slurm(sandbox, tmp_path_factory.mktemp("slurm"))
    try:
        try:
            cluster.start()
        except OSError as error:
            pytest.skip(str(error))  # a container, say, that may not make namespaces
        yield cluster
    finally:
        cluster.close()
