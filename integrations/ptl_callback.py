"""Callbacks that have ft_launcher watch a Lightning Trainer, of `lightning` or of `pytorch_lightning`."""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ft_launcher import NoMonitorClient, RankMonitorClient, WorkloadAction, WorkloadControlRequest, connect
from ft_launcher.integrations import progress
from ft_launcher.integrations.progress import Heartbeats, Sections, Seen, StateFile
from ft_launcher.integrations.simulated_faults import SimulatedFaultParams, simulate
from ft_launcher.rank_reports import checkpoint_path

__all__ = ["FaultToleranceCallback", "FaultToleranceSectionsCallback", "SimulatedFaultParams"]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")

FINALIZE = "maybe_finalize_save_checkpoint"
"""NeMo's method that completes a save which went on in the background."""

PREEMPTED = "last-preempted.ckpt"
"""Saved on a notice, in the directory of the ModelCheckpoint, or in `default_root_dir` where there is none."""

SAVING = (("save_checkpoint",), ("strategy", "remove_checkpoint"), ("strategy", "checkpoint_io", FINALIZE))
"""Public methods, as seen from a Trainer, that write or remove checkpoints. No hook tells the end of a save, and none
its beginning when only weights are saved, so the callbacks put themselves around these while a run lasts."""

LOADING = ("strategy", "load_checkpoint")
"""The public method that reads the checkpoint of `ckpt_path`. No hook comes before it, and it may be what fails."""

ExceptionPolicy = Callable[[BaseException], WorkloadControlRequest | None]


class _Run:
    """The monitoring of one `fit`, `validate`, `test` or `predict`, from its setup to its end."""

    def __init__(
        self,
        signs: Heartbeats | Sections,
        client: RankMonitorClient,
        learned: StateFile | None,
        logger: logging.Logger,
        *,
        is_fit: bool,
    ) -> None:
        self.is_fit = is_fit
        self._logger = logger
        self.signs = signs
        self.client = client
        self.seen = Seen()
        self.is_training = False
        self._learned = learned
        self._loaded: str | None = None
        self._wrapped: list[tuple[Any, str, Any]] = []
        self._at_end: list[Callable[[], None]] = []

    def begin(self, trainer: Any) -> None:
        """Put learned timeouts in force, and see from here on what is saved."""
        self.signs.enter("setup")
        if self._learned is not None:
            self._learned.load_into(self.client)
        saver = getattr(trainer.strategy, "checkpoint_io", None)
        kinds = {each.__name__ for each in type(saver).__mro__}
        in_background = hasattr(saver, FINALIZE) or "AsyncCheckpointIO" in kinds
        if isinstance(self.signs, Sections):
            self.signs.saves_in_background = in_background
        for path in SAVING:
            self._wrap(trainer, path, lambda method, name: self._saving(trainer, method, name, in_background))
        if self.is_fit:
            self._wrap(trainer, LOADING, lambda method, _: self._loading(trainer, method))

    def learn(self) -> None:
        """Learn timeouts from what has been seen, if it is enough. A collective."""
        if self._learned is not None and self.signs.learn(self.seen):
            self._learned.save(self.client)

    def call_at_end(self, function: Callable[[], None]) -> None:
        self._at_end.append(function)

    def end(self) -> None:
        """End the monitoring; only the timeout of the teardown counts from here on."""
        for owner, name, watched in self._wrapped:
            if vars(owner).get(name) is watched:  # else somebody has wrapped it again; it does nothing from here on
                delattr(owner, name)
        for function in self._at_end:
            function()
        if self.client.is_initialized:
            self.signs.leave()
            self.client.shutdown_workload_monitoring()

    def has_begun(self, trainer: Any) -> None:
        """Say from where the training goes on, now that its step is known."""
        step = trainer.global_step if self._loaded is not None else 0
        progress.tell(self.client.report_resume, self._loaded, step, self._logger)

    def _wrap(self, trainer: Any, path: tuple[str, ...], watch: Callable[[Callable[..., Any], str], Any]) -> None:
        owner, name = trainer, path[-1]
        for part in path[:-1]:
            owner = getattr(owner, part, None)
        method = getattr(owner, name, None)
        if callable(method):
            watched = wraps(method)(watch(method, name))
            setattr(owner, name, watched)
            self._wrapped.append((owner, name, watched))

    def _saving(self, trainer: Any, method: Callable[..., Any], name: str, in_background: bool) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.signs.during("checkpointing"):
                result = method(*args, **kwargs)
            if name != FINALIZE and trainer.is_global_zero and not in_background:
                self._report(trainer, name, *args, **kwargs)
            if name == "save_checkpoint":
                self.seen.saves += 1
                self.learn()  # now, as the run may end right after it
            return result

        return watched

    def _report(self, trainer: Any, name: str, filepath: Any, weights_only: Any = None, *_: Any, **__: Any) -> None:
        if name == "save_checkpoint" and weights_only:
            return  # no training can go on from it
        step = trainer.global_step if name == "save_checkpoint" else None
        progress.tell(self.client.report_checkpoint, filepath, step, self._logger)

    def _loading(self, trainer: Any, method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:  # Lightning's name
            if self._loaded is None:  # else some callback reads another one, for a purpose of its own
                checkpoint_path = self._loaded = self._unless_suspect(trainer, str(checkpoint_path))
                progress.tell(self.client.report_resume, checkpoint_path, None, self._logger)
            return method(checkpoint_path, *args, **kwargs)

        return watched

    def _unless_suspect(self, trainer: Any, path: str) -> str:
        hint = self.client.resume_hint()
        if hint is None or hint.path is None or checkpoint_path(path) not in hint.suspects:
            return path
        if trainer.is_global_zero:
            self._logger.warning("%s is suspect; loading %s instead", path, hint.path)
        return hint.path


def _for_packages(cls: type, packages: tuple[str, ...]) -> type:
    classes = [importlib.import_module(f"{package}.callbacks").Callback for package in packages]
    missing = [each for each in classes if not issubclass(cls, each)]
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls, *missing), names) if missing else cls


def _packages() -> tuple[str, ...]:
    loaded = tuple(package for package in PACKAGES if package in sys.modules)
    found = (package for package in PACKAGES if importlib.util.find_spec(package.partition(".")[0]))
    return loaded or tuple(found)


if TYPE_CHECKING:
    _Either: Any  # the Callback of either package
else:
    _Either = object


class _Callback(_Either):  # type: ignore[misc]  # so that type checkers take it for both
    # A base of our own, as Lightning calls methods by name, and both callbacks need the same ones.

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        # `Trainer(callbacks=one)` knows one by the class of its own package. Who has `lightning` has both packages, and
        # importing the other one would cost a second in every rank, so this looks at what the script has imported.
        return super().__new__(_for_packages(cls, _packages()))

    def __init__(
        self,
        kind: type[Heartbeats] | type[Sections],
        *,
        autoresume: bool,
        calculate_timeouts: bool,
        simulated_fault_params: SimulatedFaultParams | Mapping[str, Any] | None,
        exp_dir: str | Path | None,
        logger_name: str,
        exc_handling_policy: ExceptionPolicy | None = None,
    ) -> None:
        self._kind = kind
        self._autoresume = autoresume
        self._calculate_timeouts = calculate_timeouts
        self._fault = SimulatedFaultParams.of(simulated_fault_params)
        self._exp_dir = exp_dir
        self._logger = logging.getLogger(logger_name)
        self._policy = exc_handling_policy
        self._run: _Run | None = None

    # -- the run ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002 - Lightning's names
        """Connect; open `setup`. Raises ValueError for a configuration that does not fit."""
        self._end()  # of a run that ended in a way for which there is no hook
        client = connect()
        if isinstance(client, NoMonitorClient):
            return
        try:
            learned = self._learned(trainer)
            signs = self._kind(client, learns=learned is not None)
            self._run = run = _Run(signs, client, learned, self._logger, is_fit=stage == "fit")
        except ValueError:
            client.shutdown_workload_monitoring()
            raise
        # From here on an exception comes to on_exception.
        if stage == "fit" and self._autoresume:
            progress.require_finished_flag()
        run.begin(trainer)
        if stage == "fit" and self._fault is not None:
            timer = simulate(self._fault, trainer.world_size, self._logger)
            if timer is not None:
                run.call_at_end(timer.cancel)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Learn what is left to learn, make the finished flag if the training is complete, and disconnect.

        Called too when NeMo's timer ends the training with an exception of its own; not after other exceptions.
        """
        run = self._run
        if run is None:
            return
        run.signs.leave()
        if stage == "fit":
            run.seen.is_last = True
            run.learn()
            why = _why_complete(trainer, run)
            if self._autoresume and why is not None and trainer.is_global_zero:
                progress.finish(why, self._logger)
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Close what is open: a process that handles an error is not hung. Ask the launcher what the policy says."""
        run = self._run
        if run is None:
            return
        is_stop = isinstance(exception, SystemExit) and not exception.code
        if not is_stop:
            run.client.abort()
            # Who presses Ctrl-C has told the launcher as well.
            if self._policy is not None and not isinstance(exception, KeyboardInterrupt):
                self._ask(self._policy, exception, run)
        self._end()

    def _ask(self, policy: ExceptionPolicy, exception: BaseException, run: _Run) -> None:
        try:
            request: Any = policy(exception)  # whatever the user's code gives
        except Exception:
            # The user's code; the exception at hand says more than the one that it has met.
            self._logger.exception("exc_handling_policy failed")
            return
        if request is None:
            return
        if not isinstance(request, WorkloadControlRequest):
            self._logger.error("exc_handling_policy gave %r: must be a WorkloadControlRequest or None", request)
            return
        run.client.send_workload_control_request(request)
        if self._autoresume and request.action is WorkloadAction.ShutdownWorkload:
            # A job script that looks at nothing but the flag must not start this training again.
            progress.finish(f"shut down: {request.description or repr(exception)}", self._logger)

    def _end(self) -> None:
        if self._run is not None:
            self._run.end()
            self._run = None

    def _learned(self, trainer: Any) -> StateFile | None:
        if not self._calculate_timeouts:
            return None
        directory = str(self._exp_dir or trainer.default_root_dir)
        if "://" in directory:
            raise ValueError(f"calculated timeouts are kept in a local file, not in {directory}: give exp_dir")
        return StateFile(Path(directory), self._kind.file_name, self._logger)

    # -- training -----------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, *_: Any) -> None:
        """Note that this run took up an earlier one."""
        if self._run is not None:
            self._run.seen.has_loaded = True

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        """Note that from here on the training goes on until `on_train_end`."""
        if self._run is not None:
            self._run.is_training = True
            # on_load_checkpoint is not called for a checkpoint without the state of any callback.
            self._run.seen.has_loaded |= trainer.ckpt_path is not None
            self._run.has_begun(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        """Open `step`."""
        self._enter_step()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Close `step`; learn timeouts; save and end if the machine is about to be taken away."""
        run = self._run
        if run is not None:
            run.signs.leave()
            run.seen.iterations += 1
            run.learn()
            if run.is_training and run.client.should_checkpoint(trainer.global_step):
                self._save_and_leave(trainer, run)

    def _save_and_leave(self, trainer: Any, run: _Run) -> NoReturn:
        # Where `ckpt_path="last"` looks for the newest file whose name begins with "last".
        saver = trainer.checkpoint_callback
        directory = getattr(saver, "dirpath", None) or trainer.default_root_dir
        path = os.path.join(directory, PREEMPTED)  # noqa: PTH118 (it may be a URL)
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            self._logger.warning("saved %s at step %d, before the machine is taken away", path, trainer.global_step)
        try:
            run.client.exit_for_preemption()
        finally:
            self._end()

    def on_train_end(self, *_: Any) -> None:
        """Close what is open."""
        self._leave()
        if self._run is not None:
            self._run.is_training = False

    # -- the other loops, and ends of epochs, which close a section whose end was not told -----------------------------

    def on_validation_batch_start(self, *_: Any) -> None:
        """Open `step`."""
        self._enter_step()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(self, *_: Any) -> None:
        """Close `step`."""
        self._leave()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_train_epoch_end = on_sanity_check_end = on_validation_end = on_test_end = on_predict_end = (
        on_validation_batch_end
    )

    def _enter_step(self) -> None:
        if self._run is not None:
            self._run.signs.enter("step")

    def _leave(self) -> None:
        if self._run is not None:
            self._run.signs.leave()


class FaultToleranceCallback(_Callback):
    """Has ft_launcher watch the Trainer by heartbeats, at both ends of every batch and of every save.

    `autoresume`: make the file FAULT_TOL_FINISHED_FLAG_FILE names when the training is complete. `calculate_timeouts`:
    learn the timeouts once in each run, after 2 batches and a save, and keep them in `ft_state/_ft_state.json` under
    `exp_dir` (the Trainer's `default_root_dir`) for the next one. Does nothing in a script that ft_launcher has not
    started.
    """

    def __init__(
        self,
        autoresume: bool,
        calculate_timeouts: bool,
        simulated_fault_params: SimulatedFaultParams | Mapping[str, Any] | None = None,
        exp_dir: str | Path | None = None,
        logger_name: str = "ft_launcher.FaultToleranceCallback",
    ) -> None:
        super().__init__(
            Heartbeats,
            autoresume=autoresume,
            calculate_timeouts=calculate_timeouts,
            simulated_fault_params=simulated_fault_params,
            exp_dir=exp_dir,
            logger_name=logger_name,
        )


class FaultToleranceSectionsCallback(_Callback):
    """Has ft_launcher watch the Trainer by the sections `setup`, `step` and `checkpointing`, no more and no fewer.

    As `FaultToleranceCallback`, but: the timeouts are learned after each save and at the end, that of `step` from 16
    batches on, those of `setup` and of the time between sections in a run that has loaded a checkpoint; they are kept
    in `ft_state/_ft_state_.json`. `exc_handling_policy` is called with an exception that ends the training, and may
    give a request to the launcher.
    """

    def __init__(
        self,
        autoresume: bool,
        calculate_timeouts: bool,
        simulated_fault_params: SimulatedFaultParams | Mapping[str, Any] | None = None,
        exp_dir: str | Path | None = None,
        logger_name: str = "ft_launcher.FaultToleranceCallback",
        exc_handling_policy: ExceptionPolicy | None = None,
    ) -> None:
        super().__init__(
            Sections,
            autoresume=autoresume,
            calculate_timeouts=calculate_timeouts,
            simulated_fault_params=simulated_fault_params,
            exp_dir=exp_dir,
            logger_name=logger_name,
            exc_handling_policy=exc_handling_policy,
        )


def _why_complete(trainer: Any, run: _Run) -> str | None:
    """Say why there is nothing left to train, or None when there is."""
    if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
        return f"max_steps={trainer.max_steps} reached"
    if (trainer.max_epochs or 0) > 0 and trainer.current_epoch >= trainer.max_epochs:
        return f"max_epochs={trainer.max_epochs} reached"
    stoppers = trainer.early_stopping_callbacks
    if trainer.should_stop and any(each.stopped_epoch > 0 or each.wait_count >= each.patience for each in stoppers):
        return "stopped early"
    if not run.is_training and run.seen.iterations == 0:
        # A timer whose time was over in an earlier run, for example.
        return "nothing was left to train"
    return None
