"""From the death of a rank on one node to the end of the workers of all nodes, 3 nodes, workers that do not talk.

So nothing but the launchers can tell the other nodes, as in a job whose ranks are busy on their own. The launchers take
turns with one job each, in which the rank of one node after the other is killed; the harness waits a random time before
it strikes, so that no polling beats with it. Also until user code runs again everywhere.
"""

import math
import os
import random
import signal
import time

from bench_node_loss import show_with_never
from harness import Launcher, launchers, parser, samples
from nodes import Nodes, last_end

START_WITHIN = 120.0
TURNS = 3
"""Jobs of each launcher, among which its samples are spread."""


def stop(launcher: Launcher, n: int, limit: float) -> tuple[list[float], list[float]]:
    """Give the seconds until all old workers were gone, and until all new ones began, `n` times in a row."""
    stopped, again = [], []
    with Nodes(launcher, ["stay"], "3", count=3, max_restarts=n + 1) as nodes:
        started = nodes.reports(3, START_WITHIN)
        for turn in range(n):
            if len(started) < 3:
                raise SystemExit(f"{launcher.name}: {len(started)} of 3 workers have started:\n{nodes.log()}")
            time.sleep(random.uniform(1.0, 2.0))
            pidfds = {report["node"]: os.pidfd_open(report["pid"]) for report in started}
            killed_at = time.monotonic()
            signal.pidfd_send_signal(pidfds[turn % 3], signal.SIGKILL)
            ended = last_end(list(pidfds.values()), limit)
            for pidfd in pidfds.values():
                os.close(pidfd)
            if ended is None:
                return [*stopped, math.inf], again
            stopped.append(ended - killed_at)
            started = nodes.reports(3, limit)
            again.append(max((report["at"] for report in started), default=math.inf) - killed_at)
    return stopped, again


def main() -> None:
    made = parser(__doc__ or "", n=30, peer_n=10)
    made.set_defaults(launchers="ours,torchrun")
    made.add_argument("--limit", type=float, default=90.0, help="seconds after which it is called never")
    options = made.parse_args()
    chosen = launchers(options, able=("ours", "torchrun"))
    stopped: dict[str, list[float]] = {launcher.name: [] for launcher in chosen}
    again: dict[str, list[float]] = {launcher.name: [] for launcher in chosen}
    for _ in range(TURNS):
        for launcher in chosen:
            share = math.ceil(samples(options, launcher) / TURNS)
            for rows, taken in zip((stopped, again), stop(launcher, share, options.limit), strict=True):
                rows[launcher.name] += taken
    show_with_never("from the death of a rank until the workers of all 3 nodes were gone", stopped, options.limit)
    show_with_never("from the death of a rank until user code ran again on all 3 nodes", again, options.limit)


if __name__ == "__main__":
    main()
