"""Train a small network on scikit-learn's digits with Lightning and DDP, and end with the same bits whatever fails.

    ft_launcher --nproc-per-node 2 --max-restarts 3 --ft-cfg-path configs/ft.yaml examples/lightning_ddp.py

What ft_launcher needs is one line: the callback in the Trainer. Each start takes up the last checkpoint.
"""

import argparse
import hashlib
import os
import time
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from faults import FAULT_HELP, Faults, parse_fault, say
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ft_launcher.integrations.ptl_callback import FaultToleranceCallback, FaultToleranceSectionsCallback

BATCH = 60  # samples of a step on each rank
STEPS = 4  # of an epoch; a checkpoint is saved after each epoch
HELD_OUT = 240


def main() -> None:
    options = parse_options()
    pl.seed_everything(0)
    watch = FaultToleranceCallback if options.monitoring == "heartbeats" else FaultToleranceSectionsCallback
    save = ModelCheckpoint(options.directory, "{epoch}", save_last=True, save_on_train_epoch_end=True)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    trainer = pl.Trainer(
        accelerator="gpu" if torch.cuda.device_count() >= ranks else "cpu",
        strategy="ddp",
        devices=ranks,
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        max_epochs=options.epochs,
        default_root_dir=options.directory,
        callbacks=[save, EndOfRun(options.epochs_per_run), watch(options.autoresume, options.calculate_timeouts)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    digits = Digits(options)
    trainer.fit(digits, load(training=True), load(training=False), ckpt_path="last")
    if trainer.is_global_zero:
        bits = b"".join(each.cpu().numpy().tobytes() for each in digits.state_dict().values())
        say(f"finished step {trainer.global_step} parameters sha256 {hashlib.sha256(bits).hexdigest()}")


class Digits(pl.LightningModule):
    """The network, which fails where --fault and the like say."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.step_time: float = options.step_time
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        where = {
            "rank": int(os.environ.get("RANK", "0")),
            "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        }
        self.faults = Faults(options.fault, **where)
        self.validation_faults = Faults(options.validation_fault, **where)
        self.saving_faults = Faults(options.saving_fault, **where)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        self.faults.at_step(self.global_step + 1, nullcontext)
        time.sleep(self.step_time)
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.validation_faults.at_step(self.global_step, nullcontext)
        images, labels = batch
        self.log("loss", cross_entropy(self.network(images), labels), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saving_faults.at_step(checkpoint["global_step"], nullcontext)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.is_global_zero:
            say(f"resumed from step {checkpoint['global_step']}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class EndOfRun(pl.Callback):
    """Ends the run after some epochs, as a job does whose time is nearly over: orderly, and not as a failure."""

    def __init__(self, epochs: int | None) -> None:
        self.left = epochs

    def on_train_epoch_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        if self.left == 0:
            raise SystemExit(0)
        if trainer.is_global_zero:
            say(f"epoch {trainer.current_epoch}")
        if self.left is not None:
            self.left -= 1


def load(*, training: bool) -> DataLoader[tuple[Tensor, ...]]:
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    first, last = (0, 2 * BATCH * STEPS) if training else (len(labels) - HELD_OUT, len(labels))
    return DataLoader(TensorDataset(images[first:last], labels[first:last]), BATCH, shuffle=training)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FAULT_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5, help="epochs in all, resumed ones included (5)")
    parser.add_argument("--epochs-per-run", type=int, metavar="N", help="end a run after so many epochs")
    parser.add_argument("--step-time", type=float, default=0.0, metavar="S", help="seconds added to each step (0)")
    parser.add_argument("--directory", default="runs/lightning_ddp", help="(runs/lightning_ddp)")
    parser.add_argument("--monitoring", choices=["sections", "heartbeats"], default="sections")
    parser.add_argument("--autoresume", action="store_true", help="make FAULT_TOL_FINISHED_FLAG_FILE at the end")
    parser.add_argument("--calculate-timeouts", action="store_true", help="learn limits, of 3 s or more")
    for option in ("--fault", "--validation-fault", "--saving-fault"):
        parser.add_argument(option, type=parse_fault, action="append", default=[], help="see below; repeatable")
    return parser.parse_args()


if __name__ == "__main__":
    main()
