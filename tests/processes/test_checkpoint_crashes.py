"""Saves that are killed, or fail, at every one of their system calls and at random moments; readers beside a writer."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Sandbox

ROOT = Path(__file__).resolve().parents[2]
SOAK = ROOT / "benchmarks" / "soak_checkpoints.py"
CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch makes one in TMPDIR, as soon as it is imported far enough, and leaves it
SCENARIOS = ["first", "third", "again", "swept", "async", "sharded"]


class CrashPoints:
    """The process that does it and looks."""

    def __init__(self, path: Path) -> None:
        self._temporary = path / "tmp"
        self._temporary.mkdir()
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.processes.crash_points"],
            cwd=ROOT,
            env=os.environ | threads | {"TMPDIR": str(self._temporary), CACHE: str(path / "cache")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.why_not = self._answer().get("skip", "")

    def ask(self, question: str, scenario: str) -> Any:
        """Ask it."""
        if self.why_not:
            pytest.skip(self.why_not)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{question} {scenario}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "it has ended"
        return json.loads(line)

    def close(self) -> None:
        """End it, and see that it ends well and leaves nothing."""
        self.process.communicate()
        assert self.process.returncode == 0
        assert list(self._temporary.iterdir()) == []


@pytest.fixture(scope="module")
def crash_points(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashPoints]:
    """One process for all tests, as it imports torch."""
    points = CrashPoints(tmp_path_factory.mktemp("crashes"))
    try:
        yield points
        points.close()
    finally:
        points.process.kill()  # what it traces dies with it
        points.process.communicate()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_C2_killed_before_any_call_of_a_save_the_newest_committed_one_is_loaded_and_nothing_is_left(
    crash_points: CrashPoints, scenario: str
) -> None:
    answer = crash_points.ask("kills", scenario)
    assert answer["wrong"] == []
    assert answer["points"] >= 20


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_K3_whichever_call_of_a_save_fails_the_error_is_raised_and_the_process_saves_again(
    crash_points: CrashPoints, scenario: str
) -> None:
    answer = crash_points.ask("faults", scenario)
    assert answer["wrong"] == []
    assert answer["raised"] >= answer["points"] // 2


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_C9_files_are_on_the_disk_before_their_directory_is_before_the_commit_is(
    crash_points: CrashPoints, scenario: str
) -> None:
    calls = [tuple(each) for each in crash_points.ask("order", scenario)["calls"]]
    (commit,) = [at for at, (_, path, onto) in enumerate(calls) if "/.tmp-" in path and "/step_" in onto]
    attempt = calls[commit][1]
    files = {path for name, path, _ in calls if name in ("open", "openat") and path.startswith(attempt)}
    folders = {attempt} | {path for name, path, _ in calls if name.startswith("mkdir") and path.startswith(attempt)}
    assert len(files) >= 3

    def last(path: str, *names: str) -> int:
        """Where the path is named last, before the commit, by one of these calls, or as what is made."""
        return max(at for at, (name, *paths) in enumerate(calls[:commit]) if name in names and path in paths)

    for file in files:
        renamed = [onto for name, path, onto in calls[:commit] if name.startswith("rename") and path == file]
        final = renamed[0] if renamed else file
        assert last(file, "write", "pwrite64", "openat") < last(file, "fsync", "fdatasync")
        assert last(file, "fsync", "fdatasync") < last(str(Path(final).parent), "fsync") < commit
    for folder in folders - {attempt}:
        assert last(folder, "mkdir", "mkdirat") < last(str(Path(folder).parent), "fsync")
    assert ("fsync", str(Path(attempt).parent), "") in calls[commit:]
    # The directory of the checkpoints, and those above it, where they were made.
    for at, (name, path, _) in enumerate(calls[:commit]):
        if name.startswith("mkdir") and not path.startswith(attempt):
            assert ("fsync", str(Path(path).parent), "") in calls[at:commit]


@pytest.mark.parametrize(("ranks", "mode"), [(1, "async"), (2, "sync")])
def test_C2_killed_at_random_moments_no_save_is_lost_and_nothing_is_left(
    sandbox: Sandbox, ranks: int, mode: str
) -> None:
    command = [sys.executable, str(SOAK), "-n", "20", "--ranks", str(ranks), "--mode", mode]
    soak = sandbox.start(*command, **{CACHE: str(sandbox.path / "cache")})
    assert soak.wait() == 0, soak.output
    assert "20 kills" in soak.output
    sandbox.assert_clean()


WRITER = """
import sys, torch
from ft_launcher.checkpoint import CheckpointManager
torch.set_num_threads(1)
model = torch.nn.Linear(2, 2)
with CheckpointManager(sys.argv[1], 1, save_best=False) as manager:
    for step in range(1, int(sys.argv[2]) + 1):
        with torch.no_grad():
            model.weight.fill_(step)
        manager.save(model, None, step, extra=step)
        if step == 1:
            open(sys.argv[3]).close()  # until the reader is there
"""

READER = """
import os, sys, torch
from ft_launcher.checkpoint import CheckpointManager
torch.set_num_threads(1)
model = torch.nn.Linear(2, 2)
loads, newest = 0, 0
with CheckpointManager(sys.argv[1]) as manager:
    open(sys.argv[3], "w").close()  # until the first is saved
    while newest < int(sys.argv[2]):
        restored = manager.load_latest(model)
        loads += 1
        assert restored is not None, f"nothing was found after step {newest}"
        assert restored.step == restored.extra >= newest, (restored, newest)
        assert torch.equal(model.weight, torch.full((2, 2), float(restored.step)))
        newest = restored.step
print("loads:", loads, flush=True)
"""


def test_K9_a_reader_beside_a_writer_that_keeps_one_always_finds_the_newest_whole(sandbox: Sandbox) -> None:
    directory, saves, meeting = str(sandbox.path / "checkpoints"), "500", str(sandbox.path / "meeting")
    os.mkfifo(meeting)
    writer = sandbox.start(sys.executable, sandbox.script(WRITER, "writer.py"), directory, saves, meeting)
    reader = sandbox.start(sys.executable, sandbox.script(READER, "reader.py"), directory, saves, meeting)
    assert writer.wait() == 0, writer.output
    assert reader.wait() == 0, reader.output
    assert int(reader.wait_for("loads:").split()[-1]) > 10
    newest, *older = sorted({each.name for each in Path(directory).iterdir()} - {".lock"}, reverse=True)
    assert newest == f"step_{int(saves):08d}"
    assert len(older) <= 1, f"{older}: more than what was being read at the last save"
    sandbox.assert_clean()
