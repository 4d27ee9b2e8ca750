"""What the benchmarks share: launchers under the same conditions, workers' reports, distributions, an end."""

import argparse
import json
import math
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ALL = ("ours", "torchrun", "nvrx")
WORKERS = Path(__file__).with_name("workers.py")
MARK = "FT_BENCH_RUN"
"""In the environment of everything that a job starts, so that all of it can be found and ended."""

DEADLINE = 300.0
"""Seconds after which a benchmark gives up waiting for a report of a worker."""

END_SECONDS = 10.0


@dataclass(frozen=True)
class Launcher:
    """One of the launchers that are compared, as users start it: what is not set here is its default."""

    name: str
    command: tuple[str, ...]
    client: str
    """The package that the workers take their RankMonitorClient from; "" where there is none."""

    def arguments(self, ranks: int, max_restarts: int, ft: Mapping[str, object]) -> list[str]:
        """Give the whole command up to the script. `ft`: keys of the fault-tolerance configuration."""
        flags = [f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}"]
        if self.name == "nvrx":
            # The two others take a free port by themselves; its default is 29500, and it looks for NICs.
            flags += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--ft-enable-nic-monitor=False"]
        if self.client:
            flags += [f"--ft-{key.replace('_', '-')}={value}" for key, value in ft.items()]
        return [*self.command, *flags]


def parser(description: str, *, n: int, peer_n: int) -> argparse.ArgumentParser:
    """Give a parser with the options that all benchmarks have; `n`, `peer_n`: the defaults for samples."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=defaults)
    made.add_argument("--launchers", default="ours,torchrun,nvrx", help="which to measure")
    made.add_argument("--nvrx-python", default="", help="of an environment with nvidia-resiliency-ext==0.4.1")
    made.add_argument("-n", type=int, default=n, help="samples of ours")
    made.add_argument("--peer-n", type=int, default=peer_n, help="samples of each other launcher")
    return made


def launchers(options: argparse.Namespace, able: Sequence[str] = ALL) -> list[Launcher]:
    """Give the launchers that were asked for, have the thing measured (are `able`), and are installed."""
    # A script that is told to end (by `timeout`, say) ends its jobs, as one that is interrupted does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f} before the start, Python {platform.python_version()}")
    chosen = []
    for name in options.launchers.split(","):
        if name not in ALL:
            raise SystemExit(f"--launchers {name}: must be of {', '.join(ALL)}")
        if name not in able:
            print(f"{name} is left out: it has nothing of the kind")
        elif name == "ours":
            chosen.append(Launcher(name, (sys.executable, "-m", "ft_launcher"), "ft_launcher"))
        elif name == "torchrun":
            chosen.append(Launcher(name, (sys.executable, "-m", "torch.distributed.run"), ""))
        else:
            # Not resolved: the Python of an environment is a link, and its scripts stand beside the link.
            script = Path(options.nvrx_python).parent / "ft_launcher"
            if options.nvrx_python and script.exists():
                command = (options.nvrx_python, str(script))
                chosen.append(Launcher(name, command, "nvidia_resiliency_ext.fault_tolerance"))
            else:
                print("nvrx is left out: --nvrx-python names no environment that has it (see README.md)")
    if not chosen:
        raise SystemExit("nothing to measure")
    return chosen


def samples(options: argparse.Namespace, launcher: Launcher) -> int:
    """Say how many samples of this launcher to take."""
    return int(options.n if launcher.name == "ours" else options.peer_n)


class Job:
    """A running launcher with workers of workers.py. Leaving this context ends all that was started."""

    def __init__(
        self,
        launcher: Launcher,
        worker: Sequence[object],
        *,
        ranks: int = 1,
        max_restarts: int = 0,
        ft: Mapping[str, object] | None = None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ftb_"))
        self._mark = uuid.uuid4().hex
        fifo = self._folder / "reports"
        os.mkfifo(fifo)
        self._reports = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        self._pending = b""
        foreign = ("FT_", "PET_", "SLURM_", "TORCH")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        environment |= {
            MARK: self._mark,
            "FT_BENCH_REPORTS": str(fifo),
            "FT_BENCH_CLIENT": launcher.client,
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self._folder),
        }
        # Some fault-tolerance setting must be given to the peer, or it refuses to start; this is its default.
        settings = {"rank_heartbeat_timeout": 2700} | dict(ft or {})
        command = launcher.arguments(ranks, max_restarts, settings)
        with (self._folder / "log").open("wb") as log:
            self.started_at = time.monotonic()
            self._process = subprocess.Popen(
                [*command, str(WORKERS), *map(str, worker)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._pidfd = os.pidfd_open(self._process.pid)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        # The launcher first, so that it starts nothing meanwhile.
        self._process.kill()
        while pidfds := self._everything():
            for pidfd in pidfds:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            for pidfd in pidfds:
                if not select.select([pidfd], [], [], END_SECONDS)[0]:
                    raise SystemExit(f"a process of {self._mark} cannot be killed")
                os.close(pidfd)
        self._process.wait()
        os.close(self._pidfd)
        os.close(self._reports)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def report(self, kind: str, within: float = DEADLINE) -> dict[str, Any]:
        """Wait for the next report of a worker, which must be of `kind`."""
        deadline = time.monotonic() + within
        while b"\n" not in self._pending:
            left = max(0.0, deadline - time.monotonic())
            ready = select.select([self._reports, self._pidfd], [], [], left)[0]
            if self._reports in ready:
                self._pending += os.read(self._reports, 65536)
            elif ready:
                raise EndedError(f"the launcher ended with {self._process.wait()}:\n{self.log()}")
            else:
                raise SystemExit(f"no report of {kind!r} within {within:g} s:\n{self.log()}")
        line, self._pending = self._pending.split(b"\n", 1)
        report: dict[str, Any] = json.loads(line)
        if report["kind"] != kind:
            raise SystemExit(f"a worker reported {report}, not {kind!r}:\n{self.log()}")
        return report

    def wait(self) -> int:
        """Wait for the launcher to end, and give its exit code."""
        return self._process.wait(DEADLINE)

    def log(self) -> str:
        """Give the end of what the launcher and its workers have written."""
        lines = (self._folder / "log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-30:])

    def monitors(self, workers: Sequence[int]) -> list[int]:
        """Give the processes beside the ranks: the launcher's children, but not `workers`."""
        children = [each.pid for each in psutil.Process(self.pid).children()]
        return [pid for pid in children if pid not in workers]

    def _everything(self) -> list[int]:
        """Give pidfds of all processes that carry the mark, zombies left out."""
        pidfds = []
        wanted = f"{MARK}={self._mark}".encode()
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # it has ended, or is somebody else's
                if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    pidfds.append(os.pidfd_open(int(entry.name)))
        return pidfds


class EndedError(Exception):
    """The launcher ended while a report of a worker was awaited."""


def seconds_of_cpu(pid: int) -> float:
    """Give the user and system time of a process so far (/proc/PID/stat: in hundredths of a second)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def quantile(ordered: Sequence[float], q: float) -> float:
    """Give the smallest value that at least the share `q` of all does not exceed."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def show(title: str, unit: str, rows: Mapping[str, Sequence[float]]) -> None:
    """Print a distribution per row, and the ratio of its median to that of "ours"."""
    print(f"\n{title} [{unit}]")
    print(f"{'':<24}{'min':>10}{'median':>10}{'p90':>10}{'p99':>10}{'max':>10}{'n':>8}  median / ours")
    reference = quantile(sorted(rows["ours"]), 0.5) if rows.get("ours") else 0.0
    for name, values in rows.items():
        if not values:
            print(f"{name:<24}  nothing measured")
            continue
        ordered = sorted(values)
        points = [ordered[0], *(quantile(ordered, q) for q in (0.5, 0.9, 0.99)), ordered[-1]]
        ratio = f"{points[1] / reference:.1f}" if reference else "-"
        print(f"{name:<24}{''.join(f'{_digits(point):>10}' for point in points)}{len(ordered):>8}  {ratio}")
    sys.stdout.flush()


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
