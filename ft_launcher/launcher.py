"""The command ft_launcher: torchrun's command line and ours in, one job on this node, one exit code out."""

import argparse
import gc
import logging
import os
import shlex
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import run as torchrun
from torch.distributed.argparse_util import env
from torch.distributed.elastic.multiprocessing.errors import record

from ft_launcher import config as configuration
from ft_launcher import torch_flags
from ft_launcher.config import ConfigOptions, FaultToleranceConfig, Resolved
from ft_launcher.config_file import read_config_file
from ft_launcher.console import open_console
from ft_launcher.errors import FtLauncherError, UsageError
from ft_launcher.job import EXIT_BARRIER_SECONDS, JobFailedError, JobOptions, launch
from ft_launcher.leftovers import prune_empty
from ft_launcher.seal import read_token

__all__ = ["get_args_parser", "launch", "main"]

logger = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, with the nearest right spelling."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._of_torchrun = frozenset(self._option_string_actions)

    def _get_option_tuples(self, option_string: str) -> Any:
        # A prefix means what it means to torchrun: no flag of ours makes one ambiguous.
        found = super()._get_option_tuples(option_string)
        return [each for each in found if each[1] in self._of_torchrun] or found

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
    a_restart = "when workers are stopped for a restart or after a failure"
    for flag, default, text in (
        ("workers-stop-timeout", None, f"Seconds from SIGTERM to SIGKILL {a_restart} (default: --shutdown-timeout)."),
        ("term-timeout", None, "The same when the launcher was signalled (default: --shutdown-timeout)."),
        ("exit-barrier-timeout", EXIT_BARRIER_SECONDS, "Seconds for which a finished node waits for others (300)."),
    ):
        spellings = (f"--{flag}", f"--{flag.replace('-', '_')}")
        stops.add_argument(*spellings, action=env, type=float, default=default, help=text)
    return parser


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `args` (default: of this process) and exit with the job's code."""
    try:
        code = _record(list(sys.argv[1:] if args is None else args))
    except UsageError as error:
        sys.stderr.write(f"ft_launcher: {error}\n")
        code = error.exit_code
    except JobFailedError as error:
        code = error.exit_code  # reported already
    except FtLauncherError as error:
        sys.stderr.write(f"ft_launcher: {error}\n")
        code = error.exit_code
    # Python would look through all of torch for garbage on its way out, which takes as long as half of its import.
    gc.freeze()
    sys.exit(code)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = get_args_parser()
    # What is there already, argparse does not set to its default.
    not_given = argparse.Namespace(rdzv_backend=None, node_rank=None)
    arguments = parser.parse_args(argv, not_given)
    given_rank = arguments.node_rank is not None or "PET_NODE_RANK" in os.environ
    if arguments.node_rank is None:
        arguments.node_rank = parser.get_default("node_rank")
    if arguments.rdzv_backend is None:
        arguments.rdzv_backend = parser.get_default("rdzv_backend")
        # With torchrun's default, static, several nodes without a --node-rank would all be number 0.
        is_static = arguments.rdzv_backend == "static" and "PET_RDZV_BACKEND" not in os.environ
        if is_static and arguments.rdzv_endpoint and not given_rank and arguments.nnodes not in ("1", "1:1"):
            arguments.rdzv_backend = "c10d"
    return arguments


def _run(argv: list[str]) -> int:
    arguments = _parse(argv)
    options, resolved = _fault_tolerance(arguments)
    torch_flags.check_values(arguments)
    if options.dry_run:
        sys.stdout.write(_dry_run(arguments, resolved))
        return 0
    open_console(resolved.config.log_level)
    for warning in resolved.warnings:
        logger.warning(warning)
    _warn_of_missing(resolved.config)
    torch_flags.check_command(arguments, os.environ.get("PYTHON_EXEC", sys.executable))
    _normalise_single_node(arguments)
    token = _token(arguments, options)
    is_alone = arguments.nnodes in ("1", "1:1")
    placement_path = str(Path(arguments.log_dir) / "placement.json") if arguments.log_dir and not is_alone else ""
    own_log_dir = _make_log_dir(arguments)
    try:
        launch_config, entrypoint, worker_arguments = torchrun.config_from_args(arguments)
    except (ValueError, AssertionError, RuntimeError, OSError) as error:
        prune_empty(own_log_dir)
        raise UsageError(torch_flags.complaint(arguments, error)) from None
    job = JobOptions(
        stop_grace=arguments.workers_stop_timeout,
        signal_grace=arguments.term_timeout,
        exit_barrier=arguments.exit_barrier_timeout,
        own_log_dir=own_log_dir,
        expect_monitoring=_asks_for_monitoring(options, resolved),
        node_rank=arguments.node_rank,
        token=token,
        placement_path=placement_path,
        service=options.service or "",
    )
    return launch(launch_config, entrypoint, worker_arguments, resolved.config, job)


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


def _token(arguments: argparse.Namespace, options: ConfigOptions) -> bytes | None:
    """Give the secret of the nodes, which nothing that this process starts shall inherit."""
    token = os.environ.pop("FT_TOKEN", "").encode() or None
    if options.token_file is not None:
        token = read_token(options.token_file)
    if token is None and options.require_auth and arguments.nnodes not in ("1", "1:1"):
        raise UsageError("--ft-require-auth: no secret is given; use --ft-token-file or the variable FT_TOKEN")
    return token


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


def _warn_of_missing(ft: FaultToleranceConfig) -> None:
    """Say what is understood but not there yet."""
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
