"""Fault tolerance of Ray actors without Ray: settings, decisions, numbers."""

import json

import pytest

pytest.importorskip("ray")

from prometheus_client import CollectorRegistry

from ft_launcher.errors import UsageError
from ft_launcher.integrations.ray_actors import (
    ActorMetrics,
    FaultToleranceConfig,
    Limits,
    RayFaultToleranceConfig,
    to_json_lines,
    to_prometheus,
    to_tensorboard,
)
from ft_launcher.integrations.ray_policy import Ailing, Budget, Call, Pulse, Verdict, Vitals, after_death

FILE = """
trainer: {epochs: 3}
fault_tolerance:
  enable_fault_tolerance: true
  max_restarts: 5
  max_task_retries: 4
  enable_health_monitoring: off
  health_check_interval: 12.5
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ppo.yaml"
    path.write_text(FILE)
    return path


# -- settings ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_documented_ones():
    assert FaultToleranceConfig is RayFaultToleranceConfig
    assert FaultToleranceConfig().asdict() == {
        "enable_fault_tolerance": True,
        "max_restarts": 3,
        "max_task_retries": 2,
        "enable_health_monitoring": True,
        "health_check_interval": 30.0,
    }


def test_what_is_explicit_goes_before_the_environment_that_before_the_file_and_that_before_defaults(path):
    environment = {"VERL_MAX_RESTARTS": "7", "VERL_MAX_TASK_RETRIES": "6", "VERL_OTHER": "x"}
    config = RayFaultToleranceConfig.resolve(path, environment, max_restarts=9)
    assert (config.max_restarts, config.max_task_retries, config.health_check_interval) == (9, 6, 12.5)
    assert config.enable_health_monitoring is False
    assert RayFaultToleranceConfig.from_yaml(path).max_restarts == 5
    assert RayFaultToleranceConfig.from_env(environment).max_restarts == 7
    assert RayFaultToleranceConfig.resolve(None, {}) == RayFaultToleranceConfig()


def test_each_variable_sets_what_it_names(monkeypatch):
    for variable, text in {
        "VERL_FAULT_TOLERANCE_ENABLED": "False",
        "VERL_MAX_RESTARTS": "5",
        "VERL_MAX_TASK_RETRIES": "-1",
        "VERL_HEALTH_MONITORING_ENABLED": "no",
        "VERL_HEALTH_CHECK_INTERVAL": "10.5",
    }.items():
        monkeypatch.setenv(variable, text)
    assert RayFaultToleranceConfig.resolve() == RayFaultToleranceConfig(
        enable_fault_tolerance=False,
        max_restarts=5,
        max_task_retries=-1,
        enable_health_monitoring=False,
        health_check_interval=10.5,
    )


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("VERL_FAULT_TOLERANCE_ENABLED", "maybe"),
        ("VERL_MAX_RESTARTS", "-2"),
        ("VERL_MAX_RESTARTS", "2.5"),
        ("VERL_MAX_TASK_RETRIES", "many"),
        ("VERL_HEALTH_CHECK_INTERVAL", "0"),
        ("VERL_HEALTH_CHECK_INTERVAL", "nan"),
        ("VERL_HEALTH_CHECK_INTERVAL", "inf"),
        ("VERL_MAX_RESTARTS", ""),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed_even_where_another_source_wins(variable, text):
    with pytest.raises(UsageError, match=f"{variable}=.*must be") as raised:
        RayFaultToleranceConfig.resolve(None, {variable: text}, max_restarts=1, max_task_retries=1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_restarts": -2}, "max_restarts=-2: must be a whole number from 0 on, or -1 for no limit"),
        ({"max_restarts": True}, "max_restarts=True: must be a whole number"),
        ({"max_task_retries": 1.5}, "max_task_retries=1.5: must be a whole number"),
        ({"enable_fault_tolerance": 1}, "enable_fault_tolerance=1: must be true or false"),
        ({"health_check_interval": 0.0}, "health_check_interval=0.0: must be a number of training steps above 0"),
        ({"max_restart": 1}, "max_restart: no such setting; did you mean max_restarts?"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(settings, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        RayFaultToleranceConfig.resolve(None, {}, **settings)


def test_a_bad_file_is_named_with_line_and_key(path):
    path.write_text(FILE.replace("max_restarts: 5", "max_restart: 5"))
    with pytest.raises(UsageError, match=r"ppo.yaml:5: .*max_restart: no such key; did you mean max_restarts\?"):
        RayFaultToleranceConfig.from_yaml(path)
    path.write_text(FILE.replace("max_restarts: 5", "max_restarts: five"))
    with pytest.raises(UsageError, match=r"ppo.yaml:5: .*max_restarts: five: must be a whole number"):
        RayFaultToleranceConfig.from_yaml(path)
    with pytest.raises(UsageError, match="no such file"):
        RayFaultToleranceConfig.from_yaml(path.with_name("other.yaml"))


# -- decisions --------------------------------------------------------------------------------------------------------


def died(call, config=None, *, was_alone=True, node_lost=False, poison_after=2):
    """Let the actor die that runs this call."""
    config = config or RayFaultToleranceConfig()
    return after_death(call, was_alone=was_alone, node_lost=node_lost, config=config, poison_after=poison_after)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_budget_allows_as_many_restarts_as_it_says(limit):
    budget = Budget.of(RayFaultToleranceConfig(max_restarts=limit))
    assert [budget.spend() for _ in range(limit + 2)] == [True] * limit + [False] * 2
    assert budget.used == limit


def test_a_budget_may_have_no_limit_and_is_empty_where_fault_tolerance_is_off():
    unlimited = Budget.of(RayFaultToleranceConfig(max_restarts=-1))
    assert all(unlimited.spend() for _ in range(1000))
    assert str(unlimited) == "restart 1000"
    assert not Budget.of(RayFaultToleranceConfig(enable_fault_tolerance=False)).spend()


@pytest.mark.parametrize("retries", [0, 2, 5])
def test_a_call_is_sent_again_as_often_as_it_may(retries):
    config = RayFaultToleranceConfig(max_task_retries=retries)
    call = Call("update", may_repeat=True)
    verdicts = [died(call, config, poison_after=None) for _ in range(retries + 1)]
    assert verdicts == [Verdict.SEND] * retries + [Verdict.NO_RETRIES_LEFT]


def test_a_call_without_limit_is_sent_again_for_ever():
    config = RayFaultToleranceConfig(max_task_retries=-1)
    call = Call("update", may_repeat=True)
    assert {died(call, config, poison_after=None) for _ in range(1000)} == {Verdict.SEND}


def test_a_call_that_ends_two_actors_is_poison_unless_their_machines_went_away():
    call = Call("update", may_repeat=True)
    assert [died(call), died(call)] == [Verdict.SEND, Verdict.POISON]
    call = Call("update", may_repeat=True)
    unlucky = RayFaultToleranceConfig(max_task_retries=5)
    assert [died(call, unlucky, node_lost=True) for _ in range(4)] == [Verdict.SEND] * 4
    assert [died(call, unlucky), died(call, unlucky)] == [Verdict.SEND, Verdict.POISON]


def test_a_call_that_ran_beside_others_is_poison_only_once_it_has_ended_an_actor_alone():
    call, config = Call("generate", may_repeat=True), RayFaultToleranceConfig(max_task_retries=5)
    alone = []
    for _ in range(2):
        assert died(call, config, was_alone=False) is Verdict.SEND
        alone.append(call.goes_alone)
    assert alone == [False, True]
    assert died(call, config, node_lost=True) is Verdict.SEND
    assert died(call, config) is Verdict.POISON


def test_a_call_that_must_not_run_twice_is_sent_once():
    for node_lost in (False, True):
        assert died(Call("step", may_repeat=False), node_lost=node_lost) is Verdict.NOT_REPEATED


def test_nothing_is_sent_again_where_fault_tolerance_is_off():
    off = RayFaultToleranceConfig(enable_fault_tolerance=False)
    assert died(Call("x", may_repeat=True), off) is Verdict.NO_RETRIES_LEFT


def pulse(*running):
    return Pulse(pid=1, is_initialised=True, running=running)


def test_an_actor_is_hung_after_so_many_missed_pings_in_a_row():
    limits = Limits(missed_pings=3, ping_timeout=2)
    vitals = Vitals(created_at=0.0)
    vitals.ready(1.0)
    assert vitals.is_healthy
    assert [vitals.missed_ping(limits), vitals.missed_ping(limits)] == [None, None]
    assert vitals.missed == 2
    assert vitals.answered(pulse(), limits) is None
    assert vitals.is_healthy
    assert [vitals.missed_ping(limits) for _ in range(3)] == [
        None,
        None,
        Ailing("no answer to 3 pings in a row within 2 s"),
    ]
    assert vitals.missed_ping(Limits(missed_pings=None)) is None


def test_an_actor_is_hung_when_a_call_is_past_its_limit():
    limits = Limits(call=10, calls={"save": 60, "wait": None})
    vitals = Vitals(created_at=0.0)
    vitals.ready(1.0)
    assert vitals.answered(pulse(("save", 30.0), ("wait", 1e6), ("update", 9.9)), limits) is None
    assert vitals.next_look(100.0, limits) == pytest.approx(100.1)
    assert vitals.answered(pulse(("update", 10.0)), limits) == Ailing("'update' has run for 10.0 s, its limit is 10 s")
    assert vitals.answered(pulse(("update", 1e6)), Limits()) is None


def test_an_actor_is_hung_when_its_start_is_past_its_limit():
    vitals = Vitals(created_at=5.0)
    limits = Limits(start=60)
    assert vitals.overdue(64.9, limits) is None
    assert vitals.overdue(65.0, limits) == Ailing("not initialised after 60.0 s, its limit is 60 s")
    assert vitals.overdue(1e6, Limits()) is None
    assert not vitals.is_healthy
    vitals.ready(65.0)
    assert vitals.overdue(1e6, limits) is None
    assert vitals.next_look(66.0, limits) is None


# -- numbers ----------------------------------------------------------------------------------------------------------

NAMES = {
    *(
        f"{what}/{name}"
        for what in ("actor_failures", "actor_restarts")
        for role in ("actor_rollout", "critic", "ref_policy")
        for name in (role, f"{role}_cumulative")
    ),
    "actor_failures/total",
    "actor_restarts/total",
}
HEALTH = {f"actor_health/{role}" for role in ("actor_rollout", "critic", "ref_policy")}


def test_the_metrics_have_the_documented_names_from_the_first_step_on():
    metrics = ActorMetrics()
    assert set(metrics.emit(1)) == NAMES
    health = {"actor_rollout": True, "critic": False, "ref_policy": True}
    assert set(metrics.emit(2, health)) == NAMES | HEALTH
    assert metrics.emit(3, health)["actor_health/critic"] == 0


def test_a_step_has_its_own_numbers_their_sum_and_those_since_the_start():
    metrics = ActorMetrics()
    for role in ("critic", "critic", "actor_rollout"):
        metrics.failed(role)
    metrics.restarted("critic")
    first, second = metrics.emit(1), metrics.emit(2)
    assert (first["actor_failures/critic"], first["actor_failures/actor_rollout"]) == (2, 1)
    assert first["actor_failures/total"] == 3
    assert first["actor_restarts/total"] == first["actor_restarts/critic"] == 1
    assert second["actor_failures/total"] == second["actor_failures/critic"] == 0
    assert second["actor_failures/critic_cumulative"] == 2
    assert second["actor_restarts/critic_cumulative"] == 1


def test_a_role_of_ones_own_is_counted_too():
    metrics = ActorMetrics()
    metrics.failed("reward")
    assert metrics.emit(1)["actor_failures/reward"] == 1


def test_a_sink_that_fails_hinders_neither_the_others_nor_the_training(caplog):
    seen = []

    def broken(metrics, step):
        raise OSError("disk full")

    ActorMetrics([broken, lambda metrics, step: seen.append(step)]).emit(7)
    assert seen == [7]
    assert "a sink of metrics failed at step 7" in caplog.text


def test_the_metrics_go_to_a_file_line_by_line(tmp_path):
    metrics = ActorMetrics([to_json_lines(tmp_path / "metrics.jsonl")])
    emitted = [metrics.emit(1)]
    metrics.failed("critic")
    emitted.append(metrics.emit(2, {"critic": True}))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": step, **each} for step, each in enumerate(emitted, 1)]


def test_the_metrics_go_to_prometheus():
    registry = CollectorRegistry()
    metrics = ActorMetrics([to_prometheus(registry)])
    for step in (1, 2):
        metrics.failed("critic")
        metrics.emit(step, {"critic": step == 2})
    assert registry.get_sample_value("ft_ray_actor_failures_total", {"role": "critic"}) == 2
    assert registry.get_sample_value("ft_ray_actor_restarts_total", {"role": "critic"}) == 0
    assert registry.get_sample_value("ft_ray_actor_health", {"role": "critic"}) == 1
    assert registry.get_sample_value("ft_ray_actor_failures_total", {"role": "total"}) is None


def test_the_metrics_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        metrics = ActorMetrics([to_tensorboard(writer)])
        metrics.failed("critic")
        metrics.emit(1)
        metrics.emit(2)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(each.step, each.value) for each in events.Scalars("actor_failures/critic")] == [(1, 1.0), (2, 0.0)]
    assert set(events.Tags()["scalars"]) == NAMES
