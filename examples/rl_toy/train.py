"""Teach a tiny language model the alphabet by policy gradient, with rollout engines that are killed, hang and are slow.

    python examples/rl_toy/train.py --use-fault-tolerance --faults kill@5,hang@9,slow@13,kill@17,hang@21

Each round: the engines sample, the trainer takes one step, and every engine gets the new weights before it serves
again. A sample is a pure function of the weights, the seed, the round and the prompt. So a run that lost engines ends
with the same parameters, bit for bit, as an undisturbed one on the same machine.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn, TextIO

import torch
from engine import FAULTS
from policy import LETTERS, Policy, digest, write_weights
from sampling import InjectedFault, Sampling, weights_file

from ft_launcher.errors import FtLauncherError
from ft_launcher.rollout import (
    RolloutRunner,
    add_rollout_ft_arguments,
    check_rollout_ft_arguments,
    engine_config,
    tracing,
)

TOLERANCE = 5e-5
"""Between the log-probabilities that an engine gave and the trainer's own. Of the same weights they differ by rounding,
if at all (0 in 640 answers here); of those before the last step by 4e-4 or more, somewhere in every answer."""


def main() -> int:
    options = parse_options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # sums of floats depend on how they are split
    options.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with options.out.open("w") as out:
            wrong = [run(options, seed, out) for seed in options.seeds]
    except FtLauncherError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 1 if any(wrong) else 0


class Trainer:
    """The policy, its optimizer, and the version of its weights: the number of the round that they are for."""

    def __init__(self, seed: int, lr: float, directory: Path) -> None:
        torch.manual_seed(seed)
        self.policy = Policy()
        self.version = "0"
        self.answers = 0
        self.stale = 0  # answers that name other weights than these
        self.mismatched = 0  # answers that name these, with log-probabilities that are not theirs
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr)
        self._directory = directory
        self._publish(0)

    def step(self, number: int, answers: list[dict[str, Any]]) -> float:
        """Take one step on the answers of a round, which makes the weights for the next; their mean reward."""
        prompts = torch.tensor([LETTERS.index(each["prompt"]) for each in answers])
        letters = torch.tensor([each["letters"] for each in answers])  # (prompt, sample, place)
        logprobs = self._logprobs(prompts, letters)
        self._check(answers, logprobs.detach())
        rewards = in_order(prompts, letters)
        to_come = rewards.flip(2).cumsum(2).flip(2)
        advantage = to_come - to_come.mean(1, keepdim=True)  # the baseline: the prompt's other samples
        loss = -(advantage / (advantage.std() + 1e-6) * logprobs).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._publish(number + 1)
        return float(rewards.mean())

    def _publish(self, number: int) -> None:
        """Write the weights for this round where engines find them."""
        self.version = str(number)
        write_weights(weights_file(self._directory, self.version), self.version, self.policy)
        weights_file(self._directory, str(number - 2)).unlink(missing_ok=True)

    def _check(self, answers: list[dict[str, Any]], logprobs: torch.Tensor) -> None:
        """Count the answers that these weights did not give: by what they say, and by what the weights say."""
        self.answers += len(answers)
        for answer, mine in zip(answers, logprobs, strict=True):
            if answer["version"] != self.version:
                self.stale += 1
                words = f"an answer with weights of version {answer['version'] or 'none'}"
            elif (torch.tensor(answer["logprobs"]) - mine).abs().max() > TOLERANCE:
                self.mismatched += 1
                words = "an answer that is not of the weights that it names"
            else:
                continue
            print(f"round {self.version}: {answer['engine']} gave {words}", file=sys.stderr)

    def _logprobs(self, prompts: torch.Tensor, letters: torch.Tensor) -> torch.Tensor:
        _, samples, length = letters.shape
        last, rows = prompts.repeat_interleave(samples), letters.flatten(0, 1)
        state, found = self.policy.begin(len(rows)), []
        for place in range(length):
            every, state = self.policy(last, state)
            last = rows[:, place]
            found.append(every.gather(1, last[:, None])[:, 0])
        return torch.stack(found, 1).view_as(letters)


def in_order(prompts: torch.Tensor, letters: torch.Tensor) -> torch.Tensor:
    """Reward each letter with 1 that comes after the one before it in the alphabet, and a after h; like `letters`."""
    first = prompts[:, None, None].expand(-1, letters.shape[1], 1)
    before = torch.cat([first, letters[:, :, :-1]], 2)
    return (letters == (before + 1) % len(LETTERS)).float()


class Report:
    """What a run did, as lines of JSON and for a person."""

    def __init__(self, out: TextIO, seed: int, *, disturbed: bool) -> None:
        self._out = out
        self._run = {"seed": seed, "disturbed": disturbed}
        self._rounds: list[tuple[int, float, float]] = []  # number, when it began, seconds
        self._waits: list[tuple[float, float]] = []  # when one began, seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = monotonic()
        yield
        self._waits.append((began, monotonic() - began))

    def round(self, number: int, began: float, reward: float) -> None:
        seconds = monotonic() - began
        self._rounds.append((number, began, seconds))
        self._write("round", round=number, reward=reward, seconds=round(seconds, 4))
        if number % 5 == 0:
            print(f"seed {self._run['seed']} round {number} reward {reward:.3f}", flush=True)

    def faults(self, faults: list[InjectedFault]) -> None:
        """Write what each fault has cost: the time of its rounds over that of as many undisturbed ones."""
        hit = {number: fault for fault in faults for number in self._hit(fault)}
        usual = statistics.median(seconds for number, _, seconds in self._rounds if number not in hit)
        for fault in faults:
            mine = [seconds for number, _, seconds in self._rounds if hit.get(number) is fault]
            waits = [seconds for began, seconds in self._waits if fault.at < began < (fault.back_at or fault.at)]
            lost = sum(mine) - usual * len(mine) + sum(waits)
            noticed = None if fault.noticed_at is None else fault.noticed_at - fault.at
            back = None if fault.back_at is None else fault.back_at - fault.at
            self._write(
                "fault",
                fault=fault.kind,
                round=fault.round,
                engine=fault.engine,
                rounds=len(mine),
                **{name: _short(value) for name, value in (("noticed", noticed), ("back", back), ("lost", lost))},
            )
            print(
                f"  {fault.kind} of {fault.engine} in round {fault.round}: noticed after {_said(noticed)}, "
                f"back after {_said(back)}, lost {_said(lost)} (a round takes {_said(usual)})",
                flush=True,
            )

    def _hit(self, fault: InjectedFault) -> list[int]:
        """Give the numbers of the rounds that began before its engine was back."""
        until = fault.back_at or 0.0
        return [number for number, began, _ in self._rounds if number == fault.round or fault.at < began < until]

    def end(self, **result: Any) -> None:
        self._write("run", **result)

    def _write(self, kind: str, **fields: Any) -> None:
        self._out.write(json.dumps({"kind": kind, **self._run, **fields}) + "\n")
        self._out.flush()


def run(options: argparse.Namespace, seed: int, out: TextIO) -> int:
    """Train once; how many answers came from other weights than they should have."""
    report = Report(out, seed, disturbed=bool(options.faults))
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rl_toy-")))
        trainer = Trainer(seed, options.lr, directory)
        if options.trace is not None:
            stack.enter_context(tracing(options.trace))
        sampling = None
        if not options.debug_train_only:
            sampling = stack.enter_context(start_engines(options, seed, directory))
            sampling.supervisor.set_version(trainer.version)
        runner = RolloutRunner(
            lambda number: sampling.collect(number) if sampling is not None else [],
            trainer.step,
            args=options,
            supervisor=None if sampling is None else sampling.supervisor,
            version=lambda _: trainer.version,
            meta={"seed": seed},
        )
        began_run = monotonic()
        for number in range(options.rounds):
            if sampling is not None:
                with report.waiting():
                    sampling.prepare(number)
            began = monotonic()
            report.round(number, began, runner.round(number))
        if sampling is not None and sampling.faults:
            sampling.supervisor.wait_serving(options.engines)  # to say when the last one was back
            report.faults(sampling.faults)
    seconds, parameters = monotonic() - began_run, digest(trainer.policy)
    counts = {name: getattr(trainer, name) for name in ("answers", "stale", "mismatched")}
    counts["retries"] = 0 if sampling is None else sampling.retries
    report.end(seconds=round(seconds, 2), parameters=parameters, **counts)
    print(
        f"finished seed {seed} in {seconds:.1f} s: {trainer.answers} answers, {trainer.stale} with other weights, "
        f"{trainer.mismatched} not of the weights that they name; {counts['retries']} requests sent again; "
        f"parameters sha256 {parameters}",
        flush=True,
    )
    return trainer.stale + trainer.mismatched


def start_engines(options: argparse.Namespace, seed: int, weights: Path) -> Sampling:
    config = engine_config(
        options, ready_interval=0.05, term_grace=1.0, refresh_timeout=30.0, max_restarts=len(options.faults) + 3
    )
    return Sampling(
        config,
        engines=options.engines,
        token_seconds=options.token_seconds,
        weights=weights,
        faults=options.faults,
        seed=seed,
    )


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_faults(text: str) -> dict[int, str]:
    """Read `KIND@ROUND,...`."""
    faults: dict[int, str] = {}
    for part in text.split(","):
        kind, _, number = part.partition("@")
        if kind not in FAULTS or not number.isdecimal() or int(number) in faults:
            raise argparse.ArgumentTypeError(
                f"{part!r} must be KIND@ROUND, one for a round, KIND of {', '.join(FAULTS)}"
            )
        faults[int(number)] = kind
    return dict(sorted(faults.items()))


def parse_seeds(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them")
    return [int(part) for part in text.split(",")]


def parse_options() -> argparse.Namespace:
    kinds = "\n".join(f"  {kind:<8}{what}" for kind, what in FAULTS.items())
    epilog = f"--faults KIND@ROUND,... has one engine fail in each of these rounds (from 0). What it does:\n{kinds}"
    parser = Parser(description=__doc__, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="(30)")
    parser.add_argument("--engines", type=int, default=3, help="(3)")
    parser.add_argument("--seeds", type=parse_seeds, default=[0], metavar="S,...", help="one run for each (0)")
    parser.add_argument("--lr", type=float, default=0.006, help="learning rate (0.006)")
    parser.add_argument("--token-seconds", type=float, default=0.006, help="what a token takes at least (0.006)")
    parser.add_argument("--faults", type=parse_faults, default={}, metavar="KIND@ROUND,...", help="see below")
    parser.add_argument("--out", type=Path, default=Path("runs/rl_toy.jsonl"), help="results (runs/rl_toy.jsonl)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write what each sample spent its time on")
    add_rollout_ft_arguments(parser)
    parser.set_defaults(
        rollout_health_check_first_wait=30.0, rollout_health_check_interval=1.0, rollout_health_check_timeout=1.0
    )
    options = parser.parse_args()
    check_rollout_ft_arguments(options, parser)
    if options.rounds < 1 or options.engines < 1 or not options.token_seconds >= 0:
        parser.error("--rounds and --engines must be at least 1, --token-seconds at least 0")
    if any(number >= options.rounds for number in options.faults):
        parser.error(f"--faults: the last round is {options.rounds - 1}")
    if options.faults and not options.use_fault_tolerance:
        parser.error("--faults needs --use-fault-tolerance: nobody else ends an engine that hangs")
    if len(options.seeds) > 1 and (options.save_debug_rollout_data or options.load_debug_rollout_data):
        parser.error("--save-debug-rollout-data and --load-debug-rollout-data need one seed in --seeds")
    return options


if __name__ == "__main__":
    sys.exit(main())
