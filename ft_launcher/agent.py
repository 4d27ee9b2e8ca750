"""torch's elastic agent, told more and woken sooner: it waits for events, and its stops keep their promises.

Everything else is torch's: the loop, the start of workers, their environment, logs, events and metrics. The private
methods overridden here have not changed from torch 2.6 to 2.15; tests/torch_contract pins them.
"""

import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from math import ceil
from pathlib import Path
from typing import Any

from msgspec import Struct
from torch.distributed.elastic import events
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.events.api import Event, EventMetadataValue, EventSource
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from ft_launcher import processes, procfs
from ft_launcher.causes import (
    Cause,
    Excluded,
    Exited,
    Hung,
    MonitorsFailed,
    OutOfMemory,
    Preempted,
    ShutDown,
    Signalled,
    Unkillable,
    from_returncode,
    sentence,
    worst,
)
from ft_launcher.job_rendezvous import JobRendezvous
from ft_launcher.ladder import NodeAttempt, named, step_of
from ft_launcher.messages import (
    CheckpointSaved,
    ControlRequested,
    FromMonitor,
    RankConnected,
    RankHung,
    RankReported,
    RankUnkillable,
    ResumedFrom,
    WorkloadAction,
)
from ft_launcher.monitors import CHECK_SECONDS, MonitorsFailedError, RankMonitors
from ft_launcher.node_preemption import NodePreemption
from ft_launcher.noticing import Notices
from ft_launcher.policy import NodeState
from ft_launcher.preempting import STOP_SECONDS
from ft_launcher.rank_monitor_client import SOCKET_ENV
from ft_launcher.records import End, Leave, Stop
from ft_launcher.signals import StopSignals

if sys.version_info >= (3, 11):
    from typing import assert_never
else:
    from typing_extensions import assert_never

__all__ = ["FtAgent", "Graces"]

logger = logging.getLogger(__name__)


FENCE_SECONDS = 0.5
"""The grace for the workers of a node that lost its host: less than what the others wait (meeting.py, settle)."""

ENDING_SECONDS = 1.0
"""How long a rank that has raised its exception is waited for, when one that failed later was the first to be gone."""

LEFTOVER_SECONDS = 1.0
"""The grace for what ranks leave running when all of them have succeeded: nobody waits for it any more."""


class Graces(Struct, frozen=True):
    """Seconds from SIGTERM (or the signal received) to SIGKILL: before a restart or after a failure, after a signal."""

    stop: float
    signal: float


class _Settled(Struct):
    """The workers of this node have ended, one way or the other; what follows is the leader's to say."""

    state: NodeState
    result: RunResult
    at: float


class FtAgent(LocalElasticAgent):
    """The agent of one node. `cause` says afterwards why the job ended, None for success."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: Any,
        monitors: RankMonitors,
        signals: StopSignals,
        graces: Graces,
        *,
        rendezvous: JobRendezvous,
        notices: Notices,
        preemption_grace: float | None,
        wake_every: float | None,
        exit_barrier_timeout: float,
        **torch_arguments: Any,
    ) -> None:
        """`wake_every`: seconds between looks at what gives no event (None: 2). The rest is for torch's agent."""
        super().__init__(spec=spec, logs_specs=logs_specs, exit_barrier_timeout=exit_barrier_timeout, **torch_arguments)
        self._job = rendezvous
        self._exit_barrier_seconds = exit_barrier_timeout
        self._settled: _Settled | None = None
        self.cause: Cause | None = None
        self.origin = ""  # where else it came from
        self.causes: dict[int, Cause] = {}
        self.has_started = False
        self.any_connected = False
        self.exit_codes: dict[int, int] = {}
        self._monitors = monitors
        self._wake_every = CHECK_SECONDS if wake_every is None else min(wake_every, CHECK_SECONDS)
        self._graces = graces
        # Where a signal comes between two looks at the workers, torch stops them itself.
        self._shutdown_timeout = ceil(graces.signal)
        self._signals = signals
        self._preemption = NodePreemption(rendezvous, monitors, notices, graces.signal, preemption_grace)
        signals.ranks_run = lambda: bool(self._ranks) or self._settled is not None
        signals.all_listen = lambda: bool(self._ranks) and monitors.all_listen()
        self._ranks: dict[int, processes.Process] = {}
        self._hangs: dict[int, RankHung] = {}
        self._abandoned: set[int] = set()
        self._attempt = NodeAttempt()
        self._oom_kills = 0
        self._host = socket.gethostname()

    # -- torch's seams --------------------------------------------------------------------------------------------

    def _setup_local_watchdog(self, envs: dict[int, dict[str, str]]) -> None:
        # Torch's last step before it starts the workers, with the environments that they will get; keyed by the true
        # local rank, which LOCAL_RANK is not under --virtual-local-rank.
        super()._setup_local_watchdog(envs)
        self._monitors.restore_sockets()
        of_job = self._job.worker_environment()
        for local_rank, env in envs.items():
            env[SOCKET_ENV] = self._monitors.socket_path(local_rank)
            env |= of_job

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        assigned = self._job.assigned
        if assigned is None or not self._job.numbers_ranks:
            workers: list[Worker] = super()._assign_worker_ranks(store, group_rank, group_world_size, spec)
            return workers
        return [
            Worker(
                local_rank=local_rank,
                global_rank=assigned.rank + local_rank,
                role_rank=assigned.role_rank + local_rank,
                world_size=assigned.world_size,
                role_world_size=assigned.role_world_size,
            )
            for local_rank in range(spec.local_world_size)
        ]

    def _exit_barrier(self) -> None:
        # Where the nodes have a leader, it has said that all are done, or this node has waited long enough.
        if not self._job.numbers_ranks:
            super()._exit_barrier()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started_at = time.monotonic()
        self._oom_kills = procfs.oom_kill_count() or 0
        self._hangs.clear()
        self._attempt = NodeAttempt()
        self.has_started = True
        self.causes = {}
        self._settled = None
        with self._signals.kept_from_ranks(has_shim=isinstance(worker_group.spec.entrypoint, str)):
            pids: dict[int, int] = super()._start_workers(worker_group)
        # Torch's context has put its own handlers in place.
        self._signals.install()
        self._ranks = {local_rank: processes.Process(pid) for local_rank, pid in pids.items()}
        ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        stacks = {local_rank: self._stacks_path(local_rank) for local_rank in pids}
        self._monitors.ranks_started(self._ranks, started_at, stacks)
        most = worker_group.spec.max_restarts
        restarts = most - self._remaining_restarts
        started = ", ".join(f"rank {ranks[local_rank]} (pid {pid})" for local_rank, pid in pids.items())
        logger.info("%sstarted %s", f"restart {restarts} of {most}: " if restarts else "", started)
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        try:
            self._wait()
            # The exit codes first, then the monitors: what a rank asked for before it died is then surely there.
            codes = self._exit_codes()
            self._hear(worker_group)
            self._preemption.look(codes, lambda local_rank: self._who(worker_group, local_rank))
            return self._judge(worker_group, codes)
        except SignalException as received:
            self._stop(received.sigval, self._graces.signal)
            raise

    def _stop_workers(self, worker_group: WorkerGroup, *args: Any, **kwargs: Any) -> None:
        directive = self._job.directive()
        is_cut_off = isinstance(directive, Stop) and directive.reason.kind == "host_lost"
        # The others may start anew without this node, and must find none of its workers at work.
        self._stop(signal.SIGTERM, min(self._graces.stop, FENCE_SECONDS) if is_cut_off else self._graces.stop)
        # What the ranks have said up to their end.
        self._hear(worker_group)
        if self._job.assigned is not None:
            steps = (progress.step for progress in self._monitors.progress().values())
            self._job.attempt = self._attempt.told(self._job.assigned.memory.round, steps)
        super()._stop_workers(worker_group, *args, **kwargs)

    # -- waiting and judging --------------------------------------------------------------------------------------

    def _wait(self) -> None:
        running = [rank.pidfd for rank in self._ranks.values() if not rank.is_gone()]
        if self._settled is None and (not running or self._failed(self._exit_codes())):
            return
        poll = select.poll()
        of_job = self._job.fileno
        fds = (*running, *self._monitors.filenos(), self._preemption.fileno(), *([] if of_job is None else [of_job]))
        for fd in fds:
            poll.register(fd, select.POLLIN)
        wait = min(self._wake_every, max(0.0, self._preemption.due() - time.monotonic()))
        poll.poll(ceil(wait * 1000))

    def _exit_codes(self) -> dict[int, int | None]:
        """The workers' return codes by local rank; None: running, or not a child that can be asked."""
        if isinstance(self._pcontext, SubprocessContext):
            return {rank: each.proc.poll() for rank, each in self._pcontext.subprocess_handlers.items()}
        return {}

    def _failed(self, codes: Mapping[int, int | None]) -> list[int]:
        return [rank for rank, code in codes.items() if code and not self._preemption.has_left(rank)]

    def _preempted(self, codes: Mapping[int, int | None]) -> bool:
        return any(code and self._preemption.has_left(rank) for rank, code in codes.items())

    def _hear(self, worker_group: WorkerGroup) -> None:
        try:
            for local_rank, message in self._monitors.hear():
                self._heed(worker_group, local_rank, message)
        except MonitorsFailedError as error:
            self._job.request(MonitorsFailed(str(error)))

    def _heed(self, worker_group: WorkerGroup, local_rank: int, message: FromMonitor) -> None:
        who = self._who(worker_group, local_rank)
        match message:
            case RankConnected():
                self.any_connected = True
                self._monitors.job_connected()
            case RankHung():
                self._hangs[local_rank] = message
                where = f"; its stacks are in {message.stacks_path}" if message.stacks_path else ""
                logger.error("%s: %s; killing%s", who, message.cause, where)
                self._record_hang(worker_group, local_rank, message)
            case RankUnkillable(pid=pid, state=state):
                self._job.request(Unkillable(pid, state))
            case RankReported(pid=pid, report=report):
                worker = worker_group.workers[local_rank]
                if pid == worker.id:
                    self._note(worker.global_rank, report)
            case ControlRequested(action=action, description=description):
                # Quoted, so that a rank cannot forge a line of ours.
                logger.warning("%s asks: %s%s", who, action.name, f" ({description!r})" if description else "")
                if action is WorkloadAction.ShutdownWorkload:
                    self._job.request(ShutDown(description))
                elif action is WorkloadAction.ExcludeThisNode:
                    self._job.request(Excluded(description))
            case _:
                pass

    def _note(self, rank: int, report: ResumedFrom | CheckpointSaved) -> None:
        checkpoint = report.checkpoint
        match report:
            case ResumedFrom():
                if self._attempt.resume(rank, checkpoint):
                    ladder = self._job.assigned.memory.ladder if self._job.assigned is not None else None
                    step = step_of(ladder, checkpoint.path) if checkpoint.step is None else checkpoint.step
                    logger.info("resumed from %s", named(checkpoint.path, step))
            case CheckpointSaved():
                self._attempt.save(checkpoint)
            case unreachable:
                assert_never(unreachable)

    def _record_hang(self, worker_group: WorkerGroup, local_rank: int, message: RankHung) -> None:
        worker, spec = worker_group.workers[local_rank], worker_group.spec
        metadata: dict[str, EventMetadataValue] = {
            "run_id": spec.rdzv_handler.get_run_id(),
            "global_rank": worker.global_rank,
            "group_rank": worker_group.group_rank,
            "worker_id": str(worker.id),
            "role": spec.role,
            "hostname": self._host,
            "raw_error": message.cause,
            "metadata": message.stacks_path,
        }
        event = Event(name="ft_launcher.rank_hung", source=EventSource.AGENT, metadata=metadata)
        events.record(event, getattr(spec, "event_log_handler", "null"))

    def _judge(self, worker_group: WorkerGroup, codes: Mapping[int, int | None]) -> RunResult:
        if self._settled is None and self._job.directive() is None:
            self._settle(worker_group, codes)
        match self._job.directive():
            case None if self._preemption.must_end():
                return self._end_in_time(worker_group, codes)
            case None:
                settled, barrier = self._settled, self._exit_barrier_seconds
                done = settled is not None and settled.state is not NodeState.FAILED and self._job.may_leave
                if done and settled is not None and time.monotonic() - settled.at > barrier:
                    logger.warning("the other nodes have not finished within %g s; leaving", barrier)
                    if settled.state is NodeState.PREEMPTED:
                        self._remaining_restarts, self.cause = 0, self._preemption.cause()
                    return settled.result
                return RunResult(state=WorkerState.HEALTHY)
            case Stop():
                if self._settled is not None and self._settled.state is NodeState.FAILED and self._remaining_restarts:
                    return self._settled.result  # torch counts it, and restarts
                return RunResult(state=WorkerState.HEALTHY)  # torch asks how many nodes wait, and restarts
            case End(cause=None):
                return self._succeed(worker_group)
            case Leave(cause):
                return self._end(worker_group, codes, cause, "")
            case End(cause, origin):
                return self._end(worker_group, codes, cause, origin)
            case unreachable:
                assert_never(unreachable)

    def _settle(self, worker_group: WorkerGroup, codes: Mapping[int, int | None]) -> None:
        """Find out whether the workers have ended, or must, and tell the leader."""
        failed = self._failed(codes)
        if self._preemption.was_signalled(signal.SIGTERM) and any(codes[each] == -signal.SIGTERM for each in failed):
            # It went to the ranks as well, as with Slurm's scancel, and they do not listen: this is no failure.
            raise SignalException("SIGTERM, for the ranks too", sigval=signal.SIGTERM)
        if failed:
            failed = self._in_order_of_failing(failed)
            failures = self._failures(worker_group, failed)
            cause = worst(self.causes[local_rank] for local_rank in failed)
            first = next(each for each in failed if self.causes[each] is cause)
            self._job.report(NodeState.FAILED, cause, worker_group.workers[first].global_rank)
            self.cause = cause
            failures |= self._stop_the_rest(worker_group, failed)
            self._settled = _Settled(NodeState.FAILED, RunResult(WorkerState.FAILED, {}, failures), time.monotonic())
            return
        if not codes and any(rank.is_gone() for rank in self._ranks.values()):
            # Functions (--run-path): a process that ended before torch asked it to has failed, and torch knows why.
            self._stop(signal.SIGTERM, self._graces.stop)
        if None in codes.values() and not getattr(self, "_uninterruptible_state_timeout", 0):
            # Torch would look again, and stop the others in its own way for one that has failed since.
            return
        if self._preempted(codes):
            if None not in codes.values():
                self._stop(signal.SIGTERM, min(self._graces.stop, LEFTOVER_SECONDS))
                self._settle_as_preempted()
            return
        result: RunResult = super()._monitor_workers(worker_group)
        if result.failures and all(self._preemption.has_left(each.local_rank) for each in result.failures.values()):
            self._settle_as_preempted()  # functions (--run-path)
        elif result.state == WorkerState.SUCCEEDED:
            # Only what the ranks have left running is still there.
            self._stop(signal.SIGTERM, min(self._graces.stop, LEFTOVER_SECONDS))
            self._settled = _Settled(NodeState.SUCCEEDED, result, time.monotonic())
            self._job.report(NodeState.SUCCEEDED)
        elif result.state != WorkerState.HEALTHY:
            failed_result = RunResult(WorkerState.FAILED, {}, result.failures)
            self._settled = _Settled(NodeState.FAILED, failed_result, time.monotonic())
            rank, failure = next(iter(result.failures.items()), (None, None))
            self.cause = from_returncode(failure.exitcode) if failure is not None else Exited(1)
            self._job.report(NodeState.FAILED, self.cause, rank)

    def _in_order_of_failing(self, failed: list[int]) -> list[int]:
        """`failed`, and before them the ranks that raised their exceptions earlier and take longer to end."""
        raised = {rank: when for rank in self._ranks if (when := self._raised_at(rank)) is not None}
        if not all(rank in raised for rank in failed):
            return failed  # whoever raises nothing (a hang, a kill) is seldom another's victim
        latest = max(raised[rank] for rank in failed)
        ending = [rank for rank, when in raised.items() if when < latest and rank not in failed]
        processes.wait_gone([self._ranks[rank].pidfd for rank in ending], ENDING_SECONDS)
        return sorted(self._failed(self._exit_codes()), key=lambda rank: raised.get(rank, latest))

    def _raised_at(self, local_rank: int) -> float | None:
        """When `@record` wrote down this rank's exception, in seconds since the epoch; None: it has not."""
        error_file = self._pcontext.error_files[local_rank] if self._pcontext is not None else os.devnull
        try:
            return None if error_file == os.devnull else Path(error_file).stat().st_mtime
        except OSError:
            return None

    def _settle_as_preempted(self) -> None:
        self._settled = _Settled(NodeState.PREEMPTED, RunResult(WorkerState.FAILED, {}, {}), time.monotonic())
        self._job.report(NodeState.PREEMPTED)

    def _stop_the_rest(self, worker_group: WorkerGroup, failed: list[int]) -> dict[int, ProcessFailure]:
        self._stop(signal.SIGTERM, self._graces.stop)
        self._hear(worker_group)
        stopped = [local_rank for local_rank in self._failed(self._exit_codes()) if local_rank not in failed]
        return self._failures(worker_group, stopped, by_us=True)

    def _succeed(self, worker_group: WorkerGroup) -> RunResult:
        """The job has succeeded, whatever became of this node's part in it (min-healthy)."""
        self.cause = None
        settled = self._settled
        if settled is not None and settled.state is NodeState.SUCCEEDED:
            return settled.result
        self._stop(signal.SIGTERM, self._graces.stop)
        return RunResult(WorkerState.SUCCEEDED, {each.global_rank: None for each in worker_group.workers})

    def _end(
        self, worker_group: WorkerGroup, codes: Mapping[int, int | None], cause: Cause | None, origin: str
    ) -> RunResult:
        self._remaining_restarts = 0
        if self._settled is not None:
            failures = self._settled.result.failures
        else:
            failed = self._failed(codes)
            failures = self._failures(worker_group, failed)
            failures |= self._stop_the_rest(worker_group, failed)
        is_ours = self._settled is not None and cause == self.cause
        self.cause, self.origin = cause, "" if is_ours else origin
        if cause is not None and not is_ours and not isinstance(cause, Preempted):
            logger.error("ending the job: %s%s", f"{origin}: " if origin else "", sentence(cause))
        return RunResult(WorkerState.FAILED, {}, failures)

    def _end_in_time(self, worker_group: WorkerGroup, codes: Mapping[int, int | None]) -> RunResult:
        """End what still runs: this node is about to be taken away."""
        self.cause, self.origin = self._preemption.end(codes, lambda rank: self._who(worker_group, rank)), ""
        self._remaining_restarts = 0
        self._stop(signal.SIGTERM, STOP_SECONDS)
        return RunResult(WorkerState.FAILED, {}, {})

    # -- saying why -----------------------------------------------------------------------------------------------

    def _failures(
        self, worker_group: WorkerGroup, local_ranks: Iterable[int], *, by_us: bool = False
    ) -> dict[int, ProcessFailure]:
        """Torch's record of these failed workers by global rank, with the cause in words where torch knows none."""
        context = self._pcontext
        if not isinstance(context, SubprocessContext):
            return {}
        failures = {}
        for local_rank in local_ranks:
            process = context.subprocess_handlers[local_rank].proc
            code: int = process.returncode
            cause = self._cause_of(local_rank, code, by_us=by_us)
            self.causes[local_rank] = cause
            failure = ProcessFailure(local_rank, process.pid, code, context.error_files[local_rank])
            if isinstance(failure.message, str):
                failure.message = sentence(cause)
            if not by_us and local_rank not in self._hangs:
                logger.error("%s: %s%s", self._who(worker_group, local_rank), sentence(cause), self._log(local_rank))
            failures[worker_group.workers[local_rank].global_rank] = failure
        return failures

    def _cause_of(self, local_rank: int, code: int, *, by_us: bool) -> Cause:
        if local_rank in self._hangs:
            return Hung(self._hangs[local_rank].cause)
        if code == -signal.SIGKILL and not by_us:
            kills = procfs.oom_kill_count()
            if kills is not None and kills > self._oom_kills:
                return OutOfMemory(procfs.memory_limit())
            return Signalled(signal.SIGKILL, oom_counted=kills is not None)
        return from_returncode(code, by="us" if by_us else "unknown")

    def _who(self, worker_group: WorkerGroup, local_rank: int) -> str:
        worker = worker_group.workers[local_rank]
        return f"rank {worker.global_rank} (pid {worker.id}, node {self._host})"

    def _log(self, local_rank: int) -> str:
        context = self._pcontext
        if context is None:
            return ""
        files = [context.stderrs.get(local_rank), context.stdouts.get(local_rank), context.error_files.get(local_rank)]
        there = [each for each in files if each and each != os.devnull and Path(each).exists()]
        return f"; see {there[0]}" if there else ""

    def _stacks_path(self, local_rank: int) -> str:
        context = self._pcontext
        error_file = context.error_files[local_rank] if context is not None else ""
        if not error_file or error_file == os.devnull:
            return ""
        return str(Path(error_file).absolute().with_name("stacks.txt"))

    # -- stopping -------------------------------------------------------------------------------------------------

    def _stop(self, death_signal: signal.Signals, grace: float) -> None:
        """End all workers and everything that they have started; return when all is gone, or cannot be killed."""
        if not self._ranks:
            return
        # From here on the launcher decides how long they may take: no monitor cuts a save short.
        self._monitors.ranks_ended()
        ranks, self._ranks = self._ranks, {}
        survivors = processes.kill_tree(
            list(ranks.values()),
            markers=[self._monitors.marker(local_rank) for local_rank in ranks],
            exclude=self._monitors.pids(),
            signum=death_signal,
            grace=grace,
        )
        self.exit_codes = {rank: code for rank, code in self._exit_codes().items() if code is not None}
        survivors += self._kill_orphans()
        for rank in ranks.values():
            rank.close()
        for survivor in survivors:
            self._job.request(Unkillable(survivor.pid, survivor.state, survivor.name))
            self._abandon(survivor.pid)

    def _abandon(self, pid: int) -> None:
        self._abandoned.add(pid)
        if isinstance(self._pcontext, SubprocessContext):
            # Torch would wait for it again, twice 30 s at a time.
            handlers = self._pcontext.subprocess_handlers
            for local_rank in [rank for rank, each in handlers.items() if each.proc.pid == pid]:
                del handlers[local_rank]

    def _kill_orphans(self) -> list[processes.Survivor]:
        """End what came back to the launcher when its parent died: daemons that nothing ties to a rank any more."""
        survivors: list[processes.Survivor] = []
        keep = (
            self._monitors.pids()
            | self._abandoned
            | (set() if self._pcontext is None else set(self._pcontext.pids().values()))
        )
        while adopted := processes.orphans(os.getpid(), keep):
            roots = [_held(pid) for pid in adopted]
            there = [root for root in roots if root is not None]
            survivors += processes.kill_tree(there, exclude=keep, signum=signal.SIGKILL, grace=0.0)
            for root in there:
                root.close()
            # Those that cannot be killed stay; the rest is gone, and may have left more behind.
            keep |= {survivor.pid for survivor in survivors}
            processes.reap(adopted)
        return survivors

    @property
    def is_preempted(self) -> bool:
        """All workers of this node have ended for a notice."""
        return self._settled is not None and self._settled.state is NodeState.PREEMPTED

    def note_end(self) -> None:
        """Take over why the job ended from the rendezvous, where it ended without asking the agent."""
        directive = self._job.directive()
        if isinstance(directive, Leave):
            self.cause = directive.cause
        elif isinstance(directive, End):
            self.cause, self.origin = directive.cause, directive.origin

    def clean_up(self) -> None:
        """Leave nothing behind, whatever ended the run. The launcher's signals must be ignored by now."""
        self._stop(signal.SIGKILL, 0.0)
        self._kill_orphans()


def _held(pid: int) -> processes.Process | None:
    try:
        return processes.Process(pid)
    except ProcessLookupError:
        return None
