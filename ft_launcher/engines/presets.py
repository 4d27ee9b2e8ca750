"""How the engines that people run are asked whether they work: vLLM, SGLang, and anything that speaks HTTP."""

import asyncio
import re
from typing import Literal

import aiohttp

from ft_launcher.engines.probes import ProbeFunction, generates, healthy

__all__ = ["Preset", "preset"]

Preset = Literal["vllm", "sglang", "http"]

_GENERATED = re.compile(rb"^vllm:generation_tokens_total(?:\{[^}]*\})? ([0-9.e+]+)", re.MULTILINE)

LOOK_SECONDS = 0.2
"""Between two looks at vLLM's counter, while a token is waited for; a look takes it some milliseconds."""

SGLANG_SECONDS = 25.0
"""SGLang 0.5 judges for itself for 20 s (SGLANG_HEALTH_CHECK_TIMEOUT) before it says that it hangs."""


def preset(name: Preset, *, model: str = "", path: str = "/health") -> ProbeFunction:
    """Give the probe of an engine of this kind. `model`: vLLM's name of it; "": the first that it serves."""
    match name:
        case "vllm":
            return _Vllm(model)
        case "sglang":
            return _Sglang()
        case "http":
            return healthy(path)


class _Sglang:
    """SGLang's /health_generate has one token made, and answers after a second at the soonest."""

    least_seconds = SGLANG_SECONDS

    def __init__(self) -> None:
        self._probe = healthy("/health_generate")

    async def __call__(self, http: aiohttp.ClientSession, url: str) -> str:
        return await self._probe(http, url)


class _Vllm:
    """vLLM's /health says 200 while its core or a worker is stopped (0.32): only tokens show that it works.

    It is asked for one, unless it is paused or asleep, when it gives none; and it works as well when its counter of
    generated tokens moves meanwhile, as the one may have to wait for those of many others.
    """

    def __init__(self, model: str) -> None:
        self._model = model

    async def __call__(self, http: aiohttp.ClientSession, url: str) -> str:
        if problem := await healthy("/health")(http, url):
            return problem
        begun = await _generated(http, url)
        asking = asyncio.create_task(self._ask_for_a_token(http, url))
        try:
            while not asking.done():
                await asyncio.wait([asking], timeout=LOOK_SECONDS)
                if not asking.done() and await _generated(http, url) > begun:
                    return ""
            return asking.result()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask_for_a_token(self, http: aiohttp.ClientSession, url: str) -> str:
        # Its core answers these two, between two of its steps: when it hangs, so do they.
        for path, key in (("/is_paused", "is_paused"), ("/is_sleeping", "is_sleeping")):
            if await _says(http, url + path, key):
                return ""
        self._model = self._model or await _first_model(http, url)
        body = {"model": self._model, "prompt": "1", "max_tokens": 1, "temperature": 0}
        return await generates("/v1/completions", body, key="choices")(http, url)


async def _says(http: aiohttp.ClientSession, url: str, key: str) -> bool:
    async with http.get(url, allow_redirects=False) as answer:
        # These routes are there in its development mode only.
        return answer.status == 200 and (await answer.json(content_type=None)).get(key) is True


async def _generated(http: aiohttp.ClientSession, url: str) -> float:
    async with http.get(url + "/metrics", allow_redirects=False) as answer:
        text = await answer.read()
    return sum(float(each) for each in _GENERATED.findall(text))


async def _first_model(http: aiohttp.ClientSession, url: str) -> str:
    async with http.get(url + "/v1/models", allow_redirects=False) as answer:
        models = (await answer.json(content_type=None))["data"]
    return str(models[0]["id"])
