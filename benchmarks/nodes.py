"""Jobs of several launchers on this machine, each of them a node; what harness.py is for one launcher."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness import END_SECONDS, MARK, Launcher

NODE_WORKERS = Path(__file__).with_name("node_workers.py")
NODE = "FT_BENCH_NODE"
"""In the environment of a launcher and its workers: the number of the node, from 0 on."""

TORCHRUN_TUNED = {"last_call_timeout": 1, "keep_alive_interval": 1, "keep_alive_max_attempt": 2}
"""--rdzv-conf with which torchrun notices and forgets a node soonest: less, and live nodes get lost under load."""


class Nodes:
    """Several launchers of one job. Leaving this context ends all that was started."""

    def __init__(
        self,
        launcher: Launcher,
        worker: Sequence[object],
        nnodes: str,
        *,
        count: int,
        max_restarts: int = 0,
        rdzv_conf: Mapping[str, object] | None = None,
        namespaces: Mapping[str, str] | None = None,
    ) -> None:
        """Start `count` launchers with one rank each; node 0 has the store.

        `namespaces`: those of the network that the launchers run in, as many, with their addresses on their `eth0`.
        Without them all nodes have the loopback address.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="ftb_"))
        self._mark = uuid.uuid4().hex
        fifo = self._folder / "reports"
        os.mkfifo(fifo)
        self._reports = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        self._pending = b""
        foreign = ("FT_", "PET_", "SLURM_", "TORCH")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self._environment |= {
            MARK: self._mark,
            "FT_BENCH_REPORTS": str(fifo),
            "FT_BENCH_CLIENT": launcher.client,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0" if namespaces else "lo",
            "TMPDIR": str(self._folder),
        }
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.started_at = time.monotonic()
        self.launchers: list[subprocess.Popen[bytes]] = []
        places = [(["ip", "netns", "exec", name], address) for name, address in (namespaces or {}).items()]
        places = places or [([], "127.0.0.1")] * count
        for index, (enter, address) in enumerate(places):
            conf = {"is_host": int(index == 0), **(rdzv_conf or {})}
            command = [
                *enter,
                *launcher.command,
                f"--nnodes={nnodes}",
                "--nproc-per-node=1",
                f"--max-restarts={max_restarts}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={places[0][1]}:{port}",
                f"--rdzv-id={self._mark}",
                f"--local-addr={address}",
                "--rdzv-conf=" + ",".join(f"{key}={value}" for key, value in conf.items()),
                str(NODE_WORKERS),
                *map(str, worker),
            ]
            with (self._folder / f"log{index}").open("wb") as log:
                self.launchers.append(
                    subprocess.Popen(
                        command,
                        env=self._environment | {NODE: str(index)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        # The launchers first, so that they start nothing meanwhile.
        for each in self.launchers:
            each.kill()
        while pidfds := self._everything():
            for pidfd in pidfds:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            for pidfd in pidfds:
                if not select.select([pidfd], [], [], END_SECONDS)[0]:
                    raise SystemExit(f"a process of {self._mark} cannot be killed")
                os.close(pidfd)
        for each in self.launchers:
            each.wait()
        os.close(self._reports)
        shutil.rmtree(self._folder, ignore_errors=True)

    def reports(
        self, wanted: int, within: float, which: Callable[[dict[str, Any]], bool] = lambda _: True
    ) -> list[dict[str, Any]]:
        """Wait for so many reports of the kind `which`, others left out; give fewer when the time is over."""
        deadline = time.monotonic() + within
        found: list[dict[str, Any]] = []
        while len(found) < wanted:
            while b"\n" in self._pending and len(found) < wanted:
                line, self._pending = self._pending.split(b"\n", 1)
                report = json.loads(line)
                if which(report):
                    found.append(report)
            if len(found) == wanted:
                break
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._reports], [], [], left)[0]:
                break
            self._pending += os.read(self._reports, 65536)
        return found

    def log(self) -> str:
        """Give the ends of what the launchers and their workers have written."""
        logs = [path.read_text(errors="replace").splitlines()[-15:] for path in sorted(self._folder.glob("log*"))]
        return "\n".join(f"node {index}: {line}" for index, lines in enumerate(logs) for line in lines)

    def _everything(self) -> list[int]:
        """Give pidfds of all processes that carry the mark, zombies left out."""
        pidfds = []
        wanted = f"{MARK}={self._mark}".encode()
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # it has ended, or is somebody else's
                if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    pidfds.append(os.pidfd_open(int(entry.name)))
        return pidfds


def last_end(pidfds: Sequence[int], within: float) -> float | None:
    """Give the instant at which the last of these processes has ended, None if one lives on."""
    deadline = time.monotonic() + within
    at = time.monotonic()
    for pidfd in pidfds:
        if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        at = time.monotonic()
    return at
