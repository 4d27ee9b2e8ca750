"""How long n launchers on one machine take from the command to the first line of user code in the last worker.

The workers load nothing. Every launcher imports torch, whoever made it: with more of them than cores that is most of
the time, so "import torch" alone, as often at once and with nothing behind it, stands beside it. The launchers take
turns; the first turn warms the page cache and is not counted.
"""

import subprocess
import sys
import time

from harness import Launcher, launchers, parser, samples, show
from nodes import Nodes

WITHIN = 300.0


def start(launcher: Launcher, n: int) -> float:
    """Give the seconds until the first line of the last worker."""
    with Nodes(launcher, ["start"], str(n), count=n) as nodes:
        reports = nodes.reports(n, WITHIN)
        if len(reports) < n:
            raise SystemExit(f"{launcher.name}: {len(reports)} of {n} workers have started:\n{nodes.log()}")
        for each in nodes.launchers:
            each.wait(WITHIN)
        return max(each["at"] for each in reports) - nodes.started_at


def imports(n: int) -> float:
    """Give the seconds that n processes at once take to import torch."""
    began = time.monotonic()
    # Each in a session of its own, as the launchers are: the kernel shares the cores out among sessions.
    command = [sys.executable, "-c", "import torch"]
    running = [subprocess.Popen(command, start_new_session=True) for _ in range(n)]
    for each in running:
        each.wait()
    return time.monotonic() - began


def main() -> None:
    made = parser(__doc__ or "", n=7, peer_n=7)
    made.set_defaults(launchers="ours,torchrun")
    made.add_argument("--nodes", default="2,4,8,16", help="how many launchers, with commas between")
    options = made.parse_args()
    chosen = launchers(options, able=("ours", "torchrun"))
    for n in map(int, options.nodes.split(",")):
        rows: dict[str, list[float]] = {launcher.name: [] for launcher in chosen} | {"import torch": []}
        for turn in range(max(samples(options, launcher) for launcher in chosen) + 1):
            for launcher in chosen:
                if turn <= samples(options, launcher):
                    taken = start(launcher, n)
                    rows[launcher.name] += [taken] if turn else []
            if turn <= options.peer_n:
                taken = imports(n)
                rows["import torch"] += [taken] if turn else []
        show(f"{n} launchers at once: from the command to the first line of user code in the last worker", "s", rows)


if __name__ == "__main__":
    main()
