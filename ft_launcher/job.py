"""Runs the job of one node: opens the rendezvous, starts the monitors, lets the agent work, and says how it ended."""

import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from msgspec import Struct
from torch.distributed.elastic import events
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.metrics import initialize_metrics
from torch.distributed.elastic.metrics.api import MetricsConfig
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import (
    RendezvousConnectionError,
    RendezvousParameters,
)
from torch.distributed.launcher.api import LaunchConfig

from ft_launcher import exec_shim, processes, torch_flags
from ft_launcher.agent import FtAgent, Graces
from ft_launcher.causes import LauncherSignalled, NotMonitored, Preempted, exit_code, sentence
from ft_launcher.config import FaultToleranceConfig
from ft_launcher.console import say
from ft_launcher.engines.beside import engine_service
from ft_launcher.errors import UsageError
from ft_launcher.job_rendezvous import JobRendezvous
from ft_launcher.leftovers import prune_empty
from ft_launcher.monitors import RankMonitors
from ft_launcher.noticing import Notices
from ft_launcher.preemption import Watcher, parse_sources
from ft_launcher.rendezvous import JobTerms, open_rendezvous
from ft_launcher.signals import StopSignals

__all__ = ["JobFailedError", "JobOptions", "launch"]

logger = logging.getLogger(__name__)

Entrypoint = Callable[..., Any] | str

EXIT_BARRIER_SECONDS = 300.0
"""Torch's default wait of a node that has finished for the others (LocalElasticAgent)."""


class JobOptions(Struct, frozen=True, kw_only=True):
    """What torch's LaunchConfig has no place for. Times in seconds; None: the configuration's `shutdown_timeout`."""

    stop_grace: float | None = None
    """From SIGTERM to SIGKILL before a restart and after a failure."""
    signal_grace: float | None = None
    """The same after a signal to the launcher."""
    exit_barrier: float = EXIT_BARRIER_SECONDS
    """How long a node that has finished waits for the others."""
    own_log_dir: str = ""
    """Removed at the end, unless it holds something to read."""
    expect_monitoring: bool = False
    """Say so if no rank connected to its monitor."""
    node_rank: int = 0
    """With the static rendezvous: the number of this node."""
    token: bytes | None = None
    """With which nodes seal what they tell each other."""
    placement_path: str = ""
    """The file for the placement of each round, on the host; "": none."""
    service: str = ""
    """The file of the engines to run beside the workers of this node; "": none."""


class JobFailedError(ChildFailedError):
    """Workers of this node failed. Torch's decorator `record` writes the root cause to the launcher's error file."""

    def __init__(self, name: str, failures: dict[int, ProcessFailure], code: int) -> None:
        super().__init__(name, failures)
        self.exit_code = code


def launch(
    config: LaunchConfig,
    entrypoint: Entrypoint,
    args: Sequence[str],
    ft: FaultToleranceConfig,
    options: JobOptions | None = None,
) -> int:
    """Run the job on this node to its end and give the exit code.

    Raises JobFailedError when workers of this node failed, UsageError when the rendezvous cannot be opened with these
    parameters.
    """
    options = options or JobOptions()
    signals: StopSignals | None = None
    try:
        notices = Notices()
        names = getattr(config, "signals_to_handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT")
        signals = StopSignals(names, notices, _as_notices(ft.preemption_signals))
        signals.let_through()
        sources = parse_sources(ft.preemption_sources or "", os.environ)
        _allow_descriptors(config.nproc_per_node)
        processes.become_subreaper()
        rendezvous = _open_rendezvous(config, ft, options)
        initialize_metrics(MetricsConfig(config.metrics_cfg))
        name, spec = _worker_spec(config, entrypoint, args, rendezvous)
        with ExitStack() as stack:
            with signals.held():
                monitors = stack.enter_context(RankMonitors(config.nproc_per_node, ft, options.own_log_dir, os.environ))
            rendezvous.on_lease = monitors.extend_lease
            if options.service:
                stack.enter_context(engine_service(options.service))
            # Torch's own rendezvous, and functions, must be asked for news; from all else there are events.
            has_events = rendezvous.numbers_ranks and isinstance(entrypoint, str)
            agent = FtAgent(
                spec,
                config.logs_specs,
                monitors,
                signals,
                _graces(config, options),
                rendezvous=rendezvous,
                notices=notices,
                preemption_grace=ft.preemption_grace,
                wake_every=None if has_events else config.monitor_interval,
                start_method=config.start_method,
                log_line_prefix_template=config.log_line_prefix_template,
                exit_barrier_timeout=options.exit_barrier,
            )
            watcher = stack.enter_context(Watcher(sources, notices.put_state)) if sources else None
            result = _run(agent, signals, rendezvous, getattr(config, "event_log_handler", "null"))
            if watcher is not None and agent.is_preempted:
                watcher.acknowledge()
        if isinstance(result, signal.Signals) and signals.had_nothing_to_save:
            return _preempted(Preempted(result.name))
        return _outcome(agent, result, name, ft, options)
    except SignalException as received:  # before the first workers, or after the last
        if signals is not None and signals.had_nothing_to_save:
            return _preempted(Preempted(received.sigval.name))
        return _signalled({}, received.sigval)
    finally:
        prune_empty(options.own_log_dir)


def _as_notices(names: str | None) -> tuple[signal.Signals, ...] | None:
    if names is None:
        return None
    return tuple(signal.Signals[name] for name in names.split(",")) if names != "off" else ()


def _allow_descriptors(ranks: int) -> None:
    needed = 64 + 12 * ranks  # measured: 17, and 7 for each rank, or 11 with its output in files
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < needed:
        raise UsageError(f"ulimit -n {hard}: the launcher needs {needed} open files for {ranks} ranks")
    if 0 <= soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _open_rendezvous(config: LaunchConfig, ft: FaultToleranceConfig, options: JobOptions) -> JobRendezvous:
    terms = JobTerms(
        local_world_size=config.nproc_per_node,
        role=config.role,
        restart_policy=ft.restart_policy,
        max_restarts=config.max_restarts,
        suspect_after=ft.suspect_after,
        use_infra_group_rank=ft.use_infra_group_rank,
        token=options.token,
        placement_path=options.placement_path,
    )
    try:
        parameters = RendezvousParameters(
            backend=config.rdzv_backend,
            endpoint=config.rdzv_endpoint,
            run_id=config.run_id,
            min_nodes=config.min_nodes,
            max_nodes=config.max_nodes,
            local_addr=config.local_addr,
            **config.rdzv_configs,
        )
        return open_rendezvous(parameters, terms, os.environ, options.node_rank)
    except (ValueError, OSError, RendezvousConnectionError) as error:
        raise UsageError(torch_flags.rendezvous_complaint(config.rdzv_backend, config.rdzv_endpoint, error)) from error


def _worker_spec(
    config: LaunchConfig, entrypoint: Entrypoint, args: Sequence[str], rendezvous: JobRendezvous
) -> tuple[str, WorkerSpec]:
    """The name for reports, and what torch is to start."""
    name, command = _command(entrypoint, args)
    # Fields that LaunchConfig and WorkerSpec share go across by name, so those of a newer torch do too.
    shared = {each.name: getattr(config, each.name) for each in fields(WorkerSpec) if hasattr(config, each.name)}
    ours = {
        # Torch's loop sleeps this long before it asks the agent, and the agent waits for events.
        "monitor_interval": 1e-6,
        "local_world_size": config.nproc_per_node,
        "entrypoint": command[0],
        "args": tuple(command[1:]),
        "rdzv_handler": rendezvous,
    }
    return name, WorkerSpec(**shared | ours)


def _graces(config: LaunchConfig, options: JobOptions) -> Graces:
    default = getattr(config, "shutdown_timeout", None)  # torch 2.12 reads the variable itself
    if default is None:
        default = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    return Graces(
        stop=default if options.stop_grace is None else options.stop_grace,
        signal=default if options.signal_grace is None else options.signal_grace,
    )


def _run(
    agent: FtAgent, signals: StopSignals, rendezvous: JobRendezvous, event_log_handler: str
) -> RunResult | signal.Signals | None:
    """The agent's result, None if this node left the job, or the signal that ended it."""
    reason = "it has ended"
    try:
        result: RunResult | None = agent.run()
        rendezvous.stay()
        events.record(agent.get_event_succeeded(), event_log_handler)
    except SignalException as received:
        reason = sentence(LauncherSignalled(received.sigval))
        events.record(agent.get_event_failed(), event_log_handler)
        return received.sigval
    except BaseException:
        events.record(agent.get_event_failed(), event_log_handler)
        raise
    finally:
        signals.ignore()
        agent.clean_up()
        rendezvous.leave(reason)
        rendezvous.shutdown()
    return result


def _command(entrypoint: Entrypoint, args: Sequence[str]) -> tuple[str, list[Any]]:
    """The name for reports, and what torch is to start: a command runs behind the shim that ties it to the launcher."""
    if not isinstance(entrypoint, str):
        return getattr(entrypoint, "__name__", "function"), [entrypoint, *args]
    name = next((each for each in args if not each.startswith("-")), entrypoint) if args else entrypoint
    shim = [sys.executable, "-I", "-S", str(Path(exec_shim.__file__)), str(os.getpid()), "--"]
    return (name if entrypoint == sys.executable else entrypoint), [*shim, entrypoint, *args]


def _signalled(exit_codes: Mapping[int, int], number: signal.Signals) -> int:
    what = sentence(LauncherSignalled(number))
    if exit_codes and not any(exit_codes.values()):
        logger.warning("%s; every rank ended with exit code 0", what)
        return 0
    code = exit_code(LauncherSignalled(number))
    logger.error("%s; ending with exit code %d", what, code)
    return code


def _preempted(cause: Preempted) -> int:
    code = exit_code(cause)
    logger.warning("%s; exit code %d: run again to go on", sentence(cause), code)
    return code


def _outcome(
    agent: FtAgent,
    result: RunResult | signal.Signals | None,
    name: str,
    ft: FaultToleranceConfig,
    options: JobOptions,
) -> int:
    """Report the end of the run; raise JobFailedError where torch would raise its base."""
    if isinstance(result, signal.Signals):
        if agent.is_preempted:
            return _preempted(Preempted(result.name))
        return _signalled(agent.exit_codes, result)
    if not agent.any_connected and ft.require_monitoring:
        logger.error(sentence(NotMonitored()))
    elif agent.has_started and not agent.any_connected and options.expect_monitoring:
        logger.info("no rank connected to its monitor, so nobody watched for hangs; does the script use the client?")
    if result is not None and result.state == WorkerState.SUCCEEDED:
        return exit_code(NotMonitored(), ft.exit_codes) if ft.require_monitoring and not agent.any_connected else 0
    if result is None:
        agent.note_end()
    if isinstance(agent.cause, Preempted) and not agent.cause.unsaved:
        return _preempted(agent.cause)
    code = exit_code(agent.cause, ft.exit_codes) if agent.cause is not None else 0 if result is None else 1
    if result is None or not result.failures:
        if code:
            what = sentence(agent.cause) if agent.cause else "no worker of this node failed"
            logger.error("%s FAILED: %s", name, f"{agent.origin}: {what}" if agent.origin else what)
        else:
            logger.info("the job has ended with success, without a place for this node")
        return code
    failed = JobFailedError(name, result.failures, code)
    say(str(failed))
    raise failed
