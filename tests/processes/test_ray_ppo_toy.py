"""The toy PPO job on Ray: what it learns does not depend on the actors that it lost, and its metrics say which."""

import argparse
import json
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from tests.conftest import Running, Sandbox
from tests.ray_local import local_ray

EXAMPLE = str(Path(__file__).resolve().parent.parent.parent / "examples" / "ray_ppo_toy.py")
STEPS, SAVED_EVERY, LOOK_EVERY = 12, 3, 2
ROLES = ("actor_rollout", "critic", "ref_policy")
HANG_AFTER = 6  # a call takes some milliseconds, and a disk that others use as well may take a second


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Iterator[tuple[Path, str, str]]:
    """Run it in a Ray that is there: where it leaves its files, its last line, the address of that Ray."""
    # In this order: a Ray that is made by a process leaves in its environment how to be let in.
    with local_ray(), sandbox_of(tmp_path_factory.mktemp("undisturbed")) as sandbox:
        address = ray.get_runtime_context().gcs_address
        job = train(sandbox, RAY_ADDRESS=address)
        assert job.wait() == 0, job.output
        yield sandbox.path, job.wait_for("finished step"), address


@contextmanager
def sandbox_of(path: Path) -> Iterator[Sandbox]:
    sandbox = Sandbox(path)
    try:
        yield sandbox
    finally:
        sandbox.close()


def train(sandbox: Sandbox, *arguments: str, **environment: str) -> Running:
    fixed = ("--steps", str(STEPS), "--checkpoint-every", str(SAVED_EVERY), "--hang-after", str(HANG_AFTER))
    files = ("--checkpoint-dir", str(sandbox.path / "checkpoints"), "--metrics", str(sandbox.path / "metrics.jsonl"))
    settings = {"VERL_HEALTH_CHECK_INTERVAL": str(LOOK_EVERY)}
    # An optimizer imports torch's compiler, and that makes this directory: usually in the temporary one.
    settings |= {"TORCHINDUCTOR_CACHE_DIR": str(sandbox.path / "compiler")}
    return sandbox.start(sys.executable, EXAMPLE, *fixed, *files, *arguments, **(settings | environment))


def faults_of(*faults: str) -> list[str]:
    return [word for fault in faults for word in ("--fault", fault)]


def assert_metrics(path: Path, tried: list[int], lost: dict[int, str], down: dict[int, str]) -> None:
    """Check each line of a file of metrics.

    There is a line for each step that was tried, whether it was finished or lost: one to which the training goes back
    has a second line. `lost`: the role that failed, by the number of the line from 0. `down`: the same, of lines in
    which that role has not come back yet, if its health is in them.
    """
    counted = dict.fromkeys(ROLES, 0)
    last_step = 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == tried
    for number, line in enumerate(lines):
        expected = {"step": tried[number]}
        failed = {role: int(lost.get(number) == role) for role in ROLES}
        counted = {role: counted[role] + failed[role] for role in ROLES}
        for what in ("actor_failures", "actor_restarts"):
            expected |= {f"{what}/{role}": failed[role] for role in ROLES}
            expected |= {f"{what}/total": sum(failed.values())}
            expected |= {f"{what}/{role}_cumulative": counted[role] for role in ROLES}
        if tried[number] // LOOK_EVERY != last_step // LOOK_EVERY:
            expected |= {f"actor_health/{role}": int(down.get(number) != role) for role in ROLES}
        last_step = tried[number]
        assert line == expected, f"line {number}"


def test_an_undisturbed_run_has_one_line_for_each_step_and_loses_nothing(undisturbed) -> None:
    directory, finished, _ = undisturbed
    assert re.fullmatch(r"finished step 12 reward 0\.[4-9]\d* parameters sha256 [0-9a-f]{64}", finished)
    assert_metrics(directory / "metrics.jsonl", list(range(1, STEPS + 1)), lost={}, down={})


def test_a_run_that_loses_each_role_and_has_one_hang_ends_with_the_same_parameters(undisturbed, sandbox) -> None:
    directory = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: the paths of Ray's sockets are below it
    try:
        faults = faults_of(
            "kill:role=actor_rollout,step=5",
            "kill:role=critic,step=8",
            "kill:role=ref_policy,step=10",
            "hang:role=critic,step=11",
        )
        job = train(sandbox, *faults, RAY_TMPDIR=directory)
        assert job.wait() == 0, job.output
        sandbox.assert_clean(30)
    finally:
        shutil.rmtree(directory)
    assert job.wait_for("finished step") == undisturbed[1], job.output
    went = [line for line in job.lines if line.startswith("from step")]
    assert went == [f"from step {step} on" for step in (0, 3, 6, 9)]
    tried = [1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 7, 8, 9, 10, 11, 10, 11, 12]
    lost = {4: "actor_rollout", 9: "critic", 13: "ref_policy", 14: "critic"}
    # A gang says that it was lost when it is there again, and what is asked again ends when it was answered.
    assert_metrics(sandbox.path / "metrics.jsonl", tried, lost, down={9: "critic", 14: "critic"})
    for ended in (
        r"actor_rollout: rank 1 \(pid \d+\): .*; restart 1 of 3 of all 2 ranks",
        r"critic \(pid \d+, with 'update'\): .*; restart 1 of 3",
        r"ref_policy \(pid \d+, with 'logprobs'\): .*; restart 1 of 3",
        r"critic \(pid \d+, with 'update'\): 'update' has run for \d+\.\d s, its limit is 6 s; restart 2 of 3",
    ):
        assert len(re.findall(ended, job.output)) == 1, f"{ended}:\n{job.output}"


def test_a_run_goes_on_from_what_all_roles_have_saved_and_heeds_no_answer_from_before(undisturbed, sandbox) -> None:
    # As if all had been lost when the gang had saved the last step, and the critic had not.
    shutil.copytree(undisturbed[0] / "checkpoints", sandbox.path / "checkpoints")
    shutil.rmtree(sandbox.path / "checkpoints" / "seed-0" / "critic" / "step_00000012")
    # `values` is asked again. At step 10 the next critic is where it was, and at step 11 it is behind.
    faults = faults_of("stop:role=critic,step=10,call=values", "kill:role=critic,step=11,call=values")
    job = train(sandbox, *faults, RAY_ADDRESS=undisturbed[2])
    assert job.wait() == 0, job.output
    assert job.wait_for("finished step") == undisturbed[1], job.output
    assert [line for line in job.lines if line.startswith("from step")] == ["from step 9 on"] * 2
    assert_metrics(sandbox.path / "metrics.jsonl", [10, 11, 10, 11, 12], lost={0: "critic", 1: "critic"}, down={})
    assert re.search(r"critic \(pid \d+, with 'values'\): no answer to 2 pings in a row within 2 s", job.output)
    sandbox.assert_clean(30)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("kil:role=critic,step=3", "no kind 'kil'; there are kill, hang, stop"),
        ("kill", "write kill:role=ROLE,step=S, with ROLE of actor_rollout, critic, ref_policy and S from 1 on"),
        ("kill:role=crtic,step=3", "with ROLE of actor_rollout, critic, ref_policy and S from 1 on"),
        ("kill:role=critic,step=0", "S from 1 on"),
        ("hang:role=critic,step=3,call=generate", "critic has call=update or call=values, and nothing else"),
        ("hang:role=critic,step=3,rank=1", "critic has call=update or call=values, and nothing else"),
    ],
)
def test_a_fault_that_cannot_be_meant_is_said(fault, said) -> None:
    parse_fault = runpy.run_path(EXAMPLE)["parse_fault"]
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"{fault!r}: ") + f".*{re.escape(said)}$"):
        parse_fault(fault)


def test_what_cannot_be_is_refused_in_one_line(sandbox) -> None:
    expected = {
        train(sandbox, VERL_MAX_RESTARTS="many"): "VERL_MAX_RESTARTS=many: must be a whole number from 0 on, or -1",
        train(sandbox, *faults_of("stop:role=critic,step=13")): "--fault: there are only 12 steps",
    }
    for refused, said in expected.items():
        assert refused.wait() == 2, refused.output
        assert refused.lines[0].startswith(f"ray_ppo_toy.py: {said}")
        assert len(refused.lines) == 2  # and the end of output
