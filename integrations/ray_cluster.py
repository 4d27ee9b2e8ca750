"""Runs a job of ft_launcher on a Ray cluster: one launcher in each bundle of a placement group, lost ones replaced.

    code = run_on_ray(["--nproc-per-node", "8", "train.py"], nnodes="2:3", bundle={"CPU": 32, "GPU": 8})

Ray finds the places, and another one when a node is lost; what the ranks do meanwhile is the rendezvous' affair.
"""

import itertools
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TextIO

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ft_launcher.causes import TooFewNodes, exit_code
from ft_launcher.errors import FtLauncherError, UsageError
from ft_launcher.integrations.ray_cluster_node import Heard, LauncherNode, Prepared
from ft_launcher.integrations.ray_cluster_plan import Action, Create, Finish, Plan, Start, StopAll
from ft_launcher.integrations.ray_cluster_request import Request, read_request

__all__ = ["run_on_ray", "run_request"]

logger = logging.getLogger(__name__)

UNAVAILABLE_SECONDS = 1.0
"""Before an actor that Ray cannot reach, and does not know to be dead, is asked again."""

CONNECT_SECONDS = 5.0
"""For a connection to the cluster's address."""

WARDEN_SECONDS = 10.0
"""What may come on top of a launcher's grace before its actor is killed."""

PATIENCE_SECONDS = 10.0
"""After which a job that waits for its places says for what."""


class NotPlacedError(FtLauncherError):
    """The cluster had no room for the job in time."""


def run_on_ray(
    arguments: Sequence[str],
    *,
    nnodes: str = "1",
    bundle: Mapping[str, float] | None = None,
    strategy: str = "STRICT_SPREAD",
    env: Mapping[str, str] | None = None,
    placement_timeout: float | None = 600.0,
    max_replacements: int = 10,
    address: str = "auto",
    runtime_env: Mapping[str, Any] | None = None,
) -> int:
    """Run a job to its end, and give its exit code.

    `arguments`: of ft_launcher, without those of the rendezvous. `nnodes`: N or MIN:MAX; there are MAX bundles.
    `bundle`: what each node needs of Ray's resources, CPU 1 if nothing is said. `env`: for the launchers and ranks.
    `placement_timeout`: seconds in which there must be room for the bundles; None: any time. `max_replacements`: so
    many launchers are started in place of lost ones. `address`, `runtime_env`: as of ray.init, which is called where
    the process is not connected yet.

    In the main thread, SIGINT, SIGTERM and SIGHUP end the job meanwhile. Raises UsageError, and FtLauncherError with
    its exit_code when the cluster has no room.
    """
    request = read_request(
        arguments,
        nnodes=nnodes,
        bundle={"CPU": 1.0} if bundle is None else bundle,
        strategy=strategy,
        placement_timeout=placement_timeout,
        max_replacements=max_replacements,
        address=address,
    )
    return run_request(request, env=env or {}, runtime_env=runtime_env)


def run_request(request: Request, *, env: Mapping[str, str], runtime_env: Mapping[str, Any] | None) -> int:
    """Run a job that was checked; see run_on_ray."""
    with _connected(request.address, runtime_env):
        driver = _Driver(request, env)
        with _signals(driver.signal):
            return driver.run()


@contextmanager
def _connected(address: str, runtime_env: Mapping[str, Any] | None) -> Iterator[None]:
    if ray.is_initialized():
        if runtime_env is not None:
            raise UsageError("runtime_env: this process is connected to Ray already; give it to ray.init there")
        yield
        return
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            # Ray itself would try for minutes.
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise UsageError(f"--address {address}: no Ray cluster answers there ({_line(error)})") from None
    try:
        # The launchers' output comes by itself, all of it and at once.
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, runtime_env=dict(runtime_env or {}))
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        if runtime_env and not isinstance(error, ConnectionError):
            raise UsageError(f"--runtime-env: {_line(error)}") from None
        hint = "; is one running? Start one with: ray start --head" if address == "auto" else ""
        raise UsageError(f"--address {address}: {_line(error)}{hint}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _signals(take: Callable[[int], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda received, _: take(received)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Launcher:
    """One start of a bundle."""

    def __init__(self, bundle: int, start: int, actor: Any) -> None:
        self.bundle, self.start, self.actor = bundle, start, actor
        self.title = f"launcher {bundle}"
        self.prefix = f"[{bundle}] "


class _Driver:
    """Does what the plan wants, in the thread of `run`; all that happens comes to it as a call in a queue."""

    def __init__(self, request: Request, env: Mapping[str, str]) -> None:
        self._request = request
        self._run_id = f"ray-{ray.get_runtime_context().get_job_id()}-{secrets.token_hex(4)}"
        # What ft_launcher reads (torchrun's PET_ variables too), and the secret of the job's nodes.
        self._environment = {name: value for name, value in os.environ.items() if name.startswith("PET_")}
        if not request.has_token_file:
            self._environment["FT_TOKEN"] = os.environ.get("FT_TOKEN") or secrets.token_hex(16)
        self._environment |= env
        # Where Ray brings the files, each node has them in a directory of its own.
        has_files = "working_dir" in ray.get_runtime_context().runtime_env
        self._folder = None if has_files else str(Path.cwd())
        self._plan = Plan(request.bundles, request.max_replacements)
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._launchers: dict[int, _Launcher] = {}
        self._group: Any = None
        self._code: int | None = None

    def signal(self, number: int) -> None:
        """End the job; may be called by a signal handler."""
        self._events.put(partial(self._signalled, number))

    def run(self) -> int:
        """Run the job; its exit code."""
        request = self._request
        self._group = placement_group([request.bundle] * request.bundles, request.strategy, self._run_id)
        try:
            self._later(PATIENCE_SECONDS, self._say_waiting)
            if request.placement_timeout is not None:
                self._later(request.placement_timeout, self._give_up_placing)
            try:
                self._do(self._plan.begin())
            except ValueError as error:  # Ray takes no 1.5 GPUs, for example
                raise UsageError(f"--bundle: {''.join(map(str, error.args))}") from None
            while self._code is None:
                self._next()
        finally:
            self._clear()
        return self._code

    # -- events ---------------------------------------------------------------------------------------------------

    def _next(self) -> None:
        due = min(self._timers, default=None)
        try:
            event = self._events.get(timeout=None if due is None else max(0.0, due[0] - time.monotonic()))
        except Empty:
            if due is not None:
                self._timers.remove(due)
                due[2]()
            return
        event()

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        self._timers.append((time.monotonic() + seconds, next(self._number), what))

    def _ask(
        self, launcher: _Launcher, ask: Callable[[Any], Any], then: Callable[[_Launcher, Any], None] | None = None
    ) -> None:
        """Call the launcher's actor, and go on with its answer."""

        def answered(future: "Future[Any]") -> None:
            self._events.put(partial(self._answered, launcher, future, ask, then))

        ask(launcher.actor).future().add_done_callback(answered)

    def _answered(
        self,
        launcher: _Launcher,
        future: "Future[Any]",
        ask: Callable[[Any], Any],
        then: Callable[[_Launcher, Any], None] | None,
    ) -> None:
        if not self._plan.is_current(launcher.bundle, launcher.start):
            return
        try:
            answer = future.result()
        except ActorUnavailableError:
            # Perhaps a connection broke, perhaps the node is lost: Ray will know in a while.
            self._later(UNAVAILABLE_SECONDS, partial(self._ask, launcher, ask, then))
            return
        except RayActorError as error:
            if getattr(error, "actor_init_failed", False):
                self._unfit(launcher, _line(error))
                return
            logger.warning("%s was lost: %s", launcher.title, _line(error))
            self._forget(launcher)
            self._do(self._plan.lost(launcher.bundle))
            return
        except RayError as error:
            self._unfit(launcher, _line(error))
            return
        if then is not None:
            then(launcher, answer)

    def _prepared(self, launcher: _Launcher, answer: Prepared) -> None:
        name, address, port, problem = answer
        launcher.title, launcher.prefix = f"launcher {launcher.bundle} on {name}", f"[{launcher.bundle} {name}] "
        if problem:
            self._unfit(launcher, f"{name}: {problem}")
            return
        endpoint = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self._do(self._plan.prepared(launcher.bundle, endpoint))

    def _heard(self, taken: int, launcher: _Launcher, answer: Heard) -> None:
        pieces, code = answer
        for is_error, piece in pieces:
            _write(sys.stderr if is_error else sys.stdout, launcher.prefix, piece)
        if code is None:
            self._hear(launcher, taken + 1)
            return
        logger.info("%s has ended with exit code %d", launcher.title, code)
        self._forget(launcher)
        self._do(self._plan.ended(launcher.bundle, code))

    def _unfit(self, launcher: _Launcher, why: str) -> None:
        """No launcher can be started there, and Ray would not find another place."""
        self._forget(launcher)
        if "No module named 'ft_launcher" in why:
            why += "; install it on all nodes"
        if not self._plan.has_begun:
            raise UsageError(f"bundle {launcher.bundle}: no launcher can be started: {why}")
        logger.error("%s cannot be started: %s", launcher.title, why)
        self._do(self._plan.unfit(launcher.bundle))

    def _signalled(self, number: int) -> None:
        if self._plan.is_stopping:
            logger.warning("received %s as well; not waiting any longer", signal.Signals(number).name)
            self._code = 128 + number
            return
        logger.info("received %s; ending the launchers", signal.Signals(number).name)
        self._do(self._plan.stopped(number))

    # -- actions --------------------------------------------------------------------------------------------------

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Create(bundle, start):
                    self._create(bundle, start)
                case Start(bundle, _, endpoints, joins):
                    self._start(self._launchers[bundle], endpoints, joins=joins)
                case StopAll(after):
                    self._later(after, self._stop_all)
                case Finish(code):
                    self._code = code

    def _create(self, bundle: int, start: int) -> None:
        if start:
            left = self._plan.replacements_left
            logger.info("launcher %d is started again as soon as Ray has a place for it (%d left)", bundle, left)
        resources = dict(self._request.bundle)
        # A start is an actor of its own: of Ray's restarts, which are slower, nobody here would hear.
        actor = ray.remote(LauncherNode).options(
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=4,  # what is heard is waited for while other calls come
            num_cpus=resources.pop("CPU", 0),
            num_gpus=resources.pop("GPU", 0),
            memory=resources.pop("memory", None),
            resources=resources,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
        )
        launcher = _Launcher(bundle, start, actor.remote())
        self._launchers[bundle] = launcher
        self._ask(launcher, lambda actor: actor.prepare.remote(self._folder), self._prepared)

    def _start(self, launcher: _Launcher, endpoints: Sequence[str], *, joins: bool) -> None:
        logger.info("%s starts%s", launcher.title, "; it joins the others" if joins else "")
        arguments = self._request.arguments(self._run_id, endpoints, joins=joins)
        words = (arguments, self._environment, self._folder, self._request.grace)
        self._ask(launcher, lambda actor: actor.start.remote(*words))
        self._hear(launcher, 0)

    def _hear(self, launcher: _Launcher, taken: int) -> None:
        self._ask(launcher, lambda actor: actor.hear.remote(taken), partial(self._heard, taken))

    def _stop_all(self) -> None:
        for bundle, _ in self._plan.running():
            self._ask(self._launchers[bundle], lambda actor: actor.stop.remote())
        self._later(self._request.grace + WARDEN_SECONDS, self._kill_all)

    def _kill_all(self) -> None:
        for bundle, _ in self._plan.running():
            logger.error("%s does not end", self._launchers[bundle].title)
            ray.kill(self._launchers[bundle].actor)

    def _forget(self, launcher: _Launcher) -> None:
        del self._launchers[launcher.bundle]
        with suppress(RayError, ValueError):  # it is dead already
            ray.kill(launcher.actor)

    def _clear(self) -> None:
        for launcher in list(self._launchers.values()):
            self._forget(launcher)
        remove_placement_group(self._group)

    # -- waiting for places ---------------------------------------------------------------------------------------

    def _say_waiting(self) -> None:
        if not self._plan.has_begun and not self._group.wait(0.1):
            logger.info("waiting for room: %s", self._what_is_missing())

    def _give_up_placing(self) -> None:
        if self._plan.has_begun or self._plan.is_stopping or self._group.wait(0.1):
            return
        error = NotPlacedError(
            f"--placement-timeout: no room within {self._request.placement_timeout:g} s: {self._what_is_missing()}"
        )
        error.exit_code = exit_code(TooFewNodes(str(error)), self._request.exit_codes)
        raise error

    def _what_is_missing(self) -> str:
        request = self._request
        # Ray's functions have no types.
        total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
        nodes = len([each for each in ray.nodes() if each["Alive"]])  # type: ignore[no-untyped-call]
        has = ", ".join(f"{name} {total.get(name, 0):g} ({free.get(name, 0):g} free)" for name in request.bundle)
        each = ", ".join(f"{name} {amount:g}" for name, amount in request.bundle.items())
        return (
            f"--nnodes {request.nnodes} asks for {request.bundles} x {{{each}}} ({request.strategy});"
            f" the cluster has {has} on {nodes} nodes"
        )


def _write(stream: TextIO, prefix: str, piece: bytes) -> None:
    lines = piece.decode(errors="replace").removesuffix("\n").split("\n")
    try:
        stream.write("".join(f"{prefix}{line}\n" for line in lines))
        stream.flush()
    except (OSError, ValueError):  # closed, or its reader is gone
        pass


def _line(error: BaseException) -> str:
    """Give what is said in the last line of an error's text that says something: Ray's have a traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) if len(lines) < 4 else lines[-1]
