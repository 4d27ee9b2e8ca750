"""What the tests of the Hugging Face callback train: a tiny network, which fails where the test says."""

import argparse
import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from ft_launcher.integrations.hf_trainer import FaultToleranceCallback, last_checkpoint

STEPS = 28
SAMPLES_OF_A_STEP = 8  # over both ranks


class Faults(TrainerCallback):  # type: ignore[misc]  # its base has no type where it is not installed
    """Fails as `KIND@PLACE:rank=R,step=S,restart=K` says; ends a run after some steps, orderly."""

    def __init__(self, faults: list[str], steps_per_run: int | None) -> None:
        here = f":rank={os.environ['RANK']}"
        restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
        self._mine = [each for each in faults if here in each and each.endswith(f"restart={restart}")]
        self._left = steps_per_run

    def reach(self, place: str, step: int) -> None:
        for fault in self._mine:
            if f"@{place}:" in fault and f"step={step}," in fault:
                print(f"fault: {fault}\n", end="", flush=True)
                fail(fault.partition("@")[0])

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._left == 0:
            raise SystemExit(0)
        if self._left is not None:
            self._left -= 1
        if state.is_world_process_zero and state.global_step % 4 == 0:
            print(f"epoch {state.global_step // 4}\n", end="", flush=True)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reach("step", state.global_step + 1)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reach("validation", state.global_step)


class FailingTrainer(Trainer):  # type: ignore[misc]  # its base has no type where it is not installed
    """Has a slow step, and fails in the middle of a save, when the model is written and the optimizer is not."""

    faults: Faults
    step_time = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(self.step_time / 2)
        return super().training_step(*args, **kwargs)  # type: ignore[no-any-return]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.faults.reach("saving", self.state.global_step)
        super()._save_optimizer_and_scheduler(output_dir)


def fail(kind: str) -> NoReturn:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(3600)


def samples(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 50, (count, 8), generator=generator)
    return [{"input_ids": each, "labels": each.sum() % 2} for each in words]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--fault", action="append", default=[])
    parser.add_argument("--steps-per-run", type=int)
    parser.add_argument("--step-time", type=float, default=0.0)
    parser.add_argument("--callback", type=json.loads, default={})
    options = parser.parse_args()
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForSequenceClassification(config)
    faults = Faults(options.fault, options.steps_per_run)
    trainer = FailingTrainer(
        model=model,
        args=TrainingArguments(
            str(options.directory),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=4,
            save_steps=4,
            save_total_limit=2,
            logging_steps=STEPS,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=samples(SAMPLES_OF_A_STEP * 6, seed=1),
        eval_dataset=samples(32, seed=2),
        callbacks=[FaultToleranceCallback(**options.callback), faults],
    )
    trainer.faults, trainer.step_time = faults, options.step_time
    last = last_checkpoint(options.directory)
    if trainer.is_world_process_zero():
        print(f"resuming from {last}\n", end="", flush=True)
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        bits = b"".join(each.numpy().tobytes() for each in model.state_dict().values())
        print(f"finished step {trainer.state.global_step} sha256 {hashlib.sha256(bits).hexdigest()}\n", end="")


if __name__ == "__main__":
    main()
