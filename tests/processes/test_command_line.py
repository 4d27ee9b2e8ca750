"""What a user can get wrong on the command line: one line that helps, exit code 2, and nothing started."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from ft_launcher.launcher import main

YAML = "fault_tolerance:\n  {}\n"

WRONG = [
    # torchrun's flags
    (["--nprocs", "2", "train.py"], "--nprocs: no such flag; did you mean --nproc-per-node? (see ft_launcher --help)"),
    (["--nnodes", "2:1", "train.py"], "--nnodes 2:1: must be a number from 1 on, or MIN:MAX with 1 <= MIN <= MAX"),
    (["--nproc-per-node", "0", "train.py"], "--nproc-per-node 0: must be a number from 1 on, auto, cpu, gpu or xpu"),
    (
        ["--nproc-per-node", "all", "train.py"],
        "--nproc-per-node all: Unsupported nproc_per_node value: all",
    ),
    (["--max-restarts", "-1", "train.py"], "--max-restarts -1: must be 0 or more"),
    (["--shutdown-timeout", "-5", "train.py"], "--shutdown-timeout -5: must be 0 or more"),
    (
        ["-r", "5", "train.py"],
        "--redirects 5: must be 0 (none), 1 (stdout), 2 (stderr) or 3 (both),"
        " or a list like 0:1,1:3 by local rank 0 to 9",
    ),
    (["--rdzv-conf", "a=", "train.py"], "--rdzv-conf a=: must be key=value,key=value"),
    (
        ["--rdzv-backend", "c10", "train.py"],
        "--rdzv-backend c10: must be c10d, static, etcd, etcd-v2 or the name of an installed plug-in",
    ),
    (["--local-ranks-filter", "a", "train.py"], "--local-ranks-filter a: must be a list of local ranks like 0,1,2"),
    (["--signals-to-handle", "TERM", "train.py"], "--signals-to-handle TERM: TERM is not a signal's name"),
    (["--module", "--no-python", "x"], "--module and --no-python exclude each other: a module is run by Python"),
    (["--log-dir", "train.py/logs", "train.py"], "--log-dir train.py/logs: Not a directory"),
    # what is to be run
    (["trian.py"], "trian.py: no such script, or it may not be read; did you mean train.py?"),
    (["--no-python", "./train.py"], "./train.py: no such command, or it may not be executed"),
    # our flags
    (
        ["--ft-rank-hartbeat-timeout", "5", "train.py"],
        "--ft-rank-hartbeat-timeout: no such flag; did you mean --ft-rank-heartbeat-timeout? (see ft_launcher --help)",
    ),
    (
        ["--ft-restart-policy", "min-helthy", "train.py"],
        "--ft-restart-policy min-helthy: must be any-failed or min-healthy",
    ),
    (["--ft-cfg-path", "no.yaml", "train.py"], "no.yaml: no such file"),
    (
        ["--nnodes", "2:3", "--rdzv-backend", "c10d", "train.py"],
        "--rdzv-endpoint: several nodes need a place to meet, host:port, the same for all of them",
    ),
    (
        ["--nnodes", "2", "--rdzv-endpoint", "node1:29400:1,node2", "train.py"],
        "--rdzv-endpoint node1:29400:1,node2: must be host:port, or several of them with commas between",
    ),
    (
        ["--nnodes", "2", "--rdzv-endpoint", "node1:29400", "--rdzv-conf", "join_timeout=ever", "train.py"],
        "--rdzv-conf join_timeout=ever: must be a number of seconds, 0 or more",
    ),
    (
        ["--nnodes", "2", "--rdzv-endpoint", "node1:29400", "--ft-require-auth", "train.py"],
        "--ft-require-auth: no secret is given; use --ft-token-file or the variable FT_TOKEN",
    ),
    (
        ["--nnodes", "2", "--rdzv-endpoint", "node1:29400", "--ft-token-file", "train.py", "train.py"],
        "--ft-token-file train.py: has mode 0644, must be 0600 or 0400 (chmod 600)",
    ),
]

WRONG_FILES = [
    (
        "rank_hartbeat_timeout: 5",
        "ft.yaml:2: fault_tolerance.rank_hartbeat_timeout: no such key; did you mean rank_heartbeat_timeout?",
    ),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory with a script, and nothing of this process's own environment that the launcher reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "tmp"))
    # The variable that Python documents for this: TMPDIR was read when pytest made its own directories.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "train.py").write_text("raise SystemExit('started')\n")
    return tmp_path


def started() -> tuple[list[str], list[Path]]:
    """What this process has started, and what a launcher would have made on the disk."""
    processes = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return processes, sorted(Path(tempfile.gettempdir()).iterdir())


def complain(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    before = started()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert started() == before
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ft_launcher: ")]
    assert len(lines) == 1, lines
    return lines[0].removeprefix("ft_launcher: ")


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_wrong_command_line_gives_one_line_and_exit_code_2(folder, capfd, arguments, message):
    assert complain(arguments, capfd) == message


@pytest.mark.parametrize(("text", "message"), WRONG_FILES)
def test_a_wrong_file_gives_one_line_and_exit_code_2(folder, capfd, text, message):
    (folder / "ft.yaml").write_text(YAML.format(text))
    assert complain(["--ft-cfg-path", "ft.yaml", "train.py"], capfd) == message


def test_the_dry_run_says_where_every_value_came_from_and_starts_nothing(folder, capfd, monkeypatch):
    (folder / "ft.yaml").write_text("job:\n  fault_tolerance:\n    rank_heartbeat_timeout: 90\n    safety_factor: 3\n")
    monkeypatch.setenv("PET_FT_SAFETY_FACTOR", "4")
    arguments = [
        "--ft-dry-run",
        "--nproc-per-node",
        "2",
        "--ft-cfg-path",
        "ft.yaml",
        "--ft_rank_termination-signal",
        "SIGTERM",
    ]
    arguments[-2] = "--ft-rank_termination_signal"
    before = started()
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "train.py", "--lr", "0.1"])
    assert started() == before
    assert ended.value.code == 0
    out = capfd.readouterr().out
    said = {line.split(":")[0].strip(): line for line in out.splitlines()}
    assert said["rank_heartbeat_timeout"].split() == ["rank_heartbeat_timeout:", "90s", "#", "ft.yaml:3"]
    assert said["safety_factor"].split() == ["safety_factor:", "4.0", "#", "PET_FT_SAFETY_FACTOR"]
    assert said["rank_termination_signal"].split()[1:] == ["SIGTERM", "#", "--ft-rank-termination-signal"]
    assert said["workload_check_interval"].split()[1:] == ["5s", "#", "default"]
    assert "would start 2 x train.py --lr 0.1" in out


def test_importing_the_package_and_the_client_does_not_import_torch(sandbox):
    text = "import sys, ft_launcher\nfrom ft_launcher import RankMonitorClient\nprint('torch' in sys.modules)"
    process = sandbox.start(sys.executable, "-c", text)
    assert process.wait() == 0
    assert process.lines[0] == "False"
