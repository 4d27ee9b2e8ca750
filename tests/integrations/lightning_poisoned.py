"""A Lightning training whose checkpoints of step 12 hold poison when they are saved for the first time."""

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from ft_launcher.integrations.ptl_callback import FaultToleranceCallback

DIRECTORY = Path(sys.argv[1])
STEPS = 4  # of an epoch
POISONED = 3 * STEPS
CYCLE = int(os.environ["FT_CYCLE"])


class Poisoned(BoringModel):  # type: ignore[misc]  # its base has no type where it is not installed
    """Dies of poison when it loads it, and once in its fourth epoch, so that it has to load something."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["is_poison"] = checkpoint["global_step"] == POISONED and CYCLE == 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["is_poison"]:
            os._exit(5)

    def on_train_epoch_start(self) -> None:
        os.write(1, f"rank {self.trainer.global_rank} epoch {self.trainer.current_epoch}\n".encode())
        if self.trainer.global_step == POISONED and CYCLE == 0:
            os._exit(3)


if __name__ == "__main__":
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        max_epochs=4,
        limit_train_batches=STEPS,
        limit_val_batches=0,
        default_root_dir=DIRECTORY,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            # Each checkpoint is there twice: under its own name, and as the last one.
            ModelCheckpoint(DIRECTORY, "{epoch}", save_top_k=-1, save_last=True, save_on_train_epoch_end=True),
            FaultToleranceCallback(autoresume=False, calculate_timeouts=False),
        ],
    )
    trainer.fit(Poisoned(), ckpt_path="last")
    os.write(1, f"finished step {trainer.global_step}\n".encode())
