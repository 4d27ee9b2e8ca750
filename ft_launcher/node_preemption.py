"""What a launcher does about notices of preemption: it tells the leader, holds its ranks, and names who is late."""

import logging
import signal
import time
from collections.abc import Callable, Mapping
from math import inf

from ft_launcher.causes import Cause, LauncherSignalled, Preempted
from ft_launcher.job_rendezvous import JobRendezvous
from ft_launcher.monitors import RankMonitors
from ft_launcher.noticing import Notices, Received
from ft_launcher.preempting import NodeNotice, ends_at, late
from ft_launcher.records import Prepare

__all__ = ["NodePreemption"]

logger = logging.getLogger(__name__)

VISIBLE_SECONDS = 0.001
"""A rank that has not seen the notice in its page has written its step before: both are in every processor's view after
this, a thousand times what a store takes to leave a processor."""

STORM_SECONDS = 1.0
"""The same notice again within this time is not worth a word."""


class NodePreemption:
    """The notices that came to this node, and the one that its ranks are to heed."""

    def __init__(
        self, job: JobRendezvous, monitors: RankMonitors, notices: Notices, term_grace: float, grace: float | None
    ) -> None:
        """`term_grace`: seconds from SIGTERM to the end; `grace`: the same from any notice that does not say it."""
        self._job, self._monitors, self._notices = job, monitors, notices
        self._term_grace, self._grace = term_grace, grace
        self._last: dict[str, float] = {}
        self._first: tuple[Received, float] | None = None  # of those that came here with an end: the earliest
        self._current: NodeNotice | None = None

    def fileno(self) -> int:
        """Give the descriptor that is readable when a notice has come to this node."""
        return self._notices.fileno()

    def due(self) -> float:
        """Give the instant at which something is to be done though nothing happens; inf: never."""
        return min(self._ends_at(), self._current.due() if self._current is not None else inf)

    def must_end(self) -> bool:
        """Say whether there is no more time for what still runs here."""
        return time.monotonic() >= self._ends_at()

    def was_signalled(self, number: int) -> bool:
        """Say whether this signal came as a notice that has an end."""
        return self._first is not None and self._first[0].signum == number

    def has_left(self, local_rank: int) -> bool:
        """Say whether this rank has said that it ends for a notice."""
        progress = self._monitors.progress().get(local_rank)
        return progress is not None and progress.is_leaving

    def look(self, codes: Mapping[int, int | None], who: Callable[[int], str]) -> None:
        """Do what is due. `codes`: the ranks' return codes; `who` gives a rank's name for sentences."""
        now = time.monotonic()
        for received in self._notices.take():
            self._receive(received, now)
        self._job.directive()  # takes in what the leader has said
        prepare = self._job.prepare
        if prepare is None:
            self._current = None
            return
        current = self._current
        if current is None or (current.round, current.number) != (prepare.round, prepare.notice):
            current = self._current = self._hold(prepare, now)
        save_at = self._job.save_at
        if current.step is None and save_at is not None:
            current.step = save_at.step
            self._monitors.save_at(save_at.step)
            logger.info("all ranks save at step %d, or the first one after it that they ask about", save_at.step)
        self._see_who_has_saved(current, codes, who, now)

    def end(self, codes: Mapping[int, int | None], who: Callable[[int], str]) -> Cause:
        """Give the cause of the end of this node at the end of its time, and say it."""
        received = self._first[0] if self._first is not None else Received("", 0.0)
        current, ranks = self._current, self._monitors.progress()
        number = current.number if current is not None else max((each.saved for each in ranks.values()), default=0)
        asked = current or NodeNotice(0, number, 0.0, None)
        unsaved = "; ".join(f"{who(rank)}: {late(ranks[rank], number)}" for rank in asked.unsaved(ranks, _well(codes)))
        logger.warning("the time that %s gave is over; %s", received.what, unsaved or "all ranks have saved")
        if unsaved and received.signum is not None:
            return LauncherSignalled(received.signum)
        step = asked.saved_at(ranks)
        return Preempted(received.what, step=step if step >= 0 else None, unsaved=unsaved)

    def cause(self) -> Preempted:
        """Say for what the ranks of this node have ended, as far as this node knows it."""
        prepare, step = (
            self._job.prepare,
            max((each.saving_at for each in self._monitors.progress().values()), default=-1),
        )
        what, name = (prepare.what, prepare.name) if prepare is not None else ("", "")
        return Preempted(what, name, step if step >= 0 else None)

    # -- within ---------------------------------------------------------------------------------------------------

    def _ends_at(self) -> float:
        if self._first is None:
            return inf
        received, until = self._first
        return ends_at(received.at, until)

    def _receive(self, received: Received, now: float) -> None:
        if received.at - self._last.get(received.what, -inf) < STORM_SECONDS:
            return
        is_new = received.what not in self._last
        self._last[received.what] = received.at
        grace = self._term_grace if received.signum == signal.SIGTERM else self._grace
        until = received.until if received.until is not None or grace is None else received.at + grace
        if until is not None and (self._first is None or until < self._first[1]):
            self._first = (received, until)
        left = "" if until is None else f", {max(0.0, until - now):.1f} s left"
        logger.warning("notice of preemption%s: %s%s", "" if is_new else " again", received.what, left)
        self._job.notice(received.what, until)

    def _hold(self, prepare: Prepare, now: float) -> NodeNotice:
        self._monitors.give_notice(prepare.notice)
        # No event tells when a store has become visible.
        time.sleep(VISIBLE_SECONDS)
        ranks = self._monitors.progress()
        self._job.hold(prepare.round, prepare.notice, max((each.asked for each in ranks.values()), default=-1))
        until = None if prepare.seconds is None else now + prepare.seconds
        logger.info("%s at node %s: the ranks save at the same step", prepare.what, prepare.name)
        return NodeNotice(prepare.round, prepare.notice, now, until)

    def _see_who_has_saved(
        self, current: NodeNotice, codes: Mapping[int, int | None], who: Callable[[int], str], now: float
    ) -> None:
        if current.is_saved:
            return
        ranks = self._monitors.progress()
        unsaved = current.unsaved(ranks, _well(codes))
        if ranks and not unsaved and current.step is not None:
            current.is_saved = True
            step = current.saved_at(ranks)
            if step >= 0:
                logger.info("all ranks of this node have saved at step %d", step)
            self._job.saved(current.round, current.number, step)
        elif now >= current.due():
            current.reminders += 1
            names = "; ".join(f"{who(rank)}: {late(ranks[rank], current.number)}" for rank in unsaved)
            left = "" if current.until is None else f"; {max(0.0, current.until - now):.1f} s left"
            waiting = "; waiting for other nodes to say how far they are" if current.step is None else ""
            logger.warning("not saved yet: %s%s%s", names, waiting, left)


def _well(codes: Mapping[int, int | None]) -> list[int]:
    return [local_rank for local_rank, code in codes.items() if code == 0]
