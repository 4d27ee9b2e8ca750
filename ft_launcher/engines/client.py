"""EngineClient: the supervisor's methods for a trainer in another process.

Each call has a connection of its own, so that threads do not wait for each other, and what a process holds (a round, a
pause) ends with it, however it ends.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ft_launcher.engines import wire
from ft_launcher.engines.errors import EngineCapacityError, EngineError
from ft_launcher.engines.supervisor import Engine

__all__ = ["EngineClient"]

_T = TypeVar("_T")
logger = logging.getLogger(__name__)


class EngineClient:
    """Speaks to the service that `ft_engines run` or `ft_launcher --ft-service` has started.

    Every method raises EngineError when there is no such service any more.
    """

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path

    @classmethod
    def from_environment(cls) -> "EngineClient":
        """Make one of the variable FT_ENGINES_SOCKET. EngineError when it is not set."""
        path = os.environ.get(wire.SOCKET_ENV, "")
        if not path:
            raise EngineError(f"{wire.SOCKET_ENV} is not set: start this by ft_engines run or ft_launcher --ft-service")
        return cls(path)

    def engines(self) -> list[Engine]:
        """Give all engines as they are now."""
        return self.look().engines

    def look(self) -> wire.Seen:
        """The same, with what the service says of itself."""
        return self._seen(wire.Look())

    def serving(self) -> list[Engine]:
        """Give those to which requests may be sent now: they answer, with the current weights."""
        return self._seen(wire.Serving()).engines

    def wait_serving(self, count: int | None = None) -> list[Engine]:
        """Wait until so many engines serve (None: `min_serving`). EngineCapacityError when there never will."""
        return self._seen(wire.WaitServing(count)).engines

    def set_version(self, version: str) -> None:
        """Let only engines with these weights serve from now on; the others are refreshed first."""
        self._done(wire.SetVersion(version))

    def request_restart(self, name: str) -> None:
        """Kill an engine and start it again. KeyError for an unknown name."""
        self._done(wire.Restart(name))

    @contextmanager
    def round(self, number: int) -> Iterator[list[Engine]]:
        """Collect a round of samples: as of EngineSupervisor."""
        with self._connected() as connection:
            yield self._ask(connection, wire.Round(number), wire.Seen).engines
            self._ask(connection, wire.Done(), wire.Done)

    @contextmanager
    def paused(self, reason: str) -> Iterator[None]:
        """Neither probe nor kill nor start engines in this block: as of EngineSupervisor."""
        with self._connected() as connection:
            self._ask(connection, wire.Pause(reason), wire.Done)
            yield
            self._ask(connection, wire.Done(), wire.Done)

    @contextmanager
    def refreshing(self, refresh: Callable[[Engine, str], None], *, at_once: int = 4) -> Iterator[None]:
        """Give engines their weights in this block: `refresh(engine, version)` is called in threads of this process.

        It returns when the engine has them, and raises when it cannot have them. `at_once`: how many engines are given
        weights at a time. While no process of the job does this, engines that need weights wait, and do not serve.
        """
        connections = [self._connect() for _ in range(at_once)]
        threads = [
            threading.Thread(target=_refresh_all, args=(each, refresh), name="ft_engines_refresh", daemon=True)
            for each in connections
        ]
        try:
            for connection in connections:
                self._ask(connection, wire.Refreshes(), wire.Done)
            for thread in threads:
                thread.start()
            yield
        finally:
            for connection, thread in zip(connections, threads, strict=True):
                # Who is in the middle of a refresh says so before it ends.
                connection.shutdown(socket.SHUT_RD)
                if thread.ident is not None:
                    thread.join()
                connection.close()

    def _seen(self, call: wire.Call) -> wire.Seen:
        with self._connected() as connection:
            return self._ask(connection, call, wire.Seen)

    def _done(self, call: wire.Call) -> None:
        with self._connected() as connection:
            self._ask(connection, call, wire.Done)

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        connection = self._connect()
        try:
            yield connection
        finally:
            connection.close()

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            connection.connect(self.socket_path)
        except OSError as error:
            connection.close()
            raise EngineError(f"no engine service at {self.socket_path}: {error.strerror or error}") from error
        return connection

    def _ask(self, connection: socket.socket, call: wire.Call, wanted: type[_T]) -> _T:
        try:
            wire.send(connection, call)
            answer = wire.receive(connection, wire.ANSWERS)
        except OSError as error:
            raise EngineError(f"the engine service has ended: {error.strerror or error}") from error
        match answer:
            case wire.Failed("KeyError", text):
                raise KeyError(text)
            case wire.Failed("EngineCapacityError", text):
                raise EngineCapacityError(text)
            case wire.Failed(_, text):
                raise EngineError(text)
            case None:
                raise EngineError("the engine service has ended")
        if not isinstance(answer, wanted):
            raise EngineError(f"the engine service answered {type(answer).__name__}")
        return answer


def _refresh_all(connection: socket.socket, refresh: Callable[[Engine, str], None]) -> None:
    try:
        while (wanted := wire.receive(connection, wire.REFRESHES)) is not None:
            problem = ""
            try:
                refresh(wanted.engine, wanted.version)
            except Exception as error:  # noqa: BLE001 - the user's function
                problem = f"{type(error).__name__}: {error}"
            wire.send(connection, wire.Refreshed(problem[:1000]))
    except (OSError, EngineError) as error:
        logger.warning("the engine service asks for no more refreshes: %s", error)
