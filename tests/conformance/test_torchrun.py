"""The same command line under torchrun and under ft_launcher: what workers, users and callers see is the same."""

import argparse
import json
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import run as torchrun

from ft_launcher.launcher import get_args_parser
from tests.conftest import Running, Sandbox, free_port

LAUNCHERS = {"torchrun": "torch.distributed.run", "ft_launcher": "ft_launcher"}

SHOW = """
import json, os, sys
restart, name = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["ROLE_RANK"]
with open(f"{os.environ['SHOW_IN']}/{name}.{restart}.json", "w") as file:
    json.dump({"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}, file)
for stream, what in ((1, "out"), (2, "error")):
    os.write(stream, f"{what} of {name} {'keep' if name == '0' else 'drop'}\\n".encode())
os.write(1, b"\\xff no text, and no end of its line")
if "--fail" in sys.argv and name == "1":
    sys.exit(7)
if "--die" in sys.argv and name == "1":
    os.kill(os.getpid(), 9)
"""

CHANGES_FROM_RUN_TO_RUN = {"MASTER_PORT", "SHOW_IN", "TMPDIR", "_"}
"""Of these variables only the presence is compared: ports are free ones, folders are the test's."""

OURS = {
    "FT_RANK_MONITOR_IPC_SOCKET",
    "FT_CYCLE",
    "FT_RESTART_COUNT_GLOBAL",
    "FT_RESTART_REASON",
    "FT_PREV_WORLD_SIZE",
}


class Seen:
    """What one run of a launcher looked like from the outside."""

    def __init__(self, folder: Path, job: Running) -> None:
        self.code = job.wait()
        self.lines = job.lines
        self.workers = {path.name: json.loads(path.read_text()) for path in sorted((folder / "shown").iterdir())}
        self.logs = {
            _nameless(str(path.relative_to(folder / "logs"))): _text(path)
            for path in sorted((folder / "logs").rglob("*"))
        }

    def said(self, text: str = r"(?:\[\w+\]:|<\w+/\d> )?(?:out|error) of \d \w+") -> list[str]:
        """What the workers wrote to the console, with prefixes, in an order that is always the same."""
        return sorted(re.findall(text, "\n".join(self.lines)))


def _nameless(text: str) -> str:
    """Without the parts of a path that are made up anew in each run: a run's id and a random suffix."""
    return re.sub(r"(?<![^/])[^/]*_[a-z0-9_]{8}(?=/|$)", "RUN", text)


def _text(path: Path) -> str:
    return repr(path.read_bytes()) if path.is_file() else "a folder"


def environment(worker: dict[str, Any]) -> dict[str, str]:
    """A worker's variables, with what differs in every run taken out of their values."""
    given = {name: value for name, value in worker["environment"].items() if name not in OURS}
    for name in CHANGES_FROM_RUN_TO_RUN & given.keys():
        given[name] = "any"
    if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", given["TORCHELASTIC_RUN_ID"]):
        given["TORCHELASTIC_RUN_ID"] = "a uuid"
    given["MASTER_ADDR"] = socket.gethostbyname(given["MASTER_ADDR"])
    # The last three parts: attempt, local rank and name.
    given["TORCHELASTIC_ERROR_FILE"] = "/".join(given["TORCHELASTIC_ERROR_FILE"].split("/")[-3:])
    return given


@pytest.fixture
def both(sandbox: Sandbox):
    """Run one command line under each launcher; `{logs}` and `{port}` in it are each run's own."""

    def run(command: Sequence[str], **env: str) -> tuple[Seen, Seen]:
        jobs = {}
        for name, module in LAUNCHERS.items():
            folder = sandbox.path / name
            (folder / "shown").mkdir(parents=True)
            (folder / "logs").mkdir()
            port = str(free_port())
            filled = [each.replace("{logs}", str(folder / "logs")).replace("{port}", port) for each in command]
            # Torch leaves files open, and directories behind; neither is what is compared.
            own = {"SHOW_IN": str(folder / "shown"), "PYTHONWARNINGS": "ignore"}
            if name == "torchrun":
                own["TMPDIR"] = str(folder)
            jobs[folder] = sandbox.start(sys.executable, "-m", module, *filled, **env, **own)
        theirs, ours = (Seen(folder, job) for folder, job in jobs.items())
        return theirs, ours

    sandbox.script(SHOW, "show.py")
    return run


TWO = ["--nproc-per-node", "2"]
ODD_ARGUMENTS = ["--alpha", "${local_rank}", "$local_rank/$other", "$$x", "-c", "", "a b", "--", "--nnodes", "7"]

SAME: dict[str, tuple[list[str], dict[str, str]]] = {
    "arguments and macros": ([*TWO, "--", "show.py", *ODD_ARGUMENTS], {}),
    "a module, on as many as suit": (
        ["--nproc_per_node=auto", "-m", "show", "--beta"],
        {"CUDA_VISIBLE_DEVICES": ""},
    ),
    "no Python": (["--no-python", sys.executable, "show.py", "--gamma", "$local_rank"], {}),
    "standalone, a role, and a flag before its variable": (
        ["--standalone", *TWO, "--role", "trainer", "show.py"],
        {"PET_ROLE": "actor", "PET_NPROC_PER_NODE": "7"},
    ),
    "virtual local ranks": ([*TWO, "--virtual-local-rank", "show.py"], {"CUDA_VISIBLE_DEVICES": "3,5"}),
    "variables instead of flags": (
        ["show.py"],
        {"PET_NPROC_PER_NODE": "cpu", "PET_MAX_RESTARTS": "1", "PET_ROLE": "actor", "PET_STANDALONE": "1"},
    ),
    "static, on a port, with signals and threads": (
        [*TWO, "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", "{port}",
         "--signals-to-handle", "SIGTERM,SIGUSR2", "show.py"],
        {"OMP_NUM_THREADS": "3", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"},
    ),
    "a rendezvous with an endpoint": (
        [*TWO, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:{port}", "--rdzv-id", "job7",
         "--rdzv-conf", "timeout=60,read_timeout=30", "show.py"],
        {},
    ),
    "a worker that fails": ([*TWO, "-r", "3", "--max-restarts", "1", "show.py", "--fail"], {}),
    "a worker that is killed": ([*TWO, "show.py", "--die"], {}),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_workers_see_the_same_and_the_exit_code_is_the_same(both, sandbox, what):
    command, env = SAME[what]
    theirs, ours = both(["--log-dir", "{logs}", *command], **env)
    assert ours.code == theirs.code, "\n".join(ours.lines)
    assert ours.logs.keys() == theirs.logs.keys()
    # Workers that another one's failure stopped may not have come that far.
    certain = [
        name for name in theirs.workers if ("--fail" not in command and "--die" not in command) or name[0] == "1"
    ]
    assert certain
    for name in certain:
        assert environment(ours.workers[name]) == environment(theirs.workers[name])
        assert ours.workers[name]["environment"].keys() >= OURS
        for each in ("arguments", "folder"):
            assert ours.workers[name][each] == theirs.workers[name][each]
    if theirs.code == 0:
        assert ours.workers.keys() == theirs.workers.keys()
        assert ours.said() == theirs.said()
    sandbox.assert_clean()


LOGS = {
    "redirected": ["-r", "3"],
    "some redirected, some copied with a prefix": ["-r", "0:1,1:2", "-t", "0:2,1:1"],
    "copied, one on the console": ["-t", "3", "--local-ranks-filter", "1"],
    "one on the console": ["--local-ranks-filter", "0"],
    "filtered": ["-t", "3", "--duplicate-stdout-filters", "keep", "--duplicate-stderr-filters", "drop"],
}


@pytest.mark.parametrize("how", LOGS)
def test_logs_lie_in_the_same_places_with_the_same_contents(both, sandbox, how):
    env = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "<${role_name}/${rank}> "} if "prefix" in how else {}
    theirs, ours = both([*TWO, "--log-dir", "{logs}", "--rdzv-id", "run", *LOGS[how], "show.py"], **env)
    assert (ours.code, theirs.code) == (0, 0)
    assert ours.logs == theirs.logs
    assert ours.said() == theirs.said()
    sandbox.assert_clean()


RUN_PATH = """
import os, sys, time
os.write(1, f"in {__name__} of {os.environ['RANK']} {sys.argv[1:]}\\n".encode())
while "--wait" in sys.argv:
    time.sleep(1)
if "--fail" in sys.argv:
    # Who fails first ends the other one, which is to have said its line.
    said = os.environ["SHOW_IN"] + ".said."
    open(said + os.environ["RANK"], "w").close()
    while not os.path.exists(said + "0") or not os.path.exists(said + "1"):
        time.sleep(0.01)
    raise ValueError("a known mistake")
"""


@pytest.mark.parametrize("arguments", [["$local_rank"], ["--fail"]])
def test_a_script_run_by_path_ends_alike(both, sandbox, arguments):
    script = sandbox.script(RUN_PATH, "by_path.py")
    theirs, ours = both(["--run-path", *TWO, script, *arguments])
    assert ours.code == theirs.code == (1 if "--fail" in arguments else 0), "\n".join(ours.lines)
    for text in (r"in __main__ of \d.*", r"ValueError: a known mistake"):
        assert set(ours.said(text)) == set(theirs.said(text))


def test_a_script_run_by_path_is_stopped_by_a_signal_to_the_launcher(sandbox):
    script = sandbox.script(RUN_PATH)
    job = sandbox.launch("--run-path", *TWO, script, "--wait")
    job.wait_for("in __main__ of", count=2)
    job.send(15)
    assert job.wait() == 143, job.output
    sandbox.assert_clean()


RECORDS = """
import os, time

if os.environ["RANK"] == "0":
    time.sleep(600)
from torch.distributed.elastic.multiprocessing.errors import record

@record
def main():
    raise ValueError("a known mistake")

main()
"""


def test_the_error_file_of_the_launcher_gets_the_root_cause(sandbox):
    script = sandbox.script(RECORDS)
    found = {}
    for name, module in LAUNCHERS.items():
        file = sandbox.path / f"{name}.json"
        job = sandbox.start(sys.executable, "-m", module, *TWO, script, TORCHELASTIC_ERROR_FILE=str(file))
        assert job.wait() == 1, job.output
        assert "ValueError: a known mistake" in job.output.partition("Root Cause")[2]
        found[name] = json.loads(file.read_text())
    for record in found.values():
        record["message"]["extraInfo"].pop("timestamp")
    assert found["ft_launcher"] == found["torchrun"]


# -- the parser -------------------------------------------------------------------------------------------------------


def _spellings(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return parser._option_string_actions


def test_every_flag_of_torchrun_is_taken_with_its_default():
    theirs, ours = _spellings(torchrun.get_args_parser()), _spellings(get_args_parser())
    for spelling, action in theirs.items():
        assert spelling in ours
        assert (ours[spelling].dest, ours[spelling].default) == (action.dest, action.default)


def test_every_prefix_of_a_flag_means_what_it_means_to_torchrun():
    theirs, ours = torchrun.get_args_parser(), get_args_parser()
    prefixes = {spelling[:end] for spelling in _spellings(theirs) for end in range(3, len(spelling) + 1)}
    for prefix in sorted(prefixes):
        meant = {each[1] for each in theirs._get_option_tuples(prefix)}
        found = {each[1] for each in ours._get_option_tuples(prefix)}
        assert found == meant, f"{prefix} is {found}, and {meant} to torchrun"
