"""What runs in a bundle of a Ray cluster: an actor with one launcher, whose output and end it tells."""

import os
import selectors
import socket
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import ray.util

from ft_launcher import warden

__all__ = ["Heard", "LauncherNode", "Prepared"]

Prepared = tuple[str, str, int, str]
"""The node's name, the address that Ray knows it by, a free port there, and what is wrong with it ("": nothing)."""

LONGEST_LINE = 8192
"""Bytes of a line that are kept until its end has come."""

Heard = tuple[list[tuple[bool, bytes]], int | None]
"""Pieces of output (True: of stderr), each of whole lines but for the last, and the exit code once all has come."""

KEPT_BYTES = 4 * 2**20
"""Of output that nobody has taken yet. More is left out, oldest first: the launcher must not wait for its reader."""

_LIKE_A_NODE_OF_ITS_OWN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NPROCS", "GROUP_RANK")
"""They count Ray's own processes where Ray was started by Slurm; the launcher would take them for its own."""


class LauncherNode:
    """An actor; its methods are called by the driver, several at the same time."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._pieces: deque[tuple[bool, bytes]] = deque()
        self._held_bytes = self._lost_bytes = 0
        self._code: int | None = None
        self._batches = 0
        self._last: Heard = ([], None)
        self._popen: subprocess.Popen[bytes] | None = None
        self._is_stopping = False
        self._port: socket.socket | None = None

    def prepare(self, folder: str | None) -> Prepared:
        """Choose a port, and look whether the working directory (None: Ray's) is there."""
        name = socket.gethostname()
        if folder is not None and not Path(folder).is_dir():
            return name, "", 0, f"{folder}: no such directory on this node"
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray's function has no types
        # Bound and not listening, it is given to nobody else, and the launcher can listen there all the same.
        self._port = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind((address, 0))
        return name, address, self._port.getsockname()[1], ""

    def start(self, arguments: list[str], environment: dict[str, str], folder: str | None, grace: float) -> None:
        """Start ft_launcher, with `environment` beside that of Ray's workers; `hear` tells what comes of it.

        When this process dies, the launcher gets SIGTERM and `grace` seconds, as when it is stopped.
        """
        command = [sys.executable, "-m", "ft_launcher", *arguments]
        # The kernel takes the thread that starts a process for its parent, and Ray's threads come and go.
        threading.Thread(target=self._run, args=(command, environment, folder, grace), daemon=True).start()

    def hear(self, taken: int) -> Heard:
        """Wait for news, and give what there is. `taken`: so many answers have come; the last is repeated if not."""
        with self._news:
            if taken < self._batches:
                return self._last
            while not self._pieces and self._code is None:
                self._news.wait()
            pieces = list(self._pieces)
            if self._lost_bytes:
                said = f"[{self._lost_bytes} bytes of output were left out here: they were not taken in time]\n"
                pieces.insert(0, (True, said.encode()))
            self._pieces.clear()
            self._held_bytes = self._lost_bytes = 0
            self._batches += 1
            self._last = (pieces, self._code)
            return self._last

    def stop(self) -> None:
        """Have the command end."""
        with self._news:
            self._is_stopping = True
            if self._popen is not None:
                self._popen.terminate()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self, command: list[str], environment: dict[str, str], folder: str | None, grace: float) -> None:
        line = warden.command(grace, command, orphan_grace=grace)
        try:
            with subprocess.Popen(
                line,
                env=_own_environment() | environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            ) as popen:
                with self._news:
                    self._popen = popen
                    if self._is_stopping:
                        popen.terminate()
                self._read(popen)
            code = popen.returncode
        except OSError as error:
            self._take(is_error=True, piece=f"the launcher cannot be started: {error}\n".encode())
            code = 1
        with self._news:
            # The warden gives a shell's code; its own is negative where it was killed.
            self._code = code if code >= 0 else 128 - code
            self._news.notify_all()

    def _read(self, popen: "subprocess.Popen[bytes]") -> None:
        """Take what comes until both pipes are closed: the warden ends with all that could write to them."""
        if popen.stdout is None or popen.stderr is None:
            raise ValueError("both streams must be pipes")
        with selectors.DefaultSelector() as selector:
            halves = dict.fromkeys((popen.stdout, popen.stderr), b"")
            for stream in halves:
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    stream = popen.stderr if key.fileobj is popen.stderr else popen.stdout
                    read = os.read(key.fd, 65536)
                    whole, end, rest = (halves[stream] + read).rpartition(b"\n")
                    if not read:
                        selector.unregister(stream)
                    if not read or len(rest) > LONGEST_LINE:
                        whole, rest = whole + end + rest, b""
                    else:
                        whole += end
                    halves[stream] = rest
                    if whole:
                        self._take(is_error=stream is popen.stderr, piece=whole)

    def _take(self, *, is_error: bool, piece: bytes) -> None:
        with self._news:
            self._pieces.append((is_error, piece))
            self._held_bytes += len(piece)
            while self._held_bytes > KEPT_BYTES:
                oldest = self._pieces.popleft()[1]
                self._held_bytes -= len(oldest)
                self._lost_bytes += len(oldest)
            self._news.notify_all()


def _own_environment() -> dict[str, str]:
    """Give the environment of Ray's worker, as far as it was meant for what it starts."""
    environment = {name: value for name, value in os.environ.items() if name not in _LIKE_A_NODE_OF_ITS_OWN}
    # Ray sets it to the CPUs of the actor in each worker that was started without it: for one process, not for each
    # of the ranks, for which the launcher chooses.
    given = Path("/proc/self/environ").read_bytes().split(b"\0")
    if not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in given):
        environment.pop("OMP_NUM_THREADS", None)
    return environment
