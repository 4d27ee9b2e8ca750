"""Rank monitors in the test's process, as the launcher has them, and ranks that do what the test says."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ft_launcher import processes
from ft_launcher.config import FaultToleranceConfig
from ft_launcher.messages import ControlRequested, FromMonitor
from ft_launcher.monitors import RankMonitors, _WatchedRank
from ft_launcher.rank_monitor_client import SOCKET_ENV
from ft_launcher.watch import Limits
from tests.conftest import Sandbox
from tests.processes import driven_rank
from tests.processes.driven_rank import GENEROUS, Peer

LOOK_SECONDS = 0.25
"""How often the launcher asks whether its monitors look, here; its own every 2 s would only make tests longer."""

Kind = TypeVar("Kind")


class RankError(Exception):
    """The code that a rank was to run raised this."""


class Rank:
    """A process that a monitor watches."""

    def __init__(self, watch: "Watch", local_rank: int, command: list[str]) -> None:
        self._watch = watch
        self._text = b""
        self._popen = subprocess.Popen(
            command,
            env=watch.sandbox.env | {SOCKET_ENV: watch.monitors.socket_path(local_rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self.pid = self._popen.pid
        self.process = processes.Process(self.pid)
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._in, self._out = self._popen.stdin, self._popen.stdout

    def begin(self, code: str) -> None:
        """Have it run `code`, and do not wait for it."""
        self._in.write(json.dumps(code).encode() + b"\n")

    def answer(self) -> Any:
        """Give the value of what it has begun, while the launcher goes on. Raises RankError."""
        self._watch.until(self.has_answered, f"answer of the rank, pid {self.pid}")
        return self._take()

    def answer_or_error(self) -> Any:
        """Like `answer`; an error as its text."""
        try:
            return self.answer()
        except RankError as error:
            return str(error)

    def run(self, code: str) -> Any:
        """Give the value of `code` in the rank, while the launcher goes on. Raises RankError."""
        self.begin(code)
        return self.answer()

    def run_without_launcher(self, code: str) -> Any:
        """Give the value of `code` in the rank, while nobody replaces a monitor or hears it. Raises RankError."""
        self.begin(code)
        assert select.select([self._out], [], [], GENEROUS)[0], f"no answer within {GENEROUS} s"
        while not self.has_answered():
            select.select([self._out], [], [], GENEROUS)
        return self._take()

    def wait(self) -> int:
        """Wait for its end and give its exit code (negative: signal)."""
        return self._popen.wait(GENEROUS)

    def is_alive(self) -> bool:
        return not self.process.is_gone()

    @property
    def fd(self) -> int:
        return self._out.fileno()

    def close(self) -> None:
        self.process.close()
        self._popen.kill()
        self._popen.wait(GENEROUS)
        self._in.close()
        self._out.close()

    def has_answered(self) -> bool:
        """It has done what it has begun."""
        if b"\n" not in self._text and select.select([self._out], [], [], 0)[0]:
            more = os.read(self.fd, 1 << 16)
            assert more, f"the rank ended with {self.wait()}"
            self._text += more
        return b"\n" in self._text

    def _take(self) -> Any:
        line, _, self._text = self._text.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise RankError(answer["error"])
        return answer["value"]


class Watch:
    """The launcher's part: real monitors, ranks, and what has been heard of them."""

    def __init__(self, sandbox: Sandbox, count: int, settings: dict[str, Any]) -> None:
        self.sandbox = sandbox
        self.monitors = RankMonitors(count, FaultToleranceConfig(**settings), "", sandbox.env)
        self.heard: list[tuple[int, FromMonitor]] = []
        self._ranks: list[Rank] = []

    # -- ranks ----------------------------------------------------------------------------------------------------

    def start(self, local_rank: int = 0) -> Rank:
        """Start a rank that can be told what to run, and has not used the client yet."""
        rank = self.start_command(sys.executable, driven_rank.__file__, local_rank=local_rank)
        assert rank.answer() == "ready"
        return rank

    def start_connected(self, local_rank: int = 0) -> Rank:
        """Start a rank that has begun its monitoring."""
        rank = self.start(local_rank)
        rank.run("client.init_workload_monitoring()")
        return rank

    def start_command(self, *command: str, local_rank: int = 0) -> Rank:
        """Start any program as a rank."""
        started_at = time.monotonic()
        rank = Rank(self, local_rank, list(command))
        self._ranks.append(rank)
        self.monitors.ranks_started(
            {local_rank: rank.process}, started_at, {local_rank: str(self.stacks_path(local_rank))}
        )
        return rank

    def stacks_path(self, local_rank: int = 0) -> Path:
        return self.sandbox.path / f"stacks{local_rank}.txt"

    # -- monitors -------------------------------------------------------------------------------------------------

    def stacks(self, local_rank: int = 0) -> str:
        """Wait for the file of stacks, which the monitor writes after the kill, and give its text."""
        self.until(self.stacks_path(local_rank).exists, "the file of stacks")
        return self.stacks_path(local_rank).read_text()

    def monitor_pid(self, local_rank: int = 0) -> int:
        return self.monitors._monitors[local_rank].process.pid

    def signal_monitor(self, number: int, local_rank: int = 0) -> None:
        """Signal a monitor; a stop has taken effect when this returns."""
        pid = self.monitor_pid(local_rank)
        os.kill(pid, number)
        if number == signal.SIGSTOP:
            # The monitor is this process's child: the kernel tells its parent.
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)

    def is_monitor_gone(self, local_rank: int = 0, within: float = 0.0) -> bool:
        return not processes.wait_gone([self.monitors._monitors[local_rank].pidfd], within)

    def looked(self, local_rank: int = 0) -> float:
        """When the monitor looked last at its rank."""
        return self._watched(local_rank).page.looked() or 0.0

    def started_at(self, local_rank: int = 0) -> float:
        """When the rank was started."""
        return self._watched(local_rank).started_at

    def limits(self, local_rank: int = 0) -> Limits | None:
        """The timeouts that the rank has set, as the launcher would tell them to another monitor."""
        self.listen()
        return self._watched(local_rank).limits

    def connect(self, local_rank: int = 0) -> Peer:
        """Connect to a monitor from this process, which is no rank's."""
        return Peer(self.monitors.socket_path(local_rank))

    # -- waiting --------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Hear what the monitors have said by now, and replace those that died or are stuck."""
        self.heard += self.monitors.hear()

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        """Hear the monitors as the launcher does, until `is_so`."""
        deadline = time.monotonic() + GENEROUS
        while not is_so():
            assert time.monotonic() < deadline, f"not within {GENEROUS} s: {what}; heard {self.heard}"
            fds = self.monitors.filenos() + [rank.fd for rank in self._ranks if rank.is_alive()]
            select.select(fds, [], [], LOOK_SECONDS)
            self.listen()

    def next(self, kind: type[Kind], local_rank: int = 0) -> Kind:
        """Give the first message of this kind that was not taken yet, and wait for it."""

        def find() -> Kind | None:
            return next((each for rank, each in self.heard if rank == local_rank and isinstance(each, kind)), None)

        self.until(lambda: find() is not None, f"{kind.__name__} of local rank {local_rank}")
        found = find()
        assert found is not None
        self.heard = [(rank, each) for rank, each in self.heard if each is not found]
        return found

    def requests(self, local_rank: int | None = None) -> set[str | None]:
        """Give the texts of the control requests that the launcher holds, each once: one may come twice."""
        self.listen()
        return {request.description for request in self.all_heard(ControlRequested, local_rank)}

    def all_heard(self, kind: type[Kind], local_rank: int | None = None) -> list[Kind]:
        """Give all messages of this kind that were heard and not taken yet."""
        return [each for rank, each in self.heard if isinstance(each, kind) and local_rank in (None, rank)]

    def _watched(self, local_rank: int) -> _WatchedRank:
        rank = self.monitors._monitors[local_rank].rank
        assert rank is not None
        return rank

    def close(self) -> None:
        try:
            self.monitors.__exit__()
        finally:
            for rank in self._ranks:
                rank.close()


@pytest.fixture
def watch(sandbox: Sandbox) -> Iterator[Callable[..., Watch]]:
    """Start a launcher's monitors, as many as asked, with these settings."""
    watches = []

    def start(count: int = 1, **settings: Any) -> Watch:
        watches.append(Watch(sandbox, count, settings))
        return watches[-1]

    yield start
    for each in watches:
        each.close()
    sandbox.assert_clean()
