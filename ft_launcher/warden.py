"""Stands between a process and a tree of others, and sees that nothing of the tree outlives either.

An engine is a tree of processes (vLLM's server has a core, and that has workers), and so is a launcher. When the one
that started it is killed, the kernel tells its children only; so the child is this one, which then ends the tree. It
ends with the exit code of the tree's first process.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import ft_launcher
from ft_launcher import exec_shim, processes

__all__ = ["command"]

_PR_SET_PDEATHSIG = 1
_BOOT = "import sys; sys.path.append(sys.argv[1]); from ft_launcher.warden import main; sys.exit(main())"
_ROOT = str(Path(ft_launcher.__file__).parent.parent)
_HEARD = {signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD}


def command(grace: float, watched: list[str], *, orphan_grace: float = 0.0) -> list[str]:
    """Give the command line of a warden of this process, to be started by a thread that lives as long as it shall.

    `grace`: seconds from SIGTERM, which it hands on, to SIGKILL. `orphan_grace`: the same when this process has died;
    Ray kills what a worker has started when the worker ends, so the warden is a child of a child then.
    """
    boot = [sys.executable, "-I", "-c", _BOOT, _ROOT]
    return [*boot, str(os.getpid()), str(grace), str(orphan_grace), *watched]


def main() -> int:
    """Run the command; its exit code, as a shell gives it."""
    parent, grace, orphan_grace, watched = int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), sys.argv[5:]
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    if orphan_grace:
        _die_with(parent, signal.SIGKILL)
        parent = os.getpid()
        if warden := os.fork():
            return _wait_for(warden)
    processes.become_subreaper()
    _die_with(parent, signal.SIGHUP)
    shim = [sys.executable, "-I", "-S", exec_shim.__file__, str(os.getpid()), "--"]
    child = subprocess.Popen([*shim, *watched], start_new_session=True, preexec_fn=_let_through)
    root = processes.Process(child.pid)
    while child.poll() is None:
        match signal.sigwait(_HEARD):
            case signal.SIGTERM:
                break
            case signal.SIGHUP:
                grace = orphan_grace
                break
            case _:
                processes.reap(processes.orphans(os.getpid(), {child.pid}))
    processes.kill_tree([root], signum=signal.SIGTERM, grace=grace)
    while adopted := processes.orphans(os.getpid(), {child.pid}):
        processes.reap(adopted)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _die_with(parent: int, signum: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        sys.exit(1)  # it died before


def _wait_for(warden: int) -> int:
    while signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGTERM:
        os.kill(warden, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(warden, 0)[1])
    return code if code >= 0 else 128 - code


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
