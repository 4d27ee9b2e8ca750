"""The workers of the benchmarks: `workers.py KIND [ARGUMENT...]`, started by one of the launchers."""

import time

STARTED_AT = time.monotonic()  # the first line of user code: `time` is built in, so nothing is loaded for it

import os  # noqa: E402
import sys  # noqa: E402


def report(kind: str, **values: object) -> None:
    """Tell the harness something, in one line, which a pipe takes whole."""
    import json

    line = {
        "kind": kind,
        "restart": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
        "rank": int(os.environ["RANK"]),
        "pid": os.getpid(),
    }
    fd = os.open(os.environ["FT_BENCH_REPORTS"], os.O_WRONLY)
    os.write(fd, (json.dumps(line | values) + "\n").encode())
    os.close(fd)


def open_client():
    """Connect to the rank monitor of whichever launcher started this process; None under torchrun."""
    import importlib

    package = os.environ["FT_BENCH_CLIENT"]
    if not package:
        return None
    client = importlib.import_module(package).RankMonitorClient()
    client.init_workload_monitoring()
    return client


def start() -> None:
    """Say when user code began."""
    report("started", at=STARTED_AT)


def hang(jitter: str) -> None:
    """Send heartbeats for up to `jitter` seconds, so that no monitor's clock beats with ours; then hang."""
    import random
    import signal

    client = open_client()
    until = time.monotonic() + random.uniform(0, float(jitter))
    while time.monotonic() < until:
        client.send_heartbeat()
        time.sleep(0.01)
    before = time.monotonic()
    client.send_heartbeat()
    report("hung", at=before)
    while True:
        signal.pause()


def beat(rate: str) -> None:
    """Send `rate` heartbeats a second for ever (0: none after the first)."""
    import signal

    client = open_client()
    if client is not None:
        client.send_heartbeat()
    report("beating")
    if client is None or not float(rate):
        while True:
            signal.pause()
    interval = 1 / float(rate)
    due = time.monotonic()
    while True:
        due += interval
        time.sleep(max(0.0, due - time.monotonic()))
        client.send_heartbeat()


def cost(calls: str, folder: str) -> None:
    """Time `calls` heartbeats and section pairs, one by one and in batches; nanoseconds go to files."""
    from array import array

    client = open_client()
    clock = time.perf_counter_ns
    beat, start, end = client.send_heartbeat, client.start_section, client.end_section
    count, batches = int(calls), int(calls) // 100
    empty, beats, pairs = (array("q", bytes(8 * count)) for _ in range(3))
    beat_batches, pair_batches = (array("q", bytes(8 * batches)) for _ in range(2))
    for _ in range(1000):
        beat()
        start("step")
        end("step")
    for index in range(count):
        before = clock()
        empty[index] = clock() - before
    for index in range(count):
        before = clock()
        beat()
        beats[index] = clock() - before
    for index in range(count):
        before = clock()
        start("step")
        end("step")
        pairs[index] = clock() - before
    for index in range(batches):
        before = clock()
        for _ in range(100):
            beat()
        beat_batches[index] = clock() - before
    for index in range(batches):
        before = clock()
        for _ in range(100):
            start("step")
            end("step")
        pair_batches[index] = clock() - before
    taken = {
        "empty": empty,
        "beats": beats,
        "pairs": pairs,
        "beat_batches": beat_batches,
        "pair_batches": pair_batches,
    }
    for name, values in taken.items():
        with open(os.path.join(folder, name), "wb") as file:  # noqa: PTH118, PTH123
            values.tofile(file)
    report("measured")


def pair_of_deaths() -> None:
    """Rank 0 says when SIGTERM reached it; the harness kills rank 1."""
    import signal

    # Blocked and waited for: the moment of arrival, without the way to a handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    report("ready")
    signal.sigwait({signal.SIGTERM})
    at = time.monotonic()
    report("terminated", at=at)
    os._exit(0)


def group(restarts: str, timeout: str) -> None:
    """Form a gloo group and add up the ranks; then rank 0 fails, until `restarts` restarts have been made."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=float(timeout)))
    total = torch.ones(1) * dist.get_rank()
    dist.all_reduce(total)
    if total.item() != sum(range(dist.get_world_size())):
        raise SystemExit(f"the sum of the ranks is {total.item()}")
    report("formed", at=time.monotonic())
    dist.barrier()  # or rank 0's death stops a rank 1 that has formed the group and not yet said so
    if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < int(restarts):
        if dist.get_rank() == 0:
            os._exit(1)
        time.sleep(600)  # until it is stopped


if __name__ == "__main__":
    {
        "start": start,
        "hang": hang,
        "beat": beat,
        "cost": cost,
        "pair_of_deaths": pair_of_deaths,
        "group": group,
    }[sys.argv[1]](*sys.argv[2:])
