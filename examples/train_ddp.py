"""Train a small network on scikit-learn's digits with DDP, and end with the same bits whatever fails.

    ft_launcher --nproc-per-node 2 --max-restarts 3 --ft-cfg-path configs/ft.yaml examples/train_ddp.py

The same script runs, unmonitored, under torchrun and under plain python. Everything that the next step depends
on is in the checkpoint (parameters, momentum, step) or a pure function of (seed, step) (the batch). So a run that
was killed and resumed repeats the undisturbed run bit for bit, given the same number of ranks.
"""

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from faults import FAULT_HELP, Faults, parse_fault, say
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ft_launcher

BATCH = 120  # samples of one step over all ranks: 1 to 6 and 8 ranks share it evenly
HELD_OUT = 360  # the last digits are for the accuracy at the end; other people wrote them
SAY_EVERY = 5  # steps between two lines of progress
KEPT_CHECKPOINTS = 2


@record  # writes the traceback where the launcher's summary finds it
def main() -> None:
    options = parse_options()
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    faults = Faults(options.fault, rank=int(os.environ.get("RANK", "0")), restart=restart)

    faults.before_connecting()
    monitoring = Monitoring(options.monitoring, learns=options.calculate_timeouts)
    with monitoring.phase("setup"):
        device = join_process_group(monitoring.process_group_timeout())
        training = Training(options, device)
        monitoring.use(training.resume())
    is_first = dist.get_rank() == 0

    while training.step < options.steps:
        with monitoring.phase("step"):
            training.step += 1
            faults.at_step(training.step, monitoring.phase)
            loss = training.run_step()
            time.sleep(options.step_time)
        if is_first and training.step % SAY_EVERY == 0:
            say(f"step {training.step} loss {loss:.6f} restart {restart}")
        if training.step % options.checkpoint_every == 0 or training.step == options.steps:
            monitoring.learn()
            with monitoring.phase("checkpointing"):
                training.save(monitoring.learned)

    if is_first:
        say(f"finished step {training.step} {training.summary()}")
    dist.destroy_process_group()
    monitoring.shutdown()
    faults.after_shutdown()


class Training:
    """The model, its optimizer and the number of the last step taken."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(options.seed)
        network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.step = 0
        self._model = DistributedDataParallel(network.to(device))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=options.lr, momentum=0.9)
        self._settings = {"seed": options.seed, "lr": options.lr}
        self._directory: Path = options.checkpoint_dir
        self._device = device
        digits = load_digits()
        self._images = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
        self._labels = torch.tensor(digits.target, device=device)
        self._settle_buckets()

    def _settle_buckets(self) -> None:
        # DDP orders the gradients anew after its first backward pass, and over more than two ranks a sum's bits
        # depend on that order. The first step of a resumed run must sum as the same step of an undisturbed one.
        cross_entropy(self._model(self._images[:1]), self._labels[:1]).backward()

    def run_step(self) -> float:
        """Take the step that `step` names; the loss on this rank's share of the batch."""
        generator = torch.Generator().manual_seed(self._settings["seed"] * 1_000_003 + self.step)
        shuffled = torch.randperm(len(self._labels) - HELD_OUT, generator=generator)
        mine = shuffled[:BATCH][dist.get_rank() :: dist.get_world_size()].to(self._device)
        self._optimizer.zero_grad()
        loss = cross_entropy(self._model(self._images[mine]), self._labels[mine])
        loss.backward()  # DDP averages the gradients here: who waits for a hung rank, waits here
        self._optimizer.step()
        return loss.item()

    def save(self, learned_timeouts: dict[str, Any]) -> None:
        """Let rank 0 write a checkpoint; the others wait for it."""
        if dist.get_rank() == 0:
            state = {
                "step": self.step,
                "settings": self._settings,
                "model": self._model.module.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "learned_timeouts": learned_timeouts,
            }
            write_whole(self._directory / f"step-{self.step:08}.pt", state)
            for old in sorted(self._directory.glob("step-*.pt"))[:-KEPT_CHECKPOINTS]:
                old.unlink()
        # Without this the others would wait in their next step, and a slow disk would look like a hung step.
        dist.barrier()

    def resume(self) -> dict[str, Any]:
        """Take up the latest checkpoint, if there is one; the learned timeouts in it."""
        # Rank 0 chooses for all: on a network file system the ranks may see different files.
        latest = [max((path.name for path in self._directory.glob("step-*.pt")), default=None)]
        dist.broadcast_object_list(latest, src=0, device=self._device)
        if latest[0] is None:
            return {}
        path = self._directory / latest[0]
        state = torch.load(path, map_location=self._device, weights_only=True)
        if state["settings"] != self._settings:
            raise SystemExit(f"{path} has {state['settings']}, not {self._settings}; use another --checkpoint-dir")
        self._model.module.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if dist.get_rank() == 0:
            say(f"resumed from step {self.step}")
        return dict(state["learned_timeouts"])

    def summary(self) -> str:
        """Loss and accuracy on the held-out digits, and a digest of the parameters' bits."""
        with torch.no_grad():
            scores = self._model.module(self._images[-HELD_OUT:])
        labels = self._labels[-HELD_OUT:]
        loss = cross_entropy(scores, labels).item()
        accuracy = (scores.argmax(dim=1) == labels).float().mean().item()
        bits = b"".join(each.cpu().numpy().tobytes() for each in self._model.module.state_dict().values())
        return f"loss {loss:.6f} accuracy {accuracy:.3f} parameters sha256 {hashlib.sha256(bits).hexdigest()}"


class Monitoring:
    """How this rank shows that it is alive: by sections, by heartbeats, or not at all."""

    def __init__(self, kind: str, *, learns: bool) -> None:
        self.learned: dict[str, Any] = {}
        self._client = ft_launcher.NoMonitorClient() if kind == "none" else ft_launcher.connect()
        self._beats = kind == "heartbeats"
        self._learns = learns

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a part of the training as a section, or with a heartbeat at its end."""
        if self._beats:
            yield
            self._client.send_heartbeat()
        else:
            with self._client.section(name):
                yield

    def learn(self) -> None:
        """With --calculate-timeouts, replace configured timeouts by learned ones. All ranks must call this."""
        if not self._learns:
            return
        if self._beats:
            has_learned = self._client.calculate_and_set_hb_timeouts(skip_if_not_ready=True)
        else:
            # Only of steps: the others take milliseconds here, a multiple of which is soon over on a busy machine.
            has_learned = self._client.calculate_and_set_section_timeouts(
                selected_sections=["step"], calc_out_of_section=False, skip_if_not_ready=True
            )
        if has_learned:
            self.learned = dict(self._client.state_dict())

    def use(self, learned: dict[str, Any]) -> None:
        if self._learns and learned:
            self.learned = learned
            self._client.load_state_dict(learned)

    def process_group_timeout(self) -> timedelta | None:
        """With it a hang is found, and named, by the monitor, before a collective gives up."""
        return self._client.process_group_timeout()

    def shutdown(self) -> None:
        self._client.shutdown_workload_monitoring()


def join_process_group(timeout: timedelta | None) -> torch.device:
    """Join the other ranks: over NCCL when each rank of the node has a GPU of its own, else over gloo."""
    torch.set_num_threads(1)  # as torchrun does; and sums of floats depend on how they are split
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ.update(alone | os.environ)  # what torchrun would have set, for plain python
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=timeout)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=timeout)
    return device


def write_whole(path: Path, state: dict[str, Any]) -> None:
    """Save so that under `path` stands all of it or nothing, also after a kill or a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)  # the new name, too, must be on the disk
    os.close(directory)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line without the usage: every rank says it


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=FAULT_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="steps in all, resumed ones included (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the first parameters and the order of the data (0)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate (0.1)")
    parser.add_argument("--step-time", type=float, default=0.0, metavar="S", help="seconds added to each step (0)")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("runs/train_ddp"), help="(runs/train_ddp)")
    parser.add_argument("--checkpoint-every", type=int, default=10, metavar="N", help="steps (10)")
    parser.add_argument("--monitoring", choices=["sections", "heartbeats", "none"], default="sections")
    parser.add_argument("--calculate-timeouts", action="store_true", help="learn limits; needs --step-time 0.5")
    parser.add_argument("--fault", type=parse_fault, action="append", default=[], help="see below; repeatable")
    options = parser.parse_args()
    if options.steps < 1 or options.checkpoint_every < 1 or not options.step_time >= 0:
        parser.error("--steps and --checkpoint-every must be at least 1, --step-time at least 0")
    if options.calculate_timeouts and options.step_time < 0.5:  # five times 2 ms would fire on any busy machine
        parser.error("--calculate-timeouts needs --step-time 0.5 or more")
    if any(fault.step > options.steps for fault in options.fault):
        parser.error(f"--fault: there are only {options.steps} steps")
    if any(fault.kind == "hang-outer" for fault in options.fault) and options.monitoring != "sections":
        parser.error("--fault hang-outer needs --monitoring sections")
    return options


if __name__ == "__main__":
    main()
    # Not by Python's own end: behind DDP, gloo's threads outlive destroy_process_group (torch 2.13), and one that is so
    # late that it lets go of its last tensors while Python ends aborts the process. The rank would have failed after
    # all was done, and all ranks would start again.
    sys.stdout.flush()
    os._exit(0)
