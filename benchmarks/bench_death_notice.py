"""How soon a worker's death is noticed: from SIGKILL to rank 1 to the arrival of SIGTERM at rank 0.

The same for all launchers, and from outside: what lies between notice and signal is in it. One job, killed
again and again; the harness waits a random time before it strikes, so that no polling beats with it.
"""

import os
import random
import signal
import time

from harness import Job, Launcher, launchers, parser, samples, show


def notice(launcher: Launcher, n: int) -> list[float]:
    """Give the milliseconds of `n` deaths in a row."""
    taken = []
    with Job(launcher, ["pair_of_deaths"], ranks=2, max_restarts=n) as job:
        for _ in range(n):
            ready = {report["rank"]: report["pid"] for report in (job.report("ready"), job.report("ready"))}
            time.sleep(random.uniform(0.3, 0.8))
            victim = os.pidfd_open(ready[1])
            killed_at = time.monotonic()
            signal.pidfd_send_signal(victim, signal.SIGKILL)
            taken.append((job.report("terminated")["at"] - killed_at) * 1000)
            os.close(victim)
    return taken


def main() -> None:
    options = parser(__doc__ or "", n=100, peer_n=30).parse_args()
    rows = {launcher.name: notice(launcher, samples(options, launcher)) for launcher in launchers(options)}
    show("from the death of a worker to SIGTERM at its sibling", "ms", rows)


if __name__ == "__main__":
    main()
