"""A rank sleeps while another waits for it in a collective: the monitor is the first to find out, the group the second.

The order comes from `process_group_timeout()`, which is longer than every limit of the monitor.
"""

import re
from datetime import timedelta

SCRIPT = """
import os, sys, threading
from datetime import timedelta

import torch
import torch.distributed as dist

import ft_launcher

if sys.argv[1] == "watched":
    client = ft_launcher.connect()
    timeout = client.process_group_timeout()
else:
    client = ft_launcher.NoMonitorClient()
    timeout = timedelta(seconds=3)
with client.section("setup"):
    dist.init_process_group("gloo", timeout=timeout)
    # With its line's end: what two ranks print in two pieces may come mixed.
    print(f"the group waits {dist.group.WORLD._get_backend(torch.device('cpu')).options._timeout}\\n", end="")
for step in range(3):
    with client.section("step"):
        if step == 1 and dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            threading.Event().wait()  # it sleeps
        dist.all_reduce(torch.ones(1))
print(f"rank {dist.get_rank()} is done\\n", end="")
dist.destroy_process_group()
client.shutdown_workload_monitoring()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort at Python's end
"""

LIMITS = ("--ft-initial-rank-heartbeat-timeout", "120", "--ft-rank-heartbeat-timeout", "null")


def run(sandbox, kind: str, *limits: str) -> str:
    flags = ("--nproc-per-node", "2", "--max-restarts", "1", "--log-dir", "logs", *LIMITS, *limits)
    job = sandbox.launch(*flags, sandbox.script(SCRIPT), kind)
    assert job.wait() == 0, job.output
    assert job.output.count("restart 1 of 1") == 1
    for rank in (0, 1):
        assert f"rank {rank} is done" in job.output
    sandbox.assert_clean()
    return str(job.output)


def test_L3_a_hang_in_a_collective_is_found_by_the_monitor_long_before_the_group_gives_up(sandbox):
    output = run(sandbox, "watched", "--ft-rank-section-timeouts", "setup:700,step:3")
    assert "section 'step' open for 3.00 s, timeout 3 s; killing" in output
    assert "imed out" not in output
    waits = re.findall(r"the group waits (.+)", output)
    assert waits == [str(timedelta(seconds=700 + 5 + 60))] * 4


def test_L3_without_a_monitor_the_group_gives_up_when_it_was_told_to(sandbox):
    output = run(sandbox, "unwatched")
    assert "; killing" not in output
    assert "Timed out waiting 3000ms" in output
    assert re.findall(r"the group waits (.+)", output) == [str(timedelta(seconds=3))] * 4
