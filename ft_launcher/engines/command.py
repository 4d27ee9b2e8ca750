"""The command `ft_engines`: runs the engines of a file, alone or beside a trainer, and shows how they are."""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ft_launcher import exec_shim, processes
from ft_launcher.command_words import Parser, one_of
from ft_launcher.console import open_console
from ft_launcher.engines import wire
from ft_launcher.engines.client import EngineClient
from ft_launcher.engines.errors import EngineError
from ft_launcher.engines.file import ServiceSettings, read_engines_file
from ft_launcher.engines.fleet import State
from ft_launcher.engines.service import EngineService
from ft_launcher.engines.supervisor import Engine
from ft_launcher.errors import FtLauncherError
from ft_launcher.run_dir import find_sockets

__all__ = ["main"]

logger = logging.getLogger("ft_launcher.engines.command")  # also when it is __main__

_COMMANDS = ("run", "status")
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_HEARD = {*_ENDS, signal.SIGCHLD}
_COLOURS = {State.SERVING: "green", State.SUSPECT: "yellow", State.FAILED: "red", State.RETIRED: "red"}


def _parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="ft_engines",
        description=__doc__,
        epilog="run: until SIGINT or SIGTERM, or until the trainer (after --) ends, with its exit code. "
        "Exit code of status: 0, or 1 where no engine serves or no service runs.",
    )
    made.add_argument("command", type=one_of(_COMMANDS), metavar="run|status")
    made.add_argument("target", metavar="FILE", help="engines.yaml; for status also the socket of a service")
    made.add_argument("--json", action="store_true", help="status for programs")
    made.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="of run")
    # For ft_launcher: end when the first is closed, which is when it ends; say at the second where the socket is.
    made.add_argument("--stop-fd", type=int, help=argparse.SUPPRESS)
    made.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What follows -- is the trainer's, whatever it looks like.
    cut = given.index("--") if "--" in given else len(given)
    parser = _parser()
    options = parser.parse_args(given[:cut])
    trainer = given[cut + 1 :]
    if cut < len(given) and (options.command != "run" or not trainer):
        parser.error("--: a trainer's command after it belongs to run")
    if options.json and options.command != "status":
        parser.error("--json belongs to status")
    try:
        if options.command == "status":
            return _status(options.target, as_json=options.json)
        open_console(getattr(logging, options.log_level.upper()))
        return _run(options, trainer)
    except FtLauncherError as error:
        if options.ready_fd is None:
            print(f"ft_engines: {error}", file=sys.stderr)
        else:
            _say(options.ready_fd, f"error {error}")
        return error.exit_code


# -- run --------------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace, trainer: list[str]) -> int:
    settings = read_engines_file(options.target)
    # Before any thread is there, which all inherit it: signals are waited for below.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    # Slurm's warnings go to every process of a step.
    for ignored in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    with EngineService(settings, os.environ) as service:
        logger.info("%d engines of %s; socket %s", len(settings.engines), settings.path, service.socket_path)
        if options.ready_fd is not None:
            _say(options.ready_fd, f"socket {service.socket_path}")
        if options.stop_fd is not None:
            # No signal ends it: Ctrl-C and Slurm reach all, and the workers may need engines while they save.
            os.read(options.stop_fd, 1)
            return 0
        if trainer:
            return _beside(trainer, service.socket_path, settings)
        number = signal.sigwait(_ENDS)
        logger.info("received %s; ending the engines", signal.Signals(number).name)
    return 128 + number


def _say(descriptor: int, text: str) -> None:
    with os.fdopen(descriptor, "w") as ready:
        ready.write(text)


def _beside(trainer: list[str], socket_path: str, settings: ServiceSettings) -> int:
    """Run the trainer to its end; its exit code, as a shell gives it."""
    environment = os.environ | {wire.SOCKET_ENV: socket_path}
    try:
        # The shim ties it to this process, and says what is wrong with its command.
        shim = [sys.executable, "-I", "-S", exec_shim.__file__, str(os.getpid()), "--"]
        child = subprocess.Popen([*shim, *trainer], env=environment, start_new_session=True, preexec_fn=_let_through)
    except OSError as error:
        raise EngineError(f"{trainer[0]} cannot be started: {error.strerror}") from error
    root = processes.Process(child.pid)
    try:
        while child.poll() is None:
            number = signal.sigwait(_HEARD)
            if number in _ENDS:
                logger.info("received %s; ending the trainer, then the engines", signal.Signals(number).name)
                processes.kill_tree([root], signum=number, grace=settings.config.term_grace)
    finally:
        # Also what a trainer has left behind: it would look for engines that are no more.
        processes.kill_tree([root], signum=signal.SIGTERM, grace=0.0)
        root.close()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)


# -- status -----------------------------------------------------------------------------------------------------------


def _status(target: str, *, as_json: bool) -> int:
    seen = _found(target, os.environ)
    routed = [engine for engine in seen.engines if engine.state in (State.SERVING, State.SUSPECT)]
    # A file or a pipe has no width that lines would have to be broken for.
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    if as_json:
        sys.stdout.write(json.dumps(msgspec.to_builtins(seen), indent=2) + "\n")
    else:
        console.print(_table(seen.engines))
        weights = f", weights {seen.version}" if seen.version is not None else ""
        console.print(escape(f"{len(routed)} of {len(seen.engines)} serve{weights}; {seen.file}, process {seen.pid}"))
    return 0 if routed else 1


def _found(target: str, environ: Mapping[str, str]) -> wire.Seen:
    """Ask the service of this file, or at this socket. EngineError when there is none."""
    path = Path(target)
    if path.is_socket():
        return EngineClient(str(path)).look()
    if not path.exists():
        raise EngineError(f"{target}: no such file or socket")
    for socket_path in find_sockets(wire.SOCKET_NAME, environ):
        try:
            seen = EngineClient(str(socket_path)).look()
        except EngineError:
            continue  # it was killed, and the next service removes it
        if seen.file == str(path.absolute()):
            return seen
    raise EngineError(f"{target}: no service of this file runs here; start one with: ft_engines run {target}")


def _table(engines: list[Engine]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("engine", "state", "start", "weights", "missed", "address", "last reason"):
        table.add_column(title, no_wrap=title != "last reason")
    for each in engines:
        colour = _COLOURS.get(each.state, "default")
        table.add_row(
            escape(each.name),
            f"[{colour}]{each.state.value}[/]",
            str(each.incarnation),
            escape(each.version or ""),
            str(each.failures),
            escape(each.url),
            escape(each.reason),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
