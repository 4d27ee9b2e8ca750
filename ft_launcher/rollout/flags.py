"""The flags of rollout fault tolerance, for any argparse parser, and what they say to the supervisor of engines."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from ft_launcher.engines.config import EngineConfig
from ft_launcher.errors import UsageError

__all__ = ["add_rollout_ft_arguments", "check_rollout_ft_arguments", "engine_config"]

_DEFAULTS = EngineConfig()
_PLACEHOLDER = "{rollout_id}"


def add_rollout_ft_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them. After parsing, call `check_rollout_ft_arguments`."""
    group = parser.add_argument_group("rollout fault tolerance")
    group.add_argument(
        "--use-fault-tolerance", action="store_true", help="watch the rollout engines, and restart those that fail"
    )
    group.add_argument(
        "--rollout-health-check-first-wait",
        type=_seconds_or_zero,
        default=_DEFAULTS.health_check_first_wait,
        metavar="SECONDS",
        help="after an engine's start, until its first answered check: missed ones do not count (%(default)g)",
    )
    group.add_argument(
        "--rollout-health-check-interval",
        type=_seconds,
        default=_DEFAULTS.health_check_interval,
        metavar="SECONDS",
        help="between two checks of an engine (%(default)g)",
    )
    group.add_argument(
        "--rollout-health-check-timeout",
        type=_seconds,
        default=_DEFAULTS.health_check_timeout,
        metavar="SECONDS",
        help="within which a check must be answered (%(default)g)",
    )
    group.add_argument("--debug-rollout-only", action="store_true", help="collect rollouts, and do not train")
    group.add_argument("--debug-train-only", action="store_true", help="train, without rollouts and engines")
    group.add_argument(
        "--save-debug-rollout-data", metavar="PATH", help=f"save the samples of each round; {_PLACEHOLDER} in it"
    )
    group.add_argument(
        "--allow-overwrite",
        action="store_true",
        help=f"let --save-debug-rollout-data be without {_PLACEHOLDER}: each round replaces the one before",
    )
    group.add_argument(
        "--load-debug-rollout-data", metavar="PATH", help="train on rounds that were saved; --debug-train-only"
    )
    group.add_argument(
        "--load-debug-rollout-data-subsample",
        type=_fraction,
        metavar="FRACTION",
        help="of each round that is loaded, only such a part of its samples",
    )
    group.add_argument(
        "--load-debug-rollout-data-trust",
        action="store_true",
        help="load dumps of torch.save also where that can run code of whoever wrote them",
    )


def check_rollout_ft_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser | None = None) -> None:
    """Refuse flags that contradict each other, and let --load-debug-rollout-data imply --debug-train-only.

    With the parser its `error` ends the program (exit code 2); without, UsageError is raised.
    """
    problem = _problem(args)
    if problem and parser is not None:
        parser.error(problem)
    if problem:
        raise UsageError(problem)
    if args.load_debug_rollout_data is not None:
        args.debug_train_only = True


def engine_config(args: argparse.Namespace, **settings: Any) -> EngineConfig:
    """Give what the flags say of engines; `settings`: other fields of it.

    Without --use-fault-tolerance no engine is checked while it serves, and none is killed or started again.
    """
    check_rollout_ft_arguments(args)
    if not args.use_fault_tolerance:
        off = {"health_check_interval": math.inf, "health_check_failures": sys.maxsize, "max_restarts": 0}
        return EngineConfig(**(settings | off))
    return EngineConfig(
        health_check_first_wait=args.rollout_health_check_first_wait,
        health_check_interval=args.rollout_health_check_interval,
        health_check_timeout=args.rollout_health_check_timeout,
        **settings,
    )


def _problem(args: argparse.Namespace) -> str:
    save, load = args.save_debug_rollout_data, args.load_debug_rollout_data
    if args.debug_rollout_only and args.debug_train_only:
        return "--debug-rollout-only and --debug-train-only: only one of them is allowed"
    if args.debug_rollout_only and load is not None:
        return f"--load-debug-rollout-data {load}: not allowed with --debug-rollout-only, as it replaces the rollouts"
    for flag, path in (("--save-debug-rollout-data", save), ("--load-debug-rollout-data", load)):
        if path == "":
            return f"{flag} '': must be a path, such as rollout_{_PLACEHOLDER}.pt"
    if save is not None and _PLACEHOLDER not in save and not args.allow_overwrite:
        return (
            f"--save-debug-rollout-data {save}: must have {_PLACEHOLDER} in it, as each round would replace the one "
            "before; --allow-overwrite lets it"
        )
    if save is not None and load is not None and Path(save).resolve() == Path(load).resolve():
        return f"--save-debug-rollout-data {save}: must be another path than --load-debug-rollout-data"
    if load is None and args.load_debug_rollout_data_subsample is not None:
        return (
            f"--load-debug-rollout-data-subsample {args.load_debug_rollout_data_subsample:g}: allowed only with "
            "--load-debug-rollout-data"
        )
    return ""


def _seconds(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0")
    return value


def _seconds_or_zero(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds, 0 or more")
    return value


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0, 1 at most")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # which no range has
