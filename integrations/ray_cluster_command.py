"""The command `ft_ray`: runs ft_launcher on the nodes of a Ray cluster."""

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from ft_launcher import torch_flags
from ft_launcher.command_words import Parser
from ft_launcher.config_kinds import Timeout, given_of, read
from ft_launcher.console import open_console
from ft_launcher.errors import FtLauncherError, UsageError

__all__ = ["main"]

_LEVELS = ("debug", "info", "warning", "error")


def _parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="ft_ray",
        usage="ft_ray [flags] -- [flags of ft_launcher] SCRIPT [ARGUMENT...]",
        description=__doc__,
        epilog="Exit code: the job's, as ft_launcher gives it.",
        allow_abbrev=False,
    )
    made.add_argument("--nnodes", default="1", metavar="N|MIN:MAX", help="nodes of the job (1); Ray places MAX")
    made.add_argument("--bundle", default="CPU=1", metavar="NAME=N,...", help="what each node needs (CPU=1)")
    made.add_argument(
        "--strategy", default="STRICT_SPREAD", metavar="S", help="STRICT_SPREAD (the default), SPREAD or PACK"
    )
    made.add_argument("--placement-timeout", default="10m", metavar="DURATION", help="for room in the cluster (10m)")
    made.add_argument("--max-replacements", default="10", metavar="N", help="of launchers that are lost (10)")
    made.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="for launchers and ranks")
    made.add_argument("--runtime-env", metavar="FILE", help="YAML: Ray's runtime environment")
    made.add_argument("--address", default="auto", help="of the cluster (auto: the one that runs here)")
    made.add_argument("--log-level", default="info", metavar="LEVEL", help="debug, info (the default), warning, error")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What follows -- is ft_launcher's.
    cut = given.index("--") if "--" in given else len(given)
    parser = _parser()
    options, unknown = parser.parse_known_args(given[:cut])
    try:
        if unknown:
            raise UsageError(_stray(unknown[0], [f"--{name.replace('_', '-')}" for name in vars(options)]))
        if cut == len(given):
            raise UsageError("ft_launcher's flags and the script are missing; give them behind --")
        return _run(options, given[cut + 1 :])
    except FtLauncherError as error:
        sys.stderr.write(f"ft_ray: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _stray(word: str, flags: list[str]) -> str:
    if not word.startswith("-"):
        return f"{word}: must stand behind --, as all that is ft_launcher's"
    near = torch_flags.nearest(word.partition("=")[0], flags)
    return f"{word}: no such flag; " + (f"did you mean {near}?" if near else "ft_launcher's stand behind --")


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.log_level not in _LEVELS:
        near = torch_flags.nearest(options.log_level, _LEVELS)
        hint = f"; did you mean {near}?" if near else ""
        raise UsageError(f"--log-level {options.log_level}: must be one of {', '.join(_LEVELS)}{hint}")
    env = dict(_variable(each) for each in options.env)
    bundle = _bundle(options.bundle)
    if not options.max_replacements.isascii() or not options.max_replacements.isdigit():
        raise UsageError(f"--max-replacements {options.max_replacements}: must be a whole number, 0 or more")
    timeout: Any = read(get_args(Timeout)[-1], given_of(options.placement_timeout, "", "--placement-timeout "))
    runtime_env = None if options.runtime_env is None else _runtime_env(Path(options.runtime_env))
    if importlib.util.find_spec("ray") is None:
        raise UsageError("needs the extra [ray]: pip install 'ft-launcher[ray]'")
    from ft_launcher.integrations.ray_cluster import run_request
    from ft_launcher.integrations.ray_cluster_request import read_request

    request = read_request(
        arguments,
        nnodes=options.nnodes,
        bundle=bundle,
        strategy=options.strategy,
        placement_timeout=timeout,
        max_replacements=int(options.max_replacements),
        address=options.address,
    )
    open_console(getattr(logging, options.log_level.upper()))
    return run_request(request, env=env, runtime_env=runtime_env)


def _bundle(text: str) -> dict[str, float]:
    amounts: dict[str, float] = {}
    for part in text.split(","):
        name, _, amount = part.strip().partition("=")
        try:
            number = float(amount)
        except ValueError:
            raise UsageError(f"--bundle {text}: must be NAME=NUMBER,..., CPU=4,GPU=8 for example") from None
        # Ray takes any name: of one that nobody has, a job would wait for room until its time is over.
        for known in ("CPU", "GPU", "memory"):
            if name != known and name.lower().rstrip("s") == known.lower():
                raise UsageError(f"--bundle {text}: {name}: did you mean {known}?")
        if name in amounts:
            raise UsageError(f"--bundle {text}: {name} is given twice")
        amounts[name] = number
    return amounts


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name:
        raise UsageError(f"--env {text}: must be NAME or NAME=VALUE")
    if not equals and name not in os.environ:
        raise UsageError(f"--env {name}: no such variable here; give its value, {name}=...")
    return name, value if equals else os.environ[name]


def _runtime_env(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--runtime-env {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--runtime-env {path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--runtime-env {path}: must be a mapping, as Ray's documentation of runtime_env has it")
    return content


if __name__ == "__main__":
    sys.exit(main())
