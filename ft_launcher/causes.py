"""Why a rank, a node or the job ended: one sentence for a person and one exit code for a program."""

import signal
import sys
from collections.abc import Iterable
from typing import Literal, TypeAlias

from msgspec import Struct

if sys.version_info >= (3, 11):
    from typing import assert_never
else:
    from typing_extensions import assert_never

__all__ = ["Cause", "Excluded", "Exhausted", "ExitCodes", "Exited", "HostLost", "Hung", "LauncherSignalled",
           "MonitorsFailed", "NodeLost", "NotMonitored", "OutOfMemory", "Preempted", "Refused", "ShutDown", "Signalled",
           "Stopped", "TooFewNodes", "Unkillable", "exit_code", "from_returncode", "sentence", "signal_name",
           "worst"]  # fmt: skip


class Exited(Struct, frozen=True, tag=True):
    code: int  # with which the rank ended itself


class Signalled(Struct, frozen=True, tag=True):
    signum: int  # that ended the rank
    by: Literal["us", "unknown"] = "unknown"
    oom_counted: bool = True  # the kernel's count of OOM kills could be read, and had not risen


class Hung(Struct, frozen=True, tag=True):
    what: str  # the limit that passed: "section 'step' open for 12.3 s, timeout 12 s"


class OutOfMemory(Struct, frozen=True, tag=True):
    limit_bytes: int | None = None  # of the rank's memory cgroup; None: all of the machine


class Stopped(Struct, frozen=True, tag=True):
    """We stopped the rank because another one failed."""


class Excluded(Struct, frozen=True, tag=True):
    description: str | None = None  # why the rank asked to take its node out of the job


class ShutDown(Struct, frozen=True, tag=True):
    description: str | None = None  # why the rank asked to end the job


class LauncherSignalled(Struct, frozen=True, tag=True):
    signum: int  # that someone sent to the launcher


class MonitorsFailed(Struct, frozen=True, tag=True):
    description: str  # how often and how fast monitors died


class NotMonitored(Struct, frozen=True, tag=True):
    """No rank connected to its monitor, although monitoring was required."""


class Unkillable(Struct, frozen=True, tag=True):
    pid: int  # that SIGKILL did not end; what holds it would hold a new rank too
    state: str  # as /proc writes it: "D"
    name: str = ""


class NodeLost(Struct, frozen=True, tag=True):
    name: str  # of the node
    how: str  # "its launcher died"


class HostLost(Struct, frozen=True, tag=True):
    description: str  # which host, and what to do about it


class TooFewNodes(Struct, frozen=True, tag=True):
    description: str  # who is there, and how many are needed


class Refused(Struct, frozen=True, tag=True):
    description: str  # what two nodes were told differently, and what to change


class Exhausted(Struct, frozen=True, tag=True):
    description: str  # which checkpoints were tried, and how often


class Preempted(Struct, frozen=True, tag=True):
    what: str  # the notice: "SIGTERM"; "": the ranks ended by themselves
    name: str = ""  # of the node that it came to
    step: int | None = None  # at which the ranks saved; None: nobody knows
    unsaved: str = ""  # the ranks that had not saved when there was no more time


Cause: TypeAlias = (
    Exited | Signalled | Hung | OutOfMemory | Stopped | Excluded | ShutDown | LauncherSignalled | MonitorsFailed
    | NotMonitored | Unkillable | NodeLost | HostLost | TooFewNodes | Refused | Exhausted | Preempted
)  # fmt: skip
ExitCodes: TypeAlias = Literal["torchrun", "classified"]

_FAILED = 1
_USAGE = 2
_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the job may well succeed elsewhere or later
_DO_NOT_RESTART = 93  # what newer nvidia-resiliency-ext launchers end with when requeueing would be pointless

# Python itself names only the first and the last real-time signal; 32 and 33 are the C library's and have no name.
_NAMES = {n: f"SIGRTMIN+{n - signal.SIGRTMIN}" for n in range(signal.SIGRTMIN + 1, signal.SIGRTMAX)}
_NAMES |= {known.value: known.name for known in signal.Signals}
# What a process brings on itself: nobody sent these, so that nobody need be looked for.
_OWN_DOING = {
    "SIGILL": "illegal instruction", "SIGTRAP": "trap", "SIGABRT": "it aborted itself", "SIGFPE": "arithmetic error",
    "SIGBUS": "no memory behind an address, as with a full /dev/shm", "SIGSEGV": "invalid memory reference",
    "SIGPIPE": "it wrote to a pipe that nobody reads", "SIGXCPU": "limit of CPU time",
    "SIGXFSZ": "limit of file size", "SIGSYS": "forbidden system call",
}  # fmt: skip
_REQUESTS = {"SIGHUP": "hangup", "SIGINT": "interrupt", "SIGQUIT": "quit", "SIGTERM": "request to stop"}


def from_returncode(returncode: int, *, by: Literal["us", "unknown"] = "unknown") -> Cause:
    """The cause that a `Popen.returncode` tells: a negative one is a signal."""
    return Exited(returncode) if returncode >= 0 else Signalled(-returncode, by)


def sentence(cause: Cause) -> str:
    """What happened, in one printable line; of a rank (the first five) to be put behind "rank 1 (pid 4242): "."""
    # Descriptions and names come from ranks: an escape sequence or a line break would let them forge our lines.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _words(cause))


def _words(cause: Cause) -> str:
    match cause:
        case Exited(code):
            name = _NAMES.get(code - 128)
            return f"exited with code {code}" + (f" (a shell's code for {name})" if name else "")
        case Signalled():
            return _signalled(cause)
        case Hung(what):
            return f"hung: {what}; killed by its rank monitor"
        case OutOfMemory(limit_bytes):
            limit = "of the machine" if limit_bytes is None else f"limit {limit_bytes / 2**30:.1f} GiB"
            return f"killed by the kernel's OOM killer (memory {limit})"
        case Stopped():
            return "stopped by this launcher because another rank failed"
        case Excluded(description):
            return "a rank asked to exclude this node" + (f": {description}" if description else "")
        case ShutDown(description):
            return "a rank asked to shut the job down" + (f": {description}" if description else "")
        case LauncherSignalled(signum):
            return f"the launcher received signal {signal_name(signum)}"
        case NotMonitored():
            return "no rank connected to its monitor, and monitoring is required"
        case MonitorsFailed(description):
            return f"the rank monitors keep failing: {description}"
        case Unkillable(pid, state, name):
            meaning = " (uninterruptible: the kernel, usually a driver, holds it)" if state == "D" else ""
            return f"process {pid}{name and f' ({name})'} does not die of SIGKILL: state {state}{meaning}"
        case NodeLost(name, how):
            return f"node {name} was lost: {how}"
        case Preempted():
            return _preempted(cause)
        case HostLost(description) | TooFewNodes(description) | Refused(description) | Exhausted(description):
            return description
        case unreachable:
            assert_never(unreachable)


def exit_code(cause: Cause, style: ExitCodes = "torchrun") -> int:
    """The launcher's exit code for this root cause. Usage errors never get here: they are `UsageError`, 2."""
    match cause:
        case Exited(0):
            return 0
        case Preempted(unsaved=unsaved):
            return _FAILED if unsaved else _REQUEUE  # whatever the style: torchrun has nothing like it
        case LauncherSignalled(signum):
            return 128 + signum
        case Refused():
            return _USAGE
        case Excluded() | MonitorsFailed() | Unkillable() | HostLost() | TooFewNodes():
            return _REQUEUE if style == "classified" else _FAILED
        case ShutDown() | Exhausted():
            return _DO_NOT_RESTART if style == "classified" else _FAILED
        case Exited() | Signalled() | Hung() | OutOfMemory() | Stopped() | NotMonitored() | NodeLost():
            return _FAILED
        case unreachable:
            assert_never(unreachable)


def worst(causes: Iterable[Cause]) -> Cause | None:
    """The root among causes given in the order of time; of equals the first. None: there were none."""
    return min(causes, key=_order, default=None)


def _order(cause: Cause) -> int:
    match cause:
        case (
            LauncherSignalled() | Excluded() | ShutDown() | MonitorsFailed() | NotMonitored() | Unkillable()
            | NodeLost() | HostLost() | TooFewNodes() | Refused() | Exhausted() | Preempted()
        ):  # fmt: skip
            return 0  # these end the node; whatever its ranks did besides does not matter
        case Hung() | OutOfMemory():
            return 1  # the peers of such a rank fail within milliseconds, and may be seen first
        case Exited(0):
            return 4
        case Signalled(_, "us") | Stopped():
            return 3
        case Exited() | Signalled():
            return 2
        case unreachable:
            assert_never(unreachable)


def signal_name(signum: int) -> str:
    """ "15 (SIGTERM)"; a real-time signal as "36 (SIGRTMIN+2)"."""
    return f"{signum} ({_NAMES[signum]})" if signum in _NAMES else str(signum)


def _preempted(cause: Preempted) -> str:
    where = f" at node {cause.name}" if cause.name else ""
    notice = f" ({cause.what}{where})" if cause.what else ""
    saved = f": saved at step {cause.step}" if cause.step is not None else ""
    return f"preempted{notice}{saved}" + (f"; not saved in time: {cause.unsaved}" if cause.unsaved else "")


def _signalled(cause: Signalled) -> str:
    name = _NAMES.get(cause.signum, "")
    words = ", ".join(filter(None, (name, _OWN_DOING.get(name) or _REQUESTS.get(name))))
    killed = f"killed by signal {cause.signum}" + (f" ({words})" if words else "")
    if cause.by == "us":
        return f"{killed} from this launcher"
    if name in _OWN_DOING:
        return killed
    if name != "SIGKILL":
        return f"{killed} that this launcher did not send"
    if cause.oom_counted:
        return f"{killed} that neither this launcher nor the kernel's OOM killer sent"
    return f"{killed} that this launcher did not send; perhaps the OOM killer, whose count cannot be read here"
