"""Rollouts of real processes: replay to the bit, either half alone, saves that are killed, profiles of engines."""

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ft_launcher import UsageError
from ft_launcher.rollout import RolloutDump, profile_engines, start_profiling, stop_profiling, trainer_profile
from tests.conftest import Running, Sandbox

pytest.importorskip("aiohttp", reason="the extra [engines] is not installed")

HERE = Path(__file__).parent
TEMPLATE = "dumps/rollout_{rollout_id}.pt"


def train(sandbox: Sandbox, *flags: str) -> Running:
    # torch makes that folder in TMPDIR as soon as it is imported far enough.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(sandbox.path / "cache")}
    return sandbox.start(sys.executable, str(HERE / "rollout_training.py"), *flags, **cache)


def lines_of(job: Running, word: str) -> list[str]:
    return [line for line in job.lines if line.startswith(word)]


def test_D1_a_replay_has_the_losses_of_the_live_run_to_the_bit_and_starts_no_engine(sandbox):
    live = train(sandbox, "--use-fault-tolerance", "--save-debug-rollout-data", TEMPLATE)
    assert live.wait() == 0, live.output
    assert len(lines_of(live, "loss")) == 4
    assert len(set(lines_of(live, "loss"))) == 4
    assert len(lines_of(live, "engines are made")) == 1
    starts = (sandbox.path / "starts").read_text()
    assert starts.count("listening") == 2

    replay = train(sandbox, "--load-debug-rollout-data", TEMPLATE)
    part = train(sandbox, "--load-debug-rollout-data", TEMPLATE, "--load-debug-rollout-data-subsample", "0.5")
    assert replay.wait() == part.wait() == 0, replay.output + part.output
    assert lines_of(replay, "loss") == lines_of(live, "loss")
    assert lines_of(part, "loss") != lines_of(live, "loss")
    assert lines_of(part, "train 1") == ["train 1 on 4"]
    for job in (replay, part):
        assert lines_of(job, "engines are made") == lines_of(job, "generate") == []
    assert (sandbox.path / "starts").read_text() == starts

    loaded = RolloutDump(str(sandbox.path / TEMPLATE)).load(2)
    assert loaded.version == "step 1"  # what the training of the round before gave
    assert {name: each.version for name, each in loaded.engines.items()} == {"engine0": "step 1", "engine1": "step 1"}
    sandbox.assert_clean()


def test_D2_rollout_only_saves_rounds_and_evaluations_and_never_trains(sandbox):
    job = train(sandbox, "--debug-rollout-only", "--rounds", "2", "--evaluate", "--save-debug-rollout-data", TEMPLATE)
    assert job.wait() == 0, job.output
    assert lines_of(job, "train") == []
    dump = RolloutDump(str(sandbox.path / TEMPLATE))
    for number in range(2):
        for evaluation in (False, True):
            assert len(dump.load(number, evaluation=evaluation).samples) == 8
    assert len(list((sandbox.path / "dumps").iterdir())) == 4
    sandbox.assert_clean()


def test_a_round_that_fails_in_the_job_is_kept_with_the_engines_that_it_had_at_its_end(sandbox):
    job = train(sandbox, "--use-fault-tolerance", "--fail-in-round", "1", "--save-debug-rollout-data", TEMPLATE)
    assert job.wait() == 1
    assert "the verifier broke" in job.output
    failed = RolloutDump(str(sandbox.path / TEMPLATE)).load(1, failed=True)
    assert (len(failed.samples), failed.error) == (5, "RuntimeError: the verifier broke")
    engines = {name: (each.incarnation, each.version) for name, each in failed.engines.items()}
    assert engines == {"engine0": (1, "step 0"), "engine1": (2, "step 0")}  # the second was started again in it
    sandbox.assert_clean()


def answer_of(job: Running) -> dict[str, Any]:
    assert job.wait() == 0, job.output
    answer: dict[str, Any] = json.loads(next(line for line in job.lines if line.startswith("{")))
    return answer


def test_D3_killed_at_50_random_moments_every_final_name_verifies_and_no_sample_that_was_saved_is_lost(sandbox):
    directory = sandbox.path / "kills"
    directory.mkdir()
    job = sandbox.start(sys.executable, str(HERE / "rollout_saves.py"), "kills", str(directory), "50", "6")
    answer = answer_of(job)
    assert answer["wrong"] == []
    assert min(answer["seen"].values()) >= 5, answer["seen"]
    sandbox.assert_clean()


def test_D3_killed_or_failing_at_any_system_call_of_a_save_the_round_that_was_there_stays_until_the_new_one_is_whole(
    sandbox,
):
    directory = sandbox.path / "calls"
    directory.mkdir()
    answer = answer_of(sandbox.start(sys.executable, str(HERE / "rollout_saves.py"), "calls", str(directory)))
    if reason := answer.get("skip"):
        pytest.skip(reason)
    assert answer["wrong"] == []
    names = [name for name, _, _ in answer["order"]]
    assert names[-3:] == ["fsync", "rename", "fsync"]
    assert answer["order"][-3][1] == "r_1.pt.partial"
    assert answer["order"][-1][1] == "."
    assert not {"write", "writev"} & set(names[-3:])


# -- profiles ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def engines(sandbox: Sandbox) -> list[str]:
    """Three engines, of which the one in the middle was started without a profiler."""
    flags: list[list[str]] = [["--profiler"], [], ["--profiler"]]
    jobs = [
        sandbox.start(sys.executable, str(HERE / "rollout_engine.py"), "0", f"asked{number}", *each)
        for number, each in enumerate(flags)
    ]
    return [f"http://127.0.0.1:{job.wait_for('listening on').rpartition(' ')[2]}" for job in jobs]


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of an engine that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def asked(sandbox: Sandbox, number: int) -> list[str]:
    return (sandbox.path / f"asked{number}").read_text().splitlines()[1:]


def test_D7_an_engine_without_a_profiler_is_reported_and_the_others_are_profiled(sandbox, engines):
    with profile_engines(engines, kind="vllm") as results:
        assert [each.url for each in results] == engines
        assert [each.problem for each in results] == ["", "it is not configured for profiling (404)", ""]
        assert asked(sandbox, 0) == ["/start_profile "]
    assert [each.problem for each in results] == ["", "it is not configured for profiling (404)", ""]
    for number in (0, 2):
        assert asked(sandbox, number) == ["/start_profile ", "/stop_profile "]
    assert asked(sandbox, 1) == []


def test_D7_sglang_is_told_the_steps_and_stops_by_itself(sandbox, engines):
    with profile_engines(engines[:1], kind="sglang", steps=5, directory="/profiles"):
        pass
    (line,) = asked(sandbox, 0)
    body = json.loads(line.removeprefix("/start_profile "))
    assert (body["num_steps"], body["output_dir"], body["activities"]) == (5, "/profiles", ["CPU", "GPU"])
    with profile_engines(engines[:1], kind="sglang", steps=None):
        pass
    assert [each.partition(" ")[0] for each in asked(sandbox, 0)[1:]] == ["/start_profile", "/stop_profile"]
    assert "num_steps" not in asked(sandbox, 0)[1]


def test_D7_an_engine_that_hangs_or_is_gone_is_reported_and_engines_stop_when_the_block_raises(
    sandbox, engines, silent
):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = f"http://127.0.0.1:{listener.getsockname()[1]}"
    block = profile_engines([silent, engines[0], gone], kind="vllm", timeout=3.0)
    results = block.__enter__()
    assert results[0].problem == "no answer within 3 s"
    assert results[1].problem == ""
    assert "onnect" in results[2].problem
    error = ZeroDivisionError()
    assert not block.__exit__(type(error), error, None)
    assert asked(sandbox, 0) == ["/start_profile ", "/stop_profile "]


def test_D7_start_and_stop_can_be_asked_for_apart_and_what_cannot_be_meant_is_refused(sandbox, engines):
    assert [each.problem for each in start_profiling([engines[0] + "/"], kind="vllm")] == [""]
    assert [each.problem for each in stop_profiling(engines[:1])] == [""]
    assert len(asked(sandbox, 0)) == 2
    for options, words in (
        ({"kind": "tgi"}, "kind is 'tgi'; it must be 'vllm' or 'sglang'"),
        ({"kind": "sglang", "steps": 0}, "steps is 0; it must be 1 or more"),
        ({"kind": "vllm", "timeout": 0.0}, "timeout is 0; it must be a number of seconds above 0"),
    ):
        with pytest.raises(UsageError, match=words):
            start_profiling(engines, **options)


def test_the_trainer_is_profiled_for_the_steps_that_were_asked_for(tmp_path):
    import torch

    with trainer_profile(tmp_path, wait=1, warmup=1, active=2) as profile:
        for _ in range(6):
            torch.ones(4, 4) @ torch.ones(4, 4)
            profile.step()
    (written,) = tmp_path.iterdir()
    names = {each["name"] for each in json.loads(written.read_text())["traceEvents"]}
    assert "aten::matmul" in names
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#2", "ProfilerStep#3"}
    with pytest.raises(UsageError, match="active is 0; it must be 1 or more"):
        trainer_profile(tmp_path, active=0)
