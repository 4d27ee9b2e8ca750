"""SIGTERM at random moments, run after run: does each one save the same step on all ranks, and the next go on from it?

Two ranks train with DDP over gloo, validate now and then, and save slowly, every rank a part of its own. Each run goes
on from the checkpoint of the one before, and ends by SIGTERM at a random moment of its start, its training, a
validation or a save; sometimes by two. For each it must be so: the exit code asks for another start, all is over
within the grace, no restart was used, and the checkpoint is whole, of one step, and not older than the one before.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

GRACE = 15.0  # seconds
VALIDATE_EVERY, SAVE_EVERY = 15, 25  # steps
STEP, BATCH_OF_VALIDATION, SAVING = 0.01, 0.05, 0.3  # seconds that they take
RANKS = 2


# -- the training -----------------------------------------------------------------------------------------------------


def train(directory: Path) -> None:
    """Be a rank."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import ft_launcher

    client = ft_launcher.connect()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    first = 0
    if (directory / "checkpoint.json").exists():
        first = int(json.loads((directory / "checkpoint.json").read_text())["step"])
        state = torch.load(directory / f"step{first}.rank{rank}.pt", weights_only=True)
        model.load_state_dict(state["model"])
        if state["step"] != first:
            raise SystemExit(f"rank {rank} has step {state['step']}, and the checkpoint says {first}")
    say(f"rank {rank} begins at step {first}")

    def save(step: int) -> None:
        say(f"rank {rank} saves step {step}")
        time.sleep(random.uniform(0, SAVING))
        path = directory / f"step{step}.rank{rank}.pt"
        torch.save({"model": model.state_dict(), "step": step}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        dist.barrier()
        if rank == 0:
            commit(directory, step)
        dist.barrier()

    for step in range(first, 10**9):
        if client.should_checkpoint(step):
            save(step)
            try:
                client.exit_for_preemption()
            except SystemExit as end:
                os._exit(int(str(end.code)))  # torch 2.13 aborts now and then when Python ends behind a barrier
        if step % SAVE_EVERY == SAVE_EVERY - 1:
            save(step)
        time.sleep(STEP)
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        if step % VALIDATE_EVERY == VALIDATE_EVERY - 1:
            say(f"rank {rank} validates")
            for _ in range(6):
                time.sleep(BATCH_OF_VALIDATION)
            dist.all_reduce(torch.ones(1))
            say(f"rank {rank} has validated")


def commit(directory: Path, step: int) -> None:
    """Make the files of this step the checkpoint, and remove those of others."""
    part = directory / "checkpoint.part"
    part.write_text(json.dumps({"step": step}))
    part.replace(directory / "checkpoint.json")
    for path in directory.glob("step*.pt"):
        if not path.name.startswith(f"step{step}."):
            path.unlink()


def say(text: str) -> None:
    """Print a line in one write."""
    os.write(1, f"{text}\n".encode())


# -- the runs ---------------------------------------------------------------------------------------------------------


def run(directory: Path, chance: random.Random) -> tuple[str, float]:
    """Run it once, and end it. Gives what it was doing then, and how long it took. SystemExit where it was not so."""
    before = checkpoint(directory)
    command = [sys.executable, "-m", "ft_launcher", "--nproc-per-node", str(RANKS), "--max-restarts", "3"]
    command += ["--ft-preemption-signals", "SIGTERM,SIGUSR1", "--term-timeout", str(GRACE)]
    command += [__file__, "--rank", str(directory)]
    with (directory / "output").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        # A third of them while it starts, on a machine that does nothing else.
        time.sleep(chance.choice([chance.uniform(0.1, 3.0), chance.uniform(3.0, 7.0), chance.uniform(3.0, 7.0)]))
        said = (directory / "output").read_text()
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0.0, 0.6))
            process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(2 * GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        taken = time.monotonic() - began
        output.seek(0)
        everything = output.read()

    def complain(what: str) -> None:
        raise SystemExit(f"{what}; the output was:\n{everything}")

    after = checkpoint(directory)
    if code != os.EX_TEMPFAIL:
        complain(f"exit code {code}, not {os.EX_TEMPFAIL}")
    if taken > GRACE:
        complain(f"ended after {taken:.1f} s")
    if "restart 1 of" in everything:
        complain("a restart was used")
    whole = [] if after is None else [f"step{after}.rank{each}.pt" for each in range(RANKS)]
    if sorted(each.name for each in directory.glob("step*.pt")) != whole:
        complain(f"step {after} is not whole: {sorted(each.name for each in directory.iterdir())}")
    begun = {int(each) for each in re.findall(r"begins at step (\d+)", everything)}
    if begun - {before or 0}:
        complain(f"began at steps {begun}, and the checkpoint was of step {before}")
    saved = re.search(r"preempted .*: saved at step (\d+)", everything)
    if saved is not None and int(saved[1]) != after:
        complain(f"saved at step {saved[1]}, and the checkpoint is of step {after}")
    if saved is None and begun:
        complain("ranks had begun, and did not save")
    if (before or 0) > (after or 0):
        complain(f"the checkpoint went back from step {before} to {after}")
    return moment(said), taken


def checkpoint(directory: Path) -> int | None:
    """Give the step of the checkpoint."""
    path = directory / "checkpoint.json"
    return int(json.loads(path.read_text())["step"]) if path.exists() else None


def moment(said: str) -> str:
    """Say what went on when this was all that had been said."""
    last = [line for line in said.splitlines() if line.startswith("rank ")]
    if "started rank" not in said:
        return "before the ranks"
    if not any("begins" in line for line in last):
        return "start of the ranks"
    if "saves" in last[-1]:
        return "in or behind a save"
    return "validation" if last[-1].endswith("validates") else "training"


def main() -> None:
    """Run it as often as asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=100, help="runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        train(options.rank)
        return
    chance = random.Random(options.seed)
    moments: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as directory:
        for number in range(options.n):
            what, taken = run(Path(directory), chance)
            moments[what] += 1
            longest = max(longest, taken)
            print(f"{number + 1:>4} {what:<20}{taken:>6.2f} s, step {checkpoint(Path(directory))}", flush=True)
    print(f"{options.n} runs, all as they must be; the longest took {longest:.2f} s of {GRACE:g}")
    print(", ".join(f"{what}: {count}" for what, count in moments.most_common()))


if __name__ == "__main__":
    main()
