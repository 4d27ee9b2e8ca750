"""The checkpoint manager on several ranks, on disks that fail, and on terminals: in processes of their own."""

import os
import pty
import select
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import GENEROUS
from tests.processes.rank_forks import Forks


@pytest.fixture(scope="module")
def forks(tmp_path_factory) -> Iterator[Forks]:
    """A process that has imported all that ranks need."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture
def directory() -> Iterator[str]:
    """A place in memory for checkpoints: none of this depends on the disk, and a busy one would take minutes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as path:
        yield path


def names(directory: str) -> list[str]:
    return sorted(each.name for each in Path(directory).iterdir())


# -- what comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_C1_C6_two_ranks_go_on_bit_by_bit_also_when_they_trained_while_it_was_saved(forks, directory, kind, async_save):
    results = forks.ranks("round_trip", directory=directory, kind=kind, async_save=async_save).results()
    for each in results:
        assert each["evaluated"][0] == each["evaluated"][1]
        assert each["losses"][0] == each["losses"][1]
        assert each["digests"][0] == each["digests"][1]
    assert results[0]["losses"] != results[1]["losses"], "the ranks have data and random numbers of their own"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_C6_another_number_of_ranks_goes_on_with_the_same_model_where_all_have_stopped(forks, directory, kind):
    saved = forks.ranks("round_trip", directory=directory, kind=kind, async_save=True).results()
    expected = saved[0]["evaluated"][0]
    for size in (1, 2, 3):
        job = forks.ranks("resume", size, directory=directory, kind=kind)
        results = job.results()
        assert {each["evaluated"] for each in results} == {expected}
        assert {each["step"] for each in results} == {3}
        # 3 steps of 2 ranks, then one of all, of 4 samples on each.
        assert {each["sampler"]["position"] for each in results} == {(3 * 2 + size) * 4}
        assert ("rank 2 draws its own random numbers: 2 ranks saved theirs" in job.output()) == (size == 3)


def test_a_sampler_of_one_rank_alone_is_given_back_to_each_rank_and_refused_where_their_number_has_changed(
    forks, directory
):
    assert forks.ranks("own_positions", directory=directory).results() == [10, 11]
    job = forks.ranks("resume_own_position", 1, directory=directory)
    (said,) = job.results()
    assert "the sampler's state was saved by 2 ranks, each with its own, and 1 ranks cannot share it" in said


def test_a_data_loader_with_workers_gives_the_samplers_samples_and_what_it_read_ahead_does_not_count(forks):
    ((loaded, resumed),) = forks.start(("loaded_by_workers", {})).results()
    assert loaded == resumed
    assert len(loaded) == 16


def test_a_rank_that_closes_its_manager_at_once_cuts_off_no_other_that_still_opens_it(forks, directory):
    assert forks.ranks("open_again_and_again", 3, directory=directory).results() == [[], [], []]


# -- one rank is in trouble -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "damaged"),
    [("ddp", "rank_00000.pt"), ("ddp", "rank_00001.pt"), ("ddp", "state.pt"), ("fsdp", "sharded/__1_0.distcp")],
)
def test_C7_what_one_rank_finds_broken_all_ranks_pass_over(forks, directory, kind, damaged):
    job = forks.ranks("fall_back", directory=directory, kind=kind, damaged=damaged)
    assert job.results() == [1, 1]
    assert f"passing over {directory}/step_00000002: {damaged}: its bytes have changed" in job.output(0)


@pytest.mark.parametrize("async_save", [False, True])
def test_what_one_rank_cannot_save_fails_on_all_and_so_do_different_steps(forks, directory, async_save):
    first, second = forks.ranks("cannot_capture", directory=directory, async_save=async_save).results()
    assert first == second
    assert first[0].startswith("rank 1: extra is a pathlib.")
    assert first[1:] == ["the ranks are at different steps: 5, 6", "[7]"]
    assert names(directory) == [".lock", "step_00000007"]


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_one_rank_cannot_write_fails_on_all_and_leaves_nothing(forks, directory, kind, async_save):
    job = forks.ranks("cannot_write", directory=directory, kind=kind, async_save=async_save)
    first, second = job.results()
    assert first == second, job.output()
    assert first[0].startswith("the checkpoint of step 2 was not saved: ")
    assert "rank 1: " in first[0]
    assert "File too large" in first[0]
    assert first[1:] == ["[1]", "[]", "[1, 3]"]
    assert names(directory) == [".lock", "step_00000001", "step_00000003"]


@pytest.mark.parametrize(("seconds", "expected"), [([1e-9, 1e9], True), ([1e9, 1e-9], False)])
def test_whether_it_is_time_to_save_is_for_the_clock_of_rank_0_alone(forks, directory, seconds, expected):
    assert forks.ranks("maybe_save", directory=directory, seconds=seconds).results() == [expected] * 2


@pytest.mark.parametrize("who", [[0], [1], [0, 1]])
def test_an_exception_in_the_block_hangs_no_rank_and_what_was_saved_is_whole(forks, directory, who):
    job = forks.ranks("raise_in_block", directory=directory, who=who)
    codes = job.codes()
    assert codes == [1, 1], job.output()
    for rank in who:
        assert "ZeroDivisionError" in job.output(rank)
    (result,) = forks.start(("steps", {"directory": directory})).results()
    assert result in ([], [1])
    assert names(directory) == [".lock", *(f"step_{step:08d}" for step in result)]


def test_a_sharded_model_in_one_piece_is_refused(forks, directory):
    expected = "backend='torch' cannot save a sharded model, whose pieces lie on all ranks; give 'dcp'"
    for said in forks.ranks("refuse_pieces_in_one", directory=directory).results():
        assert expected in said


# -- C8: disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("backend", ["torch", "dcp"])
def test_C8_a_full_disk_is_named_takes_nothing_and_is_forgotten_when_there_is_room(
    forks, directory, backend, async_save
):
    call = {"directory": directory, "backend": backend, "async_save": async_save}
    (found,) = forks.start(("fill_disk", call)).results()
    if found is None:
        pytest.skip("this user may not mount a small file system")
    saved = found["saved"]
    assert saved > 1
    assert found["said"].startswith(f"the checkpoint of step {saved + 1} was not saved: ")
    assert "No space left on device" in found["said"]
    assert found["names"] == [".lock", *(f"step_{step:08d}" for step in range(1, saved + 1))]
    assert found["loaded"] == [saved, saved]
    assert found["steps"] == list(range(2, saved + 2))


def test_C8_a_read_only_disk_is_named_and_can_be_read(forks, directory):
    (found,) = forks.start(("write_to_read_only", {"directory": directory})).results()
    if found is None:
        pytest.skip("this user may not mount a small file system")
    assert "Read-only file system" in found["said"]
    assert found["loaded"]
    assert found["steps"] == [1, 3]
    assert found["names"] == [".lock", "step_00000001", "step_00000003"]


# -- terminals ------------------------------------------------------------------------------------------------------


class Terminal:
    """A terminal, and what was written to it."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.path = os.ttyname(slave)
        self._slave = slave
        self.text = ""

    def wait_for(self, text: str) -> None:
        while text not in self.text:
            assert select.select([self._master], [], [], GENEROUS)[0], f"no {text!r} in {self.text!r}"
            self.text += os.read(self._master, 4096).decode(errors="replace")

    def rest(self) -> None:
        """Read what is there."""
        while select.select([self._master], [], [], 0)[0]:
            self.text += os.read(self._master, 4096).decode(errors="replace")

    def close(self) -> None:
        os.close(self._slave)
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_a_bar_on_a_terminal_shows_what_takes_long_and_goes_away(forks, directory, terminal):
    enough = f"{directory}/enough"
    os.mkfifo(enough)
    job = forks.start(("show_progress", {"terminal": terminal.path, "enough": enough}))
    terminal.wait_for("saving step 1")
    terminal.wait_for("50/100 bytes")
    before = len(terminal.text)
    with Path(enough).open("wb", buffering=0) as go:
        go.write(b".")
        job.results()
    terminal.rest()
    assert "\x1b[2K" in terminal.text[before:], "the line is erased"
    assert terminal.text.rstrip("\r\n").endswith("\x1b[2K"), "and nothing is written behind it"


def test_what_takes_no_time_shows_nothing_on_a_terminal(forks, directory, terminal):
    forks.start(("save_on_terminal", {"terminal": terminal.path, "directory": directory})).results()
    terminal.rest()
    assert terminal.text == "end\r\n"


def test_without_a_terminal_nothing_is_written(forks, directory):
    job = forks.start(("save_and_load", {"directory": directory}))
    job.results()
    assert job.output() == "-- output.0\n"
