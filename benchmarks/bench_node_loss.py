"""From the death of a launcher to user code that runs again on the nodes that are left, 3 nodes -> 2.

Three launchers on this machine with `--nnodes 2:3`; one that does not have the store is killed (SIGKILL). What its
workers do depends on the launcher: torchrun's live on, and train with the others in a collective as if nothing had
happened. So there is a case in which they die with it, as on a machine that was switched off and said so.

"never": not within `--limit` seconds. torchrun with its defaults forgets a node after 15 s (3 keep-alives of 5 s), but
nothing follows from that; once workers fail for another reason, the next rendezvous waits 30 s for more nodes than the
fewest, and more than one may be needed (88 s were seen). "torchrun, tuned" has the shortest times with which it works
(see TORCHRUN_TUNED in nodes.py).
"""

import math
import os
import signal
import time
from contextlib import suppress

from harness import Launcher, launchers, parser, quantile, samples
from nodes import TORCHRUN_TUNED, Nodes

START_WITHIN = 120.0
CASES = {
    "launcher killed, workers do not talk": ("stay", False),
    "launcher killed, workers in all_reduce": ("reduce", False),
    "launcher and its worker killed, in all_reduce": ("reduce", True),
}


def recover(launcher: Launcher, conf: dict[str, object], kind: str, limit: float, *, worker_too: bool) -> float:
    """Give the seconds from the kill to the first line of the last survivor's new worker; inf: never."""
    with Nodes(launcher, [kind], "2:3", count=3, max_restarts=3, rdzv_conf=conf) as nodes:
        # Three may meet in two rounds: a launcher that comes late interrupts the others.
        started = nodes.reports(3, START_WITHIN, lambda report: report["world"] == 3)
        if len(started) < 3:
            raise SystemExit(f"{launcher.name}: {len(started)} of 3 workers have started:\n{nodes.log()}")
        time.sleep(1.0)  # they are at work
        victim = nodes.launchers[2]
        worker = next(report["pid"] for report in started if report["node"] == 2)
        killed_at = time.monotonic()
        victim.kill()
        if worker_too:
            with suppress(ProcessLookupError):  # its launcher's death was its own
                os.kill(worker, signal.SIGKILL)
        again = nodes.reports(2, limit, lambda report: report["world"] == 2 and report["at"] > killed_at)
        if len(again) < 2:
            return math.inf
        return max(report["at"] for report in again) - killed_at


def main() -> None:
    made = parser(__doc__ or "", n=10, peer_n=3)
    made.set_defaults(launchers="ours,torchrun")
    made.add_argument("--limit", type=float, default=120.0, help="seconds after which it is called never")
    made.add_argument("--cases", default="0,1,2", help=f"which of {list(CASES)}")
    options = made.parse_args()
    chosen: list[tuple[str, Launcher, dict[str, object]]] = []
    for launcher in launchers(options, able=("ours", "torchrun")):
        chosen.append((launcher.name, launcher, {}))
        if launcher.name == "torchrun":
            chosen.append(("torchrun, tuned", launcher, dict(TORCHRUN_TUNED)))
    for case in map(int, options.cases.split(",")):
        title, (kind, worker_too) = list(CASES.items())[case]
        rows: dict[str, list[float]] = {name: [] for name, _, _ in chosen}
        for turn in range(max(samples(options, launcher) for _, launcher, _ in chosen)):
            for name, launcher, conf in chosen:
                if turn < samples(options, launcher):
                    rows[name].append(recover(launcher, conf, kind, options.limit, worker_too=worker_too))
        show_with_never(f"{title}: until user code runs again on the 2 others", rows, options.limit)


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
