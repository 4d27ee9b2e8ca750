"""What the agent asks of a rendezvous beyond torch's interface: what to do now, and a place to say how it fares.

Here is also the job whose leader is in this very process: one node alone, or one of torch's other rendezvous, which
know of no leader.
"""

import logging
import os
import time
import uuid
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import msgspec
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.elastic.rendezvous.api import (
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from ft_launcher.addresses import LOOPBACK, listen
from ft_launcher.causes import Cause
from ft_launcher.formation import Settings
from ft_launcher.ladder import HINT_ENV, Attempt, hint_of
from ft_launcher.policy import NodeState
from ft_launcher.records import (
    Assigned,
    End,
    Event,
    Held,
    Joined,
    Leave,
    Left,
    Message,
    Node,
    Noticed,
    Prepare,
    Ready,
    Reported,
    Requested,
    SaveAt,
    Saved,
    Stop,
    Waiting,
)
from ft_launcher.rounds import Job
from ft_launcher.worker_store import WorkerStore

__all__ = ["BOUNDED_RESOLVER", "Directive", "ForeignRendezvous", "JobRendezvous", "LoneNodeRendezvous", "seconds_until"]

logger = logging.getLogger(__name__)

BOUNDED_RESOLVER = "timeout:1 attempts:1"
"""The C library's options for the launcher of several nodes, unless the user has chosen; not for its workers."""

Directive: TypeAlias = Stop | Leave | End


class JobRendezvous(RendezvousHandler):
    """A rendezvous whose node has a leader. The agent reports to it, and does what `directive` says."""

    def __init__(self, run_id: str, backend: str) -> None:
        self._run_id = run_id
        self._backend = backend
        self._is_closed = False
        self._directive: Directive | None = None
        self.assigned: Assigned | None = None
        self.prepare: Prepare | None = None
        """The notice that the ranks of this round are to heed."""
        self.save_at: SaveAt | None = None
        """And where they are to save for it."""
        self.attempt: Attempt | None = None
        """What the ranks of the last round have said about checkpoints: told with the next Ready."""
        self.on_lease: Callable[[float], None] = lambda _: None
        """Called, from any thread, with the instant up to which the workers may go on."""

    # -- for the agent --------------------------------------------------------------------------------------------

    numbers_ranks = True
    """`assigned` says which ranks the workers of this node have."""

    @property
    def fileno(self) -> int | None:
        """A descriptor that is readable when `directive` may have changed; None: it changes only by what one does."""
        return None

    @property
    def may_leave(self) -> bool:
        """Nobody needs this launcher once its own workers have ended."""
        return True

    @abstractmethod
    def directive(self) -> Directive | None:
        """Give what this node has to do; None: to go on."""

    @abstractmethod
    def report(self, state: NodeState, cause: Cause | None = None, rank: int | None = None) -> None:
        """Say that all workers have ended, or that global rank `rank` failed, and why."""

    @abstractmethod
    def request(self, cause: Cause) -> None:
        """Ask for the end of the job (ShutDown), or for that of this node's part in it (anything else)."""

    @abstractmethod
    def notice(self, what: str, until: float | None) -> None:
        """Say that a notice of preemption came to this node, and when that will happen (`time.monotonic()`)."""

    @abstractmethod
    def hold(self, round_: int, notice: int, step: int) -> None:
        """Say that the ranks know of the notice, and the latest step that one of them has asked about; -1: none."""

    @abstractmethod
    def saved(self, round_: int, notice: int, step: int) -> None:
        """Say that the ranks have done with the notice, and at which step they were told to save; -1: none was."""

    def stay(self) -> None:
        """Stay as long as others need this node."""

    def leave(self, reason: str) -> None:
        """Say goodbye: this launcher ends now."""

    def worker_environment(self) -> dict[str, str]:
        """Give what workers shall know beside torch's variables, and forget of the launcher's."""
        assigned = self.assigned
        environment = {"RES_OPTIONS": ""} if os.environ.get("RES_OPTIONS") == BOUNDED_RESOLVER else {}
        if assigned is not None:
            hint = hint_of(assigned.memory.ladder)
            environment |= {
                "FT_CYCLE": str(assigned.memory.round),
                "FT_RESTART_COUNT_GLOBAL": str(assigned.memory.restarts),
                "FT_RESTART_REASON": str(assigned.reason),
                "FT_PREV_WORLD_SIZE": str(assigned.prev_world_size),
            }
            if hint is not None:
                environment[HINT_ENV] = msgspec.json.encode(hint).decode()
            elif HINT_ENV in os.environ:
                environment[HINT_ENV] = ""  # of a job around this one
        return environment

    # -- torch's interface ----------------------------------------------------------------------------------------

    def get_backend(self) -> str:
        """Give the name of the backend that was asked for."""
        return self._backend

    @property
    def use_agent_store(self) -> bool:
        """The workers connect to the store that a launcher opened."""
        return True

    def is_closed(self) -> bool:
        """Say whether `set_closed` was called."""
        return self._is_closed

    def set_closed(self) -> None:
        """Remember that the job is over."""
        self._is_closed = True

    def num_nodes_waiting(self) -> int:
        """Torch restarts the workers when this is not 0."""
        return int(isinstance(self.directive(), Stop))

    def get_run_id(self) -> str:
        """Give the id of the run."""
        return self._run_id

    def shutdown(self) -> bool:
        """Close what is open."""
        self._is_closed = True
        return True


class _OwnLeader(JobRendezvous):
    """The leader is a plain object: what it says is there at once."""

    def __init__(self, run_id: str, backend: str, node: Node, settings: Settings) -> None:
        super().__init__(run_id, backend)
        self._node = node
        self._job = Job(settings, node, time.monotonic())
        self._mail: deque[Message] = deque()
        self._tell(Joined(node))

    def _tell(self, event: Event) -> None:
        now = time.monotonic()
        self._job.apply(event, now)
        mail = self._job.decide(now)
        for warning in self._job.warnings:
            logger.warning(warning)
        self._job.warnings.clear()
        for _, message in mail:
            match message:
                case Assigned():
                    self.assigned, self._directive = message, None
                    self.prepare = self.save_at = self.attempt = None
                case Waiting():
                    pass
                case Prepare():
                    self.prepare, self.save_at = message, None
                case SaveAt():
                    self.save_at = message
                case End(cause):
                    self._directive = End(cause)  # from nowhere else than here
                case _:
                    self._directive = message

    def _become_ready(self, store_port: int) -> Assigned:
        self._tell(Ready(self._node.id, store_port, self.attempt))
        if self._directive is not None or self.assigned is None:
            raise RendezvousGracefulExitError("the job is over")
        return self.assigned

    def directive(self) -> Directive | None:
        """Give what this node has to do."""
        return self._directive

    def report(self, state: NodeState, cause: Cause | None = None, rank: int | None = None) -> None:
        """Say that all workers have ended, or that a rank failed."""
        self._tell(Reported(self._node.id, self._job.memory.round, state, cause, rank))

    def request(self, cause: Cause) -> None:
        """Ask for the end."""
        self._tell(Requested(self._node.id, self._job.memory.round, cause))

    def notice(self, what: str, until: float | None) -> None:
        """Say that a notice came."""
        self._tell(Noticed(self._node.id, what, seconds_until(until)))

    def hold(self, round_: int, notice: int, step: int) -> None:
        """Say how far the ranks are."""
        self._tell(Held(self._node.id, round_, notice, step))

    def saved(self, round_: int, notice: int, step: int) -> None:
        """Say that the ranks have done with the notice."""
        self._tell(Saved(self._node.id, round_, notice, step))

    def leave(self, reason: str) -> None:
        """Nobody else need know."""
        self._tell(Left(self._node.id, reason))


class LoneNodeRendezvous(_OwnLeader):
    """The rendezvous of a node that is alone: nobody to wait for, so only the workers' store is left of it."""

    def __init__(self, run_id: str, backend: str, node: Node, settings: Settings, host: str, port: int) -> None:
        """`port` 0: another free one in each round. Raises OSError when a given one is taken."""
        super().__init__(run_id, backend, node, settings)
        self._host = host
        self._listener = listen(host, port) if port else None
        self._store: WorkerStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Give rank 0 of 1, and a fresh store."""
        self._store = None  # the old one lets go of a given port first
        self._become_ready(0)
        if self._listener is not None:
            self._store = WorkerStore(self._host, self._listener)
        else:
            with listen(self._host, 0) as listener:
                self._store = WorkerStore(self._host, listener)
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(self._host, self._store.port))

    def shutdown(self) -> bool:
        """Close the store."""
        self._store = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        return super().shutdown()


class ForeignRendezvous(_OwnLeader):
    """Another handler of torch's (etcd, a plug-in), with a fresh store for the workers in each round.

    It knows its own way of membership, and the budget of restarts is this node's, as in torchrun. So is what is known
    of checkpoints: the ranks of other nodes may be told something else.
    """

    numbers_ranks = False

    def __init__(self, inner: RendezvousHandler, node: Node, settings: Settings, host: str | None) -> None:
        """`host`: the address under which this node offers its store; None: its fully qualified name."""
        super().__init__(inner.get_run_id(), inner.get_backend(), node, settings)
        self._inner = inner
        self._host = host
        self._round = 0
        self._store: WorkerStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other nodes; then rank 0 opens a store for the workers and tells the others where."""
        self._become_ready(0)
        with _no_shared_store():
            info = self._inner.next_rendezvous()
        self._round += 1
        self._store = None
        port = 0
        if info.rank == 0:
            with listen("", 0) as listener:
                self._store = WorkerStore(LOOPBACK, listener)
            port = self._store.port
        meeting_place: Store = PrefixStore(f"ft_launcher/{self._round}", info.store)
        where = RendezvousStoreInfo.build(info.rank, meeting_place, self._host, server_port=port)
        return RendezvousInfo(info.store, info.rank, info.world_size, where)

    def _become_ready(self, store_port: int) -> Assigned:
        if self._directive is None and self.assigned is not None:
            # A change of membership, of which only the inner handler knows: another round, and not a counted restart.
            self._tell(Left(self._node.id))
            self._node = msgspec.structs.replace(self._node, id=uuid.uuid4().hex)
            self._tell(Joined(self._node))
        return super()._become_ready(store_port)

    def is_closed(self) -> bool:
        """Give the inner handler's."""
        return bool(self._inner.is_closed())

    def set_closed(self) -> None:
        """Close the inner handler."""
        self._inner.set_closed()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def num_nodes_waiting(self) -> int:
        """Give the inner handler's."""
        return super().num_nodes_waiting() or self._inner.num_nodes_waiting()

    def shutdown(self) -> Any:
        """Shut the inner handler down, and close the store."""
        self._store = None
        return self._inner.shutdown()


def seconds_until(until: float | None) -> float | None:
    """Give the seconds that are left, for others: each machine has a monotonic clock of its own."""
    return None if until is None else max(0.0, until - time.monotonic())


@contextmanager
def _no_shared_store() -> Iterator[None]:
    """Keep torch's handler from opening a store for the workers too; they shall not inherit what tells it so."""
    name = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    given = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if given is not None:
            os.environ[name] = given
