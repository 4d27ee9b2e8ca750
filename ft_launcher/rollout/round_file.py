"""What stands in the file of a round: a header, a frame for each sample, and a trailer with a digest over all of it."""

import random
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from ft_launcher.rollout import values
from ft_launcher.rollout.frames import FrameError, read_frames

__all__ = [
    "FORMAT",
    "HEADER",
    "SAMPLE",
    "TRAILER",
    "EngineRecord",
    "Header",
    "LoadedRound",
    "Trailer",
    "read_round",
]

FORMAT = 1
"""Raised by one with every change that an older reader would misunderstand."""
HEADER, SAMPLE, TRAILER = b"H", b"S", b"T"
Status = Literal["complete", "failed", "partial", "foreign"]


class EngineRecord(Struct, frozen=True):
    """An engine that took part: which of its starts, and with which weights."""

    incarnation: int
    version: str | None = None


class Header(Struct, frozen=True, kw_only=True):
    """What is known when a round begins."""

    format_version: int
    rollout_id: int
    evaluation: bool
    version: str | None
    engines: dict[str, EngineRecord]
    meta: dict[str, Any]
    begun_utc: str


class Trailer(Struct, frozen=True, kw_only=True):
    """What is known when it ends. `sha256`: of all that stands before in the file."""

    status: Literal["complete", "failed"]
    error: str
    samples: int
    engines: dict[str, EngineRecord]
    ended_utc: str
    sha256: str


class LoadedRound(Struct, frozen=True, kw_only=True):
    """A round as it was read. `partial` and `foreign` ones have no digest that was verified."""

    path: Path
    rollout_id: int
    samples: list[Any]
    status: Status
    evaluation: bool = False
    error: str = ""
    """Why the round failed."""
    version: str | None = None
    """Of the weights that were current when it began."""
    engines: dict[str, EngineRecord] = msgspec.field(default_factory=dict)
    """As they were at its end, or at its begin where it has none."""
    meta: dict[str, Any] = msgspec.field(default_factory=dict)

    def subsample(self, fraction: float, seed: int = 0) -> "LoadedRound":
        """Keep such a part of the samples, in their order, at least one: for the same seed the same ones."""
        count = min(len(self.samples), max(1, round(fraction * len(self.samples))))
        chosen = random.Random(f"{seed}:{self.rollout_id}").sample(range(len(self.samples)), count)  # noqa: S311
        return msgspec.structs.replace(self, samples=[self.samples[index] for index in sorted(chosen)])


def read_round(path: Path, *, partial: bool) -> LoadedRound:
    """Read a dump of ours. partial: up to its last whole sample. ValueError says what is wrong with it; OSError."""
    header: Header | None = None
    trailer: Trailer | None = None
    samples: list[Any] = []
    try:
        for frame in read_frames(path):
            if trailer is not None:
                raise FrameError("something follows its end")  # noqa: TRY301 - as one that read_frames raises
            if header is None:
                header = _header(frame.kind, frame.payload)
            elif frame.kind == SAMPLE:
                samples.append(values.decode(frame.payload))
            elif frame.kind == TRAILER:
                trailer = _trailer(frame.payload, frame.sha256)
            else:
                raise ValueError(f"it has a frame of kind {frame.kind!r}, which this ft_launcher does not know")
    except FrameError:
        if header is None or not partial:
            raise
        trailer = None
    if header is None:
        raise ValueError("it is empty")
    if trailer is None and not partial:
        raise ValueError(f"it has no end: its process died after {len(samples)} samples; read it with partial=True")
    return LoadedRound(
        path=path,
        rollout_id=header.rollout_id,
        samples=samples,
        status="partial" if trailer is None else trailer.status,
        evaluation=header.evaluation,
        error="" if trailer is None else trailer.error,
        version=header.version,
        engines=header.engines if trailer is None else trailer.engines,
        meta=header.meta,
    )


def _header(kind: bytes, payload: bytes) -> Header:
    fields = values.decode(payload)
    found = fields.get("format_version") if kind == HEADER and isinstance(fields, dict) else None
    if found != FORMAT:  # before the rest is looked at, which may be of another shape
        raise ValueError(f"it has format {found}; this ft_launcher reads format {FORMAT}")
    return msgspec.convert(fields, Header)


def _trailer(payload: bytes, sha256: str) -> Trailer:
    trailer = msgspec.msgpack.decode(payload, type=Trailer)
    if trailer.sha256 != sha256:
        raise ValueError("its digest does not fit: frames are missing, or not in their order")
    return trailer
