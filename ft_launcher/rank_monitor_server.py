"""The rank monitor: a small process beside one rank that kills it when it has been silent for too long.

It sleeps until the rank's next deadline, looks at the page that the rank writes, and sleeps again. Messages wake it:
from the launcher (a rank was started, a rank is being stopped) and from the rank (hello, new limits, requests). When
the launcher is gone it kills what is left of the rank, removes what the launcher left on the disk, and ends.
"""

import os
import selectors
import signal
import socket
import struct
import sys
import time
from contextlib import suppress

from ft_launcher import processes, procfs
from ft_launcher.leftovers import prune_empty, remove_run_dir
from ft_launcher.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL,
    CheckpointSaved,
    ControlRequested,
    FromMonitor,
    Hello,
    JobConnected,
    LimitsChanged,
    LimitsSet,
    MonitorSettings,
    ProtocolError,
    RankConnected,
    RankEnded,
    RankHung,
    RankReported,
    RankStarted,
    RankUnkillable,
    Ready,
    Refused,
    RequestAcknowledged,
    ResumedFrom,
    SaveStepKnown,
    Speaker,
    SpeakerChanged,
    ToRank,
    Welcome,
    decode_from_launcher,
    decode_from_rank,
    encode,
)
from ft_launcher.page import Slot, StampPage
from ft_launcher.processes import Process
from ft_launcher.rank_evidence import Evidence
from ft_launcher.watch import Deadline, Lag, Limits, deadline, evidence_at, next_look

__all__ = ["RankMonitor", "main"]

BEAT_SECONDS = 2.0
"""The launcher replaces a monitor that has not looked for 5 s (monitors.py); this leaves room for one late look."""

LAG_SECONDS = 0.25
"""Waking later than this means that the machine stood still, so its ranks did too. Ordinary lateness is below 10 ms."""

UNKILLABLE_SECONDS = 5.0
"""A process that SIGKILL has not ended by then is in uninterruptible sleep; tearing down 100 GiB takes 3 s."""

MAX_CONNECTIONS = 16

_CREDENTIALS = struct.Struct("iII")  # struct ucred of unix(7): pid, uid, gid


class _Rank:
    """The process of the rank that is watched now."""

    def __init__(self, process: Process, started: RankStarted, fds: list[int], limits: Limits, marker: str) -> None:
        page_fd, stacks_fd = fds
        self.process = process
        self.pid = process.pid
        self.started_at = started.started_at
        self.limits = started.limits or limits
        self.page = StampPage(page_fd)
        self.evidence = Evidence(process, marker, stacks_fd, started.stacks_path)
        if started.speaker is not None:
            self.evidence.heed(started.speaker)
        self.ended = False
        self.escalate_at: float | None = None
        self.give_up_at: float | None = None

    def close(self) -> None:
        self.page.close()
        os.close(self.page.fd)
        self.evidence.close()
        self.process.close()


class _Connection:
    """One process that talks to the monitor. Who it is, the kernel says; it speaks for the rank once it was greeted."""

    def __init__(self, connected: socket.socket, pid: int, uid: int) -> None:
        self.socket = connected
        self.pid = pid
        self.uid = uid
        self.greeted = False


class RankMonitor:
    """One monitor: `run()` until the launcher closes its end of `launcher`, or is gone."""

    def __init__(self, launcher: socket.socket, listener: socket.socket) -> None:
        self._launcher = launcher
        self._listener = listener
        self._settings: MonitorSettings | None = None
        self._rank: _Rank | None = None
        self._job_connected = False
        self._lags: tuple[Lag, ...] = ()
        self._connections: list[_Connection] = []
        self._launcher_is_there = True
        # Not epoll, which wakes up to 1 ms late because it counts in milliseconds.
        self._selector = selectors.SelectSelector()
        self._selector.register(launcher, selectors.EVENT_READ, self._hear_launcher)

    def run(self) -> None:
        """Watch until the launcher is gone; then kill what is left of the rank and clean up."""
        self._tell_launcher(Ready())
        while self._launcher_is_there:
            planned = self._plan()
            timeout = None if planned is None else max(0.0, planned - time.monotonic())
            ready = self._selector.select(timeout)
            now = time.monotonic()
            if planned is not None and now - planned > LAG_SECONDS:
                # The last few are enough: a lag counts only for waits that had begun before it.
                self._lags = (*self._lags[-15:], Lag(ended_at=now, seconds=now - planned))
            for key, _ in ready:
                key.data()
            if self._launcher_is_there:
                self._look()
        self._clean_up()

    # -- the watch ------------------------------------------------------------------------------------------------

    def _plan(self) -> float | None:
        rank, settings = self._rank, self._settings
        if rank is None or settings is None or rank.ended:
            return None
        now = time.monotonic()
        if rank.give_up_at is not None:
            return min(at for at in (rank.escalate_at, rank.give_up_at, now + BEAT_SECONDS) if at is not None)
        return next_look(self._due(rank), rank.limits, now, at_most=min(settings.check_interval, BEAT_SECONDS))

    def _due(self, rank: _Rank) -> Deadline | None:
        return deadline(
            rank.page.read(), rank.limits, rank.started_at, job_connected=self._job_connected, lags=self._lags
        )

    def _look(self) -> None:
        rank = self._rank
        if rank is None or rank.ended:
            return
        rank.page.stamps[Slot.LOOKED] = time.monotonic_ns()
        if rank.give_up_at is not None:
            self._finish_kill(rank)
            return
        due = self._due(rank)
        now = time.monotonic()
        if due is not None and due.at <= now:
            self._kill(rank, due)
        elif due is not None and evidence_at(due) <= now:
            rank.evidence.gather_for(due)

    def _kill(self, rank: _Rank, due: Deadline) -> None:
        settings = self._settings
        if settings is None:  # pragma: no cover - a rank is started after the settings were sent
            return
        rank.evidence.complete_for(due)
        now = time.monotonic()
        cause = due.sentence(now)
        # The launcher is told first: it must know the reason when it sees the rank's end.
        self._tell_launcher(RankHung(pid=rank.pid, cause=cause, killed_at=now, stacks_path=rank.evidence.path))
        number = signal.SIGKILL if due.is_fence else settings.termination_signal
        rank.process.stop(number)
        rank.give_up_at = now + UNKILLABLE_SECONDS
        if number == signal.SIGKILL:
            # Those seen before the launcher was told: what it starts in their place looks the same from outside.
            _kill_all(rank.evidence.members)
        else:
            rank.escalate_at = now + settings.termination_grace
            rank.give_up_at += settings.termination_grace
        # What the rank was doing is known since before the signal. It is written down after it: the file system may be
        # what hangs.
        rank.evidence.save(cause)

    def _finish_kill(self, rank: _Rank) -> None:
        now = time.monotonic()
        if rank.escalate_at is not None and rank.escalate_at <= now:
            rank.escalate_at = None
            _kill_all(rank.evidence.look())
        if rank.give_up_at is not None and rank.give_up_at <= now:
            entry = procfs.read_entry(rank.pid)
            self._tell_launcher(RankUnkillable(rank.pid, entry.state if entry is not None else "?"))
            rank.ended = True

    def _rank_exited(self) -> None:
        # The launcher sees it too and does what is to be done; here the watch is over.
        if self._rank is not None:
            self._selector.unregister(self._rank.process.pidfd)
            self._rank.ended = True

    # -- the launcher ---------------------------------------------------------------------------------------------

    def _hear_launcher(self) -> None:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._launcher, MAX_MESSAGE_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            # A socketpair whose other end was closed with unread messages gives ECONNRESET instead of an end.
            packet, descriptors = b"", []
        if not packet:
            self._launcher_is_there = False
            return
        message = decode_from_launcher(packet)
        match message:
            case MonitorSettings():
                self._settings = message
            case RankStarted():
                self._begin(message, descriptors)
            case RankEnded(pid=pid):
                if self._rank is not None and self._rank.pid == pid:
                    self._forget_rank()
            case JobConnected():
                self._job_connected = True
            case SaveStepKnown():
                for connection in [each for each in self._connections if each.greeted]:
                    self._answer(connection, message)

    def _begin(self, started: RankStarted, descriptors: list[int]) -> None:
        self._forget_rank()
        settings = self._settings
        try:
            process = Process(started.pid, started.started_ticks)
        except ProcessLookupError:
            settings = None  # it died first, and the launcher knows
        if settings is None:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        self._rank = _Rank(process, started, descriptors, settings.limits, settings.marker)
        self._selector.register(process.pidfd, selectors.EVENT_READ, self._rank_exited)
        # Only now: before it is known who may speak, connections wait in the queue.
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _forget_rank(self) -> None:
        rank, self._rank = self._rank, None
        if rank is None:
            return
        with suppress(KeyError):  # its end was seen already
            self._selector.unregister(rank.process.pidfd)
        self._selector.unregister(self._listener)
        for connection in list(self._connections):
            self._drop(connection)
        rank.close()

    def _tell_launcher(self, message: FromMonitor) -> bool:
        # A launcher that is gone is noticed at the next read; one that is stopped has room for 200 KiB of messages.
        try:
            self._launcher.send(encode(message), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def _clean_up(self) -> None:
        settings, rank = self._settings, self._rank
        if settings is None:
            return
        processes.kill_tree(
            [rank.process] if rank is not None else [], markers=[settings.marker], signum=signal.SIGKILL, grace=0.0
        )
        remove_run_dir(settings.run_dir, f"m{settings.local_rank}")
        prune_empty(settings.log_dir)

    # -- the rank -------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        with suppress(OSError):  # it went away again
            accepted, _ = self._listener.accept()
            accepted.setblocking(False)
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            pid, uid, _ = _CREDENTIALS.unpack(
                accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            connection = _Connection(accepted, pid, uid)
            if len(self._connections) >= MAX_CONNECTIONS:
                self._drop(next((each for each in self._connections if not each.greeted), self._connections[0]))
            self._connections.append(connection)
            self._selector.register(accepted, selectors.EVENT_READ, lambda: self._hear(connection))

    def _hear(self, connection: _Connection) -> None:
        if connection not in self._connections:
            return
        try:
            packet, ancillary, flags, _ = connection.socket.recvmsg(
                MAX_MESSAGE_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size)
            )
        except BlockingIOError:
            return
        except OSError:
            packet, ancillary, flags = b"", [], 0
        if not packet:
            self._drop(connection)
            return
        if flags & socket.MSG_TRUNC:
            self._refuse(connection, f"a message is longer than {MAX_MESSAGE_BYTES} bytes")
            return
        sender = next(
            (_CREDENTIALS.unpack(body)[0] for _, kind, body in ancillary if kind == socket.SCM_CREDENTIALS), 0
        )
        if sender != connection.pid:
            # A forked child with its parent's socket: it may not speak for it, and its parent is not to blame.
            return
        try:
            message = decode_from_rank(packet)
        except ProtocolError as error:
            self._refuse(connection, str(error))
            return
        if isinstance(message, Hello):
            self._greet(connection, message)
        elif connection.greeted:
            self._heed(connection, message)
        else:
            self._refuse(connection, "the first message must be a hello")

    def _greet(self, connection: _Connection, hello: Hello) -> None:
        rank, settings = self._rank, self._settings
        if rank is None or settings is None:
            self._refuse(connection, "no rank is running")
        elif connection.uid != os.getuid():
            self._refuse(connection, "it belongs to another user")
        elif hello.protocol != PROTOCOL:
            self._refuse(connection, f"it speaks protocol {hello.protocol}, this monitor {PROTOCOL}; use one version")
        elif not _belongs_to(connection.pid, rank.pid):
            self._refuse(connection, f"process {connection.pid} is not the rank's (pid {rank.pid}) or its descendant")
        elif self._speaks_another(rank, connection.pid):
            self._refuse(connection, "another process speaks for this rank already")
        else:
            for earlier in [each for each in self._connections if each.greeted]:
                self._drop(earlier)
            connection.greeted = True
            speaker = Speaker(connection.pid, hello.stack_signal)
            rank.evidence.heed(speaker)
            self._tell_launcher(SpeakerChanged(rank.pid, speaker))
            # Before the welcome: the rank may end on it, and the launcher must then know that it was monitored.
            self._tell_launcher(RankConnected(rank.pid))
            welcome = encode(Welcome(protocol=PROTOCOL, config=settings.config))
            try:
                socket.send_fds(connection.socket, [welcome], [rank.page.fd, rank.evidence.stacks_fd])
            except OSError:
                self._drop(connection)

    def _speaks_another(self, rank: _Rank, pid: int) -> bool:
        if any(each.greeted and each.pid != pid for each in self._connections):
            return True
        # Not connected, as its monitor was replaced: it will be, and until it shuts down nobody takes its place.
        return rank.evidence.speaker_pid() not in (None, pid) and rank.page.read().teardown is None

    def _heed(
        self, connection: _Connection, message: LimitsSet | ControlRequested | ResumedFrom | CheckpointSaved
    ) -> None:
        rank = self._rank
        if rank is None:  # pragma: no cover - connections are dropped with their rank
            return
        match message:
            case LimitsSet():
                rank.limits = Limits(
                    startup=rank.limits.startup,
                    initial=message.initial,
                    heartbeat=message.heartbeat,
                    sections=message.sections,
                    out_of_section=message.out_of_section,
                    teardown=rank.limits.teardown,
                )
                told = self._tell_launcher(LimitsChanged(rank.pid, rank.limits))
            case ControlRequested():
                told = self._tell_launcher(message)
            case ResumedFrom() | CheckpointSaved():
                told = self._tell_launcher(RankReported(rank.pid, message))
        if told:
            # Only now: the rank may exit on our answer, and the launcher must hold what it said by then.
            self._answer(connection, RequestAcknowledged(message.number))
        else:
            # The launcher is stopped, or slower than we: the rank connects and asks again, as long as it likes.
            self._drop(connection)

    def _answer(self, connection: _Connection, message: ToRank) -> None:
        try:
            connection.socket.send(encode(message), socket.MSG_NOSIGNAL)
        except OSError:
            self._drop(connection)

    def _refuse(self, connection: _Connection, reason: str) -> None:
        with suppress(OSError):
            connection.socket.send(encode(Refused(reason)), socket.MSG_NOSIGNAL)
        self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.socket.close()


def _kill_all(members: list[Process]) -> None:
    for member in members:
        member.send(signal.SIGKILL)


def _belongs_to(pid: int, rank_pid: int) -> bool:
    """Say whether `pid` is the rank's process, in its session, or a descendant (a script may start Python itself)."""
    while (entry := procfs.read_entry(pid)) is not None and pid > 1:
        if rank_pid in (pid, entry.session):
            return True
        pid = entry.parent
    return False


def main() -> None:
    """Run a monitor over the two inherited sockets whose descriptors are the arguments: launcher's, listening."""
    # Slurm and terminals signal every process of a step or group: a monitor ends with its launcher, not before.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # A loaded machine is no reason to be late, where we may say so (root); all that a monitor does takes 1 ms.
    with suppress(OSError):
        os.nice(-10)
    launcher, listener = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    RankMonitor(launcher, listener).run()
