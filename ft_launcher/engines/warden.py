"""Stands between the supervisor and one engine, and sees that nothing of the engine outlives either.

An engine is a tree of processes (vLLM's server has a core, and that has workers). When the supervisor is killed, the
kernel tells its children only; so the child is this one, which then ends the tree. It ends with the engine's exit code.
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
_BOOT = "import sys; sys.path.append(sys.argv[1]); from ft_launcher.engines.warden import main; sys.exit(main())"
_ROOT = str(Path(ft_launcher.__file__).parent.parent)
_HEARD = {signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD}


def command(grace: float, engine: list[str]) -> list[str]:
    """Give the command line of a warden of this process."""
    return [sys.executable, "-I", "-c", _BOOT, _ROOT, str(os.getpid()), str(grace), *engine]


def main() -> int:
    """Run the engine; its exit code, as a shell gives it."""
    supervisor, grace, engine = int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    processes.become_subreaper()
    # From the supervisor's end on nobody waits for a grace.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
    if os.getppid() != supervisor:
        return 1
    shim = [sys.executable, "-I", "-S", exec_shim.__file__, str(os.getpid()), "--"]
    child = subprocess.Popen([*shim, *engine], start_new_session=True, preexec_fn=_let_through)
    root = processes.Process(child.pid)
    while child.poll() is None:
        match signal.sigwait(_HEARD):
            case signal.SIGTERM:
                break
            case signal.SIGHUP:
                grace = 0.0
                break
            case _:
                processes.reap(processes.orphans(os.getpid(), {child.pid}))
    processes.kill_tree([root], signum=signal.SIGTERM, grace=grace)
    while adopted := processes.orphans(os.getpid(), {child.pid}):
        processes.reap(adopted)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
