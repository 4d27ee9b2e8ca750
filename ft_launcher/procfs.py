"""Reads what the kernel tells about processes: their table, threads, signal handlers and memory cgroups."""

import os

from msgspec import Struct

__all__ = ["Entry", "ancestry", "belongs_to", "catches", "memory_limit", "newest_pid", "oom_kill_count",
           "read_entry", "read_environment", "read_pids", "stacks_from_proc", "state"]  # fmt: skip

# Paths are strings here: the monitors import this module, and pathlib would cost each of them 1 MB.


class Entry(Struct, frozen=True):
    """What /proc/PID/stat says. `started` (clock ticks since boot) tells a process from a later one of its number."""

    pid: int
    started: int
    parent: int
    group: int
    session: int
    state: str
    name: str


def read_pids(folder: str = "/proc") -> list[int]:
    """The numbers of all processes, or of the threads in a task folder; none if that has gone."""
    try:
        return [int(name) for name in os.listdir(folder) if name.isdigit()]  # noqa: PTH208  # ten times faster
    except (FileNotFoundError, ProcessLookupError):
        return []


def newest_pid() -> int | None:
    """The last number given to a process or thread; equal at two moments: none was created between them."""
    words = _read("/proc/loadavg").split()
    return int(words[4]) if len(words) == 5 else None


def read_entry(pid: int) -> Entry | None:
    """What the process table says about it (20 µs); None: it is gone."""
    try:
        stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        before, _, after = os.read(stat, 4096).rpartition(b")")  # a name may itself contain ")"
    except ProcessLookupError:
        return None
    finally:
        os.close(stat)
    fields = after.split(None, 20)
    state, name = fields[0].decode(), before.partition(b"(")[2].decode(errors="backslashreplace")
    return Entry(pid, int(fields[19]), int(fields[1]), int(fields[2]), int(fields[3]), state, name)


def state(pid: int) -> str:
    """ "R", "S", "D", "T", ... as in ps; "" when there is no such process any more."""
    entry = read_entry(pid)
    return entry.state if entry else ""


def ancestry(pid: int | None = None) -> set[int]:
    """This process (or `pid`), all above it, and init: from inside a container the way up may end before that."""
    above = {1}
    pid = os.getpid() if pid is None else pid
    while pid not in above and (entry := read_entry(pid)):
        above.add(pid)
        pid = entry.parent
    return above


def belongs_to(pid: int, root_pid: int) -> bool:
    """It is `root_pid`, or a descendant of it, or a process of its session whose parent has died."""
    entry = read_entry(pid)
    return entry is not None and (entry.session == root_pid or root_pid in ancestry(pid))


def read_environment(pid: int) -> frozenset[bytes] | None:
    """What it was started with ("NAME=value"); empty also if it exits or is gone; None: not for us to read."""
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():  # noqa: PTH116
            return None
        with open(f"/proc/{pid}/environ", "rb") as file:  # noqa: PTH123
            return frozenset(file.read().split(b"\0")) - {b""}
    except (FileNotFoundError, ProcessLookupError):
        return frozenset()
    except OSError:
        return None


def stacks_from_proc(pid: int, *, most_threads: int = 100) -> str:
    """What the kernel tells about each thread: its state, where it waits, its system call and (root) its stack.

    Not its command line, and nothing else that lies in its memory: such reads block behind a wedged page fault.
    """
    lines = []
    threads = sorted(read_pids(f"/proc/{pid}/task"))
    for thread in threads[:most_threads]:
        folder = f"/proc/{pid}/task/{thread}"
        states = [line[6:].strip() for line in _read(f"{folder}/status").splitlines() if line.startswith("State:")]
        name, waits_in = _read(f"{folder}/comm").strip(), _read(f"{folder}/wchan").removeprefix("0")
        lines.append(f"thread {thread} ({name}): {' '.join(states) or 'gone'}, waits in: {waits_in or 'nothing'}")
        lines.append(f"    system call: {_read(f'{folder}/syscall').strip() or 'not readable'}")
        lines += [f"    {line}" for line in _read(f"{folder}/stack").splitlines()]
    if len(threads) > most_threads:
        lines.append(f"and {len(threads) - most_threads} more threads")
    return "\n".join(lines) + "\n"


def catches(pid: int, signum: int) -> bool:
    """A handler of the process itself waits for this signal; without one, most signals would end it."""
    masks = [line for line in _read(f"/proc/{pid}/status").splitlines() if line.startswith("SigCgt:")]
    return any(int(mask.split()[1], 16) >> (signum - 1) & 1 for mask in masks)


def oom_kill_count(pid: int | str = "self") -> int | None:
    """How many processes of this one's memory cgroup the OOM killer has ended so far; None: not to be known.

    Ask about a living process: a dead one has left its cgroup. cgroup v1 does not count those of child groups.
    """
    folder = _memory_cgroup(pid)
    lines = (_read(f"{folder}/memory.events") or _read(f"{folder}/memory.oom_control")).splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def memory_limit(pid: int | str = "self") -> int | None:
    """The lowest limit in bytes on this process's memory cgroup and those above it; None: unlimited or unknown."""
    folder = _memory_cgroup(pid)
    in_v1 = (line.split() for line in _read(f"{folder}/memory.stat").splitlines())
    limits = [words[1] for words in in_v1 if words[0] == "hierarchical_memory_limit"]
    while folder and (limit := _read(f"{folder}/memory.max")):
        limits.append(limit.strip())
        folder = os.path.dirname(folder)  # noqa: PTH120
    # Version 2 writes no limit as "max", version 1 as the largest number of pages.
    return min((int(limit) for limit in limits if limit.isdigit() and int(limit) < 2**62), default=None)


def _memory_cgroup(pid: int | str) -> str:
    """Its folder: of version 1 where that has the memory controller (also beside a version 2 mount), else of 2."""
    groups = {line.split(":")[1]: line.split(":", 2)[2] for line in _read(f"/proc/{pid}/cgroup").splitlines()}
    in_v1 = next((names for names in groups if "memory" in names.split(",")), None)
    group = groups.get(in_v1 or "")
    for line in _read("/proc/self/mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        root, point = mount.split()[3:5]
        kind, _, options = system.split(" ", 2)
        if group and kind == ("cgroup" if in_v1 else "cgroup2") and (not in_v1 or "memory" in options.split(",")):
            # In a container the mount's root may be the group itself, or the group lie outside of what is mounted.
            folder = f"{point}/{group.removeprefix(root).lstrip('/')}".rstrip("/")
            return folder if os.path.isdir(folder) else point  # noqa: PTH112
    return ""


def _read(path: str) -> str:
    """The text of a file of the kernel; "" if it is gone or not for us."""
    try:
        with open(path, errors="backslashreplace") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return ""
