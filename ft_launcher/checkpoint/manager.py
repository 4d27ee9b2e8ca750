"""CheckpointManager: saves a training whole or not at all, and resumes it from the newest checkpoint that is whole."""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
from torch import nn
from torch.optim import Optimizer

from ft_launcher.checkpoint.bar import progress
from ft_launcher.checkpoint.directory import Directory
from ft_launcher.checkpoint.errors import CheckpointError
from ft_launcher.checkpoint.files import Verify
from ft_launcher.checkpoint.group import Ranks
from ft_launcher.checkpoint.loading import Loader, Restored, Target
from ft_launcher.checkpoint.manifest import BestMode, Entry, by_score, newest_first, step_name
from ft_launcher.checkpoint.saving import Backend, Capture, Retention, Saver, capture
from ft_launcher.checkpoint.staging import Staging
from ft_launcher.checkpoint.state import Stateful
from ft_launcher.ladder import MAX_PATH_BYTES
from ft_launcher.messages import WorkloadAction, WorkloadControlRequest
from ft_launcher.rank_monitor_client import RankMonitorClient
from ft_launcher.rank_reports import checkpoint_path

__all__ = ["CheckpointManager", "Restored"]

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Checkpoints of one training in one directory, which all nodes must share.

    In a job of several ranks make it after init_process_group(); its methods but `steps` are collectives: all ranks
    call them, at the same places. What is saved: the model (plain, DDP or FSDP2), the optimizer, the scheduler, the
    sampler, `metrics`, `extra`, and the states of Python's, numpy's and torch's random numbers on every rank.

    A save counts only when all of it is on the disk and has been given its name; before, at any moment, the ones
    before it are what `load_latest` finds. Loading verifies every byte before it touches the model.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        keep_last_n: int | None = 3,
        save_best: bool = True,
        best_metric: str = "loss",
        best_mode: BestMode = "min",
        save_interval: int | None = None,
        save_interval_seconds: float | None = None,
        async_save: bool = False,
        *,
        backend: Backend = "auto",
        verify: Verify = "full",
        show_progress: bool = True,
        client: RankMonitorClient | None = None,
    ) -> None:
        """Sweep away what dead writers have left in `checkpoint_dir`; it need not exist.

        keep_last_n: how many of the newest to keep; None: all. The best, the newest verified one, and one that is
        being read are kept besides. save_best: keep the best, by `metrics[best_metric]`; NaN is never the best.
        save_interval: steps, save_interval_seconds: seconds from save to save, for `maybe_save`; either is enough.
        async_save: copy the state and write it while training goes on. backend: "torch" writes the model in one piece
        on rank 0, "dcp" in pieces on all ranks; "auto" does what the model does. verify: "size" trusts the bytes of
        files that have the right size. client: by which the launcher learns of saves and resumes, so that it can name
        a checkpoint from which every attempt fails.

        Raises CheckpointError for values that cannot be meant, and where WORLD_SIZE says that there are other ranks
        but no process group was made.
        """
        _check(keep_last_n is None or keep_last_n >= 1, "keep_last_n", keep_last_n, "None or at least 1")
        _check(best_mode in ("min", "max"), "best_mode", best_mode, "'min' or 'max'")
        _check(backend in ("auto", "torch", "dcp"), "backend", backend, "'auto', 'torch' or 'dcp'")
        _check(verify in ("full", "size"), "verify", verify, "'full' or 'size'")
        _check(save_interval is None or save_interval >= 1, "save_interval", save_interval, "None or at least 1 step")
        _check(
            save_interval_seconds is None or save_interval_seconds > 0,
            "save_interval_seconds",
            save_interval_seconds,
            "None or more than 0 s",
        )
        self._interval, self._interval_seconds = save_interval, save_interval_seconds
        self._best_metric, self._best_mode = best_metric, best_mode
        self._is_async, self._backend, self._client = async_save, backend, client
        self._ranks = Ranks()
        # What is saved beside training has a group of its own, as this thread uses the first one meanwhile.
        self._saving_ranks = Ranks()
        self._shows = show_progress and self._ranks.is_first
        self._directory = Directory(Path(checkpoint_dir).absolute())
        text = str(self._directory.path / step_name(10**10))
        is_reportable = text.isprintable() and len(text.encode()) <= MAX_PATH_BYTES
        _check(client is None or is_reportable, "checkpoint_dir", text, f"printable, {MAX_PATH_BYTES} bytes at most")
        retention = Retention(keep_last_n, best_metric if save_best else None, best_mode)
        self._saver = Saver(self._directory, self._saving_ranks, retention)
        self._loader = Loader(self._directory, self._ranks, verify, shows=self._shows)
        self._staging = Staging()
        self._thread: ThreadPoolExecutor | None = None
        self._in_flight: Future[None] | None = None
        self._saved_at, self._saved_step = monotonic(), 0
        self._is_closed = False
        if self._ranks.is_first:
            self._directory.sweep_if_free()

    # -- saving ---------------------------------------------------------------------------------------------------

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        scheduler: Stateful | None = None,
        extra: Any = None,
        *,
        sampler: Stateful | None = None,
        blocking: bool | None = None,
    ) -> None:
        """Save after `step` steps; in place of what stands there, if that step was saved before.

        metrics: numbers by name. extra: what else is to be given back: numbers, text, tensors, dicts, lists, tuples
        and sets. sampler: anything with state_dict() that says where in the data each rank is. blocking: return when
        the checkpoint is committed; None: as `async_save` says. One save at a time: another one waits for it.

        Raises CheckpointError on all ranks when it could not be saved (or the one before, if that ran beside
        training); what was saved before is as it was then.
        """
        self._check_open()
        self.wait()
        is_blocking = not self._is_async if blocking is None else blocking
        what = self._captured(
            lambda: capture(
                model,
                optimizer,
                step,
                metrics,
                scheduler,
                extra,
                sampler,
                backend=self._backend,
                is_first=self._ranks.is_first,
            ),
            copied=not is_blocking,
        )
        self._saved_at, self._saved_step = monotonic(), step
        if is_blocking:
            with progress(f"saving step {step}", what.total_bytes(), shown=self._shows) as on_bytes:
                self._commit(what, on_bytes)
        else:
            self._thread = self._thread or ThreadPoolExecutor(max_workers=1, thread_name_prefix="ft_checkpoint")
            self._in_flight = self._thread.submit(self._commit_beside, what)

    def maybe_save(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        scheduler: Stateful | None = None,
        extra: Any = None,
        *,
        sampler: Stateful | None = None,
        blocking: bool | None = None,
    ) -> bool:
        """Save when `save_interval` or `save_interval_seconds` says so; call it after every step. Say whether it did.

        Steps are counted from 0, seconds (by rank 0's clock) from the last save.
        """
        self._check_open()
        if self._client is not None:
            self._client.report_step(step)
        if not self._is_due(step):
            return False
        self.save(model, optimizer, step, metrics, scheduler, extra, sampler=sampler, blocking=blocking)
        return True

    def wait(self) -> None:
        """Wait until the save beside training, if there is one, is committed. Raises CheckpointError if it failed."""
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def close(self) -> None:
        """Wait for the save in flight, and let others write to the directory. Raises CheckpointError if it failed."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._directory.release()
            self._saving_ranks.close()
            self._ranks.close()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        elif self._ranks.size == 1:
            # The save in flight is whole all the same; that it failed must not hide why the block did.
            try:
                self.close()
            except CheckpointError:
                logger.exception("the save in flight failed as well")
        else:
            # The other ranks need not be there any more: what waits for them might wait for ever.
            self._is_closed = True
            if self._in_flight is None:
                self._directory.release()
            else:
                self._in_flight.add_done_callback(lambda _: self._directory.release())

    # -- loading --------------------------------------------------------------------------------------------------

    def load_latest(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        scheduler: Stateful | None = None,
        *,
        sampler: Stateful | None = None,
        restore_rng: bool = True,
    ) -> Restored | None:
        """Restore the newest checkpoint that is whole, in place; None where there is none.

        What is broken is logged and passed over, and so is what the launcher has found suspect (every attempt from it
        failed). Raises CheckpointError when only suspects are left, and when the checkpoint is of another model.
        """
        self._check_open()
        self.wait()
        target = Target(model, optimizer, scheduler, sampler, restore_rng)
        restored = self._loader.load(self._not_suspect, target, chosen=self._report_resume)
        if restored is None:
            self._report_resume(None, 0)
        return self._resumed(restored)

    def load_best(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        scheduler: Stateful | None = None,
        *,
        sampler: Stateful | None = None,
        restore_rng: bool = True,
    ) -> Restored | None:
        """Restore the best checkpoint that is whole, by `best_metric`; None where none has one. Else as load_latest."""
        return self._load(
            lambda: by_score(self._directory.entries(), self._best_metric, self._best_mode),
            Target(model, optimizer, scheduler, sampler, restore_rng),
        )

    def load(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        scheduler: Stateful | None = None,
        *,
        sampler: Stateful | None = None,
        restore_rng: bool = True,
    ) -> Restored:
        """Restore the checkpoint of `step`. Raises CheckpointError when there is none, or it is broken."""
        restored = self._load(
            lambda: [each for each in self._directory.entries() if each.step == step],
            Target(model, optimizer, scheduler, sampler, restore_rng),
        )
        if restored is None:
            raise CheckpointError(f"{self._directory.path}: no whole checkpoint of step {step}")
        return restored

    def steps(self) -> list[int]:
        """Give the steps that were committed, ascending. Whether they are whole is seen when they are loaded."""
        return [each.step for each in self._directory.entries() if each.manifest is not None]

    # -- within ---------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise CheckpointError("the manager is closed")

    def _captured(self, take: Callable[[], Capture], *, copied: bool) -> Capture:
        """Take what is to be saved; CheckpointError on all ranks when one cannot, or they are at different steps."""
        what, problem = None, ""
        try:
            what = take()
            what = what.staged(self._staging) if copied else what
        # Whatever it is, the other ranks wait for this one's word.
        except Exception as error:
            if self._ranks.size == 1:
                raise
            logger.exception("rank %d cannot save", self._ranks.rank)
            problem = str(error) or type(error).__name__
        said = [
            msgspec.json.decode(each, type=tuple[int, str])
            for each in self._ranks.gather(msgspec.json.encode((-1 if what is None else what.step, problem)))
        ]
        problems = [f"rank {rank}: {each}" for rank, (_, each) in enumerate(said) if each]
        if not problems and len({step for step, _ in said}) > 1:
            problems = [f"the ranks are at different steps: {', '.join(str(step) for step, _ in said)}"]
        if problems or what is None:
            raise CheckpointError("; ".join(problems))
        return what

    def _commit(self, what: Capture, on_bytes: Callable[[int], None]) -> None:
        path, deleted = self._saver.save(what, on_bytes)
        if self._client is not None and self._ranks.is_first:
            self._client.report_checkpoint(path, what.step)
            for each in deleted:
                self._client.report_checkpoint(each, None)

    def _commit_beside(self, what: Capture) -> None:
        try:
            self._commit(what, lambda _: None)
        except CheckpointError as error:
            logger.error("%s", error)  # noqa: TRY400 - a sentence for a person; raised when somebody waits
            raise

    def _is_due(self, step: int) -> bool:
        if self._interval is not None and step // self._interval > self._saved_step // self._interval:
            return True
        if self._interval_seconds is None:
            return False
        is_late = monotonic() - self._saved_at >= self._interval_seconds
        return self._ranks.hear(b"save" if is_late else b"") != b""

    def _load(self, candidates: Callable[[], Sequence[Entry]], target: Target) -> Restored | None:
        self._check_open()
        self.wait()
        return self._resumed(self._loader.load(candidates, target, chosen=self._report_resume))

    def _resumed(self, restored: Restored | None) -> Restored | None:
        self._saved_at, self._saved_step = monotonic(), 0 if restored is None else restored.step
        if restored is not None and self._ranks.is_first:
            logger.info("resumed from %s (step %d)", restored.path, restored.step)
        return restored

    def _report_resume(self, path: Path | None, step: int) -> None:
        if self._client is not None:
            self._client.report_resume(path, step)

    def _not_suspect(self) -> Sequence[Entry]:
        """Give the newest first, without those from which every attempt has failed."""
        entries = newest_first(self._directory.entries())
        hint = None if self._client is None else self._client.resume_hint()
        if hint is None:
            return entries
        whole = [each for each in entries if checkpoint_path(each.path) not in hint.suspects]
        if entries and not whole:
            sentence = f"{self._directory.path}: attempts from every checkpoint have failed; the job cannot go on"
            if self._client is not None:
                self._client.send_workload_control_request(
                    WorkloadControlRequest(WorkloadAction.ShutdownWorkload, sentence)
                )
            raise CheckpointError(sentence)
        return whole


def _check(is_allowed: bool, name: str, value: object, allowed: str) -> None:
    if not is_allowed:
        raise CheckpointError(f"{name} is {value!r}; it must be {allowed}")
