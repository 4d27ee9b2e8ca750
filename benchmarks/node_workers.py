"""The workers of the benchmarks with several nodes: `node_workers.py KIND`."""

import time

STARTED_AT = time.monotonic()  # the first line of user code: `time` is built in, so nothing is loaded for it

import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402

from workers import report as _report  # noqa: E402


def report(kind: str) -> None:
    """Say where and when this worker runs."""
    _report(kind, at=STARTED_AT, node=int(os.environ["FT_BENCH_NODE"]), world=int(os.environ["WORLD_SIZE"]))


def stay() -> None:
    """Talk to nobody."""
    report("started")
    while True:
        signal.pause()


def reduce() -> None:
    """Add something up with all others, for ever."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    one = torch.ones(1)
    report("started")
    while True:
        dist.all_reduce(one)
        one.fill_(1.0)
        time.sleep(0.02)


if __name__ == "__main__":
    {"start": lambda: report("started"), "stay": stay, "reduce": reduce}[sys.argv[1]]()
