"""What a checkpoint says of itself, and what follows from that: which is the latest, the best, which may go.

A manifest stands in a checkpoint's directory as `manifest.json`, is written last, and holds the size and the digest of
every other file. It has a digest of its own, so that no bit of a checkpoint can change unnoticed.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

__all__ = [
    "MANIFEST",
    "BestMode",
    "Entry",
    "FileRecord",
    "Manifest",
    "ManifestError",
    "best",
    "by_score",
    "decode",
    "encode",
    "expendable",
    "metrics_of",
    "metrics_to_write",
    "newest_first",
    "step_name",
    "step_of",
]

MANIFEST = "manifest.json"
FORMAT = 1
"""Raised by one with every change that an older reader would misunderstand."""

BestMode = Literal["min", "max"]
_NotFinite = Literal["nan", "inf", "-inf"]  # which JSON has no numbers for
_Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_STEP_NAME = re.compile(r"step_(\d{8,})")


class ManifestError(ValueError):
    """This is not the manifest that was written."""


class FileRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a checkpoint as it was written."""

    bytes: Annotated[int, Meta(ge=0)]
    sha256: _Sha256


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One checkpoint. `files` by their path inside the checkpoint's directory."""

    format: int = FORMAT
    step: Annotated[int, Meta(ge=0)]
    sequence: Annotated[int, Meta(ge=1)]
    """How many commits came before in this directory, plus 1: the latest checkpoint is the last one committed, also
    after somebody went back to an earlier step."""
    world_size: Annotated[int, Meta(ge=1)]
    sharded: bool
    metrics: dict[str, float | _NotFinite]
    files: dict[str, FileRecord]
    torch: str
    saved_utc: str

    @property
    def total_bytes(self) -> int:
        """The size of all files but the manifest itself."""
        return sum(each.bytes for each in self.files.values())


class _Signed(Struct, frozen=True, forbid_unknown_fields=True):
    manifest: msgspec.Raw
    sha256: _Sha256


def encode(manifest: Manifest) -> bytes:
    """Give the bytes of the file: one line of JSON."""
    body = msgspec.json.encode(manifest)
    return _frame(body)


def decode(data: bytes) -> Manifest:
    """Read what `encode` gave. Raises ManifestError for anything else, a single other bit included."""
    try:
        body = bytes(msgspec.json.decode(data, type=_Signed).manifest)
        manifest = msgspec.json.decode(body, type=Manifest)
    except ValueError as error:  # msgspec's errors, and bytes that are not UTF-8
        raise ManifestError(str(error)) from None
    # The frame is compared as well: JSON has many spellings for one meaning.
    if _frame(body) != data:
        raise ManifestError("its digest does not fit")
    if manifest.format != FORMAT:
        raise ManifestError(f"it has format {manifest.format}; this ft_launcher reads format {FORMAT}")
    return manifest


def _frame(body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest().encode()
    return b'{"manifest":' + body + b',"sha256":"' + digest + b'"}\n'


def metrics_to_write(metrics: Mapping[str, object]) -> dict[str, float | _NotFinite]:
    """Turn numbers (tensors of one element too; None: it was not measured) into what a manifest holds.

    Raises ValueError, which names the metric, for anything else.
    """
    return {name: _written(_number(name, value)) for name, value in metrics.items() if value is not None}


def _number(name: str, value: Any) -> float:
    # float() reads text, too.
    if not isinstance(value, str | bytes | bytearray):
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            # torch warns where a tensor that has a gradient becomes a number.
            return float(value.detach() if hasattr(value, "detach") else value)
    raise ValueError(f"metrics[{name!r}] is {value!r}; it must be a number or None")


def _written(value: float) -> float | _NotFinite:
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def metrics_of(manifest: Manifest) -> dict[str, float]:
    """Give the metrics as numbers."""
    return {name: float(value) for name, value in manifest.metrics.items()}


# -- names ----------------------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    """Name the directory of `step`, so that names sort as steps do up to 99,999,999."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """Read the step from a directory's name; None for any other name."""
    match = _STEP_NAME.fullmatch(name)
    return None if match is None or step_name(int(match[1])) != name else int(match[1])


# -- decisions ------------------------------------------------------------------------------------------------------


class Entry(Struct, frozen=True):
    """A checkpoint's directory. `manifest` is None where it cannot be read, and `problem` says why."""

    path: Path
    step: int
    manifest: Manifest | None
    problem: str = ""

    @property
    def sequence(self) -> int:
        """0 where the manifest cannot be read."""
        return 0 if self.manifest is None else self.manifest.sequence


def newest_first(entries: Iterable[Entry]) -> list[Entry]:
    """Order by commits; what cannot be read comes first, so that whoever looks for the latest names it."""
    return sorted(entries, key=lambda each: (each.manifest is None, each.sequence, each.step), reverse=True)


def by_score(entries: Iterable[Entry], metric: str, mode: BestMode) -> list[Entry]:
    """Order from the best to the worst; ties: the newer one. What has no finite `metric` has no place."""
    scored = [(score, each) for each in entries if (score := _score(each, metric)) is not None]
    sign = 1 if mode == "max" else -1
    scored.sort(key=lambda pair: (sign * pair[0], pair[1].sequence), reverse=True)
    return [each for _, each in scored]


def best(entries: Iterable[Entry], metric: str, mode: BestMode) -> Entry | None:
    """Give the best one; None where none has a finite `metric`."""
    return next(iter(by_score(entries, metric, mode)), None)


def _score(entry: Entry, metric: str) -> float | None:
    value = None if entry.manifest is None else entry.manifest.metrics.get(metric)
    return value if isinstance(value, float | int) else None


def expendable(
    entries: Sequence[Entry], *, keep_last_n: int | None, protected: Iterable[Path], broken: Iterable[Path]
) -> list[Entry]:
    """Give what retention may delete: all but the newest `keep_last_n` (None: all) that are not known to be `broken`.

    Never what is `protected`, nor what has no readable manifest: a person may want to look at that.
    """
    if keep_last_n is None:
        return []
    protected, broken = set(protected), set(broken)
    readable = [each for each in newest_first(entries) if each.manifest is not None]
    whole = [each for each in readable if each.path not in broken]
    kept = whole[:keep_last_n]
    if len(kept) < keep_last_n:
        return []
    oldest = kept[-1].sequence
    return [each for each in readable if each.sequence < oldest and each.path not in protected]
