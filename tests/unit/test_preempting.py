"""A notice of preemption: all ranks save at the same step, whatever the order in which everybody gets to know."""

from collections import defaultdict, deque
from itertools import chain

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from ft_launcher.causes import NodeLost, Preempted, exit_code, sentence
from ft_launcher.page import Slot
from ft_launcher.preempting import ECHO_SECONDS, STOP_SECONDS, NodeNotice, ends_at, late
from ft_launcher.rank_notice import Answers
from ft_launcher.records import (
    Assigned,
    End,
    Event,
    Held,
    Joined,
    Leave,
    Left,
    Lost,
    Message,
    Noticed,
    Prepare,
    Ready,
    SaveAt,
    Saved,
    Stop,
)
from ft_launcher.watch import Progress
from tests.unit.leading import CRASH, DIED, FAILED, HEALTHY, PREEMPTED, SUCCEEDED, World


class Blocked(Exception):
    """The rank would wait."""


class Rank:
    """A rank that asks at every `stride`-th step, with a page that is a list."""

    def __init__(self, step: int, stride: int) -> None:
        self.page = [0] * len(Slot)
        self.next, self.stride = step, stride
        self.is_asking = False
        self.answered: dict[int, bool] = {}
        self.yes: list[tuple[int, int]] = []  # notices, and the steps
        self._answers = Answers()

    def ask(self) -> None:
        """The first half of should_checkpoint, if nothing is being asked."""
        if not self.is_asking:
            self.page[Slot.ASKED] = self.next + 1
            self.is_asking = True

    def hear(self) -> None:
        """The second half; the rank goes on asking where it would wait."""
        if not self.is_asking:
            return
        answer = False
        notice = self.page[Slot.NOTICE]
        if notice != self._answers.done:
            try:
                answer = self._answers.answer(self.page, self.next, self._wait)
            except Blocked:
                return
        if answer:
            self.yes.append((notice, self.next))
        self.answered[self.next] = answer
        self.next, self.is_asking = self.next + self.stride, False

    def _wait(self) -> bool:
        raise Blocked

    @property
    def progress(self) -> Progress:
        page = self.page
        return Progress(
            asked=page[Slot.ASKED] - 1,
            saving=page[Slot.SAVING],
            saving_at=page[Slot.SAVING_AT] - 1,
            saved=page[Slot.SAVED],
        )


class Launcher:
    """What node_preemption.py does, in steps between which others act."""

    def __init__(self, id_: str, ranks: int) -> None:
        self.id, self.count = id_, ranks
        self.ranks: list[Rank] = []
        self.round = -1
        self.mail: deque[Message] = deque()
        self.said: deque[Event] = deque()
        self.unread: Prepare | None = None  # given to the ranks, whose pages have not been read yet
        self.notice: NodeNotice | None = None

    def read_mail(self, step: int, stride: int) -> None:
        if self.unread is not None or not self.mail:
            return
        match self.mail.popleft():
            case Assigned(memory=memory):
                self.round, self.notice = memory.round, None
                self.ranks = [Rank(step, stride) for _ in range(self.count)]
            case Stop():
                self.ranks = []
                self.said.append(Ready(self.id, 40000))
            case Prepare() as prepare:
                assert prepare.round == self.round
                for rank in self.ranks:
                    rank.page[Slot.SAVE_AT] = 0
                    rank.page[Slot.NOTICE] = prepare.notice
                self.unread = prepare
            case SaveAt(notice=number, step=at):
                assert self.notice is not None
                assert number == self.notice.number
                self.notice.step = at
                for rank in self.ranks:
                    rank.page[Slot.SAVE_AT] = at + 1
            case End() | Leave():
                self.ranks = []

    def read_pages(self) -> None:
        if self.unread is not None:
            prepare, self.unread = self.unread, None
            self.notice = NodeNotice(prepare.round, prepare.notice, 0.0, None)
            asked = max((rank.progress.asked for rank in self.ranks), default=-1)
            self.said.append(Held(self.id, prepare.round, prepare.notice, asked))
            return
        notice, ranks = self.notice, {number: rank.progress for number, rank in enumerate(self.ranks)}
        if notice is not None and notice.step is not None and not notice.is_saved and not notice.unsaved(ranks, ()):
            notice.is_saved = True
            self.said.append(Saved(self.id, self.round, notice.number, notice.saved_at(ranks)))


class Notices(RuleBasedStateMachine):
    """Three nodes with two ranks each, of which nobody keeps pace with another, and notices at any moment."""

    @initialize(stride=st.integers(1, 3), policy=st.sampled_from(["any-failed", "min-healthy"]))
    def begin(self, stride, policy):
        self.world = World(2, 3, max_restarts=100, policy=policy)
        self.stride, self.saved_at = stride, 0
        self.launchers = {name: Launcher(name, 2) for name in ("n0", "n1", "n2")}
        for name, launcher in self.launchers.items():
            launcher.said += [Joined(self.world.node(name)), Ready(name, 40000)]
        self.all_is_delivered()

    def all_is_delivered(self):
        while any(each.said or each.mail or each.unread for each in self.launchers.values()):
            for launcher in self.launchers.values():
                self.hear(launcher)
                self.take(launcher)
                launcher.read_pages()

    def hear(self, launcher):
        """Let the leader take the next word of a launcher."""
        if launcher.said:
            self.tell(launcher.said.popleft())

    def tell(self, event):
        for id_, message in self.world.tell(event):
            if id_ in self.launchers:
                self.launchers[id_].mail.append(message)

    def take(self, launcher):
        before = launcher.ranks
        launcher.read_mail(self.saved_at, self.stride)
        if launcher.ranks is not before:
            self.saved_at = max([self.saved_at, *(step for rank in before for _, step in rank.yes)])

    nodes = st.sampled_from(["n0", "n1", "n2"])

    @rule(node=nodes, what=st.sampled_from(["SIGTERM", "SIGUSR1"]), seconds=st.sampled_from([None, 30.0]))
    def a_notice_comes(self, node, what, seconds):
        self.launchers[node].said.append(Noticed(node, what, seconds))

    @rule(node=nodes)
    def the_leader_hears(self, node):
        self.hear(self.launchers[node])

    @rule(node=nodes)
    def a_launcher_reads_its_mail(self, node):
        self.take(self.launchers[node])

    @rule(node=nodes)
    def a_launcher_looks_at_its_ranks(self, node):
        self.launchers[node].read_pages()

    @rule(node=nodes, number=st.integers(0, 1), times=st.integers(1, 4))
    def a_rank_goes_on(self, node, number, times):
        for _ in range(times):
            self.a_rank_asks(node, number)
            self.a_rank_hears(node, number)

    @rule(node=nodes, number=st.integers(0, 1))
    def a_rank_asks(self, node, number):
        for rank in self.launchers[node].ranks[number:][:1]:
            rank.ask()

    @rule(node=nodes, number=st.integers(0, 1))
    def a_rank_hears(self, node, number):
        for rank in self.launchers[node].ranks[number:][:1]:
            rank.hear()

    @rule(seconds=st.sampled_from([1.0, 10.0, 40.0]))
    def time_passes(self, seconds):
        self.world.wait(seconds)

    @precondition(lambda self: all(not each.said for each in self.launchers.values()))
    @rule(node=nodes)
    def a_rank_fails(self, node):
        launcher = self.launchers[node]
        if launcher.ranks and launcher.round == self.world.job.memory.round:
            launcher.said.append(self.world.reported(node))
            self.saved_at = max([self.saved_at, *(step for rank in launcher.ranks for _, step in rank.yes)])
            launcher.ranks = []

    @rule()
    def all_that_was_said_is_heard(self):
        self.all_is_delivered()

    @invariant()
    def all_ranks_save_at_the_same_step(self):
        if not hasattr(self, "world"):
            return
        running: dict[int, list[Rank]] = defaultdict(list)
        for launcher in self.launchers.values():
            running[launcher.round] += launcher.ranks
        for ranks in running.values():
            told = dict(chain.from_iterable(rank.yes for rank in ranks))
            for rank in ranks:
                assert len(dict(rank.yes)) == len(rank.yes), "one answer for each notice"
                for notice, step in told.items():
                    if rank.next > step:
                        assert (notice, step) in rank.yes, "a rank passed the step at which another one saves"

    def teardown(self):
        """In the end nobody waits, and all have saved for the last notice that their leader knows."""
        if not hasattr(self, "world") or self.world.job.outcome is not None:
            return
        self.all_is_delivered()
        for _ in range(200):
            for launcher in self.launchers.values():
                for rank in launcher.ranks:
                    rank.ask()
                    rank.hear()
                launcher.read_pages()
            self.all_is_delivered()
            self.all_ranks_save_at_the_same_step()
        ranks = [rank for each in self.launchers.values() for rank in each.ranks]
        if self.world.job._running and set(self.world.job._states.values()) == {HEALTHY}:
            assert min(rank.next for rank in ranks) > 100, "a rank waits"
            assert len({tuple(rank.yes) for rank in ranks}) == 1
            assert not self.world.job._preemption.is_open


Notices.TestCase.settings = hypothesis_settings(
    max_examples=200, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestNotices = Notices.TestCase


# -- known cases ------------------------------------------------------------------------------------------------------


@pytest.fixture
def world():
    world = World(2, 3)
    world.come("n0", "n1", "n2")
    return world


def prepare_and_save(world, *nodes, number=1):
    """Let the nodes do as they are told; give the step."""
    round_ = world.job.memory.round
    for step, node in enumerate(nodes):
        said = world.tell(Held(node, round_, number, 40 + step))
    at = said[0][1].step
    for node in nodes:
        world.tell(Saved(node, round_, number, at))
    return at


def test_a_notice_goes_to_all_nodes_and_the_step_is_one_ahead_of_every_rank(world):
    said = dict(world.tell(Noticed("n1", "SIGTERM", 30.0)))
    assert said == dict.fromkeys(("n0", "n1", "n2"), Prepare(0, 1, "SIGTERM", "n1", 30.0))
    assert world.tell(Held("n0", 0, 1, 41)) == []
    assert world.tell(Held("n1", 0, 1, -1)) == []
    assert dict(world.tell(Held("n2", 0, 1, 40))) == dict.fromkeys(("n0", "n1", "n2"), SaveAt(0, 1, 42))


def test_ranks_that_have_not_asked_yet_save_at_the_first_step_that_they_ask_about(world):
    world.tell(Noticed("n1", "SIGTERM"))
    for node in ("n0", "n1", "n2"):
        said = world.tell(Held(node, 0, 1, -1))
    assert said[0][1] == SaveAt(0, 1, 0)


def test_a_second_notice_during_a_save_changes_nothing(world):
    world.tell(Noticed("n1", "SIGTERM"))
    assert world.tell(Noticed("n0", "SIGUSR1"), Noticed("n1", "SIGTERM", 3.0)) == []
    for node in ("n0", "n1", "n2"):
        said = world.tell(Held(node, 0, 1, 7))
    assert {each for _, each in said} == {SaveAt(0, 1, 8)}
    assert world.tell(Noticed("n2", "SIGUSR2")) == []


def test_the_same_notice_soon_after_the_save_is_an_echo_and_later_another_one(world):
    world.tell(Noticed("n1", "SIGUSR1"))
    prepare_and_save(world, "n0", "n1", "n2")
    world.wait(ECHO_SECONDS - 1)
    assert world.tell(Noticed("n0", "SIGUSR1")) == []
    assert {each for _, each in world.tell(Noticed("n0", "SIGTERM"))} == {Prepare(0, 2, "SIGTERM", "n0")}
    prepare_and_save(world, "n0", "n1", "n2", number=2)
    world.wait(ECHO_SECONDS + 1)
    assert {each for _, each in world.tell(Noticed("n0", "SIGTERM"))} == {Prepare(0, 3, "SIGTERM", "n0")}


def test_the_same_notice_soon_after_the_save_is_another_one_for_the_ranks_of_the_next_round(world):
    world.tell(Noticed("n1", "SIGTERM"))
    prepare_and_save(world, "n0", "n1", "n2")
    world.report("n2", FAILED)
    world.ready("n0", "n1", "n2")
    assert {each for _, each in world.tell(Noticed("n0", "SIGTERM"))} == {Prepare(1, 2, "SIGTERM", "n0")}


def test_a_notice_that_was_not_done_with_goes_on_in_the_next_round(world):
    world.tell(Noticed("n1", "SIGTERM", 30.0))
    world.tell(Held("n0", 0, 1, 9))
    world.report("n2", FAILED)
    world.wait(4.0)
    world.ready("n0", "n1", "n2")
    assert [each for _, each in world.last if isinstance(each, Prepare)] == [Prepare(1, 1, "SIGTERM", "n1", 26.0)] * 3
    # What was said in the round before is not counted in this one.
    assert world.tell(Held("n0", 0, 1, 99)) == []
    for node in ("n0", "n1", "n2"):
        said = world.tell(Held(node, 1, 1, 4))
    assert said[0][1] == SaveAt(1, 1, 5)


def test_a_notice_of_a_node_that_is_gone_is_over(world):
    world.tell(Noticed("n1", "SIGTERM", 30.0))
    world.tell(Lost("n1", DIED))
    world.ready("n0", "n2")
    assert not any(isinstance(each, Prepare) for _, each in world.last)
    assert {each for _, each in world.tell(Noticed("n0", "SIGUSR1"))} == {Prepare(1, 2, "SIGUSR1", "n0")}


def test_what_was_said_about_an_earlier_notice_is_not_counted_for_this_one(world):
    world.tell(Noticed("n1", "SIGUSR1"))
    prepare_and_save(world, "n0", "n1", "n2")
    world.tell(Noticed("n1", "SIGUSR2"))
    for node in ("n0", "n1", "n2"):
        assert world.tell(Held(node, 0, 1, 99)) == []


def test_a_node_that_is_about_to_be_taken_away_still_is_when_another_notice_comes(world):
    world.tell(Noticed("n1", "aws: terminate", 120.0))
    prepare_and_save(world, "n0", "n1", "n2")
    world.wait(60.0)
    preempt(world, "n2", number=2)
    assert world.job.outcome == End(Preempted("SIGTERM", "n2", 43)), "only n0 is left"


def test_a_node_that_was_only_asked_for_a_checkpoint_stays_when_another_one_is_taken_away(world):
    world.tell(Noticed("n1", "SIGUSR1"))
    prepare_and_save(world, "n0", "n1", "n2")
    preempt(world, "n2", number=2)
    assert isinstance(world.mail["n1"][-1], Stop)
    assert isinstance(world.mail["n2"][-1], Leave)


def test_a_notice_to_a_spare_waits_until_it_has_a_place():
    world = World(1, 2)
    world.come("n0", "n1", "n2")
    assert world.tell(Noticed("n2", "aws: terminate", 120.0)) == []
    world.report("n1", FAILED)
    world.tell(Left("n1"))
    world.ready("n0")
    assert [each for _, each in world.last if isinstance(each, Prepare)] == [
        Prepare(1, 1, "aws: terminate", "n2", 120.0)
    ] * 2


def test_under_min_healthy_nobody_waits_for_a_node_that_failed():
    world = World(1, 2, policy="min-healthy")
    world.come("n0", "n1")
    world.tell(Noticed("n0", "SIGUSR1"))
    world.tell(Held("n0", 0, 1, 7))
    world.tell(Held("n1", 0, 1, 11))
    world.report("n1", FAILED)
    world.tell(Noticed("n0", "SIGUSR1"))
    assert SaveAt(0, 1, 12) in world.mail["n0"], "ahead of the ranks that are gone, too"


def test_no_newcomer_restarts_ranks_that_are_about_to_save(world):
    world = World(2, 3)
    world.come("n0", "n1")
    world.wait(30.0)
    world.tell(Noticed("n0", "SIGTERM", 30.0))
    world.come("n2")
    world.wait(29.0)
    assert not any(isinstance(each, Stop) for each in world.mail["n0"])
    prepare_and_save(world, "n0", "n1")
    assert any(isinstance(each, Stop) for each in world.mail["n0"])


# -- the end ----------------------------------------------------------------------------------------------------------


def preempt(world, *noticed, nodes=("n0", "n1", "n2"), number=1):
    """Let notices come, and all ranks save and end for them."""
    for node in noticed:
        world.tell(Noticed(node, "SIGTERM", 30.0))
    prepare_and_save(world, *nodes, number=number)
    for node in nodes:
        world.report(node, PREEMPTED)


def test_a_job_whose_nodes_are_all_taken_away_ends_and_uses_no_restart(world):
    preempt(world, "n0", "n1", "n2")
    assert world.job.outcome == End(Preempted("SIGTERM", "n0", 43))
    assert world.restarts == 0
    assert sentence(world.job.outcome.cause) == "preempted (SIGTERM at node n0): saved at step 43"
    assert exit_code(world.job.outcome.cause) == 75


def test_a_job_goes_on_without_the_nodes_that_are_taken_away_if_enough_are_left(world):
    preempt(world, "n1")
    assert world.mail["n1"][-1] == Leave(Preempted("SIGTERM", "n1", 43))
    assert isinstance(world.mail["n0"][-1], Stop)
    world.ready("n0", "n2")
    assert world.ranks == {"n0": 0, "n2": 1}
    assert str(world.assigned("n2").reason) == "node_preempted: preempted (SIGTERM at node n1): saved at step 43"
    assert world.restarts == 0
    assert not any(isinstance(each, Prepare) for _, each in world.last)


@pytest.mark.parametrize("noticed", [("n1", "n2"), ("n0",), ()])
def test_a_job_ends_where_too_few_are_left_or_the_host_goes_or_nobody_knows_of_a_notice(world, noticed):
    if noticed:
        preempt(world, *noticed)
        assert world.job.outcome == End(Preempted("SIGTERM", noticed[0], 43))
    else:
        for node in ("n0", "n1", "n2"):
            world.report(node, PREEMPTED)
        assert world.job.outcome == End(Preempted(""))
        assert sentence(world.job.outcome.cause) == "preempted"


def test_a_node_whose_ranks_have_finished_ends_with_those_that_are_preempted(world):
    world.tell(Noticed("n1", "SIGTERM"), Noticed("n2", "SIGTERM"))
    world.report("n0", SUCCEEDED)
    for node in ("n1", "n2"):
        world.report(node, PREEMPTED)
    assert world.job.outcome == End(Preempted("SIGTERM", "n1"))


def test_a_rank_that_fails_beside_preempted_ones_is_a_failure(world):
    world.tell(Noticed("n1", "SIGTERM"))
    world.report("n1", PREEMPTED)
    world.report("n0", FAILED, CRASH)
    assert isinstance(world.mail["n2"][-1], Stop)
    assert world.restarts == 1


def test_a_preempted_node_that_leaves_before_the_others_are_done_is_not_missed(world):
    world.tell(Noticed("n1", "SIGTERM"))
    world.report("n1", PREEMPTED)
    world.tell(Left("n1", "SIGTERM"))
    assert world.job.outcome is None
    for node in ("n0", "n2"):
        world.report(node, PREEMPTED)
    assert world.job.outcome == End(Preempted("SIGTERM", "n1"))


def test_a_node_lost_while_it_saves_is_a_counted_restart(world):
    world.tell(Noticed("n1", "SIGTERM"))
    world.tell(Held("n0", 0, 1, 7), Held("n2", 0, 1, 7))
    said = world.tell(Lost("n1", DIED))
    assert {type(each) for _, each in said} == {Stop}, "nobody begins to save without the others"
    assert world.restarts == 1
    assert isinstance(world.job._incident.culprit, tuple)
    assert world.job._incident.culprit[0] == NodeLost("n1", DIED)


# -- a launcher's part ------------------------------------------------------------------------------------------------


def test_reminders_come_at_half_of_the_time_once_or_after_10_s_30_s_70_s():
    with_end = NodeNotice(0, 1, 100.0, 120.0)
    assert with_end.due() == 110.0
    assert replace(with_end, reminders=1).due() == float("inf")
    without = NodeNotice(0, 1, 100.0, None)
    assert [replace(without, reminders=count).due() for count in range(3)] == [110.0, 130.0, 170.0]
    assert replace(without, is_saved=True).due() == float("inf")


def test_who_has_gone_on_has_left_or_has_finished_has_saved():
    ranks = {
        0: Progress(asked=7, saving=2, saving_at=7, saved=2),
        1: Progress(asked=7, saving=2, saving_at=7, saved=1),
        2: Progress(asked=6),
        3: Progress(asked=7, saving=2, saving_at=7, is_leaving=True),
        4: Progress(),
        5: Progress(asked=5),
    }
    notice = NodeNotice(0, 2, 0.0, None)
    assert notice.unsaved(ranks, ended=[5]) == [1, 2, 4]
    assert notice.saved_at(ranks) == 7
    said = [late(ranks[rank], 2) for rank in (1, 2, 4)]
    assert said == ["saving since step 7", "at step 6", "has not called should_checkpoint"]


@pytest.mark.parametrize(("given", "kept"), [(120.0, STOP_SECONDS), (5.0, 0.5), (0.0, 0.0)])
def test_stopping_begins_a_little_before_the_end(given, kept):
    assert ends_at(1000.0, 1000.0 + given) == 1000.0 + given - kept


# -- a rank's part ----------------------------------------------------------------------------------------------------


def test_a_rank_that_nobody_told_where_to_save_in_time_has_done_with_the_notice():
    answers, page = Answers(), [0] * len(Slot)
    page[Slot.NOTICE] = 1
    assert not answers.answer(page, 7, lambda: False)
    assert answers.done == 1
    page[Slot.SAVE_AT] = 9
    assert page[Slot.SAVED] == 0


def test_another_program_of_the_same_rank_does_not_save_again():
    page = [0] * len(Slot)
    page[Slot.NOTICE], page[Slot.SAVE_AT] = 1, 6
    first = Answers()
    assert first.answer(page, 5, lambda: True)
    first.finish(page)
    second = Answers()
    assert not second.answer(page, 6, lambda: True)
    assert second.done == 1
