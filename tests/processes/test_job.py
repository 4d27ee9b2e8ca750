"""Whole jobs under the real launcher: what fails is noticed, killed and restarted, and nothing is left behind."""

import signal
from pathlib import Path

import pytest

FT = "fault_tolerance:\n  initial_rank_heartbeat_timeout: 30\n  rank_heartbeat_timeout: {heartbeat}\n"

HEAD = """
import ctypes, os, signal, sys, time
from ft_launcher import RankMonitorClient
rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print(f"rank {rank} restart {restart} pid {os.getpid()}", flush=True)
client = RankMonitorClient()
"""


@pytest.fixture
def config(sandbox):
    path = sandbox.path / "ft.yaml"
    path.write_text(
        "fault_tolerance:\n"
        "  initial_rank_heartbeat_timeout: 20\n"
        "  rank_heartbeat_timeout: 1\n"
        "  rank_section_timeouts: {outer: 1, inner: 0.7, step: 1}\n"
        "  rank_teardown_timeout: 1\n"
    )
    return str(path)


def test_a_job_that_succeeds_ends_with_0_and_leaves_nothing(sandbox):
    job = sandbox.launch("--nproc-per-node", "2", sandbox.script("print('hello')"))
    assert job.wait() == 0, job.output
    assert job.output.count("hello") == 2
    sandbox.assert_clean()


def test_R1_a_rank_that_exits_with_a_code_is_restarted_with_all_others(sandbox, config):
    script = sandbox.script(
        HEAD
        + """
client.init_workload_monitoring()
client.send_heartbeat()
if restart == 0:
    if rank == 1:
        sys.exit(7)
    signal.pause()
"""
    )
    job = sandbox.launch("--nproc-per-node", "2", "--max-restarts", "1", "--ft-cfg-path", config, script)
    assert job.wait() == 0, job.output
    job.wait_for("exited with code 7")
    assert "rank 0 restart 1" in job.output
    assert "rank 1 restart 1" in job.output
    sandbox.assert_clean()


HANGS = {
    "R5_in_python": "client.send_heartbeat()\nwhile True: time.sleep(100)",
    "R6_in_c_with_the_gil": "client.send_heartbeat()\nctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)",
    "R8_stopped": "client.send_heartbeat()\nos.kill(os.getpid(), signal.SIGSTOP)",
    "R7_in_an_outer_section": (
        "client.start_section('outer')\n"
        "while True:\n    client.start_section('inner')\n    time.sleep(0.05)\n    client.end_section('inner')\n"
    ),
    "R10_after_shutdown": "client.send_heartbeat()\nclient.shutdown_workload_monitoring()\nwhile True: time.sleep(100)",
}


@pytest.mark.parametrize("where", HANGS)
def test_a_rank_that_hangs_is_killed_and_the_job_goes_on(sandbox, config, where):
    script = sandbox.script(
        HEAD
        + "client.init_workload_monitoring()\nif restart == 0 and rank == 1:\n"
        + "".join(f"    {line}\n" for line in HANGS[where].splitlines())
        + "if restart == 0:\n    while True:\n        client.send_heartbeat()\n        time.sleep(0.05)\n"
    )
    job = sandbox.launch("--nproc-per-node", "2", "--max-restarts", "1", "--ft-cfg-path", config, script)
    assert job.wait() == 0, job.output
    said = job.wait_for("; killing")
    assert "rank 1 (pid" in said
    assert "rank 0 restart 1" in job.output
    stacks = said.rpartition("its stacks are in ")[2]
    assert "most recent call first" in Path(stacks).read_text()
