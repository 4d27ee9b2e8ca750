"""Fault tolerance of Ray actors under a real Ray, with real ends of processes."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ft_launcher.errors import UsageError
from ft_launcher.integrations.ray_actors import (
    ActorMetrics,
    HealthMonitor,
    Limits,
    PoisonCallError,
    RayFaultToleranceConfig,
    RestartsExhaustedError,
    SupervisedActor,
    fuse_roles,
    no_retry,
)
from ft_launcher.integrations.ray_member import may_repeat
from tests.ray_local import local_ray

CONFIG = RayFaultToleranceConfig()
OFTEN = Limits(ping_every=0.1, ping_timeout=3, missed_pings=2)
"""A healthy actor on a machine with too much to do answers within this."""


@pytest.fixture(scope="module", autouse=True)
def a_ray():
    with local_ray():
        yield


@pytest.fixture
def notes(tmp_path):
    return Notes(tmp_path)


class Notes:
    """What actors leave behind for the test: one line per event, in files that outlive them."""

    def __init__(self, directory):
        self.directory = Path(directory)

    def add(self, name, text):
        with (self.directory / name).open("a") as file:
            file.write(f"{text}\n")

    def wait_for(self, name):
        wait_until(lambda: self.read(name))

    def read(self, name):
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []


class Worker:
    """Has a state that an initialisation brings, and dies on demand."""

    def __init__(self, notes):
        self.notes = notes
        self.state = None
        notes.add("pids", os.getpid())

    def load(self, restart):
        self.notes.add("loads", restart)
        self.state = 42

    def pid(self):
        return os.getpid()

    def read(self, plus=0):
        return self.state + plus

    def crash_before(self, attempt):
        """End this process in each attempt before this one."""
        self.notes.add("attempts", os.getpid())
        if len(self.notes.read("attempts")) < attempt:
            os._exit(3)
        self.notes.add("notes", self.state)
        return self.state

    def note(self, text):
        self.notes.add("notes", text)

    def crash(self, *_):
        self.notes.add("crashes", os.getpid())
        os.kill(os.getpid(), signal.SIGKILL)

    @no_retry
    def step(self, how):
        self.notes.add("steps", os.getpid())
        if how == "crash":
            os._exit(3)
        return "stepped"

    def refuse(self):
        self.notes.add("refusals", os.getpid())
        raise LookupError("no such sample")

    def sleep(self, seconds):
        self.notes.add("sleeps", os.getpid())
        time.sleep(seconds)
        return "slept"


def load(worker, restart):
    worker.load(restart)


def supervise(notes, **settings):
    settings.setdefault("config", CONFIG)
    settings.setdefault("init", load)
    settings.setdefault("options", {"num_cpus": 0})
    return SupervisedActor(Worker, (notes,), role="critic", **settings)


def kill(pid, signum=signal.SIGKILL):
    os.kill(pid, signum)


def test_Y1_a_call_that_its_actor_died_of_succeeds_in_the_next_which_is_initialised_before(notes):
    metrics = ActorMetrics()
    with supervise(notes, metrics=metrics) as actor:
        assert actor.call("crash_before", 2) == 42
        assert actor.restarts == 1
        assert notes.read("loads") == ["0", "1"]
        assert len(set(notes.read("pids"))) == 2
        emitted = metrics.emit(1)
    assert (emitted["actor_failures/critic"], emitted["actor_restarts/critic"]) == (1, 1)


def test_Y2_there_is_no_process_beyond_the_budget(notes):
    with supervise(notes, poison_after=None) as actor:
        for _ in range(3):
            with pytest.raises(RayActorError):
                actor.call("step", "crash")
        with pytest.raises(RayActorError):
            actor.call("step", "crash")
        with pytest.raises(RestartsExhaustedError, match="no restart left of 3"):
            actor.call("read")
        assert actor.restarts == 3
    assert len(set(notes.read("pids"))) == 4


@pytest.mark.parametrize("retries", [0, 2])
def test_Y3_a_call_is_tried_again_as_often_as_it_may_be(notes, retries):
    config = RayFaultToleranceConfig(max_restarts=9, max_task_retries=retries)
    with supervise(notes, config=config, poison_after=None) as actor:
        with pytest.raises(RayActorError):
            actor.call("crash")
        assert len(notes.read("crashes")) == retries + 1
        assert actor.call("read") == 42


def test_Y3_a_call_without_limit_is_tried_until_it_succeeds(notes):
    config = RayFaultToleranceConfig(max_restarts=-1, max_task_retries=-1)
    with supervise(notes, config=config, poison_after=None) as actor:
        assert actor.call("crash_before", 6) == 42
    assert len(notes.read("attempts")) == 6


def test_Y4_a_poisonous_call_leaves_some_of_the_budget_and_hurts_no_other_call(notes):
    with supervise(notes) as actor:
        actor.ready(60)
        before = [actor.submit("read", 1) for _ in range(3)]
        poison = actor.submit("crash", "bad sample")
        behind = [actor.submit("read", 2) for _ in range(3)]
        with pytest.raises(PoisonCallError, match="critic: 'crash' ended 2 processes"):
            poison.result()
        assert [each.result() for each in (*before, *behind)] == [43] * 3 + [44] * 3
        assert actor.restarts == 2 < CONFIG.max_restarts
        assert len(notes.read("crashes")) == 2


def test_Y4_of_calls_that_run_side_by_side_only_the_poisonous_one_is_given_up(notes):
    options = {"num_cpus": 0, "max_concurrency": 3}
    with supervise(notes, options=options, config=RayFaultToleranceConfig(max_restarts=9)) as actor:
        calls = [actor.submit("sleep", 0.3), actor.submit("crash"), actor.submit("sleep", 0.3)]
        assert [calls[0].result(), calls[2].result()] == ["slept", "slept"]
        with pytest.raises(PoisonCallError):
            calls[1].result()


def test_a_call_that_must_not_run_twice_does_not_though_its_actor_is_there_again(notes):
    with supervise(notes) as actor:
        with pytest.raises(RayActorError):
            actor.call("step", "crash")
        assert len(notes.read("steps")) == 1
        assert actor.call("step", "well") == "stepped"
        assert actor.restarts == 1


def test_calls_keep_their_order_over_a_death(notes):
    with supervise(notes) as actor:
        calls = [
            actor.submit("note", 0),
            actor.submit("crash_before", 2),
            *(actor.submit("note", n) for n in (1, 2, 3)),
        ]
        for call in calls:
            call.result()
        assert actor.restarts == 1
    assert notes.read("notes") == ["0", "42", "1", "2", "3"]


def test_an_exception_in_a_method_is_the_callers_and_costs_no_restart(notes):
    with supervise(notes) as actor:
        pid = actor.call("pid")
        with pytest.raises(LookupError, match="no such sample"):
            actor.call("refuse")
        assert actor.call("pid") == pid
        assert (actor.restarts, len(notes.read("refusals"))) == (0, 1)


def test_results_of_earlier_calls_and_of_other_actors_can_be_arguments(notes):
    with supervise(notes) as actor:
        assert actor.call("read", plus=ray.put(8)) == 50


def test_an_actor_killed_by_ray_comes_back_without_being_called(notes):
    with supervise(notes) as actor:
        actor.ready(60)
        first = actor.pid
        ray.kill(actor.handle)
        wait_until(lambda: actor.pid not in (None, first))
        assert actor.restarts == 1
        assert actor.call("read") == 42


def test_with_fault_tolerance_off_an_actor_that_dies_stays_dead(notes):
    with supervise(notes, config=RayFaultToleranceConfig(enable_fault_tolerance=False)) as actor:
        with pytest.raises(RayActorError):
            actor.call("crash")
        with pytest.raises(RayActorError):
            actor.call("read")
    assert len(notes.read("pids")) == 1


def test_an_initialisation_that_fails_the_first_time_is_the_callers_error(notes):
    def fail(worker, restart):
        raise ValueError("no checkpoint directory")

    with supervise(notes, init=fail) as actor:
        for ask in (lambda: actor.ready(60), lambda: actor.call("read")):
            with pytest.raises(ValueError, match="no checkpoint directory"):
                ask()
    assert len(notes.read("pids")) == 1


def test_an_initialisation_that_fails_after_a_restart_uses_up_the_budget_and_is_named(notes):
    def fail_later(worker, restart):
        if restart:
            raise ValueError("the shard is gone")

    with supervise(notes, init=fail_later) as actor:
        actor.ready(60)
        kill(actor.pid)
        wait_until(lambda: len(notes.read("pids")) == 4)
        with pytest.raises(RestartsExhaustedError, match="the shard is gone") as raised:
            actor.call("read")
        assert isinstance(raised.value.__cause__, ValueError)


class Unmakeable:
    def __init__(self):
        raise ValueError("no device")

    def use(self):
        pass


def test_a_constructor_that_raises_is_the_callers_error():
    with SupervisedActor(Unmakeable, config=CONFIG, options={"num_cpus": 0}) as actor:
        with pytest.raises(RayActorError, match="no device"):
            actor.ready(60)
        with pytest.raises(RayActorError, match="no device"):
            actor.call("use")
        assert actor.restarts == 0


# -- health -----------------------------------------------------------------------------------------------------------


def wait_until(holds, seconds=60.0):
    """Look again and again: what an actor becomes has no event for those outside."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        threading.Event().wait(0.01)


def test_Y5_a_stopped_process_is_unhealthy_and_healthy_again_when_it_goes_on(notes):
    metrics = ActorMetrics()
    patient = Limits(ping_every=0.2, ping_timeout=0.3, missed_pings=None)
    with supervise(notes, limits=patient) as actor:
        monitor = HealthMonitor([actor], CONFIG, metrics)
        actor.ready(60)
        pid = actor.pid
        assert monitor.look() == {"critic": True}
        kill(pid, signal.SIGSTOP)
        wait_until(lambda: not actor.is_healthy)
        assert monitor.look() == {"critic": False}
        kill(pid, signal.SIGCONT)
        wait_until(lambda: actor.is_healthy)
        assert monitor.look() == {"critic": True}
        assert (actor.restarts, actor.pid) == (0, pid)


def test_Y5_a_process_that_stays_stopped_is_replaced(notes):
    with supervise(notes, limits=OFTEN) as actor:
        actor.ready(60)
        first = actor.pid
        waiting = actor.submit("sleep", 0)
        waiting.result()
        kill(first, signal.SIGSTOP)
        assert actor.call("read") == 42
        assert actor.pid != first
        assert actor.restarts == 1


def test_a_call_that_holds_the_interpreters_lock_is_found_by_missed_pings(notes):
    with supervise_class(Spinner, notes, limits=OFTEN) as actor:
        assert actor.call("spin_in_the_first") == "done"
        assert actor.restarts == 1


def test_a_call_past_its_limit_is_ended_and_sent_again(notes):
    limits = Limits(ping_every=5, calls={"hang_in_the_first": 0.5})
    with supervise_class(Spinner, notes, limits=limits) as actor:
        assert actor.call("hang_in_the_first") == "done"
        assert actor.restarts == 1


def test_a_process_that_is_stopped_in_its_initialisation_is_replaced(notes):
    def stop_once(worker, restart):
        if restart == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        load(worker, restart)

    with supervise(notes, init=stop_once, limits=OFTEN) as actor:
        assert actor.call("read") == 42
        assert actor.restarts == 1


def test_a_start_past_its_limit_is_ended_and_tried_again(notes):
    def hang_once(worker, restart):
        if restart == 0:
            threading.Event().wait()

    with supervise(notes, init=hang_once, limits=Limits(start=10)) as actor:
        actor.ready(60)
        assert actor.restarts == 1


def test_Y10_a_slow_call_is_not_a_hung_one(notes):
    with supervise(notes, limits=Limits(ping_every=0.2, ping_timeout=5, missed_pings=1)) as actor:
        assert actor.call("sleep", 10) == "slept"
        assert actor.restarts == 0


class Spinner:
    def __init__(self, notes):
        self.notes = notes
        notes.add("spinners", os.getpid())

    def _is_first(self):
        return len(self.notes.read("spinners")) == 1

    def spin_in_the_first(self):
        if self._is_first():
            import re

            re.match(r"(a+)+b", "a" * 60)  # C code that holds the lock for years
        return "done"

    def hang_in_the_first(self):
        if self._is_first():
            threading.Event().wait()
        return "done"


def supervise_class(cls, notes, **settings):
    return SupervisedActor(cls, (notes,), config=CONFIG, options={"num_cpus": 0}, **settings)


class Streams:
    """Its methods are coroutines."""

    def __init__(self, notes):
        self.notes = notes
        notes.add("streams", os.getpid())
        self.state = None

    async def load(self):
        self.state = 5

    async def read(self):
        return self.state

    async def crash_before(self, attempt):
        if len(self.notes.read("streams")) < attempt:
            os._exit(1)
        return self.state

    def block(self, seconds):
        time.sleep(seconds)  # the event loop, too
        return "blocked"


async def load_stream(stream, restart):
    await stream.load()


def test_an_actor_of_coroutines_is_supervised_as_any_other(notes):
    limits = Limits(ping_every=0.1, ping_timeout=5, missed_pings=1)
    with SupervisedActor(
        Streams, (notes,), config=CONFIG, init=load_stream, options={"num_cpus": 0}, limits=limits
    ) as actor:
        assert actor.call("read") == 5
        assert actor.call("crash_before", 2) == 5
        assert actor.call("block", 7) == "blocked"
        assert actor.restarts == 1


# -- options ----------------------------------------------------------------------------------------------------------


class Rollout:
    def __init__(self, start=0):
        self.count = start

    def generate(self):
        self.count += 1
        return self.count

    def crash(self):
        os._exit(1)


class Reward:
    def __init__(self, scale):
        self.scale = scale

    @no_retry
    def score(self, value):
        return self.scale * value


def test_Y6_a_class_fused_of_two_roles_keeps_its_restarts_and_its_options():
    fused = fuse_roles(rollout=Rollout, reward=Reward)
    arguments = {"rollout": (), "reward": {"scale": 3}}
    with SupervisedActor(fused, kwargs=arguments, config=CONFIG, options={"num_cpus": 2}) as actor:
        assert (actor.call("rollout_generate"), actor.call("reward_score", 4)) == (1, 12)
        with pytest.raises(PoisonCallError):
            actor.call("rollout_crash")
        assert actor.call("rollout_generate") == 1
        assert actor.restarts == 2
        wait_until(lambda: ray.available_resources().get("CPU") == 2)
    assert not may_repeat(fused, "reward_score")
    with pytest.raises(UsageError, match="critic: no such role; there are rollout, reward"):
        fused(rollout=(), reward=(1,), critic=())


def test_Y6_an_option_that_the_actor_runs_without_is_said():
    group = placement_group([{"CPU": 1}])
    try:
        ray.get(group.ready())
        strategy = PlacementGroupSchedulingStrategy(group, 0)
        options = {"num_cpus": 1, "scheduling_strategy": strategy}
        with SupervisedActor(Rollout, config=CONFIG, options=options) as actor:
            assert actor.call("generate") == 1
            actor._blueprint._resources = {"CPU": 2, "disk": 1}  # as if Ray had not heeded what was asked for
            kill(actor.pid)
            with pytest.raises(UsageError, match=r"CPU=2 \(has 1\), disk=1 \(has 0\)"):
                actor.call("generate")
    finally:
        remove_placement_group(group)


@pytest.mark.parametrize("name", ["max_restarts", "max_task_retries", "lifetime", "get_if_exists"])
def test_Y6_an_option_that_is_not_ones_own_to_set_is_refused(name):
    with pytest.raises(UsageError, match=f"options: {name}=1: must not be there"):
        SupervisedActor(Rollout, config=CONFIG, options={name: 1})


def test_Y6_an_option_that_ray_does_not_know_is_said_by_ready():
    with (
        SupervisedActor(Rollout, config=CONFIG, options={"cpus": 1}) as actor,
        pytest.raises(ValueError, match="cpus"),
    ):
        actor.ready(60)


def test_Y6_a_class_that_ray_has_made_its_own_is_refused():
    with pytest.raises(UsageError, match="must be the class itself"):
        SupervisedActor(ray.remote(max_restarts=3)(Rollout), config=CONFIG)


def test_a_method_that_the_class_has_not_is_said_before_anything_is_sent(notes):
    with supervise(notes) as actor, pytest.raises(AttributeError, match="updat"):
        actor.call("updat")


def test_an_argument_that_cannot_be_sent_is_the_callers_error(notes):
    with supervise(notes) as actor:
        with pytest.raises(TypeError):
            actor.call("read", threading.Lock())
        assert actor.call("read") == 42


def test_a_closed_actor_answers_nothing_and_leaves_no_process(notes):
    actor = supervise(notes)
    pid = actor.call("pid")
    waiting = actor.submit("sleep", 3600)
    actor.close()
    with pytest.raises(RayActorError, match="closed"):
        waiting.result()
    with pytest.raises(RayActorError, match="closed"):
        actor.call("read")
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert actor.check().result() is False
    actor.close()


# -- metrics over a training ------------------------------------------------------------------------------------------


def test_Y7_the_monitor_tells_each_step_and_looks_at_health_every_so_many(notes, tmp_path):
    metrics = ActorMetrics(roles=("critic",))
    config = RayFaultToleranceConfig(health_check_interval=2)
    with supervise(notes, metrics=metrics) as actor:
        monitor = HealthMonitor([actor], config, metrics)
        actor.ready(60)
        told = [monitor.step(step) for step in (1, 2, 3)]
        actor.call("crash_before", 2)
        told.append(monitor.step(4))
    assert ["actor_health/critic" in each for each in told] == [False, True, False, True]
    assert [each["actor_failures/total"] for each in told] == [0, 0, 0, 1]
    assert json.dumps(told[3])


def test_Y7_a_training_that_goes_back_is_looked_at_again_on_its_way(notes):
    metrics = ActorMetrics(roles=("critic",))
    with supervise(notes, metrics=metrics) as actor:
        monitor = HealthMonitor([actor], RayFaultToleranceConfig(health_check_interval=2.5), metrics)
        actor.ready(60)
        steps = (1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 11)
        looked_at = [step for step in steps if "actor_health/critic" in monitor.step(step)]
    assert looked_at == [3, 5, 2, 3, 5, 11]
