"""Runs of a tiny Lightning Trainer, one after the other, and for each a line with what its callback told ft_launcher.

`+step -step`: the section was opened and closed; `beat`: a heartbeat. A case whose text ends with an exception's name
ended with that.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import _TunerExitException
from torch.utils.data import DataLoader

from ft_launcher import RankMonitorClient, WorkloadAction, WorkloadControlRequest
from ft_launcher.integrations.ptl_callback import FaultToleranceCallback, FaultToleranceSectionsCallback

FLAG = "FAULT_TOL_FINISHED_FLAG_FILE"

told: list[str] = []


def overhear(name: str, text: Callable[..., str]) -> None:
    """Note each call of a method of the client."""
    method = getattr(RankMonitorClient, name)

    def overheard(self: RankMonitorClient, *arguments: Any) -> Any:
        told.append(text(*arguments))
        return method(self, *arguments)

    setattr(RankMonitorClient, name, overheard)


class Tiny(pl.LightningModule):  # type: ignore[misc]  # its base has no type where it is not installed
    """A linear layer that can raise, skip an epoch, or save in the middle of a step."""

    def __init__(self, *, fails_in: str = "", error: BaseException | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.fails_in = fails_in
        self.error = error

    def reach(self, place: str) -> None:
        if self.error is not None and self.fails_in == place:
            raise self.error

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        self.reach("training_step")
        if self.fails_in == "nothing, and saves":
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "within.ckpt")
        return self.layer(batch).mean()  # type: ignore[no-any-return]

    def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> int | None:
        return -1 if self.fails_in == "nothing, and skips" and batch_idx == 1 else None

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        if not self.trainer.sanity_checking:
            self.reach("validation_step")
        self.log("loss", self.layer(batch).mean())

    test_step = validation_step

    def predict_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.layer(batch)  # type: ignore[no-any-return]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.reach("save")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Raises(pl.Callback):  # type: ignore[misc]  # its base has no type where it is not installed
    """A callback of the user's, with a hook that raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, *_: Any) -> None:
        raise self.error


def batches(count: int) -> DataLoader[torch.Tensor]:
    return DataLoader(torch.ones(count, 2), batch_size=1)  # type: ignore[arg-type]  # a tensor is a dataset


def fit(module: Tiny, *callbacks: Any, **settings: Any) -> None:
    trainer = trainer_of(*callbacks, **settings)
    save = trainer.save_checkpoint
    try:
        trainer.fit(module, batches(2), batches(1))
    finally:
        if trainer.save_checkpoint != save:
            told.append("save_checkpoint is still wrapped")


def trainer_of(*callbacks: Any, save_weights_only: bool = False, **settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    directory = tempfile.mkdtemp(dir=sys.argv[2])
    save = ModelCheckpoint(directory, save_weights_only=save_weights_only)
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "num_sanity_val_steps": 1,
        "default_root_dir": directory,
        "accelerator": "cpu",
    }
    return pl.Trainer(callbacks=[*callbacks, save], **(quiet | defaults | settings))


def case(name: str, run: Callable[[], object]) -> None:
    """Run it, and print what was told meanwhile."""
    told.clear()
    try:
        run()
    except BaseException as error:  # noqa: BLE001 - what ended it is part of what is seen
        told.append(f"{type(error).__name__}: {error}" if isinstance(error, ValueError) else type(error).__name__)
    flag = Path(os.environ.get(FLAG, "nowhere"))
    if flag.exists():
        told.append(f"flag: {flag.read_text().strip()}")
        flag.unlink()
    print(f"case {name}: {' '.join(told)}\n", end="", flush=True)


def sections(**arguments: Any) -> FaultToleranceSectionsCallback:
    return FaultToleranceSectionsCallback(**{"autoresume": False, "calculate_timeouts": False} | arguments)


def heartbeats(**arguments: Any) -> FaultToleranceCallback:
    return FaultToleranceCallback(**{"autoresume": False, "calculate_timeouts": False} | arguments)


def policy_that(result: Callable[[BaseException], Any]) -> FaultToleranceSectionsCallback:
    def policy(error: BaseException) -> Any:
        told.append("asked")
        return result(error)

    return sections(exc_handling_policy=policy)


def fails(place: str, error: BaseException) -> Tiny:
    return Tiny(fails_in=place, error=error)


def run_cases() -> None:
    case("fit", lambda: fit(Tiny(), sections()))
    case("weights only", lambda: fit(Tiny(), sections(), save_weights_only=True))
    case("skipped epoch", lambda: fit(Tiny(fails_in="nothing, and skips"), sections()))
    case("save in a step", lambda: fit(Tiny(fails_in="nothing, and saves"), sections()))
    case("heartbeats", lambda: fit(Tiny(), heartbeats()))
    case("validate", lambda: trainer_of(sections()).validate(Tiny(), batches(2), verbose=False))
    case("test", lambda: trainer_of(sections()).test(Tiny(), batches(2), verbose=False))
    case("predict", lambda: trainer_of(sections()).predict(Tiny(), batches(2)))

    case("error in a step", lambda: fit(fails("training_step", RuntimeError()), policy_that(lambda _: None)))
    case("error in validation", lambda: fit(fails("validation_step", RuntimeError()), sections()))
    case("error in a save", lambda: fit(fails("save", RuntimeError()), sections()))
    case("error in a hook", lambda: fit(Tiny(), sections(), Raises(RuntimeError())))
    case("graceful stop", lambda: fit(Tiny(), policy_that(lambda _: None), Raises(SystemExit(0))))
    case("exit with a code", lambda: fit(Tiny(), policy_that(lambda _: None), Raises(SystemExit(3))))
    case("Ctrl-C", lambda: fit(Tiny(), policy_that(lambda _: None), Raises(KeyboardInterrupt())))
    case("policy that fails", lambda: fit(Tiny(), policy_that(lambda _: 1 / 0), Raises(RuntimeError())))
    case("policy of nonsense", lambda: fit(Tiny(), policy_that(lambda _: "stop"), Raises(RuntimeError())))

    case("complete by epochs", lambda: fit(Tiny(), sections(autoresume=True)))
    case("complete by steps", lambda: fit(Tiny(), sections(autoresume=True), max_epochs=-1, max_steps=3))
    case(
        "complete by early stopping",
        lambda: fit(Tiny(), sections(autoresume=True), EarlyStopping("loss", min_delta=9.0, patience=1), max_epochs=9),
    )
    case("nothing left", lambda: fit(Tiny(), sections(autoresume=True), max_epochs=5, limit_train_batches=0))
    case("time was over", lambda: fit(Tiny(), sections(autoresume=True), max_epochs=5, max_time={"seconds": 0}))
    timer = _TunerExitException()
    case("early exit of NeMo's timer", lambda: fit(fails("training_step", timer), sections(autoresume=True)))
    case("exit of NeMo's timer", lambda: fit(Tiny(), sections(autoresume=True), Raises(_TunerExitException())))

    import lightning.pytorch as other
    from lightning.pytorch.demos.boring_classes import BoringModel

    directory = tempfile.mkdtemp(dir=sys.argv[2])
    case(
        "other package",
        lambda: other.Trainer(
            callbacks=[sections()], fast_dev_run=True, default_root_dir=directory, accelerator="cpu"
        ).fit(BoringModel()),
    )


def run_misfits() -> None:
    case("sections", lambda: fit(Tiny(), sections()))
    case("heartbeats", lambda: fit(Tiny(), heartbeats()))
    case("flag", lambda: fit(Tiny(), heartbeats(autoresume=True, calculate_timeouts=True)))
    case("directory", lambda: fit(Tiny(), heartbeats(calculate_timeouts=True, exp_dir="s3://somewhere")))


def run_simulated() -> None:
    """Train for ever, and fail at random moments, until the third start."""
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    faults: list[dict[str, Any] | None] = [
        {"fault_type": "rank_killed", "base_delay": 0.1, "rand_delay": 0.1, "rank_to_fail": 1},
        {"fault_type": "rank_hung", "base_delay": 0.1},
        # After the end of this training, with which it ends.
        {"fault_type": "rank_killed", "base_delay": 1000},
    ]
    callback = sections(simulated_fault_params=faults[restart])
    fit(Tiny(), callback, max_epochs=-1 if restart < 2 else 1, strategy="ddp", devices=2)


def run_request() -> None:
    request = WorkloadControlRequest(WorkloadAction.ShutdownWorkload, "the loss is NaN")
    callback = sections(autoresume=True, exc_handling_policy=lambda _: request)
    fit(fails("training_step", ArithmeticError()), callback)


if __name__ == "__main__":
    overhear("start_section", lambda name: f"+{name}")
    overhear("end_section", lambda name: f"-{name}")
    overhear("send_heartbeat", lambda: "beat")
    overhear("abort", lambda: "abort")
    overhear("shutdown_workload_monitoring", lambda: "shutdown")
    runs = {"cases": run_cases, "misfits": run_misfits, "simulated": run_simulated, "request": run_request}
    runs[sys.argv[1]]()
