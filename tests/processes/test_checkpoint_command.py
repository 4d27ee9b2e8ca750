"""The command ft_checkpoint, as a person runs it on a directory: what it says, gives back, and leaves alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ft_launcher.checkpoint import CheckpointManager

MODULE = (sys.executable, "-m", "ft_launcher.checkpoint.command")


def ft_checkpoint(*arguments: str | int | Path, run: tuple[str, ...] = MODULE) -> tuple[int, str, str]:
    """Give the exit code, the output, and what was said beside it."""
    done = subprocess.run([*run, *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def line(output: str, begin: str) -> str:
    (found,) = [each for each in output.splitlines() if each.strip().startswith(begin)]
    return re.sub(r" +", " ", found.strip())


def save(directory: Path, **losses: float | None) -> None:
    """Save steps, `step_1=0.5`, with these losses."""
    model = nn.Linear(2, 1)
    with CheckpointManager(directory, keep_last_n=None) as manager:
        for name, loss in losses.items():
            manager.save(model, None, int(name.removeprefix("step_")), {"loss": loss, "accuracy": loss})


def contents(directory: Path) -> dict[str, bytes]:
    return {str(each.relative_to(directory)): each.read_bytes() for each in directory.rglob("*") if each.is_file()}


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Steps 1, 2 and 10, of which 2 is the best."""
    save(tmp_path / "runs", step_1=0.5, step_2=0.25, step_10=0.75)
    return tmp_path / "runs"


def test_ls_names_each_checkpoint_the_best_and_the_one_that_would_be_resumed(checkpoints):
    before = contents(checkpoints)
    code, output, _ = ft_checkpoint("ls", checkpoints)
    assert code == 0
    assert output.split("\n")[0].split() == ["step", "saved", "(UTC)", "size", "ranks", "metrics", "state"]
    when, size = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", r"[\d.]+ kB"
    for begin, metrics, state in [
        ("1 ", "loss 0.5, accuracy 0.5", "whole"),
        ("2 ", "loss 0.25, accuracy 0.25", "whole, best"),
        ("10 ", "loss 0.75, accuracy 0.75", "whole, would be resumed"),
    ]:
        assert re.fullmatch(f"{begin}{when} {size} 1 {metrics} {state}", line(output, begin))
    assert contents(checkpoints) == before


def test_the_best_is_found_by_the_metric_that_is_asked_for(checkpoints):
    _, output, _ = ft_checkpoint("ls", checkpoints, "--best-metric", "accuracy", "--best-mode", "max")
    assert line(output, "10 ").endswith("whole, best, would be resumed")
    _, output, _ = ft_checkpoint("ls", checkpoints, "--best-metric", "unknown")
    assert "best" not in output


def test_only_verify_finds_a_byte_that_has_changed_and_ls_what_is_missing(checkpoints):
    flip(checkpoints / "step_00000010" / "state.pt")
    (checkpoints / "step_00000002" / "rank_00000.pt").unlink()
    before = contents(checkpoints)
    code, output, _ = ft_checkpoint("ls", checkpoints)
    assert code == 1
    assert line(output, "10 ").endswith("whole, would be resumed")
    assert line(output, "2 ").endswith("broken")
    assert line(output, "step_00000002: ") == "step_00000002: rank_00000.pt: No such file or directory"
    code, output, _ = ft_checkpoint("verify", checkpoints)
    assert code == 1
    assert line(output, "10 ").endswith("broken")
    assert "step_00000010: state.pt: its bytes have changed since it was written" in output
    assert line(output, "1 ").endswith("whole, best, would be resumed")
    code, output, _ = ft_checkpoint("verify", checkpoints, "--step", 1)
    assert code == 0
    assert "broken" not in output
    assert contents(checkpoints) == before


def test_a_manifest_that_cannot_be_read_is_a_broken_checkpoint(checkpoints):
    (checkpoints / "step_00000010" / "manifest.json").write_bytes(b"{}")
    code, output, _ = ft_checkpoint("ls", checkpoints)
    assert code == 1
    assert line(output, "10 ") == "10 broken"
    assert line(output, "step_00000010: ").startswith("step_00000010: manifest.json: ")
    assert line(output, "2 ").endswith("whole, best, would be resumed")


def test_what_dead_writers_left_is_named_and_left_alone(checkpoints):
    for name in (".tmp-step_00000011-0123abcd", ".trash-step_00000001-0123abcd"):
        shutil.copytree(checkpoints / "step_00000001", checkpoints / name)
    before = contents(checkpoints)
    for word in ("ls", "verify"):
        code, output, _ = ft_checkpoint(word, checkpoints)
        assert code == 0
        for name in (".tmp-step_00000011-0123abcd", ".trash-step_00000001-0123abcd"):
            assert line(output, name).endswith("the next writer takes it away")
    assert contents(checkpoints) == before


def test_where_all_are_broken_nothing_would_be_resumed(checkpoints):
    for path in checkpoints.glob("step_*"):
        flip(path / "state.pt")
    code, output, _ = ft_checkpoint("verify", checkpoints)
    assert code == 1
    assert "nothing would be resumed" in output
    assert "best" not in output
    code, output, _ = ft_checkpoint("show", checkpoints)
    assert (code, output.strip()) == (1, f"{checkpoints}: nothing would be resumed")


def test_show_tells_of_the_one_that_would_be_resumed(checkpoints):
    flip(checkpoints / "step_00000010" / "state.pt")
    code, output, _ = ft_checkpoint("show", checkpoints)
    assert code == 0
    assert output.splitlines()[0] == str(checkpoints / "step_00000002")
    assert line(output, "step ") == "step 2"
    assert line(output, "metrics ") == "metrics loss 0.25, accuracy 0.25"
    assert line(output, "model ") == "model in one piece"
    assert line(output, "torch ") == f"torch {torch.__version__}"
    for name in ("rank_00000.pt", "state.pt"):
        assert re.fullmatch(rf"{name} [\d.]+ \w+ sha256 [0-9a-f]{{64}}", line(output, name))
    assert "every byte is as it was written" in output


@pytest.mark.parametrize("by_path", [False, True])
def test_show_tells_of_the_step_that_is_asked_for_and_what_is_wrong_with_it(checkpoints, by_path):
    flip(checkpoints / "step_00000001" / "state.pt")
    asked = [checkpoints / "step_00000001"] if by_path else [checkpoints, "--step", 1]
    code, output, _ = ft_checkpoint("show", *asked)
    assert code == 1
    assert output.splitlines()[0] == str(checkpoints / "step_00000001")
    assert "broken: state.pt: its bytes have changed since it was written" in output
    assert "every byte" not in output


def test_a_model_in_pieces_is_told_of_as_one(tmp_path):
    with CheckpointManager(tmp_path, backend="dcp") as manager:
        manager.save(nn.Linear(2, 1), None, 3)
    code, output, _ = ft_checkpoint("show", tmp_path)
    assert code == 0
    assert line(output, "model ") == "model in pieces (torch.distributed.checkpoint)"
    assert line(output, "sharded/.metadata")


def test_broken_ones_are_set_aside_when_that_is_asked_for_and_nothing_else_is_touched(checkpoints):
    flip(checkpoints / "step_00000010" / "state.pt")
    whole = contents(checkpoints / "step_00000002")
    broken = contents(checkpoints / "step_00000010")
    code, output, _ = ft_checkpoint("verify", checkpoints, "--set-aside")
    assert code == 1
    (aside,) = checkpoints.glob("broken-step_00000010-*")
    assert f"step_00000010 is now {aside.name}" in output
    assert contents(aside) == broken
    assert contents(checkpoints / "step_00000002") == whole
    code, output, _ = ft_checkpoint("verify", checkpoints, "--set-aside")
    assert code == 0
    assert "is now" not in output
    with CheckpointManager(checkpoints) as manager:
        assert manager.steps() == [1, 2]


def test_nothing_is_set_aside_while_somebody_writes_there(checkpoints):
    flip(checkpoints / "step_00000010" / "state.pt")
    with CheckpointManager(checkpoints, keep_last_n=None) as manager:
        manager.save(nn.Linear(2, 1), None, 11)
        code, output, said = ft_checkpoint("verify", checkpoints, "--set-aside")
        assert code == 1
        assert said.startswith(f"ft_checkpoint: {checkpoints}: process {os.getpid()} on ")
        assert "writes checkpoints here" in said
        assert line(output, "11 ").endswith("whole, would be resumed")
        assert ft_checkpoint("ls", checkpoints)[0] == 0  # to look is always allowed
    assert (checkpoints / "step_00000010").is_dir()


def test_an_empty_directory_holds_none(tmp_path):
    for word in ("ls", "verify"):
        code, output, _ = ft_checkpoint(word, tmp_path)
        assert (code, output.strip()) == (0, f"{tmp_path}: no checkpoints")
    assert ft_checkpoint("show", tmp_path)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["lst", "{}"], "argument ls|verify|show: 'lst' must be one of ls, verify, show; did you mean ls?"),
        (["repair", "{}"], "argument ls|verify|show: 'repair' must be one of ls, verify, show"),
        (["ls", "{}/absent"], "{}/absent: no such directory"),
        (["show", "{}", "--step", "3"], "--step 3: there is no such checkpoint; there are 1, 2, 10"),
        (["show", "{}/step_00000003"], "--step 3: there is no such checkpoint; there are 1, 2, 10"),
        (["show", "{}", "--step", "new"], "argument --step: invalid int value: 'new'"),
        (["ls", "{}", "--set-aside"], "--set-aside belongs to verify"),
        (["ls"], "the following arguments are required: DIR"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(checkpoints, arguments, sentence):
    code, output, said = ft_checkpoint(*(each.format(checkpoints) for each in arguments))
    assert (code, output) == (2, "")
    assert said.rstrip("\n").endswith(": " + sentence.format(checkpoints))
    assert said.count("\n") == 1


def test_torch_is_not_loaded(checkpoints):
    code = (
        "import sys; from ft_launcher.checkpoint.command import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    )
    for word in ("ls", "verify", "show"):
        _, output, _ = ft_checkpoint(word, checkpoints, run=(sys.executable, "-c", code))
        assert output.splitlines()[-1] == "False"


def test_the_command_has_its_name(checkpoints):
    script = Path(sys.executable).with_name("ft_checkpoint")
    if not script.exists():
        pytest.skip("installed before there was this command; install it again")
    assert ft_checkpoint("ls", checkpoints, run=(str(script),)) == ft_checkpoint("ls", checkpoints)
