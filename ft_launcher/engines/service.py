"""Offers one supervisor to other processes of this user: a thread for each connection to a Unix socket."""

import fcntl
import logging
import os
import queue
import shutil
import socket
import subprocess
import threading
from collections.abc import Mapping
from concurrent import futures
from contextlib import ExitStack, suppress

from msgspec import Struct

from ft_launcher.engines import wire
from ft_launcher.engines.errors import EngineError
from ft_launcher.engines.file import ServiceSettings
from ft_launcher.engines.metrics import EngineMetrics
from ft_launcher.engines.supervisor import Engine, EngineSupervisor
from ft_launcher.errors import FtLauncherError
from ft_launcher.run_dir import RunDir, find_sockets

__all__ = ["EngineService"]

logger = logging.getLogger(__name__)


class _Wanted(Struct):
    """A refresh that somebody is to do."""

    engine: Engine
    version: str
    result: "futures.Future[str]"


class EngineService:
    """The engines of a file, from `__enter__` to `__exit__`. `socket_path`: where the others find it."""

    def __init__(self, settings: ServiceSettings, environ: Mapping[str, str]) -> None:
        """Raises UsageError for settings that cannot be meant."""
        self._settings = settings
        self._wanted: queue.SimpleQueue[_Wanted] = queue.SimpleQueue()
        self.metrics = EngineMetrics(spec.name for spec in settings.engines)
        self.supervisor = EngineSupervisor(
            settings.config,
            settings.engines,
            probe=settings.probes,
            refresh=self._refresh,
            router=settings.routers,
            observer=self.metrics,
            log_dir=settings.log_dir,
        )
        self._environ = environ
        self._version: str | None = None
        self._open = ExitStack()
        self._connections: set[socket.socket] = set()
        self.socket_path = ""

    def __enter__(self) -> "EngineService":
        with ExitStack() as opening:
            _sweep(self._environ)
            run_dir = RunDir(self._environ)
            opening.callback(run_dir.remove)
            # Whoever finds it can tell a living service from one that was killed.
            lock = os.open(run_dir.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opening.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._settings.metrics_port is not None:
                port = self.metrics.serve(self._settings.metrics_port)
                opening.callback(self.metrics.close)
                logger.info("metrics are at http://127.0.0.1:%d/metrics", port)
            listener = run_dir.listen(wire.SOCKET_NAME)
            opening.callback(listener.close)
            self.socket_path = run_dir.socket_path(wire.SOCKET_NAME)
            opening.enter_context(self.supervisor)
            threading.Thread(target=self._accept, args=(listener,), name="ft_engines_accept", daemon=True).start()
            opening.callback(self._part)
            opening.callback(listener.shutdown, socket.SHUT_RDWR)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the service ends
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._attend, args=(connection,), name="ft_engines_call", daemon=True).start()

    def _part(self) -> None:
        """Let go of all callers: what they hold ends."""
        for connection in list(self._connections):
            with suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RD)

    def _attend(self, connection: socket.socket) -> None:
        """Do what a caller asks, until it closes the connection."""
        with connection:
            self._connections.add(connection)
            try:
                while (call := wire.receive(connection, wire.CALLS)) is not None:
                    try:
                        self._do(connection, call)
                    except (FtLauncherError, KeyError) as error:
                        text = str(error.args[0]) if error.args else type(error).__name__
                        wire.send(connection, wire.Failed(type(error).__name__, text[:10000]))
            except (EngineError, OSError) as error:
                # It is gone, or nobody that we know.
                logger.debug("a caller of the engine service: %s", error)
            finally:
                self._connections.discard(connection)

    def _do(self, connection: socket.socket, call: wire.Call) -> None:
        supervisor = self.supervisor
        match call:
            case wire.Look(protocol):
                if protocol != wire.PROTOCOL:
                    raise EngineError(f"the caller speaks protocol {protocol}, this service {wire.PROTOCOL}")
                self._show(connection, supervisor.engines())
            case wire.Serving():
                self._show(connection, supervisor.serving())
            case wire.WaitServing(count):
                self._show(connection, supervisor.wait_serving(count))
            case wire.SetVersion(version):
                self._version = version
                supervisor.set_version(version)
                wire.send(connection, wire.Done())
            case wire.Restart(name):
                supervisor.request_restart(name)
                wire.send(connection, wire.Done())
            case wire.Round(number):
                with supervisor.round(number) as engines:
                    self._show(connection, engines)
                    is_told = _is_told(connection)
                if is_told:
                    wire.send(connection, wire.Done())
            case wire.Pause(reason):
                with supervisor.paused(reason):
                    wire.send(connection, wire.Done())
                    is_told = _is_told(connection)
                if is_told:
                    wire.send(connection, wire.Done())
            case wire.Refreshes():
                wire.send(connection, wire.Done())
                self._have_refreshed(connection)
            case wire.Done() | wire.Refreshed():
                raise EngineError("nothing of the kind is under way")

    def _show(self, connection: socket.socket, engines: list[Engine]) -> None:
        wire.send(connection, wire.Seen(engines, self._settings.path, os.getpid(), self._version))

    # -- weights --------------------------------------------------------------------------------------------------

    def _refresh(self, engine: Engine, version: str) -> None:
        """What the supervisor calls, in a thread of its own for each engine."""
        seconds = self._settings.config.refresh_timeout
        if self._settings.refresh:
            _run(self._settings.refresh, engine, version, seconds)
            return
        wanted = _Wanted(engine, version, futures.Future())
        self._wanted.put(wanted)
        try:
            problem = wanted.result.result(seconds)
        except futures.TimeoutError:
            wanted.result.cancel()
            raise EngineError(
                f"no trainer has given it its weights within {seconds:g} s (EngineClient.refreshing, or refresh in"
                f" {self._settings.path})"
            ) from None
        if problem:
            raise EngineError(problem)

    def _have_refreshed(self, connection: socket.socket) -> None:
        """Hand refreshes to a trainer, one after the other, as long as it is there."""
        while _is_there(connection):
            try:
                # A trainer that has left must not keep a thread for good.
                wanted = self._wanted.get(timeout=1.0)
            except queue.Empty:
                continue
            if wanted.result.done():
                continue  # it has waited for too long
            try:
                wire.send(connection, wire.Refresh(wanted.engine, wanted.version))
                match wire.receive(connection, wire.REFRESHED):
                    case wire.Refreshed(problem):
                        with suppress(futures.CancelledError):
                            _settle(wanted.result, problem)
                    case None:
                        self._wanted.put(wanted)
            except (OSError, EngineError):
                self._wanted.put(wanted)  # for another one
                raise


def _settle(result: "futures.Future[str]", problem: str) -> None:
    if result.set_running_or_notify_cancel():
        result.set_result(problem)


def _is_told(connection: socket.socket) -> bool:
    """Wait for the caller to say that it is done, or to be gone; whether it has said so."""
    try:
        said = wire.receive(connection, wire.CALLS)
        return isinstance(said, wire.Done)
    except (OSError, EngineError):
        return False


def _is_there(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True


def _run(command: tuple[str, ...], engine: Engine, version: str, seconds: float) -> None:
    """Have a command give an engine its weights. EngineError when it says that it could not."""
    values = {"{url}": engine.url, "{name}": engine.name, "{version}": version}
    words = list(command)
    for name, value in values.items():
        words = [word.replace(name, value) for word in words]
    try:
        subprocess.run(words, check=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        raise EngineError(f"{words[0]} exited with {error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise EngineError(f"{words[0]}: not done within {seconds:g} s") from None
    except OSError as error:
        raise EngineError(f"{words[0]}: {error.strerror}") from None


def _sweep(environ: Mapping[str, str]) -> None:
    """Remove what services have left that were killed with SIGKILL."""
    for path in find_sockets(wire.SOCKET_NAME, environ):
        try:
            held = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # it went away meanwhile
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
        except BlockingIOError:
            continue  # it lives
        finally:
            os.close(held)
