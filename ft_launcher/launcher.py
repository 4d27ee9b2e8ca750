"""The command ft_launcher: torchrun's command line and ours in, one job on this node, one exit code out."""

import argparse
import logging
import os
import shlex
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import run as torchrun
from torch.distributed.argparse_util import env
from torch.distributed.elastic import events
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.metrics import initialize_metrics
from torch.distributed.elastic.metrics.api import MetricsConfig
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousParameters
from torch.distributed.launcher.api import LaunchConfig

from ft_launcher import config as configuration
from ft_launcher import exec_shim, processes, torch_flags
from ft_launcher.agent import FtAgent
from ft_launcher.causes import LauncherSignalled, NotMonitored, exit_code, sentence
from ft_launcher.config import ConfigOptions, FaultToleranceConfig, Resolved
from ft_launcher.config_file import read_config_file
from ft_launcher.console import open_console
from ft_launcher.errors import FtLauncherError, UsageError
from ft_launcher.leftovers import prune_empty
from ft_launcher.monitors import RankMonitors
from ft_launcher.rendezvous import open_rendezvous
from ft_launcher.signals import StopSignals

__all__ = ["get_args_parser", "launch", "main"]

logger = logging.getLogger(__name__)

Entrypoint = Callable[..., Any] | str

EXIT_BARRIER_SECONDS = 300.0
"""Torch's default wait of a node that has finished for the others (LocalElasticAgent)."""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, with the nearest right spelling."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if unknown and message.startswith("unrecognized"):
            word = unknown[0].split("=")[0]
            near = torch_flags.nearest(word, list(self._option_string_actions))
            message = f"{word}: no such flag" + (f"; did you mean {near}?" if near else "")
        raise UsageError(f"{message} (see ft_launcher --help)")


def get_args_parser() -> argparse.ArgumentParser:
    """Give torchrun's parser, of whatever torch is installed, with the group of fault-tolerance flags."""
    parser = _Parser(
        prog="ft_launcher",
        description="A torchrun that kills ranks that hang and restarts the job.",
        parents=[torchrun.get_args_parser()],
        conflict_handler="resolve",
    )
    group = parser.add_argument_group("fault tolerance")
    configuration.add_flags(group)
    stops = parser.add_argument_group("stopping")
    for flag, text in (
        ("workers-stop-timeout", "Seconds from SIGTERM to SIGKILL when workers are stopped for a restart or after a "),
        ("term-timeout", "Seconds from the signal to SIGKILL when the launcher was signalled."),
        ("exit-barrier-timeout", "Seconds for which a node that has finished waits for the others (300)."),
    ):
        rest = "failure. Default: --shutdown-timeout." if flag.startswith("workers") else ""
        stops.add_argument(
            f"--{flag}", f"--{flag.replace('-', '_')}", action=env, type=float, default=None, help=text + rest
        )
    return parser


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `args` (default: of this process) and exit with the job's code."""
    try:
        code = _record(list(sys.argv[1:] if args is None else args))
    except UsageError as error:
        sys.stderr.write(f"ft_launcher: {error}\n")
        code = error.exit_code
    except ChildFailedError:
        code = 1  # reported already
    except FtLauncherError as error:
        sys.stderr.write(f"ft_launcher: {error}\n")
        code = error.exit_code
    sys.exit(code)


def _run(argv: list[str]) -> int:
    arguments = get_args_parser().parse_args(argv)
    options, resolved = _fault_tolerance(arguments)
    torch_flags.check_values(arguments)
    if options.dry_run:
        sys.stdout.write(_dry_run(arguments, resolved))
        return 0
    open_console(resolved.config.log_level)
    for warning in resolved.warnings:
        logger.warning(warning)
    _check_policy(arguments, resolved.config)
    torch_flags.check_command(arguments, os.environ.get("PYTHON_EXEC", sys.executable))
    _normalise_single_node(arguments)
    own_log_dir = _make_log_dir(arguments)
    try:
        launch_config, entrypoint, worker_arguments = torchrun.config_from_args(arguments)
    except (ValueError, AssertionError, RuntimeError, OSError) as error:
        prune_empty(own_log_dir)
        raise UsageError(torch_flags.complaint(arguments, error)) from None
    return launch(
        launch_config,
        entrypoint,
        worker_arguments,
        resolved.config,
        own_log_dir=own_log_dir,
        stop_grace=arguments.workers_stop_timeout,
        signal_grace=arguments.term_timeout,
        exit_barrier=arguments.exit_barrier_timeout,
        expect_monitoring=_asks_for_monitoring(options, resolved),
    )


# Torch's decorator writes the error file that a launcher above this one reads; it passes the exception on.
_record: Callable[[list[str]], Any] = record(_run)


def _fault_tolerance(arguments: argparse.Namespace) -> tuple[ConfigOptions, Resolved]:
    flags = vars(arguments)
    options = configuration.read_options(environ=os.environ, flags=flags)
    text = (
        None if options.cfg_path is None else read_config_file(options.cfg_path, missing_ok=options.ignore_missing_cfg)
    )
    resolved = configuration.resolve(text, options.cfg_path or "", os.environ, flags, lenient=options.lenient_config)
    return options, resolved


def _asks_for_monitoring(options: ConfigOptions, resolved: Resolved) -> bool:
    given = [name for name, setting in resolved.settings.items() if setting.origin != "default"]
    return options.cfg_path is not None or any("timeout" in name for name in given)


def _dry_run(arguments: argparse.Namespace, resolved: Resolved) -> str:
    command = shlex.join([arguments.training_script, *arguments.training_script_args])
    warnings = "".join(f"warning: {warning}\n" for warning in resolved.warnings)
    return (
        f"{configuration.render(resolved.settings)}\n{warnings}"
        f"would start {arguments.nproc_per_node} x {command} on each of {arguments.nnodes} nodes,"
        f" with up to {arguments.max_restarts} restarts; nothing was started\n"
    )


def _check_policy(arguments: argparse.Namespace, ft: FaultToleranceConfig) -> None:
    """Refuse, or warn of, what is understood but not there yet."""
    if ft.restart_policy == "min-healthy" and arguments.nnodes not in ("1", "1:1"):
        raise UsageError("--ft-restart-policy min-healthy: works on one node so far; use any-failed with several")
    for key in ("enable_nic_monitor", "pci_topo_file", "link_down_path_template"):
        if getattr(ft, key):
            logger.warning("%s is set, but network links are not watched yet", key)


def _normalise_single_node(arguments: argparse.Namespace) -> None:
    """What torchrun makes of --standalone and of a bare single node: a rendezvous of its own on a free port."""
    alone = (
        arguments.rdzv_backend == "static"
        and not arguments.rdzv_endpoint
        and arguments.master_port is None
        and arguments.nnodes in ("1", "1:1")
    )
    if arguments.standalone or alone:
        arguments.rdzv_backend = "c10d"
        arguments.rdzv_endpoint = "localhost:0"
        arguments.rdzv_id = str(uuid.uuid4())
    if arguments.master_port is None:
        arguments.master_port = 29500


def _make_log_dir(arguments: argparse.Namespace) -> str:
    """Where torch would make a directory that nobody removes, make it here, and give its path; else ""."""
    if arguments.log_dir is not None or arguments.logs_specs is not None:
        return ""
    arguments.log_dir = tempfile.mkdtemp(prefix="torchelastic_")
    return str(arguments.log_dir)


def launch(
    config: LaunchConfig,
    entrypoint: Entrypoint,
    args: Sequence[str],
    ft: FaultToleranceConfig,
    *,
    own_log_dir: str = "",
    stop_grace: float | None = None,
    signal_grace: float | None = None,
    exit_barrier: float | None = None,
    expect_monitoring: bool = False,
) -> int:
    """Run the job on this node to its end and give the exit code.

    The graces (seconds from SIGTERM to SIGKILL, before a restart and after a signal) default to the configuration's
    `shutdown_timeout`. `own_log_dir` is removed at the end unless it holds something to read. `expect_monitoring`: say
    so if no rank connected to its monitor. Raises ChildFailedError when workers of this node failed, UsageError when
    the rendezvous cannot be opened with these parameters.
    """
    grace = getattr(config, "shutdown_timeout", None)  # torch 2.12 reads the variable itself
    if grace is None:
        grace = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    try:
        signals = StopSignals(getattr(config, "signals_to_handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT"))
        processes.become_subreaper()
        return _launch(
            config,
            entrypoint,
            args,
            ft,
            signals,
            own_log_dir=own_log_dir,
            stop_grace=grace if stop_grace is None else stop_grace,
            signal_grace=grace if signal_grace is None else signal_grace,
            exit_barrier=EXIT_BARRIER_SECONDS if exit_barrier is None else exit_barrier,
            expect_monitoring=expect_monitoring,
        )
    except SignalException as received:  # before the first workers, or after the last
        logger.error("%s", sentence(LauncherSignalled(received.sigval)))  # noqa: TRY400 - no traceback for a signal
        return exit_code(LauncherSignalled(received.sigval))
    finally:
        prune_empty(own_log_dir)


def _launch(
    config: LaunchConfig,
    entrypoint: Entrypoint,
    args: Sequence[str],
    ft: FaultToleranceConfig,
    signals: StopSignals,
    *,
    own_log_dir: str,
    stop_grace: float,
    signal_grace: float,
    exit_barrier: float,
    expect_monitoring: bool,
) -> int:
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    try:
        rendezvous = open_rendezvous(parameters)
    except (ValueError, OSError, RendezvousConnectionError) as error:
        raise UsageError(torch_flags.rendezvous_complaint(config.rdzv_backend, config.rdzv_endpoint, error)) from error
    name, command = _command(entrypoint, args)
    # Fields that LaunchConfig and WorkerSpec share go across by name, so those of a newer torch do too.
    shared = {each.name: getattr(config, each.name) for each in fields(WorkerSpec) if hasattr(config, each.name)}
    spec = WorkerSpec(
        **shared
        | {
            # Torch's loop sleeps this long before it asks the agent, and the agent waits for events.
            "monitor_interval": 1e-6,
            "local_world_size": config.nproc_per_node,
            "entrypoint": command[0],
            "args": tuple(command[1:]),
            "rdzv_handler": rendezvous,
        }
    )
    initialize_metrics(MetricsConfig(config.metrics_cfg))
    alone = config.max_nodes == 1 and isinstance(entrypoint, str)
    with RankMonitors(config.nproc_per_node, ft, own_log_dir, os.environ) as monitors:
        agent = FtAgent(
            spec,
            config.logs_specs,
            monitors,
            signals,
            wake_every=None if alone else config.monitor_interval,
            stop_grace=stop_grace,
            signal_grace=signal_grace,
            start_method=config.start_method,
            log_line_prefix_template=config.log_line_prefix_template,
            exit_barrier_timeout=exit_barrier,
        )
        shut_down = True
        try:
            result = agent.run()
            events.record(agent.get_event_succeeded(), getattr(config, "event_log_handler", "null"))
        except SignalException as received:
            # Not shut down: other nodes may go on without this one.
            shut_down = False
            events.record(agent.get_event_failed(), getattr(config, "event_log_handler", "null"))
            return _signalled(agent, received.sigval)
        except BaseException:
            events.record(agent.get_event_failed(), getattr(config, "event_log_handler", "null"))
            raise
        finally:
            signals.ignore()
            agent.clean_up()
            if shut_down:
                rendezvous.shutdown()
        if expect_monitoring and not agent.any_connected and not ft.require_monitoring:
            logger.info(
                "no rank connected to its monitor, so nobody watched for hangs; does the script use the client?"
            )
        return _outcome(agent, result, name, ft)


def _command(entrypoint: Entrypoint, args: Sequence[str]) -> tuple[str, list[Any]]:
    """The name for reports, and what torch is to start: a command runs behind the shim that ties it to the launcher."""
    if not isinstance(entrypoint, str):
        return getattr(entrypoint, "__name__", "function"), [entrypoint, *args]
    name = next((each for each in args if not each.startswith("-")), entrypoint) if args else entrypoint
    shim = [sys.executable, "-I", "-S", str(Path(exec_shim.__file__)), str(os.getpid()), "--"]
    return (name if entrypoint == sys.executable else entrypoint), [*shim, entrypoint, *args]


def _signalled(agent: FtAgent, number: signal.Signals) -> int:
    codes = agent.exit_codes.values()
    if codes and not any(codes):
        logger.warning("%s; every rank ended with exit code 0", sentence(LauncherSignalled(number)))
        return 0
    logger.error("%s; ending with exit code %d", sentence(LauncherSignalled(number)), 128 + number)
    return exit_code(LauncherSignalled(number))


def _outcome(agent: FtAgent, result: RunResult | None, name: str, ft: FaultToleranceConfig) -> int:
    """Report the end of the run; raise ChildFailedError where torch would."""
    if result is not None and result.state == WorkerState.SUCCEEDED:
        if not agent.any_connected and ft.require_monitoring:
            logger.error(sentence(NotMonitored()))
            return exit_code(NotMonitored(), ft.exit_codes)
        return 0
    code = exit_code(agent.cause, ft.exit_codes) if agent.cause is not None else 1
    if result is None or not result.failures:
        logger.error("%s FAILED: %s", name, sentence(agent.cause) if agent.cause else "no worker of this node failed")
        return code
    failed = ChildFailedError(name=name, failures=result.failures)
    sys.stderr.write(f"{failed}\n")
    if code != 1:
        return code
    raise failed
