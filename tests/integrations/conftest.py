"""Trainings under ft_launcher, as a user starts them, and what their ranks had at the end."""

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ft_launcher.integrations.progress import LEAST_SECONDS
from tests.conftest import Running, Sandbox

PACKAGES = ("lightning", "pytorch_lightning", "transformers", "accelerate")

collect_ignore_glob = (
    [] if all(map(find_spec, PACKAGES)) else ["test_ptl_*.py", "test_hf.py"]
)  # test_packages.py says so

REPOSITORY = Path(__file__).resolve().parent.parent.parent

LIMITS = "{setup: 100, step: 100, checkpointing: 100}"


class Training:
    """A script that trains under a framework on two ranks, saving after every fourth of its 28 steps."""

    def __init__(self, sandbox: Sandbox, *script: str) -> None:
        self.sandbox = sandbox
        self._script = script
        self._directory = sandbox.path / "training"

    def start(self, *arguments: str, sections: str | None = None) -> Running:
        """Start it once."""
        return self.sandbox.start(*self._command(arguments, sections), **self._env)

    def loop(self, *arguments: str, in_first_run: list[str], sections: str | None = None) -> Running:
        """Start it as a job script does: again and again, until the flag is there. Keeps each run's timeouts."""
        command = shlex.join(self._command(arguments, sections))
        script = f"""
            run=0
            more={shlex.quote(shlex.join(in_first_run))}
            while [ ! -e "$FAULT_TOL_FINISHED_FLAG_FILE" ] && [ $run -lt 3 ]; do
                run=$((run + 1))
                {command} $more
                echo "run $run ended orderly"
                cp {shlex.quote(str(self._directory))}/ft_state/*.json learned.$run
                more=
            done
            echo "finished after $run runs: $(cat "$FAULT_TOL_FINISHED_FLAG_FILE")"
        """
        flag = str(self.sandbox.path / "finished")
        return self.sandbox.start("bash", "-euc", script, FAULT_TOL_FINISHED_FLAG_FILE=flag, **self._env)

    def _command(self, arguments: tuple[str, ...], sections: str | None) -> list[str]:
        config = self.sandbox.path / "ft.yaml"
        lines = [
            "fault_tolerance:",
            "  initial_rank_heartbeat_timeout: 100",
            "  rank_heartbeat_timeout: 100",
            f"  rank_section_timeouts: {sections or '{}'}",
            "  rank_teardown_timeout: 100",
        ]
        config.write_text("\n".join(lines))
        flags = ["--nproc-per-node", "2", "--max-restarts", "9", "--ft-cfg-path", str(config)]
        flags += ["--log-dir", str(self.sandbox.path / "logs")]  # stacks of killed ranks are kept
        return [sys.executable, "-m", "ft_launcher", *flags, *self._script, *arguments]

    @property
    def _env(self) -> dict[str, str]:
        # The script may be a copy that is not beside what it imports.
        return {"PYTHONPATH": f"{REPOSITORY / 'examples'}:{os.environ.get('PYTHONPATH', '')}"}


@dataclass(frozen=True)
class Trained:
    """What a training that failed in every phase left behind."""

    output: str
    learned: list[dict[str, Any]]
    """The state of the callback after each run of the loop."""

    @property
    def result(self) -> str:
        """The line of the end, with the digest of the parameters."""
        return result(self.output)

    def kills(self) -> list[tuple[str, str, float]]:
        """Give rank, reason and timeout of each hung rank, in the order of time."""
        like = r"ft_launcher: rank (\d) .*?: (.*?)(?: open)? for [\d.]+ s, timeout ([\d.]+) s; killing"
        found = re.findall(like, self.output)
        return [(rank, what, float(seconds)) for rank, what, seconds in found]


def result(output: str) -> str:
    """Give the line of the end of a training, with the digest of the parameters."""
    found = re.search(r"^finished step 28 .*sha256 [0-9a-f]{64}$", output, re.MULTILINE)
    assert found, output
    return found[0]


def train_undisturbed(training: Training, *arguments: str, sections: str | None = LIMITS) -> str:
    """Run it with nothing in its way, and give all that it said."""
    running = training.start(*arguments, sections=sections)
    running.wait_for("epoch 6")
    assert running.wait() == 0, running.output
    training.sandbox.assert_clean()
    return running.output


def train_disturbed(training: Training, *arguments: str, in_first_run: list[str]) -> Trained:
    """Run it in the loop of a job script: a run of 16 slow steps, then one that fails in every phase.

    Its faults are one at each start: hung at step 18, with only the limits of the first run, killed at 22, hung in the
    validation after 24, and in the save after 28.
    """
    running = training.loop(*arguments, in_first_run=in_first_run, sections=LIMITS)
    for epoch in range(4):
        running.wait_for(f"epoch {epoch}")
    running.wait_for("run 1 ended orderly")
    for restart in range(1, 5):
        running.wait_for(f"restart {restart} of 9")
    running.wait_for("finished step")
    assert running.wait() == 0, running.output
    assert "restart 5 of 9" not in running.output, running.output
    training.sandbox.assert_clean()
    states = [json.loads((training.sandbox.path / f"learned.{run}").read_text()) for run in (1, 2)]
    return Trained(running.output, states)


def assert_sections_learned_limit_the_next_run(trained: Trained) -> None:
    """Check what a disturbed training has learned of its sections in its first run, and that its hangs ended by it."""
    first, second = (state["current_timeouts"]["section"] for state in trained.learned)
    # Nothing of a fresh start says how long a resumed one takes, and the end of a run with all of them was not seen.
    assert set(first["calculated_sections"]) == {"step", "checkpointing"}
    assert first["section"]["setup"] == 100
    assert 5 * 0.65 <= first["section"]["step"] != 100
    assert LEAST_SECONDS <= first["section"]["checkpointing"] != 100
    kills = trained.kills()
    what, timeout = kills[0][1:]
    assert what == "section 'step'"
    assert timeout == pytest.approx(first["section"]["step"], rel=0.01)
    assert {(rank, what) for rank, what, _ in kills} >= {
        ("0", "section 'step'"),  # in the training
        ("1", "section 'step'"),  # in the validation
        ("0", "section 'checkpointing'"),
    }
    assert 100 not in [seconds for _, _, seconds in kills]
    assert set(second["calculated_sections"]) == {"setup", "step", "checkpointing"}
    assert second["section"]["step"] == first["section"]["step"]  # no start of the second run had 16 steps


def train_preempted(training: Training, *arguments: str) -> tuple[str, str]:
    """Run it until a notice comes in its third epoch, and then to its end; give what each of the two has said."""
    running = training.start(*arguments, "--step-time", "0.2", sections=LIMITS)
    running.wait_for("epoch 2")
    running.send(signal.SIGTERM)
    assert running.wait() == os.EX_TEMPFAIL, running.output
    training.sandbox.assert_clean()
    assert "restart 1 of" not in running.output, running.output
    again = training.start(*arguments, sections=LIMITS)
    assert again.wait() == 0, again.output
    training.sandbox.assert_clean()
    return running.output, again.output


def lightning(sandbox: Sandbox, package: str = "lightning") -> Training:
    """Give the example, as it is or with the package that has the other name."""
    text = (REPOSITORY / "examples" / "lightning_ddp.py").read_text()
    if package == "pytorch_lightning":
        text = text.replace("import lightning.pytorch as pl", "import pytorch_lightning as pl")
        text = text.replace("from lightning.pytorch.", "from pytorch_lightning.")
        assert "lightning.pytorch" not in text
    return Training(sandbox, sandbox.script(text), "--directory", str(sandbox.path / "training"))


def hugging_face(sandbox: Sandbox) -> Training:
    """Give the training with Hugging Face's Trainer."""
    return Training(sandbox, str(Path(__file__).with_name("hf_training.py")), str(sandbox.path / "training"))


def without_caches(sandbox: Sandbox) -> Sandbox:
    """Have torch's compiler, which the frameworks load, keep its cache where no test looks for what we left behind."""
    sandbox.env["TORCHINDUCTOR_CACHE_DIR"] = str(sandbox.path / "inductor")
    return sandbox


@pytest.fixture
def sandbox(sandbox: Sandbox) -> Sandbox:
    """A sandbox for a training framework."""
    return without_caches(sandbox)


@pytest.fixture(scope="module")
def new_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Sandbox]]:
    """Give sandboxes for what the tests of a module share."""
    sandboxes: list[Sandbox] = []

    def new() -> Sandbox:
        sandboxes.append(without_caches(Sandbox(tmp_path_factory.mktemp("training"))))
        return sandboxes[-1]

    yield new
    for sandbox in sandboxes:
        sandbox.close()
