"""Ranks that count steps, each at its own pace; rank 0 saves every tenth, in files that may hold poison.

A rank that goes on from a poisoned file dies at once, after it has said from where it goes on.
"""

import argparse
import os
import signal
import time
from pathlib import Path

from ft_launcher import RankMonitorClient

RANK = int(os.environ["RANK"])
CYCLE = int(os.environ["FT_CYCLE"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--die-at", default="0:0", metavar="STEP:CYCLES", help="in so many cycles from the first on")
    parser.add_argument("--poison", type=int, action="append", default=[], help="the step whose first save is poisoned")
    parser.add_argument("--dies-of-poison", type=int, default=0, metavar="RANK")
    parser.add_argument("--dies-from", type=int, default=10**9, metavar="CYCLE", help="in each cycle from this one on")
    parser.add_argument("--stubborn", action="store_true", help="take no hint")
    parser.add_argument("--ask", action="store_true", help="should_checkpoint instead of report_step")
    parser.add_argument("--first-rank-reports", action="store_true", help="and no other")
    parser.add_argument("--stay-from", type=int, default=10**9, metavar="CYCLE", help="take no step, from this one on")
    options = parser.parse_args()
    client = RankMonitorClient()
    client.init_workload_monitoring()
    saves = options.directory / "saves"
    saves.mkdir(exist_ok=True)
    path = choose(client, saves, stubborn=options.stubborn)
    step = 0 if path is None else int(path.name)
    if RANK == 0 or not options.first_rank_reports:
        assert client.report_resume(path, step)
        (options.directory / f"reported {CYCLE}").touch()
    while not (options.directory / f"reported {CYCLE}").exists():
        time.sleep(0.01)  # as a barrier would do before they load
    if options.dies_from <= CYCLE:
        os.kill(os.getpid(), signal.SIGKILL)
    is_poisoned = path is not None and path.read_text() == "poison"
    if is_poisoned and options.dies_of_poison == RANK:
        os.kill(os.getpid(), signal.SIGKILL)
    say(f"goes on from {step}")
    is_staying = is_poisoned or options.stay_from <= CYCLE
    while is_staying or (RANK and not (saves.parent / "finished").exists()):
        time.sleep(0.01)  # for the other ranks, as a collective would
    if not RANK:
        train(client, options, saves, step)
        (saves.parent / "finished").touch()
    client.shutdown_workload_monitoring()


def choose(client: RankMonitorClient, saves: Path, *, stubborn: bool) -> Path | None:
    hint = client.resume_hint()
    say(f"is told {None if hint is None else (hint.step, [Path(each).name for each in hint.suspects])}")
    if hint is not None and not stubborn:
        return None if hint.path is None else Path(hint.path)
    return max(saves.iterdir(), key=lambda each: int(each.name), default=None)


def train(client: RankMonitorClient, options: argparse.Namespace, saves: Path, first: int) -> None:
    die_at, cycles = map(int, options.die_at.split(":"))
    for step in range(first + 1, options.steps + 1):
        if options.ask:
            client.should_checkpoint(step)
        else:
            client.report_step(step)
        if step == die_at and cycles > CYCLE:
            os.kill(os.getpid(), signal.SIGKILL)
        if step % 10 == 0:
            path, mark = saves / str(step), saves.parent / f"poisoned {step}"
            path.write_text("poison" if step in options.poison and not mark.exists() else "food")
            mark.touch()
            assert client.report_checkpoint(path, step)


def say(text: str) -> None:
    # In one write, so that lines of several ranks do not mix.
    os.write(1, f"cycle {CYCLE} rank {RANK} {text}\n".encode())


if __name__ == "__main__":
    main()
