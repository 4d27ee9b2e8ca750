"""The launcher's side of its rank monitors: starts them, tells them about ranks, hears them, replaces dead ones."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

import ft_launcher
from ft_launcher import processes
from ft_launcher.config import FaultToleranceConfig
from ft_launcher.errors import FtLauncherError
from ft_launcher.messages import (
    MAX_MESSAGE_BYTES,
    FromLauncher,
    FromMonitor,
    JobConnected,
    LimitsChanged,
    MonitorSettings,
    ProtocolError,
    RankEnded,
    RankStarted,
    SaveStepKnown,
    Speaker,
    SpeakerChanged,
    decode_from_monitor,
    encode,
)
from ft_launcher.page import Slot, StampPage, create_page
from ft_launcher.processes import Process
from ft_launcher.rank_monitor_client import SOCKET_ENV
from ft_launcher.run_dir import RunDir
from ft_launcher.watch import Limits, Progress, Stamps

__all__ = ["MonitorsFailedError", "RankMonitors", "limits_of"]

logger = logging.getLogger(__name__)

SILENT_SECONDS = 5.0
"""A monitor that has not looked at its rank for this long is replaced; it looks every 2 s (rank_monitor_server.py)."""

SILENT_AGAIN_SECONDS = 1.0
"""And is still silent this much later: both may have been stopped together, and the launcher continued first."""

CHECK_SECONDS = 2.0
"""How often the launcher asks whether its monitors look. Their deaths wake it by themselves."""

RESPAWNS, RESPAWN_WINDOW = 5, 60.0
"""More monitors than this lost within so many seconds: hang detection cannot be had on this node."""

# -I and -S: a monitor needs nothing of the user's site directories, PYTHONPATH or PYTHONSTARTUP, and starts faster.
_BOOT = (
    "import sys; sys.path += sys.argv.pop().split(chr(10)); from ft_launcher.rank_monitor_server import main; main()"
)


class MonitorsFailedError(FtLauncherError):
    """Monitors die as fast as they are started."""


def limits_of(config: FaultToleranceConfig) -> Limits:
    """Give the limits that `config` sets for a rank."""
    return Limits(
        startup=config.rank_startup_timeout,
        initial=config.initial_rank_heartbeat_timeout,
        heartbeat=config.rank_heartbeat_timeout,
        sections=config.rank_section_timeouts,
        out_of_section=config.rank_out_of_section_timeout,
        teardown=config.rank_teardown_timeout,
    )


class _WatchedRank:
    """What a monitor that takes over must be told about the process of its rank. Owns its descriptors."""

    def __init__(self, process: Process, started_at: float, stacks_path: str) -> None:
        self.pid = process.pid
        self.started_ticks = process.started
        self.started_at = started_at
        self.stacks_path = stacks_path
        self.speaker: Speaker | None = None
        self.limits: Limits | None = None
        self.page_fd = create_page()
        self.page = StampPage(self.page_fd)
        self.stacks_fd = os.memfd_create("ft_launcher_stacks", os.MFD_CLOEXEC)

    def message(self) -> RankStarted:
        return RankStarted(self.pid, self.started_ticks, self.started_at, self.stacks_path, self.speaker, self.limits)

    def close(self) -> None:
        self.page.close()
        os.close(self.page_fd)
        os.close(self.stacks_fd)


class _Monitor:
    """One monitor: its process, which may be replaced, and the listening socket, which stays."""

    def __init__(self, settings: MonitorSettings, listener: socket.socket) -> None:
        self.settings = settings
        self.listener = listener
        self.rank: _WatchedRank | None = None
        self.progress: Progress | None = None  # of its last rank, when it was stopped
        self.lost_at: deque[float] = deque(maxlen=RESPAWNS)
        self.silent_since: float | None = None
        self._start()

    def _start(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        inherited = (theirs.fileno(), self.listener.fileno())
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT, *map(str, inherited), _import_path()],
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        self.pidfd = os.pidfd_open(self.process.pid)
        self.tell(self.settings)

    def tell(self, message: FromLauncher, descriptors: list[int] | None = None) -> None:
        # A monitor that is gone or stuck is replaced, and the next one is told the whole state.
        with suppress(OSError):
            socket.send_fds(self.socket, [encode(message)], descriptors or [], socket.MSG_DONTWAIT)

    def tell_rank(self) -> None:
        if self.rank is not None:
            self.tell(self.rank.message(), [self.rank.page_fd, self.rank.stacks_fd])

    def replace(self) -> None:
        self.stop(kill=True)
        self.silent_since = None
        self._start()
        self.tell_rank()

    def stop(self, *, kill: bool) -> None:
        self.socket.close()
        # It ends by itself when its socket does; a stuck one would keep us here.
        if kill or processes.wait_gone([self.pidfd], 2.0):
            self.process.kill()
        self.process.wait()
        os.close(self.pidfd)


class RankMonitors:
    """All rank monitors of this node. A context manager: leaving it ends them and removes their directory."""

    def __init__(self, count: int, config: FaultToleranceConfig, log_dir: str, environ: Mapping[str, str]) -> None:
        """Start `count` monitors, one for each local rank. `log_dir`: what they prune if the launcher cannot."""
        self._environ = environ
        self._run_dir = RunDir(environ)
        self._job_connected = False
        self._lease = 0.0
        self._monitors: list[_Monitor] = []
        raw = msgspec.Raw(encode(config))
        try:
            for local_rank in range(count):
                settings = MonitorSettings(
                    local_rank=local_rank,
                    limits=limits_of(config),
                    check_interval=config.workload_check_interval,
                    termination_signal=int(config.rank_termination_signal),
                    termination_grace=config.rank_termination_grace,
                    marker=self.marker(local_rank),
                    run_dir=self._run_dir.path,
                    log_dir=log_dir,
                    config=raw,
                )
                self._monitors.append(_Monitor(settings, self._run_dir.listen(f"m{local_rank}")))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "RankMonitors":
        return self

    def __exit__(self, *_: object) -> None:
        self.ranks_ended()
        for monitor in self._monitors:
            monitor.socket.close()
        for monitor in self._monitors:
            monitor.stop(kill=False)
            monitor.listener.close()
        self._run_dir.remove()

    # -- towards the ranks ----------------------------------------------------------------------------------------

    def socket_path(self, local_rank: int) -> str:
        """Give the path of the socket at which local rank `local_rank` finds its monitor."""
        return self._run_dir.socket_path(f"m{local_rank}")

    def marker(self, local_rank: int) -> str:
        """Give the entry that the environments of a rank and of all it starts have, and nobody else's."""
        return f"{SOCKET_ENV}={self.socket_path(local_rank)}"

    def ranks_started(self, ranks: Mapping[int, Process], started_at: float, stacks_paths: Mapping[int, str]) -> None:
        """Have `ranks` (by local rank) watched from `started_at`, the moment before they were started."""
        for local_rank, process in ranks.items():
            monitor = self._monitors[local_rank]
            monitor.rank = _WatchedRank(process, started_at, stacks_paths[local_rank])
            monitor.progress = None
            self.extend_lease(self._lease)
            monitor.tell_rank()

    def extend_lease(self, until: float) -> None:
        """Let the ranks go on until then (`time.monotonic()`); afterwards the monitors kill them, whatever this process
        is doing. From any thread; without a first call they may go on for ever.
        """
        self._lease = until
        for monitor in self._monitors:
            rank = monitor.rank
            if rank is not None:
                with suppress(ValueError):  # the main thread is closing it
                    rank.page.stamps[Slot.LEASE] = int(until * 1e9)

    def ranks_ended(self) -> None:
        """Have no process watched any more: they are about to be stopped, or have ended."""
        for monitor in self._monitors:
            rank, monitor.rank = monitor.rank, None
            if rank is not None:
                # First: a rank that saves before it ends must not wait for a monitor that has forgotten it.
                rank.page.stamps[Slot.STOPPED] = 1
                monitor.tell(RankEnded(rank.pid))
                monitor.progress = rank.page.progress()
                rank.close()

    def restore_sockets(self) -> None:
        """Bind the sockets anew if somebody removed them, so that the ranks to be started find them."""
        if all(self._run_dir.has(f"m{index}") for index in range(len(self._monitors))):
            return
        logger.warning("the launcher's sockets in %s were removed; making new ones", self._run_dir.path)
        self._run_dir.remove()
        self._run_dir = RunDir(self._environ)
        for local_rank, monitor in enumerate(self._monitors):
            monitor.listener.close()
            monitor.listener = self._run_dir.listen(f"m{local_rank}")
            monitor.settings = msgspec.structs.replace(
                monitor.settings, marker=self.marker(local_rank), run_dir=self._run_dir.path
            )
            self._start_anew(monitor)

    def job_connected(self) -> None:
        """Some rank of the job uses the client: from now on silence at a rank's start counts."""
        if not self._job_connected:
            self._job_connected = True
            for monitor in self._monitors:
                monitor.tell(JobConnected())

    def stamps(self, local_rank: int) -> Stamps | None:
        """Give what the rank's page says now, None when no process of it is watched."""
        rank = self._monitors[local_rank].rank
        return rank.page.read() if rank is not None else None

    # -- a notice of preemption (preempting.py) ---------------------------------------------------------------------

    def progress(self) -> dict[int, Progress]:
        """Give by local rank how far the ranks of this node are, or were when they were stopped."""
        found = {}
        for local_rank, monitor in enumerate(self._monitors):
            rank = monitor.rank
            progress = rank.page.progress() if rank is not None else monitor.progress
            if progress is not None:
                found[local_rank] = progress
        return found

    def all_listen(self) -> bool:
        """Say whether all ranks have asked whether to save. Also from a signal's handler."""
        with suppress(ValueError):  # it has interrupted the closing of a page
            ranks = [monitor.rank for monitor in self._monitors]
            return all(rank is not None and rank.page.progress().asked >= 0 for rank in ranks)
        return False

    def give_notice(self, number: int) -> None:
        """Have the ranks wait when they ask next, until `save_at` says where to save."""
        for rank in self._watched():
            # In this order: who sees the notice must not take the step of an earlier one for its own.
            rank.page.stamps[Slot.SAVE_AT] = 0
            rank.page.stamps[Slot.NOTICE] = number

    def save_at(self, step: int) -> None:
        """Have the ranks save at `step`, or the first one after it that they ask about."""
        for rank in self._watched():
            rank.page.stamps[Slot.SAVE_AT] = step + 1
        # Only now: a rank that hears of it looks into its page, and one that connects later does so by itself.
        for monitor in self._monitors:
            monitor.tell(SaveStepKnown())

    def _watched(self) -> list[_WatchedRank]:
        return [monitor.rank for monitor in self._monitors if monitor.rank is not None]

    # -- from the monitors ----------------------------------------------------------------------------------------

    def pids(self) -> set[int]:
        """Give the process ids of the monitors."""
        return {monitor.process.pid for monitor in self._monitors}

    def filenos(self) -> list[int]:
        """Give the descriptors whose readability means that there is something to `hear()`."""
        return [fd for monitor in self._monitors for fd in (monitor.socket.fileno(), monitor.pidfd)]

    def hear(self) -> list[tuple[int, FromMonitor]]:
        """Give all messages that have come, with the local rank; replace monitors that died or are stuck.

        Raises MonitorsFailedError when they die as fast as they are started.
        """
        heard = []
        for local_rank, monitor in enumerate(self._monitors):
            heard += [(local_rank, message) for message in self._receive(monitor)]
            ended = not processes.wait_gone([monitor.pidfd], 0)
            if ended or self._is_stuck(monitor):
                # What it still said, until it was certainly gone: a rank may hold an acknowledgement of that.
                monitor.process.kill()
                monitor.process.wait()
                heard += [(local_rank, message) for message in self._receive(monitor)]
                self._replace(local_rank, monitor, "died" if ended else "is stuck")
        return heard

    def _receive(self, monitor: _Monitor) -> list[FromMonitor]:
        messages: list[FromMonitor] = []
        while True:
            try:
                packet = monitor.socket.recv(MAX_MESSAGE_BYTES, socket.MSG_DONTWAIT)
                if not packet:
                    return messages
                message = decode_from_monitor(packet)
            except ConnectionResetError:
                continue  # it died with messages of ours unread; its own come after this
            except (OSError, ProtocolError):
                return messages
            match message:
                case SpeakerChanged(pid=pid, speaker=speaker) if monitor.rank is not None and monitor.rank.pid == pid:
                    monitor.rank.speaker = speaker
                case LimitsChanged(pid=pid, limits=limits) if monitor.rank is not None and monitor.rank.pid == pid:
                    monitor.rank.limits = limits
                case _:
                    messages.append(message)

    def _is_stuck(self, monitor: _Monitor) -> bool:
        rank = monitor.rank
        if rank is None:
            monitor.silent_since = None
            return False
        now = time.monotonic()
        if now - max(rank.page.looked() or 0.0, rank.started_at, self._last_start(monitor)) <= SILENT_SECONDS:
            monitor.silent_since = None
        elif monitor.silent_since is None:
            monitor.silent_since = now
        # Seen twice: when launcher and monitors were stopped together, the first look after it would be too early.
        return monitor.silent_since is not None and now - monitor.silent_since >= SILENT_AGAIN_SECONDS

    def _last_start(self, monitor: _Monitor) -> float:
        return monitor.lost_at[-1] if monitor.lost_at else 0.0

    def _replace(self, local_rank: int, monitor: _Monitor, what: str) -> None:
        now = time.monotonic()
        if len(monitor.lost_at) == RESPAWNS and now - monitor.lost_at[0] < RESPAWN_WINDOW:
            raise MonitorsFailedError(
                f"the monitor of local rank {local_rank} was lost {RESPAWNS + 1} times within {RESPAWN_WINDOW:g} s:"
                " hangs cannot be detected on this node"
            )
        logger.warning("the monitor of local rank %d (pid %d) %s; replacing it", local_rank, monitor.process.pid, what)
        monitor.lost_at.append(now)
        self._start_anew(monitor)

    def _start_anew(self, monitor: _Monitor) -> None:
        monitor.replace()
        if self._job_connected:
            monitor.tell(JobConnected())


def _import_path() -> str:
    modules = (ft_launcher, msgspec)
    return "\n".join(dict.fromkeys(str(Path(module.__file__ or "").parent.parent) for module in modules))
