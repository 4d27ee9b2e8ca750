"""What the nodes of a test train: a few steps in data parallel, each one saved, or (--light) the mere steps.

The result does not depend on how many ranks share a step's batch, beyond rounding. What a rank sees is in the
journal, one file for each process; what it does is on its output, one line for each step. Before a step for which
the test holds a gate, it waits until the test opens it; at a step with a --fault, it does what the fault says.
"""

import argparse
import fcntl
import json
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ft_launcher import RankMonitorClient, WorkloadAction, WorkloadControlRequest

BATCH = 12  # samples of a step over all ranks
STEPS = 6

CYCLE = int(os.environ.get("FT_CYCLE", "-1"))
RANK = int(os.environ["RANK"])
NODE = os.environ.get("TEST_NODE", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--light", action="store_true", help="steps without torch, and without checkpoints")
    parser.add_argument("--fault", action="append", default=[], metavar="KIND:cycle=C,step=S,rank=R|node=N")
    options = parser.parse_args()

    journal = Journal(options.directory / "journal")
    journal.started()
    client = None
    if "FT_RANK_MONITOR_IPC_SOCKET" in os.environ:
        client = RankMonitorClient()
        client.init_workload_monitoring()
    training: Training | Steps = Steps() if options.light else Training(options.directory)
    while training.step < STEPS:
        reach(training.step + 1, options, client)
        training.take_step()
        if client is not None:
            client.send_heartbeat()
    training.finish()
    if client is not None:
        client.shutdown_workload_monitoring()
    journal.ended()
    say(f"cycle {CYCLE} finished")
    # Torch's own end aborts now and then on a busy machine ("terminate called without an active exception"), after
    # all is done, and that would count as a failure of the rank.
    os._exit(0)


class Journal:
    """What this process saw, for the test, and for the processes that come after it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / f"{NODE}.{os.getpid()}"

    def started(self) -> None:
        """Write down who this is, what it was told, and who should not be alive any more."""
        directory = self._directory
        seen = {
            "cycle": CYCLE,
            "rank": RANK,
            "world": int(os.environ["WORLD_SIZE"]),
            "group_rank": int(os.environ.get("GROUP_RANK", "0")),
            "node": NODE,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": born(os.getpid()),
            "restarts": int(os.environ.get("FT_RESTART_COUNT_GLOBAL", "-1")),
            "reason": os.environ.get("FT_RESTART_REASON", ""),
            "previous_world": int(os.environ.get("FT_PREV_WORLD_SIZE", "-1")),
            "torch_restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "-1")),
            "still_alive": [str(path.name) for path in directory.iterdir() if is_of_another_cycle_and_alive(path)],
            "secrets": [name for name in os.environ if name == "FT_TOKEN"],
        }
        self._write("x", seen)

    def ended(self) -> None:
        """Write down that the training came to its end here."""
        self._write("a", {"finished": True})

    def _write(self, mode: str, record: dict[str, Any]) -> None:
        with self._path.open(mode) as file:
            file.write(json.dumps(record) + "\n")


def is_of_another_cycle_and_alive(path: Path) -> bool:
    """Say whether the process that wrote the journal `path` lives, though its round is not ours."""
    with suppress(ValueError):  # not written to its end yet, so it has just started
        seen = json.loads(path.read_text().partition("\n")[0])
        return bool(seen["cycle"] != CYCLE and born(seen["pid"]) == seen["born"])
    return False


def born(pid: int) -> str:
    """When the process started, which tells it from a later one of the same number; "" for one that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else fields[18]


def say(text: str) -> None:
    # In one write, so that lines of several ranks do not mix.
    os.write(1, f"{text} rank {RANK}\n".encode())


def reach(step: int, options: argparse.Namespace, client: RankMonitorClient | None) -> None:
    """Say that `step` comes next, wait at the gates before it, and fall into the faults at it."""
    say(f"cycle {CYCLE} step {step}")
    for gate in (f"{CYCLE}.{step}", f"{CYCLE}.{step}.{NODE}"):
        with suppress(FileNotFoundError), (options.directory / "gates" / gate).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # the test holds it exclusively, until it opens the gate
    for fault in options.fault:
        kind, _, where = fault.partition(":")
        here = {"cycle": str(CYCLE), "step": str(step), "rank": str(RANK), "node": NODE}
        if all(here[name] == value for name, value in (each.split("=") for each in where.split(","))):
            fall_into(kind, client)


def fall_into(kind: str, client: RankMonitorClient | None) -> None:
    """Do what fault `kind` names."""
    say(f"cycle {CYCLE} fault {kind}")
    if kind == "exit":
        os._exit(7)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        hang()
    if kind == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(f"cycle {CYCLE} is stubborn")
        hang()
    action, _, then = kind.partition("-")
    assert client is not None
    names = {"exclude": WorkloadAction.ExcludeThisNode, "shutdown": WorkloadAction.ShutdownWorkload}
    client.send_workload_control_request(WorkloadControlRequest(names[action], f"{NODE} feels ill"))
    if then == "exit":
        os._exit(7)
    hang()


def hang() -> NoReturn:
    while True:
        signal.pause()


class Steps:
    """Steps in which nothing happens: for tests in which nothing hangs on the sums."""

    def __init__(self) -> None:
        self.step = 0

    def take_step(self) -> None:
        self.step += 1

    def finish(self) -> None:
        pass


class Training:
    """A small network in double precision, whose gradients are summed over all ranks.

    By hand: torch's DDP and its optimizers load its compiler, which takes half as long as all else that a rank loads.
    """

    def __init__(self, directory: Path) -> None:
        import torch
        import torch.distributed as dist

        torch.manual_seed(0)
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        self.step = 0
        self._path = directory / "checkpoint.pt"
        self._torch, self._dist = torch, dist
        self._network, self._parameters = network, list(network.parameters())
        self._velocities = [torch.zeros_like(each) for each in self._parameters]
        # Nobody writes it meanwhile: the first step needs all ranks.
        if self._path.exists():
            state = torch.load(self._path, weights_only=True)
            network.load_state_dict(state["network"])
            self._velocities = state["velocities"]
            self.step = state["step"]

    def take_step(self) -> None:
        """Learn from this rank's share of the next batch; rank 0 saves the result."""
        torch, dist = self._torch, self._dist
        self.step += 1
        samples = torch.randn(BATCH, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(self.step))
        mine = samples[dist.get_rank() :: dist.get_world_size()]
        # The sum, not the mean of each rank's, so that unequal shares weigh as much as they should.
        error = (self._network(mine[:, :8]) - mine[:, 8:]).square().sum() / BATCH
        gradients = torch.autograd.grad(error, self._parameters)
        with torch.no_grad():
            for parameter, velocity, gradient in zip(self._parameters, self._velocities, gradients, strict=True):
                dist.all_reduce(gradient)
                velocity.mul_(0.9).add_(gradient)
                parameter.sub_(velocity, alpha=0.05)
        if dist.get_rank() == 0:
            self._save()

    def _save(self) -> None:
        state = {"network": self._network.state_dict(), "velocities": self._velocities, "step": self.step}
        # Also a rank 0 of a round that should be over writes into a file of its own.
        temporary = self._path.with_suffix(f".{os.getpid()}")
        self._torch.save(state, temporary)
        temporary.replace(self._path)

    def finish(self) -> None:
        """Let rank 0 write the parameters down."""
        if self._dist.get_rank() == 0:
            parameters = [each for tensor in self._parameters for each in tensor.detach().flatten().tolist()]
            final = self._path.with_name("final.json")
            final.with_suffix(".part").write_text(json.dumps(parameters))
            final.with_suffix(".part").replace(final)
        self._dist.destroy_process_group()


if __name__ == "__main__":
    main()
