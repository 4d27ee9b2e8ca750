"""What becomes of a preemption notice: the leader names one step for all ranks, and each launcher sees to it.

No clock, store or page is here. How the ranks get the same answer, rank_notice.py says.
"""

from collections.abc import Iterable, Mapping
from math import inf

from msgspec import Struct

from ft_launcher.causes import Preempted
from ft_launcher.records import Held, Message, Noticed, Prepare, SaveAt, Saved
from ft_launcher.watch import Progress

__all__ = ["STOP_SECONDS", "NodeNotice", "Preemption", "ends_at", "late"]

ECHO_SECONDS = 5.0
"""The same notice again within so many seconds after all have saved is an echo: Slurm signals each process of a step,
and somebody who is in doubt signals twice."""

HOLDS_SECONDS = 60.0
"""For so long a notice without a deadline keeps newcomers from restarting the ranks: they are about to save."""

REMIND_SECONDS = 10.0
"""After so many seconds without a deadline the ranks that have not saved are named, then after twice as many, ..."""

STOP_SECONDS = 2.0
"""What stopping the ranks may take of the time up to a deadline, of which it is a tenth at most."""


class Preemption:
    """What the leader of a job knows of the last notice. Its rounds are those of `begin_round`."""

    def __init__(self) -> None:
        self.noticed: dict[str, float | None] = {}
        """The nodes (ids) to which it came, and until when they are there; None: nobody knows."""
        self._number = 0
        self._what = self._name = ""
        self._since = self._closed_at = -inf
        self.is_open = False
        """Not all ranks have saved for it."""
        self._is_told = False  # in this round
        self._held: dict[str, int] = {}
        self._step: int | None = None
        self._saved: set[str] = set()
        self._saved_at = -1

    def take(self, event: Noticed, name: str, now: float) -> None:
        """A notice came to the node called `name`. One that comes while the ranks save for another changes nothing."""
        until = None if event.seconds is None else now + event.seconds
        if self.is_open or (event.what == self._what and now < self._closed_at + ECHO_SECONDS):
            self.noticed[event.node] = _earlier(self.noticed.get(event.node), until)
            return
        # A node that is still about to be taken away stays one that will leave.
        self.noticed = {key: at for key, at in self.noticed.items() if at is not None and at > now}
        self.noticed[event.node] = _earlier(self.noticed.get(event.node), until)
        self._number += 1
        self._what, self._name, self._since = event.what, name, now
        self.is_open, self._is_told, self._saved_at = True, False, -1

    def heed(self, event: Held | Saved) -> None:
        """A node has done what it was told. Only of the running round, please."""
        if event.notice != self._number or not self._is_told:
            return
        if isinstance(event, Held):
            self._held[event.node] = event.step
        else:
            self._saved.add(event.node)
            self._saved_at = max(self._saved_at, event.step)

    def forget(self, node_id: str) -> None:
        """A node is not there any more."""
        self.noticed.pop(node_id, None)

    def begin_round(self) -> None:
        """New ranks are about to start. They save for a notice that their predecessors had not done with."""
        self._is_told = False
        self._closed_at = -inf  # what comes now, these have not saved for
        self.is_open &= bool(self.noticed)  # or nobody is left to whom it came

    def decide(self, round_: int, nodes: Iterable[str], now: float) -> list[tuple[str, Message]]:
        """Give the messages that are due. `nodes`: those of the round whose workers run, or have ended well."""
        there = set(nodes)
        if not self.is_open or not there:
            return []
        if not self._is_told:
            if not there & self.noticed.keys():
                return []  # it came to a spare, say
            self._is_told, self._step = True, None
            self._held, self._saved = {}, set()
            until = min((at for at in self.noticed.values() if at is not None), default=None)
            seconds = None if until is None else max(0.0, until - now)
            prepare = Prepare(round_, self._number, self._what, self._name, seconds)
            return [(node_id, prepare) for node_id in there]
        if self._step is None and there <= self._held.keys():
            # Of nodes that are gone by now, too: what their ranks have passed, others may have passed.
            self._step = max(self._held.values()) + 1
            return [(node_id, SaveAt(round_, self._number, self._step)) for node_id in there]
        if there <= self._saved:
            self.is_open, self._closed_at = False, now
        return []

    def holds_until(self) -> float:
        """Give the instant up to which no newcomer should restart the ranks."""
        if not self.is_open:
            return -inf
        until = min((at for at in self.noticed.values() if at is not None), default=None)
        return self._since + HOLDS_SECONDS if until is None else until

    def cause(self) -> Preempted:
        """Say why the ranks ended, if they say that it was for a notice."""
        return Preempted(self._what, self._name, self._saved_at if self._saved_at >= 0 else None)


class NodeNotice(Struct):
    """What one launcher knows of the notice that its ranks are to heed. Instants of `time.monotonic()`."""

    round: int
    number: int
    since: float
    until: float | None
    step: int | None = None
    is_saved: bool = False
    reminders: int = 0

    def due(self) -> float:
        """Give the instant of the next reminder of ranks that have not saved; inf: none."""
        if self.is_saved:
            return inf
        if self.until is not None:
            return inf if self.reminders else (self.since + self.until) / 2
        return self.since + REMIND_SECONDS * float(2 ** (self.reminders + 1) - 1)

    def unsaved(self, ranks: Mapping[int, Progress], ended: Iterable[int]) -> list[int]:
        """Give the ranks that have not saved for it, and have not `ended` well."""
        gone = set(ended)
        return [
            rank
            for rank, progress in ranks.items()
            if progress.saved < self.number and not progress.is_leaving and rank not in gone
        ]

    def saved_at(self, ranks: Mapping[int, Progress]) -> int:
        """Give the step at which ranks were told to save; -1: none was."""
        told = (progress.saving_at for progress in ranks.values() if progress.saving == self.number)
        return max(told, default=-1)


def late(progress: Progress, number: int) -> str:
    """Say how far a rank is that has not saved."""
    if progress.saving == number:
        return f"saving since step {progress.saving_at}"
    return f"at step {progress.asked}" if progress.asked >= 0 else "has not called should_checkpoint"


def ends_at(since: float, until: float) -> float:
    """Give the instant at which stopping what is left must begin."""
    return until - min(STOP_SECONDS, (until - since) / 10)


def _earlier(one: float | None, other: float | None) -> float | None:
    return min((at for at in (one, other) if at is not None), default=None)
