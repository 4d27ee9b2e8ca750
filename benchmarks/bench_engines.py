"""How soon rollout engines that die or hang are noticed, and how long one look at 64 of them takes with 32 hung.

The last against a re-creation of how others look: one engine after the other, each with its own time limit.
"""

import argparse
import asyncio
import os
import queue
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from ft_launcher.engines import EngineConfig, EngineEvent, EngineSpec, EngineSupervisor, State

ENGINE = """
import os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())
    def log_message(self, *_): pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
INTERVAL, TIMEOUT = 1.0, 1.0
ENGINES, HUNG, LOOK_TIMEOUT = 64, 32, 0.2


def noticed(number: signal.Signals, samples: int) -> list[float]:
    """Give seconds from a signal to an engine to the decision that it has failed."""
    events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
    config = EngineConfig(
        health_check_first_wait=0.0,
        health_check_interval=INTERVAL,
        health_check_timeout=TIMEOUT,
        ready_interval=0.05,
        term_grace=0.0,
        max_restarts=10 * samples,
    )
    spec = EngineSpec(name="a", command=[sys.executable, "-c", ENGINE, "{port}"])
    found = []
    with EngineSupervisor(config, [spec], on_event=events.put) as supervisor:
        for sample in range(samples):
            (engine,) = supervisor.wait_serving(1)
            with urllib.request.urlopen(engine.url + "/health", timeout=30) as answer:
                pid = int(answer.read())
            # At any point of the time between two looks.
            time.sleep(INTERVAL * sample / samples)
            since = time.monotonic()
            os.kill(pid, number)
            while (event := events.get(timeout=60)).after is not State.FAILED or event.at < since:
                pass
            found.append(event.at - since)
            while (event := events.get(timeout=60)).after is not State.SERVING:
                pass
    return found


async def serve(count: int) -> None:
    """Be `count` engines in one process; from a line on stdin on, `HUNG` of them answer no more."""
    is_hung: set[int] = set()

    def engine(number: int) -> object:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            if number in is_hung:
                await reader.read()  # until whoever asked gives up
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            writer.close()

        return answer

    servers = [await asyncio.start_server(engine(number), "127.0.0.1", 0) for number in range(count)]  # type: ignore[arg-type]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        is_hung.update(range(0, 2 * HUNG, 2))
        print("hung", flush=True)


def looks(samples: int) -> tuple[list[float], list[float]]:
    """Give seconds of one look at all engines with some hung: ours, and one after the other."""
    ours, theirs = [], []
    for _ in range(samples):
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(ENGINES)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            urls = [f"http://127.0.0.1:{port}" for port in process.stdout.readline().split()]
            specs = [EngineSpec(name=url.rpartition(":")[2], url=url) for url in urls]
            config = EngineConfig(
                health_check_first_wait=0.0,
                health_check_interval=600.0,
                health_check_timeout=LOOK_TIMEOUT,
                mass_failure_fraction=1.0,
            )
            with EngineSupervisor(config, specs) as supervisor:
                supervisor.wait_serving(ENGINES)
                with supervisor.round(0):
                    process.stdin.write("\n")
                    process.stdin.flush()
                    process.stdout.readline()
                    since = time.monotonic()
                ours.append(time.monotonic() - since)
                assert len(supervisor.serving()) == ENGINES - HUNG
            theirs.append(one_by_one(urls))
            process.stdin.close()
    return ours, theirs


def one_by_one(urls: Sequence[str]) -> float:
    since, missed = time.monotonic(), 0
    for url in urls:
        try:
            urllib.request.urlopen(url + "/health", timeout=LOOK_TIMEOUT).close()
        except OSError:
            missed += 1
    assert missed == HUNG
    return time.monotonic() - since


def show(what: str, found: Sequence[float], limit: float | None = None) -> None:
    words = f"min {min(found):.3f}, median {statistics.median(found):.3f}, max {max(found):.3f} s (n={len(found)})"
    print(f"{what}: {words}" + (f"; limit {limit:g} s: {'kept' if max(found) <= limit else 'MISSED'}" if limit else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=10, help="samples (10)")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve(options.serve))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    show("a dead engine is noticed after", noticed(signal.SIGKILL, options.n), 0.3)
    bound = INTERVAL + TIMEOUT + 1.0
    what = f"a stopped engine, interval {INTERVAL:g} s and timeout {TIMEOUT:g} s, after"
    show(what, noticed(signal.SIGSTOP, options.n), bound)
    ours, theirs = looks(max(1, options.n // 3))
    what = f"one look at {ENGINES} engines, {HUNG} hung, timeout {LOOK_TIMEOUT:g} s"
    show(what, ours, 2 * LOOK_TIMEOUT)
    show("the same one after the other", theirs)
    print(f"ratio of the medians: {statistics.median(theirs) / statistics.median(ours):.0f}")


if __name__ == "__main__":
    main()
