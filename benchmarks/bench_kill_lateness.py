"""How late a rank monitor signals a rank that hangs, and how late that rank is dead, without a launcher around it.

A hundred processes in turn send one heartbeat to one real monitor and hang. The monitor says when it sent the signal;
the death is seen through a pidfd.
"""

import argparse
import os
import select
import subprocess
import sys
import tempfile
import time

from harness import show

from ft_launcher.config import FaultToleranceConfig
from ft_launcher.messages import RankHung
from ft_launcher.monitors import RankMonitors
from ft_launcher.processes import Process
from ft_launcher.rank_monitor_client import SOCKET_ENV

TIMEOUT = 0.4
RANK = """
import time
from ft_launcher import RankMonitorClient
client = RankMonitorClient()
client.init_workload_monitoring()
client.send_heartbeat()
print(time.monotonic(), flush=True)
while True:
    time.sleep(100)
"""


def hang(monitors: RankMonitors, stacks: str) -> tuple[float, float]:
    """Give the milliseconds from the timeout to the signal and to the death of one rank."""
    command = [sys.executable, "-c", RANK]
    env = os.environ | {SOCKET_ENV: monitors.socket_path(0)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True) as rank:
        process = Process(rank.pid)
        monitors.ranks_started({0: process}, time.monotonic(), {0: stacks})
        assert rank.stdout is not None
        due = float(rank.stdout.readline()) + TIMEOUT
        select.select([process.pidfd], [], [])
        died_at = time.monotonic()
        hung = [message for _, message in monitors.hear() if isinstance(message, RankHung)]
        monitors.ranks_ended()
        process.close()
    return (hung[0].killed_at - due) * 1000, (died_at - due) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=100)
    options = parser.parse_args()
    config = FaultToleranceConfig(rank_heartbeat_timeout=TIMEOUT)
    with tempfile.TemporaryDirectory() as directory, RankMonitors(1, config, "", os.environ) as monitors:
        pairs = [hang(monitors, f"{directory}/stacks.txt") for _ in range(options.n)]
    rows = {"to the signal": [signal for signal, _ in pairs], "to the death": [death for _, death in pairs]}
    show(f"from the timeout ({TIMEOUT:g} s without a heartbeat)", "ms", rows)


if __name__ == "__main__":
    main()
