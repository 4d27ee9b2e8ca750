"""The directory of checkpoints: one writer, what dead writers leave, what readers hold."""

import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_launcher.checkpoint.directory import Directory, Lease
from ft_launcher.checkpoint.errors import CheckpointError
from ft_launcher.checkpoint.files import HashedFile, hashed_file, problems
from ft_launcher.checkpoint.manifest import MANIFEST, FileRecord, Manifest
from tests.conftest import GENEROUS

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def manifest(step: int, sequence: int, files: dict[str, FileRecord]) -> Manifest:
    return Manifest(
        step=step, sequence=sequence, world_size=1, sharded=False, metrics={}, files=files, torch="2", saved_utc="now"
    )


def save(directory: Directory, step: int, text: str = "state", sequence: int = 1) -> Path:
    """Commit a checkpoint with two files, one in a folder."""
    attempt = directory.begin(step)
    records = {}
    (attempt / "sharded").mkdir()
    for name in ("state.pt", "sharded/0.distcp"):
        with hashed_file(attempt / name, lambda _: None) as file:
            file.write(text.encode())
        records[name] = file.record()
    return directory.commit(attempt, manifest(step, sequence, records))


@pytest.fixture
def directory(tmp_path) -> Iterator[Directory]:
    """A directory that this process writes to."""
    directory = Directory(tmp_path / "checkpoints")
    directory.claim()
    yield directory
    directory.release()


def names(directory: Directory) -> list[str]:
    """Give what stands there when all that was to be deleted is."""
    directory.release()
    return sorted(each.name for each in directory.path.iterdir())


class Other:
    """Another process, which does what the code says and then waits for its end."""

    def __init__(self, path: Path, code: str) -> None:
        prelude = (
            "import os, sys\nfrom pathlib import Path\nfrom ft_launcher.checkpoint.directory import Directory, Lease\n"
            f"directory = Directory(Path({str(path)!r}))\n"
        )
        wait = "\nprint('done', flush=True)\nsys.stdin.read()\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", prelude + code + wait],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.said: list[str] = []
        while "done" not in self.said:
            self.said.append(self.line())

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], GENEROUS)[0], f"silent for {GENEROUS} s"
        line = self.process.stdout.readline()
        assert line, f"it ended with {self.process.wait(GENEROUS)}"
        return line.decode().strip()

    def end(self) -> None:
        """Have it end in order."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(GENEROUS) == 0

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(GENEROUS)

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def other(path: Path, code: str) -> Iterator[Other]:
    started = Other(path, code)
    try:
        yield started
    finally:
        started.close()


# -- one writer -----------------------------------------------------------------------------------------------------


def test_C10_of_two_managers_of_one_process_the_second_is_refused(directory):
    second = Directory(directory.path)
    for _ in range(2):
        with pytest.raises(CheckpointError) as refused:
            second.claim()
        assert str(refused.value) == (
            f"{directory.path}: another manager of this process writes checkpoints here; "
            "give every job, and every manager, its own directory"
        )
    directory.release()
    second.claim()
    second.release()


def test_C10_another_process_is_refused_with_the_owners_name(directory):
    with other(directory.path, "try: directory.claim()\nexcept Exception as error: print(error)") as refused:
        assert f"process {os.getpid()} on {socket.gethostname()} writes checkpoints here" in refused.said[0]


def test_C10_a_manager_that_was_refused_takes_nothing_from_the_owner_of_its_process(directory):
    # Locks of this kind are lost with the first close of any descriptor of the file in the process.
    with pytest.raises(CheckpointError):
        Directory(directory.path).claim()
    with other(directory.path, "try: directory.claim()\nexcept Exception as error: print(error)") as refused:
        assert "writes checkpoints here" in refused.said[0]


def test_C10_a_killed_owners_lock_is_free(tmp_path):
    with other(tmp_path, "directory.claim()") as owner:
        directory = Directory(tmp_path)
        with pytest.raises(CheckpointError, match=f"process {owner.pid} on {socket.gethostname()} "):
            directory.claim()
        owner.kill()
        directory.claim()
        directory.release()


def test_C10_a_forked_child_that_outlives_the_owner_does_not_keep_the_lock(tmp_path):
    fork = """
directory.claim()
pid = os.fork()
if not pid:
    os.close(1)
    os.read(0, 1)  # until the test lets go of the pipe
    os._exit(0)
print(pid)
"""
    with other(tmp_path, fork) as owner:
        child = os.pidfd_open(int(owner.said[0]))
        try:
            owner.kill()
            assert not select.select([child], [], [], 0)[0], "the child should still be there"
            directory = Directory(tmp_path)
            directory.claim()
            directory.release()
            owner.close()  # its end of the pipe was what the child waits for
            assert select.select([child], [], [], GENEROUS)[0]
        finally:
            os.close(child)


def test_C10_a_forked_child_of_the_owner_is_another_process(tmp_path):
    code = """
directory.claim()
read, write = os.pipe()
if not os.fork():
    try: Directory(directory.path).claim()
    except Exception as error: os.write(write, str(error).encode())
    os._exit(0)
os.wait()
print(os.read(read, 1000).decode())
"""
    with other(tmp_path, code) as owner:
        assert f"process {owner.pid} on " in owner.said[0]
        # That the child has opened the file and closed it took nothing from its parent.
        with pytest.raises(CheckpointError):
            Directory(tmp_path).claim()


def test_readers_are_allowed_while_somebody_writes(directory):
    place = save(directory, 3)
    code = "(entry,) = directory.entries()\nlease = Lease(entry)\nprint(entry.step, lease.holds())"
    with other(directory.path, code) as reader:
        assert reader.said[0] == "3 True"
    assert place.exists()


# -- what dead writers leave ----------------------------------------------------------------------------------------


def _leave(path: Path) -> None:
    for name in (".tmp-step_00000003-0a0b0c0d", ".trash-step_00000001-00000000", ".replaced-step_00000002"):
        (path / name / "sharded").mkdir(parents=True)
        (path / name / "sharded" / "file").write_text("x")


def test_what_dead_writers_left_is_swept_away_and_nothing_else(tmp_path):
    first = Directory(tmp_path)
    first.claim()
    save(first, 2)
    first.release()
    _leave(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_1").mkdir()
    Directory(tmp_path).sweep_if_free()
    assert sorted(each.name for each in tmp_path.iterdir()) == [".lock", "notes.txt", "step_00000002", "step_1"]


def test_nothing_is_swept_while_somebody_writes(tmp_path):
    with other(tmp_path, "directory.claim()") as owner:
        _leave(tmp_path)
        before = sorted(tmp_path.iterdir())
        Directory(tmp_path).sweep_if_free()
        assert sorted(tmp_path.iterdir()) == before
        owner.end()
    Directory(tmp_path).sweep_if_free()
    # What was replaced counts: nothing else stands at its step.
    assert sorted(each.name for each in tmp_path.iterdir()) == [".lock", "step_00000002"]


def test_a_sweep_of_what_is_not_there_makes_nothing(tmp_path):
    Directory(tmp_path / "absent").sweep_if_free()
    assert list(tmp_path.iterdir()) == []


def test_what_was_replaced_counts_while_nothing_else_stands_at_its_step(directory):
    place = save(directory, 5)
    replaced = directory.path / f".replaced-{place.name}"
    place.rename(replaced)
    (entry,) = directory.entries()
    assert (entry.path, entry.step, entry.problem) == (replaced, 5, "")
    assert directory.leftovers() == []
    save(directory, 5, "anew", sequence=2)
    (entry,) = directory.entries()
    assert (entry.path, entry.sequence) == (place, 2)
    assert names(directory) == [".lock", "step_00000005"]


def test_a_step_that_is_saved_again_takes_the_place_of_what_stood_there(directory):
    save(directory, 5)
    place = save(directory, 5, "anew", sequence=2)
    assert (place / "state.pt").read_text() == "anew"
    assert [each.sequence for each in directory.entries()] == [2]
    assert names(directory) == [".lock", "step_00000005"]


def test_an_abandoned_attempt_leaves_nothing(directory):
    attempt = directory.begin(5)
    (attempt / "state.pt").write_text("half")
    assert directory.entries() == []
    directory.abandon(attempt)
    assert names(directory) == [".lock"]


# -- what stands there ----------------------------------------------------------------------------------------------


def test_an_absent_directory_has_no_checkpoints(tmp_path):
    assert Directory(tmp_path / "absent").entries() == []


def test_a_file_where_the_directory_should_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        Directory(tmp_path / "file").entries()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "manifest.json: No such file or directory"),
        (lambda path: path.write_bytes(b""), "manifest.json: Input data was truncated"),
        (lambda path: (path.unlink(), path.mkdir()), "manifest.json: Is a directory"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "manifest.json: "),
        (lambda path: path.parent.rename(path.parent.with_name("step_00000008")), "manifest.json: it is of step 7"),
    ],
)
def test_C3_a_checkpoint_without_its_own_manifest_is_there_and_says_why(directory, damage, problem):
    damage(save(directory, 7) / MANIFEST)
    (entry,) = directory.entries()
    assert entry.manifest is None
    assert entry.problem.startswith(problem)


@given(pieces=st.lists(st.binary(max_size=40) | st.integers(0, 600_000).map(bytes), max_size=6))
def test_what_is_hashed_while_it_is_written_is_what_stands_in_the_file(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("files") / "file"
    told: list[int] = []
    with HashedFile(path, told.append) as file:
        for each in pieces:
            assert file.write(each) == len(each)
    written = b"".join(pieces)
    assert path.read_bytes() == written
    assert file.record() == FileRecord(bytes=len(written), sha256=hashlib.sha256(written).hexdigest())
    assert sum(told) == len(written)
    whole = manifest(1, 1, {"file": file.record()})
    assert problems(path.parent, whole, ["file"], verify="full", on_bytes=told.append) == []
    assert sum(told) == 2 * len(written)


@pytest.mark.parametrize(
    ("damage", "full", "size"),
    [
        (lambda path: path.unlink(), "No such file or directory", "No such file or directory"),
        (lambda path: path.write_bytes(b"stat"), "it has 4 bytes, not 5", "it has 4 bytes, not 5"),
        (lambda path: path.write_bytes(b""), "it has 0 bytes, not 5", "it has 0 bytes, not 5"),
        (lambda path: path.write_bytes(b"statf"), "its bytes have changed since it was written", None),
    ],
)
def test_C3_a_damaged_file_is_named_with_its_damage(directory, damage, full, size):
    place = save(directory, 1)
    (entry,) = directory.entries()
    assert entry.manifest is not None
    damage(place / "sharded" / "0.distcp")
    found = {
        verify: problems(place, entry.manifest, entry.manifest.files, verify=verify, on_bytes=lambda _: None)
        for verify in ("full", "size")
    }
    expected = {"full": full, "size": size}
    assert found == {each: [f"sharded/0.distcp: {text}"] if text else [] for each, text in expected.items()}


# -- readers and deletes --------------------------------------------------------------------------------------------


def test_what_another_process_reads_is_not_deleted_until_it_lets_go(directory):
    place = save(directory, 1)
    (entry,) = directory.entries()
    with other(directory.path, "lease = Lease(directory.entries()[0])") as reader:
        assert not directory.delete(entry)
        assert (place / "state.pt").exists()
        reader.end()
    assert directory.delete(entry)
    assert names(directory) == [".lock"]


def test_what_a_dead_reader_read_is_deleted(directory):
    save(directory, 1)
    (entry,) = directory.entries()
    with other(directory.path, "lease = Lease(directory.entries()[0])") as reader:
        reader.kill()
        assert directory.delete(entry)
    assert directory.entries() == []


def test_what_is_gone_cannot_be_leased(directory):
    save(directory, 1)
    (entry,) = directory.entries()
    directory.delete(entry)
    with pytest.raises(FileNotFoundError):
        Lease(entry)


def test_a_reader_sees_that_its_checkpoint_was_saved_anew(directory):
    save(directory, 1)
    (entry,) = directory.entries()
    lease = Lease(entry)
    assert lease.holds()
    save(directory, 1, sequence=2)
    assert not lease.holds()
    lease.close()


def test_a_checkpoint_without_a_manifest_can_be_deleted(directory):
    place = save(directory, 1)
    (place / MANIFEST).unlink()
    (entry,) = directory.entries()
    assert directory.delete(entry)
    assert names(directory) == [".lock"]
