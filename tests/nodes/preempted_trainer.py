"""Ranks that count steps, each at its own pace, and save for notices of preemption; what was saved is in files."""

import argparse
import os
import signal
import time
from pathlib import Path

from trainer import CYCLE, NODE, Journal, say  # type: ignore[import-not-found]  # beside this script

from ft_launcher import RankMonitorClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--stay", action="store_true", help="end with success after a save")
    parser.add_argument("--kill-first", metavar="NODE", help="whose rank dies when it is to save for the first time")
    options = parser.parse_args()
    Journal(options.directory / "journal").started()
    saves = options.directory / "saves"
    saves.mkdir(exist_ok=True)
    client = RankMonitorClient()
    client.init_workload_monitoring()
    first = step = max((int(path.name.partition(".")[0]) for path in saves.iterdir()), default=0)
    while True:
        if step - first <= 5:
            say(f"cycle {CYCLE} step {step - first}")
        if client.should_checkpoint(step):
            if options.kill_first == NODE and CYCLE == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            (saves / f"{step}.{NODE}").touch()
            if not options.stay:
                client.exit_for_preemption()
            client.should_checkpoint(step + 1)  # as the next step would
            return
        step += 1
        time.sleep(0.002)


if __name__ == "__main__":
    main()
