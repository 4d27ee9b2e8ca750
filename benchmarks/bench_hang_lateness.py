"""How late a hung rank is killed: from the end of its heartbeat timeout to its death.

One job per launcher, in which every restart hangs. The rank takes the time just before its last heartbeat,
and the harness sees the death through a pidfd, so what is measured is never less than what the rank monitor
took.
"""

import os
import select
import time

from harness import Job, Launcher, launchers, parser, samples, show

TIMEOUT = 1.0


def lateness(launcher: Launcher, n: int, ft: dict[str, object], jitter: float) -> list[float]:
    """Give the milliseconds of `n` hangs in a row."""
    late = []
    ft = {"rank_heartbeat_timeout": TIMEOUT, "initial_rank_heartbeat_timeout": 120} | ft
    with Job(launcher, ["hang", jitter], max_restarts=n, ft=ft) as job:
        for _ in range(n):
            hung = job.report("hung")
            pidfd = os.pidfd_open(hung["pid"])
            select.select([pidfd], [], [])
            late.append((time.monotonic() - hung["at"] - TIMEOUT) * 1000)
            os.close(pidfd)
    return late


def main() -> None:
    made = parser(__doc__ or "", n=100, peer_n=20)
    made.add_argument("--check-intervals", default="5,0.1", help="of the peer, in seconds; its default is 5")
    options = made.parse_args()
    rows = {}
    for launcher in launchers(options, able=("ours", "nvrx")):
        n = samples(options, launcher)
        if launcher.name == "ours":
            rows["ours"] = lateness(launcher, n, {}, jitter=0.2)
            continue
        for interval in options.check_intervals.split(","):
            ft: dict[str, object] = {"workload_check_interval": interval}
            rows[f"nvrx, every {interval} s"] = lateness(launcher, n, ft, jitter=float(interval))
    show(f"from the timeout ({TIMEOUT:g} s without a heartbeat) to the death of the rank", "ms", rows)


if __name__ == "__main__":
    main()
