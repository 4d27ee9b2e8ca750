"""From the death of a launcher to user code that runs again on the nodes that are left, 3 nodes -> 2.

Three launchers on this machine with `--nnodes 2:3`; one that does not have the store is killed (SIGKILL). What its
workers do depends on the launcher: torchrun's live on, and train with the others in a collective as if nothing had
happened. So there is a case in which they die with it, as on a machine that was switched off and said so.

And from a machine that vanishes with the only store to the end of the two others, which cannot go on: the three are on
a network of their own, and the link of the one is cut. That needs root, and pip's `-e '.[dev]'`, for the tests' hosts.

"never": not within `--limit` seconds. torchrun with its defaults forgets a node after 15 s (3 keep-alives of 5 s), but
nothing follows from that; once workers fail for another reason, the next rendezvous waits 30 s for more nodes than the
fewest, and more than one may be needed (88 s were seen). "torchrun, tuned" has the shortest times with which it works
(see TORCHRUN_TUNED in nodes.py).
"""

import math
import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from harness import Launcher, launchers, parser, quantile, samples
from nodes import TORCHRUN_TUNED, Nodes, last_end

START_WITHIN = 120.0


def recover(
    launcher: Launcher, conf: dict[str, object], limit: float, *, kind: str, worker_too: bool
) -> dict[str, float]:
    """Give the seconds from the kill to the first line of the last survivor's new worker; inf: never."""
    with Nodes(launcher, [kind], "2:3", count=3, max_restarts=3, rdzv_conf=conf) as nodes:
        started = all_started(nodes, launcher)
        victim = nodes.launchers[2]
        worker = next(report["pid"] for report in started if report["node"] == 2)
        killed_at = time.monotonic()
        victim.kill()
        if worker_too:
            with suppress(ProcessLookupError):  # its launcher's death was its own
                os.kill(worker, signal.SIGKILL)
        again = nodes.reports(2, limit, lambda report: report["world"] == 2 and report["at"] > killed_at)
        last = max(report["at"] for report in again) if len(again) == 2 else math.inf
        return {"user code runs again on the 2 others": last - killed_at}


def give_up(launcher: Launcher, conf: dict[str, object], limit: float) -> dict[str, float]:
    """Give the seconds from the cut of the store host's link to the ends of workers and launchers of the 2 others."""
    from tests.conftest import Sandbox
    from tests.nodes.hosts import network

    with tempfile.TemporaryDirectory() as folder, network(Sandbox(Path(folder))) as hosts:
        namespaces = {host.namespace: host.address for host in hosts}
        with Nodes(launcher, ["stay"], "2:3", count=3, rdzv_conf=conf, namespaces=namespaces) as nodes:
            started = all_started(nodes, launcher)
            workers = [os.pidfd_open(report["pid"]) for report in started if report["node"] != 0]
            agents = [os.pidfd_open(each.pid) for each in nodes.launchers[1:]]
            hosts[0].cut()
            cut_at = time.monotonic()
            ends = [last_end(each, cut_at + limit - time.monotonic()) for each in (workers, agents)]
            for pidfd in workers + agents:
                os.close(pidfd)
        seconds = [math.inf if end is None else end - cut_at for end in ends]
        return dict(zip(("the workers of the 2 others have ended", "their launchers have ended"), seconds, strict=True))


def all_started(nodes: Nodes, launcher: Launcher) -> list[dict[str, Any]]:
    """Wait until all three are at work, and give their reports."""
    # Three may meet in two rounds: a launcher that comes late interrupts the others.
    started = nodes.reports(3, START_WITHIN, lambda report: report["world"] == 3)
    if len(started) < 3:
        raise SystemExit(f"{launcher.name}: {len(started)} of 3 workers have started:\n{nodes.log()}")
    time.sleep(1.0)  # they are at work
    return started


CASES: dict[str, Callable[[Launcher, dict[str, object], float], dict[str, float]]] = {
    "launcher killed, workers do not talk": partial(recover, kind="stay", worker_too=False),
    "launcher killed, workers in all_reduce": partial(recover, kind="reduce", worker_too=False),
    "launcher and its worker killed, in all_reduce": partial(recover, kind="reduce", worker_too=True),
    "link of the only store's host cut, workers do not talk": give_up,
}


def main() -> None:
    made = parser(__doc__ or "", n=10, peer_n=3)
    made.set_defaults(launchers="ours,torchrun")
    made.add_argument("--limit", type=float, default=120.0, help="seconds after which it is called never")
    made.add_argument("--cases", default="0,1,2,3" if os.geteuid() == 0 else "0,1,2", help=f"which of {list(CASES)}")
    options = made.parse_args()
    chosen: list[tuple[str, Launcher, dict[str, object]]] = []
    for launcher in launchers(options, able=("ours", "torchrun")):
        chosen.append((launcher.name, launcher, {}))
        if launcher.name == "torchrun":
            chosen.append(("torchrun, tuned", launcher, dict(TORCHRUN_TUNED)))
    for case in map(int, options.cases.split(",")):
        title, measure = list(CASES.items())[case]
        figures: dict[str, dict[str, list[float]]] = {}
        for turn in range(max(samples(options, launcher) for _, launcher, _ in chosen)):
            for name, launcher, conf in chosen:
                if turn < samples(options, launcher):
                    for figure, seconds in measure(launcher, conf, options.limit).items():
                        figures.setdefault(figure, {}).setdefault(name, []).append(seconds)
        for figure, rows in figures.items():
            show_with_never(f"{title}: until {figure}", rows, options.limit)


def show_with_never(title: str, rows: dict[str, list[float]], limit: float) -> None:
    """Print a distribution per row, in which "never" may stand, and the ratio of its median to that of "ours"."""
    print(f"\n{title} [s]")
    print(f"{'':<24}{'min':>10}{'median':>10}{'max':>10}{'n':>8}  median / ours")
    reference = quantile(sorted(rows["ours"]), 0.5) if rows.get("ours") else math.inf
    for name, values in rows.items():
        ordered = sorted(values)
        points = [ordered[0], quantile(ordered, 0.5), ordered[-1]]
        shown = "".join(f"{'never':>10}" if point == math.inf else f"{point:>10.3g}" for point in points)
        ratio = "-"
        if reference < math.inf:
            ratio = f"> {limit / reference:.0f}" if points[1] == math.inf else f"{points[1] / reference:.1f}"
        print(f"{name:<24}{shown}{len(ordered):>8}  {ratio}", flush=True)


if __name__ == "__main__":
    main()
