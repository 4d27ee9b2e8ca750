"""Dumps of rounds: what comes back, what is refused, what is kept of rounds that fail, and files of other tools."""

import asyncio
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ft_launcher import UsageError
from ft_launcher.rollout import DumpError, EngineRecord, RolloutDump, RolloutRunner, values
from ft_launcher.rollout.frames import FrameFile
from tests.conftest import GENEROUS

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary(),
    lambda each: st.lists(each) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), each),
)


@pytest.fixture
def dump(tmp_path: Path) -> RolloutDump:
    return RolloutDump(str(tmp_path / "new" / "rollout_{rollout_id}.pt"))


def saved(dump: RolloutDump, samples: list[Any], rollout_id: int = 7, **options) -> Path:
    with dump.round(rollout_id, **options) as writer:
        writer.extend(samples)
    return dump.path(rollout_id)


def names(dump: RolloutDump) -> list[str]:
    return sorted(each.name for each in dump.path(0).parent.iterdir())


@given(PLAIN)
def test_plain_values_come_back_as_they_were(value):
    assert values.decode(values.encode(value, "it")) == value


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        torch.tensor(float("nan")),
        torch.empty(0, 3, dtype=torch.int32),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([True, False]),
        torch.zeros(3).to(torch.float8_e4m3fn),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=lambda each: f"{each.dtype}{list(each.shape)}",
)
def test_a_tensor_comes_back_with_its_bits_type_and_shape(tensor):
    back = values.decode(values.encode([tensor], "it"))[0]
    assert type(back) is torch.Tensor
    assert (back.dtype, back.shape, back.requires_grad) == (tensor.dtype, tensor.shape, False)
    bits = [each.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for each in (back, tensor)]
    assert torch.equal(*bits)
    back.copy_(back.clone())  # it may be written to


def test_arrays_and_numbers_of_numpy_come_back():
    array, number, text = values.decode(values.encode((np.arange(4).reshape(2, 2).T, np.float32(0.1), "a"), "it"))
    assert array.tolist() == [[0, 2], [1, 3]]
    assert type(number) is np.float32
    assert number == np.float32(0.1)
    assert text == "a"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1, 2}, "is a set"),
        (types.SimpleNamespace(), "is a types.SimpleNamespace"),
        (2**64, "more than 64 bits"),
        ({(1, 2): 3}, r"has the key \(1, 2\)"),
        (np.array(["a"]), "array of <U1"),
        (np.array([object()]), "array of object"),
        (torch.eye(2).to_sparse(), "sparse"),
        ("\ud800", "not Unicode"),
    ],
)
def test_what_would_come_back_as_something_else_is_refused_by_its_place(dump, value, words):
    with dump.round(1) as writer:
        writer.append({"tokens": [1, 2]})
        with pytest.raises(DumpError, match=rf"^samples\[1\].*{words}"):
            writer.append({"a": [0, value]})
        writer.append({"tokens": [3]})
    assert dump.load(1).samples == [{"tokens": [1, 2]}, {"tokens": [3]}]


def test_a_value_that_holds_itself_is_refused(dump):
    value: list[Any] = []
    value.append(value)
    with dump.round(1) as writer, pytest.raises(DumpError, match="holds itself"):
        writer.append(value)


def test_a_round_comes_back_with_what_was_known_of_it(dump):
    before, after = {"a": EngineRecord(1, "step 6"), "b": EngineRecord(4)}, {"a": EngineRecord(2, "step 6")}
    with dump.round(7, meta={"model": "tiny", "layers": (1, 2)}, version="step 6", engines=before) as writer:
        sample = {"tokens": [1]}
        writer.append(sample)
        sample["tokens"].append(2)  # it was written as it was
        writer.engines = after
    loaded = dump.load(7)
    assert loaded.samples == [{"tokens": [1]}]
    assert (loaded.status, loaded.rollout_id, loaded.evaluation, loaded.error) == ("complete", 7, False, "")
    assert (loaded.version, loaded.engines) == ("step 6", after)
    assert loaded.meta == {"model": "tiny", "layers": [1, 2]}
    assert names(dump) == ["rollout_7.pt"]


def test_an_evaluation_has_a_name_of_its_own(dump):
    saved(dump, [1])
    saved(dump, [2], evaluation=True)
    assert names(dump) == ["rollout_7.pt", "rollout_eval_7.pt"]
    assert dump.load(7).samples == [1]
    assert dump.load(7, evaluation=True).samples == [2]
    assert dump.load(7, evaluation=True).evaluation


@pytest.mark.parametrize("error", [RuntimeError("the verifier broke"), asyncio.CancelledError(), KeyboardInterrupt()])
def test_a_round_that_raises_is_kept_as_failed_and_the_one_before_stays(dump, error):
    saved(dump, ["old"])
    round_ = dump.round(7)
    round_.__enter__().append("new")
    assert not round_.__exit__(type(error), error, None)
    assert names(dump) == ["rollout_7.pt", "rollout_failed_7.pt"]
    assert dump.load(7).samples == ["old"]
    failed = dump.load(7, failed=True)
    assert (failed.samples, failed.status) == (["new"], "failed")
    assert failed.error == f"{type(error).__name__}: {error}"


SECOND = """
import sys
from ft_launcher.rollout import RolloutDump
with RolloutDump(sys.argv[1]).round(7):
    pass
"""

FORKS = """
import os, sys
from ft_launcher.rollout import RolloutDump
dump = RolloutDump(sys.argv[1])
ready, done = os.pipe(), os.pipe()
with dump.round(7) as writer:
    writer.append("first")
    if not os.fork():
        try:
            writer.append("of the child")
        except ValueError:
            os.write(ready[1], b"refused")
        os.close(ready[1])
        os.close(done[1])
        os.read(done[0], 1)  # it outlives the round
        os._exit(0)
    os.close(ready[1])
    assert os.read(ready[0], 7) == b"refused"
    writer.append("second")
with dump.round(7) as writer:  # the child does not hold it
    writer.append("again")
os.close(done[1])
os.wait()
"""


def test_a_child_that_is_forked_in_a_round_writes_nothing_and_holds_nothing(dump):
    subprocess.run([sys.executable, "-c", FORKS, dump.template], check=True, timeout=GENEROUS)
    assert dump.load(7).samples == ["again"]
    assert names(dump) == ["rollout_7.pt"]


def test_a_round_under_way_is_readable_and_cannot_be_written_twice(dump):
    with dump.round(7) as writer:
        writer.append("first")
        assert dump.load(7, partial=True).samples == ["first"]
        with pytest.raises(DumpError, match=r"there is no such dump; .*\.partial is what a dead process has left"):
            dump.load(7)
        with pytest.raises(DumpError, match="under way twice"), dump.round(7):
            pytest.fail("it began")
        ended = subprocess.run(
            [sys.executable, "-c", SECOND, dump.template], capture_output=True, text=True, check=False
        )
        assert "is being written by another process" in ended.stderr
        writer.append("second")
    assert dump.load(7).samples == ["first", "second"]


def test_every_bit_of_a_dump_is_covered(dump):
    path = saved(dump, [{"tokens": [1, 2, 3], "text": "a"}, torch.ones(2)], meta={"model": "tiny"})
    content = path.read_bytes()
    for at in range(len(content)):
        for changed in (content[at] ^ 1, content[at] ^ 0x80):
            path.write_bytes(content[:at] + bytes([changed]) + content[at + 1 :])
            with pytest.raises(DumpError):
                dump.load(7)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(DumpError):
            dump.load(7)
    path.write_bytes(content + b"\0")
    with pytest.raises(DumpError):
        dump.load(7)


def test_frames_that_are_missing_or_not_in_their_order_are_noticed(dump):
    path = saved(dump, ["a", "b", "c"])
    whole = path.read_bytes()
    a, b = (whole[(end := whole.index(text) + 2) - 15 : end] for text in (b"\xa1a", b"\xa1b"))
    for changed in (whole.replace(b, b""), whole.replace(a + b, b + a)):
        assert changed != whole
        path.write_bytes(changed)
        with pytest.raises(DumpError, match="frames are missing, or not in their order"):
            dump.load(7)


FULL_DISK = """
import resource, sys
from ft_launcher.rollout import RolloutDump
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
dump = RolloutDump(sys.argv[1])
try:
    with dump.round(7) as writer:
        writer.append("fits")
        writer.append("x" * 10_000)  # 5,000 bytes of it do
except OSError:
    with dump.round(8) as writer:
        writer.append("fits")
        try:
            writer.append("x" * 10_000)
        except OSError:
            writer.append("fits as well")
"""


def test_of_a_sample_that_fits_only_in_part_nothing_is_left(dump):
    subprocess.run([sys.executable, "-c", FULL_DISK, dump.template], check=True)
    assert dump.load(7, failed=True).samples == ["fits"]
    assert dump.load(8).samples == ["fits", "fits as well"]
    assert names(dump) == ["rollout_8.pt", "rollout_failed_7.pt"]


def test_what_is_left_of_a_dump_is_readable_up_to_its_last_whole_sample(dump):
    path = saved(dump, list("abc"))
    content = path.read_bytes()
    sizes = []
    for size in range(content.index(b"\xa1a") - 13, len(content)):
        path.write_bytes(content[:size])
        loaded = dump.load(7, partial=True)
        assert loaded.status == "partial"
        assert loaded.samples == list("abc")[: len(loaded.samples)]
        sizes.append(len(loaded.samples))
    assert sizes == sorted(sizes)
    assert set(sizes) == {0, 1, 2, 3}


def test_a_format_of_the_future_is_refused_with_a_sentence(dump, tmp_path):
    file = FrameFile(tmp_path / "rollout_7.pt", tmp_path / "aside")
    file.write(b"H", msgspec.msgpack.encode({"format_version": 2, "round": 7}))
    file.close()
    with pytest.raises(DumpError, match=r"rollout_7\.pt: it has format 2; this ft_launcher reads format 1"):
        RolloutDump(str(tmp_path / "rollout_{rollout_id}.pt")).load(7)


def test_a_dump_under_the_name_of_another_round_is_refused(dump):
    saved(dump, [1]).rename(dump.path(8))
    with pytest.raises(DumpError, match="it is of round 7, not 8"):
        dump.load(8)


def test_a_path_without_the_number_is_refused_unless_overwriting_is_meant(tmp_path):
    with pytest.raises(DumpError, match=r"has no \{rollout_id\}"):
        RolloutDump(str(tmp_path / "rollout.pt"))
    dump = RolloutDump(str(tmp_path / "rollout.pt"), allow_overwrite=True)
    saved(dump, [1], 1)
    saved(dump, [2], 2)
    saved(dump, [3], 3, evaluation=True)
    assert names(dump) == ["eval_rollout.pt", "rollout.pt"]
    assert dump.load(1).samples == [2]


def test_a_subsample_is_the_same_for_the_same_seed_and_keeps_the_order(dump):
    saved(dump, list(range(100)))
    loaded = dump.load(7)
    chosen = loaded.subsample(0.25, seed=1).samples
    assert len(chosen) == 25
    assert chosen == sorted(chosen)
    assert chosen == loaded.subsample(0.25, seed=1).samples
    assert chosen != loaded.subsample(0.25, seed=2).samples
    assert loaded.subsample(1.0).samples == loaded.samples
    assert len(loaded.subsample(0.0001).samples) == 1


# -- files of other tools --------------------------------------------------------------------------------------------


class Bomb:
    """What runs code when it is unpickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self):
        return os.mkdir, (self._path,)


@pytest.mark.parametrize("wrap", [lambda bomb: {"rollout_id": 7, "samples": [bomb]}, lambda bomb: bomb])
@pytest.mark.parametrize("write", [torch.save, lambda it, path: path.write_bytes(pickle.dumps(it))])
def test_D4_a_pickle_bomb_is_refused_and_does_not_go_off(tmp_path, wrap, write):
    trace = tmp_path / "it went off"
    write(wrap(Bomb(str(trace))), tmp_path / "r_7.pt")
    with pytest.raises(DumpError, match=r"runs code of whoever wrote it|it cannot be read"):
        RolloutDump(str(tmp_path / "r_{rollout_id}.pt")).load(7)
    assert not trace.exists()


def test_D4_a_dump_of_slime_with_objects_in_it_loads_with_trust_only(tmp_path):
    samples = [{"tokens": torch.tensor([1, 2]), "metadata": types.SimpleNamespace(a=1)}]
    torch.save({"rollout_id": 7, "samples": samples}, tmp_path / "r_7.pt")
    dump = RolloutDump(str(tmp_path / "r_{rollout_id}.pt"))
    with pytest.raises(DumpError, match=r"trust=True, --load-debug-rollout-data-trust"):
        dump.load(7)
    loaded = dump.load(7, trust=True)
    assert loaded.status == "foreign"
    assert loaded.samples[0]["metadata"].a == 1


def test_D4_a_dump_of_slime_with_plain_values_loads_and_can_be_saved_as_ours(tmp_path):
    torch.save({"rollout_id": 7, "samples": [{"tokens": torch.tensor([1, 2])}]}, tmp_path / "r_7.pt")
    foreign, ours = (RolloutDump(str(tmp_path / f"{name}_{{rollout_id}}.pt")) for name in ("r", "ours"))
    runner = RolloutRunner(
        lambda _: pytest.fail("it generated"), lambda _, got: got, mode="train-only", load=foreign, save=ours
    )
    (samples,) = runner.run([7])
    assert samples[0]["tokens"].tolist() == [1, 2]
    assert ours.load(7).status == "complete"
    assert ours.load(7).samples[0]["tokens"].tolist() == [1, 2]


@pytest.mark.parametrize("content", [{"samples": 1}, [1], {"rollout_id": "x", "samples": []}])
def test_a_file_of_torch_that_is_no_dump_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "r_7.pt")
    with pytest.raises(DumpError, match=r"no dump of slime's|its rollout_id is 'x'"):
        RolloutDump(str(tmp_path / "r_{rollout_id}.pt")).load(7)


# -- the runner -------------------------------------------------------------------------------------------------------


def test_samples_of_coroutines_and_asynchronous_generators_are_taken(dump):
    async def generator(rollout_id):
        for number in range(3):
            await asyncio.sleep(0)
            yield [rollout_id, number]

    async def coroutine(rollout_id):
        await asyncio.sleep(0)
        return [[rollout_id, number] for number in range(3)]

    for generate in (generator, coroutine, lambda rollout_id: [[rollout_id, number] for number in range(3)]):
        runner = RolloutRunner(generate, lambda _, samples: samples, save=dump)
        assert runner.run([1]) == [[[1, 0], [1, 1], [1, 2]]]
        assert dump.load(1).samples == [[1, 0], [1, 1], [1, 2]]


def test_samples_that_came_before_a_generator_raised_are_kept(dump):
    def generate(_):
        yield "first"
        raise RuntimeError("the verifier broke")

    runner = RolloutRunner(generate, lambda *_: pytest.fail("it trained"), save=dump)
    with pytest.raises(RuntimeError, match="the verifier broke"):
        runner.run([3])
    assert dump.load(3, failed=True).samples == ["first"]


def test_a_replay_of_another_run_is_told_of(dump, caplog):
    RolloutRunner(lambda _: [1], lambda *_: None, save=dump, meta={"model": "a", "layers": (1,)}).run([1])
    replay = RolloutRunner(
        lambda _: [], lambda *_: None, mode="train-only", load=dump, meta={"model": "b", "layers": (1,), "new": 1}
    )
    replay.run([1])
    said = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert len(said) == 1
    assert "saved with model='a', and this is 'b'" in said[0]


def test_train_only_without_dumps_trains_on_what_it_has_itself():
    runner = RolloutRunner(lambda _: pytest.fail("it generated"), lambda _, samples: samples, mode="train-only")
    assert runner.run([1]) == [[]]
    assert runner.collect(1, evaluation=True) == []


def test_a_runner_refuses_what_contradicts_itself(dump):
    with pytest.raises(UsageError, match="mode is 'normal'"):
        RolloutRunner(lambda _: [], lambda *_: None, load=dump)
    with pytest.raises(UsageError, match="they must differ"):
        RolloutRunner(lambda _: [], lambda *_: None, mode="train-only", load=dump, save=dump)
