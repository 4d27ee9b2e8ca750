"""When a round forms, who may go on without whom, and what all nodes must have been told alike."""

from collections.abc import Sequence
from math import inf
from typing import get_args

from msgspec import Struct

from ft_launcher.records import Node, Reason, ReasonKind, Terms

__all__ = [
    "Gathering",
    "Settings",
    "Timing",
    "forms_at",
    "missing",
    "nodes_are",
    "quorum",
    "stronger",
    "terms_conflict",
]


class Timing(Struct, frozen=True):
    """Seconds; the names are those of --rdzv-conf."""

    last_call_timeout: float = 30.0  # torch's default: how long a first round waits for more than the fewest nodes
    join_timeout: float = 600.0  # torch's default: how long a round may take to form
    min_uptime: float = 5.0  # before a newcomer interrupts the others, so that a stream of them does not thrash
    failover_timeout: float = 60.0  # within which survivors of a lost host must have met at another
    settle: float = 0.0  # how long a lost host may go on before it has certainly stopped its workers


class Settings(Struct, frozen=True):
    """What the host was told about the job."""

    terms: Terms
    timing: Timing = Timing()
    by_infrastructure: bool = True
    upscaling: bool = True
    expected: int | None = None  # nodes that the scheduler will start, where it says so
    endpoints: int = 1  # how many places the nodes know to meet at
    endpoint: int = 0  # at which of them this host is
    suspect_after: int | None = 3  # failures in a row make a checkpoint suspect; None: never


class Gathering(Struct, frozen=True):
    """The numbers that decide whether a round forms."""

    ready: int  # nodes without workers that wait for the round
    live: int  # nodes that are there, ready or still stopping their workers
    min_nodes: int
    max_nodes: int
    first: bool  # nobody has trained yet
    enough_since: float | None  # since when there have been min_nodes ready
    expected: int | None = None
    old: int = 0  # of the ready nodes, those that were there when the last round formed
    old_needed: int = 0  # how many of them the round must have


def forms_at(gathering: Gathering, last_call_timeout: float) -> float:
    """The instant at which a round forms if nothing else happens: -inf is now, inf never."""
    g = gathering
    if g.ready < g.min_nodes or g.old < g.old_needed:
        return inf
    if not g.first:
        # Who is lost is known, so nobody else need be waited for. Who still stops its workers is, and keeps its place
        # although there may be a spare for it.
        return -inf if g.ready == g.live else inf
    if g.ready >= g.max_nodes:
        return -inf
    if g.expected is not None and g.ready >= g.expected:
        return -inf
    return inf if g.enough_since is None else g.enough_since + last_call_timeout


def quorum(voters: int, *, rebuilt: bool, endpoints: int) -> int:
    """How many of the nodes that were there in the last round a next one needs, so that two halves never both go on.

    Those that were cut off from the host need more than half to go on at another endpoint, those with it at least half.
    """
    if endpoints == 1:
        return 0  # nobody can go on without this host
    return voters // 2 + 1 if rebuilt else (voters + 1) // 2


def missing(gathering: Gathering, names: Sequence[str], stopping: Sequence[str]) -> str:
    """Say who is there and why that makes no round. `names`: of all nodes, `stopping`: of those that are not ready."""
    g = gathering
    needed = f"--nnodes asks for {g.min_nodes} at least"
    if g.ready >= g.min_nodes and g.old < g.old_needed:
        what = f"{g.old_needed} are needed to begin"
        if not g.first:
            what = f"of those of the last round {g.old}, of which {g.old_needed} are needed"
        needed = f"{what}, so that no other half goes on as well"
    elif g.ready >= g.min_nodes:
        needed = f"{', '.join(stopping)} did not stop its workers"
    return f"{nodes_are(g.live)} there ({', '.join(names[:20]) or 'nobody'}), and {needed}"


def nodes_are(count: int) -> str:
    """Begin a sentence on so many nodes."""
    return "1 node is" if count == 1 else f"{count} nodes are"


def terms_conflict(host: Node, joiner: Node) -> str | None:
    """One sentence on what the two were told differently; None if nothing."""
    ours, theirs = host.terms, joiner.terms

    def differ(what: str, here: object, there: object, advice: str) -> str:
        return f"node {joiner.title} has {what} {there}, node {host.title} has {here}; {advice}"

    if ours.protocol != theirs.protocol:
        return differ("ft_launcher protocol", ours.protocol, theirs.protocol, "install the same ft_launcher on both")
    if ours.torch != theirs.torch:
        return differ("torch", ours.torch, theirs.torch, "install the same torch on both")
    same = "give both the same"
    if (ours.min_nodes, ours.max_nodes) != (theirs.min_nodes, theirs.max_nodes):
        return differ("--nnodes", f"{ours.min_nodes}:{ours.max_nodes}", f"{theirs.min_nodes}:{theirs.max_nodes}", same)
    if ours.restart_policy != theirs.restart_policy:
        return differ("--ft-restart-policy", ours.restart_policy, theirs.restart_policy, same)
    if ours.max_restarts != theirs.max_restarts:
        return differ("--max-restarts", ours.max_restarts, theirs.max_restarts, same)
    return None


_STRENGTH = get_args(ReasonKind)


def stronger(one: Reason, other: Reason) -> Reason:
    """The one that more likely is the cause of the other: a lost node makes the ranks of others fail."""
    return other if _STRENGTH.index(other.kind) > _STRENGTH.index(one.kind) else one
