"""The store in which the workers of one round find each other: a fresh one each time, on a socket bound beforehand.

Torch keeps one store for all rounds of a job, in which the workers of a restart read the addresses that their dead
predecessors wrote; most restarts of a gloo job fail for that.
"""

import os
import socket

from torch._C._distributed_c10d import TCPStore

__all__ = ["WorkerStore"]


class WorkerStore:
    """A store that serves as long as this object lives."""

    def __init__(self, host: str, listener: socket.socket) -> None:
        """`host`: an address at which `listener` listens."""
        # A copy of the descriptor, which the store closes with itself.
        self.server = TCPStore(
            host,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
        )
        self.port: int = self.server.port
