"""Train one layer with DDP over gloo; save after each step, stop where warned, and say when all is done.

    ft_launcher ... slurm_trainer.py --steps 8 --wait-at 4 --crash-at 3

Same world size, same bits, however often it is stopped: a step is a function of the last one and of its number. With
--wait-at it stays at that step until there is a file `go` in the working directory, or it is warned.
"""

import argparse
import os
import signal
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import ft_launcher

CHECKPOINT = Path("checkpoint.pt")
PAUSE = 0.05  # seconds between two looks at what the test has put there


def main() -> None:
    options = parse_options()
    warned = Warned()
    client = ft_launcher.connect()
    dist.init_process_group("gloo")
    run(options, warned, client)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Python takes handlers away as it ends: a signal then would kill
    client.shutdown_workload_monitoring()
    # DDP keeps gloo's thread, which may let go of the last barrier as Python ends; then torch 2.13 aborts, 1 in 20 times.
    os._exit(0)


def run(options: argparse.Namespace, warned: "Warned", client: ft_launcher.RankMonitorClient) -> None:
    """Train from the last checkpoint to the last step, or until warned."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(torch.nn.Linear(4, 1, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = resume(model, optimizer)
    say(f"start: rank {rank} of {world} on {os.uname().nodename}, cycle {os.environ['FT_CYCLE']}, from step {step}")
    while step < options.steps:
        step += 1
        if step == options.crash_at and rank == world - 1 and is_first("crashed"):
            raise SystemExit(f"rank {rank} crashes at step {step}")
        if step == options.wait_at:
            say(f"rank {rank} waits at step {step}")
            warned.wait_for(Path("go"))
        with client.section("step"):
            train(model, optimizer, step)
        stop = is_to_stop(warned)
        save(model, optimizer, step)
        if stop:
            say(f"rank {rank} was warned, and has saved step {step}")
            return
    if rank == 0:
        numbers = torch.cat([each.flatten() for each in model.parameters()]).tolist()
        say(f"finished step {step}: {[number.hex() for number in numbers]}")
        if flag := os.environ.get("FAULT_TOL_FINISHED_FLAG_FILE"):
            Path(flag).touch()


class Warned:
    """Whether SIGUSR1 or SIGTERM came to this rank."""

    def __init__(self) -> None:
        self.by: int | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.by = number  # and no more: what saves, saves between two steps

    def wait_for(self, path: Path) -> None:
        clock = threading.Event()
        while not path.exists() and self.by is None:
            clock.wait(PAUSE)


def is_to_stop(warned: Warned) -> bool:
    """Whether any rank was warned: all must stop after the same step."""
    wish = torch.tensor(int(warned.by is not None))
    dist.all_reduce(wish, dist.ReduceOp.MAX)
    return bool(wish.item())


def train(model: DistributedDataParallel, optimizer: torch.optim.SGD, step: int) -> None:
    batch = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    mine = batch[dist.get_rank() :: dist.get_world_size()]
    optimizer.zero_grad()
    mse_loss(model(mine), mine.sum(dim=1, keepdim=True)).backward()
    optimizer.step()


def resume(model: DistributedDataParallel, optimizer: torch.optim.SGD) -> int:
    """Take up the checkpoint, and give its step; without one, begin with the same parameters everywhere."""
    if not CHECKPOINT.exists():
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.5)
        return 0
    state = torch.load(CHECKPOINT, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def save(model: DistributedDataParallel, optimizer: torch.optim.SGD, step: int) -> None:
    if dist.get_rank() == 0:
        temporary = CHECKPOINT.with_suffix(".tmp")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
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
    return parser.parse_args()


if __name__ == "__main__":
    main()
