"""From which checkpoint to go on: the known cases, and what is so after any history of attempts."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_launcher.causes import Exhausted, Exited, Hung, NodeLost, Preempted
from ft_launcher.ladder import (
    HINT_ENV,
    MAX_KNOWN,
    MAX_PATH_BYTES,
    MAX_SUSPECTS,
    MAX_TOLD,
    Attempt,
    Checkpoint,
    Climbed,
    Ladder,
    NodeAttempt,
    ResumeHint,
    Rung,
    advance,
    hint_of,
    named,
    step_of,
)
from ft_launcher.policy import NodeState
from ft_launcher.records import Assigned, End, Joined, Left, Lost, Memory, Noticed, Ready, Stop, encode
from tests.unit.leading import CRASH, DIED, FAILED, World

BEGINNING = Checkpoint(None, 0)


def at(step: int, path: str = "") -> Checkpoint:
    return Checkpoint(path or f"/c/{step}", step)


class Climber:
    """One job's ladder, told of one attempt after the other."""

    def __init__(self, suspect_after: int | None = 3) -> None:
        self.suspect_after = suspect_after
        self.ladder: Ladder | None = None
        self.last = Climbed(None)

    def attempt(
        self,
        resumed: Checkpoint | None,
        *saved: Checkpoint,
        step: int = -1,
        failed: bool = True,
        times: int = 1,
    ) -> "Climber":
        for _ in range(times):
            self.tell(Attempt(0, 0, resumed, step, saved), failed=failed)
        return self

    def tell(self, *attempts: Attempt, failed: bool = True) -> "Climber":
        self.last = advance(self.ladder, attempts, has_failed=failed, suspect_after=self.suspect_after)
        self.ladder = self.last.ladder
        return self

    def hint(self) -> ResumeHint | None:
        return hint_of(self.ladder)

    def failures(self, path: str) -> int:
        assert self.ladder is not None
        return {rung.path: rung.failures for rung in (*self.ladder.known, *self.ladder.suspects)}[path]


def saved_10_to_30(**options: int | None) -> Climber:
    return Climber(**options).attempt(BEGINNING, at(10), at(20), at(30), step=30)


# -- what makes a checkpoint suspect ------------------------------------------------------------------------------


def test_a_checkpoint_is_suspect_after_so_many_failures_before_a_step_beyond_it_and_the_one_before_is_offered():
    climber = saved_10_to_30()
    climber.attempt(at(30), times=2)
    assert climber.hint() is None
    assert climber.last.warning == ""
    climber.attempt(at(30), step=30)
    assert climber.hint() == ResumeHint("/c/20", 20, ("/c/30",))
    assert climber.last.warning == (
        "3 attempts from /c/30 (step 30) failed before a step beyond it: suspect; the next one is told to use"
        " /c/20 (step 20)"
    )
    assert climber.last.exhausted == ""


def test_the_ladder_goes_down_rung_by_rung():
    climber = saved_10_to_30(suspect_after=1)
    climber.attempt(at(30)).attempt(at(20))
    assert climber.hint() == ResumeHint("/c/10", 10, ("/c/30", "/c/20"))
    climber.attempt(at(10))
    assert climber.hint() == ResumeHint(None, None, ("/c/30", "/c/20", "/c/10"))
    assert climber.last.warning.startswith("1 attempt from /c/10 (step 10) failed")
    assert climber.last.warning.endswith("the next one is told that no other one is known")


def test_a_step_beyond_begins_the_count_anew():
    climber = saved_10_to_30()
    climber.attempt(at(30), times=2).attempt(at(30), step=31).attempt(at(30), times=2)
    assert climber.hint() is None
    assert climber.failures("/c/30") == 2


def test_a_checkpoint_saved_beyond_is_a_step_beyond_where_no_steps_are_told():
    climber = saved_10_to_30()
    climber.attempt(at(30), at(40), times=5)
    assert climber.hint() is None


def test_a_step_beyond_on_any_node_counts():
    climber = saved_10_to_30(suspect_after=1)
    climber.tell(Attempt(0, 0, at(30), 30), Attempt(0, step=31))
    assert climber.hint() is None


def test_an_attempt_that_ended_for_another_reason_counts_neither_for_nor_against():
    climber = saved_10_to_30()
    climber.attempt(at(30), times=2).attempt(at(30), failed=False, times=5)
    assert climber.failures("/c/30") == 2


def test_an_attempt_of_which_nobody_said_where_it_began_counts_against_nothing():
    climber = saved_10_to_30(suspect_after=1)
    before = climber.ladder
    climber.attempt(None, times=5)
    assert climber.ladder == before


def test_without_suspect_after_nothing_is_ever_suspect_or_remembered():
    climber = saved_10_to_30(suspect_after=None)
    climber.attempt(at(30), times=100)
    assert climber.last == Climbed(None)


def test_a_job_without_a_checkpoint_may_fail_at_its_beginning_as_often_as_it_likes():
    climber = Climber(suspect_after=1).attempt(BEGINNING, times=100)
    assert climber.hint() is None
    assert climber.last.exhausted == ""


# -- new content --------------------------------------------------------------------------------------------------


def test_a_checkpoint_saved_anew_is_not_suspect():
    climber = saved_10_to_30().attempt(at(30), times=3)
    climber.attempt(at(20), at(30), step=31)
    assert climber.hint() is None
    assert climber.failures("/c/30") == 0


def test_a_removed_checkpoint_is_neither_offered_nor_suspect():
    climber = saved_10_to_30().attempt(at(30), times=3)
    climber.attempt(None, Checkpoint("/c/20"))
    assert climber.hint() == ResumeHint("/c/10", 10, ("/c/30",))
    climber.attempt(None, Checkpoint("/c/30"))
    assert climber.hint() is None


def test_one_path_with_another_step_is_another_checkpoint():
    climber = Climber()
    climber.attempt(at(30, "/c/last"), times=3)
    assert climber.hint() == ResumeHint(None, None, ("/c/last",))
    climber.attempt(at(40, "/c/last"))
    assert climber.hint() is None
    assert climber.failures("/c/last") == 1


def test_a_path_without_a_step_is_the_checkpoint_as_it_was_saved():
    climber = saved_10_to_30().attempt(Checkpoint("/c/30"), step=30, times=3)
    assert climber.hint() == ResumeHint("/c/20", 20, ("/c/30",))


def test_a_path_that_nobody_has_saved_is_known_by_its_attempts():
    climber = Climber().attempt(Checkpoint("/c/x"), times=2)
    assert climber.failures("/c/x") == 2
    assert step_of(climber.ladder, "/c/x") == 0


def test_a_suspect_with_a_step_beyond_it_is_sound_after_all():
    climber = saved_10_to_30().attempt(at(30), times=3).attempt(at(30), step=31)
    assert climber.hint() is None


def test_copies_of_a_suspect_come_last():
    climber = Climber(suspect_after=1)
    climber.attempt(BEGINNING, at(10), at(20), at(20, "/c/last"))
    climber.attempt(at(20, "/c/last"))
    assert climber.hint() == ResumeHint("/c/10", 10, ("/c/last",))
    climber.attempt(at(10))
    assert climber.hint() == ResumeHint("/c/20", 20, ("/c/last", "/c/10"))


def test_of_equally_new_ones_the_last_saved_is_offered():
    climber = Climber(suspect_after=1).attempt(BEGINNING, at(10, "/c/a"), at(10, "/c/b")).attempt(at(20))
    assert climber.hint() == ResumeHint("/c/b", 10, ("/c/20",))


# -- the end of the ladder ----------------------------------------------------------------------------------------


def test_the_ladder_is_exhausted_when_the_beginning_fails_too():
    climber = saved_10_to_30(suspect_after=2)
    for step in (30, 20, 10):
        climber.attempt(at(step), times=2)
        assert climber.last.exhausted == ""
    climber.attempt(BEGINNING)
    assert climber.last.exhausted == (
        "no checkpoint is left to go on from: /c/30 (step 30) was tried 2 times, /c/20 (step 20) was tried 2 times,"
        " /c/10 (step 10) was tried 2 times; each attempt failed before a step beyond; so did one from the beginning"
    )


def test_the_ladder_is_exhausted_when_a_suspect_is_tried_once_more():
    climber = saved_10_to_30(suspect_after=2).attempt(at(30), times=3)
    assert climber.last.exhausted == (
        "no checkpoint is left to go on from: /c/30 (step 30) was tried 3 times; each attempt failed before a step"
        " beyond"
    )
    assert climber.last.warning == ""


def test_a_beginning_that_takes_a_step_does_not_exhaust_the_ladder():
    climber = saved_10_to_30(suspect_after=1).attempt(at(30)).attempt(BEGINNING, step=1)
    assert climber.last.exhausted == ""


def test_what_is_no_failure_does_not_exhaust_the_ladder():
    climber = saved_10_to_30(suspect_after=1).attempt(at(30))
    for resumed in (BEGINNING, at(30)):
        climber.attempt(resumed, failed=False)
        assert climber.last.exhausted == ""


def test_a_sentence_names_some_of_many_suspects():
    climber = Climber(suspect_after=1)
    for step in range(1, 12):
        climber.attempt(at(step))
    climber.attempt(at(11))
    assert climber.last.exhausted.startswith(
        "no checkpoint is left to go on from: /c/11 (step 11) was tried 2 times, /c/10 (step 10) was tried once, "
    )
    assert ", and 3 more were; each" in climber.last.exhausted


def test_a_path_cannot_forge_a_line():
    assert named("/c/a\nft_launcher: ok\x1b", None) == "/c/a\\nft_launcher: ok\\x1b"
    assert named(None, 0) == "the beginning"


# -- what is remembered -------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_are_remembered_and_the_one_in_use():
    climber = Climber().attempt(at(5), *map(at, range(10, 50)))
    assert climber.ladder is not None
    steps = [rung.step for rung in climber.ladder.known]
    assert steps == [5, *range(50 - MAX_KNOWN + 1, 50)]
    climber.attempt(at(5), times=3)
    assert climber.hint() == ResumeHint("/c/49", 49, ("/c/5",))


def test_the_last_suspects_are_remembered():
    climber = Climber(suspect_after=1)
    for step in range(MAX_SUSPECTS + 5):
        climber.attempt(at(step))
    hint = climber.hint()
    assert hint is not None
    assert hint.suspects == tuple(f"/c/{step}" for step in range(5, MAX_SUSPECTS + 5))


PATHS = st.sampled_from([None, "/c/a", "/c/b", "/c/c", "/c/d"])
STEPS = st.integers(0, 4)
CHECKPOINTS = st.builds(Checkpoint, PATHS, STEPS | st.none())
SAVED = st.builds(Checkpoint, PATHS.filter(bool), STEPS | st.none())
ATTEMPTS = st.builds(
    Attempt,
    st.just(0),
    st.integers(0, 3),
    st.none() | CHECKPOINTS,
    st.integers(-1, 5),
    st.lists(SAVED, max_size=3).map(tuple),
)
HISTORIES = st.lists(st.tuples(st.lists(ATTEMPTS, max_size=3), st.booleans()), max_size=25)


@given(HISTORIES, st.integers(1, 3))
def test_after_any_history_a_checkpoint_is_known_or_suspect_and_only_failures_make_it_so(history, suspect_after):
    climber = Climber(suspect_after)
    for attempts, failed in history:
        suspects = {rung.path for rung in climber.ladder.suspects} if climber.ladder else set()
        climber.tell(*attempts, failed=failed)
        ladder = climber.ladder or Ladder()
        known, now = {rung.path for rung in ladder.known}, {rung.path for rung in ladder.suspects}
        assert not known & now
        assert len(known) == len(ladder.known)
        assert len(now) == len(ladder.suspects)
        assert all(rung.failures < suspect_after for rung in ladder.known)
        assert all(rung.failures >= suspect_after for rung in ladder.suspects)
        resumed = {each.resumed.path for each in attempts if each.resumed is not None}
        saved = {each.path for attempt in attempts for each in attempt.saved}
        assert now - suspects <= (resumed if failed else set())
        assert not now & saved
        assert not climber.last.warning or now - suspects
        if climber.last.exhausted:
            assert failed
            assert now
            assert not now - suspects
        hint = hint_of(ladder)
        assert (hint is None) == (not now)
        if hint is not None:
            assert set(hint.suspects) == now
            assert hint.path in known or (hint.path is None and not known)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(ladder), type=Ladder) == ladder


@given(st.lists(st.integers(0, 200), max_size=200), st.lists(st.integers(0, 200), max_size=200))
def test_neither_saves_nor_failures_make_the_ladder_grow_beyond_its_limits(saved, failed):
    climber = Climber(suspect_after=1)
    for step in saved:
        climber.attempt(None, at(step), failed=False)
    for step in failed:
        climber.attempt(at(step))
    ladder = climber.ladder or Ladder()
    assert len(ladder.known) <= MAX_KNOWN
    assert len(ladder.suspects) <= MAX_SUSPECTS


def test_the_longest_hint_fits_into_a_variable():
    paths = [("\x01" * MAX_PATH_BYTES)[: MAX_PATH_BYTES - 2] + f"{number:02d}" for number in range(MAX_SUSPECTS + 1)]
    hint = ResumeHint(paths[0], 2**63, tuple(paths[1:]))
    assert len(HINT_ENV) + 1 + len(msgspec.json.encode(hint)) < 128 * 1024  # MAX_ARG_STRLEN of Linux


# -- what a node gathers ------------------------------------------------------------------------------------------


def test_a_node_tells_what_its_first_rank_said_last():
    node = NodeAttempt()
    assert node.resume(3, at(20))
    assert not node.resume(2, at(20))
    assert node.resume(2, at(10))
    assert not node.resume(3, at(30))
    assert not node.resume(2, Checkpoint("/c/10"))
    assert node.told(4, [7, -1, 9]) == Attempt(4, 2, Checkpoint("/c/10"), 9)


def test_of_several_nodes_the_first_rank_stands_for_all():
    climber = Climber(suspect_after=1).tell(Attempt(0, 4, at(20)), Attempt(0, 0, at(10)), Attempt(0, 2, at(30)))
    assert climber.hint() == ResumeHint(None, None, ("/c/10",))


def test_a_node_whose_ranks_said_nothing_tells_nothing():
    assert NodeAttempt().told(0, [-1, -(2**63)]) is None
    assert NodeAttempt().told(0, []) is None
    assert NodeAttempt().told(0, [5]) == Attempt(0, step=5)


def test_a_node_tells_the_last_saves():
    node = NodeAttempt()
    for step in range(MAX_TOLD + 10):
        node.save(at(step))
    node.save(at(20))
    told = node.told(0, [])
    assert told is not None
    assert [each.step for each in told.saved] == [*range(10, 20), *range(21, MAX_TOLD + 10), 20]


# -- the leader ---------------------------------------------------------------------------------------------------


class Training:
    """Two nodes that train, of which one has the rank that reports."""

    def __init__(self, **options) -> None:
        self.world = World(2, 2, max_restarts=100, **options)
        self.world.come("n0", "n1")
        self.end(at(10), at(20), at(30), step=30)

    def end(self, *saved: Checkpoint, resumed: Checkpoint = BEGINNING, step: int = -1, cause=CRASH) -> None:
        """The round ends as `cause` says, on n1; n0 tells of it."""
        self.world.report("n1", FAILED, cause)
        self.ready(resumed, *saved, step=step)

    def ready(self, resumed: Checkpoint, *saved: Checkpoint, step: int = -1, round_: int | None = None) -> None:
        world = self.world
        round_ = world.job.memory.round if round_ is None else round_
        for name, attempt in (("n0", Attempt(round_, 0, resumed, step, saved)), ("n1", Attempt(round_, step=step))):
            world.tell(Ready(name, 40000, attempt))

    @property
    def hints(self) -> list[ResumeHint | None]:
        return [hint_of(self.world.assigned(name).memory.ladder) for name in ("n0", "n1")]


def test_all_nodes_are_told_the_same_after_enough_failures_and_one_warning_is_given():
    training = Training()
    for cause in (Exited(1), Hung("no heartbeat"), Exited(1)):
        assert training.hints == [None, None]
        training.end(resumed=at(30), cause=cause)
    assert training.hints == [ResumeHint("/c/20", 20, ("/c/30",))] * 2
    (warning,) = training.world.job.warnings
    assert warning.startswith("3 attempts from /c/30 (step 30) failed")


def test_the_end_of_the_ladder_is_the_end_of_the_job_for_all():
    training = Training(suspect_after=1)
    training.end(resumed=at(30))
    training.end(resumed=at(30))
    for name in ("n0", "n1"):
        cause = training.world.outcome_of(name)
        assert isinstance(cause, Exhausted)
        assert "/c/30 (step 30) was tried 2 times" in cause.description


def test_an_attempt_of_another_round_is_not_heeded():
    training = Training(suspect_after=1)
    training.world.report("n1", FAILED)
    training.ready(at(30), round_=training.world.job.memory.round - 1)
    assert training.hints == [None, None]


def test_the_loss_of_a_node_does_not_count_against_a_checkpoint():
    training = Training(suspect_after=1)
    training.end(resumed=at(30), cause=NodeLost("n1", "it lost contact"))
    assert training.hints == [None, None]
    world = training.world
    world.tell(Lost("n1", DIED))
    world.tell(Ready("n0", 40000, Attempt(world.job.memory.round, 0, at(30))))
    world.tell(Joined(world.node("n1", "n1b")))
    world.tell(Ready("n1b", 40000))
    assert hint_of(world.assigned("n0").memory.ladder) is None
    assert hint_of(world.assigned("n1b").memory.ladder) is None


def test_a_change_of_membership_does_not_count_against_a_checkpoint():
    world = World(1, 2, max_restarts=100, suspect_after=1)
    world.come("n0")
    world.wait(100)
    world.come("n1")
    assert [message for _, message in world.last if isinstance(message, Stop)]
    world.tell(Ready("n0", 40000, Attempt(0, 0, at(30))))
    assert world.assigned("n1").memory.round == 1
    assert world.assigned("n1").memory.ladder == Ladder((Rung("/c/30", 30),))
    world.tell(Left("n1"))
    world.tell(Ready("n0", 40000, Attempt(1, 0, at(30))))
    assert world.assigned("n0").memory.ladder == Ladder((Rung("/c/30", 30),))


def test_a_preemption_does_not_count_against_a_checkpoint():
    world = World(1, 2, max_restarts=100, suspect_after=1)
    world.come("n0", "n1")
    world.tell(Noticed("n1", "SIGTERM", 30.0))
    world.report("n0", NodeState.PREEMPTED)
    world.report("n1", NodeState.PREEMPTED)
    world.tell(Ready("n0", 40000, Attempt(0, 0, at(30))))
    assert world.assigned("n0").reason.kind == "node_preempted"
    assert world.assigned("n0").memory.ladder == Ladder((Rung("/c/30", 30),))
    assert isinstance(world.outcome_of("n1"), Preempted)


def test_an_exclusion_does_not_count_against_a_checkpoint():
    world = World(1, 2, max_restarts=100, suspect_after=1)
    world.come("n0", "n1")
    world.report("n1", FAILED)
    world.tell(world.excluded("n1"))
    world.tell(Ready("n0", 40000, Attempt(0, 0, at(30))))
    assert world.assigned("n0").memory.ladder == Ladder((Rung("/c/30", 30),))


def test_another_host_goes_on_with_what_the_nodes_remember():
    ladder = Ladder((Rung("/c/20", 20),), (Rung("/c/30", 30, 3),))
    world = World(1, 1, memory=Memory(epoch=1, round=5, nodes=1, voters=1, ladder=ladder), endpoints=3, endpoint=1)
    world.tell(Joined(world.node("n0"), Memory(epoch=1, round=5, nodes=1, voters=1, ladder=ladder), 0))
    world.tell(Ready("n0", 40000, Attempt(5, 0, at(20), 25, (at(25),))))
    world.wait(100)
    assert hint_of(world.assigned("n0").memory.ladder) == ResumeHint("/c/25", 25, ("/c/30",))


def test_who_reports_nothing_adds_no_byte_to_what_nodes_tell_each_other():
    for record in (Ready("n0", 1), End(None)):
        assert b"attempt" not in encode(record)
    world = World(1, 1)
    world.come("n0")
    assigned = world.assigned("n0")
    assert isinstance(assigned, Assigned)
    assert b"ladder" not in encode(assigned)


@pytest.mark.parametrize("hint", [ResumeHint('/c/ä "b"', 20, ("/c/30",)), ResumeHint(None, None, ("/c/30",))])
def test_a_hint_is_the_same_behind_the_variable(hint):
    text = msgspec.json.encode(hint).decode()
    assert json.loads(text)["suspects"] == ["/c/30"]
    assert msgspec.json.decode(text, type=ResumeHint) == hint
