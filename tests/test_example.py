"""The example under every fault at once: a real DDP training that ends with the very bits of an undisturbed one."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LIMITS = [
    "--ft-rank-section-timeouts",
    "setup:120,step:3,checkpointing:60",
    "--ft-rank-teardown-timeout",
    "3",
    "--ft-rank-heartbeat-timeout",
    "5",
]


def train(sandbox, name: str, *arguments: str) -> tuple[str, str]:
    """Run the example with 2 ranks; give its last line and all that it said."""
    job = sandbox.launch(
        *("--nproc-per-node", "2", "--max-restarts", "12", "--ft-cfg-path", str(REPOSITORY / "configs" / "ft.yaml")),
        *LIMITS,
        str(REPOSITORY / "examples" / "train_ddp.py"),
        *("--checkpoint-dir", str(sandbox.path / name), *arguments),
    )
    assert job.wait() == 0, job.output
    return job.wait_for("finished step"), job.output


@pytest.mark.parametrize("monitoring", ["sections", "heartbeats"])
def test_a_job_that_fails_in_every_way_ends_with_the_parameters_of_an_undisturbed_one(sandbox, monitoring):
    faults = {
        "sections": [
            "crash:rank=1,step=12,restart=0",
            "kill:rank=0,step=22,restart=1",
            "segv:rank=1,step=22,restart=2",
            "hang:rank=0,step=25,restart=3",
            "hang-c:rank=1,step=32,restart=4",
            "stop:rank=0,step=33,restart=5",
            "hang-outer:rank=1,step=42,restart=6",
            "orphan:rank=0,step=43,restart=7",
            "hang-after-shutdown:rank=1,restart=8",
        ],
        "heartbeats": ["hang-c:rank=0,step=12,restart=0", "exit:rank=1,step=23,restart=1"],
    }[monitoring]
    switches = [word for fault in faults for word in ("--fault", fault)]
    limits = ["--monitoring", monitoring]
    undisturbed, _ = train(sandbox, "undisturbed", *limits)
    disturbed, output = train(sandbox, "disturbed", *limits, *switches)
    assert re.search(r"sha256 [0-9a-f]{64}", undisturbed)
    assert disturbed == undisturbed, output
    assert output.count("fault: rank") >= len(faults), output
    assert f"restart {len(faults)} of 12" in output, output
    left = [pid for pid in re.findall(r"leaves PID (\d+) behind", output) if Path(f"/proc/{pid}").exists()]
    assert left == []
