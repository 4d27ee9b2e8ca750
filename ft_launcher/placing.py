"""Which nodes have which ranks in a round, and on what that goes."""

from collections import Counter
from collections.abc import Collection, Mapping

from msgspec import Struct

from ft_launcher import ranks
from ft_launcher.ranks import Candidate
from ft_launcher.records import Node

__all__ = ["Placed", "Placement", "numbered_by", "place"]


class Placed(Struct, frozen=True):
    """A node's place."""

    group_rank: int
    node: Node
    rank: int  # of its first worker
    role_rank: int


class Placement(Struct, frozen=True):
    """All places of a round, in the order of their group ranks."""

    places: tuple[Placed, ...] = ()
    spares: tuple[str, ...] = ()  # ids, the first to replace a node first
    world_size: int = 0
    role_world_sizes: Mapping[str, int] = {}


def place(
    nodes: Mapping[str, Node], candidates: Collection[Candidate], max_nodes: int, *, by_infrastructure: bool
) -> Placement:
    """Choose among `candidates`, and give each of the chosen its group rank and the ranks of its workers.

    Ranks of a node are consecutive, in the order of the group ranks, as torch numbers them; so are those of a role.
    """
    chosen, spares = ranks.choose(candidates, max_nodes, by_infrastructure=by_infrastructure)
    by_id = {each.id: each for each in candidates}
    group_ranks = ranks.assign([by_id[key] for key in chosen], max_nodes, by_infrastructure=by_infrastructure)
    places, roles, world_size = [], Counter[str](), 0
    for key in sorted(group_ranks, key=group_ranks.__getitem__):
        node = nodes[key]
        places.append(Placed(group_ranks[key], node, world_size, roles[node.role]))
        world_size += node.local_world_size
        roles[node.role] += node.local_world_size
    return Placement(tuple(places), tuple(spares), world_size, roles)


def numbered_by(placement: Placement, *, by_infrastructure: bool) -> str:
    """Say what the group ranks follow."""
    sources = sorted({each.node.infra_source for each in placement.places} - {""})
    if by_infrastructure and sources:
        return f"numbered by {' and '.join(sources)}"
    return "numbered by names" + (" (no SLURM_PROCID or GROUP_RANK)" if by_infrastructure else "")
