"""A small RL job with the flags of rollout fault tolerance: engines that generate, and a model that trains on it.

It says what it calls, and each loss to the bit.
"""

import argparse
import json
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ft_launcher.engines import EngineEvent, EngineSpec, EngineSupervisor, State
from ft_launcher.rollout import RolloutRunner, add_rollout_ft_arguments, check_rollout_ft_arguments, engine_config

ENGINE = str(Path(__file__).with_name("rollout_engine.py"))


def say(words: str) -> None:
    """Write a line."""
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--fail-in-round", type=int)
    parser.add_argument("--evaluate", action="store_true")
    add_rollout_ft_arguments(parser)
    args = parser.parse_args()
    check_rollout_ft_arguments(args, parser)
    torch.manual_seed(1)
    model = torch.nn.Linear(5, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    supervisors: list[EngineSupervisor] = []
    is_back = threading.Event()

    def make_supervisor() -> EngineSupervisor:
        say("engines are made")
        command = [sys.executable, ENGINE, "{port}", str(Path("starts").absolute())]
        specs = [EngineSpec(name=f"engine{number}", command=command) for number in range(2)]
        config = engine_config(args, min_serving=2)
        supervisors.append(EngineSupervisor(config, specs, on_event=listen, log_dir=Path("logs").absolute()))
        return supervisors[0]

    def listen(event: EngineEvent) -> None:
        if (event.name, event.incarnation, event.after) == ("engine1", 2, State.SERVING):
            is_back.set()

    def generate(rollout_id: int) -> Iterator[dict[str, Any]]:
        say(f"generate {rollout_id}")
        engines = supervisors[0].serving()
        for number in range(8):
            url = engines[number % 2].url + "/generate"
            body = json.dumps({"number": rollout_id * 8 + number}).encode()
            with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as answer:
                tokens = json.loads(answer.read())["tokens"]
            # Of the weights as they were, as a policy's log-probabilities are: it cannot be made again later.
            with torch.no_grad():
                expected = model(torch.tensor(tokens) / 31).to(torch.bfloat16)
            yield {"tokens": tokens, "expected": expected, "reward": sum(tokens) / 7, "status": "completed"}
            if rollout_id == args.fail_in_round and number == 4:
                with suppress(OSError):  # it does not answer to that
                    urllib.request.urlopen(engines[1].url + "/crash", b"", timeout=30)
                is_back.wait(60)
                raise RuntimeError("the verifier broke")

    def train(rollout_id: int, samples: list[Any]) -> str:
        say(f"train {rollout_id} on {len(samples)}")
        inputs = torch.tensor([each["tokens"] for each in samples]) / 31
        targets = torch.stack([each["expected"].float() + each["reward"] for each in samples])
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        say(f"loss {rollout_id} {float(loss.detach()).hex()}")
        return float(loss.detach()).hex()

    runner = RolloutRunner(
        generate, train, args=args, supervisor=make_supervisor, version=lambda rollout_id: f"step {rollout_id}"
    )
    numbers = iter(range(args.rounds))

    def rounds() -> Iterator[int]:
        for number in numbers:
            yield number
            if args.evaluate:
                runner.collect(number, evaluation=True)

    runner.run(rounds())
    say("done")


if __name__ == "__main__":
    main()
