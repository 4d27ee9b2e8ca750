"""Why a round ends: of all that went wrong in it, what is told as the reason, and does it count as a restart."""

from ft_launcher.causes import Cause, Hung, NodeLost, sentence
from ft_launcher.formation import stronger
from ft_launcher.records import Reason, ReasonKind

__all__ = ["Incident"]


class Incident:
    """What has happened since a round began. One restart answers all of it."""

    def __init__(self, reason: Reason | None = None, *, is_owed: bool = False) -> None:
        self.reason = reason or Reason("")
        self.culprit: tuple[Cause, str] | None = (
            None  # with where it came from; what ends the job if no restart is left
        )
        self.is_charged = False  # it has been counted
        self.is_owed = is_owed  # it will be, when the next round forms
        self._failures: set[str] = set()  # ids of the nodes that failed or were lost

    @property
    def is_failure(self) -> bool:
        """Something failed or was lost: this is no mere change of membership."""
        return bool(self._failures)

    def note(self, reason: Reason) -> None:
        """Take note of something that need not be counted."""
        self.reason = stronger(self.reason, reason)

    def fail(self, node_id: str, name: str, cause: Cause, rank: int | None = None) -> None:
        """Take note of a node whose global rank `rank` has failed, or all of whose workers are gone."""
        origin = f"rank {rank} (node {name})" if rank is not None else ""
        kind: ReasonKind = (
            "node_lost" if isinstance(cause, NodeLost) else "rank_hung" if isinstance(cause, Hung) else "rank_failed"
        )
        reason = Reason(kind, f"{origin}{origin and ': '}{sentence(cause)}")
        self._blame(cause, origin, reason)
        self._failures.add(node_id)

    def _blame(self, cause: Cause, origin: str, reason: Reason) -> None:
        if self.culprit is None or stronger(self.reason, reason) is reason:
            self.culprit = (cause, origin)
        self.note(reason)

    def lose(self, node_id: str, cause: Cause, reason: Reason) -> None:
        """Take note of a node that was lost while it had a part in the round."""
        self._blame(cause, "", reason)
        self._failures.add(node_id)

    def lose_between_rounds(self, node_id: str, reason: Reason) -> None:
        """The same after the round has ended: it counts, if what ended the round did not."""
        self.note(reason)
        self._failures.add(node_id)
        self.is_owed |= not self.is_charged

    def excuse(self, node_id: str) -> bool:
        """Forget the failure of a node that is excluded for it. Say whether a counted restart is to be given back."""
        if node_id not in self._failures:
            return False
        self._failures.discard(node_id)
        if self._failures:
            return False
        self.reason, self.culprit = Reason(""), None
        was_charged, self.is_charged = self.is_charged, False
        return was_charged
