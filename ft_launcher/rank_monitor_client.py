"""What a rank's code calls: heartbeats, sections, calculated timeouts and requests to the launcher.

Heartbeats and sections are stamps in a page shared with the rank's monitor: they never block, whatever the monitor
does. All the rest goes over a Unix socket, with a limit on every wait.
"""

import faulthandler
import logging
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import msgspec

from ft_launcher import procfs, rank_reports, timeouts
from ft_launcher.config import FaultToleranceConfig
from ft_launcher.errors import RankMonitorClientError
from ft_launcher.ladder import Checkpoint, ResumeHint
from ft_launcher.messages import CheckpointSaved, ControlRequested, ResumedFrom, WorkloadControlRequest
from ft_launcher.page import Slot, StampPage
from ft_launcher.rank_limits import RankLimits
from ft_launcher.rank_link import Greeting, MonitorGoneError, RankLink
from ft_launcher.rank_notice import UNCONNECTED, Answers
from ft_launcher.timeouts import HeartbeatTimeouts, Observed, SectionTimeouts

__all__ = ["SOCKET_ENV", "RankInfo", "RankMonitorClient"]

logger = logging.getLogger(__name__)

SOCKET_ENV = "FT_RANK_MONITOR_IPC_SOCKET"

ANSWER_SECONDS = 10.0
"""How long a call waits for the monitor: one that is stuck is replaced within 9 s, and this is a little more."""

SAVE_STEP_SECONDS = 30.0
"""How long `should_checkpoint` waits for the launchers to agree, which takes them milliseconds: longer than they need
to find that one of them is lost, upon which all ranks are restarted."""

STACK_SIGNAL = signal.SIGRTMIN + 9
"""On this signal the rank writes the stacks of its threads. Real-time signals have no other default use."""

# Plain numbers and a global: an IntEnum as an index would double the cost of a heartbeat.
_HEARTBEAT = int(Slot.HEARTBEAT)
_IDLE_SINCE = int(Slot.IDLE_SINCE)
_ASKED = int(Slot.ASKED)
_NOTICE = int(Slot.NOTICE)
_STEP = int(Slot.STEP)
_monotonic_ns = time.monotonic_ns
_NS = 1e-9


class RankInfo(msgspec.Struct, frozen=True):
    """Which rank this process is."""

    global_rank: int
    local_rank: int
    host: str
    pid: int


class RankMonitorClient:
    """The connection of one rank to its rank monitor.

    Thread-safe. In a forked child it stays silent: a child never speaks for its parent. Methods other than
    `send_workload_control_request`, `resume_hint`, `report_resume`, `report_checkpoint`, `state_dict` and
    `load_state_dict` need `init_workload_monitoring()` first and raise RankMonitorClientError without it.
    """

    def __init__(self) -> None:
        self.cfg: FaultToleranceConfig | None = None
        self.rank_info: RankInfo | None = None
        self.is_initialized = False
        self._limits = RankLimits()
        # Reentrant: a signal handler of the user may close the sections while this thread opens one.
        self._lock = threading.RLock()
        # Another one, as a question may wait for the monitor: a section never does.
        self._link_lock = threading.RLock()
        self._link: RankLink | None = None
        self._is_forked = False
        self._page = StampPage(-1)
        self._stamps = self._page.stamps
        self._stacks_fd: int | None = None
        self._open: set[str] = set()
        self._longest_ns: dict[str, int] = {}
        self._longest_heartbeat_ns = 0
        self._longest_outside_ns = 0
        self._first_heartbeat_ns = 0
        self._answers = Answers()
        self._has_adopted = threading.Event()
        _clients.add(self)

    # -- start and end --------------------------------------------------------------------------------------------

    def init_workload_monitoring(self) -> None:
        """Connect to this rank's monitor; from here on silence is limited by the configured timeouts.

        Waits up to 10 s for a monitor that does not answer, and then goes on without: the connection is made in the
        background when the launcher has replaced it. Raises RankMonitorClientError when called twice, when the script
        was not started by ft_launcher, and when the monitor refuses this process.
        """
        with self._lock:
            if self.is_initialized:
                raise RankMonitorClientError("init_workload_monitoring() was called already")
            link = self._connection()
            self.rank_info = RankInfo(
                global_rank=int(os.environ.get("RANK", "0")),
                local_rank=int(os.environ.get("LOCAL_RANK", "0")),
                host=socket.gethostname(),
                pid=os.getpid(),
            )
            self._open.clear()
            try:
                with self._link_lock:
                    greeting = link.greet(ANSWER_SECONDS)
                self._adopt(greeting)
                self._page.begin()
                self._send_limits_if_loaded()
            except MonitorGoneError as error:
                logger.warning("rank %d: %s; trying on in the background", self.rank_info.global_rank, error)
                self.cfg = FaultToleranceConfig()
                self._page.begin()
                self._stamps[Slot.NOTICE] = UNCONNECTED
                self._has_adopted.clear()
                self._link = None
                threading.Thread(target=self._adopt_later, args=(link,), daemon=True, name="ft_connect").start()
            self.is_initialized = True

    def shutdown_workload_monitoring(self) -> None:
        """Stop the monitoring of heartbeats and sections; only `rank_teardown_timeout` still counts."""
        with self._lock:
            self._check()
            self._stamps[Slot.TEARDOWN] = _monotonic_ns()
            self.is_initialized = False
        # Not while another thread asks something: its monitor may be stuck.
        if self._link_lock.acquire(blocking=False):
            try:
                if self._link is not None:
                    self._link.close()
            finally:
                self._link_lock.release()

    def abort(self) -> None:
        """Say that this process is handling an error: its open sections and heartbeats do not count any more.

        Like `shutdown_workload_monitoring`, but may be called in any state and from any handler, and never raises.
        """
        self._stamps[Slot.TEARDOWN] = _monotonic_ns()

    def __enter__(self) -> "RankMonitorClient":
        self.init_workload_monitoring()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.abort()
        if self.is_initialized:
            self.shutdown_workload_monitoring()

    # -- signs of life --------------------------------------------------------------------------------------------

    def send_heartbeat(self) -> None:
        """Say that this rank moves. Costs one store into the shared page."""
        if not self.is_initialized:
            self._check()
        stamps = self._stamps
        now = _monotonic_ns()
        before = stamps[_HEARTBEAT]
        stamps[_HEARTBEAT] = now
        if not before:
            # From where the monitor counts the limit that follows from it.
            self._first_heartbeat_ns = now - (stamps[Slot.RECONNECTED] or _process_started_ns())
        elif now - before > self._longest_heartbeat_ns:
            self._longest_heartbeat_ns = now - before

    def start_section(self, name: str) -> None:
        """Open section `name` (1 to 64 bytes of UTF-8). Sections may nest and overlap in any order.

        Raises RankMonitorClientError when it is open already.
        """
        if not self.is_initialized:
            self._check()
        with self._lock:
            slot = self._slot(name)
            stamps = self._stamps
            now = _monotonic_ns()
            if stamps[slot]:
                raise RankMonitorClientError(f"section {name!r} is open already")
            stamps[slot] = now
            if not self._open and now - stamps[_IDLE_SINCE] > self._longest_outside_ns:
                self._longest_outside_ns = now - stamps[_IDLE_SINCE]
            self._open.add(name)

    def end_section(self, name: str) -> None:
        """Close section `name`. Raises RankMonitorClientError when it is not open."""
        if not self.is_initialized:
            self._check()
        with self._lock:
            slot = self._slot(name)
            stamps = self._stamps
            opened = stamps[slot]
            if not opened:
                raise RankMonitorClientError(f"section {name!r} is not open")
            self._close_section(name, slot, opened)

    def end_all_sections(self) -> None:
        """Close every section that is open."""
        if not self.is_initialized:
            self._check()
        with self._lock:
            for name, slot in self._page.slots.items():
                if self._stamps[slot]:
                    self._close_section(name, slot, self._stamps[slot])

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Open section `name` for the time of a `with` block; it is closed by an exception too."""
        self.start_section(name)
        try:
            yield
        finally:
            # Not after end_all_sections(), abort() or shutdown inside the block: there is nothing left to close then.
            with self._lock:
                slot = self._slot(name)
                opened = self._stamps[slot]
                if self.is_initialized and opened:
                    self._close_section(name, slot, opened)

    # -- preemption -----------------------------------------------------------------------------------------------

    def should_checkpoint(self, step: int) -> bool:
        """Say whether to save a checkpoint at `step`, as the machine is about to be taken away or somebody wants it.

        The same answer at the same step on all ranks, without a collective: True once for a notice. All ranks must
        call it at the same places, with the same global step, 0 or more, that grows. Without a notice it costs a store
        and a load; from a notice on it waits, for milliseconds, until the launchers have agreed on the step.
        """
        if not self.is_initialized:
            self._check()
        stamps = self._stamps
        # In this order: see rank_notice.py.
        stamps[_ASKED] = step + 1
        if stamps[_NOTICE] == self._answers.done:
            return False
        if stamps[_NOTICE] == UNCONNECTED:
            return self._should_checkpoint_once_connected(step)
        return self._answers.answer(stamps, step, self._await_save_step)

    def exit_for_preemption(self) -> NoReturn:
        """End this process for a notice: the launcher asks for another start of the job and uses no restart for it.

        Ends the monitoring, and raises SystemExit with code 75 (EX_TEMPFAIL), so only in the main thread does it end
        the process.
        """
        if self.rank_info is None:
            self._check()
        self._answers.finish(self._stamps)
        self._stamps[Slot.LEAVING] = 1
        if self.is_initialized:
            self.shutdown_workload_monitoring()
        raise SystemExit(os.EX_TEMPFAIL)

    def _await_save_step(self) -> bool:
        stamps = self._stamps
        with self._link_lock:
            known = self._connection().hear_until(lambda: stamps[Slot.SAVE_AT] != 0, SAVE_STEP_SECONDS)
        if not known:
            logger.error("nobody said within %g s at which step to save; going on without", SAVE_STEP_SECONDS)
        return known

    def _should_checkpoint_once_connected(self, step: int) -> bool:
        if not self._has_adopted.wait(ANSWER_SECONDS):
            self._stamps[Slot.NOTICE] = 0  # not again at each step
            return False
        return self.should_checkpoint(step)

    # -- checkpoints (ladder.py) ------------------------------------------------------------------------------------

    def resume_hint(self) -> ResumeHint | None:
        """Give from which checkpoint to go on, the same on all ranks; None: no one is suspect, so go on as ever."""
        return rank_reports.given_hint()

    def report_resume(self, path: "str | os.PathLike[str] | None", step: int | None = None) -> bool:
        """Say, before it is loaded, from which checkpoint this attempt goes on; `path` None: from the beginning.

        `step`: the checkpoint's; None: the one that it was reported with when it was saved. By all ranks, with the
        same path, or by rank 0 alone. True once the launcher holds it, whatever then becomes of this process; False
        when it is about to stop this rank, and, with an error in the log, when nobody answered within 10 s. Raises
        RankMonitorClientError for a path or a step that cannot be one.
        """
        if path is None and step:
            raise RankMonitorClientError(f"report_resume(None, {step}): without a checkpoint the step is 0")
        checkpoint = Checkpoint(None, 0) if path is None else rank_reports.checkpoint(path, step)
        return self._report("from which checkpoint it goes on", lambda number: ResumedFrom(number, checkpoint))

    def report_checkpoint(self, path: "str | os.PathLike[str]", step: int | None) -> bool:
        """Say that a whole checkpoint stands at `path` now, and so is not suspect; `step` None: that it was removed.

        By one rank, or by all with the same path. The rest as with `report_resume`.
        """
        checkpoint = rank_reports.checkpoint(path, step)
        return self._report("what it has saved", lambda number: CheckpointSaved(number, checkpoint))

    def report_step(self, step: int) -> None:
        """Say that this rank has come to `step`, 0 or more. Costs one store into the shared page."""
        if not self.is_initialized:
            self._check()
        self._stamps[_STEP] = step + 1

    def _report(self, what: str, report: Callable[[int], ResumedFrom | CheckpointSaved]) -> bool:
        if self._is_forked:
            logger.error("the launcher was not told %s: a forked child never speaks for its parent", what)
            return False
        if self._stamps[Slot.STOPPED]:
            return False
        with self._link_lock:
            link = self._connection()
            try:
                link.ask(report(link.next_number()), ANSWER_SECONDS)
            # Also where the monitor refuses this process: a training does not end for what it could not tell.
            except (MonitorGoneError, RankMonitorClientError) as error:
                logger.error("the launcher was not told %s: %s", what, error)  # noqa: TRY400 - a sentence for a person
                return False
            return True

    # -- timeouts from observation --------------------------------------------------------------------------------

    @property
    def hb_timeouts(self) -> HeartbeatTimeouts:
        """The timeouts of heartbeats in force."""
        return self._limits.heartbeat

    @property
    def section_timeouts(self) -> SectionTimeouts:
        """The timeouts of sections in force."""
        return self._limits.section

    def calculate_and_set_hb_timeouts(self, skip_if_not_ready: bool = False) -> bool:
        """Set both heartbeat timeouts to `safety_factor` times the longest intervals that any rank has seen.

        A collective over the default process group: all ranks must call it. Every rank needs two heartbeats first;
        without them it returns False on all ranks (`skip_if_not_ready`) or raises RankMonitorClientError on all.
        """
        self._check()
        is_calculated = self._limits.calculate_heartbeats(
            self._seen(), self._config.safety_factor, skip_if_not_ready=skip_if_not_ready
        )
        if is_calculated:
            self._send_limits()
        return is_calculated

    def calculate_and_set_section_timeouts(
        self,
        selected_sections: Collection[str] | None = None,
        calc_out_of_section: bool = True,
        skip_if_not_ready: bool = False,
    ) -> bool:
        """Set the timeouts of `selected_sections` (None: all that have one) from the longest times that any rank saw.

        A collective like `calculate_and_set_hb_timeouts`; every rank must have closed each of the sections once, and
        have been outside of all sections once if `calc_out_of_section`. Other sections keep what they have.
        """
        self._check()
        is_calculated = self._limits.calculate_sections(
            self._seen(),
            self._config.safety_factor,
            selected_sections,
            out_of_section=calc_out_of_section,
            skip_if_not_ready=skip_if_not_ready,
        )
        if is_calculated:
            self._send_limits()
        return is_calculated

    def process_group_timeout(self) -> timedelta | None:
        """Give the `timeout` for `init_process_group` with which a hang is found, and named, by the monitor first.

        It is longer than every limit that counts from now on, and 10 minutes at least; the limits on the first sign of
        life count until it is there. None, which is torch's default for the backend, where nothing is limited.
        """
        self._check()
        limits = [self.hb_timeouts.subsequent, self.section_timeouts.out_of_section]
        limits += self.section_timeouts.section.values()
        if not self._stamps[_HEARTBEAT] and not self._page.slots:
            limits += [self._config.rank_startup_timeout, self.hb_timeouts.initial]
        seconds = timeouts.for_process_group(limits, self._config.rank_termination_grace)
        return None if seconds is None else timedelta(seconds=seconds)

    def state_dict(self) -> dict[str, Any]:
        """Give the timeouts in force, and what they were calculated from, as plain dicts for a checkpoint."""
        return self._limits.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the calculated ones of the timeouts in `state_dict()` in force, at once or from the start of monitoring.

        Raises RankMonitorClientError when `state` is something else.
        """
        self._limits.load_state_dict(state)
        if self.is_initialized:
            self._send_limits()

    # -- requests -------------------------------------------------------------------------------------------------

    def send_workload_control_request(self, req: WorkloadControlRequest) -> bool:
        """Ask the launcher to end the job, or to go on without this node.

        True once the launcher holds the request, so that the rank may exit at once; it survives a monitor that is
        replaced meanwhile. False, and an error in the log, when nobody answered within 10 s, and in a forked child.
        """
        if self._is_forked:
            logger.error("the request %s was not sent: a forked child never speaks for its parent", req.action.name)
            return False
        with self._link_lock:
            link = self._connection()
            text = None if req.description is None else req.description[:512]
            try:
                link.ask(ControlRequested(link.next_number(), req.action, text), ANSWER_SECONDS)
            except MonitorGoneError as error:
                logger.error("the launcher did not get the request %s: %s", req.action.name, error)  # noqa: TRY400
                return False
            return True

    # -- within ---------------------------------------------------------------------------------------------------

    @property
    def _config(self) -> FaultToleranceConfig:
        return self.cfg or FaultToleranceConfig()

    def _check(self) -> None:
        if not self.is_initialized:
            raise RankMonitorClientError("monitoring is off: call init_workload_monitoring() first")

    def _connection(self) -> RankLink:
        if self._is_forked:
            raise RankMonitorClientError("a forked child never speaks for its parent: make a client of its own")
        if self._link is None:
            path = os.environ.get(SOCKET_ENV)
            if not path:
                raise RankMonitorClientError(f"this process was not started by ft_launcher: {SOCKET_ENV} is not set")
            self._link = RankLink(path, STACK_SIGNAL)
            weakref.finalize(self, self._link.close)
        return self._link

    def _adopt(self, greeting: Greeting, told_meanwhile: StampPage | None = None) -> None:
        page = StampPage(greeting.page_fd)
        os.close(greeting.page_fd)
        self.cfg = msgspec.msgpack.decode(greeting.config, type=FaultToleranceConfig)
        self._limits.configure(self.cfg)
        if told_meanwhile is not None:
            page.copy_from(told_meanwhile)
        self._page, self._stamps = page, page.stamps
        # Written by C code in the signal handler, so it works while some thread holds the GIL for ever.
        faulthandler.register(STACK_SIGNAL, file=greeting.stacks_fd, all_threads=True, chain=False)
        if self._stacks_fd is not None:
            _close(self._stacks_fd)
        self._stacks_fd = greeting.stacks_fd

    def _adopt_later(self, link: RankLink) -> None:
        while True:
            try:
                greeting = link.greet(ANSWER_SECONDS)
                break
            except MonitorGoneError:
                continue
            except RankMonitorClientError as error:
                logger.error("%s; it is not monitored", error)  # noqa: TRY400 - a sentence for a person
                return
        with self._lock:
            self._adopt(greeting, told_meanwhile=self._page)
        with self._link_lock:
            if self._link is not None:
                self._link.close()
            self._link = link
        self._has_adopted.set()
        self._send_limits_if_loaded()

    def _slot(self, name: str) -> int:
        slot = self._page.slots.get(name)
        if slot is None:
            try:
                slot = self._page.section_slot(name)
            except ValueError as error:
                raise RankMonitorClientError(str(error)) from None
        return slot

    def _close_section(self, name: str, slot: int, opened: int) -> None:
        now = _monotonic_ns()
        stamps = self._stamps
        self._open.discard(name)
        # Before the section is closed: a monitor that looks in between must not see an old idle time and no section.
        stamps[_IDLE_SINCE] = now
        stamps[slot] = 0
        if now - opened > self._longest_ns.get(name, 0):
            self._longest_ns[name] = now - opened

    def _seen(self) -> Observed:
        return Observed(
            initial=self._first_heartbeat_ns * _NS or None,
            heartbeat=self._longest_heartbeat_ns * _NS or None,
            sections={name: longest * _NS for name, longest in self._longest_ns.items()},
            out_of_section=self._longest_outside_ns * _NS or None,
        )

    def _send_limits_if_loaded(self) -> None:
        if self._limits.are_loaded:
            self._send_limits()

    def _send_limits(self) -> None:
        if self._is_forked:
            return
        with self._link_lock:
            link = self._connection()
            try:
                link.ask(self._limits.message(link.next_number()), ANSWER_SECONDS)
            except MonitorGoneError as error:
                logger.warning("the rank monitor did not get new timeouts: %s", error)

    def _fall_silent(self) -> None:
        # In a forked child: what it calls from here on moves a page that nobody looks at.
        self._lock, self._link_lock = threading.RLock(), threading.RLock()
        self._is_forked = self._is_forked or self.is_initialized or self._link is not None
        if self._link is not None:
            self._link.close()
        self._page = StampPage(-1)
        self._stamps = self._page.stamps
        self._open = set()
        if self._stacks_fd is not None:
            faulthandler.unregister(STACK_SIGNAL)
            _close(self._stacks_fd)
            self._stacks_fd = None


def _close(descriptor: int) -> None:
    with suppress(OSError):  # the script has closed all descriptors, as daemons do
        os.close(descriptor)


def _process_started_ns() -> int:
    """When this process was started, on the clock of the stamps."""
    entry = procfs.read_entry(os.getpid())
    ticks = 0 if entry is None else entry.started
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return _monotonic_ns() - int(age * 1e9)


_clients: "weakref.WeakSet[RankMonitorClient]" = weakref.WeakSet()


def _silence_child() -> None:
    for client in list(_clients):
        client._fall_silent()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_silence_child)
