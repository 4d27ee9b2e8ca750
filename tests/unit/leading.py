"""A leader's job with its clock and its mail, for tests."""

from collections import defaultdict

from ft_launcher.causes import Cause, Excluded, Exited
from ft_launcher.formation import Settings, Timing
from ft_launcher.policy import NodeState
from ft_launcher.records import (
    Assigned,
    End,
    Event,
    Joined,
    Leave,
    Memory,
    Message,
    Node,
    Ready,
    Reported,
    Requested,
    Terms,
)
from ft_launcher.rounds import Job

HEALTHY, SUCCEEDED, FAILED, GONE, PREEMPTED = NodeState
CRASH = Exited(7)
DIED = "its launcher died"
TIMING = Timing(last_call_timeout=30.0, join_timeout=600.0, min_uptime=5.0, failover_timeout=60.0, settle=2.0)


class World:
    """A job, the time, and all that the leader has said to each node."""

    def __init__(
        self,
        min_nodes: int,
        max_nodes: int,
        *,
        policy: str = "any-failed",
        max_restarts: int = 3,
        endpoints: int = 1,
        endpoint: int = 0,
        memory: Memory | None = None,
        by_infrastructure: bool = False,
        upscaling: bool = True,
        expected: int | None = None,
        suspect_after: int | None = 3,
    ) -> None:
        self.terms = Terms(min_nodes, max_nodes, policy, max_restarts)
        self.settings = Settings(
            terms=self.terms,
            timing=TIMING,
            by_infrastructure=by_infrastructure,
            upscaling=upscaling,
            expected=expected,
            endpoints=endpoints,
            endpoint=endpoint,
            suspect_after=suspect_after,
        )
        self.now = 1000.0
        self.job = Job(self.settings, self.node("n0"), self.now, memory)
        self.mail: dict[str, list[Message]] = defaultdict(list)
        self.last: list[tuple[str, Message]] = []

    def node(self, name: str, id_: str = "", infra_rank: int | None = None, workers: int = 2) -> Node:
        number = int("0" + "".join(filter(str.isdigit, name)))
        return Node(
            id=id_ or name,
            name=name,
            address=f"10.0.0.{number}",
            pid=100 + number,
            local_world_size=workers,
            terms=self.terms,
            infra_rank=infra_rank,
            infra_source="" if infra_rank is None else "SLURM_PROCID",
            highest_rank=self.terms.max_nodes - 1,
        )

    def apply(self, *events: Event) -> None:
        for event in events:
            self.job.apply(event, self.now)

    def decide(self) -> list[tuple[str, Message]]:
        """Let the leader speak; give what it said."""
        self.last = self.job.decide(self.now)
        for node_id, message in self.last:
            self.mail[node_id].append(message)
        assert self.job.due() > self.now, "what is due was not done"
        return self.last

    def tell(self, *events: Event) -> list[tuple[str, Message]]:
        """Let the leader hear of all the events at once."""
        self.apply(*events)
        return self.decide()

    def wait(self, seconds: float) -> None:
        """Let time pass, as the leader does: it wakes when something is due."""
        until = self.now + seconds
        while self.job.due() <= until:
            self.now = self.job.due()
            self.decide()
        self.now = until

    # -- for the known cases --------------------------------------------------------------------------------------

    def come(self, *names: str) -> None:
        """Let nodes join, and be ready."""
        for name in names:
            self.tell(Joined(self.node(name)))
            self.tell(Ready(name, 40000))

    def ready(self, *names: str) -> None:
        for name in names:
            self.tell(Ready(name, 40000))

    def report(self, name: str, state: NodeState, cause: Cause | None = None) -> list[tuple[str, Message]]:
        failed = state is FAILED
        return self.tell(self.reported(name, state, cause or (CRASH if failed else None)))

    def reported(self, name: str, state: NodeState = FAILED, cause: Cause | None = CRASH) -> Reported:
        return Reported(name, self.job.memory.round, state, cause, 0 if state is FAILED else None)

    def requested(self, name: str, cause: Cause) -> Requested:
        return Requested(name, self.job.memory.round, cause)

    def excluded(self, name: str) -> Requested:
        return self.requested(name, Excluded("ECC errors"))

    def assigned(self, name: str) -> Assigned:
        """Give the node's last place."""
        return [each for each in self.mail[name] if isinstance(each, Assigned)][-1]

    @property
    def ranks(self) -> dict[str, int]:
        """Give the group ranks by name, if a round was formed just now."""
        return {node_id: each.group_rank for node_id, each in self.last if isinstance(each, Assigned)}

    @property
    def restarts(self) -> int:
        return self.job.memory.restarts

    def outcome_of(self, name: str) -> Cause | None:
        """Give the cause with which the node was told to end or to leave, which must be the last that it was told."""
        last = self.mail[name][-1]
        assert isinstance(last, End | Leave), self.mail[name]
        return last.cause
