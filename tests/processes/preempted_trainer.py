"""Two ranks that take steps together, with gloo, and save for notices; what they have saved is in files."""

import argparse
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ft_launcher import RankMonitorClient

RANK = int(os.environ["RANK"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--begin-when", help="this file is there")
    parser.add_argument("--stay", action="store_true", help="go on after a save")
    parser.add_argument("--end-after-saves", type=int, default=0)
    parser.add_argument("--save-until", help="this file is there")
    parser.add_argument("--save-at-once", type=int, help="the rank that does not wait for it")
    parser.add_argument("--deaf", type=int, help="the rank that never asks")
    parser.add_argument("--fail-once-saving", action="store_true", help="rank 1, before its first save")
    options = parser.parse_args()
    say(f"has pid {os.getpid()}")
    if options.begin_when:
        wait_for(options.directory / options.begin_when)
    client = RankMonitorClient()
    client.init_workload_monitoring()
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    train(options, client)
    client.shutdown_workload_monitoring()
    # Torch's own end aborts now and then on a busy machine, and that would count as a failure of the rank.
    os._exit(0)


def train(options: argparse.Namespace, client: RankMonitorClient) -> None:
    checkpoint, saves = options.directory / "checkpoint.json", 0
    first = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
    say(f"begins at step {first}")
    for step in range(first, options.steps):
        is_saving = options.deaf != RANK and client.should_checkpoint(step)
        if is_saving:
            save(options, checkpoint, step)
            saves += 1
            if not options.stay:
                leave(client)
            if saves == options.end_after_saves:
                client.should_checkpoint(step + 1)  # as the next step would
                return
        if not is_saving or not options.save_until:
            dist.all_reduce(torch.ones(1))
        if step - first <= 5:
            say(f"at step {step - first}")


def save(options: argparse.Namespace, checkpoint: Path, step: int) -> None:
    if options.fail_once_saving and RANK == 1 and not (options.directory / "failed").exists():
        (options.directory / "failed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    say("is saving")
    if options.save_until and options.save_at_once != RANK:
        wait_for(options.directory / options.save_until)
    (options.directory / f"saved.{step}.{RANK}").touch()
    if RANK == 0:
        temporary = checkpoint.with_suffix(".part")
        temporary.write_text(json.dumps({"step": step}))
        temporary.replace(checkpoint)
    if not options.save_until:
        dist.barrier()


def leave(client: RankMonitorClient) -> None:
    try:
        client.exit_for_preemption()
    except SystemExit as end:
        os._exit(int(str(end.code)))  # see above


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def say(text: str) -> None:
    # In one write, so that lines of several ranks do not mix.
    os.write(1, f"rank {RANK} {text}\n".encode())


if __name__ == "__main__":
    main()
