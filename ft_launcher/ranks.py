"""Which nodes take part in a round and which group rank each of them gets, the same from whatever order of input."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from itertools import count

from msgspec import Struct

from ft_launcher.errors import UsageError

__all__ = ["Candidate", "assign", "choose", "conflict", "highest_rank", "infra_rank", "natural_key"]


class Candidate(Struct, frozen=True):
    """A live node that could take part in the next round."""

    id: str
    name: str  # the node's descriptor, usually its host name; several launchers on one host share it
    pid: int  # of the launcher
    infra_rank: int | None  # the number that the infrastructure gave it
    previous_rank: int | None  # its group rank in the last round; None: it had no place there
    arrival: int  # the how-manieth to join


def choose(candidates: Iterable[Candidate], max_nodes: int, *, by_infrastructure: bool) -> tuple[list[str], list[str]]:
    """Give the ids of the nodes that take part, `max_nodes` at most, and of the spares; both in order of precedence.

    Who had a place in the last round keeps it: a restart brings the checkpoints, caches and warm GPUs of the same
    machines together again. Then come, by infrastructure, the nodes that it meant to take part (those numbered below
    `max_nodes`), in its order; then the others in order of arrival. The first spare is the first to replace a node.
    """

    def precedence(node: Candidate) -> tuple[int, int, int]:
        if node.previous_rank is not None:
            return 0, node.previous_rank, node.arrival
        if by_infrastructure and _is_below(node.infra_rank, max_nodes):
            return 1, node.infra_rank or 0, node.arrival
        return 2, node.arrival, 0

    # The names decide ties only, and are costly at 10,000 nodes: the sort is stable, so they come first.
    ordered = [node.id for node in sorted(sorted(candidates, key=_by_name), key=precedence)]
    return ordered[:max_nodes], ordered[max_nodes:]


def assign(chosen: Collection[Candidate], max_nodes: int, *, by_infrastructure: bool) -> dict[str, int]:
    """Give each node's group rank by its id: 0 to k - 1 for k nodes, each once.

    By infrastructure, the node numbered r < `max_nodes` has place r. The others (without a number, spares numbered
    beyond, or one whose place is taken) keep the place of their last rank if it is free, else fill the free places
    in order of their numbers and names. Then the places are closed up, so that in a full world rank and number agree.
    The nodes of the last round alone keep their ranks.

    Else a node keeps its last rank if there are still so many. The gaps are filled by the nodes whose last rank is
    too high now, then by newcomers in natural order of their names; so a first round is in the order of names, and
    a replacement gets the rank of the node that it replaces while nobody else moves.
    """
    last = {node.previous_rank: node.id for node in chosen}
    if len(chosen) < max_nodes and last.keys() == set(range(len(chosen))):
        # Where places were closed up, ranks are no places, and a spare's last rank may be the place of a number: the
        # restart after a mere crash would move it.
        return {last[rank]: rank for rank in range(len(chosen))}
    places: dict[int, Candidate] = {}
    if by_infrastructure:
        rest = _claim(places, chosen, lambda node: node.infra_rank, max_nodes)
        rest = _claim(places, rest, lambda node: node.previous_rank, max_nodes)
        rest.sort(key=lambda node: (_none_last(node.infra_rank), _by_name(node)))
    else:
        rest = _claim(places, chosen, lambda node: node.previous_rank, len(chosen))
        rest.sort(key=lambda node: (_none_last(node.previous_rank), _by_name(node)))
    free = (place for place in count() if place not in places)
    places |= dict(zip(free, rest))  # noqa: B905 (`free` has no end)
    return {places[place].id: rank for rank, place in enumerate(sorted(places))}


def _claim(
    places: dict[int, Candidate], nodes: Iterable[Candidate], wanted: Callable[[Candidate], int | None], below: int
) -> list[Candidate]:
    """Put each node at the place that it wants, if that is free and less than `below`; give those that got none.

    No two should want the same place; should they, the one that had a rank in the last round is first, then the one
    that arrived first.
    """
    rest = []
    for node in sorted(nodes, key=lambda node: (_none_last(node.previous_rank), node.arrival, node.id)):
        place = wanted(node)
        if place is None or not _is_below(place, below) or place in places:
            rest.append(node)
        else:
            places[place] = node
    return rest


def _is_below(rank: int | None, limit: int) -> bool:
    return rank is not None and 0 <= rank < limit


def _none_last(rank: int | None) -> tuple[bool, int]:
    return rank is None, rank or 0


def _by_name(node: Candidate) -> tuple["_NaturalKey", int, str]:
    return natural_key(node.name), node.pid, node.id


_NaturalKey = tuple[tuple[tuple[str, int, str], ...], str]
_TEXT_AND_DIGITS = re.compile(r"([^0-9]*)([0-9]*)")


@lru_cache(maxsize=1 << 16)  # the same names in each round; without it, half of a leader's work on forming one
def natural_key(name: str) -> _NaturalKey:
    """Give a key that sorts numbers in names as numbers: node2 before node10. Equal for equal names only."""
    parts = []
    for text, digits in _TEXT_AND_DIGITS.findall(name):
        # By length and digits, not as an int: Python refuses to read numbers of more than 4,300 digits.
        number = digits.lstrip("0")
        parts.append((text, len(number), number))
    return tuple(parts), name  # the name itself tells node2 from node02


def infra_rank(environ: Mapping[str, str]) -> tuple[int, str] | None:
    """Give the number that the infrastructure gave this node, and the variable that says so; None without one.

    UsageError if it is no whole number.
    """
    for source in ("SLURM_PROCID", "GROUP_RANK"):
        if source in environ:
            return _whole_number(environ, source), source
    return None


def highest_rank(environ: Mapping[str, str], source: str, max_nodes: int) -> int:
    """Give the highest number that `source`, the variable that `infra_rank` named, can mean.

    Slurm may start more tasks than the job has places: those beyond are spares. UsageError as in `infra_rank`.
    """
    if source == "SLURM_PROCID":
        # SLURM_NPROCS is the older name of the same.
        for tasks in ("SLURM_NTASKS", "SLURM_NPROCS"):
            if tasks in environ:
                return max(_whole_number(environ, tasks), max_nodes) - 1
    return max_nodes - 1


def _whole_number(environ: Mapping[str, str], variable: str) -> int:
    value = environ[variable]
    if not re.fullmatch("[0-9]{1,9}", value):
        raise UsageError(f"{variable}={value!r} in the environment must be a whole number, 0 or more; or unset it")
    return int(value)


def conflict(newcomer: Candidate, others: Iterable[Candidate], source: str, highest: int) -> str | None:
    """Say in one sentence why the newcomer's number cannot be, or None: it is beyond `highest`, or a live node has it.

    `others` are the live candidates (the newcomer among them does no harm), `source` the variable it came from.
    """
    rank = newcomer.infra_rank
    if rank is None:
        return None
    if not 0 <= rank <= highest:
        return (
            f"{source}={rank} of {_node(newcomer)} is outside 0..{highest}; "
            "number the nodes from 0, or raise the maximum of --nnodes"
        )
    holders = [other for other in others if other.infra_rank == rank and other.id != newcomer.id]
    if not holders:
        return None
    holder = min(holders, key=lambda other: (other.arrival, other.id))
    return (
        f"{source}={rank} is claimed by {_node(holder)} and by {_node(newcomer)}; every node needs a number of its own"
    )


def _node(candidate: Candidate) -> str:
    return f"node {candidate.name} (pid {candidate.pid})"
