"""Becomes the command it is given, as a process that the kernel kills when its launcher dies.

    python -I -S exec_shim.py LAUNCHER_PID -- COMMAND [ARGUMENT...]

It stands in front of every rank because torch owns the `Popen` that starts them. Only modules that the interpreter
has loaded anyway, and `_ctypes`: `os` would add 1.3 ms to the 7 of a bare start, `ctypes` 2 more, `signal` 4.
"""

import _signal  # type: ignore[import-not-found]  # typeshed knows it as part of `signal` only
import posix
import sys

_PR_SET_PDEATHSIG = 1
_COULD_NOT_RUN = 126
_NOT_FOUND = 127


def main(argv: list[str]) -> int:
    """Run the command in place of this process; the exit code of a shell when that cannot be done."""
    launcher, command = int(argv[1]), argv[3:]
    _die_with_parent()
    # The launcher may have died before the line above; nobody would then ever send the signal that it asks for.
    if posix.getppid() != launcher:
        return 1
    # A rank's answers to these two, and Slurm's warnings, come when it is ready for them; by default they kill.
    # The launcher has blocked them, as its own handlers do not come with it (signals.py).
    for ignored in (_signal.SIGUSR1, _signal.SIGUSR2):
        _signal.signal(ignored, _signal.SIG_IGN)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (_signal.SIGUSR1, _signal.SIGUSR2))
    # What `Popen` restores before it starts a program, and this interpreter's start has undone.
    for restored in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(restored, _signal.SIG_DFL)
    reason, code = _exec(command, _environment())
    name = command[0] if command[0].isprintable() else repr(command[0])
    posix.write(2, f"ft_launcher: cannot run {name}: {reason}\n".encode(errors="backslashreplace"))
    return code


def _die_with_parent() -> None:
    try:
        import _ctypes

        prctl = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")  # type: ignore[arg-type]  # None: this program
    except (ImportError, OSError):
        # A Python without libffi, or a static one. The rank monitor still kills its rank when the launcher is gone.
        return
    _ctypes.call_function(prctl, (_PR_SET_PDEATHSIG, _signal.SIGKILL))


def _environment() -> dict[bytes, bytes]:
    """The environment as it was given: in the C locale, starting Python sets LC_CTYPE (PEP 538)."""
    environment = dict(posix.environ)
    try:
        with open("/proc/self/environ", "rb") as file:  # noqa: PTH123  # pathlib costs 5 ms
            given = file.read().split(b"\0")
    except OSError:
        return environment
    environment.pop(b"LC_CTYPE", None)
    for entry in given:
        if entry.startswith(b"LC_CTYPE="):
            environment[b"LC_CTYPE"] = entry[len(b"LC_CTYPE=") :]
    return environment


def _exec(command: list[str], environment: dict[bytes, bytes]) -> tuple[str, int]:
    """Does not return if it succeeds; else the reason and the exit code. Looks the command up as `Popen` does."""
    program = command[0].encode(sys.getfilesystemencoding(), "surrogateescape")
    paths = [program]
    if b"/" not in program:
        folders = environment.get(b"PATH", b"/bin:/usr/bin").split(b":")
        paths = [folder + b"/" + program if folder else program for folder in folders]
    reason, code = "no such file or directory", _NOT_FOUND
    for path in paths:
        try:
            posix.execve(path, command, environment)
        except (FileNotFoundError, NotADirectoryError):
            if _exists(path):
                reason = "its interpreter (the #! line, or the dynamic loader) does not exist"
        except (OSError, ValueError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            code = _COULD_NOT_RUN
    return reason, code


def _exists(path: bytes) -> bool:
    try:
        posix.stat(path)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv))
