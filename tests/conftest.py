"""What all tests share: real processes that cannot outlive their test, and waits that end with what was seen."""

import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

MARK = "FT_TEST_RUN"
"""In the environment of everything that a test starts, so that nothing of it is missed, however it hides."""

GENEROUS = 120.0
"""Seconds after which a test gives up waiting for an event: machines are slow, but events come."""

GROUPS = {
    "tests/nodes/test_slurm.py": "slurm",  # which mostly waits
    "tests/nodes/test_ray_": "ray",  # one Ray at a time is enough for two cores
    "tests/test_fault_tolerance_": "ray",
    "tests/processes/test_ray_": "ray",
    "tests/integrations/test_ptl_training.py": "lightning",
    "tests/integrations/test_hf.py": "hugging_face",
    "tests/processes/test_checkpoint_crashes.py": "checkpoint_crashes",
    "tests/processes/test_vllm.py": "vllm",
}
"""By beginnings of names: tests that one process runs one after the other, as they share what is expensive to make."""

LONG = (
    *("tests/test_example.py", "tests/processes/test_rl_toy.py", "tests/test_docs.py", "tests/integrations/"),
    *("tests/nodes/", "tests/conformance/", "tests/processes/"),
)
"""Whose tests are the next to begin, so that none of them still runs when all others are done."""

# Hypothesis would fail an example that took longer than 0.2 s, which on a busy machine any may take.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A shell has its background jobs ignore these two, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the tests in three processes, unless the command line says how many (-n 0: in this one)."""
    # Not in pytest's addopts: there it would be an error where xdist is turned off.
    if config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput"):
        options = config.option
        if options.numprocesses is None and not options.usepdb:
            options.numprocesses = 3  # which keep two cores busy: half of the time, a test waits
        if options.numprocesses and options.dist == "no":
            options.dist, options.loadscopereorder = "loadgroup", False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process one test after the other, or a group of them."""
    from xdist.scheduler.loadscope import LoadScopeScheduling  # type: ignore[import-untyped]  # it has no types

    class Sharing(LoadScopeScheduling):  # type: ignore[misc]  # for the same reason
        def _split_scope(self, nodeid: str) -> str:
            return next((group for names, group in GROUPS.items() if nodeid.startswith(names)), nodeid)

    return Sharing(config, log) if config.option.dist == "loadgroup" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest begin first, where several processes share the tests; else their order is random."""
    first = (*GROUPS, *LONG)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: next((at for at, each in enumerate(first) if item.nodeid.startswith(each)), 99))


def free_port() -> int:
    """Give a port that nobody has, and that the kernel gives to nobody who asks for any: theirs are above 32767."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with suppress(OSError), socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            return port


def marked_processes(mark: str) -> list[int]:
    """Give the processes, zombies left out, that have `mark` in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended, or is a zombie, or somebody else's
    return found


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """Wait for the processes to end; give those that have not."""
    left = []
    deadline = time.monotonic() + seconds
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                left.append(pid)
        finally:
            os.close(pidfd)
    return left


class Running:
    """A process of a test, with its lines of output as they come."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path) -> None:
        self.process = subprocess.Popen(
            command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.decode(errors="replace").rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self.lines.append("<end of output>")
            self._news.notify_all()

    def wait_for(self, text: str, count: int = 1) -> str:
        """Wait for the `count`-th line that contains `text`, and give it."""
        deadline = time.monotonic() + GENEROUS
        with self._news:
            while True:
                found = [line for line in self.lines if text in line]
                if len(found) >= count:
                    return found[count - 1]
                if self.lines and self.lines[-1] == "<end of output>":
                    raise AssertionError(f"ended without {text!r}:\n{self.output}")
                if not self._news.wait(deadline - time.monotonic()):
                    raise AssertionError(f"no {text!r} within {GENEROUS} s:\n{self.output}")

    def wait(self) -> int:
        """Wait for the end of the process and of its output, and give its exit code (negative: signal)."""
        try:
            code = self.process.wait(GENEROUS * 2)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {GENEROUS * 2} s:\n{self.output}") from None
        self._reader.join(GENEROUS)
        return code

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(GENEROUS)
        if self.process.stdout is not None:
            self.process.stdout.close()


class Sandbox:
    """A directory and an environment for one test; leaves nothing behind, and fails the test that would."""

    def __init__(self, tmp_path: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.path = tmp_path
        self.temporary = tmp_path / "tmp"
        self.temporary.mkdir()
        foreign = ("FT_", "PET_", "SLURM_", "PYTEST_")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.env |= {
            MARK: self.mark,
            "TMPDIR": str(self.temporary),
            "XDG_RUNTIME_DIR": str(self.temporary),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "default",
        }
        self._running: list[Running] = []

    def start(self, *command: str, **env: str) -> Running:
        """Start a command in the sandbox."""
        running = Running(list(command), self.env | env, self.path)
        self._running.append(running)
        return running

    def launch(self, *arguments: str, **env: str) -> Running:
        """Start ft_launcher with `arguments`."""
        return self.start(sys.executable, "-m", "ft_launcher", *arguments, **env)

    def script(self, text: str, name: str = "train.py") -> str:
        """Write a script for ranks, and give its path. `client`-using scripts import what they need."""
        path = self.path / name
        path.write_text(text)
        return str(path)

    def pids(self) -> list[int]:
        """Give the processes that the test has started, and all that these have."""
        return marked_processes(self.mark)

    def leftovers(self) -> list[str]:
        """Give the files that are still in the sandbox's temporary directory."""
        return sorted(str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*"))

    def assert_clean(self, seconds: float = 20.0) -> None:
        """Fail unless everything has ended, and every temporary file is gone, within `seconds`."""
        left = wait_until_gone(marked_processes(self.mark), seconds)
        commands = [_command_line(pid) for pid in left]
        assert not commands, f"still running: {commands}"
        assert self.leftovers() == []

    def close(self) -> None:
        # First whatever still holds an output open: closing that would wait for its end.
        for _ in range(3):
            for pid in marked_processes(self.mark):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for running in self._running:
            running.close()
        wait_until_gone(marked_processes(self.mark), GENEROUS)


def _command_line(pid: int) -> str:
    try:
        return f"{pid}: {Path(f'/proc/{pid}/cmdline').read_bytes().decode(errors='replace').replace(chr(0), ' ')}"
    except OSError:
        return str(pid)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox that ends what the test started, whatever became of the test."""
    sandbox = Sandbox(tmp_path)
    yield sandbox
    sandbox.close()


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool], str], None]:
    """Wait for a state of the kernel that gives no event (a process stopped, say), with an end."""

    def wait(is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + GENEROUS
        pause = threading.Event()
        while not is_so():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {GENEROUS} s: {what}")
            pause.wait(0.01)

    return wait
