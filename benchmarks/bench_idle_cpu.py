"""What the launcher and its monitors use of a core while all goes well, the ranks left out.

utime + stime from /proc/PID/stat, which counts hundredths of a second: a window of 10 s resolves 0.1 %.
torchrun has no monitors and its ranks send nothing: it is the cost of the launcher alone.
"""

import time

from harness import Job, Launcher, launchers, parser, samples, seconds_of_cpu, show

SETTLE = 3.0


Use = tuple[list[float], list[float]]


def use(launcher: Launcher, n: int, rate: float, ranks: int, window: float) -> Use:
    """Give percent of a core in each of `n` windows: the launcher's, and with its monitors."""
    alone, together = [], []
    with Job(launcher, ["beat", rate], ranks=ranks) as job:
        workers = [job.report("beating")["pid"] for _ in range(ranks)]
        monitors = job.monitors(workers)
        time.sleep(SETTLE)
        before, since = [seconds_of_cpu(pid) for pid in (job.pid, *monitors)], time.monotonic()
        for _ in range(n):
            time.sleep(window)
            now, at = [seconds_of_cpu(pid) for pid in (job.pid, *monitors)], time.monotonic()
            used = [100 * (b - a) / (at - since) for a, b in zip(before, now, strict=True)]
            alone.append(used[0])
            together.append(sum(used))
            before, since = now, at
    print(f"{launcher.name}: {len(monitors)} monitors, {rate:g} heartbeats/s from each of {ranks} ranks")
    return alone, together


def main() -> None:
    made = parser(__doc__ or "", n=3, peer_n=3)
    made.add_argument("--ranks", type=int, default=4)
    made.add_argument("--rate", type=float, default=100, help="heartbeats a second of each rank, ours")
    made.add_argument("--nvrx-rate", type=float, default=10, help="the same for nvrx")
    made.add_argument("--window", type=float, default=10, help="seconds of each of the n windows")
    options = made.parse_args()
    alone, together = {}, {}
    for launcher in launchers(options):
        rate = {"ours": options.rate, "nvrx": options.nvrx_rate}.get(launcher.name, 0)
        taken = use(launcher, samples(options, launcher), rate, options.ranks, options.window)
        alone[launcher.name], together[launcher.name] = taken
    show("the launcher and its monitors", "% of a core", together)
    show("the launcher alone", "% of a core", alone)


if __name__ == "__main__":
    main()
