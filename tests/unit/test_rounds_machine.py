"""A leader against a reference of who lives and what counts, for whatever can happen to up to 6 nodes."""

from collections.abc import Sequence

from hypothesis import Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from ft_launcher.causes import Excluded, Hung, NodeLost, Preempted, ShutDown, TooFewNodes
from ft_launcher.formation import quorum
from ft_launcher.policy import NodeState, Verdict, any_failed, min_healthy
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
    Prepare,
    Ready,
    Reported,
    Requested,
    SaveAt,
    Saved,
    Stop,
    Waiting,
)
from ft_launcher.rounds import STRAGGLERS
from tests.unit.leading import CRASH, DIED, FAILED, GONE, HEALTHY, PREEMPTED, SUCCEEDED, TIMING, World

SLOTS = 6
MEMORY = Memory(epoch=2, round=7, restarts=0, nodes=3, voters=4, world_size=6)
flags = st.booleans()


class Rounds(RuleBasedStateMachine):
    """Six places for launchers, each with one at a time; and a reference of who lives and what counts.

    The names of the rules say what happens. Some leave the leader no time to speak before the next thing happens.
    """

    @initialize(
        counts=st.tuples(st.integers(1, 4), st.integers(1, 5)).map(sorted),
        policy=st.sampled_from(["any-failed", "any-failed", "min-healthy"]),
        max_restarts=st.sampled_from([0, 1, 2, 100]),
        endpoints=st.sampled_from([1, 1, 3]),
        by_infrastructure=flags,
        upscaling=flags,
        rebuilt=st.sampled_from([False, False, True]),
        started=st.sampled_from([True, True, False]),
    )
    def begin(self, counts, policy, max_restarts, endpoints, by_infrastructure, upscaling, rebuilt, started):
        nodes = min(3, counts[1])
        remembered = replace(MEMORY, nodes=nodes, voters=nodes + 1)
        self.remembered = remembered
        self.world = World(
            *counts,
            policy=policy,
            max_restarts=max_restarts,
            endpoints=endpoints,
            endpoint=int(rebuilt and endpoints > 1),
            memory=remembered if rebuilt else None,
            by_infrastructure=by_infrastructure,
            upscaling=upscaling,
        )
        self.min_nodes, self.max_nodes = counts
        self.ids: dict[int, str] = {}  # of the live launchers, by their places
        self.launched = 0
        self.excluded: set[str] = set()  # ids
        self.lost: set[str] = set()
        self.refused: set[str] = set()
        self.preempted: set[str] = set()
        self.left_for_good = 0  # of the last round
        self.ready: dict[str, int] = {}  # who waits for a round, with the port of its store
        self.states: dict[str, NodeState] | None = None  # of the running round; None: none runs
        self.last_round: dict[str, int | None] = {}  # group ranks of who was there in the last round; None: a spare
        self.incidents: set[str] = {"the host"} if rebuilt else set()  # what makes the next restart a counted one
        self.restarts = MEMORY.restarts if rebuilt else 0
        self.round = MEMORY.round if rebuilt else -1
        self.voters = remembered.voters if rebuilt else 0
        self.world_size = MEMORY.world_size if rebuilt else 0
        self.epoch = MEMORY.epoch + 1 if rebuilt else 0
        self.rebuilt = rebuilt
        self.round_since = self.world.now
        self.may_end: list[type] = []
        self.ended = False
        self.settled = True
        self.has_failed = False
        if started:
            self.a_round_forms_if_it_can(come=True)

    # -- what can happen ------------------------------------------------------------------------------------------

    def happen(self, event: Event, *, at_once: bool = True) -> None:
        self.world.apply(event)
        if at_once:
            self.settle()
        else:
            self.settled = False

    @property
    def is_over(self) -> bool:
        return self.world.job.outcome is not None

    def live(self) -> set[str]:
        return set(self.ids.values())

    def node(self, place: int, id_: str) -> Node:
        infra_rank = place if self.world.settings.by_infrastructure and place < self.max_nodes else None
        return self.world.node(f"n{place}", id_, infra_rank, workers=place % 2 + 1)

    def launch(self, place: int) -> str:
        self.launched += 1
        self.ids[place] = f"n{place}.{self.launched}"
        return self.ids[place]

    @rule(place=st.integers(0, SLOTS - 1), at_once=flags)
    def a_launcher_comes(self, place, at_once):
        if place in self.ids:
            return
        id_ = self.launch(place)
        rank = place if place < self.remembered.nodes else None
        is_known = place < self.remembered.voters and rank not in self.last_round.values()
        if self.rebuilt and is_known:
            self.last_round[id_] = rank
            self.happen(Joined(self.node(place, id_), self.remembered, rank), at_once=at_once)
            return
        if any(each.startswith(f"n{place}.") for each in self.excluded) and not self.is_over:
            del self.ids[place]
            self.refused.add(id_)
        self.happen(Joined(self.node(place, id_)), at_once=at_once)

    @rule()
    def all_places_are_filled(self):
        for place in range(SLOTS):
            self.a_launcher_comes(place=place, at_once=True)

    @rule(place=st.integers(0, SLOTS - 1), port=st.integers(1024, 65535), at_once=flags)
    def a_node_becomes_ready(self, place, port, at_once):
        """Also one whose workers run: it was cut off, or frozen."""
        id_ = self.ids.get(place)
        if id_ is None:
            return
        if id_ not in self.ready:
            self.ready[id_] = port
            if self.states is not None and self.states.get(id_) is HEALTHY:
                self.states[id_] = GONE
                self.incidents.add(id_)
        self.happen(Ready(id_, port), at_once=at_once)

    @rule()
    def all_that_must_stop_have_stopped(self):
        for id_ in list(self.ids.values()):
            if id_ not in self.ready and (self.states is None or id_ not in self.states):
                self.ready[id_] = 1024
                self.happen(Ready(id_, 1024))

    @rule(come=flags)
    def a_round_forms_if_it_can(self, come):
        if come:
            self.all_places_are_filled()
        self.all_that_must_stop_have_stopped()
        self.time_passes(seconds=33.0)

    @rule(
        place=st.integers(0, SLOTS - 1),
        state=st.sampled_from([FAILED, SUCCEEDED, PREEMPTED]),
        stale=flags,
        at_once=flags,
    )
    def a_node_reports(self, place, state, stale, at_once):
        id_ = self.ids.get(place)
        over = (SUCCEEDED, FAILED, PREEMPTED)
        if id_ is None or self.states is None or id_ in self.ready or self.states.get(id_) in over:
            return
        if id_ in self.states and not stale:
            self.states[id_] = state
            if state is FAILED:
                self.incidents.add(id_)
        cause = Hung("no heartbeat for 3 s") if state is FAILED else None
        self.happen(Reported(id_, self.round - stale, state, cause, 3), at_once=at_once)

    @rule(place=st.integers(0, SLOTS - 1), seconds=st.sampled_from([None, 20.0]), at_once=flags)
    def a_notice_comes(self, place, seconds, at_once):
        if place in self.ids:
            self.happen(Noticed(self.ids[place], "SIGTERM", seconds), at_once=at_once)

    @rule(step=st.integers(-1, 9), at_once=flags)
    def all_do_what_they_were_told_for_a_notice(self, step, at_once):
        for id_ in self.live():
            match next((each for each in self.world.mail[id_][::-1] if not isinstance(each, Waiting)), None):
                case Prepare(round_, number):
                    self.happen(Held(id_, round_, number, step), at_once=at_once)
                case SaveAt(round_, number, at):
                    self.happen(Saved(id_, round_, number, at), at_once=at_once)

    @rule(notices=st.sets(st.integers(0, SLOTS - 1), max_size=3))
    def all_ranks_end_for_a_notice(self, notices):
        for place in notices:
            self.a_notice_comes(place=place, seconds=20.0, at_once=True)
        for place in range(SLOTS):
            self.a_node_reports(place=place, state=PREEMPTED, stale=False, at_once=True)

    def remove(self, place: int, *, counted: bool, for_good: bool) -> str:
        id_ = self.ids.pop(place)
        self.ready.pop(id_, None)
        self.left_for_good += for_good and id_ in self.last_round
        if self.states is not None and self.states.get(id_) in (HEALTHY, FAILED):
            self.states[id_] = GONE
            self.incidents |= {id_} if counted else set()
        elif self.states is None and self.last_round.get(id_) is not None:
            self.incidents |= {id_} if counted else set()
        return id_

    @rule(place=st.integers(0, SLOTS - 1), at_once=flags)
    def a_launcher_is_lost(self, place, at_once):
        if place in self.ids:
            id_ = self.remove(place, counted=True, for_good=False)
            self.lost.add(id_)
            self.happen(Lost(id_, DIED), at_once=at_once)

    @rule(place=st.integers(0, SLOTS - 1), at_once=flags)
    def a_launcher_is_lost_but_returns_before_that_is_known(self, place, at_once):
        old = self.ids.get(place)
        if old is None or self.last_round.get(old) is None or self.rebuilt or self.is_over:
            return
        group_rank, memory = self.last_round[old], self.world.job.memory
        self.remove(place, counted=True, for_good=False)
        new = self.launch(place)
        self.last_round[new] = group_rank
        self.lost.add(old)
        self.happen(Joined(self.node(place, new), memory, group_rank), at_once=False)
        self.happen(Lost(old, DIED), at_once=at_once)

    @rule(place=st.integers(0, SLOTS - 1), at_once=flags)
    def a_launcher_says_goodbye(self, place, at_once):
        if place in self.ids:
            self.happen(Left(self.remove(place, counted=False, for_good=True), "SIGTERM"), at_once=at_once)

    @rule(place=st.integers(0, SLOTS - 1), at_once=flags)
    def a_node_excludes_itself(self, place, at_once):
        if place not in self.ids or self.is_over:
            return
        id_ = self.remove(place, counted=False, for_good=True)
        self.excluded.add(id_)
        self.incidents.discard(id_)
        if len(self.ids) < self.min_nodes:
            self.may_end += [TooFewNodes] if self.ids else [Excluded]
        self.happen(Requested(id_, self.round, Excluded("ECC")), at_once=at_once)

    @precondition(lambda self: self.launched > 8)
    @rule(place=st.integers(0, SLOTS - 1), stale=flags, at_once=flags)
    def a_rank_shuts_the_job_down(self, place, stale, at_once):
        if place in self.ids:
            if not stale:
                self.may_end.append(ShutDown)
            self.happen(Requested(self.ids[place], self.round - stale, ShutDown("done")), at_once=at_once)

    @rule(event=st.sampled_from(["lost", "left", "ready", "report", "exclude", "shut down"]))
    def one_that_is_not_there_speaks(self, event):
        gone = "n9.nobody"
        events: dict[str, Event] = {
            "lost": Lost(gone, DIED),
            "left": Left(gone),
            "ready": Ready(gone, 1),
            "report": Reported(gone, self.round, FAILED, CRASH, 0),
            "exclude": Requested(gone, self.round, Excluded()),
            "shut down": Requested(gone, self.round, ShutDown()),
        }
        self.happen(events[event])

    @rule(seconds=st.sampled_from([0.5, 5.0, 33.0, 700.0]))
    def time_passes(self, seconds):
        self.settle()
        until = self.world.now + seconds
        while (due := self.world.job.due()) <= until:
            self.world.now = due
            if self.states is None and due >= self.world.job._gathering_since + min(TIMING.failover_timeout, 600.0):
                self.may_end.append(TooFewNodes)
            self.settle()
        self.world.now = until

    # -- what must follow -----------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Let the leader speak, and check all that it says."""
        was_ended, was_over = self.ended, self.is_over
        self.has_failed = True
        self.noticed = self.live() & self.world.job._preemption.noticed.keys()
        said = self.world.decide()
        self.settled = True
        if not was_over:
            self.check_verdict(said)
        formed = {id_: each for id_, each in said if isinstance(each, Assigned)}
        if formed:
            assert self.states is None
            self.check_round(formed)
            spares = {id_ for id_, each in said if isinstance(each, Waiting)}
            assert spares == self.ready.keys(), "each spare, and nobody else, hears that it waits"
        ends = [(id_, each) for id_, each in said if isinstance(each, End)]
        if ends and not was_ended:
            self.check_end(ends)
        for id_, each in said:
            if isinstance(each, Leave):
                assert id_ in self.excluded | self.refused | self.preempted, (id_, each)
                assert isinstance(each.cause, Preempted if id_ in self.preempted else Excluded)
        if was_ended:
            assert all(isinstance(each, End | Leave) for _, each in said), said
        self.ended = self.is_over
        self.has_failed = False

    def verdict(self) -> Verdict:
        assert self.states is not None
        if self.world.terms.restart_policy == "min-healthy":
            return min_healthy(self.states.values(), self.min_nodes)
        verdict = any_failed(self.states.values())
        has_place = len(self.states) < self.max_nodes and self.world.settings.upscaling
        # Ranks that have finished do not run again for a newcomer.
        is_due = self.world.now >= self.round_since + TIMING.min_uptime
        is_due &= not {SUCCEEDED, PREEMPTED} & set(self.states.values())
        is_due &= self.world.now >= self.world.job._preemption.holds_until()
        if verdict is Verdict.CONTINUE and self.ready and has_place and is_due:
            return Verdict.RESTART
        return verdict

    def check_verdict(self, said: Sequence[tuple[str, Message]]) -> None:
        stopped = [id_ for id_, each in said if isinstance(each, Stop)]
        if self.states is None:
            assert stopped == []
            return
        match self.verdict():
            case Verdict.CONTINUE:
                assert stopped == []
            case Verdict.SUCCEED:
                assert self.world.job.outcome == End(None)
                self.may_end.append(type(None))
            case Verdict.PREEMPT:
                is_host = any(id_.startswith("n0.") for id_ in self.noticed)
                if not self.noticed or is_host or len(self.live() - self.noticed) < self.min_nodes:
                    self.may_end.append(Preempted)
                    assert self.world.job.outcome is not None
                    return
                self.preempted |= self.noticed
                for place in [each for each, id_ in self.ids.items() if id_ in self.noticed]:
                    self.remove(place, counted=False, for_good=True)
                assert sorted(stopped) == sorted(self.live() - self.ready.keys())
                self.states = None
                self.incidents = set()
            case Verdict.RESTART:
                if self.incidents and self.restarts >= self.world.terms.max_restarts:
                    self.may_end += [Hung, NodeLost]
                    assert self.world.job.outcome is not None
                else:
                    assert sorted(stopped) == sorted(self.live() - self.ready.keys())
                    self.states = None

    def check_round(self, formed: dict[str, Assigned]) -> None:
        assert not self.ended
        count = len(formed)
        assert formed.keys() <= self.ready.keys() & self.live()
        assert formed.keys().isdisjoint(self.excluded | self.lost | self.refused)
        assert self.min_nodes <= count <= self.max_nodes
        assert count == min(len(self.ready), self.max_nodes), "nobody waits while there is a place"
        order = sorted(formed, key=lambda id_: formed[id_].group_rank)
        assert [formed[id_].group_rank for id_ in order] == list(range(count))
        # Who had a place and is still there keeps it, and waits for nobody who is still stopping.
        assert {id_ for id_, rank in self.last_round.items() if rank is not None} & self.live() <= formed.keys()
        assert self.round < 0 or self.live() == self.ready.keys()
        if self.round >= 0:
            assert self.old() >= self.old_needed()
        self.restarts += bool(self.incidents)
        assert self.restarts <= self.world.terms.max_restarts
        self.round += 1
        rank = 0
        for id_ in order:
            each, place = formed[id_], int(id_[1])
            assert (each.rank, each.role_rank, each.group_world_size) == (rank, rank, count)
            assert (each.store_address, each.store_port) == (f"10.0.0.{order[0][1]}", self.ready[order[0]])
            assert each.prev_world_size == self.world_size
            assert (each.memory.round, each.memory.nodes, each.memory.voters) == (self.round, count, len(self.ready))
            assert (each.memory.restarts, each.memory.epoch) == (self.restarts, self.epoch)
            assert {name for name, _ in each.memory.excluded} == self.excluded
            assert (each.reason.kind == "") == (self.round == 0), each.reason
            counted_kinds = ("rank_failed", "rank_hung", "node_lost", "host_lost")
            assert (each.reason.kind in counted_kinds) == bool(self.incidents), each.reason
            rank += place % 2 + 1
        self.world_size = rank
        assert {(each.world_size, each.role_world_size, each.memory.world_size) for each in formed.values()} == {
            (rank, rank, rank)
        }
        self.voters = len(self.ready)
        for id_ in formed:
            del self.ready[id_]
        self.states = dict.fromkeys(formed, HEALTHY)
        self.last_round = {id_: each.group_rank for id_, each in formed.items()} | dict.fromkeys(self.ready)
        self.left_for_good, self.rebuilt = 0, False
        self.incidents, self.round_since = set(), self.world.now

    def check_end(self, ends: Sequence[tuple[str, End]]) -> None:
        assert self.world.job.outcome is not None
        assert {id_ for id_, _ in ends} >= self.live(), "all that are there hear of it"
        cause = self.world.job.outcome.cause
        if self.incidents and self.restarts >= self.world.terms.max_restarts and self.states is None:
            self.may_end.append(TooFewNodes)
        assert type(cause) in self.may_end, (cause, self.may_end)

    def old(self) -> int:
        return len(self.last_round.keys() & self.live())

    def old_needed(self) -> int:
        needed = quorum(self.voters, rebuilt=self.rebuilt, endpoints=self.world.settings.endpoints)
        return needed - self.left_for_good

    @invariant()
    def what_was_said_is_consistent(self):
        if not hasattr(self, "world"):
            return
        for id_, mail in self.world.mail.items():
            rounds = [each.memory.round for each in mail if isinstance(each, Assigned)]
            assert rounds == sorted(set(rounds)), f"one place in a round for {id_}"
            stops = [each.round for each in mail if isinstance(each, Stop)]
            assert stops == sorted(set(stops)), f"one stop a round for {id_}"
            finals = [each for each in mail if isinstance(each, End | Leave)]
            assert len(finals) <= 1, f"one end for {id_}"
            assert not finals or mail[-1] is finals[0], f"nothing after the end for {id_}"
            if finals and isinstance(finals[0], End):
                assert finals[0] == self.world.job.outcome

    @invariant()
    def who_waits_with_enough_others_will_start(self):
        if not hasattr(self, "world") or self.ended or not self.settled or self.states is not None:
            return
        live, job = self.live(), self.world.job
        if self.ready.keys() != live or len(live) < self.min_nodes:
            return
        endpoints = self.world.settings.endpoints
        if self.round >= 0:
            if self.old() < self.old_needed():
                return
            assert self.rebuilt, "nobody is waited for, but the round does not form"
            assert job.due() <= self.world.now + TIMING.settle + STRAGGLERS
        elif len(live) >= quorum(self.max_nodes, rebuilt=False, endpoints=endpoints):
            assert job.due() <= self.world.now + TIMING.last_call_timeout

    def teardown(self):
        """All is quiet in the end: then the job runs, or has ended, or too few are left to wait for others."""
        if not hasattr(self, "world") or self.has_failed or self.ended:
            return
        self.settle()
        self.all_that_must_stop_have_stopped()
        self.time_passes(seconds=59.0)
        self.all_that_must_stop_have_stopped()  # for a newcomer
        self.who_waits_with_enough_others_will_start()
        if self.states is None and not self.ended and self.round >= 0 and not self.rebuilt:
            assert len(self.ids) < self.min_nodes or self.old() < self.old_needed()


Rounds.TestCase.settings = hypothesis_settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking takes minutes, and the steps tell enough
)
TestRounds = Rounds.TestCase
