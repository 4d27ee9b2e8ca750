"""What the states of a round's nodes mean for the round: go on, restart, or end with success."""

from collections import Counter
from collections.abc import Iterable
from enum import Enum

__all__ = ["NodeState", "Verdict", "any_failed", "min_healthy"]


class NodeState(Enum):
    """What became of a node of the round, so far."""

    HEALTHY = "healthy"  # its workers run
    SUCCEEDED = "succeeded"  # its workers ended with success; it stays so whatever becomes of the node
    FAILED = "failed"  # a rank failed or hung, and its workers were stopped
    GONE = "gone"  # the node left or was lost before its workers had ended
    PREEMPTED = "preempted"  # its workers ended, and said that it was for a notice; it stays so like SUCCEEDED


class Verdict(Enum):
    """What follows from the states of all nodes of a round."""

    CONTINUE = "continue"
    RESTART = "restart"
    SUCCEED = "succeed"
    PREEMPT = "preempt"  # nobody failed, and nobody runs: the work goes on later, or on other nodes


# No nodes at all is RESTART under both policies: nobody runs whom one could wait for, and SUCCEED, the one verdict
# that cannot be taken back, needs a node that succeeded. ("All of none succeeded" would end a job that never ran.)


def any_failed(states: Iterable[NodeState]) -> Verdict:
    """Restart at the first node that failed or is gone; else, when none runs, end as they did. No nodes: restart."""
    count = Counter(states)
    if not count or count[NodeState.FAILED] or count[NodeState.GONE]:
        return Verdict.RESTART
    return _unless_done(count)


def min_healthy(states: Iterable[NodeState], min_nodes: int) -> Verdict:
    """Go on while at least `min_nodes` run or have ended well; else, when none runs, end as they did. None: restart."""
    count = Counter(states)
    if count[NodeState.HEALTHY] + count[NodeState.SUCCEEDED] + count[NodeState.PREEMPTED] < max(min_nodes, 1):
        return Verdict.RESTART
    return _unless_done(count)


def _unless_done(count: Counter[NodeState]) -> Verdict:
    if count[NodeState.HEALTHY]:
        return Verdict.CONTINUE
    return Verdict.PREEMPT if count[NodeState.PREEMPTED] else Verdict.SUCCEED
