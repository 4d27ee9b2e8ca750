"""EngineSupervisor: does what the fleet decides, from one thread, and tells it what came of it."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, TypeVar

import aiohttp  # noqa: TC002 - the annotation of an attribute
from msgspec import Struct

from ft_launcher.engines.config import EngineConfig
from ft_launcher.engines.engine import EngineProcess
from ft_launcher.engines.errors import EngineCapacityError, EngineError
from ft_launcher.engines.fleet import Action, Deregister, Fleet, Kill, Probe, Refresh, Register, Slot, Spawn, State
from ft_launcher.engines.probes import ProbeFunction, asked, healthy, open_session, seconds_for
from ft_launcher.engines.spec import EngineSpec

__all__ = ["Engine", "EngineEvent", "EngineSupervisor", "Observer", "Router"]

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

FAREWELL_SECONDS = 10.0
"""How long a router may take to forget an engine before those who wait for it go on; it takes milliseconds."""


class Engine(Struct, frozen=True):
    """An engine as it was at one moment. `version`: of its weights; None: nobody has given it any."""

    name: str
    url: str
    state: State
    incarnation: int
    version: str | None
    failures: int
    reason: str


class EngineEvent(Struct, frozen=True):
    """An engine has another state. `at` in seconds of time.monotonic()."""

    name: str
    incarnation: int
    before: State
    after: State
    reason: str
    at: float


class Router(Protocol):
    """What sends requests to engines. When `register` raises, the engine is given up."""

    async def register(self, url: str) -> None:
        """Have requests sent there; return when they may come."""

    async def deregister(self, url: str) -> None:
        """Have none sent there any more."""


class Observer(Protocol):
    """What is told what the supervisor does, in its thread: metrics. Must not block."""

    def changed(self, event: EngineEvent) -> None:
        """An engine has another state."""

    def probed(self, name: str, seconds: float, problem: str) -> None:
        """A probe has ended after so long; `problem` is empty when the engine works."""

    def refreshed(self, name: str, version: str, seconds: float, problem: str) -> None:
        """A refresh has ended after so long; `problem` is empty when the engine has the weights."""


class EngineSupervisor:
    """Watches rollout engines, ends those that hang, and starts them again with the right weights.

    All methods may be called from any thread; they wait for the supervisor's own, which never waits for an engine.
    """

    def __init__(
        self,
        config: EngineConfig,
        engines: Sequence[EngineSpec],
        *,
        probe: ProbeFunction | Mapping[str, ProbeFunction] | None = None,
        refresh: Callable[[Engine, str], None] | None = None,
        router: Router | Mapping[str, Router] | None = None,
        on_event: Callable[[EngineEvent], None] | None = None,
        observer: Observer | None = None,
        log_dir: Path | None = None,
    ) -> None:
        """probe: None asks /health. probe, router: one for all, or by the engine's name. refresh: gives an engine the
        weights of a version; called in threads, for several engines at a time; returns when the engine has them, raises
        when it cannot have them. None: engines have by themselves what `set_version` says. on_event: called in the
        supervisor's thread; must not block. log_dir: for the output of engines; None: where this process's goes.

        Raises UsageError for settings and specs that cannot be meant.
        """
        config.check()
        for spec in engines:
            spec.check()
        self._specs = {spec.name: spec for spec in engines}
        if len(self._specs) < len(engines):
            raise EngineError("two engines have the same name")
        self._config = config
        own = [spec.name for spec in engines if not spec.url]
        self._fleet = Fleet(config, own, external=[spec.name for spec in engines if spec.url])
        self._probes = {name: each or healthy() for name, each in _by_name(probe, self._specs).items()}
        self._probe_seconds = {
            name: seconds_for(each, config.health_check_timeout, name) for name, each in self._probes.items()
        }
        self._routers = _by_name(router, self._specs)
        self._refresh, self._on_event, self._observer = refresh, on_event, observer
        self._log_dir = log_dir
        self._processes: dict[str, EngineProcess] = {}
        self._urls = {spec.name: spec.url.rstrip("/") for spec in engines if spec.url}
        self._states = {name: slot.state for name, slot in self._fleet.slots.items()}
        self._said_to_serve: set[tuple[str, int]] = set()
        self._loop = asyncio.new_event_loop()
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._http: aiohttp.ClientSession
        self._routing: dict[str, asyncio.Lock] = {name: asyncio.Lock() for name in self._specs}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        # A refresh may hang in its thread: neither other refreshes nor kills wait for it.
        self._loop.set_default_executor(ThreadPoolExecutor(max(32, 2 * len(engines)), "ft_engines_refresh"))
        self._killers = ThreadPoolExecutor(max(1, len(engines)), "ft_engines_kill")
        self._timer: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(target=self._run, name="ft_engines", daemon=True)

    # -- for the trainer ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start all engines; return at once. RuntimeError when called twice."""
        self._thread.start()
        self._http = asyncio.run_coroutine_threadsafe(open_session(), self._loop).result()
        self._call(lambda: self._fleet.start(monotonic()))

    def close(self) -> None:
        """End all engines that were started here; return when nothing of them is left."""
        if not self._thread.is_alive():
            self._loop.close()
            return
        self._call(lambda: self._fleet.close(monotonic()))
        self._wait(lambda: self._fleet.is_stopped)
        asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._killers.shutdown()
        self._loop.close()

    def __enter__(self) -> "EngineSupervisor":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def engines(self) -> list[Engine]:
        """Give all engines as they are now."""
        return self._ask(lambda: [self._engine(slot) for slot in self._fleet.slots.values()])

    def serving(self) -> list[Engine]:
        """Give those to which requests may be sent now: they answer, with the current weights."""
        return self._ask(lambda: [self._engine(slot) for slot in self._fleet.serving()])

    def wait_serving(self, count: int | None = None) -> list[Engine]:
        """Wait until so many engines serve (None: `min_serving`), and give those that do.

        Raises EngineCapacityError as soon as there will never be as many, as the others are retired.
        """
        wanted = self._config.min_serving if count is None else count
        while True:
            self._wait(lambda: len(self._fleet.serving()) >= wanted or self._fleet.capacity() < wanted)
            serving = self.serving()
            if len(serving) >= wanted:
                return serving
            # Else one has died since the wait ended.
            if self._ask(self._fleet.capacity) < wanted:
                raise EngineCapacityError(self._ask(self._why_retired))

    @contextmanager
    def round(self, number: int) -> Iterator[list[Engine]]:
        """Collect a round of samples: an engine that dies in it is started again after it, unless too few are left.

        Waits for `min_serving` engines first (EngineCapacityError as of `wait_serving`). At the end all engines are
        looked at once more, so that a short round does not hide a hang.
        """
        serving = self.wait_serving()
        logger.debug("round %d begins with %d engines", number, len(serving))
        self._call(lambda: self._fleet.begin_round(monotonic()))
        try:
            yield serving
        finally:
            self._call(lambda: self._fleet.end_round(monotonic()))
            self._wait(lambda: self._fleet.is_checked or self._fleet.is_paused)

    @contextmanager
    def paused(self, reason: str) -> Iterator[None]:
        """Neither probe nor kill nor start engines in this block, which begins when none of that is under way."""
        self._call(lambda: self._fleet.pause(reason, monotonic()))
        try:
            self._wait(lambda: self._fleet.is_quiet)
            yield
        finally:
            self._call(lambda: self._fleet.resume(reason, monotonic()))

    def set_version(self, version: str) -> None:
        """Let only engines with these weights serve from now on; the others are refreshed first, each by `refresh`.

        Returns when the routers send no more requests to the others, or were given FAREWELL_SECONDS for it.
        """
        self._call(lambda: self._fleet.set_version(version, monotonic()))
        asyncio.run_coroutine_threadsafe(self._farewells(), self._loop).result()

    def request_restart(self, name: str) -> None:
        """Kill an engine and start it again, which costs nothing of its budget. KeyError for an unknown name."""
        self._call(lambda: self._fleet.request_restart(name, monotonic()))

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _ask(self, question: Callable[[], _T]) -> _T:
        """Run it in the supervisor's thread."""

        async def answer() -> _T:
            return question()

        if self._loop.is_closed():
            raise EngineError("the engine supervisor has ended")
        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result()

    def _call(self, event: Callable[[], list[Action]]) -> None:
        self._ask(lambda: self._take(event()))

    def _wait(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            if not condition():
                come = self._loop.create_future()
                self._waiting.append((condition, come))
                await come

        asyncio.run_coroutine_threadsafe(wait(), self._loop).result()

    def _take(self, actions: list[Action]) -> None:
        """Begin what the fleet wants done, tell of new states, and wake who waits for them."""
        self._tell()
        for action in actions:
            self._begin(action)
        for waiting in [each for each in self._waiting if each[0]()]:
            self._waiting.remove(waiting)
            waiting[1].set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        due = self._fleet.due()
        # The loop's clock is time.monotonic().
        self._timer = None if due == float("inf") else self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._take(self._fleet.tick(monotonic()))

    def _begin(self, action: Action) -> None:
        match action:
            case Spawn(name, incarnation):
                self._spawn(name, incarnation)
            case Probe(name, incarnation):
                self._do(self._ask_engine(name, incarnation))
            case Refresh(name, incarnation, version):
                self._do(self._refresh_engine(name, incarnation, version))
            case Register(name, incarnation):
                self._do(self._register(name, incarnation))
            case Deregister(name, _):
                self._leaving[name] = self._do(self._deregister(name, self._urls.get(name, "")))
            case Kill(name, incarnation):
                self._do(self._kill(name, incarnation))

    def _do(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- what is done ---------------------------------------------------------------------------------------------

    def _spawn(self, name: str, incarnation: int) -> None:
        log = None if self._log_dir is None else self._log_dir / f"{name}-{incarnation}.log"
        try:
            # In this thread: with the thread that starts a process its warden would take the supervisor for dead.
            process = EngineProcess(self._specs[name], self._config.term_grace, log)
        except OSError as error:
            how = f"it could not be started: {error}"
            self._loop.call_soon(lambda: self._take(self._fleet.exited(name, incarnation, how, monotonic())))
            return
        self._processes[name], self._urls[name] = process, process.url
        self._loop.add_reader(process.pidfd, self._has_ended, name, incarnation, process)

    def _has_ended(self, name: str, incarnation: int, process: EngineProcess) -> None:
        self._loop.remove_reader(process.pidfd)
        self._take(self._fleet.exited(name, incarnation, process.how_it_ended(), monotonic()))

    async def _ask_engine(self, name: str, incarnation: int) -> None:
        begun = monotonic()
        problem = await asked(self._probes[name], self._http, self._urls[name], self._probe_seconds[name])
        if self._observer is not None:
            self._observer.probed(name, monotonic() - begun, problem)
        self._take(self._fleet.probed(name, incarnation, problem, monotonic()))

    async def _refresh_engine(self, name: str, incarnation: int, version: str) -> None:
        problem, begun = "", monotonic()
        if name in self._leaving:
            # It may be given other weights only when no request with the old ones in mind can come any more.
            await asyncio.wait([self._leaving[name]], timeout=FAREWELL_SECONDS)
        if self._refresh is not None:
            engine = self._engine(self._fleet.slots[name])
            work = asyncio.to_thread(self._refresh, engine, version)
            try:
                await asyncio.wait_for(work, self._config.refresh_timeout)
            except asyncio.TimeoutError:
                problem = f"not done within {self._config.refresh_timeout:g} s"
            except Exception as error:  # noqa: BLE001 - the user's function
                problem = f"{type(error).__name__}: {error}"
        if self._observer is not None:
            self._observer.refreshed(name, version, monotonic() - begun, problem)
        self._take(self._fleet.refreshed(name, incarnation, version, problem, monotonic()))

    async def _register(self, name: str, incarnation: int) -> None:
        problem = ""
        if (router := self._routers[name]) is not None:
            problem = await self._routed(name, router.register(self._urls[name]))
        self._take(self._fleet.registered(name, incarnation, problem, monotonic()))

    async def _deregister(self, name: str, url: str) -> None:
        router = self._routers[name]
        if router is not None and url and (problem := await self._routed(name, router.deregister(url))):
            logger.warning("engine %s at %s: the router still knows it: %s", name, url, problem)

    async def _routed(self, name: str, work: Awaitable[None]) -> str:
        # One after the other: a late registration must not overtake the goodbye that came after it.
        async with self._routing[name]:
            try:
                await work
            except Exception as error:  # noqa: BLE001 - the user's router
                return f"{type(error).__name__}: {error}"
        return ""

    async def _kill(self, name: str, incarnation: int) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            self._loop.remove_reader(process.pidfd)
            survivors = await self._loop.run_in_executor(self._killers, process.kill)
            for survivor in survivors:
                logger.error("engine %s: process %d (%s) cannot be killed", name, survivor.pid, survivor.name)
            process.close()
        if name in self._leaving:
            # Dead is who gets no more requests, too. A router that hangs cannot make the others wait for long.
            await asyncio.wait([self._leaving[name]], timeout=FAREWELL_SECONDS)
        self._take(self._fleet.gone(name, incarnation, monotonic()))

    async def _farewells(self) -> None:
        if leaving := [task for task in self._leaving.values() if not task.done()]:
            await asyncio.wait(leaving, timeout=FAREWELL_SECONDS)

    async def _finish(self) -> None:
        # Goodbyes; and whatever hangs in functions of others does so alone from here on.
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=FAREWELL_SECONDS)
        for task in (others := asyncio.all_tasks() - {asyncio.current_task()}):
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.close()
        while self._waiting:
            self._waiting.pop()[1].set_exception(EngineError("the engine supervisor has ended"))

    # -- saying ---------------------------------------------------------------------------------------------------

    def _engine(self, slot: Slot) -> Engine:
        url = self._urls.get(slot.name, "")
        return Engine(slot.name, url, slot.state, slot.incarnation, slot.version, slot.failures, slot.reason)

    def _tell(self) -> None:
        for name, slot in self._fleet.slots.items():
            before, self._states[name] = self._states[name], slot.state
            if before is not slot.state:
                reason = slot.reason if slot.state in (State.SUSPECT, State.FAILED, State.RETIRED) else ""
                level = self._level(slot, before, reason)
                words = f": {reason}" if reason else ""
                logger.log(level, "engine %s (start %d): %s%s", name, slot.incarnation, slot.state.value, words)
                event = EngineEvent(name, slot.incarnation, before, slot.state, reason, monotonic())
                if self._observer is not None:
                    self._observer.changed(event)
                if self._on_event is not None:
                    self._notify(event, self._on_event)

    def _level(self, slot: Slot, before: State, reason: str) -> int:
        if reason and not self._fleet.is_closing:
            return logging.WARNING
        # Every update of the weights takes every engine through these: nobody would find the restarts among them.
        if slot.state in (State.LOADED, State.REFRESHING, State.REGISTERING):
            return logging.DEBUG
        if slot.state is State.SERVING and before is not State.SUSPECT:
            if (slot.name, slot.incarnation) in self._said_to_serve:
                return logging.DEBUG
            self._said_to_serve.add((slot.name, slot.incarnation))
        return logging.INFO

    def _notify(self, event: EngineEvent, told: Callable[[EngineEvent], None]) -> None:
        try:
            told(event)
        except Exception:
            # The user's function, in the thread on which all engines depend.
            logger.exception("on_event failed for engine %s", event.name)

    def _why_retired(self) -> str:
        gone = [slot for slot in self._fleet.slots.values() if slot.state is State.RETIRED]
        reasons = "; ".join(f"{slot.name}: {slot.reason}" for slot in gone)
        return f"too few engines are left to serve from ({len(gone)} of {len(self._fleet.slots)} retired: {reasons})"


_E = TypeVar("_E")


def _by_name(given: _E | Mapping[str, _E] | None, names: Mapping[str, EngineSpec]) -> dict[str, _E | None]:
    if isinstance(given, Mapping):
        return {name: given.get(name) for name in names}
    return dict.fromkeys(names, given)
