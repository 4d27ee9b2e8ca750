"""How an engine is asked whether it works: over HTTP, under a deadline that the asker keeps.

A probe gives "" for an engine that works, else what is wrong in words. No proxy, no redirect, and no connection that
outlives a probe: on an old one an answer could come from the engine that was there before.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import aiohttp

__all__ = ["ProbeFunction", "asked", "generates", "healthy", "open_session", "seconds_for"]

logger = logging.getLogger(__name__)

ProbeFunction: TypeAlias = Callable[[aiohttp.ClientSession, str], Awaitable[str]]
"""Asks the engine at this URL."""


async def open_session() -> aiohttp.ClientSession:
    """Make what probes ask through, in the running loop; close it there."""
    # No time limit of its own: `asked` has the only one.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True, limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        trust_env=False,
    )


async def asked(probe: ProbeFunction, http: aiohttp.ClientSession, url: str, seconds: float) -> str:
    """Run a probe for at most so many seconds, from the connection to the last byte."""
    try:
        return await asyncio.wait_for(probe(http, url), seconds)
    except asyncio.TimeoutError:
        return f"no answer within {seconds:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return str(error) or type(error).__name__


def seconds_for(probe: ProbeFunction, seconds: float, name: str) -> float:
    """Give the deadline of a probe of engine `name`: `seconds`, or more where its server judges for longer itself."""
    least: float = getattr(probe, "least_seconds", 0.0)
    if seconds < least:
        logger.info(
            "engine %s: health_check_timeout is %g s here, not %g s: its server takes so long", name, least, seconds
        )
        return least
    return seconds


def healthy(path: str = "/health") -> ProbeFunction:
    """Ask with GET for a 200. It shows that the server's front lives, and often no more: see `generates`."""

    async def probe(http: aiohttp.ClientSession, url: str) -> str:
        async with http.get(url + path, allow_redirects=False) as answer:
            await answer.read()
            return "" if answer.status == 200 else f"{path} answered {answer.status}"

    return probe


def generates(path: str, body: Mapping[str, Any], *, key: str) -> ProbeFunction:
    """Ask for one token with POST: the answer is JSON in which something stands under `key`."""
    sent = json.dumps(body).encode()

    async def probe(http: aiohttp.ClientSession, url: str) -> str:
        headers = {"Content-Type": "application/json"}
        async with http.post(url + path, data=sent, headers=headers, allow_redirects=False) as answer:
            data = await answer.read()
            if answer.status != 200:
                return f"{path} answered {answer.status}"
        parsed = json.loads(data)
        return "" if isinstance(parsed, dict) and parsed.get(key) else f"{path} answered without {key}"

    return probe
