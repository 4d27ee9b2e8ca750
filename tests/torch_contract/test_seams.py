"""The seams of torch that ft_launcher leans on, against the torch that is installed.

A new torch breaks these first, and each failure says in one sentence which seam moved. What torch may add (a
parameter with a default, a field, a flag) breaks nothing, and neither does a fault of torch's that is mended.
"""

import argparse
import inspect
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore  # where they are defined, and typed
from torch.distributed import run as torchrun
from torch.distributed.argparse_util import env
from torch.distributed.elastic import events, metrics
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.metrics.api import MetricsConfig
from torch.distributed.elastic.multiprocessing.api import (
    DefaultLogsSpecs,
    PContext,
    SignalException,
    SubprocessContext,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.elastic.rendezvous.api import (
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.elastic.utils import store as store_util
from torch.distributed.launcher.api import LaunchConfig

HOST = "127.0.0.1"
DEADLINE = 60.0
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


# -- names and signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_setup_local_watchdog", ["self", "envs"]),
        ("_start_workers", ["self", "worker_group"]),
        ("_monitor_workers", ["self", "worker_group"]),
        ("_assign_worker_ranks", ["self", "store", "group_rank", "group_world_size", "spec"]),
        ("_exit_barrier", ["self"]),
    ],
)
def test_the_methods_we_override_have_the_parameters_that_we_take(name: str, expected: list[str]) -> None:
    method = getattr(LocalElasticAgent, name, None)
    assert method is not None, f"LocalElasticAgent.{name}, which FtAgent overrides, is gone"
    found = list(inspect.signature(method).parameters)
    assert found == expected, f"LocalElasticAgent.{name} takes {found}; FtAgent overrides it with {expected}"


def test_stop_workers_takes_the_group_and_nothing_else_that_it_must_be_given() -> None:
    parameters = list(inspect.signature(LocalElasticAgent._stop_workers).parameters.values())
    names = [each.name for each in parameters]
    assert names[:2] == ["self", "worker_group"], f"_stop_workers takes {names}, not the group first"
    required = [each.name for each in parameters[2:] if each.default is inspect.Parameter.empty]
    assert not required, (
        f"LocalElasticAgent._stop_workers must now be given {required}, which FtAgent only passes through"
    )


@pytest.mark.parametrize(
    ("called", "arguments", "keywords"),
    [
        (PContext.close, ("self", signal.SIGTERM, 0.5), {}),
        (PContext.pids, ("self",), {}),
        (PContext.wait, ("self", 0), {}),
        (torchrun.get_args_parser, (), {}),
        (torchrun.config_from_args, ("args",), {}),
        (torchrun.parse_min_max_nnodes, ("1:2",), {}),
        (RendezvousStoreInfo.build, (0, "store", HOST), {"server_port": 1}),
        (get_rendezvous_handler, ("parameters",), {}),
        (parse_rendezvous_endpoint, ("localhost:0",), {"default_port": 0}),
        (store_util.barrier, ("store", 1, "prefix"), {"barrier_timeout": 1.0}),
        (ProcessFailure, (0, 1, -9, "error.json"), {}),
        (ChildFailedError, ("name", {}), {}),
        (SignalException, ("text",), {"sigval": signal.SIGTERM}),
        (RunResult, (WorkerState.FAILED,), {"failures": {}}),
        (Worker, (0,), {"global_rank": 2, "role_rank": 2, "world_size": 4, "role_world_size": 4}),
        (record, ("function",), {}),
        (events.record, ("event", "null"), {}),
        (metrics.initialize_metrics, ("config",), {}),
        (MetricsConfig, ({},), {}),
        (LocalElasticAgent.get_event_succeeded, ("self",), {}),
        (LocalElasticAgent.get_event_failed, ("self",), {}),
        (
            LocalElasticAgent,
            (),
            dict.fromkeys(
                ("spec", "logs_specs", "start_method", "log_line_prefix_template", "exit_barrier_timeout"),
                None,
            ),
        ),
        (
            RendezvousParameters,
            ("c10d", "localhost:0", "id", 1, 1),
            {"local_addr": None, "any_option": "of --rdzv-conf"},
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_what_we_call_can_be_called_as_we_call_it(
    called: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    signature = inspect.signature(called)
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        pytest.fail(f"{called.__qualname__}{signature} cannot be called as ft_launcher calls it: {error}")


def test_a_rendezvous_handler_is_these_eight_methods() -> None:
    ours = {
        "get_backend",
        "next_rendezvous",
        "is_closed",
        "set_closed",
        "num_nodes_waiting",
        "get_run_id",
        "shutdown",
    }
    needed = set(RendezvousHandler.__abstractmethods__)
    assert needed <= ours, f"RendezvousHandler now demands {needed - ours}, which our handlers do not have"
    gone = [name for name in (*ours, "use_agent_store") if not hasattr(RendezvousHandler, name)]
    assert not gone, f"RendezvousHandler has lost {gone}: torch will not ask our handlers for it"


def test_a_worker_spec_can_be_filled_from_a_launch_config() -> None:
    required = {each.name for each in fields(WorkerSpec) if each.default is each.default_factory is MISSING}
    shared = {each.name for each in fields(WorkerSpec)} & {each.name for each in fields(LaunchConfig)}
    given = {"local_world_size", "entrypoint", "args", "rdzv_handler", "monitor_interval"}
    missing = required - shared - given
    assert not missing, f"WorkerSpec now requires {missing}, which neither LaunchConfig nor ft_launcher gives"
    lost = {"role", "max_restarts", "monitor_interval", "local_addr"} - shared
    assert not lost, f"WorkerSpec and LaunchConfig no longer share {lost}: it would be dropped silently"


def test_a_launch_config_has_what_the_launcher_reads() -> None:
    read = (
        "min_nodes max_nodes nproc_per_node run_id rdzv_backend rdzv_endpoint rdzv_configs local_addr"
        " logs_specs start_method log_line_prefix_template metrics_cfg max_restarts monitor_interval"
    )
    lost = set(read.split()) - {each.name for each in fields(LaunchConfig)}
    assert not lost, f"LaunchConfig has lost {lost}, which the launcher reads"


# -- the command line ---------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Any other parser: torch's actions have to work in it."""


def _parse(*argv: str) -> argparse.Namespace:
    parser = _Parser(parents=[torchrun.get_args_parser()], conflict_handler="resolve")
    parser.add_argument_group("ours").add_argument("--ft-x", "--ft_x", action=env, type=float, default=None)
    return parser.parse_args(argv)


def test_torchs_parser_can_be_the_parent_of_another() -> None:
    parsed = _parse("--nnodes", "1:2", "--nproc_per_node=3", "--rdzv-conf", "a=1", "--ft-x", "2", "train.py")
    seen = (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_conf, parsed.ft_x, parsed.training_script)
    assert seen == ("1:2", "3", "a=1", 2.0, "train.py"), "torch's parser as a parent of ours loses its flags"


def test_torchs_flags_still_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_RESTARTS", "7"), ("STANDALONE", "1"), ("FT_X", "0.5")):
        monkeypatch.setenv(f"PET_{name}", value)
    parsed = _parse("--no-python", "train")
    seen = (parsed.max_restarts, parsed.standalone, parsed.ft_x)
    assert seen == (7, True, 0.5), f"torch's env actions do not read PET_* in our parser: {seen}"
    assert _parse("--max-restarts", "1", "train").max_restarts == 1, "PET_* has won over the command line"


def test_what_follows_the_script_belongs_to_it() -> None:
    behind = ["--max-restarts", "9", "--ft-x", "1", "-h", "--", "-m"]
    parsed = _parse("--max-restarts", "2", "train.py", *behind)
    assert parsed.training_script_args == behind, "REMAINDER no longer leaves the script its arguments"
    assert (parsed.max_restarts, parsed.ft_x) == (2, None), "the launcher took an argument of the script"


def test_prefixes_of_flags_are_understood() -> None:
    parsed = _parse("--nproc-per", "2", "--max-r=3", "train.py")
    assert (parsed.nproc_per_node, parsed.max_restarts) == ("2", 3), "flags can no longer be abbreviated"


def test_arguments_become_a_config_and_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else torch sets it, in our environment too
    flags = ("--max-restarts", "4", "--nproc-per-node", "2", f"--log-dir={tmp_path}")
    parsed = _parse(*flags, "train.py", "--lr", "1")
    config, entrypoint, arguments = torchrun.config_from_args(parsed)
    assert (config.max_restarts, config.nproc_per_node, config.min_nodes, config.max_nodes) == (4, 2, 1, 1), (
        "config_from_args no longer carries the flags into the LaunchConfig"
    )
    assert isinstance(entrypoint, str), "config_from_args no longer gives the interpreter as the entrypoint"
    assert arguments == ["-u", "train.py", "--lr", "1"], "config_from_args builds another command line"
    assert isinstance(config.logs_specs, DefaultLogsSpecs), "config_from_args makes other logs specs"


@pytest.mark.parametrize(("flags", "standalone"), [(("--standalone",), True), ((), False)])
def test_a_single_node_gets_a_rendezvous_of_its_own(
    flags: tuple[str, ...], standalone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ft_launcher says again what run() makes of these, since run() starts the job itself: here a recorder.
    configs: list[LaunchConfig] = []

    def recorder(config: LaunchConfig, **_: Any) -> Callable[..., None]:
        configs.append(config)
        return lambda *_: None

    monkeypatch.setattr(torchrun, "elastic_launch", recorder)
    run: Any = torchrun.run  # it has no types
    run(_parse(*flags, f"--log-dir={tmp_path}", "train.py"))
    chosen = (configs[0].rdzv_backend, configs[0].rdzv_endpoint)
    known = {("c10d", "localhost:0")} | (set() if standalone else {("static", f"{HOST}:29500")})  # before 2.8
    assert chosen in known, f"torchrun.run now gives {flags or 'a bare single node'} the rendezvous {chosen}"


# -- the agent's loop, with real workers --------------------------------------------------------------------


class _Alone(RendezvousHandler):
    """A node on its own, as the launcher's: a HashStore for the agent, another port in each round."""

    def __init__(self, calls: list[str], leave_in_round: int | None = None) -> None:
        self._calls = calls
        self._leave_in_round = leave_in_round
        self.is_over_in_round: int | None = None
        self.rounds = 0

    def get_backend(self) -> str:
        return "alone"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        self._calls.append("rendezvous")
        self.rounds += 1
        if self.rounds == self._leave_in_round:
            raise RendezvousGracefulExitError
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(HOST, 50000 + self.rounds))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return int(self.rounds == self.is_over_in_round)

    def get_run_id(self) -> str:
        return "seams"

    def shutdown(self) -> bool:
        return True


Judge = Callable[["_Agent"], RunResult | None]


class _Agent(LocalElasticAgent):
    """Records the order of torch's calls; `judge` may give the result in place of torch's."""

    def __init__(self, calls: list[str], spec: WorkerSpec, logs: DefaultLogsSpecs, judge: Judge) -> None:
        super().__init__(spec=spec, logs_specs=logs, exit_barrier_timeout=DEADLINE)
        self._calls = calls
        self._judge = judge
        self.keys: list[int] = []
        self.local_ranks: list[str] = []
        self.started: dict[int, Any] = {}
        self._last: PContext | None = None

    def context(self) -> SubprocessContext:
        assert isinstance(self._pcontext, SubprocessContext), "_pcontext is no SubprocessContext"
        return self._pcontext

    def _setup_local_watchdog(self, envs: dict[int, dict[str, str]]) -> None:
        super()._setup_local_watchdog(envs)
        self._calls.append("watchdog")
        assert self._pcontext is self._last, "_setup_local_watchdog runs after the start of the workers"
        self.keys = list(envs)
        self.local_ranks = [each["LOCAL_RANK"] for each in envs.values()]
        for local_rank, environment in envs.items():
            environment["SEAM"] = str(local_rank)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._calls.append("start")
        self._last = self._pcontext
        self.started = super()._start_workers(worker_group)
        return self.started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._calls[-1] != "monitor":
            self._calls.append("monitor")
        result = self._judge(self)
        return super()._monitor_workers(worker_group) if result is None else result

    def _stop_workers(self, worker_group: WorkerGroup, *args: Any, **kwargs: Any) -> None:
        self._calls.append("stop")
        super()._stop_workers(worker_group, *args, **kwargs)


class _Seams:
    """Makes agents, and ends what they started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[str] = []
        self.agents: list[_Agent] = []

    def agent(
        self,
        script: str,
        judge: Judge = lambda _: None,
        *,
        ranks: int = 1,
        max_restarts: int = 0,
        handler: RendezvousHandler | None = None,
        **spec: Any,
    ) -> _Agent:
        agent = _Agent(
            self.calls,
            WorkerSpec(
                role="default",
                local_world_size=ranks,
                rdzv_handler=handler or _Alone(self.calls),
                entrypoint="/bin/sh",
                args=("-c", script),
                max_restarts=max_restarts,
                monitor_interval=1e-6,
                **spec,
            ),
            DefaultLogsSpecs(str(self.folder / "logs")),
            judge,
        )
        self.agents.append(agent)
        return agent

    def close(self) -> None:
        for agent in self.agents:
            if agent._pcontext is not None:
                agent._pcontext.close(signal.SIGKILL)


@pytest.fixture
def seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Seams]:
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", ",".join(each.name for each in HANDLED))
    before = {number: signal.getsignal(number) for number in HANDLED}
    made = _Seams(tmp_path)
    try:
        yield made
    finally:
        made.close()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Fifo:
    """What a worker's shell tells the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def line(self) -> str:
        assert select.select([self._fd], [], [], DEADLINE)[0], f"no worker wrote within {DEADLINE:g} s"
        return os.read(self._fd, 4096).decode()

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[_Fifo]:
    made = _Fifo(tmp_path / "fifo")
    yield made
    made.close()


def test_the_watchdog_comes_before_the_start_and_holds_the_environment_of_the_workers(seams: _Seams) -> None:
    agent = seams.agent('test "$SEAM" = "$LOCAL_RANK"', ranks=2)
    result = agent.run()
    assert seams.calls[:4] == ["rendezvous", "start", "watchdog", "monitor"], (
        f"torch's order is now {seams.calls}: _setup_local_watchdog is not last before start_processes"
    )
    assert result is not None
    assert result.state == WorkerState.SUCCEEDED, "what _setup_local_watchdog adds does not reach the workers"
    assert agent.keys == [0, 1], f"_setup_local_watchdog's envs are keyed by {agent.keys}, not by local rank"


def test_the_environments_are_keyed_by_the_true_local_rank(seams: _Seams) -> None:
    if "virtual_local_rank" not in {each.name for each in fields(WorkerSpec)}:
        pytest.skip("this torch has no virtual local ranks")
    agent = seams.agent("exit 0", ranks=2, virtual_local_rank=True)
    agent.run()
    assert agent.local_ranks == ["0", "0"], "--virtual-local-rank no longer gives every worker LOCAL_RANK=0"
    assert agent.keys == [0, 1], "--virtual-local-rank: envs are no longer keyed by the true local rank"


def test_start_workers_gives_the_pids_that_the_context_and_the_group_have(seams: _Seams, fifo: _Fifo) -> None:
    seen: dict[str, Any] = {}

    def look(agent: _Agent) -> RunResult | None:
        if not seen:
            fifo.line()
            seen["context"] = agent.context().pids()
            seen["group"] = {each.local_rank: each.id for each in agent.get_worker_group().workers}
            seen["sessions"] = {local_rank: os.getsid(pid) for local_rank, pid in seen["context"].items()}
            os.killpg(seen["context"][0], signal.SIGKILL)
        return None

    agent = seams.agent(f"echo $$ >{fifo.path}; exec sleep 60", look)
    agent.run()
    assert agent.started == seen["context"], "_start_workers no longer gives {local_rank: pid}"
    assert seen["group"] == seen["context"], "Worker.id is no longer the pid of the worker"
    assert seen["sessions"] == seen["context"], "workers no longer lead a session of their own"


def test_a_worker_can_be_polled_and_its_files_found_without_torch(seams: _Seams, fifo: _Fifo) -> None:
    codes: list[int | None] = []

    def look(agent: _Agent) -> RunResult | None:
        context = agent.context()
        process = context.subprocess_handlers[0].proc
        codes.append(process.poll())
        if codes[-1] is None:
            pidfd = os.pidfd_open(process.pid)
            readable = select.select([pidfd], [], [], DEADLINE)[0]
            os.close(pidfd)
            assert readable, "a worker's end cannot be seen through its pidfd"
            return RunResult(state=WorkerState.HEALTHY)
        assert fifo.line().strip() == context.error_files[0], (
            "PContext.error_files no longer names the file that the worker is told in TORCHELASTIC_ERROR_FILE"
        )
        assert set(context.stdouts) == set(context.stderrs) == {0}, "stdouts, stderrs are not by local rank"
        return None

    result = seams.agent(f'echo "$TORCHELASTIC_ERROR_FILE" >{fifo.path}; exit 7', look).run()
    assert codes[-1] == 7, "subprocess_handlers[local_rank].proc is no longer the worker's Popen"
    assert result is not None
    assert result.failures[0].exitcode == 7, "torch's own poll after ours no longer finds the exit code"


def test_a_result_of_ours_is_the_result_of_the_run(seams: _Seams) -> None:
    ours = RunResult(state=WorkerState.FAILED, failures={0: ProcessFailure(0, 1, 3, "no such file")})
    result = seams.agent("exec sleep 60", lambda _: ours).run()
    assert result is ours, "agent.run() no longer returns what _monitor_workers has returned"
    assert seams.calls[-2:] == ["monitor", "stop"], "a failed run no longer ends with _stop_workers"


def test_failed_without_restarts_left_ends_the_run(seams: _Seams) -> None:
    seen: list[int] = []

    def veto(agent: _Agent) -> RunResult | None:
        seen.append(agent._remaining_restarts)
        assert seen[0] == 3, "_remaining_restarts no longer starts at max_restarts"
        agent._remaining_restarts = 0
        return RunResult(state=WorkerState.FAILED, failures={0: ProcessFailure(0, 1, 3, "no such file")})

    result = seams.agent("exec sleep 60", veto, max_restarts=3).run()
    assert result is not None
    assert result.state == WorkerState.FAILED
    assert seams.calls.count("start") == 1, "FAILED with _remaining_restarts == 0 no longer ends the run"


def test_a_restart_stops_meets_and_starts_with_another_store(seams: _Seams, fifo: _Fifo) -> None:
    told = "$TORCHELASTIC_RESTART_COUNT $MASTER_ADDR $MASTER_PORT $TORCHELASTIC_USE_AGENT_STORE"
    script = f'echo "{told}" >{fifo.path}; test "$TORCHELASTIC_RESTART_COUNT" = 1'
    seams.agent(script, max_restarts=1).run()
    rounds = ["rendezvous", "start", "watchdog", "monitor"]
    assert seams.calls == [*rounds, "stop", *rounds], f"a restart now makes these calls: {seams.calls}"
    lines = fifo.line().split("\n")[:-1]
    assert lines == [f"0 {HOST} 50001 True", f"1 {HOST} 50002 True"], (
        f"workers are no longer sent to the store that this round's RendezvousInfo names: {lines}"
    )


def test_ranks_of_ours_are_those_of_the_workers_and_the_barrier_is_asked_for_once(
    seams: _Seams, fifo: _Fifo, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = [Worker(local_rank=0, global_rank=6, role_rank=6, world_size=8, role_world_size=8)]
    monkeypatch.setattr(_Agent, "_assign_worker_ranks", lambda *_: ours, raising=False)
    monkeypatch.setattr(_Agent, "_exit_barrier", lambda self: self._calls.append("barrier"), raising=False)
    result = seams.agent(f'echo "$RANK $WORLD_SIZE $ROLE_RANK" >{fifo.path}').run()
    assert fifo.line() == "6 8 6\n", "the Workers of _assign_worker_ranks no longer make the workers' environment"
    assert result.state == WorkerState.SUCCEEDED
    assert seams.calls.count("barrier") == 1, "_exit_barrier is no longer what a node that succeeded waits in"


def test_a_node_that_waits_restarts_the_workers_without_using_a_restart(seams: _Seams, fifo: _Fifo) -> None:
    handler = _Alone(seams.calls)
    handler.is_over_in_round = 1

    def run_on(_: _Agent) -> RunResult | None:
        return RunResult(WorkerState.HEALTHY) if handler.rounds == 1 else None

    agent = seams.agent(f'echo "$TORCHELASTIC_RESTART_COUNT" >{fifo.path}', run_on, handler=handler)
    result = agent.run()
    assert handler.rounds == 2, "num_nodes_waiting() no longer makes torch restart healthy workers"
    assert result.state == WorkerState.SUCCEEDED
    assert agent._remaining_restarts == 0, "a change of membership now uses a restart"


def test_leaving_the_rendezvous_ends_the_run_with_none(seams: _Seams) -> None:
    handler = _Alone(seams.calls, leave_in_round=2)
    agent = seams.agent("exit 1", max_restarts=5, handler=handler)
    try:
        result = agent.run()
    except Exception as error:  # noqa: BLE001  # whatever it is, the sentence is the same
        pytest.fail(f"a RendezvousGracefulExitError now comes out of agent.run() as {error!r}")
    assert result is None, "a RendezvousGracefulExitError no longer makes agent.run() return None"


def test_a_signal_comes_out_of_the_run_as_torchs_exception(seams: _Seams) -> None:
    def interrupt(_: _Agent) -> RunResult | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return None

    agent = seams.agent("exec sleep 60", interrupt)
    with pytest.raises(SignalException) as caught:
        agent.run()
    assert caught.value.sigval == signal.SIGTERM, "SignalException.sigval no longer says which signal it was"
    workers = [each.proc for each in agent.context().subprocess_handlers.values()]
    left = [each.pid for each in workers if each.poll() is None]
    assert not left, "agent.run() no longer stops its workers on a signal"


def test_close_keeps_the_grace_that_it_is_given_and_may_be_called_again(seams: _Seams, fifo: _Fifo) -> None:
    def stop(agent: _Agent) -> RunResult | None:
        fifo.line()
        agent.context().close(signal.SIGTERM, 0.2)  # type: ignore[arg-type]  # seconds; torch only adds them
        try:
            agent.context().close(signal.SIGTERM, 0.2)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001  # whatever it is, the sentence is the same
            pytest.fail(f"PContext.close may no longer be called twice: {error!r}")
        return None

    result = seams.agent(f"trap '' TERM; echo deaf >{fifo.path}; exec sleep 60", stop).run()
    assert result is not None
    assert result.failures[0].exitcode == -signal.SIGKILL, "PContext.close no longer kills after the grace"
    assert seams.calls[-1] == "stop", "the last call is not torch's own stop, which finds nobody after ours"


def test_a_run_of_the_null_handlers_leaves_events(seams: _Seams) -> None:
    agent = seams.agent("exit 0")
    agent.run()
    metrics.initialize_metrics(MetricsConfig({}))
    events.record(agent.get_event_succeeded(), "null")
    events.record(agent.get_event_failed(), "null")


# -- saying why ---------------------------------------------------------------------------------------------


def test_a_failure_without_an_error_file_carries_a_sentence_of_ours_into_torchs_report() -> None:
    failure = ProcessFailure(1, 4242, -9, "no such file")
    assert isinstance(failure.message, str), "ProcessFailure.message is no text without an error file"
    failure.message = "section 'step' open for 12.3 s"
    report = str(ChildFailedError("train.py", {3: failure}))
    assert failure.message in report, "ChildFailedError no longer prints ProcessFailure.message"
    assert "4242" in report, "ChildFailedError no longer prints the pid of the first failure"


def test_a_result_is_judged_by_its_state() -> None:
    states = {"HEALTHY", "FAILED", "SUCCEEDED", "UNHEALTHY"}
    assert states <= set(WorkerState.__members__), "WorkerState has lost a state that the loop knows"
    found = {each.name for each in fields(RunResult)}
    assert {"state", "return_values", "failures"} <= found, f"RunResult now has the fields {found}"


# -- stores -------------------------------------------------------------------------------------------------


def _serve(listener: socket.socket) -> TCPStore:
    return TCPStore(
        HOST,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=os.dup(listener.fileno()),
    )


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((HOST, 0), backlog=16) as made:
        yield made


def test_a_store_serves_on_a_socket_that_we_bound(listener: socket.socket) -> None:
    served = _serve(listener)
    port = listener.getsockname()[1]
    assert served.port == port, "TCPStore(master_listen_fd=...) serves on another port than its socket's"
    served.set("key", "from the launcher")
    worker = TCPStore(HOST, port, is_master=False, wait_for_workers=False)
    assert worker.get("key") == b"from the launcher", "a TCPStore on our socket does not serve other clients"


def test_a_second_store_on_the_same_socket_serves_again_and_is_empty(listener: socket.socket) -> None:
    first = _serve(listener)
    first.set("key", "of the first round")
    del first
    second = _serve(listener)
    worker = TCPStore(HOST, listener.getsockname()[1], is_master=False, wait_for_workers=False)
    assert not worker.check(["key"]), "a deleted TCPStore's keys are in its successor"
    second.set("key", "of the second round")
    assert worker.get("key") == b"of the second round", "a second TCPStore on the same socket does not serve"


def test_a_hash_store_is_enough_for_an_agent_on_its_own() -> None:
    store: Any = HashStore()  # torch's stub lacks the two
    store.multi_set(["a", "b"], ["1", "2"])
    assert store.multi_get(["a", "b"]) == [b"1", b"2"], "HashStore.multi_get does not fit multi_set"
    store_util.barrier(store, 1, "over", barrier_timeout=5.0)  # raises if it waits for others


def test_an_address_can_be_told_through_a_store() -> None:
    store = PrefixStore("round 1", HashStore())
    told = RendezvousStoreInfo.build(0, store, HOST, server_port=4711)
    heard = RendezvousStoreInfo.build(1, store, None)
    assert (told.master_addr, told.master_port) == (HOST, 4711), "RendezvousStoreInfo.build gives another"
    assert heard == told, "RendezvousStoreInfo.build of another rank does not give what rank 0 has told"


def test_torchs_own_handler_opens_no_store_for_workers_when_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    handler = get_rendezvous_handler(RendezvousParameters("c10d", "localhost:0", "seams", 1, 1, HOST))
    try:
        assert not handler.use_agent_store, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE no longer works"
    finally:
        handler.shutdown()
