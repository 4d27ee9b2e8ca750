"""What a supervised class has inside its Ray actor: an initialisation, answers to pings, and an end that is noticed."""

import asyncio
import inspect
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from msgspec import Struct

from ft_launcher.errors import UsageError
from ft_launcher.integrations.ray_policy import Pulse

__all__ = ["GROUP", "Address", "Hello", "fuse_roles", "is_async", "may_repeat", "no_retry", "supervised"]

GROUP = "_ft"
"""The concurrency group of pings: they are answered while a call runs."""

GROUP_THREADS = 2  # one waits for the end, one answers

_NO_RETRY = "_ft_no_retry"

Init = Callable[..., Any]
Method = TypeVar("Method", bound=Callable[..., Any])


class Hello(Struct, frozen=True):
    """What an actor says of itself once it is initialised."""

    pid: int
    node_id: str
    resources: dict[str, float]
    placement_group: str | None
    result: Any
    """What the initialisation returned."""


class Address(Struct, frozen=True):
    """Where an actor is."""

    host: str
    free_port: int


def no_retry(method: Method) -> Method:
    """Mark a method that must not run twice for one call: an optimizer's step, a payment."""
    setattr(method, _NO_RETRY, True)
    return method


def may_repeat(cls: type, method: str) -> bool:
    """Tell whether a call of this method is sent again when its actor dies. Raises AttributeError."""
    return not getattr(getattr(cls, method), _NO_RETRY, False)


class _Life:
    """What one incarnation is doing."""

    def __init__(self) -> None:
        self.is_initialised = False
        self.running: dict[object, tuple[str, float]] = {}

    @contextmanager
    def doing(self, method: str) -> Iterator[None]:
        key = object()
        self.running[key] = method, time.monotonic()
        try:
            yield
        finally:
            del self.running[key]

    def pulse(self) -> Pulse:
        now = time.monotonic()
        running = tuple((method, now - since) for method, since in list(self.running.values()))
        return Pulse(os.getpid(), self.is_initialised, running)

    def hello(self, result: Any) -> Hello:
        self.is_initialised = True
        context = ray.get_runtime_context()
        resources = dict(context.get_assigned_resources())  # type: ignore[no-untyped-call]  # Ray's
        return Hello(os.getpid(), context.get_node_id(), resources, context.get_placement_group_id(), result)


def _address() -> Address:
    with socket.socket() as probe:
        probe.bind(("", 0))
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray's
        return Address(host, probe.getsockname()[1])


def supervised(cls: type) -> type:
    """Give the class with what the supervision needs. Raises UsageError for what is no class, or Ray's already."""
    if not isinstance(cls, type):
        raise UsageError(
            f"{getattr(cls, '__name__', cls)!s}: must be the class itself, not what ray.remote made of it:"
            " options that were given to ray.remote would be lost; give them as options={...}"
        )
    made: type = _of_coroutines(cls) if is_async(cls) else _of_functions(cls)
    made.__name__, made.__qualname__, made.__doc__ = cls.__name__, cls.__qualname__, cls.__doc__
    return made


def is_async(cls: type) -> bool:
    """Judge as Ray does: one coroutine makes all methods run in event loops."""
    methods = inspect.getmembers(cls, inspect.isfunction)
    return any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for _, each in methods)


def _of_functions(cls: Any) -> type:
    class Supervised(cls):  # type: ignore[misc]  # its base is whatever the user has
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._ft_life = _Life()
            super().__init__(*args, **kwargs)

        def _ft_init(self, init: Init | None, environment: Mapping[str, str], *args: Any) -> Hello:
            os.environ.update(environment)
            return self._ft_life.hello(None if init is None else init(self, *args))

        def _ft_call(self, _ft_method: str, /, *args: Any, **kwargs: Any) -> Any:
            with self._ft_life.doing(_ft_method):
                return getattr(self, _ft_method)(*args, **kwargs)

        def _ft_address(self) -> Address:
            return _address()

        def _ft_ping(self) -> Pulse:
            return self._ft_life.pulse()

        def _ft_until_the_end(self) -> None:
            threading.Event().wait()

    return Supervised


def _of_coroutines(cls: Any) -> type:
    class Supervised(cls):  # type: ignore[misc]  # its base is whatever the user has
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._ft_life = _Life()
            super().__init__(*args, **kwargs)

        async def _ft_init(self, init: Init | None, environment: Mapping[str, str], *args: Any) -> Hello:
            os.environ.update(environment)
            return self._ft_life.hello(None if init is None else await _awaited(init(self, *args)))

        async def _ft_call(self, _ft_method: str, /, *args: Any, **kwargs: Any) -> Any:
            with self._ft_life.doing(_ft_method):
                return await _awaited(getattr(self, _ft_method)(*args, **kwargs))

        async def _ft_address(self) -> Address:
            return _address()

        async def _ft_ping(self) -> Pulse:
            return self._ft_life.pulse()

        async def _ft_until_the_end(self) -> None:
            await asyncio.Event().wait()

    return Supervised


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def fuse_roles(**roles: type) -> type:
    """Make one class of several roles that share a process: role "critic" with a method `update` has `critic_update`.

    The constructor takes for each role its own arguments: a tuple of positional ones, or a dict of keywords, by the
    role's name. The roles themselves are in the attribute `roles`, by name.
    """

    def __init__(self: Any, **arguments: tuple[Any, ...] | Mapping[str, Any]) -> None:
        self.roles = {}
        for name, cls in roles.items():
            given = arguments.pop(name, ())
            self.roles[name] = cls(**given) if isinstance(given, Mapping) else cls(*given)
        if arguments:
            raise UsageError(f"{', '.join(arguments)}: no such role; there are {', '.join(roles)}")

    members: dict[str, Any] = {"__init__": __init__, "__module__": __name__}
    for role, cls in roles.items():
        for name, method in inspect.getmembers(cls, inspect.isfunction):
            if not name.startswith("_"):
                members[f"{role}_{name}"] = _forwarded(role, name, method)
    return type("And".join(cls.__name__ for cls in roles.values()), (), members)


def _forwarded(role: str, name: str, method: Any) -> Any:
    if inspect.iscoroutinefunction(method):

        async def forward_async(self: Any, *args: Any, **kwargs: Any) -> Any:
            return await getattr(self.roles[role], name)(*args, **kwargs)

        forward: Any = forward_async
    else:

        def forward_plain(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.roles[role], name)(*args, **kwargs)

        forward = forward_plain
    forward.__doc__ = method.__doc__
    setattr(forward, _NO_RETRY, getattr(method, _NO_RETRY, False))
    return forward
