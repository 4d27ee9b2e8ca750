"""Tells sglang-router and vLLM's router which engines may be sent requests, and hears from them that it is so.

Give the routers no judgement of their own: theirs would fight the supervisor's. For sglang-router that is
`--disable-health-check --disable-circuit-breaker`, for vllm-router `--disable-circuit-breaker` and a high
`--health-failure-threshold`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any, TypeAlias
from urllib.parse import quote

import aiohttp

from ft_launcher.engines.errors import EngineError
from ft_launcher.engines.probes import open_session

__all__ = ["SglangRouter", "VllmRouter"]

logger = logging.getLogger(__name__)

REGISTER_SECONDS = 60.0
"""sglang-router asks an engine three things before it lists it, and retries each with pauses that grow."""

DEREGISTER_SECONDS = 30.0
"""For all attempts together; a router that cannot be reached for so long gets requests from nobody."""

CALL_SECONDS = 5.0
POLL_SECONDS = 0.05
RETRY_SECONDS = 0.5
LATE_SECONDS = 120.0
"""How long to look for an engine that a router lists although it was taken away: sglang-router 0.3.2 goes on with a
registration that was queued before, up to its --worker-startup-timeout-secs."""


class SglangRouter:
    """PyPI's sglang-router (0.3.2): what it is asked it queues, so its list is what counts."""

    def __init__(
        self, url: str, *, register_seconds: float = REGISTER_SECONDS, deregister_seconds: float = DEREGISTER_SECONDS
    ) -> None:
        self._list = _List(url, _sglang_add, _sglang_remove, register_seconds, deregister_seconds)

    async def register(self, url: str) -> None:
        """Return when it lists the engine as healthy. EngineError when it does not in time."""
        await self._list.register(url)

    async def deregister(self, url: str) -> None:
        """Return when it does not list the engine. EngineError when it still does in the end."""
        await self._list.deregister(url)


class VllmRouter:
    """PyPI's vllm-router (0.1.17), which asks an engine for its health before it says yes."""

    def __init__(
        self, url: str, *, register_seconds: float = REGISTER_SECONDS, deregister_seconds: float = DEREGISTER_SECONDS
    ) -> None:
        self._list = _List(url, _vllm_add, _vllm_remove, register_seconds, deregister_seconds)

    async def register(self, url: str) -> None:
        """Return when it lists the engine as healthy. EngineError when it does not in time."""
        await self._list.register(url)

    async def deregister(self, url: str) -> None:
        """Return when it does not list the engine. EngineError when it still does in the end."""
        await self._list.deregister(url)


class _Api:
    """A router's HTTP interface: calls under total deadlines, without proxies; close it."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http, self._url = http, url

    async def close(self) -> None:
        await self._http.close()

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """Give the answer's JSON, or its text where it is none. Raises EngineError for a status from 400 on."""

        async def answered() -> Any:
            async with self._http.request(method, self._url + path, json=body, allow_redirects=False) as answer:
                text = await answer.text()
                if answer.status >= 300:
                    raise EngineError(f"{method} {path} answered {answer.status}: {text[:200]}")
                return await answer.json() if "json" in answer.content_type else text

        try:
            return await asyncio.wait_for(answered(), CALL_SECONDS)
        except asyncio.TimeoutError:
            raise EngineError(f"{method} {path}: no answer within {CALL_SECONDS:g} s") from None

    async def workers(self) -> list[dict[str, Any]]:
        match await self.call("GET", "/workers"):
            case {"workers": list() as workers} if all(isinstance(each, dict) for each in workers):
                return workers
            case other:
                raise EngineError(f"GET /workers answered {other!r:.200}")

    async def listed(self) -> dict[str, bool]:
        """Give the engines that it knows, and whether it sends them requests."""
        return {str(each.get("url")): each.get("is_healthy") is True for each in await self.workers()}


_Told: TypeAlias = Callable[[_Api, str], Awaitable[None]]


class _List:
    """The list of one router, and how it is told (`add`, `remove`) that an engine is to be on it or not."""

    def __init__(self, url: str, add: _Told, remove: _Told, register_seconds: float, deregister_seconds: float) -> None:
        self._register_seconds, self._deregister_seconds = register_seconds, deregister_seconds
        self.url = url.rstrip("/")
        self._add, self._remove = add, remove
        self._late: dict[str, asyncio.Task[None]] = {}

    async def register(self, url: str) -> None:
        """Return when the router lists the engine as healthy. EngineError when it is too late."""
        if url in self._late:
            self._late.pop(url).cancel()
        api, end = _Api(await open_session(), self.url), monotonic() + self._register_seconds
        is_listed = False
        try:
            await self._add(api, url)
            while not (is_listed := (await api.listed()).get(url, False)):
                if monotonic() > end:
                    raise EngineError(f"{self.url} has not listed it as healthy within {self._register_seconds:g} s")
                await asyncio.sleep(POLL_SECONDS)
        finally:
            if not is_listed:
                # Whatever the router has queued would list it later, behind the supervisor's back.
                self._late[url] = asyncio.get_running_loop().create_task(self._keep_away(url))
            await api.close()

    async def deregister(self, url: str) -> None:
        """Return when the router does not list the engine. EngineError when it is too late."""
        api, end = _Api(await open_session(), self.url), monotonic() + self._deregister_seconds
        try:
            while True:
                try:
                    await self._take_away(api, url)
                except (EngineError, aiohttp.ClientError, OSError, ValueError) as error:
                    if monotonic() > end:
                        raise EngineError(f"{self.url}: {error}") from error
                    await asyncio.sleep(RETRY_SECONDS)
                else:
                    return
        finally:
            await api.close()

    async def _take_away(self, api: _Api, url: str) -> None:
        end = monotonic() + CALL_SECONDS
        if url in await api.listed():
            await self._remove(api, url)
        while url in await api.listed():
            if monotonic() > end:
                raise EngineError(f"it still lists the engine {CALL_SECONDS:g} s after it was told")
            await asyncio.sleep(POLL_SECONDS)

    async def _keep_away(self, url: str) -> None:
        end = monotonic() + LATE_SECONDS
        api = _Api(await open_session(), self.url)
        try:
            while monotonic() < end:
                try:
                    if url in await api.listed():
                        logger.info("%s lists %s late; taking it away again", self.url, url)
                        await self._remove(api, url)
                except (EngineError, aiohttp.ClientError, OSError, ValueError):
                    await asyncio.sleep(RETRY_SECONDS)  # it does not answer, so it serves nobody
                await asyncio.sleep(RETRY_SECONDS)
        finally:
            await api.close()


async def _sglang_add(api: _Api, url: str) -> None:
    await api.call("POST", "/workers", {"url": url})


async def _sglang_remove(api: _Api, url: str) -> None:
    for worker in await api.workers():
        if worker.get("url") == url:
            await api.call("DELETE", f"/workers/{quote(str(worker.get('id')), safe='')}")


async def _vllm_add(api: _Api, url: str) -> None:
    await api.call("POST", f"/add_worker?url={quote(url, safe='')}")


async def _vllm_remove(api: _Api, url: str) -> None:
    await api.call("POST", f"/remove_worker?url={quote(url, safe='')}")
