"""RolloutRunner: rounds of rollout and training, either half alone, and replay, for any `generate` and `train`."""

import argparse
import asyncio
import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from ft_launcher.errors import UsageError
from ft_launcher.rollout.dumps import RolloutDump, RoundWriter
from ft_launcher.rollout.flags import check_rollout_ft_arguments
from ft_launcher.rollout.round_file import EngineRecord

if TYPE_CHECKING:
    from ft_launcher.engines.supervisor import EngineSupervisor

__all__ = ["Generate", "Mode", "RolloutRunner", "Train"]

logger = logging.getLogger(__name__)

Mode = Literal["normal", "rollout-only", "train-only"]
Samples: TypeAlias = Iterable[Any] | AsyncIterable[Any]
Generate: TypeAlias = Callable[[int], Samples | Awaitable[Samples]]
"""Gives the samples of the round with this number, at once or one after the other (then each is saved as it comes)."""
Train: TypeAlias = Callable[[int, list[Any]], Any]
"""Trains on the samples of a round."""


class RolloutRunner:
    """Runs rounds. Train-only: `generate` is never called and no engine is touched; rollout-only: `train` is never.

    Train-only without dumps to load calls `train` with no samples.
    """

    def __init__(
        self,
        generate: Generate,
        train: Train,
        *,
        args: argparse.Namespace | None = None,
        mode: Mode = "normal",
        save: RolloutDump | None = None,
        load: RolloutDump | None = None,
        subsample: float | None = None,
        seed: int = 0,
        trust: bool = False,
        supervisor: "EngineSupervisor | Callable[[], EngineSupervisor] | None" = None,
        version: Callable[[int], str] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """args: what the flags say; in place of mode, save, load, subsample and trust.

        save: rounds that are replayed are saved too, which makes a part or a safe copy of a dump. seed: of the
        subsample. supervisor: one that runs, which stays the caller's; or what makes one, which is called when engines
        are needed, and whose supervisor is started and closed by `run`. version: after a training, gives the version of
        the weights that it made; only engines with those serve then. meta: written into every dump, to know the run by;
        a replay of other ones warns. Raises UsageError for what contradicts itself.
        """
        if args is not None:
            check_rollout_ft_arguments(args)
            mode = "rollout-only" if args.debug_rollout_only else "train-only" if args.debug_train_only else "normal"
            save = _dump(args.save_debug_rollout_data, allow_overwrite=args.allow_overwrite)
            load = _dump(args.load_debug_rollout_data, allow_overwrite=True)
            subsample, trust = args.load_debug_rollout_data_subsample, args.load_debug_rollout_data_trust
        if load is not None and mode != "train-only":
            raise UsageError(f"load is given and mode is {mode!r}; it must be 'train-only'")
        if load is not None and save is not None and load.template == save.template:
            raise UsageError(f"save and load are both {save.template!r}; they must differ")
        self.mode = mode
        self._generate, self._train = generate, train
        self._save, self._load = save, load
        self._subsample, self._seed, self._trust = subsample, seed, trust
        self._make_supervisor = supervisor if callable(supervisor) else None
        self._supervisor = None if callable(supervisor) else supervisor
        self._version_of = version
        self._version: str | None = None  # of the weights that the last training made
        self._meta = dict(meta or {})

    def run(self, rollout_ids: Iterable[int]) -> list[Any]:
        """Run these rounds; give what `train` gave for each, None where it was not called."""
        with self._engines():
            return [self.round(rollout_id) for rollout_id in rollout_ids]

    def round(self, rollout_id: int) -> Any:
        """Run one round; with a supervisor to be made, only `run` can. What `train` gave."""
        samples = self._replayed(rollout_id) if self.mode == "train-only" else self.collect(rollout_id)
        if self.mode == "rollout-only":
            return None
        result = self._train(rollout_id, samples)
        if self._version_of is not None and self.mode == "normal":
            self._version = self._version_of(rollout_id)
            if self._supervisor is not None:
                self._supervisor.set_version(self._version)
        return result

    def collect(self, rollout_id: int, generate: Generate | None = None, *, evaluation: bool = False) -> list[Any]:
        """Collect a round without training on it, such as an evaluation with another `generate`; it is saved as well.

        Train-only it collects nothing.
        """
        if self.mode == "train-only":
            return []
        with ExitStack() as stack:
            if self._supervisor is not None:
                stack.enter_context(self._supervisor.round(rollout_id))
            writer = self._writer(stack, rollout_id, evaluation=evaluation)
            try:
                return _all((generate or self._generate)(rollout_id), writer)
            finally:
                if writer is not None:
                    writer.engines = self._records()

    @contextmanager
    def _engines(self) -> Iterator[None]:
        if self._make_supervisor is None or self.mode == "train-only":
            yield
            return
        with self._make_supervisor() as self._supervisor:
            try:
                yield
            finally:
                self._supervisor = None

    def _writer(self, stack: ExitStack, rollout_id: int, *, evaluation: bool = False) -> RoundWriter | None:
        if self._save is None:
            return None
        round_ = self._save.round(
            rollout_id,
            evaluation=evaluation,
            meta=self._meta,
            version=self._version,
            engines=self._records(),
        )
        return stack.enter_context(round_)

    def _records(self) -> dict[str, EngineRecord]:
        engines = self._supervisor.engines() if self._supervisor is not None else []
        return {each.name: EngineRecord(each.incarnation, each.version) for each in engines}

    def _replayed(self, rollout_id: int) -> list[Any]:
        if self._load is None:
            return []
        loaded = self._load.load(rollout_id, trust=self._trust)
        others = [
            name for name, value in self._meta.items() if name in loaded.meta and _differ(value, loaded.meta[name])
        ]
        for name in others:
            logger.warning(
                "%s: saved with %s=%r, and this is %r", loaded.path, name, loaded.meta[name], self._meta[name]
            )
        if self._subsample is not None:
            loaded = loaded.subsample(self._subsample, self._seed)
        logger.info("round %d: %d samples of %s", rollout_id, len(loaded.samples), loaded.path)
        with ExitStack() as stack:
            writer = self._writer(stack, rollout_id)
            if writer is not None:
                writer.extend(loaded.samples)
        return loaded.samples


def _dump(template: str | None, *, allow_overwrite: bool) -> RolloutDump | None:
    return None if template is None else RolloutDump(template, allow_overwrite=allow_overwrite)


def _differ(one: Any, other: Any) -> bool:
    # As bytes: what was read has lists where there were tuples.
    return msgspec.msgpack.encode(one) != msgspec.msgpack.encode(other)


def _all(samples: Samples | Awaitable[Samples], writer: RoundWriter | None) -> list[Any]:
    """Take the samples as they come."""
    taken: list[Any] = []

    def take(sample: Any) -> None:
        if writer is not None:
            writer.append(sample)
        taken.append(sample)

    async def take_all() -> None:
        come = await samples if isinstance(samples, Awaitable) else samples
        if isinstance(come, AsyncIterable):
            async for sample in come:
                take(sample)
        else:
            for sample in come:
                take(sample)

    if isinstance(samples, Awaitable | AsyncIterable):
        asyncio.run(take_all())
    else:
        for sample in samples:
            take(sample)
    return taken
