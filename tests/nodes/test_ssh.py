"""The script of configs/ssh, with an ssh that runs its commands on this machine."""

import sys
from pathlib import Path

from tests.conftest import GENEROUS, Sandbox, free_port, marked_processes, wait_until_gone

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TRAINER = str(Path(__file__).with_name("slurm_trainer.py"))

SSH = """\
#!/bin/bash
# Like sshd: the words of the command with spaces between, to a shell of the user, in a session of its own. An end of
# the connection is a hangup for all that runs on its terminal.
while [ "${1:0:1}" = - ]; do [ "$1" = -o ] && shift; shift; done
shift
setsid bash -c "$*" &
session=$!
trap 'kill -HUP -- "-$session"' TERM INT HUP
while kill -0 "$session" 2>/dev/null; do wait "$session"; code=$?; done
exit "$code"
"""


def launch(sandbox: Sandbox, *arguments: str):
    ssh = Path(sandbox.script(SSH, "ssh"))
    ssh.chmod(0o755)
    token = Path(sandbox.script("a secret of this test alone", "token"))
    token.chmod(0o600)
    path = f"{sandbox.path}:{Path(sys.executable).parent}:{sandbox.env['PATH']}"
    hosts = {"HOSTS": "127.0.0.1 127.0.0.1", "PORT": str(free_port()), "FT_TOKEN_FILE": str(token)}
    script = str(REPOSITORY / "configs" / "ssh" / "launch.sh")
    return sandbox.start("bash", script, "--max-restarts", "2", TRAINER, *arguments, PATH=path, **hosts)


def assert_nothing_runs(sandbox: Sandbox) -> None:
    left = wait_until_gone(marked_processes(sandbox.mark), GENEROUS)
    assert not left


def test_the_script_trains_on_all_hosts_and_tells_the_output_of_each(sandbox):
    job = launch(sandbox, "--crash-at", "3")
    assert job.wait() == 0, job.output
    assert job.output.count("start: rank 0 of 2") == job.output.count("start: rank 1 of 2") == 2, job.output
    assert "[127.0.0.1] finished step 8" in job.output, job.output
    assert_nothing_runs(sandbox)


def test_the_end_of_the_script_is_the_end_on_all_hosts(sandbox):
    job = launch(sandbox, "--wait-at", "4")
    job.wait_for("waits at step 4", count=2)
    job.process.terminate()
    assert job.wait() != 0, job.output
    assert_nothing_runs(sandbox)
