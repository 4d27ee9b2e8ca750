"""The system calls by which a process changes the files below a directory: listed, or failed or cut off one by one.

A forked child has the kernel stop it before each of them (seccomp), and its parent, which traces it, looks at the call
and lets it be done, has it fail with an errno, or kills the child before it is done. All other calls run at full speed.
The child says where a region begins and ends by stopping itself, so that one child can go through many failures.
"""

import ctypes
import errno
import os
import platform
import signal
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Call", "Fault", "mark", "trace", "why_not"]

# From the kernel's arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h. Of each call: which
# arguments are a directory's descriptor and a path ("dp", twice for two), a path alone ("p"), or a descriptor ("f").
_SHAPES = {
    "write": "f", "pwrite64": "f", "writev": "f", "pwritev": "f", "pwritev2": "f", "fsync": "f", "fdatasync": "f",
    "sync_file_range": "f", "ftruncate": "f", "fallocate": "f", "sendfile": "f",
    "open": "p", "creat": "p", "mkdir": "p", "rmdir": "p", "unlink": "p", "truncate": "p", "rename": "pp",
    "link": "pp", "openat": "dp", "mkdirat": "dp", "unlinkat": "dp", "renameat": "dpdp", "renameat2": "dpdp",
    "linkat": "dpdp",
}  # fmt: skip
_X86_64 = {
    "write": 1, "pwrite64": 18, "writev": 20, "pwritev": 296, "pwritev2": 328, "fsync": 74, "fdatasync": 75,
    "sync_file_range": 277, "ftruncate": 77, "fallocate": 285, "sendfile": 40,
    "open": 2, "creat": 85, "mkdir": 83, "rmdir": 84, "unlink": 87, "truncate": 76, "rename": 82,
    "link": 86, "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264, "renameat2": 316, "linkat": 265,
}  # fmt: skip
_AARCH64 = {
    "write": 64, "pwrite64": 68, "writev": 66, "pwritev": 70, "pwritev2": 287, "fsync": 82, "fdatasync": 83,
    "sync_file_range": 84, "ftruncate": 46, "fallocate": 47, "sendfile": 71,
    "truncate": 45, "openat": 56, "mkdirat": 34, "unlinkat": 35, "renameat": 38, "renameat2": 276, "linkat": 37,
}  # fmt: skip
# By machine: AUDIT_ARCH_…, the numbers of the calls.
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}

_PTRACE_TRACEME, _PTRACE_CONT, _PTRACE_GETREGSET, _PTRACE_SETREGSET = 0, 7, 0x4204, 0x4205
_PTRACE_SETOPTIONS, _PTRACE_GETEVENTMSG, _PTRACE_GET_SYSCALL_INFO = 0x4200, 0x4201, 0x420E
_O_TRACECLONE, _O_TRACESECCOMP, _O_EXITKILL = 1 << 3, 1 << 7, 1 << 20
_EVENT_SECCOMP = 7
_WALL = 0x40000000
_NT_PRSTATUS, _NT_ARM_SYSTEM_CALL = 1, 0x404
_AT_FDCWD = -100
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_RET_TRACE, _RET_ALLOW = 0x7FF00000, 0x7FFF0000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("program", ctypes.c_char_p))


class _Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@dataclass(frozen=True)
class Call:
    """A call that changes a file below the directory. Paths are relative to it; `onto` is what a rename makes."""

    name: str
    path: str
    onto: str = ""

    def __str__(self) -> str:
        return f"{self.name}({self.path}{' -> ' + self.onto if self.onto else ''})"


@dataclass(frozen=True)
class Fault:
    """What becomes of call `at` of a region, counted from 0: it fails with `errno` (None: the child dies before it).

    Where `stays`, all later calls of the region fail too, as on a disk that is full or gone.
    """

    at: int
    errno: int | None = None
    stays: bool = False


def why_not() -> str:
    """Say why nothing can be traced here; empty: it can."""
    if platform.machine() not in _MACHINES:
        return f"system calls of {platform.machine()} are not known here"
    try:
        trace(mark, Path("/"), [None])
    except OSError as error:
        return f"processes cannot be traced here: {error}"
    return ""


def mark() -> None:
    """Say that a region begins, or ends; for what is traced, in its first thread."""
    # To this thread: what is sent to the process may be taken by any thread of it that comes from a stop of its own.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def trace(work: Callable[[], object], directory: Path, faults: Sequence[Fault | None]) -> tuple[int, list[list[Call]]]:
    """Fork, do `work` there, and have its regions go as `faults` says, one for each region; None: nothing happens.

    Gives the exit status as os.waitstatus_to_exitcode does, and by region what was called, what failed or was never
    done included. The caller must have one thread and no other child. OSError where processes cannot be traced.
    """
    child = os.fork()
    if child == 0:
        code = 125
        try:
            _become_traced()
            code = 1
            work()
            code = 0
        finally:
            os._exit(code)
    return _Tracer(child, directory, faults).run()


class _Tracer:
    def __init__(self, child: int, directory: Path, faults: Sequence[Fault | None]) -> None:
        self._child = child
        self._directory = str(directory)
        self._faults = list(faults)
        self._regions: list[list[Call]] = []
        self._is_inside = False

    def run(self) -> tuple[int, list[list[Call]]]:
        _, status = os.waitpid(self._child, 0)
        if not os.WIFSTOPPED(status):
            raise OSError(errno.EPERM, "it may not be traced, or has no filter of system calls")
        _ptrace(_PTRACE_SETOPTIONS, self._child, 0, _O_TRACECLONE | _O_TRACESECCOMP | _O_EXITKILL)
        _ptrace(_PTRACE_CONT, self._child, 0, 0)
        while True:
            thread, status = os.waitpid(-1, _WALL)
            if not os.WIFSTOPPED(status):
                if thread == self._child:
                    return os.waitstatus_to_exitcode(status), self._regions
                continue  # one of its threads
            try:
                self._on_stop(thread, status)
            except ProcessLookupError:
                continue  # killed meanwhile

    def _on_stop(self, thread: int, status: int) -> None:
        number, event = os.WSTOPSIG(status), status >> 16
        to_deliver = 0
        if event == _EVENT_SECCOMP:
            if self._is_inside and not self._on_call(thread):
                return
        elif event == 0 and number == signal.SIGSTOP:
            if thread == self._child:  # a new thread begins with one, too
                self._is_inside = not self._is_inside
                self._regions += [[]] if self._is_inside else []
        elif event == 0 and number != signal.SIGTRAP:
            to_deliver = number
        _ptrace(_PTRACE_CONT, thread, 0, to_deliver)

    def _on_call(self, thread: int) -> bool:
        """Note it and do with it as is wanted; whether the thread goes on."""
        call = _call(thread, self._directory)
        if call is None:
            return True
        region = self._regions[-1]
        region.append(call)
        index = len(self._regions) - 1
        fault = self._faults[index] if index < len(self._faults) else None
        at = len(region) - 1
        if fault is None or (at != fault.at and not (fault.stays and at > fault.at)):
            return True
        _fail(thread, fault.errno or errno.EINTR)
        if fault.errno is None:
            os.kill(self._child, signal.SIGKILL)
            return False
        return True


def _become_traced() -> None:
    _ptrace(_PTRACE_TRACEME, 0, 0, 0)
    architecture, numbers = _MACHINES[platform.machine()]
    # struct sock_filter, linux/filter.h: load the architecture, load the number, compare, and say what is to be done.
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, _RET_ALLOW), (0x20, 0, 0, 0)]
    left = len(numbers)
    for number in numbers.values():
        code.append((0x15, left, 0, number))
        left -= 1
    code += [(0x06, 0, 0, _RET_ALLOW), (0x06, 0, 0, _RET_TRACE)]
    program = b"".join(struct.pack("HBBI", *each) for each in code)
    for option, value in (
        (_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1)),
        (_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER)),
    ):
        argument = ctypes.byref(_Filter(len(code), program)) if option == _PR_SET_SECCOMP else ctypes.c_ulong(0)
        if _libc.prctl(option, value, argument, ctypes.c_ulong(0), ctypes.c_ulong(0)):
            raise OSError(ctypes.get_errno(), "prctl")
    os.kill(os.getpid(), signal.SIGSTOP)


def _call(thread: int, directory: str) -> Call | None:
    """Give the call that the thread is about to do; None when it changes nothing below `directory`."""
    buffer = ctypes.create_string_buffer(128)
    _ptrace(_PTRACE_GET_SYSCALL_INFO, thread, len(buffer), ctypes.addressof(buffer))
    number, *arguments = struct.unpack_from("7Q", buffer, 24)
    name = next(name for name, each in _MACHINES[platform.machine()][1].items() if each == number)
    if name in ("open", "openat") and not arguments[_SHAPES[name].index("p") + 1] & os.O_CREAT:
        return None
    paths = []
    base = ""
    for argument, kind in zip(arguments, _SHAPES[name], strict=False):
        match kind:
            case "f":
                paths.append(_link(thread, str(argument)))
            case "d":
                base = _base(thread, argument)
            case "p":
                paths.append(os.path.normpath(Path(base or _base(thread, _AT_FDCWD)) / _text(thread, argument)))
    if not any(path == directory or path.startswith(directory.rstrip("/") + "/") for path in paths):
        return None
    return Call(name, *(os.path.relpath(path, directory) for path in paths))


def _base(thread: int, descriptor: int) -> str:
    signed = ctypes.c_int(descriptor & 0xFFFFFFFF).value
    return str(Path(f"/proc/{thread}/cwd").readlink()) if signed == _AT_FDCWD else _link(thread, str(signed))


def _link(thread: int, descriptor: str) -> str:
    try:
        return str(Path(f"/proc/{thread}/fd/{descriptor}").readlink())
    except FileNotFoundError:
        return ""  # no such descriptor: the call will fail


def _text(thread: int, address: int) -> str:
    with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        # Not beyond a page at a time: the next may not be there.
        data = b""
        while b"\0" not in data:
            data += memory.read(4096 - (address + len(data)) % 4096)
    return os.fsdecode(data.split(b"\0", 1)[0])


def _fail(thread: int, number: int) -> None:
    """Have the call that the thread is about to do not be done, and give -errno."""
    registers = ctypes.create_string_buffer(34 * 8)  # struct user_regs_struct: 27 on x86_64, 34 on aarch64
    piece = _Piece(ctypes.addressof(registers), len(registers))
    _ptrace(_PTRACE_GETREGSET, thread, _NT_PRSTATUS, ctypes.addressof(piece))
    if platform.machine() == "x86_64":
        struct.pack_into("q", registers, 15 * 8, -1)  # orig_rax
        struct.pack_into("q", registers, 10 * 8, -number)  # rax
    else:
        none = ctypes.c_int(-1)
        of_call = _Piece(ctypes.addressof(none), ctypes.sizeof(none))
        _ptrace(_PTRACE_SETREGSET, thread, _NT_ARM_SYSTEM_CALL, ctypes.addressof(of_call))
        struct.pack_into("q", registers, 0, -number)  # x0
    _ptrace(_PTRACE_SETREGSET, thread, _NT_PRSTATUS, ctypes.addressof(piece))


def _ptrace(request: int, thread: int, address: int, value: int) -> None:
    ctypes.set_errno(0)
    if _libc.ptrace(request, thread, address, value) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")
