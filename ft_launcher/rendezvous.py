"""Where the workers of a round meet: torch's rendezvous, with a fresh store for the workers in every round.

Torch keeps one store for all rounds of a job, in which the workers of a restart read the addresses that their dead
predecessors wrote; most restarts of a gloo job fail for that. Here each round has a store of its own, on a socket
that the launcher has bound, so that no port is guessed and lost to somebody else.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

__all__ = ["FreshStoreRendezvous", "LoneNodeRendezvous", "open_rendezvous"]

LOOPBACK = "127.0.0.1"


def open_rendezvous(parameters: RendezvousParameters) -> RendezvousHandler:
    """Give the handler for `parameters`: of one node on its own, or torch's for several nodes."""
    host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=0)
    if parameters.max_nodes == 1 and (parameters.backend == "static" or (parameters.backend == "c10d" and port == 0)):
        host = parameters.local_addr or (host if parameters.backend == "static" else LOOPBACK)
        return LoneNodeRendezvous(parameters.run_id, parameters.backend, host, port)
    fixed_host = host if parameters.backend == "static" else parameters.local_addr
    return FreshStoreRendezvous(get_rendezvous_handler(parameters), fixed_host)


class _WorkerStore:
    """The store in which the workers of one round find each other."""

    def __init__(self, host: str, listener: socket.socket) -> None:
        # A copy of the descriptor, which the store closes with itself.
        self.server = TCPStore(
            host,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
        )
        self.port: int = self.server.port


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


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


class LoneNodeRendezvous(RendezvousHandler):
    """The rendezvous of a node that is alone: nobody to wait for, so only the workers' store is left of it."""

    def __init__(self, run_id: str, backend: str, host: str, port: int) -> None:
        """`port` 0: another free one in each round. Raises OSError when a given one is taken."""
        self._run_id = run_id
        self._backend = backend
        self._host = host
        self._listener = _listen(host, port) if port else None
        self._store: _WorkerStore | None = None
        self._is_closed = False

    def get_backend(self) -> str:
        """Give the name of the backend that was asked for."""
        return self._backend

    @property
    def use_agent_store(self) -> bool:
        """The workers connect to the store that this handler opened."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Give rank 0 of 1, and a fresh store."""
        self._store = None  # the old one lets go of a given port first
        if self._listener is not None:
            self._store = _WorkerStore(self._host, self._listener)
        else:
            with _listen(self._host, 0) as listener:
                self._store = _WorkerStore(self._host, listener)
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(self._host, self._store.port))

    def is_closed(self) -> bool:
        """Say whether `set_closed` was called."""
        return self._is_closed

    def set_closed(self) -> None:
        """Remember that the job is over."""
        self._is_closed = True

    def num_nodes_waiting(self) -> int:
        """Nobody else can come."""
        return 0

    def get_run_id(self) -> str:
        """Give the id of the run."""
        return self._run_id

    def shutdown(self) -> bool:
        """Close the store."""
        self._is_closed = True
        self._store = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        return True


class FreshStoreRendezvous(RendezvousHandler):
    """Another handler, with a fresh store for the workers in each round, hosted by the node of rank 0."""

    def __init__(self, inner: RendezvousHandler, host: str | None) -> None:
        """`host`: the address under which this node offers its store; None: its fully qualified name."""
        self._inner = inner
        self._host = host
        self._round = 0
        self._store: _WorkerStore | None = None

    def get_backend(self) -> str:
        """Give the inner handler's."""
        return self._inner.get_backend()

    @property
    def use_agent_store(self) -> bool:
        """The workers connect to the store that this handler opened."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other nodes; then rank 0 opens a store for the workers and tells the others where."""
        with _no_shared_store():
            info = self._inner.next_rendezvous()
        self._round += 1
        self._store = None
        port = 0
        if info.rank == 0:
            with _listen("", 0) as listener:
                self._store = _WorkerStore(LOOPBACK, listener)
            port = self._store.port
        meeting_place: Store = PrefixStore(f"ft_launcher/{self._round}", info.store)
        where = RendezvousStoreInfo.build(info.rank, meeting_place, self._host, server_port=port)
        return RendezvousInfo(info.store, info.rank, info.world_size, where)

    def is_closed(self) -> bool:
        """Give the inner handler's."""
        return bool(self._inner.is_closed())

    def set_closed(self) -> None:
        """Close the inner handler."""
        self._inner.set_closed()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def num_nodes_waiting(self) -> int:
        """Give the inner handler's."""
        return self._inner.num_nodes_waiting()

    def get_run_id(self) -> str:
        """Give the inner handler's."""
        return self._inner.get_run_id()

    def shutdown(self) -> Any:
        """Shut the inner handler down, and close the store."""
        self._store = None
        return self._inner.shutdown()
