"""Rounds that are being saved when their process is killed, or when a system call fails, and what is there afterwards.

    rollout_saves.py kills DIRECTORY COUNT SEED     at random moments
    rollout_saves.py calls DIRECTORY                before each of the calls of a save; each of them failing

Prints a line of JSON. A process of its own with one thread, as it forks.
"""

import json
import os
import random
import select
import shutil
import signal
import sys
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from ft_launcher.rollout import DumpError, LoadedRound, RolloutDump
from tests.syscalls import Fault, mark, trace, why_not

SAMPLES = 12
FAILS = 3  # every such round raises


def sample(rollout_id: int, number: int, variant: str = "") -> dict[str, Any]:
    """What a sample is, by its place; of very different sizes."""
    size = 10 ** (number % 5)
    return {"place": [rollout_id, number], "text": variant, "tokens": list(range(size)), "bytes": b"\0" * size}


def save(dump: RolloutDump, rollout_id: int, pipe: int | None = None) -> None:
    """Save a round; say on the pipe of each sample that it was."""
    with dump.round(rollout_id) as writer:
        for number in range(SAMPLES):
            writer.append(sample(rollout_id, number))
            if pipe is not None:
                os.write(pipe, bytes([rollout_id, number]))
        if rollout_id % FAILS == FAILS - 1:
            raise RuntimeError("the verifier broke")


def save_for_ever(directory: Path, pipe: int) -> None:
    """Save rounds until the end."""
    dump = RolloutDump(str(directory / "r_{rollout_id}.pt"))
    for rollout_id in range(200):
        try:
            save(dump, rollout_id, pipe)
        except RuntimeError:
            continue


def wrong_with(loaded: LoadedRound, status: str, said: int) -> list[str]:
    """Compare a round with what was saved."""
    expected = [sample(loaded.rollout_id, number) for number in range(len(loaded.samples))]
    found = [] if loaded.samples == expected else [f"{loaded.path.name}: other samples"]
    if loaded.status != status or (status != "partial" and len(expected) != SAMPLES):
        found.append(f"{loaded.path.name}: {loaded.status}, {len(expected)} samples")
    if len(expected) < said:
        found.append(f"{loaded.path.name}: {said} samples were said to be saved, {len(expected)} are")
    return found


def look(directory: Path, said: dict[int, int], seen: dict[str, int]) -> list[str]:
    """Say what is wrong with what a killed process has left; `said`: how many samples of each round were saved."""
    dump = RolloutDump(str(directory / "r_{rollout_id}.pt"))
    wrong = []
    left = {each.name for each in directory.iterdir()}
    for rollout_id in range(max(said, default=0) + 2):
        for name, options, status in (
            (f"r_{rollout_id}.pt", {}, "complete"),
            (f"r_failed_{rollout_id}.pt", {"failed": True}, "failed"),
            (f"r_{rollout_id}.pt.partial", {"partial": True}, "partial"),
        ):
            if name not in left:
                continue
            left.discard(name)
            seen[status] += 1
            try:
                loaded = dump.load(rollout_id, **options)
            except DumpError as error:
                # Killed before the round had begun.
                if status != "partial" or said.get(rollout_id):
                    wrong.append(str(error))
                continue
            finally:
                count = said.pop(rollout_id, 0)
            # It may have been killed when all was written but the name.
            status_seen = loaded.status if status == "partial" and len(loaded.samples) == SAMPLES else status
            wrong += wrong_with(loaded, status_seen, count)
    wrong += [f"{name} is left" for name in left]
    return wrong + [f"round {rollout_id} is lost" for rollout_id in said]


def kill_one(directory: Path, after: int, moment: float, seen: dict[str, int]) -> list[str]:
    """Kill a process that saves, `moment` seconds after so many samples."""
    directory.mkdir()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            save_for_ever(directory, write)
        finally:
            os._exit(0)
    os.close(write)
    pidfd = os.pidfd_open(child)
    data = b""
    while len(data) < 2 * after:
        data += os.read(read, 2 * after - len(data))
    select.select([pidfd], [], [], moment)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(pidfd)
    while more := os.read(read, 1 << 16):
        data += more
    os.close(read)
    said = {data[at]: data[at + 1] + 1 for at in range(0, len(data) - 1, 2)}
    last = max(said)
    wrong = look(directory, said, seen)
    # The next process does the round again, and keeps what was left of it.
    before = (directory / f"r_{last}.pt.partial").exists()
    dump = RolloutDump(str(directory / "r_{rollout_id}.pt"))
    try:
        save(dump, last)
    except RuntimeError:
        before = False  # it failed again, and took that name
    if before:
        wrong += wrong_with(dump.load(last), "complete", SAMPLES)
        wrong += [] if (directory / f"r_failed_{last}.pt").exists() else ["what was left is lost"]
    if (directory / f"r_{last}.pt.partial").exists():
        wrong.append("something is left of a round that was done again")
    shutil.rmtree(directory)
    return wrong


def kills(root: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill so many."""
    chance = random.Random(seed)
    seen = {"complete": 0, "failed": 0, "partial": 0}
    wrong: list[str] = []
    for number in range(count):
        wrong += kill_one(root / str(number), chance.randint(1, 60), chance.uniform(0.0, 0.01), seen)
    return {"wrong": wrong, "seen": seen}


def calls(root: Path) -> dict[str, Any]:
    """Kill a save before each of its system calls, and have each of them fail: the round that was there stays."""
    if reason := why_not():
        return {"skip": reason}
    place = root / "watched"
    dump = RolloutDump(str(place / "r_{rollout_id}.pt"))

    def write(variant: str) -> None:
        with dump.round(1) as writer:
            for number in range(3):
                writer.append(sample(1, number, variant))

    def work() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        write("old")
        mark()
        try:
            write("new")
        except OSError:
            mark()
            write("again")  # the disk has room again
            return
        mark()

    def variant() -> str:
        loaded = dump.load(1)
        found = {each["text"] for each in loaded.samples}
        whole = loaded.samples == [sample(1, number, *found) for number in range(3)] and loaded.status == "complete"
        return found.pop() if whole and len(found) == 1 else "neither"

    code, regions = trace(work, place, [None])
    order = [[each.name, each.path, each.onto] for each in regions[0]]
    wrong = [] if code == 0 and variant() == "new" else [f"undisturbed: {code}, {variant()}"]
    renamed = next(at for at, each in enumerate(regions[0]) if each.name.startswith("rename"))
    for at, call in enumerate(regions[0]):
        code, _ = trace(work, place, [Fault(at)])
        if code != -signal.SIGKILL or variant() != ("old" if at <= renamed else "new"):
            wrong.append(f"killed before {call}: {code}, {variant()}")
        for number, stays in ((ENOSPC, True), (EIO, False)):
            code, _ = trace(work, place, [Fault(at, number, stays=stays)])
            # "new": closing the failed round has no fault to show.
            if code != 0 or variant() not in ("again", "new"):
                wrong.append(f"{call} fails with {number}: {code}, {variant()}")
            if (place / "r_1.pt.partial").exists():
                wrong.append(f"{call} fails with {number}: something is left after the next save")
    return {"wrong": wrong, "order": order}


if __name__ == "__main__":
    question, directory, *rest = sys.argv[1:]
    answer = kills(Path(directory), *map(int, rest)) if question == "kills" else calls(Path(directory))
    sys.stdout.write(json.dumps(answer) + "\n")
