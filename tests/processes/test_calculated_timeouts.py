"""Timeouts that a job calculated and kept are right for the next start of the same job."""

SCRIPT = """
import json, os, sys, time
from pathlib import Path
import torch.distributed as dist
from ft_launcher import RankMonitorClient

time.sleep(1.5)  # as large imports take
dist.init_process_group("gloo")
client = RankMonitorClient()
client.init_workload_monitoring()
kept = Path("state.json")
if kept.exists():
    client.load_state_dict(json.loads(kept.read_text()))
for _ in range(3):
    time.sleep(0.3)
    client.send_heartbeat()
client.calculate_and_set_hb_timeouts()
kept.write_text(json.dumps(client.state_dict()))
print(client.hb_timeouts, flush=True)
client.shutdown_workload_monitoring()
sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
"""


def test_a_calculated_initial_timeout_covers_what_a_rank_does_before_it_connects(sandbox):
    # The limit counts from the start of the process: imports and joining the group are in it.
    job = sandbox.launch("--max-restarts", "1", "--log-dir", "logs", sandbox.script(SCRIPT))
    assert job.wait() == 0, job.output
    assert "; killing" not in job.output
    assert job.output.count("were_calculated=True") == 2
    sandbox.assert_clean()
