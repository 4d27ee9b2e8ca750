"""PPO with its roles as Ray actors, each of which may be killed or hang on the way: it ends with the same bits.

    python examples/ray_ppo_toy.py --fault kill:role=actor_rollout,step=6 --fault kill:role=critic,step=9 \\
        --fault kill:role=ref_policy,step=12 --fault hang:role=critic,step=15

A small policy learns the alphabet. It is trained by a gang of two actors, which sample and share their gradients; a
critic and a frozen reference policy are actors of their own. Each comes back in its own way:

    ref_policy      has no state of its own: what it was asked is asked again, and nobody else notices.
    critic          has one, and its `update` must not run twice: all go back to the last step that all have saved.
    actor_rollout   is lost as a whole, because a collective needs all its ranks. Then all go back, too.

A sample is a pure function of the weights, the seed, the step and the rank. So a step can be repeated bit for bit.
"""

import argparse
import hashlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from torch import Tensor, nn

from ft_launcher.checkpoint import CheckpointManager
from ft_launcher.errors import UsageError
from ft_launcher.integrations.ray_actors import (
    ActorGang,
    ActorMetrics,
    HealthMonitor,
    Limits,
    PoisonCallError,
    RayFaultToleranceConfig,
    Rendezvous,
    RestartsExhaustedError,
    SupervisedActor,
    no_retry,
    to_json_lines,
    to_prometheus,
    to_tensorboard,
    torch_process_group,
)

LETTERS, LENGTH = 8, 8  # a to h; how many a sample has
GANG, SAMPLES = 2, 64  # actors that train together; samples of each in a step
EPOCHS, CLIP, KL, LAMBDA = 4, 0.2, 0.01, 0.95  # of PPO
SAY_EVERY = 5  # steps between two lines of progress
KEPT_CHECKPOINTS = 2  # one more than is needed: a role may be lost before it has saved what others have

logger = logging.getLogger("ray_ppo_toy")


# -- the driver -------------------------------------------------------------------------------------------------------


def main() -> int:
    options = parse_options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = RayFaultToleranceConfig.resolve(options.ft_cfg_path)
    except UsageError as error:
        print(f"ray_ppo_toy.py: {error}", file=sys.stderr)
        return 2
    start_ray()
    try:
        with ExitStack() as stack:
            metrics = ActorMetrics(sinks(options, stack))
            roles = Roles(options, config, metrics, stack)
            train(roles, options, HealthMonitor(roles.all, config, metrics))
    except (RestartsExhaustedError, PoisonCallError) as error:
        print(f"ray_ppo_toy.py: {error}", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    return 0


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names, or start a Ray of two cores."""
    address = os.environ.get("RAY_ADDRESS", "local")
    own = {"num_cpus": 2, "include_dashboard": False} if address == "local" else {}
    # What actors print is in Ray's own files. (That one has died, Ray says at length; ft_launcher says it in a line.)
    ray.init(address, **own, logging_level=logging.ERROR, log_to_driver=False)


def train(roles: "Roles", options: argparse.Namespace, monitor: HealthMonitor) -> None:
    """Train, and go on with all roles at the same step whenever one of them has lost its state."""
    step, are_together = 0, False  # the step that is tried; all roles have taken the one before it
    while True:
        try:
            if not are_together:
                step, are_together = roles.go_back() + 1, True
            if step > options.steps:
                print(f"finished step {options.steps} {roles.summary(options.steps)}", flush=True)
                return
            reward = roles.take(step)
            if step % options.checkpoint_every == 0 or step == options.steps:
                roles.save(step)
            if step % SAY_EVERY == 0:
                print(f"step {step} reward {reward:.4f}", flush=True)
        except (RestartsExhaustedError, PoisonCallError):
            raise  # nothing is left to go on with
        except (RayActorError, OutOfStepError):
            are_together = False
        monitor.step(step)
        step += are_together


class Roles:
    """The actors, and what the driver does with all of them."""

    def __init__(
        self, options: argparse.Namespace, config: RayFaultToleranceConfig, metrics: ActorMetrics, stack: ExitStack
    ) -> None:
        directory = options.checkpoint_dir.resolve() / f"seed-{options.seed}"
        # Half a core for each that computes all the time; with what is left, an actor can start while another one ends.
        quarter = {"num_cpus": 0.25}
        third = options.hang_after / 3  # a process that is stopped misses two pings in a row
        limits = Limits(ping_every=third, ping_timeout=third, missed_pings=2, call=options.hang_after)

        def faults(role: str) -> "Faults":
            return Faults([each for each in options.fault if each.role == role])

        self._gang = stack.enter_context(
            ActorGang(
                ActorRollout,
                GANG,
                (directory / "actor_rollout", options.seed, options.lr, faults("actor_rollout")),
                role="actor_rollout",
                config=config,
                setup=ActorRollout.join,
                restore=ActorRollout.restore,
                bundle={"CPU": 0.5},
                limits=limits,
                metrics=metrics,
            )
        )
        self._critic = stack.enter_context(
            SupervisedActor(
                Critic,
                (directory / "critic", options.seed, options.lr, faults("critic")),
                role="critic",
                config=config,
                init=Critic.begin,
                options=quarter,
                limits=limits,
                metrics=metrics,
            )
        )
        self._reference = stack.enter_context(
            SupervisedActor(
                Reference,
                (options.seed, faults("ref_policy")),
                role="ref_policy",
                config=config,
                init=Reference.begin,
                options=quarter,
                limits=limits,
                metrics=metrics,
            )
        )
        self.all = (self._gang, self._critic, self._reference)

    def go_back(self) -> int:
        """Bring all that have a state to the newest step that all of them have saved, and give it (0: the start)."""
        saved = set(self._gang.call("saved")[0]) & set(self._critic.call("saved"))
        step = max(saved, default=0)
        going = [self._gang.submit("load", step), self._critic.submit("load", step)]
        for each in going:
            each.result()
        print(f"from step {step} on", flush=True)
        return step

    def take(self, step: int) -> float:
        """Sample, and update policy and critic; the mean reward. Raises when a role has lost its state."""
        rollouts = self._gang.call("generate", step)
        values = self._critic.submit("values", step, rollouts)
        reference = self._reference.call("logprobs", step, rollouts)
        targets = targets_of(rollouts, reference, values.result())
        critic = self._critic.submit("update", step, rollouts, targets)
        self._gang.call("update", step, rollouts, targets)
        critic.result()
        return mean_reward(rollouts)

    def save(self, step: int) -> None:
        """Have all that have a state save it."""
        going = [self._gang.submit("save", step), self._critic.submit("save", step)]
        for each in going:
            each.result()

    def summary(self, step: int) -> str:
        """What the policy gets for one more sample, and a digest of all parameters' bits."""
        reward = mean_reward(self._gang.call("generate", step + 1))
        first, *others = self._gang.call("parameters")
        if any(each != first for each in others):
            raise RuntimeError("the members of the gang have different parameters")
        bits = first + self._critic.call("parameters")
        return f"reward {reward:.4f} parameters sha256 {hashlib.sha256(bits).hexdigest()}"


class Rollout(NamedTuple):
    """Samples of one rank: `prompts` is (sample), the others are (sample, place)."""

    prompts: np.ndarray
    letters: np.ndarray
    logprobs: np.ndarray
    rewards: np.ndarray


class Targets(NamedTuple):
    """What the samples of one rank are to teach: (sample, place)."""

    advantages: np.ndarray
    returns: np.ndarray


def targets_of(rollouts: list[Rollout], reference: list[np.ndarray], values: list[np.ndarray]) -> list[Targets]:
    """Give the advantages (GAE; normalised over all ranks) and the returns, with what leaving the reference costs."""
    advantages = [
        advantages_of(rollout.rewards - KL * (rollout.logprobs - logprobs), value)
        for rollout, logprobs, value in zip(rollouts, reference, values, strict=True)
    ]
    mean, deviation = np.mean(advantages), np.std(advantages) + 1e-6
    return [Targets((each - mean) / deviation, each + value) for each, value in zip(advantages, values, strict=True)]


def advantages_of(rewards: np.ndarray, values: np.ndarray) -> np.ndarray:
    advantages, running, following = np.zeros_like(values), 0.0, 0.0
    for place in reversed(range(LENGTH)):
        running = rewards[:, place] + following - values[:, place] + LAMBDA * running
        advantages[:, place], following = running, values[:, place]
    return advantages


def mean_reward(rollouts: list[Rollout]) -> float:
    return float(np.mean([each.rewards for each in rollouts]))


# -- the roles --------------------------------------------------------------------------------------------------------


class OutOfStepError(Exception):
    """A role was asked for a step that is not its next one: it was started again meanwhile."""


class Learner:
    """A network with its optimizer, how many steps they have behind them, and their checkpoints."""

    def __init__(self, directory: Path, seed: int, lr: float, faults: "Faults", make: Callable[[], nn.Module]) -> None:
        torch.set_num_threads(1)  # sums of floats depend on how they are split
        self._directory, self._seed, self._lr, self._make = directory, seed, lr, make
        self._faults = faults
        self.load(0)

    def load(self, step: int) -> None:
        """Be as after this step: new, or as it was saved."""
        torch.manual_seed(self._seed)
        self._network = self._make()
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=self._lr)
        if step:
            with self._checkpoints() as checkpoints:
                checkpoints.load(step, self._network, self._optimizer)
        self._step = step

    def restore(self) -> int:
        """Be as it was saved last, and give the step."""
        self.load(max(self.saved(), default=0))
        return self._step

    def save(self, step: int) -> None:
        """Save what is after this step."""
        self._expect(step)
        with self._checkpoints() as checkpoints:
            checkpoints.save(self._network, self._optimizer, step)

    def saved(self) -> list[int]:
        """Give the steps of which there is a checkpoint."""
        with self._checkpoints() as checkpoints:
            return checkpoints.steps()

    def parameters(self) -> bytes:
        """Give the bits of the network."""
        return nn.utils.parameters_to_vector(self._network.parameters()).detach().numpy().tobytes()

    def _checkpoints(self) -> CheckpointManager:
        # One for each use. A manager that has saved keeps the directory locked: a process that hangs, and takes its
        # time to die, would keep its successor from saving.
        return CheckpointManager(self._directory, KEPT_CHECKPOINTS, save_best=False, show_progress=False)

    def _expect(self, done: int) -> None:
        if self._step != done:
            raise OutOfStepError(f"after step {self._step}, not {done}")


class ActorRollout(Learner):
    """The policy, on each rank: samples, and learns from the samples of all ranks."""

    def __init__(self, directory: Path, seed: int, lr: float, faults: "Faults") -> None:
        super().__init__(directory, seed, lr, faults, new_policy)

    def join(self, rendezvous: Rendezvous) -> None:
        """Meet the other ranks; the last one has the faults."""
        if rendezvous.rank == GANG - 1:
            self._faults.begin(rendezvous.restart)
        torch_process_group("gloo")(self, rendezvous)

    @torch.no_grad()
    def generate(self, step: int) -> Rollout:
        """Sample with the weights from before this step."""
        self._faults.at(step, "generate")
        chance = torch.Generator().manual_seed((self._seed * 1_000_003 + step) * GANG + dist.get_rank())
        prompts = torch.randint(LETTERS, (SAMPLES,), generator=chance)
        letters, last = [], prompts
        for _ in range(LENGTH):
            last = torch.multinomial(self._network(last).softmax(-1), 1, generator=chance)[:, 0]
            letters.append(last)
        sampled = torch.stack(letters, 1)
        in_order = (sampled == (before(prompts, sampled) + 1) % LETTERS).float()
        logprobs = logprobs_of(self._network, prompts, sampled)
        return Rollout(prompts.numpy(), sampled.numpy(), logprobs.numpy(), in_order.numpy())

    def update(self, step: int, rollouts: list[Rollout], targets: list[Targets]) -> None:
        """Take the step: some epochs over this rank's samples, with the mean of all ranks' gradients."""
        self._faults.at(step, "update")
        rank = dist.get_rank()
        prompts, letters, old = (torch.tensor(each) for each in rollouts[rank][:3])
        advantages = torch.tensor(targets[rank].advantages)
        for _ in range(EPOCHS):
            ratio = (logprobs_of(self._network, prompts, letters) - old).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
            self._optimizer.zero_grad()
            loss.backward()
            for parameter in self._network.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= GANG
            self._optimizer.step()
        self._step = step


class Critic(Learner):
    """Says what is still to be got from each place of a sample.

    Unlike a gang, an actor alone comes back unsaid, with what it has saved last. So each call names the step that it
    is for, and is refused by a process that is not there: else its answer would silently come from old weights.
    """

    def __init__(self, directory: Path, seed: int, lr: float, faults: "Faults") -> None:
        super().__init__(directory, seed, lr, faults, new_critic)

    def begin(self, restart: int) -> None:
        """Be as it was saved last: if that was just now, nobody has to go back."""
        self._faults.begin(restart)
        self.restore()

    @torch.no_grad()
    def values(self, step: int, rollouts: list[Rollout]) -> list[np.ndarray]:
        """Give the value of each place before its letter, by rank: (sample, place)."""
        self._faults.at(step, "values")
        self._expect(step - 1)
        return [self._network(states(each)).squeeze(-1).numpy() for each in rollouts]

    @no_retry  # a step that is taken twice is one too many
    def update(self, step: int, rollouts: list[Rollout], targets: list[Targets]) -> None:
        """Take the step, on the samples of all ranks."""
        self._faults.at(step, "update")
        self._expect(step - 1)
        inputs = torch.cat([states(each) for each in rollouts])
        returns = torch.cat([torch.tensor(each.returns) for each in targets])
        for _ in range(EPOCHS):
            loss = (self._network(inputs).squeeze(-1) - returns).square().mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        self._step = step


class Reference:
    """The policy as it was in the beginning."""

    def __init__(self, seed: int, faults: "Faults") -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self._policy, self._faults = new_policy(), faults

    def begin(self, restart: int) -> None:
        """Take up the faults of this process."""
        self._faults.begin(restart)

    @torch.no_grad()
    def logprobs(self, step: int, rollouts: list[Rollout]) -> list[np.ndarray]:
        """Give the log-probabilities of the letters, by rank: (sample, place)."""
        self._faults.at(step, "logprobs")
        inputs = [(torch.tensor(each.prompts), torch.tensor(each.letters)) for each in rollouts]
        return [logprobs_of(self._policy, *each).numpy() for each in inputs]


def new_policy() -> nn.Module:
    """Gives, for the letter before, the logits of the next; 2,888 parameters."""
    return nn.Sequential(nn.Embedding(LETTERS, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, LETTERS))


def new_critic() -> nn.Module:
    """Gives, for the letter before and the place, the value; 4,225 parameters."""
    return nn.Sequential(nn.Embedding(LETTERS * LENGTH, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))


def before(prompts: Tensor, letters: Tensor) -> Tensor:
    """Give the letter before each: (sample, place)."""
    return torch.cat([prompts[:, None], letters[:, :-1]], 1)


def states(rollout: Rollout) -> Tensor:
    """Give what the critic sees: (sample, place)."""
    return before(torch.tensor(rollout.prompts), torch.tensor(rollout.letters)) + LETTERS * torch.arange(LENGTH)


def logprobs_of(policy: nn.Module, prompts: Tensor, letters: Tensor) -> Tensor:
    """Give the log-probabilities of the letters: (sample, place)."""
    return policy(before(prompts, letters)).log_softmax(-1).gather(-1, letters[..., None])[..., 0]


# -- faults -----------------------------------------------------------------------------------------------------------

KINDS = {
    "kill": "ends itself with SIGKILL",
    "hang": "waits for ever, in the call",
    "stop": "stops itself with SIGSTOP",
}
CALLS = {
    "actor_rollout": ("update", "generate"),
    "critic": ("update", "values"),
    "ref_policy": ("logprobs",),
}
FAULT_HELP = "\n".join(
    [
        "--fault KIND:role=ROLE,step=S,call=C makes a role fail at step S (from 1), as it begins the call C.",
        "A role's first fault strikes in its first process, the next one in the process after that.",
        *(f"  ROLE {role:<15}C: {' or '.join(calls)} (the first if not given)" for role, calls in CALLS.items()),
        *(f"  KIND {kind:<15}{what}" for kind, what in KINDS.items()),
    ]
)


class Fault(NamedTuple):
    kind: str
    role: str
    step: int
    call: str


def parse_fault(text: str) -> Fault:
    """Read `KIND:role=ROLE,step=S,call=C`; the last may be left out."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r}: no kind {kind!r}; there are {', '.join(KINDS)}")
    given = dict(part.partition("=")[::2] for part in rest.split(","))
    role, step = given.pop("role", ""), given.pop("step", "")
    if role not in CALLS or not (step.isascii() and step.isdigit() and int(step)):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write {kind}:role=ROLE,step=S, with ROLE of {', '.join(CALLS)} and S from 1 on"
        )
    call = given.pop("call", CALLS[role][0])
    if call not in CALLS[role] or given:
        raise argparse.ArgumentTypeError(f"{text!r}: {role} has call={' or call='.join(CALLS[role])}, and nothing else")
    return Fault(kind, role, int(step), call)


class Faults:
    """The faults of one role."""

    def __init__(self, faults: list[Fault]) -> None:
        self._all = sorted(faults, key=lambda fault: fault.step)
        self._mine: Fault | None = None

    def begin(self, restart: int) -> None:
        """Be those of the role's process after so many restarts."""
        self._mine = self._all[restart] if restart < len(self._all) else None

    def at(self, step: int, call: str) -> None:
        """Fail, if this is the place."""
        if self._mine is None or (self._mine.step, self._mine.call) != (step, call):
            return
        match self._mine.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                threading.Event().wait()
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)


# -- the command line -------------------------------------------------------------------------------------------------


def sinks(options: argparse.Namespace, stack: ExitStack) -> list[Callable[..., object]]:
    """Give those that the metrics go to."""
    found: list[Callable[..., object]] = []
    if options.metrics is not None:
        options.metrics.parent.mkdir(parents=True, exist_ok=True)
        found.append(to_json_lines(options.metrics))
    if options.tensorboard is not None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(options.tensorboard)
        stack.callback(writer.close)
        found.append(to_tensorboard(writer))
    if options.prometheus is not None:
        from prometheus_client import start_http_server

        start_http_server(options.prometheus)
        found.append(to_prometheus())
    return found


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=FAULT_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="steps in all, resumed ones included (30)")
    parser.add_argument("--seed", type=int, default=0, help="of the first parameters and the samples (0)")
    parser.add_argument("--lr", type=float, default=0.002, help="learning rate (0.002)")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("runs/ray_ppo_toy"), help="(runs/ray_ppo_toy)")
    parser.add_argument("--checkpoint-every", type=int, default=5, metavar="N", help="steps (5)")
    parser.add_argument("--ft-cfg-path", type=Path, metavar="FILE", help="such as configs/ray.yaml")
    parser.add_argument("--hang-after", type=float, default=10.0, metavar="S", help="seconds of a call (10)")
    parser.add_argument("--metrics", type=Path, metavar="FILE", help="add a line of JSON for each step that is tried")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write the metrics there, too")
    parser.add_argument("--prometheus", type=int, metavar="PORT", help="serve them, too")
    parser.add_argument("--fault", type=parse_fault, action="append", default=[], help="see below; repeatable")
    options = parser.parse_args()
    if options.steps < 1 or options.checkpoint_every < 1 or not options.hang_after > 0:
        parser.error("--steps and --checkpoint-every must be at least 1, --hang-after above 0")
    if any(fault.step > options.steps for fault in options.fault):
        parser.error(f"--fault: there are only {options.steps} steps")
    return options


if __name__ == "__main__":
    sys.exit(main())
