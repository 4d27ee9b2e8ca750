"""Train one layer in data parallel over gloo; save now and then, and for a notice, and say when all is done.

    ft_launcher ... slurm_trainer.py --steps 8 --wait-at 4 --crash-at 3

Same world size, same bits, however often it is stopped: a step is a function of the last one and of its number. With
--wait-at it stays behind that step until there is a file `go` in the working directory, or it has saved for a notice.
"""

import argparse
import os
import signal
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss

import ft_launcher

CHECKPOINT = Path("checkpoint.pt")
SAVE_EVERY = 3  # steps
PAUSE = 0.05  # seconds between two looks at what the test has put there
QUESTIONS = 10**6
"""Of these each step has room for: while it waits, a rank asks on, and all ranks save at the same question."""


def main() -> None:
    options = parse_options()
    if options.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    client = ft_launcher.connect()
    dist.init_process_group("gloo")
    code = 0
    try:
        run(options, client)
        client.shutdown_workload_monitoring()
    except SystemExit as preempted:
        if preempted.code != os.EX_TEMPFAIL:
            raise
        code = os.EX_TEMPFAIL
    # A thread of gloo may let go of the last barrier as Python ends: then torch 2.13 aborts (1 in 20).
    os._exit(code)


def run(options: argparse.Namespace, client: ft_launcher.RankMonitorClient) -> None:
    """Train from the last checkpoint to the last step, or until a notice."""
    rank, world = dist.get_rank(), dist.get_world_size()
    training = Training()
    step = training.resume()
    say(f"start: rank {rank} of {world} on {os.uname().nodename}, cycle {os.environ['FT_CYCLE']}, from step {step}")
    while step < options.steps:
        if is_to_save(client, step, is_to_wait=step == options.wait_at):
            training.save(step)
            say(f"rank {rank} was warned, and has saved step {step}")
            client.exit_for_preemption()
        step += 1
        if step == options.crash_at and rank == world - 1 and is_first("crashed"):
            raise SystemExit(f"rank {rank} crashes at step {step}")
        with client.section("step"):
            training.take_step(step)
        if step % SAVE_EVERY == 0:
            training.save(step)
    if rank == 0:
        say(f"finished step {step}: {[number.hex() for number in training.parameters.tolist()]}")
        if flag := os.environ.get("FAULT_TOL_FINISHED_FLAG_FILE"):
            Path(flag).touch()


def is_to_save(client: ft_launcher.RankMonitorClient, step: int, *, is_to_wait: bool) -> bool:
    """Ask whether to save behind this step; if it is to wait, until there is a notice, or the file `go`."""
    if client.should_checkpoint(step * QUESTIONS):
        return True
    if not is_to_wait:
        return False
    say(f"rank {dist.get_rank()} waits at step {step}")
    clock = threading.Event()
    question = step * QUESTIONS
    while not Path("go").exists():
        clock.wait(PAUSE)
        question += 1
        if client.should_checkpoint(question):
            return True
    return False


class Training:
    """Fits four numbers and a fifth; all ranks have the same.

    By hand: torch's DDP and its optimizers load its compiler, which takes half as long as all else that a rank loads.
    """

    def __init__(self) -> None:
        self.parameters = torch.full((5,), 0.5, dtype=torch.float64)
        self._velocity = torch.zeros_like(self.parameters)

    def take_step(self, step: int) -> None:
        batch = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        mine = batch[dist.get_rank() :: dist.get_world_size()]
        parameters = self.parameters.requires_grad_()
        (gradient,) = torch.autograd.grad(mse_loss(mine @ parameters[:4] + parameters[4], mine.sum(dim=1)), parameters)
        dist.all_reduce(gradient)
        self._velocity = 0.9 * self._velocity + gradient / dist.get_world_size()
        self.parameters = parameters.detach() - 0.1 * self._velocity

    def resume(self) -> int:
        """Take up the checkpoint, and give its step: 0 without one."""
        if not CHECKPOINT.exists():
            return 0
        state = torch.load(CHECKPOINT, weights_only=True)
        self.parameters, self._velocity = state["parameters"], state["velocity"]
        return int(state["step"])

    def save(self, step: int) -> None:
        if dist.get_rank() == 0:
            temporary = CHECKPOINT.with_suffix(".tmp")
            torch.save({"parameters": self.parameters, "velocity": self._velocity, "step": step}, temporary)
            temporary.replace(CHECKPOINT)
        dist.barrier()


def is_first(name: str) -> bool:
    """Whether nobody has asked this before, in whatever start."""
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def say(text: str) -> None:
    # One write, so that the lines of several ranks do not mix.
    os.write(1, f"{text}\n".encode())


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--wait-at", type=int)
    parser.add_argument("--crash-at", type=int)
    parser.add_argument("--ignore-term", action="store_true", help="hear of a preemption only from the launcher")
    return parser.parse_args()


if __name__ == "__main__":
    main()
