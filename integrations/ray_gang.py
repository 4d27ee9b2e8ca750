"""A group of Ray actors that work in collectives: one fails, and all start anew, restored, in a new rendezvous.

    gang = ActorGang(Trainer, 4, setup=torch_process_group("nccl"), restore=load_latest, bundle={"GPU": 1})
    gang.run(lambda step: gang.call("train", step), stop=1000)

A new process in the place of one member would wait for peers that wait for its predecessor: nothing less helps.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any

import ray
from msgspec import Struct
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ft_launcher.errors import UsageError
from ft_launcher.integrations.ray_config import RayFaultToleranceConfig
from ft_launcher.integrations.ray_incarnation import End, Incarnation, Observer
from ft_launcher.integrations.ray_member import Address, Hello
from ft_launcher.integrations.ray_metrics import ActorMetrics
from ft_launcher.integrations.ray_policy import Limits
from ft_launcher.integrations.ray_supervised import Supervised

__all__ = ["ActorGang", "GangRestartedError", "Rendezvous", "torch_process_group"]

logger = logging.getLogger(__name__)

Setup = Callable[[Any, "Rendezvous"], Any]
Restore = Callable[[Any], int | None]

SETTLE_SECONDS = 0.5
"""How long a member's exception waits for the death of another, of which it may be but the echo."""


class Rendezvous(Struct, frozen=True):
    """Where a member meets the others; in its environment as MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE, too."""

    master_addr: str
    master_port: int
    """Free on the machine of rank 0 when it was chosen; another one after each restart."""
    rank: int
    world_size: int
    restart: int

    def environment(self) -> dict[str, str]:
        """Give it as torch reads it."""
        return {
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
        }


class GangRestartedError(RayActorError):
    """The gang was lost and is there again: go on from `step`, which its `restore` returned (0 without one)."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(error_msg=f"{reason}; the gang has started anew, at step {step}")
        self.step = step


def torch_process_group(backend: str = "gloo", timeout: float | None = None) -> Setup:
    """Give a `setup` that joins torch's default process group; `timeout` of its collectives in seconds."""
    return partial(_join, backend, timeout)


def _join(backend: str, timeout: float | None, _instance: Any, _rendezvous: Rendezvous) -> None:
    import torch.distributed as dist

    dist.init_process_group(backend, timeout=None if timeout is None else timedelta(seconds=timeout))


def _begin(setup: Setup | None, restore: Restore | None, instance: Any, rendezvous: Rendezvous) -> int:
    if setup is not None:
        setup(instance, rendezvous)
    return (restore(instance) if restore is not None else None) or 0


class _Sent:
    """A call of all members."""

    def __init__(self, method: str, size: int) -> None:
        self.method = method
        self.results: dict[int, Any] = {}
        self.size = size
        self.answer: Future[list[Any]] = Future()
        self.answer.set_running_or_notify_cancel()


class ActorGang(Supervised[int]):
    """All members of one group, over all its restarts. Its methods may be used from any thread."""

    def __init__(
        self,
        cls: type,
        size: int,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        role: str | None = None,
        config: RayFaultToleranceConfig | None = None,
        setup: Setup | None = None,
        restore: Restore | None = None,
        bundle: Mapping[str, float] | None = None,
        strategy: str = "PACK",
        options: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        metrics: ActorMetrics | None = None,
    ) -> None:
        """Create it; `ready` waits until it is there.

        `setup(instance, rendezvous)` runs in all members side by side, then `restore(instance)`, which returns the step
        to go on from, the same in all. `bundle`: the resources of one member; there is a placement group of them with
        this `strategy`, which the gang keeps over its restarts, so that each rank stays where it was. `options`: of
        ray.remote, beside. `max_restarts` of `config` counts restarts of the gang. `limits`: when a member is taken for
        hung. Raises UsageError.
        """
        if size < 1:
            raise UsageError(f"size={size}: must be 1 or more")
        bundle = {"CPU": 1.0} if bundle is None else dict(bundle)
        super().__init__(cls, {**_options_for(bundle), **(options or {})}, role, config, limits, metrics)
        self.size = size
        self._args, self._kwargs = args, dict(kwargs or {})
        self._begin = partial(_begin, setup, restore)
        self._bundle, self._strategy = bundle, strategy
        self._group: PlacementGroup | None = None
        self._members: list[Incarnation] = []
        self._addresses: dict[int, Address] = {}
        self._steps: dict[int, int] = {}
        self._waiting: list[tuple[_Sent, tuple[Any, ...], Mapping[str, Any]]] = []
        self._in_flight: list[_Sent] = []
        self._untold: list[_Sent] = []
        self._lost: str | None = None  # why, as long as nobody has been told
        self._loop.post(self._start)

    # -- for any thread -------------------------------------------------------------------------------------------

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of all members, and wait: their results in the order of ranks. As `submit`."""
        return self.submit(method, *args, **kwargs).result()

    def submit(self, method: str, *args: Any, **kwargs: Any) -> "Future[list[Any]]":
        """Call a method of all members. Raises AttributeError where they have none of that name.

        Nothing is sent twice: where the gang was lost, under the call or since the last one, the future raises
        GangRestartedError as soon as it is there again; when its restarts are used up, RestartsExhaustedError.
        """
        getattr(self._class, method)
        sent = _Sent(method, self.size)
        self._loop.post(lambda: self._enqueue(sent, args, kwargs))
        return sent.answer

    def run(self, do: Callable[[int], Any], stop: int) -> None:
        """Do `do(step)` for each step up to `stop`, again from where the gang was restored when it starts anew."""
        step = self.ready()
        while step < stop:
            try:
                do(step)
                step += 1
            except GangRestartedError as restarted:
                step = restarted.step

    def check(self) -> "Future[bool]":
        """Ask all members now how they are. The future is True when all are initialised and have answered."""
        answer: Future[bool] = Future()

        def look() -> None:
            members, left = list(self._members), [self.size]

            def answered() -> None:
                left[0] -= 1
                if not left[0]:
                    answer.set_result(members == self._members and self.is_healthy)

            if self._ended is not None or len(members) < self.size:
                answer.set_result(False)
            else:
                for member in members:
                    member.ping(answered)

        self._loop.post(look)
        return answer

    @property
    def is_healthy(self) -> bool:
        """All members are initialised, and answered the last ping."""
        members = self._members
        return bool(members) and all(each.end is None and each.vitals.is_healthy for each in members)

    @property
    def pids(self) -> list[int | None]:
        """Of the present processes, by rank; None for one that is not initialised."""
        return [None if each.hello is None else each.hello.pid for each in self._members]

    # -- in the loop ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._addresses, self._steps = {}, {}
        try:
            if self._group is None:
                self._group = placement_group([self._bundle] * self.size, strategy=self._strategy)
            places = [PlacementGroupSchedulingStrategy(self._group, rank) for rank in range(self.size)]
            handles = [self._blueprint.make(self._args, self._kwargs, scheduling_strategy=place) for place in places]
        except Exception as error:  # noqa: BLE001  # Ray refuses options in many ways
            self._give_up(error)
            return
        observer = Observer(self._on_ready, self._on_end)
        self._members = [Incarnation(each, self._blueprint, self._loop, self._limits, observer) for each in handles]
        for rank, member in enumerate(self._members):
            member.locate(partial(self._on_address, member, rank))

    def _on_address(self, member: Incarnation, rank: int, address: Address) -> None:
        if self._members[rank] is not member:
            return
        self._addresses[rank] = address
        if len(self._addresses) < self.size:
            return
        first = self._addresses[0]
        for rank, member in enumerate(self._members):
            rendezvous = Rendezvous(first.host, first.free_port, rank, self.size, self._budget.used)
            member.initialise(self._begin, rendezvous.environment(), rendezvous)

    def _on_ready(self, member: Incarnation, hello: Hello) -> None:
        self._steps[self._members.index(member)] = hello.result
        if len(self._steps) < self.size:
            return
        steps = sorted(set(self._steps.values()))
        if len(steps) > 1:
            apart = ", ".join(f"rank {rank} at {step}" for rank, step in sorted(self._steps.items()))
            self._lose(f"{self.role}: its members were restored at different steps: {apart}", None)
            return
        step = steps[0]
        if self._budget.used:
            logger.info("%s: there again, at step %d", self.role, step)
        if not self._ready.done():
            self._ready.set_result(step)
            self._lost = None  # `ready` tells where it is
        if self._lost is not None and self._untold:
            untold, self._untold = self._untold, []
            for sent in untold:
                sent.answer.set_exception(GangRestartedError(step, self._lost))
            self._lost = None
        self._send()

    def _on_end(self, member: Incarnation, end: End) -> None:
        if member in self._members and self._ended is None:
            rank = self._members.index(member)
            where = "not initialised yet" if member.hello is None else f"pid {member.hello.pid}"
            never_ran = end.raised and not self._ready.done()
            final = end.error if end.is_final or never_ran else None
            self._lose(f"{self.role}: rank {rank} ({where}): {end.reason}", end.error, final)

    def _lose(self, what: str, cause: Exception | None, final: Exception | None = None) -> None:
        """Start all members anew, or give up: for `final`, or because the restarts are used up."""
        members, self._members = self._members, []
        for member in members:
            member.kill("a member of its gang is lost")
        self._untold += self._in_flight
        self._in_flight = []
        self._lost = what
        self._was_lost(what, cause, final, whole=f" of all {self.size} ranks")

    def _fail_calls(self, error: Exception) -> None:
        for sent in (*self._in_flight, *self._untold, *(each[0] for each in self._waiting)):
            sent.answer.set_exception(error)
        self._in_flight, self._untold, self._waiting = [], [], []

    def _enqueue(self, sent: _Sent, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._ended is not None:
            sent.answer.set_exception(self._ended)
            return
        self._waiting.append((sent, args, kwargs))
        self._send()

    def _send(self) -> None:
        if not self._is_set_up():
            return
        waiting, self._waiting = self._waiting, []
        for sent, args, kwargs in waiting:
            if self._lost is not None:
                sent.answer.set_exception(GangRestartedError(self._steps[0], self._lost))
                self._lost = None
                continue
            self._in_flight.append(sent)
            try:
                for rank, member in enumerate(self._members):
                    member.call(sent.method, args, kwargs, partial(self._on_answer, member, rank, sent))
            except Exception as error:  # noqa: BLE001  # an argument that cannot be pickled
                self._in_flight.remove(sent)
                sent.answer.set_exception(error)

    def _is_set_up(self) -> bool:
        return len(self._steps) == self.size and len(self._members) == self.size

    def _on_answer(self, member: Incarnation, rank: int, sent: _Sent, result: Any, error: Exception | None) -> None:
        if member not in self._members or sent not in self._in_flight:
            return
        if isinstance(error, RayActorError):
            member.ended_by(error)
        elif error is not None:
            what = f"{self.role}: rank {rank}: {sent.method!r} raised {str(error).strip().rpartition(chr(10))[2]}"
            self._loop.later(SETTLE_SECONDS, lambda: self._lose(what, error) if member in self._members else None)
        else:
            sent.results[rank] = result
            if len(sent.results) == self.size:
                self._in_flight.remove(sent)
                sent.answer.set_result([sent.results[rank] for rank in range(self.size)])

    def _kill(self) -> None:
        members, self._members = self._members, []
        for member in members:
            member.kill("closed")
        if self._group is not None and ray.is_initialized():
            remove_placement_group(self._group)
            self._group = None


def _options_for(bundle: Mapping[str, float]) -> dict[str, Any]:
    """Give the options with which an actor takes all of its bundle."""
    more = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU", "memory")}
    options: dict[str, Any] = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "resources": more}
    return options | ({"memory": bundle["memory"]} if "memory" in bundle else {})
