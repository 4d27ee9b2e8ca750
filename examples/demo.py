"""Trains twice, undisturbed and with a crash and a hang under way, and compares the parameters bit for bit.

    python examples/demo.py

Each job is one that you could type: its command line is printed first.
"""

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
JOB = ["ft_launcher", "--nproc-per-node", "2", "--max-restarts", "3", "--ft-cfg-path", "configs/ft.yaml"]
FAULTS = ["--fault", "crash:rank=1,step=25,restart=0", "--fault", "hang:rank=0,step=45,restart=1"]


def main() -> int:
    """Run both jobs; 0 when the disturbed one recovered and ended with the same parameters."""
    with tempfile.TemporaryDirectory(prefix="ft_launcher_demo_") as directory:
        undisturbed = train("an undisturbed job", ["--checkpoint-dir", f"{directory}/undisturbed"])
        disturbed = train(
            "the same job; rank 1 crashes at step 25, and after the restart rank 0 hangs at step 45",
            ["--checkpoint-dir", f"{directory}/disturbed", *FAULTS],
        )
    print(f"\nundisturbed: {undisturbed}\ndisturbed:   {disturbed}")
    if undisturbed != disturbed:
        print("They differ: the job has lost something.")
        return 1
    print("Bit for bit the same: a crash and a hang cost two restarts, and nothing else.")
    return 0


def train(title: str, arguments: list[str]) -> str:
    """Run one job before the reader's eyes, and give its last line."""
    command = [*JOB, "examples/train_ddp.py", *arguments]
    print(f"\n=== {title}\n$ {shlex.join(command)}", flush=True)
    # The console script of this very environment, whatever PATH says.
    command[0] = str(Path(sys.executable).with_name("ft_launcher"))
    job = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    result = ""
    assert job.stdout is not None
    for line in job.stdout:
        print(line, end="", flush=True)
        if re.match(r"finished step \d+ ", line):
            result = line.strip()
    if job.wait() != 0 or not result:
        raise SystemExit(f"the job ended with exit code {job.returncode}")
    return result


if __name__ == "__main__":
    sys.exit(main())
