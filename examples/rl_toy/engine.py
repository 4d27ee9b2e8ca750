"""A rollout engine: serves samples of the policy over HTTP. `python engine.py PORT`, or see train.py.

    GET  /health
    POST /generate      {"prompt": "c", "n": 8, "length": 12, "seed": 7} -> letters and their log-probabilities, and the
                        version of the weights that made them
    POST /load_weights  {"path": "...", "version": "4"}
    POST /fault         {"kind": "kill"}, with --allow-faults only

A request is one batch of a fixed shape, with a generator of its own. So what it gives depends on the weights and on its
seed, and neither on the engine nor on the requests around it.
"""

import argparse
import asyncio
import os
import signal
import time
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec
import torch
from aiohttp import web
from policy import LETTERS, Policy, read_weights

FAULTS = {
    "kill": "ends itself with SIGKILL in the middle of its next answer",
    "hang": "answers nothing any more, /health neither, from the middle of its next answer on",
    "slow": "takes 2 s longer for its next answer",
    "stale": "says that it has loaded the next weights, and has not; its answers name the old ones",
    "lie": "as stale, and its answers name the new ones",
}
SLOW_SECONDS = 2.0
_T = TypeVar("_T")


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What /generate is asked for."""

    prompt: str
    n: int
    length: int
    seed: int


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What /load_weights is asked for."""

    path: str
    version: str


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What /fault is asked for."""

    kind: str


class Engine:
    """A policy that is served, with its version."""

    def __init__(self, token_seconds: float) -> None:
        self._policy, self._version = Policy(), ""  # until it is given others
        self._token_seconds = token_seconds
        self._turn = asyncio.Lock()
        self._fault = ""

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({})

    async def generate(self, request: web.Request) -> web.Response:
        wanted = read(await request.read(), Wanted)
        if len(wanted.prompt) != 1 or wanted.prompt not in LETTERS:
            raise web.HTTPBadRequest(text=f"prompt is {wanted.prompt!r}; it must be a letter from {LETTERS}")
        async with self._turn:  # one after the other: an engine has so much throughput and no more
            policy, version = self._policy, self._version
            letters, logprobs = await self._sample(policy, wanted)
        return web.json_response({"letters": letters, "logprobs": logprobs, "version": version})

    @torch.no_grad()
    async def _sample(self, policy: Policy, wanted: Wanted) -> tuple[list[list[int]], list[list[float]]]:
        chance = torch.Generator().manual_seed(wanted.seed)
        last, state = torch.full((wanted.n,), LETTERS.index(wanted.prompt)), policy.begin(wanted.n)
        letters, logprobs = [], []
        for place in range(wanted.length):
            if place == wanted.length // 2:
                await self._fail()
            every, state = policy(last, state)
            last = torch.multinomial(every.exp(), 1, generator=chance)[:, 0]
            letters.append(last)
            logprobs.append(every.gather(1, last[:, None])[:, 0])
            await asyncio.sleep(self._token_seconds)
        return torch.stack(letters, 1).tolist(), torch.stack(logprobs, 1).tolist()

    async def load_weights(self, request: web.Request) -> web.Response:
        wanted = read(await request.read(), Weights)
        if self._fault in ("stale", "lie"):
            self._version = wanted.version if self._fault == "lie" else self._version
            self._fault = ""
            return web.json_response({})
        try:
            self._policy, self._version = read_weights(Path(wanted.path), wanted.version), wanted.version
        except (OSError, ValueError, RuntimeError) as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        return web.json_response({})

    async def fault(self, request: web.Request) -> web.Response:
        self._fault = read(await request.read(), Fault).kind
        return web.json_response({})

    async def _fail(self) -> None:
        fault = self._fault
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "hang":
            hang()
        elif fault == "slow":
            self._fault = ""
            await asyncio.sleep(SLOW_SECONDS)


def hang() -> NoReturn:
    """Hold the event loop for ever."""
    while True:
        time.sleep(3600)


def read(body: bytes, kind: type[_T]) -> _T:
    """Read JSON. HTTPBadRequest when it is not of this kind."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise web.HTTPBadRequest(text=str(error)) from None


async def serve(options: argparse.Namespace) -> None:
    engine, app = Engine(options.token_seconds), web.Application()
    app.add_routes(
        [
            web.get("/health", engine.health),
            web.post("/generate", engine.generate),
            web.post("/load_weights", engine.load_weights),
        ]
    )
    if options.allow_faults:
        app.add_routes([web.post("/fault", engine.fault)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", options.port).start()
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--token-seconds", type=float, default=0.0, help="added to each token (0)")
    parser.add_argument("--allow-faults", action="store_true", help="serve /fault")
    torch.set_num_threads(1)  # sums of floats depend on how they are split
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
