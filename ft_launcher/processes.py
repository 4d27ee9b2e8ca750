"""Finds, signals, kills and reaps everything that a rank has started."""

import contextlib
import os
import select
import signal
from collections.abc import Collection, Iterable
from time import monotonic

from msgspec import Struct

from ft_launcher.procfs import Entry, ancestry, newest_pid, read_entry, read_environment, read_pids

__all__ = ["Process", "Survivor", "Tree", "become_subreaper", "kill_tree", "orphans", "reap", "wait_gone"]

_PR_SET_CHILD_SUBREAPER = 36
_SWEEP = 0.05  # seconds; look again so soon although something still lives, as it may be forking
_EMPTY_PASSES = 3
_SETTLE = 0.1  # seconds; a chain of forks goes unseen while each generation ends within one pass over /proc


class Survivor(Struct, frozen=True):
    """A process that SIGKILL did not end in time; `state` as /proc writes it, usually "D" (the kernel holds it)."""

    pid: int
    name: str
    state: str


def become_subreaper() -> None:
    """From now on daemonised descendants become children of this process, not of init, when their parent dies."""
    import ctypes  # 0.4 MB and 5 ms that the monitors, which import this module too, need not have

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


class Process:
    """One process held by a pidfd: what is sent through it never reaches a later process of the same number."""

    def __init__(self, pid: int, started: int | None = None) -> None:
        """Raises `ProcessLookupError` if it is gone, or is not the one that started at `started`."""
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        try:
            entry = read_entry(pid)
            # It may have died, and its number have been given away, between the two lines above. While the pidfd can
            # be signalled (a zombie can) the number is still its own, and so was the entry.
            with contextlib.suppress(PermissionError):
                signal.pidfd_send_signal(self.pidfd, 0)
        except BaseException:
            self.close()
            raise
        if entry is None or started not in (None, entry.started):
            self.close()
            raise ProcessLookupError(f"no process {pid} that started at {started}")
        self.started, self.group, self.session = entry.started, entry.group, entry.session

    def send(self, signum: int) -> None:
        """Signal it. That it was gone, or that we may not, is no error: whoever must know looks whether it lives."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(self.pidfd, signum)

    def stop(self, signum: int) -> None:
        """Signal it and continue it: in this order a stopped one wakes to the signal, and does nothing else first."""
        self.send(signum)
        self.send(signal.SIGCONT)

    def is_gone(self) -> bool:
        """It has exited; perhaps nobody has reaped it yet."""
        return not wait_gone([self.pidfd], 0.0)

    def close(self) -> None:
        """Let go of it; harmless twice."""
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


def wait_gone(pidfds: Iterable[int], seconds: float) -> set[int]:
    """Block until all these processes have exited (zombies have), at most so long; the pidfds of those alive."""
    deadline = monotonic() + min(seconds, 1e6)  # poll() refuses more than 24 days
    alive = set(pidfds)
    poll = select.poll()
    for pidfd in alive:
        poll.register(pidfd, select.POLLIN)
    while alive and (ready := poll.poll(max(0.0, deadline - monotonic()) * 1000)):
        for pidfd, _ in ready:
            poll.unregister(pidfd)
            alive.discard(pidfd)
    return alive


class Tree:
    """Everything that `roots` have started, found anew by each `look` and held by pidfds until `close`.

    By parent links; by the sessions that were made in the tree, which a child cannot enter from outside; and by the
    environment entries `markers` ("NAME=value"), which a daemon that gave up both keeps. A daemon that was also
    started with a cleaned environment comes back to the launcher: see `orphans`. Never this process, its ancestors
    or `exclude`.
    """

    def __init__(self, roots: Iterable[Process], *, markers: Iterable[str] = (), exclude: Collection[int] = ()) -> None:
        self._markers = {os.fsencode(marker) for marker in markers}
        self._exclude = frozenset(exclude)
        self._known = {(root.pid, root.started): None for root in roots}  # in this order, roots first
        self._sessions = {root.session for root in roots if root.session == root.pid}
        # A root that leads no session (a multiprocessing worker) shares the launcher's.
        self._foreign = {root.session for root in roots} - self._sessions
        self._held: dict[int, Process] = {}
        self._passed: set[tuple[int, int]] = set()
        self.is_restless = False  # the last look saw something new that was gone at once, as in a chain of forks
        # One look holds no more than half of the descriptors that we may open; the next finds what is left.
        self._most = os.sysconf("SC_OPEN_MAX") // 2

    def close(self) -> None:
        """Let go of all members."""
        while self._held:
            self._held.popitem()[1].close()

    def look(self) -> list[Process]:
        """Its living members, by one pass over /proc; they stay open until the next look. May raise `OSError`."""
        alive = wait_gone((member.pidfd for member in self._held.values()), 0.0)
        for pid in [pid for pid, member in self._held.items() if member.pidfd not in alive]:
            self._held.pop(pid).close()
        self.is_restless = False
        for entry in self._find({entry.pid: entry for pid in read_pids() if (entry := read_entry(pid))}):
            if entry.pid not in self._held and len(self._held) < self._most:
                self._hold(entry)
            if (entry.pid, entry.started) not in self._known:
                self._known[entry.pid, entry.started] = None
                self.is_restless |= entry.pid not in self._held
        return list(self._held.values())

    def _hold(self, entry: Entry) -> None:
        with contextlib.suppress(ProcessLookupError):  # it died first
            member = Process(entry.pid, entry.started)
            if member.is_gone():  # a zombie; it would take a place until its parent reaps it
                member.close()
            else:
                self._held[entry.pid] = member

    def _find(self, table: dict[int, Entry]) -> Iterable[Entry]:
        above = ancestry()
        foreign = self._foreign | {table[pid].session for pid in above if pid in table}
        by_parent: dict[int, list[Entry]] = {}
        by_session: dict[int, list[Entry]] = {}
        for entry in table.values():
            by_parent.setdefault(entry.parent, []).append(entry)
            by_session.setdefault(entry.session, []).append(entry)
        queue = [table[pid] for pid, started in self._known if pid in table and table[pid].started == started]
        for session in self._sessions:
            # A leader that is not ours has made a new session of this number, after the last of ours had gone.
            leader = table.get(session)
            if leader is None or (leader.pid, leader.started) in self._known:
                queue += by_session.get(session, ())
        # Whoever loses its parent goes to this process or one above it: only there can markers tell something new.
        adopted = [entry for parent in above for entry in by_parent.get(parent, ()) if self._markers]
        while adopted:
            environment = read_environment((entry := adopted.pop()).pid)
            if environment and environment & self._markers:
                queue.append(entry)
            elif environment is not None and not environment:  # it exits, and its children are about to move up
                adopted += by_parent.get(entry.pid, ())
                self.is_restless |= (entry.pid, entry.started) not in self._passed
                self._passed.add((entry.pid, entry.started))
        found: dict[int, Entry] = {}
        while queue:
            entry = queue.pop(0)
            if entry.pid in found or entry.pid in above or entry.pid in self._exclude:
                continue
            found[entry.pid] = entry
            queue += by_parent.get(entry.pid, ())
            if entry.session not in self._sessions and entry.session not in foreign:
                self._sessions.add(entry.session)
                queue += by_session[entry.session]
        return found.values()


def kill_tree(
    roots: Collection[Process],
    *,
    markers: Collection[str] = (),
    exclude: Collection[int] = (),
    signum: int = signal.SIGTERM,
    grace: float,
    limit: float = 5.0,
) -> list[Survivor]:
    """Stop these processes and all they have started; whoever is still there in the end, usually nobody.

    Sends `signum` to the roots and their process groups (and continues what is stopped), waits for these up to `grace`
    seconds, and sends SIGKILL to the whole tree, over again until it stays empty, for up to `limit` seconds. Also when
    an exception (a second signal to the launcher) ends the wait; it then goes on to the caller.
    """
    leaders = {root.pid for root in roots}
    with contextlib.closing(Tree(roots, markers=markers, exclude=exclude)) as tree:
        try:
            asked = [member for member in tree.look() if {member.pid, member.group} & leaders]
            for member in asked:
                member.stop(signum)
            wait_gone((member.pidfd for member in asked), grace)
        finally:
            try:
                survivors = _sweep(tree, monotonic() + limit)
            except OSError:  # no descriptor is left to read /proc with; these are held already
                for root in roots:
                    root.send(signal.SIGKILL)
                raise
    return survivors


def _sweep(tree: Tree, deadline: float) -> list[Survivor]:
    living: list[Process] = []
    empty = quiet = 0
    settled_at = monotonic() + _SETTLE
    # Passes during which the machine started nothing missed nothing. It may never be that quiet: time must then do.
    while quiet < _EMPTY_PASSES and (empty < _EMPTY_PASSES or monotonic() < settled_at):
        newest = newest_pid()
        living = tree.look()
        if not (living or tree.is_restless):
            empty += 1
            quiet = quiet + 1 if newest is not None and newest == newest_pid() else 0
            continue
        for member in living:
            member.send(signal.SIGKILL)
        wait_gone((member.pidfd for member in living), min(_SWEEP, max(0.0, deadline - monotonic())))
        empty = quiet = 0
        if (now := monotonic()) >= deadline:
            break
        settled_at = now + _SETTLE
    entries = [(member, read_entry(member.pid)) for member in living if not member.is_gone()]
    return [Survivor(e.pid, e.name, e.state) for member, e in entries if e and e.started == member.started]


def orphans(of_pid: int, keep: Collection[int]) -> list[int]:
    """The children that a subreaper (the launcher) has adopted, zombies too; `keep`: those that it has started.

    Also left out are children in its own session: no rank's descendant can be there, while a helper that some library
    has started (multiprocessing's resource tracker) is. Call it from the thread that starts processes.
    """
    if (own := read_entry(of_pid)) is None:
        return []
    children = [e for pid in read_pids() if (e := read_entry(pid)) and e.parent == of_pid and pid not in keep]
    return [child.pid for child in children if child.session != own.session]


def reap(pids: Iterable[int]) -> set[int]:
    """Collect exactly these children, where they have exited; which of them had."""
    reaped = set()
    for pid in pids:
        with contextlib.suppress(ChildProcessError):  # someone else has
            reaped.add(os.waitpid(pid, os.WNOHANG)[0])
    return reaped - {0}
