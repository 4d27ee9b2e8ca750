"""One engine's process: started in a session of its own under a warden, watched by its pidfd, ended as a tree."""

import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from ft_launcher import processes, warden
from ft_launcher.causes import from_returncode, sentence
from ft_launcher.engines.spec import EngineSpec

__all__ = ["EngineProcess"]

WARDEN_SECONDS = 5.0
"""What a warden may take longer than the grace to end its engine; it takes milliseconds."""


class EngineProcess:
    """A started engine. Start it from a thread that lives as long: the kernel takes that thread for the parent."""

    def __init__(self, spec: EngineSpec, grace: float, log: Path | None) -> None:
        """Start it, with its output in `log` (None: this process's own). OSError when that cannot be."""
        self.port = spec.port or _free_port(spec.host)
        self.url = spec.address(self.port)
        self.log = log
        self._grace = grace
        environment = os.environ | {name: spec.filled(value, self.port) for name, value in spec.env.items()}
        line = warden.command(grace, [spec.filled(each, self.port) for each in spec.command])
        self._popen = _popen(line, environment, spec.cwd, log)
        self._root = processes.Process(self._popen.pid)

    @property
    def pid(self) -> int:
        """Of the warden."""
        return self._popen.pid

    @property
    def pidfd(self) -> int:
        """Readable when it has ended."""
        return self._root.pidfd

    def how_it_ended(self) -> str:
        """Say it in words, and where its output is; once it has ended."""
        code = self._popen.wait()
        where = f"; see {self.log}" if self.log is not None else ""
        return f"{sentence(from_returncode(128 - code if code > 128 else code))}{where}"

    def kill(self) -> list[processes.Survivor]:
        """End it and all that it has started, by SIGTERM and a grace; what could not be ended, usually nothing."""
        self._root.send(signal.SIGTERM)
        still_there = processes.wait_gone([self._root.pidfd], self._grace + WARDEN_SECONDS)
        survivors: list[processes.Survivor] = []
        if still_there:  # the warden was stopped, or cannot end something
            survivors = processes.kill_tree([self._root], signum=signal.SIGKILL, grace=0.0)
        if not survivors:
            self._popen.wait()
        return survivors

    def close(self) -> None:
        """Let go of it."""
        self._root.close()


def _popen(
    line: list[str], environment: Mapping[str, str], folder: str | None, log: Path | None
) -> "subprocess.Popen[bytes]":
    if log is None:
        return subprocess.Popen(line, env=environment, cwd=folder, stdin=subprocess.DEVNULL, start_new_session=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            line,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
