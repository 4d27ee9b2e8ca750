"""The toy RL job: what it learns does not depend on the engines that it lost, and its checks find old weights."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="needs the extra engines")

from tests.conftest import Running, Sandbox

TRAIN = str(Path(__file__).resolve().parent.parent.parent / "examples" / "rl_toy" / "train.py")
PATIENT = ("--rollout-health-check-interval", "0.5", "--rollout-health-check-timeout", "3")


def train(sandbox: Sandbox, name: str, *arguments: str) -> Running:
    """Run it for 8 rounds with 2 engines; its results are in `name`."""
    fixed = ("--rounds", "8", "--engines", "2", "--token-seconds", "0.001", "--use-fault-tolerance", *PATIENT)
    results = ("--out", str(sandbox.path / name))
    # An optimizer's first step imports torch's compiler, and that makes this directory: usually in the temporary one.
    compiler = {"TORCHINDUCTOR_CACHE_DIR": str(sandbox.path / "compiler")}
    running = sandbox.start(sys.executable, TRAIN, *fixed, *results, *arguments, **compiler)
    running.wait()
    return running


def results(sandbox: Sandbox, name: str, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (sandbox.path / name).read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def test_a_run_whose_engines_are_killed_hang_and_are_slow_learns_the_same_and_serves_no_old_weights(sandbox) -> None:
    dump = str(sandbox.path / "round-{rollout_id}.dump")
    undisturbed = train(sandbox, "undisturbed", "--save-debug-rollout-data", dump)
    assert undisturbed.process.returncode == 0, undisturbed.output
    disturbed = train(sandbox, "disturbed", "--faults", "kill@2,slow@3,hang@5")
    assert disturbed.process.returncode == 0, disturbed.output
    (before,), (after,) = (results(sandbox, name, "run") for name in ("undisturbed", "disturbed"))
    assert after["parameters"] == before["parameters"]
    assert (after["answers"], after["stale"], after["mismatched"]) == (128, 0, 0)
    assert after["retries"] >= 2
    rewards = [[each["reward"] for each in results(sandbox, name, "round")] for name in ("undisturbed", "disturbed")]
    assert rewards[0] == rewards[1]
    kill, slow, hang = results(sandbox, "disturbed", "fault")
    assert [each["fault"] for each in (kill, slow, hang)] == ["kill", "slow", "hang"]
    assert slow["noticed"] is None  # slow is not dead
    assert all(0 < each["noticed"] < each["back"] for each in (kill, hang))
    assert all(isinstance(each["lost"], float) for each in (kill, slow, hang))
    assert re.search(
        r"hang of engine-\d in round 5: noticed after [\d.]+ s, back after [\d.]+ s, lost", disturbed.output
    )

    replayed = train(sandbox, "replayed", "--load-debug-rollout-data", dump)
    assert replayed.process.returncode == 0, replayed.output
    assert results(sandbox, "replayed", "run")[0]["parameters"] == before["parameters"]
    sandbox.assert_clean()


def test_answers_with_old_weights_are_found_also_where_they_name_the_new_ones(sandbox) -> None:
    cheated = train(sandbox, "cheated", "--faults", "stale@1,lie@4")
    assert cheated.process.returncode == 1, cheated.output
    (run,) = results(sandbox, "cheated", "run")
    assert run["stale"] > 0
    assert run["mismatched"] > 0
    assert "round 2: engine-0 gave an answer with weights of version 1" in cheated.output
    assert "round 5: engine-1 gave an answer that is not of the weights that it names" in cheated.output
    sandbox.assert_clean()


def test_a_fault_that_cannot_be_meant_is_refused_in_one_line(sandbox) -> None:
    refused = train(sandbox, "refused", "--faults", "kill@3,kil@4")
    assert refused.process.returncode == 2
    assert "'kil@4' must be KIND@ROUND, one for a round, KIND of kill, hang, slow, stale, lie" in refused.output
    assert len(refused.lines) == 2  # and the end of output
