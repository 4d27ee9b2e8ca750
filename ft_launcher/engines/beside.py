"""Runs the service of engines beside the workers of a launcher: a process of its own, which ends with the launcher.

Of its own, so that neither can hold the other up: torch's threads and forks here, hundreds of connections there.
"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ft_launcher
from ft_launcher import processes
from ft_launcher.errors import FtLauncherError, UsageError

__all__ = ["SOCKET_ENV", "engine_service"]

logger = logging.getLogger(__name__)

SOCKET_ENV = "FT_ENGINES_SOCKET"
"""The variable in which a trainer finds the service's socket."""

# Nothing in the current directory, which is the trainer's, stands in for a module of the service.
_BOOT = (
    "import sys; sys.path[:] = [each for each in sys.path if each] + [sys.argv.pop(1)];"
    " from ft_launcher.engines.command import main; sys.exit(main())"
)
_ROOT = str(Path(ft_launcher.__file__).parent.parent)

END_SECONDS = 120.0
"""How long the service may take to end its engines; `term_grace`, 10 s by default, is most of what it needs."""


@contextmanager
def engine_service(path: str) -> Iterator[str]:
    """Start the engines of a file; the service's socket, which workers started in this block find by SOCKET_ENV.

    Returns when engines are being started, not when they serve. Raises UsageError for what is wrong with the file.
    """
    stop_read, stop_write = os.pipe()
    ready_read, ready_write = os.pipe()
    command = [sys.executable, "-c", _BOOT, _ROOT, "run", path]
    descriptors = ["--stop-fd", str(stop_read), "--ready-fd", str(ready_write)]
    try:
        child = subprocess.Popen([*command, *descriptors], pass_fds=(stop_read, ready_write), stdin=subprocess.DEVNULL)
    except BaseException:
        os.close(stop_write)
        os.close(ready_read)
        raise
    finally:
        os.close(stop_read)
        os.close(ready_write)
    is_over = threading.Event()
    try:
        with os.fdopen(ready_read) as ready:
            kind, _, said = ready.read().partition(" ")
        if kind != "socket":
            child.wait()
            if child.returncode == UsageError.exit_code:
                raise UsageError(f"--ft-service: {said}")
            hint = "is the extra installed (pip install 'ft-launcher[engines]')?"
            raise FtLauncherError(f"--ft-service {path}: {said or f'the service of engines could not start; {hint}'}")
        threading.Thread(target=_watch, args=(child.pid, is_over), name="ft_service", daemon=True).start()
        os.environ[SOCKET_ENV] = said
        yield said
    finally:
        os.environ.pop(SOCKET_ENV, None)
        is_over.set()
        os.close(stop_write)
        try:
            child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            words = "the service of engines (pid %d) has not ended within %g s; killing"
            logger.error(words, child.pid, END_SECONDS)  # noqa: TRY400 - a traceback would tell nothing
            child.kill()
            child.wait()


def _watch(pid: int, is_over: threading.Event) -> None:
    with suppress(ProcessLookupError):
        service = processes.Process(pid)
        while processes.wait_gone([service.pidfd], 3600.0):
            pass
        service.close()
    if not is_over.is_set():
        logger.error("the service of engines (pid %d) has ended, and its engines with it", pid)
