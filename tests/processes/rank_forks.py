"""Ranks forked from a process that has imported torch once: a start costs milliseconds instead of seconds.

Run as a script it is that process. Nothing of torch runs in it and it has one thread, so its forks are sound. Each line
of its input asks for one job: processes that each call a function of checkpoint_trainings.py.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.conftest import GENEROUS, Sandbox

_BODIES = "tests.processes.checkpoint_trainings"


class Job:
    """Processes that were started together."""

    def __init__(self, forks: "Forks", directory: Path, pids: list[int]) -> None:
        self.pids = pids
        self._forks = forks
        self._directory = directory

    def results(self) -> list[Any]:
        """Wait for all to end, and give what their functions gave. Fails where one has not ended well."""
        codes = self.codes()
        assert codes == [0] * len(self.pids), f"the processes ended with {codes}\n{self.output()}"
        return [json.loads((self._directory / f"result.{number}").read_text()) for number in range(len(self.pids))]

    def codes(self) -> list[int]:
        """Wait for all to end, and give their exit codes (negative: signal)."""
        return self._forks.codes(self.output)

    def output(self, number: int | None = None) -> str:
        """Give what all, or one of them, have written."""
        files = sorted(self._directory.glob("output.*")) if number is None else [self._directory / f"output.{number}"]
        return "\n".join(f"-- {each.name}\n{each.read_text(errors='replace')}" for each in files)


class Forks:
    """The test's end of it. One job at a time."""

    def __init__(self, directory: Path) -> None:
        self._sandbox = Sandbox(directory)
        self._count = 0
        self._text = b""
        self._unfinished: list[int] = []
        # OpenBLAS starts its threads when it is imported. Its host's name need not lead anywhere: gloo takes `lo`.
        env = self._sandbox.env | {"OPENBLAS_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TERM": "xterm"}
        self._popen = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def start(self, *calls: tuple[str, dict[str, Any]]) -> Job:
        """Start a process for each call of a function by its name, with these arguments; no process group."""
        return self._start(calls, distributed=False)

    def ranks(self, function: str, size: int = 2, **arguments: Any) -> Job:
        """Start `size` ranks of one process group, which all make the same call."""
        return self._start([(function, arguments)] * size, distributed=True)

    def _start(self, calls: Any, *, distributed: bool) -> Job:
        self._count += 1
        directory = self._sandbox.path / f"job{self._count}"
        directory.mkdir()
        request = {"directory": str(directory), "distributed": distributed, "calls": calls}
        if self._unfinished:  # a test has failed
            for pid in self._unfinished:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.codes(str)
        self._stdin.write(json.dumps(request, default=str).encode() + b"\n")
        self._unfinished = self._answer(str)
        return Job(self, directory, self._unfinished)

    def codes(self, seen: Callable[[], str]) -> list[int]:
        """Wait for the end of the job, and give the exit codes; fails with what `seen` gives."""
        codes: list[int] = self._answer(seen)
        self._unfinished = []
        return codes

    def _answer(self, seen: Callable[[], str]) -> Any:
        deadline = time.monotonic() + GENEROUS
        while b"\n" not in self._text:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self._stdout], [], [], left)[0], f"no answer within {GENEROUS} s\n{seen()}"
            more = os.read(self._stdout.fileno(), 1 << 16)
            assert more, f"the forking process ended with {self._popen.wait()}"
            self._text += more
        line, _, self._text = self._text.partition(b"\n")
        return json.loads(line)

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._popen.stdin is not None
        return self._popen.stdin

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._popen.stdout is not None
        return self._popen.stdout

    def close(self) -> None:
        self._stdin.close()
        self._sandbox.close()
        self._popen.wait(GENEROUS)
        self._stdout.close()


# -- the process ----------------------------------------------------------------------------------------------------


def _serve() -> None:
    bodies = importlib.import_module(_BODIES)
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for number in range(len(request["calls"])):
            pid = os.fork()
            if pid == 0:
                _be(bodies, number, **request)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps([codes[pid] for pid in pids]), flush=True)


def _be(
    bodies: Any, number: int, *, directory: str, distributed: bool, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    output = os.open(f"{directory}/output.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    warnings.simplefilter("error")  # what a user would see as well
    function, arguments = calls[number]
    try:
        if distributed:
            bodies.join(f"{directory}/store", number, len(calls))
        result = getattr(bodies, function)(**arguments)
        Path(directory, f"result.{number}").write_text(json.dumps(result))
        if distributed:
            bodies.leave()
    except BaseException:  # noqa: BLE001 - the outermost edge of a process
        traceback.print_exc()
        # To the end of the interpreter, as a rank that fails goes: that it comes is a part of the tests.
        sys.exit(1)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # to take torch apart costs a second


if __name__ == "__main__":
    _serve()
