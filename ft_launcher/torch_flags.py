"""Are the values of torchrun's own flags lawful? One line that names the flag, before anything is started."""

import argparse
import difflib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ft_launcher.errors import UsageError

__all__ = ["check_command", "check_values", "complaint", "nearest", "rendezvous_complaint"]

_STREAMS = re.compile(r"[0-3]|\d:[0-3](,\d:[0-3])*")


def check_values(arguments: argparse.Namespace) -> None:
    """Raise UsageError for the first value that torch would refuse with a traceback, or take and misunderstand."""
    nodes = re.fullmatch(r"(\d+)(?::(\d+))?", arguments.nnodes)
    if nodes is None or not 0 < int(nodes[1]) <= int(nodes[2] or nodes[1]):
        _refuse("--nnodes", arguments.nnodes, "a number from 1 on, or MIN:MAX with 1 <= MIN <= MAX")
    if arguments.nproc_per_node.lstrip("-").isdigit() and int(arguments.nproc_per_node) < 1:
        _refuse("--nproc-per-node", arguments.nproc_per_node, "a number from 1 on, auto, cpu, gpu or xpu")
    for flag in ("max_restarts", "monitor_interval", "shutdown_timeout", "workers_stop_timeout", "term_timeout"):
        value = getattr(arguments, flag, None)
        if value is not None and not value >= 0:
            _refuse(f"--{flag.replace('_', '-')}", value, "0 or more")
    for flag in ("redirects", "tee"):
        if not _STREAMS.fullmatch(getattr(arguments, flag)):
            allowed = "0 (none), 1 (stdout), 2 (stderr) or 3 (both), or a list like 0:1,1:3 by local rank 0 to 9"
            _refuse(f"--{flag}", getattr(arguments, flag), allowed)
    for pair in arguments.rdzv_conf.split(",") if arguments.rdzv_conf else ():
        if not re.fullmatch(r"\s*[^=\s]+\s*=\s*\S.*", pair):
            _refuse("--rdzv-conf", arguments.rdzv_conf, "key=value,key=value")
    if arguments.local_ranks_filter and not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", arguments.local_ranks_filter):
        _refuse("--local-ranks-filter", arguments.local_ranks_filter, "a list of local ranks like 0,1,2")
    if arguments.module and arguments.no_python and not arguments.run_path:
        raise UsageError("--module and --no-python exclude each other: a module is run by Python")


def check_command(arguments: argparse.Namespace, interpreter: str) -> None:
    """Raise UsageError for a command that cannot be executed: no restart would help."""
    script = arguments.training_script
    if arguments.no_python and not arguments.run_path:
        if shutil.which(script) is None:
            raise UsageError(f"{script}: no such command, or it may not be executed")
        return
    if shutil.which(interpreter) is None:
        raise UsageError(f"PYTHON_EXEC={interpreter}: no such command, or it may not be executed")
    if not arguments.module and script != "-" and not os.access(script, os.R_OK):
        folder = Path(script).parent
        near = nearest(Path(script).name, [each.name for each in folder.iterdir()] if folder.is_dir() else [])
        hint = f"; did you mean {folder / near}?" if near else ""
        raise UsageError(f"{script}: no such script, or it may not be read{hint}")


def complaint(arguments: argparse.Namespace, error: Exception) -> str:
    """Torch's complaint about these arguments in one line that names the flag, where it is known which one it is."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"--log-dir {arguments.log_dir}: {error.strerror or text}"
    flags: Mapping[str, str] = {
        "is not available": "nproc_per_node",
        "nproc_per_node": "nproc_per_node",
        "logs_specs": "logs_specs",
    }
    for part, flag in flags.items():
        if part in text:
            return f"--{flag.replace('_', '-')} {getattr(arguments, flag)}: {text}"
    return text


def rendezvous_complaint(backend: str, endpoint: str, error: Exception) -> str:
    """Torch's, or the kernel's, complaint about where the nodes shall meet, in one line that names the flag."""
    text = " ".join(str(error).split())
    if "is not registered" in text:
        return f"--rdzv-backend {backend}: must be c10d, static, etcd, etcd-v2 or the name of an installed plug-in"
    return f"--rdzv-endpoint {endpoint}: {text}"


def nearest(word: str, allowed: Sequence[str]) -> str | None:
    """Give the one of `allowed` that was probably meant, or None."""
    similar = difflib.get_close_matches(word, allowed, n=1)
    alike = [each for each in allowed if len(word) > 5 and each.startswith(word[: max(5, len(word) - 2)])]
    return next(iter(alike or similar), None)


def _refuse(flag: str, value: object, allowed: str) -> None:
    raise UsageError(f"{flag} {value}: must be {allowed}")
