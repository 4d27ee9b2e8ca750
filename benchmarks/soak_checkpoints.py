"""SIGKILL at random moments, run after run: is a checkpoint ever lost, ever half there, or anything ever left over?

One rank, or two over gloo, save after every step, now and then the step that they resumed from once more; their values
are a function of the step. They are killed at a random moment of a start, of a save, or in between: all of them, or
one, and then the other, as a launcher would. The model is written in one piece or in pieces. For the next run it must
be so: it resumes from the newest checkpoint that stands in the directory, no save that had returned is lost, what it
loads is that step to the bit, nothing but checkpoints is left, and nobody raises or warns.
"""

import argparse
import faulthandler
import json
import logging
import os
import random
import re
import selectors
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch
import torch.distributed as dist
from torch import nn

import ft_launcher.checkpoint.sharded  # noqa: F401 - once, before the forks
from ft_launcher.checkpoint import CheckpointManager

KEPT = 2
PATIENCE = 180.0  # seconds for something that comes at once, on a machine that does much else
NAME = re.compile(r"(?:\.replaced-)?step_(\d{8,})")
Saved = tuple[int, int]  # a step, and the run that saved it: in the order of the saves
NOTHING: Saved = (0, 0)


# -- a rank -----------------------------------------------------------------------------------------------------------


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Give what is saved: 1.4 MB in one tensor, and small ones."""
    model = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 4))
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


@torch.no_grad()
def go_to(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give everything the values of `step`."""
    for index, parameter in enumerate(model.parameters()):
        parameter.copy_(torch.arange(parameter.numel()).add_((step % 8000) * 1000 + index).view_as(parameter))
    optimizer.param_groups[0]["lr"] = float(step)


def is_at(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Say whether everything has the values of `step`, to the bit."""
    expected, other = training()
    go_to(step, expected, other)
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs) and optimizer.param_groups[0]["lr"] == step


class Telling(logging.Handler):
    """Tells the driver of warnings: a kill gives no reason for one."""

    def __init__(self, pipe: int) -> None:
        super().__init__(logging.WARNING)
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        """Tell it."""
        say(self._pipe, "warned", record.getMessage())


def say(pipe: int, what: str, value: Any) -> None:
    """Tell the driver in one write."""
    os.write(pipe, (json.dumps([what, value, monotonic()])[:4000] + "\n").encode())


def train(run: "Run", rank: int, pipe: int) -> None:
    """Be a rank until killed; in the last run, save once and end."""
    if run.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{run.meeting}", rank=rank, world_size=run.ranks)
    chance = random.Random(run.seed)  # the same on all ranks
    model, optimizer = training()
    manager = CheckpointManager(
        run.directory, KEPT, async_save=run.is_async, backend=chance.choice(["torch", "dcp"]), show_progress=False
    )
    restored = manager.load_latest(model, optimizer)
    if rank == 0 and (left := leftovers(run.directory)):
        say(pipe, "left over", left)
    loaded = NOTHING if restored is None else (restored.step, restored.extra["run"])
    if restored is not None and not is_at(restored.step, model, optimizer):
        say(pipe, "other values", loaded)
    say(pipe, "loaded", loaded)
    step = loaded[0]
    saving: Saved | None = None
    while True:
        step += 0 if step and saving is None and chance.random() < 0.3 else 1
        go_to(step, model, optimizer)
        before, saving = saving, (step, run.number)
        say(pipe, "saving", saving)
        manager.save(model, optimizer, step, {"loss": step * 7919 % 101}, extra={"run": run.number})
        if before is not None and run.is_async:
            say(pipe, "saved", before)  # this save has waited for it
        if not run.is_async or chance.random() < 0.5:
            manager.wait()
            say(pipe, "saved", saving)
        if run.is_last:
            manager.close()
            return


def names(directory: Path) -> list[str]:
    """Give what stands there, sorted."""
    return sorted(each.name for each in directory.iterdir()) if directory.exists() else []


def leftovers(directory: Path) -> list[str]:
    """Give what stands there and is no checkpoint."""
    return [name for name in names(directory) if not name.startswith("step_") and name != ".lock"]


# -- the driver -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One life of the ranks."""

    directory: Path
    meeting: Path
    ranks: int
    number: int
    seed: int
    is_async: bool
    is_last: bool
    said: list[tuple[str, Any, float]] = field(default_factory=list)
    pids: dict[int, int] = field(default_factory=dict)
    """By what the pipes' reading ends are."""

    def start(self) -> None:
        """Fork the ranks."""
        self.meeting.unlink(missing_ok=True)
        for rank in range(self.ranks):
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.close(reading)
                    faulthandler.register(signal.SIGUSR1)
                    logging.getLogger().addHandler(Telling(writing))
                    train(self, rank, writing)
                    code = 0
                except BaseException as error:  # noqa: BLE001 - the driver judges
                    say(writing, "raised", repr(error))
                finally:
                    os._exit(code)
            os.close(writing)
            os.set_blocking(reading, False)
            self.pids[reading] = pid

    def listen(self, seconds: float, until: str = "") -> bool:
        """Hear for so long, or until somebody says `until`; whether somebody did."""
        deadline = monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for pipe in self.pids:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map() and (left := deadline - monotonic()) > 0:
                for key, _ in selector.select(left):
                    # A line is one write of less than PIPE_BUF: it comes whole.
                    data = os.read(key.fd, 1 << 20).decode()
                    if not data:
                        selector.unregister(key.fd)
                    new = [tuple(json.loads(line)) for line in data.splitlines()]
                    self.said += new
                    if until and any(what in (until, "raised") for what, _, _ in new):
                        return True
        return not until

    def kill(self, chance: random.Random) -> float:
        """Kill all, or one and then the rest, and hear them out; when."""
        pids = list(self.pids.values())
        chance.shuffle(pids)
        at = monotonic()
        os.kill(pids[0], signal.SIGKILL)
        if len(pids) > 1 and chance.random() < 0.5:
            self.listen(chance.uniform(0, 0.05))
        for pid in pids[1:]:
            os.kill(pid, signal.SIGKILL)
        self.end()
        return at

    def show_stacks(self) -> None:
        """Have the ranks say where they are, and kill them."""
        for pid in self.pids.values():
            os.kill(pid, signal.SIGUSR1)
        self.listen(5)
        self.kill(random.Random(0))

    def end(self) -> list[int]:
        """Wait for their ends, and give the exit codes."""
        self.listen(PATIENCE)
        codes = []
        for pipe, pid in self.pids.items():
            os.close(pipe)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return codes

    def pairs(self, what: str) -> list[Saved]:
        """Give the saves of which this was said."""
        return [tuple(value) for each, value, _ in self.said if each == what]

    def when(self, what: str) -> float | None:
        """Give when this was said first."""
        return next((at for each, _, at in self.said if each == what), None)


def rehearse() -> None:
    """Have torch import here what it imports on first use, and not in every rank."""
    model, optimizer = training()
    with tempfile.TemporaryDirectory() as directory:
        for backend in ("torch", "dcp"):
            with CheckpointManager(directory, backend=backend) as manager:
                manager.save(model, optimizer, 1)
                manager.load_latest(model, optimizer)


class Soak:
    """Runs that are killed, and what must be so afterwards."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self.directory = directory / "checkpoints"
        self.meeting = directory / "meeting"
        self.options = options
        self.chance = random.Random(options.seed)
        self.least = self.most = NOTHING  # what the next one may load
        self.moments: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.saves = 0
        self.starting, self.saving = 0.3, 0.05  # seconds, as seen

    def once(self, number: int, *, is_last: bool = False) -> None:
        """Run the ranks, kill them, and look. SystemExit where it was not so."""
        newest = self._newest()
        run = Run(
            self.directory,
            self.meeting,
            self.options.ranks,
            number,
            self.chance.randrange(1 << 32),
            is_async=self.options.mode == "async",
            is_last=is_last,
        )
        began = monotonic()
        run.start()
        killed_at = None
        if is_last:
            if codes := [code for code in run.end() if code]:
                raise SystemExit(f"the last run ended with {codes}: {run.said}")
        else:
            if self.chance.random() < 0.15:
                run.listen(self.chance.uniform(0, self.starting))
            else:
                if not run.listen(PATIENCE, until="saving"):
                    run.show_stacks()
                    raise SystemExit(f"run {number} did not come to save: {run.said}")
                run.listen(self.chance.uniform(0, 5 * self.saving))
            killed_at = run.kill(self.chance)
        self._judge(run, newest, killed_at)
        if not is_last:
            self._learn(run, began)

    def _judge(self, run: Run, newest: int, killed_at: float | None) -> None:
        # A rank whose peer was killed may well say that it is gone.
        bad = [
            (what, value)
            for what, value, at in run.said
            if what in ("left over", "other values")
            or (what in ("raised", "warned") and (killed_at is None or at < killed_at or run.ranks == 1))
        ]
        for loaded in run.pairs("loaded"):
            if not self.least <= loaded <= self.most:
                bad.append(("loaded", f"{loaded}, not between {self.least} and {self.most}"))
            if loaded[0] != newest:
                bad.append(("loaded", f"step {loaded[0]}, and the newest is {newest}"))
        if len(set(run.pairs("loaded"))) > 1:
            bad.append(("loaded", "not the same on all ranks"))
        if bad:
            raise SystemExit(f"run {run.number}: {bad}; in the directory: {names(self.directory)}")
        for loaded in run.pairs("loaded"):
            self.least = self.most = loaded
        self.least = max([self.least, *run.pairs("saved")])
        self.most = max([self.most, *run.pairs("saving")])

    def _learn(self, run: Run, began: float) -> None:
        self.saves += len(set(run.pairs("saved")))
        loaded, saving, saved = run.when("loaded"), run.when("saving"), run.when("saved")
        if loaded is not None:
            self.starting += (loaded - began - self.starting) / 10
        if saving is not None and saved is not None:
            self.saving += (saved - saving - self.saving) / 10
        in_flight = max(run.pairs("saving"), default=NOTHING) > max(run.pairs("saved"), default=NOTHING)
        self.moments["start or load" if saving is None else "save" if in_flight else "between saves"] += 1
        self.found.update({re.split(r"[-_]", name)[0] for name in leftovers(self.directory)})

    def _newest(self) -> int:
        return max((int(match[1]) for name in names(self.directory) if (match := NAME.fullmatch(name))), default=0)


def main() -> None:
    """Run it as often as asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--mode", choices=("sync", "async"), default="sync")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rehearse()
    with tempfile.TemporaryDirectory() as directory:
        soak = Soak(Path(directory), options)
        began = monotonic()
        for number in range(1, options.n + 1):
            soak.once(number)
            if number % 100 == 0:
                print(f"{number:>5} kills, {soak.saves} saves, step {soak.least[0]}", flush=True)
        soak.once(options.n + 1, is_last=True)
        if left := leftovers(soak.directory):
            raise SystemExit(f"left over: {left}")
        if len(list(soak.directory.glob("step_*"))) > KEPT + 1:
            raise SystemExit(f"too many are kept: {names(soak.directory)}")
        took = monotonic() - began
    print(f"{options.n} kills in {took:.0f} s, all as it must be; {soak.saves} saves returned, none of them is lost")
    print("killed in: " + ", ".join(f"{what}: {count}" for what, count in soak.moments.most_common()))
    print("left by the dead, and swept: " + (", ".join(f"{w}: {c}" for w, c in soak.found.most_common()) or "nothing"))


if __name__ == "__main__":
    sys.exit(main())
