"""What the leader of a job knows and says: `Job` is told what happened and when, and gives the messages that follow.

No clock, store or socket is here. The decisions themselves are small functions of formation.py, policy.py and ranks.py.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from math import inf

from msgspec import Struct, structs

from ft_launcher import ranks
from ft_launcher.causes import (
    Cause,
    Excluded,
    Exhausted,
    HostLost,
    NodeLost,
    Refused,
    ShutDown,
    TooFewNodes,
    sentence,
)
from ft_launcher.formation import (
    Gathering,
    Settings,
    forms_at,
    missing,
    nodes_are,
    quorum,
    terms_conflict,
)
from ft_launcher.incident import Incident
from ft_launcher.ladder import Attempt, advance
from ft_launcher.placing import Placement, place
from ft_launcher.policy import NodeState, Verdict, any_failed, min_healthy
from ft_launcher.preempting import Preemption
from ft_launcher.ranks import Candidate
from ft_launcher.records import (
    Assigned,
    End,
    Event,
    Held,
    Joined,
    Leave,
    Left,
    Lost,
    Memory,
    Message,
    Node,
    Noticed,
    Ready,
    Reason,
    Reported,
    Requested,
    Saved,
    Stop,
    Waiting,
)

__all__ = ["Job"]

STRAGGLERS = 3.0
"""Seconds for which a job that lost its host waits for more nodes of the last round when there are enough."""


class _Member(Struct):
    node: Node
    arrival: int
    last_round: tuple[int, int] | None = None  # that formed while it was there, with its epoch
    last_rank: int | None = None  # its group rank there; None: it was a spare
    store_port: int | None = None  # ready, if not None


class Job:
    """The whole job as its leader sees it."""

    def __init__(self, settings: Settings, host: Node, now: float, memory: Memory | None = None) -> None:
        """`memory`: what this host remembers of a job whose former host was lost."""
        self.settings = settings
        self.host = host
        self.memory = Memory()
        self.rebuilt = False
        self.placement = Placement()
        self.address_of: Callable[[Node], str] = lambda node: node.address
        self.outcome: End | None = None
        self.warnings: list[str] = []
        self._incident = Incident()
        self._preemption = Preemption()
        self._attempts: dict[str, Attempt] = {}  # at the last round, as its nodes have told of it
        self._members: dict[str, _Member] = {}
        self._by_rank: dict[int, str] = {}  # ids of live nodes by the rank that the infrastructure gave them
        self._by_place: dict[tuple[tuple[int, int], int], str] = {}  # ids by last round and group rank there
        self._gone: set[str] = set()
        self._departed = 0  # nodes of the last round that have left for good, and so will not meet elsewhere
        self._arrivals = 0
        self._ready = 0
        self._running = False
        self._states: dict[str, NodeState] = {}  # of the nodes of the running round, lost ones too
        self._gathering_since = now
        self._enough_since: float | None = None
        self._round_since = now
        self._untold: list[str] = []  # newcomers for whom there is perhaps no place now
        self._mail: list[tuple[str, Message]] = []
        if memory is not None:
            self._rebuild(memory, now)

    # -- what happened --------------------------------------------------------------------------------------------

    def apply(self, event: Event, now: float) -> None:
        """Take note of `event`. What to do about it, `decide` says."""
        match event:
            case Joined(node, memory, group_rank):
                self._join(node, now, memory, group_rank)
            case Ready():
                self._become_ready(event, now)
            case Reported():
                self._report(event)
            case Requested(node, round_, cause):
                self._request(node, round_, cause)
            case Noticed(node):
                if node in self._members:
                    self._preemption.take(event, self._name(node), now)
            case Held(round=round_) | Saved(round=round_):
                if self._running and round_ == self.memory.round:
                    self._preemption.heed(event)
            case Left(node, reason):
                self._remove(node, Reason("node_left", f"node {self._name(node)} left" + (reason and f": {reason}")))
            case Lost(node, how):
                self._lose(node, how)

    @property
    def reason(self) -> Reason:
        """Why the last round ended, or the next one will."""
        return self._incident.reason

    def _name(self, node_id: str) -> str:
        member = self._members.get(node_id)
        return member.node.name if member else node_id

    def _join(self, node: Node, now: float, memory: Memory | None, group_rank: int | None) -> None:
        if node.id in self._gone or node.id in self._members:
            return
        former = None
        if memory is not None and group_rank is not None:
            former = self._by_place.get(((memory.epoch, memory.round), group_rank))
        if former is not None and former in self._members:
            # It is the same launcher, under a new id, and was faster than the news of its loss.
            self._lose(former, "it lost contact")
        if self.outcome is not None:
            self._mail.append((node.id, self.outcome))
            self._add(node)
            return
        excluded = self.memory.excluded
        if any(each in (node.id, former) or (memory is None and node.name == name) for each, name in excluded):
            self._refuse(node, Excluded(f"node {node.name} was excluded from this job before"))
            return
        holder = self._members.get(self._by_rank.get(node.infra_rank, "")) if node.infra_rank is not None else None
        complaint = terms_conflict(self.host, node)
        if complaint is None and self.settings.by_infrastructure and node.infra_rank is not None:
            others = [self._candidate(holder)] if holder else []
            newcomer = self._candidate(_Member(node, self._arrivals))
            complaint = ranks.conflict(newcomer, others, node.infra_source, node.highest_rank)
        if complaint is not None:
            self.warnings.append(complaint)
            if self.memory.round < 0:
                self._add(node)
                self._end(Refused(f"{complaint} (nothing was started)"), "")
            else:
                self._refuse(node, Refused(complaint))
            return
        self._add(node)
        if memory is not None:
            self._recall(node.id, memory, group_rank, now)

    def _recall(self, node_id: str, memory: Memory, group_rank: int | None, now: float) -> None:
        if self.rebuilt:
            if (memory.epoch, memory.round) > (self.memory.epoch, self.memory.round):
                excluded = dict.fromkeys((*memory.excluded, *self.memory.excluded))
                self.memory = structs.replace(memory, excluded=tuple(excluded))
                self._departed = 0
        elif self.memory.round < 0:
            self._rebuild(memory, now)  # this host itself has never taken part
        self._place(self._members[node_id], (memory.epoch, memory.round), group_rank)

    def _rebuild(self, memory: Memory, now: float) -> None:
        """Go on with a job whose former host was lost."""
        self.memory, self.rebuilt, self._gathering_since = memory, True, now
        self._incident = Incident(Reason("host_lost", "the rendezvous host was lost"), is_owed=True)

    def _place(self, member: _Member, last_round: tuple[int, int], group_rank: int | None) -> None:
        member.last_round, member.last_rank = last_round, group_rank
        if group_rank is not None:
            self._by_place[last_round, group_rank] = member.node.id

    def _add(self, node: Node) -> None:
        self._members[node.id] = _Member(node, self._arrivals)
        self._arrivals += 1
        if node.infra_rank is not None:
            self._by_rank.setdefault(node.infra_rank, node.id)

    def _was_there(self, member: _Member) -> bool:
        return member.last_round == (self.memory.epoch, self.memory.round)

    def _had_place(self, member: _Member) -> bool:
        return self._was_there(member) and member.last_rank is not None

    def _refuse(self, node: Node, cause: Cause) -> None:
        self._gone.add(node.id)
        self._mail.append((node.id, Leave(cause)))

    def _become_ready(self, event: Ready, now: float) -> None:
        node_id, member = event.node, self._members.get(event.node)
        if member is None or member.store_port is not None:
            return
        if self._running and self._states.get(node_id) is NodeState.HEALTHY:
            # It stopped its workers for a reason of its own: it was cut off, or frozen, for a while.
            self._fail(node_id, NodeState.GONE, NodeLost(member.node.name, "it lost contact and stopped its workers"))
        member.store_port = event.store_port
        self._ready += 1
        if event.attempt is not None and event.attempt.round == self.memory.round:
            self._attempts[node_id] = event.attempt
        self._untold.append(node_id)
        if self._enough_since is None and self._ready >= self.settings.terms.min_nodes:
            self._enough_since = now

    def _report(self, event: Reported) -> None:
        if not self._running or event.round != self.memory.round or event.node not in self._states:
            return
        if event.node not in self._members:
            return  # an excluded node's ranks fail of what it was excluded for
        if event.state is NodeState.FAILED and event.cause is not None:
            self._fail(event.node, NodeState.FAILED, event.cause, event.rank)
        elif self._states[event.node] is NodeState.HEALTHY:
            self._states[event.node] = event.state

    def _fail(self, node_id: str, state: NodeState, cause: Cause, rank: int | None = None) -> None:
        self._states[node_id] = state
        self._incident.fail(node_id, self._name(node_id), cause, rank)

    def _request(self, node_id: str, round_: int, cause: Cause) -> None:
        member = self._members.get(node_id)
        if member is None or self.outcome is not None:
            return
        if isinstance(cause, HostLost):
            self._end(cause, "")
            return
        if isinstance(cause, ShutDown):
            if round_ == self.memory.round:
                self._end(cause, f"node {member.node.name}")
            return
        # The node is not fit to go on: a rank said so, its monitors fail, or a process there cannot be killed.
        name = member.node.name
        excluded = (*self.memory.excluded, (node_id, name))
        self.memory = structs.replace(self.memory, excluded=excluded)
        self._mail.append((node_id, Leave(cause)))
        if self._incident.excuse(node_id):
            self.memory = structs.replace(self.memory, restarts=self.memory.restarts - 1)
        self._remove(node_id, Reason("node_excluded", f"node {name}: {sentence(cause)}"))
        left, needed = len(self._members), self.settings.terms.min_nodes
        if not left:
            self._end(cause, f"node {name}")
        elif left < needed:
            why = f"node {name} was excluded ({sentence(cause)})"
            self._end(TooFewNodes(f"{why}; {nodes_are(left)} left, and --nnodes asks for {needed} at least"), "")

    def _lose(self, node_id: str, how: str) -> None:
        member = self._members.get(node_id)
        if member is None:
            self._gone.add(node_id)
            return
        self._remove(node_id, Reason("node_lost", sentence(NodeLost(member.node.name, how))), how)

    def _remove(self, node_id: str, reason: Reason, how: str = "") -> None:
        member = self._members.pop(node_id, None)
        self._gone.add(node_id)
        if member is None:
            return
        if member.store_port is not None:
            self._ready -= 1
            if self._ready < self.settings.terms.min_nodes:
                self._enough_since = None
        if self._by_rank.get(member.node.infra_rank or 0) == node_id:
            del self._by_rank[member.node.infra_rank or 0]
        self._preemption.forget(node_id)
        self._departed += self._was_there(member) and not how
        if self._running and self._states.get(node_id) in (NodeState.HEALTHY, NodeState.FAILED):
            self._states[node_id] = NodeState.GONE
            if how:
                self._incident.lose(node_id, NodeLost(member.node.name, how), reason)
            else:
                self._incident.note(reason)
        elif not self._running and self._had_place(member) and self.outcome is None:
            if how:
                self._incident.lose_between_rounds(node_id, reason)
            else:
                self._incident.note(reason)

    def ask_again(self, node_id: str) -> None:
        """What this node said about being ready could not be read."""
        if self.is_stopping(node_id):
            self._mail.append((node_id, Stop(self.memory.round, self.reason)))

    # -- what to do about it --------------------------------------------------------------------------------------

    def decide(self, now: float) -> list[tuple[str, Message]]:
        """Give the messages that are due, each with the id of its node."""
        if self.outcome is None:
            if self._running:
                self._judge(now)
            if self._running and self.outcome is None:
                self._heed_notice(now)
            if not self._running and self.outcome is None:
                self._gather(now)
        mail, self._mail = self._mail, []
        return mail

    def due(self) -> float:
        """Give the instant at which `decide` may say something although nothing happened; inf: never."""
        if self.outcome is not None:
            return inf
        if self._running:
            return self._upscales_at()
        return min(self._forms_at(), self._gathering_since + self._patience)

    @property
    def _patience(self) -> float:
        timing = self.settings.timing
        return timing.failover_timeout if self.rebuilt else timing.join_timeout

    @property
    def is_empty(self) -> bool:
        """Nobody is there any more."""
        return not self._members

    @property
    def nodes(self) -> Iterator[Node]:
        """All nodes that are there."""
        return (member.node for member in self._members.values())

    def is_stopping(self, node_id: str) -> bool:
        """This node is there, and has not said yet that it is ready."""
        member = self._members.get(node_id)
        return member is not None and member.store_port is None

    @property
    def is_lost(self) -> bool:
        """Too many nodes of the last round are out of reach: they may go on elsewhere, so nobody goes on here."""
        if self._running or self.outcome is not None or self.memory.round < 0 or self.rebuilt:
            return False
        if self.settings.endpoints == 1:
            return False  # there is no elsewhere, and this is asked for often
        old = sum(map(self._was_there, self._members.values()))
        return old < quorum(self.memory.voters, rebuilt=False, endpoints=self.settings.endpoints) - self._departed

    def _judge(self, now: float) -> None:
        terms = self.settings.terms
        counts = Counter(self._states.values())
        if counts[NodeState.FAILED] + counts[NodeState.GONE] or not counts[NodeState.HEALTHY]:
            if terms.restart_policy == "min-healthy":
                verdict = min_healthy(self._states.values(), terms.min_nodes)
            else:
                verdict = any_failed(self._states.values())
            if verdict is Verdict.SUCCEED:
                self._end(None, "")
                return
            if verdict is Verdict.RESTART:
                self._restart(now, counted=self._incident.is_failure)
                return
            if verdict is Verdict.PREEMPT:
                self._preempt(now)
                return
        if self._upscales_at() <= now:
            names = ", ".join(each.node.name for each in self._members.values() if each.node.id not in self._states)
            self._incident.note(Reason("node_joined", f"node {names} joined"))
            self._restart(now, counted=False)
            return
        self._tell_waiting()

    def _heed_notice(self, now: float) -> None:
        if not self._preemption.is_open:
            return
        bad = (NodeState.FAILED, NodeState.GONE)
        well = [key for key, state in self._states.items() if state not in bad and key in self._members]
        self._mail += self._preemption.decide(self.memory.round, well, now)
        if self._upscales_at() <= now:
            self._judge(now)  # all have saved, so newcomers need not wait any more

    def _preempt(self, now: float) -> None:
        """All ranks have ended for a notice: go on without the nodes that it came to, if there are enough others."""
        leaving = [member for key, member in self._members.items() if key in self._preemption.noticed]
        cause = self._preemption.cause()
        # The host has nobody to hand the store over to before its machine goes.
        is_host_leaving = any((each.node.name, each.node.pid) == (self.host.name, self.host.pid) for each in leaving)
        if not leaving or is_host_leaving or len(self._members) - len(leaving) < self.settings.terms.min_nodes:
            self._end(cause, "")
            return
        for member in leaving:
            self._mail.append((member.node.id, Leave(cause)))
            self._remove(member.node.id, Reason("node_left"))
        self._incident.note(Reason("node_preempted", sentence(cause)))
        self._restart(now, counted=False)

    def _tell_waiting(self) -> None:
        untold, self._untold = self._untold, []
        for node_id in untold:
            if node_id in self._members and self._members[node_id].store_port is not None:
                self._mail.append((node_id, Waiting(self.memory.round, len(self._states))))

    def _upscales_at(self) -> float:
        terms, timing = self.settings.terms, self.settings.timing
        full = len(self._states) >= terms.max_nodes
        if not self._ready or full or not self.settings.upscaling or terms.restart_policy == "min-healthy":
            return inf
        if NodeState.SUCCEEDED in self._states.values() or NodeState.PREEMPTED in self._states.values():
            return inf  # ranks that have finished would run again
        return max(self._round_since + timing.min_uptime, self._preemption.holds_until())

    def _restart(self, now: float, *, counted: bool) -> None:
        if counted:
            if self.memory.restarts >= self.settings.terms.max_restarts:
                cause, origin = self._incident.culprit or (TooFewNodes(self.reason.sentence), "")
                self._end(cause, origin)
                return
            self.memory = structs.replace(self.memory, restarts=self.memory.restarts + 1)
        self._incident.is_charged = counted
        self._running = False
        self._gathering_since = now
        self._enough_since = now if self._ready >= self.settings.terms.min_nodes else None
        for node_id, member in self._members.items():
            if member.store_port is None:
                self._mail.append((node_id, Stop(self.memory.round, self.reason)))

    def _gathering(self) -> Gathering:
        terms = self.settings.terms
        first = self.memory.round < 0
        old = needed = 0
        if self.settings.endpoints > 1:
            if first:
                # Nobody may be able to start here while others start elsewhere.
                old, needed = (
                    self._ready,
                    quorum(terms.max_nodes, rebuilt=self.settings.endpoint > 0, endpoints=self.settings.endpoints),
                )
            else:
                old = sum(self._was_there(each) for each in self._members.values() if each.store_port is not None)
                needed = quorum(self.memory.voters, rebuilt=self.rebuilt, endpoints=self.settings.endpoints)
                needed -= self._departed
        return Gathering(
            ready=self._ready,
            live=len(self._members),
            min_nodes=terms.min_nodes,
            max_nodes=terms.max_nodes,
            first=first,
            enough_since=self._enough_since,
            expected=self.settings.expected,
            old=old,
            old_needed=needed,
        )

    def _forms_at(self) -> float:
        if not self._ready:
            return inf
        at = forms_at(self._gathering(), self.settings.timing.last_call_timeout)
        if at == -inf and self.rebuilt:
            # The others of the last round are on their way here, or lost with the old host.
            all_came = self._ready >= min(self.memory.voters - 1, self.settings.terms.max_nodes)
            at = self._gathering_since + self.settings.timing.settle + (0 if all_came else STRAGGLERS)
        return at

    def _gather(self, now: float) -> None:
        if self._forms_at() <= now:
            self._form(now)
        elif now >= self._gathering_since + self._patience:
            self._end(TooFewNodes(self._who_is_missing()), "")

    def _form(self, now: float) -> None:
        terms = self.settings.terms
        self._climb()
        if self.outcome is not None:
            return
        if self._incident.is_owed:
            if self.memory.restarts >= terms.max_restarts:
                self._end(TooFewNodes(f"{self.reason.sentence}, and all restarts of --max-restarts are used"), "")
                return
            self.memory = structs.replace(self.memory, restarts=self.memory.restarts + 1)
        ready = {key: each for key, each in self._members.items() if each.store_port is not None}
        last = self.placement
        # The same nodes get the same places, and to find that out takes most of the time to form a round.
        if last.spares or len(ready) != len(last.places) or any(each.node.id not in ready for each in last.places):
            nodes = {key: each.node for key, each in ready.items()}
            candidates = [self._candidate(each) for each in ready.values()]
            by_infrastructure = self.settings.by_infrastructure
            self.placement = place(nodes, candidates, terms.max_nodes, by_infrastructure=by_infrastructure)
        prev_world_size = self.memory.world_size
        self.memory = structs.replace(
            self.memory,
            epoch=self.memory.epoch + self.rebuilt,
            round=self.memory.round + 1,
            nodes=len(self.placement.places),
            voters=len(ready),
            world_size=self.placement.world_size,
        )
        self._by_place.clear()
        self._departed = 0
        self._tell_places(ready, prev_world_size)
        self._ready = len(self.placement.spares)
        self._untold = []
        self._states = {each.node.id: NodeState.HEALTHY for each in self.placement.places}
        self._incident = Incident()
        self._preemption.begin_round()
        self.rebuilt = False
        self._running = True
        self._round_since = now
        self._heed_notice(now)

    def _climb(self) -> None:
        """Take note of how the last round fared with its checkpoint; end the job when none is left to go on from."""
        attempts, self._attempts = list(self._attempts.values()), {}
        has_failed = self.reason.kind in ("rank_failed", "rank_hung")
        suspect_after = self.settings.suspect_after
        climbed = advance(self.memory.ladder, attempts, has_failed=has_failed, suspect_after=suspect_after)
        self.memory = structs.replace(self.memory, ladder=climbed.ladder)
        if climbed.warning:
            self.warnings.append(climbed.warning)
        if climbed.exhausted:
            self._end(Exhausted(climbed.exhausted), "")

    def _tell_places(self, ready: dict[str, _Member], prev_world_size: int) -> None:
        placement, this_round = self.placement, (self.memory.epoch, self.memory.round)
        first = ready[placement.places[0].node.id]
        store_address, store_port = self.address_of(first.node), first.store_port or 0
        for each in placement.places:
            assigned = Assigned(
                group_rank=each.group_rank,
                group_world_size=len(placement.places),
                rank=each.rank,
                world_size=placement.world_size,
                role_rank=each.role_rank,
                role_world_size=placement.role_world_sizes[each.node.role],
                store_address=store_address,
                store_port=store_port,
                prev_world_size=prev_world_size,
                reason=self.reason,
                memory=self.memory,
            )
            self._mail.append((each.node.id, assigned))
            member = ready[each.node.id]
            member.store_port = None
            self._place(member, this_round, each.group_rank)
        for key in placement.spares:
            self._mail.append((key, Waiting(self.memory.round, len(placement.places), self.memory)))
            self._place(ready[key], this_round, None)

    def _end(self, cause: Cause | None, origin: str) -> None:
        if self.outcome is None:
            self.outcome = End(cause, origin)
            self._mail = [each for each in self._mail if isinstance(each[1], Leave)]
            told = {node_id for node_id, _ in self._mail}
            self._mail += [(node_id, self.outcome) for node_id in self._members if node_id not in told]

    def _who_is_missing(self) -> str:
        names = sorted((node.name for node in self.nodes), key=ranks.natural_key)
        stopping = [each.node.name for each in self._members.values() if each.store_port is None]
        return f"after {self._patience:g} s {missing(self._gathering(), names, stopping)}"

    def _candidate(self, member: _Member) -> Candidate:
        node = member.node
        return Candidate(
            id=node.id,
            name=node.name,
            pid=node.pid,
            infra_rank=node.infra_rank,
            previous_rank=member.last_rank if self._was_there(member) else None,
            arrival=member.arrival,
        )
