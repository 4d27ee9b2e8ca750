"""What a checkpoint says of itself, and what follows from it: no file is touched here."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_launcher.checkpoint.manifest import (
    Entry,
    FileRecord,
    Manifest,
    ManifestError,
    best,
    by_score,
    decode,
    encode,
    expendable,
    metrics_of,
    metrics_to_write,
    newest_first,
    step_name,
    step_of,
)

MODES = ("min", "max")


def manifest(step: int = 7, sequence: int = 1, **metrics: float) -> Manifest:
    files = {
        "state.pt": FileRecord(bytes=3, sha256="0" * 64),
        "sharded/.metadata": FileRecord(bytes=0, sha256="f" * 64),
    }
    return Manifest(
        step=step,
        sequence=sequence,
        world_size=2,
        sharded=True,
        metrics=metrics_to_write(metrics),
        files=files,
        torch="2.13.0",
        saved_utc="2026-11-21T12:00:00+00:00",
    )


def entry(step: int, sequence: int, **metrics: float) -> Entry:
    return Entry(Path(step_name(step)), step, manifest(step, sequence, **metrics))


@st.composite
def directories(draw):
    """Directories of checkpoints, some unreadable, in any order, with metrics of all kinds."""
    steps = draw(st.lists(st.integers(0, 30), unique=True, max_size=12))
    sequences = draw(st.permutations(range(1, len(steps) + 1)))
    loss = st.none() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0]) | st.floats()
    found = []
    for step, sequence in zip(steps, sequences, strict=True):
        value = draw(loss)
        if draw(st.integers(0, 4)) == 0:
            found.append(Entry(Path(step_name(step)), step, None, "unreadable"))
        else:
            found.append(entry(step, sequence, **({} if value is None else {"loss": value})))
    return found


# -- its bytes ------------------------------------------------------------------------------------------------------


@given(
    step=st.integers(0, 2**62),
    metrics=st.dictionaries(st.text(max_size=5), st.floats() | st.integers(-(2**50), 2**50), max_size=4),
)
def test_a_manifest_comes_back_as_it_was(step, metrics):
    written = Manifest(
        step=step,
        sequence=3,
        world_size=1,
        sharded=False,
        metrics=metrics_to_write(metrics),
        files={},
        torch="2",
        saved_utc="now",
    )
    read = decode(encode(written))
    assert read == written
    given_back = metrics_of(read)
    assert given_back.keys() == metrics.keys()
    for name, value in metrics.items():
        assert given_back[name] == float(value) or math.isnan(value)


def test_C3_every_single_bit_flip_of_a_manifest_is_noticed():
    whole = encode(manifest(loss=0.5, accuracy=math.nan))
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ManifestError):
            decode(bytes(damaged))


def test_C3_every_truncation_of_a_manifest_is_noticed():
    whole = encode(manifest(loss=0.5))
    for length in range(len(whole)):
        with pytest.raises(ManifestError):
            decode(whole[:length])


@pytest.mark.parametrize("more", [b" ", b"\n", b"{}", b"\0"])
def test_C3_bytes_behind_or_before_a_manifest_are_noticed(more):
    for damaged in (encode(manifest()) + more, more + encode(manifest())):
        with pytest.raises(ManifestError):
            decode(damaged)


def test_a_manifest_of_another_format_says_so():
    newer = Manifest(
        format=2, step=1, sequence=1, world_size=1, sharded=False, metrics={}, files={}, torch="", saved_utc=""
    )
    with pytest.raises(ManifestError, match="format 2; this ft_launcher reads format 1"):
        decode(encode(newer))


@given(step=st.integers(0, 10**12))
def test_a_directorys_name_gives_its_step_back(step):
    assert step_of(step_name(step)) == step


@pytest.mark.parametrize(
    "name",
    ["step_", "step_1", "step_0000001", "step_000000001", "step_-0000001", "step_0000000a", "step_00000001x", ""],
)
def test_other_names_are_no_checkpoints(name):
    assert step_of(name) is None


def test_names_of_steps_sort_as_the_steps_do():
    names = [step_name(step) for step in (0, 9, 10, 99_999_999)]
    assert names == sorted(names)


# -- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0.5", "nan", b"1", [1.0], {}, object(), 1j, 10**400])
def test_a_metric_that_is_no_number_is_named(value):
    with pytest.raises(ValueError, match=r"^metrics\['loss'\] is .*; it must be a number or None$"):
        metrics_to_write({"good": 1.0, "loss": value})


def test_a_metric_that_was_not_measured_is_left_out():
    assert metrics_to_write({"loss": None, "accuracy": 1}) == {"accuracy": 1.0}


# -- the newest and the best ----------------------------------------------------------------------------------------


def test_the_latest_is_the_last_one_committed_also_after_a_rewind():
    entries = [entry(1, 1), entry(2, 4), entry(3, 3), entry(4, 2)]
    assert [each.step for each in newest_first(entries)] == [2, 3, 4, 1]


def test_what_cannot_be_read_comes_first_so_that_somebody_names_it():
    unreadable = Entry(Path("step_00000001"), 1, None, "cut")
    assert newest_first([entry(3, 2), unreadable, entry(2, 1)])[0] is unreadable


@pytest.mark.parametrize(("mode", "expected"), [("min", [5, 3, 2, 1]), ("max", [1, 2, 5, 3])])
def test_C4_the_best_has_the_best_finite_metric_and_of_equals_the_newer_one_comes_first(mode, expected):
    entries = [
        entry(1, 1, loss=3.0),
        entry(2, 2, loss=2.0),
        entry(3, 3, loss=1.0),
        entry(4, 4, loss=math.nan),
        entry(5, 5, loss=1.0),
        entry(6, 6, accuracy=0.0),
        entry(7, 7, loss=math.inf),
        entry(8, 8, loss=-math.inf),
        Entry(Path("step_00000009"), 9, None, "cut"),
    ]
    assert [each.step for each in by_score(entries, "loss", mode)] == expected
    assert best(entries, "loss", mode) == by_score(entries, "loss", mode)[0]


def test_C4_without_a_finite_metric_there_is_no_best():
    assert best([entry(1, 1, loss=math.nan), entry(2, 2)], "loss", "min") is None


@given(entries=directories(), mode=st.sampled_from(MODES))
def test_C4_nothing_has_a_better_metric_than_the_best(entries, mode):
    champion = best(entries, "loss", mode)
    scores = [metrics_of(each.manifest).get("loss", math.nan) for each in entries if each.manifest is not None]
    finite = [score for score in scores if math.isfinite(score)]
    if champion is None:
        assert not finite
    else:
        assert champion.manifest is not None
        assert champion.manifest.metrics["loss"] == (min if mode == "min" else max)(finite)


# -- retention ------------------------------------------------------------------------------------------------------


@given(
    entries=directories(),
    keep=st.none() | st.integers(1, 6),
    protected=st.sets(st.integers(0, 30), max_size=3),
    broken=st.sets(st.integers(0, 30), max_size=3),
)
def test_C4_retention_takes_what_is_old_readable_and_not_protected_and_leaves_enough(entries, keep, protected, broken):
    safe, bad = ({Path(step_name(step)) for step in steps} for steps in (protected, broken))
    victims = expendable(entries, keep_last_n=keep, protected=safe, broken=bad)
    gone = {each.path for each in victims}
    assert len(gone) == len(victims)
    assert not gone & safe
    assert all(each.manifest is not None for each in victims)
    whole = [each for each in newest_first(entries) if each.manifest is not None and each.path not in bad]
    if keep is None:
        assert not victims
        return
    assert not gone & {each.path for each in whole[:keep]}
    if len(whole) >= keep:
        oldest = whole[keep - 1].sequence
        assert gone == {
            each.path
            for each in entries
            if each.manifest is not None and each.sequence < oldest and each.path not in safe
        }
    else:
        assert not victims
