"""A callback that has ft_launcher watch a Trainer of Hugging Face, and the checkpoint from which it goes on."""

import atexit
import logging
import os
from collections.abc import Sized
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from transformers.trainer_callback import TrainerCallback

from ft_launcher import NoMonitorClient, RankMonitorClient, connect
from ft_launcher.integrations import progress
from ft_launcher.integrations.progress import Heartbeats, Sections, Seen, StateFile
from ft_launcher.rank_monitor_client import SOCKET_ENV
from ft_launcher.rank_reports import checkpoint_path

__all__ = ["FaultToleranceCallback", "last_checkpoint"]

logger = logging.getLogger("ft_launcher.FaultToleranceCallback")

COMPLETE = "ft_complete"
"""A file in a checkpoint that all ranks have written. The Trainer writes in place, and a kill leaves half of one."""


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Give the newest complete checkpoint of a Trainer with the callback, for `resume_from_checkpoint`, or None.

    One that the launcher takes for suspect is left out. It learns which one is given, before the Trainer reads it.
    """
    complete = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{COMPLETE}")]
    client = RankMonitorClient()
    hint = client.resume_hint()
    suspects = hint.suspects if hint is not None else ()
    sound = [str(path) for path in complete if checkpoint_path(path) not in suspects]
    newest = max(sound, key=_step_of, default=None)
    if os.environ.get(SOCKET_ENV):
        progress.tell(client.report_resume, newest, 0 if newest is None else _step_of(newest), logger)
    return newest


def _step_of(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])


class FaultToleranceCallback(TrainerCallback):  # type: ignore[misc]  # its base has no type where it is not installed
    """Has ft_launcher watch the Trainer: by sections if `rank_section_timeouts` names them, else by heartbeats.

    The sections are `setup` (from the Trainer's construction to the first step), `step` (a step, or a batch of an
    evaluation) and `checkpointing`. `autoresume`: make the file that FAULT_TOL_FINISHED_FLAG_FILE names when the
    training is complete. `calculate_timeouts`: learn the timeouts, and keep them in `ft_state` under `exp_dir` (the
    Trainer's `output_dir`) for the next run. Does nothing in a script that ft_launcher has not started.
    """

    def __init__(
        self,
        autoresume: bool = False,
        calculate_timeouts: bool = False,
        exp_dir: str | Path | None = None,
        logger_name: str = "ft_launcher.FaultToleranceCallback",
    ) -> None:
        self._autoresume = autoresume
        self._calculate_timeouts = calculate_timeouts
        self._exp_dir = exp_dir
        self._logger = logging.getLogger(logger_name)
        self._client: RankMonitorClient = NoMonitorClient()
        self._signs: Heartbeats | Sections = Heartbeats(self._client, learns=False)
        self._seen = Seen()
        self._learned: StateFile | None = None
        self._is_training = False
        self._is_leaving = False
        self._evaluated = 0

    def on_init_end(self, args: Any, *_: Any, **__: Any) -> None:
        """Connect; open `setup`. Raises ValueError for a configuration that does not fit."""
        self._connect(args)

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Put learned timeouts in force."""
        self._connect(args)
        self._is_training = True
        self._seen = Seen(has_loaded=state.global_step > 0)
        if self._client.is_initialized and self._learned is not None:
            self._learned.load_into(self._client)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Open `step`."""
        self._signs.enter("step")

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Send a heartbeat: gradients are accumulated."""
        self._signs.beat()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the Trainer's names
        """Close `step`, and open what follows. That is a save and the end if the machine is about to be taken away."""
        self._signs.leave()
        self._seen.iterations += 1
        self._learn()
        if self._client.is_initialized and self._client.should_checkpoint(state.global_step):
            self._is_leaving = control.should_save = True
            control.should_evaluate = control.should_log = False  # there may be no time for it
        self._foresee(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Open what follows."""
        self._foresee(control)

    def on_prediction_step(self, args: Any, *_: Any, eval_dataloader: Any = None, **__: Any) -> None:
        """Close the batch of an evaluation, and open the next one if there is one."""
        self._connect(args)
        self._signs.leave()
        self._evaluated += 1
        # After the last one come the metrics, which may take far longer than a batch.
        if isinstance(eval_dataloader, Sized) and self._evaluated < len(eval_dataloader):
            self._signs.enter("step")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Open `checkpointing` if a save follows."""
        self._evaluated = 0
        self._signs.leave()
        if not self._is_training:
            self._disconnect()
        elif control.should_save or args.save_strategy == "best":  # which is decided after this
            self._signs.enter("checkpointing")

    def on_predict(self, *_: Any, **__: Any) -> None:
        """Disconnect, if this is no part of a training."""
        self._evaluated = 0
        self._signs.leave()
        if not self._is_training:
            self._disconnect()

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Close `checkpointing`; mark the checkpoint as complete once all ranks have written their part of it."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        writes = state.is_local_process_zero if args.save_on_each_node else state.is_world_process_zero
        if writes and path.is_dir():
            (path / COMPLETE).touch()
            if self._client.is_initialized:
                progress.tell(self._client.report_checkpoint, path, state.global_step, self._logger)
        self._signs.leave()
        if self._is_leaving:
            if state.is_world_process_zero:
                self._logger.warning("saved %s, before the machine is taken away", path)
            self._leave()
        self._seen.saves += 1
        self._learn()

    def _leave(self) -> NoReturn:
        atexit.unregister(self._client.abort)
        self._client.exit_for_preemption()

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002
        """Learn what is left to learn, make the finished flag if the training is complete, and disconnect."""
        self._signs.leave()
        self._seen.is_last = True
        self._learn()
        if self._client.is_initialized and self._autoresume and state.is_world_process_zero:
            why = _why_complete(state, self._seen)
            if why is not None:
                progress.finish(why, self._logger)
        self._is_training = False
        self._disconnect()

    # -- within ---------------------------------------------------------------------------------------------------

    def _connect(self, args: Any) -> None:
        if self._client.is_initialized:
            return
        client = connect()
        if isinstance(client, NoMonitorClient):
            return
        try:
            if self._autoresume:
                progress.require_finished_flag()
            has_sections = client.cfg is not None and bool(client.cfg.rank_section_timeouts)
            kind: type[Heartbeats] | type[Sections] = Sections if has_sections else Heartbeats
            self._signs = kind(client, learns=self._calculate_timeouts)
        except ValueError:
            client.shutdown_workload_monitoring()
            raise
        self._client = client
        # No hook tells of an exception. A process that is ending has a section open then, and is not hung.
        atexit.register(client.abort)
        if self._calculate_timeouts:
            self._learned = StateFile(Path(self._exp_dir or args.output_dir), kind.file_name, self._logger)
        self._signs.enter("setup")

    def _disconnect(self) -> None:
        if self._client.is_initialized:
            self._client.shutdown_workload_monitoring()
            atexit.unregister(self._client.abort)

    def _learn(self) -> None:
        if self._learned is not None and self._signs.learn(self._seen):
            self._learned.save(self._client)

    def _foresee(self, control: Any) -> None:
        # No hook tells the beginning of a save or of an evaluation. They follow a step at once, the evaluation first.
        if control.should_evaluate:
            self._signs.enter("step")
        elif control.should_save:
            self._signs.enter("checkpointing")


def _why_complete(state: Any, seen: Seen) -> str | None:
    if state.max_steps > 0 and state.global_step >= state.max_steps:
        return f"max_steps={state.max_steps} reached"
    stopper = state.stateful_callbacks.get("EarlyStoppingCallback")
    if isinstance(stopper, dict):
        waited = stopper["attributes"]["early_stopping_patience_counter"]
        if waited >= stopper["args"]["early_stopping_patience"]:
            return "stopped early"
    return None if seen.iterations else "nothing was left to train"
