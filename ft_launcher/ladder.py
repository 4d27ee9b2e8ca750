"""From which checkpoint a restart should go on: the newest one from which ranks do not fail again and again.

A rank may report from which checkpoint it goes on. Where attempts from the same one fail before any rank has taken a
step beyond it, so many times in a row, it is suspect: its content may be what makes them fail. The next attempt is
told, and when it cannot go on from elsewhere either, the ladder is exhausted. No clock, file or socket is here: whether
a checkpoint is still there and whole, those who load it find out.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

__all__ = [
    "HINT_ENV",
    "MAX_PATH_BYTES",
    "Attempt",
    "Checkpoint",
    "Climbed",
    "Ladder",
    "NodeAttempt",
    "ResumeHint",
    "Rung",
    "advance",
    "hint_of",
    "named",
    "step_of",
]

HINT_ENV = "FT_RESUME_HINT"

MAX_PATH_BYTES = 512
"""Of a checkpoint's path. The hint has up to 33 of them, and goes through one variable (128 KiB, execve(2))."""

MAX_KNOWN = 16
"""Checkpoints that are remembered, the newest: more than jobs keep (CheckpointManager keeps 3)."""

MAX_TOLD = 64
"""Saves and removals of one node in one round that the leader is told, the last: what it knows need not be more."""

MAX_SUSPECTS = 32
"""With the default `suspect_after` a job has failed 96 times by then."""

MAX_NAMED = 8
"""Suspects that a sentence names."""

Path = Annotated[str, Meta(min_length=1, max_length=MAX_PATH_BYTES)]
Count = Annotated[int, Meta(ge=0)]


class ResumeHint(Struct, frozen=True):
    """From which checkpoint to go on, as others are suspect.

    `path` and `step`: of the newest one known to this job that is not suspect; None: it knows of none. `suspects`: the
    paths of those that are not to be used.
    """

    path: str | None
    step: int | None
    suspects: tuple[str, ...]


class Checkpoint(Struct, frozen=True):
    """A checkpoint, as a rank reports it."""

    path: Path | None  # None: the beginning, without any
    step: Count | None = None  # None: the one it was saved with, or 0 where that is not known; of saved ones: removed


class Attempt(Struct, frozen=True, omit_defaults=True):
    """What the ranks of one node have said in a round."""

    round: int
    rank: int = 0  # the global rank that reported `resumed`; of several the first
    resumed: Checkpoint | None = None  # None: nobody has said from where
    step: int = -1  # the latest of all ranks; -1: none was told
    saved: tuple[Checkpoint, ...] = ()  # and removed


class Rung(Struct, frozen=True, omit_defaults=True):
    """A checkpoint that this job knows, and how many attempts in a row failed before a step beyond it."""

    path: Path
    step: int
    failures: int = 0
    is_copy: bool = False  # it stood beside one of the same step when that became suspect: the same state, most likely


class Ladder(Struct, frozen=True, omit_defaults=True):
    """What a job knows of its checkpoints; the ones reported last come last."""

    known: tuple[Rung, ...] = ()
    suspects: tuple[Rung, ...] = ()


class Climbed(Struct, frozen=True):
    """What follows from an attempt. The texts are sentences for a person; "": there is nothing to say."""

    ladder: Ladder | None
    warning: str = ""
    exhausted: str = ""


def hint_of(ladder: Ladder | None) -> ResumeHint | None:
    """Give what the next attempt is told, None while no checkpoint is suspect."""
    if ladder is None or not ladder.suspects:
        return None
    newest = _newest(ladder.known)
    suspects = tuple(rung.path for rung in ladder.suspects)
    return ResumeHint(None, None, suspects) if newest is None else ResumeHint(newest.path, newest.step, suspects)


def step_of(ladder: Ladder | None, path: str | None) -> int | None:
    """Give the step of the checkpoint at `path`, None where that is not known."""
    rungs = (*ladder.known, *ladder.suspects) if ladder is not None else ()
    return next((rung.step for rung in rungs if rung.path == path), None)


def advance(
    ladder: Ladder | None, attempts: Sequence[Attempt], *, has_failed: bool, suspect_after: int | None
) -> Climbed:
    """Take note of an attempt, of which each node has told its part.

    `has_failed`: a rank failed or hung, and that is why it ended. `suspect_after`: so many failures in a row make a
    checkpoint suspect; None: none ever is.
    """
    if suspect_after is None or not any(attempt.resumed or attempt.saved for attempt in attempts):
        return Climbed(ladder)
    ladder = ladder or Ladder()
    known, suspects = _by_path(ladder.known), _by_path(ladder.suspects)
    saved = [each for attempt in attempts for each in attempt.saved]
    reached = max([attempt.step for attempt in attempts] + [each.step or 0 for each in saved])
    tried = _tried(attempts, known | suspects)
    was_suspect = tried is not None and suspects.get(tried.path) == tried
    has_failed = has_failed and tried is not None and reached <= tried.step
    if tried is not None and tried.path:
        if has_failed or reached > tried.step:
            tried = Rung(tried.path, tried.step, tried.failures + 1 if has_failed else 0, tried.is_copy and has_failed)
        _put(tried, known, suspects, is_suspect=tried.failures >= suspect_after)
        if tried.path in suspects:
            known = {
                path: replace(rung, is_copy=rung.is_copy or rung.step == tried.step) for path, rung in known.items()
            }
    for each in saved:
        # New content, or none: what was wrong with the one that stood there before is gone with it.
        _drop(each.path or "", known, suspects)
        if each.path and each.step is not None:
            known[each.path] = Rung(each.path, each.step)
    warning = exhausted = ""
    if tried is not None and has_failed and tried.path in suspects:
        warning = "" if was_suspect else _warning(tried, _newest(known.values()))
        exhausted = _exhausted(suspects.values()) if was_suspect else ""
    elif tried is not None and has_failed and not tried.path and suspects:
        exhausted = f"{_exhausted(suspects.values())}; so did one from the beginning"
    kept = _kept(known, tried.path if tried is not None else "")
    return Climbed(Ladder(kept, tuple(suspects.values())[-MAX_SUSPECTS:]), warning, exhausted)


def _by_path(rungs: Iterable[Rung]) -> dict[str, Rung]:
    return {rung.path: rung for rung in rungs}


def _drop(path: str, known: dict[str, Rung], suspects: dict[str, Rung]) -> None:
    for rungs in (known, suspects):
        rungs.pop(path, None)


def _put(rung: Rung, known: dict[str, Rung], suspects: dict[str, Rung], *, is_suspect: bool) -> None:
    _drop(rung.path, known, suspects)
    (suspects if is_suspect else known)[rung.path] = rung


def _tried(attempts: Sequence[Attempt], rungs: dict[str, Rung]) -> Rung | None:
    """Give what the attempt went on from, as it stood before; "" is the path of the beginning. None: nobody said."""
    told = [attempt for attempt in attempts if attempt.resumed is not None]
    if not told:
        return None
    # Where each node has files of its own, those of the first rank stand for all.
    resumed = min(told, key=lambda attempt: attempt.rank).resumed
    path, step = (resumed.path, resumed.step) if resumed is not None else (None, None)
    rung = rungs.get(path or "")
    if rung is not None and step in (None, rung.step):
        return rung
    return Rung(path or "", step or 0)  # with another step it is another content


def _newest(rungs: Iterable[Rung]) -> Rung | None:
    # A copy of a suspect may be sound, if only the file is broken; it is tried when nothing else is left.
    return max(reversed(list(rungs)), key=lambda rung: (not rung.is_copy, rung.step), default=None)


def _kept(known: dict[str, Rung], in_use: str) -> tuple[Rung, ...]:
    """Forget the oldest ones that are too many, but not the one that the job goes on from."""
    by_age = sorted(known.values(), key=lambda rung: (rung.path == in_use, rung.step))
    kept = {rung.path for rung in by_age[-MAX_KNOWN:]}
    return tuple(rung for rung in known.values() if rung.path in kept)


# -- sentences ----------------------------------------------------------------------------------------------------


def named(path: str | None, step: int | None) -> str:
    """Give a checkpoint's name for a sentence."""
    if path is None:
        return "the beginning"
    # It comes from a rank, which must not forge a line of ours.
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in path)
    return shown if step is None else f"{shown} (step {step})"


def _warning(suspect: Rung, newest: Rung | None) -> str:
    advice = f"to use {named(newest.path, newest.step)}" if newest is not None else "that no other one is known"
    count = "1 attempt" if suspect.failures == 1 else f"{suspect.failures} attempts"
    return (
        f"{count} from {named(suspect.path, suspect.step)} failed before a step beyond it: suspect; the next one is"
        f" told {advice}"
    )


def _exhausted(suspects: Iterable[Rung]) -> str:
    rungs = sorted(suspects, key=lambda rung: -rung.step)
    tried = [
        f"{named(rung.path, rung.step)} was tried {'once' if rung.failures == 1 else f'{rung.failures} times'}"
        for rung in rungs[:MAX_NAMED]
    ]
    more = f", and {len(rungs) - MAX_NAMED} more were" if len(rungs) > MAX_NAMED else ""
    return f"no checkpoint is left to go on from: {', '.join(tried)}{more}; each attempt failed before a step beyond"


# -- what a node gathers --------------------------------------------------------------------------------------------


class NodeAttempt:
    """What the ranks of this node have said since they were started."""

    def __init__(self) -> None:
        self._resumed: dict[int, Checkpoint] = {}
        self._saved: dict[str, Checkpoint] = {}

    def resume(self, rank: int, checkpoint: Checkpoint) -> bool:
        """Global rank `rank` goes on from there. Say whether that is news; of a rank's reports the last one counts."""
        is_first = not self._resumed
        before = self._resumed.get(min(self._resumed, default=0), checkpoint).path
        self._resumed[rank] = checkpoint
        return is_first or before != self._resumed[min(self._resumed)].path

    def save(self, checkpoint: Checkpoint) -> None:
        """A rank has saved a whole checkpoint, or removed it."""
        if checkpoint.path is not None:
            self._saved.pop(checkpoint.path, None)
            self._saved[checkpoint.path] = checkpoint
            if len(self._saved) > MAX_TOLD:
                del self._saved[next(iter(self._saved))]

    def told(self, round_: int, steps: Iterable[int]) -> Attempt | None:
        """Give all of it for the leader, None when nothing was reported. `steps`: the last ones of the ranks; -1: none.

        Without a report of this node its ranks' steps count all the same: another node's may have the report.
        """
        step = max([-1, *steps])  # whatever a confused rank has written into its page
        if not self._resumed and not self._saved and step < 0:
            return None
        rank = min(self._resumed, default=0)
        return Attempt(round_, rank, self._resumed.get(rank), step, tuple(self._saved.values()))
