"""An engine with the routes of the real ones, and faults on demand: a process of its own that serves HTTP.

    python fake_engine.py PORT [--ready-after SECONDS] [--fail-starts FILE COUNT] [--leak-child] [--ignore-sigterm]

It starts with the weights "base"; POST /load_weights {"version": "v1"} gives it others. POST /admin {"do": ...}:
hang (no route answers any more, this one does), slow (answers later by "seconds"), status (health answers so), crash;
as of vLLM stall (tokens come no more, health is well), block (the same, and whether it is paused or asleep is not said
either), busy (the same, but tokens come for others), pause, sleep (the same, and it says so), wake (as before).
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

BASE = "base"


class Engine:
    def __init__(self) -> None:
        self.version = BASE
        self.status = 200
        self.seconds = 0.0
        self.hangs = asyncio.Event()
        self.never = asyncio.Event()
        self.stalls = asyncio.Event()
        self.blocks = asyncio.Event()
        self.is_paused = self.is_asleep = self.is_busy = False
        self.tokens = 0
        self.asked = 0

    async def answer(self, data: dict[str, Any], status: int = 200) -> web.Response:
        if self.hangs.is_set():
            await self.never.wait()
        await asyncio.sleep(self.seconds)
        return web.json_response(data, status=status)

    async def health(self, _: web.Request) -> web.Response:
        self.asked += 1
        return await self.answer({}, self.status)

    async def generate(self, _: web.Request) -> web.Response:
        if self.stalls.is_set():
            await self.never.wait()
        self.tokens += 1
        return await self.answer({"version": self.version, "text": ["1"], "choices": [{"text": "1"}]})

    async def health_generate(self, _: web.Request) -> web.Response:
        if self.stalls.is_set():
            await self.never.wait()
        return await self.answer({}, self.status)

    async def paused(self, _: web.Request) -> web.Response:
        return await self.asked_of_the_core({"is_paused": self.is_paused})

    async def asleep(self, _: web.Request) -> web.Response:
        return await self.asked_of_the_core({"is_sleeping": self.is_asleep})

    async def asked_of_the_core(self, data: dict[str, Any]) -> web.Response:
        if self.blocks.is_set():
            await self.never.wait()
        return await self.answer(data)

    async def models(self, _: web.Request) -> web.Response:
        return await self.answer({"object": "list", "data": [{"id": "toy", "object": "model"}]})

    async def server(self, _: web.Request) -> web.Response:
        return await self.answer({"model_path": "toy", "served_model_name": "toy", "tp_size": 1, "dp_size": 1})

    async def metrics(self, _: web.Request) -> web.Response:
        self.tokens += self.is_busy
        return web.Response(text=f'vllm:generation_tokens_total{{engine="0",model_name="toy"}} {self.tokens:.1f}\n')

    async def told(self, request: web.Request) -> web.Response:
        self.version = (await request.json())["version"]
        return await self.answer({"version": self.version})

    async def about(self, _: web.Request) -> web.Response:
        return web.json_response({"version": self.version, "asked": self.asked, "pid": os.getpid()})

    async def admin(self, request: web.Request) -> web.Response:
        match await request.json():
            case {"do": "hang"}:
                self.hangs.set()
            case {"do": "slow", "seconds": seconds}:
                self.seconds = seconds
            case {"do": "status", "status": status}:
                self.status = status
            case {"do": "stall" | "block" | "busy" | "pause" | "sleep" as how}:
                self.stalls.set()
                self.is_busy = how == "busy"
                if how == "block":
                    self.blocks.set()
                self.is_paused, self.is_asleep = how == "pause", how == "sleep"
            case {"do": "wake"}:
                self.stalls.clear()
                self.blocks.clear()
                self.is_paused = self.is_asleep = self.is_busy = False
            case {"do": "crash"}:
                os.kill(os.getpid(), signal.SIGKILL)
        return web.json_response({})


def main() -> None:
    made = argparse.ArgumentParser()
    made.add_argument("port", type=int)
    made.add_argument("--ready-after", type=float, default=0.0)
    made.add_argument("--fail-starts", nargs=2)
    made.add_argument("--leak-child", action="store_true")
    made.add_argument("--ignore-sigterm", action="store_true")
    options = made.parse_args()
    if options.fail_starts is not None:
        with Path(options.fail_starts[0]).open("a+") as starts:
            starts.write("x")
            starts.seek(0)
            if len(starts.read()) <= int(options.fail_starts[1]):
                sys.exit(3)
    if options.leak_child:
        subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)

    async def serve() -> None:
        await asyncio.sleep(options.ready_after)
        engine, app = Engine(), web.Application()
        app.add_routes(
            [
                web.get("/health", engine.health),
                web.get("/health_generate", engine.health_generate),
                web.post("/generate", engine.generate),
                web.post("/v1/completions", engine.generate),
                web.get("/is_paused", engine.paused),
                web.get("/is_sleeping", engine.asleep),
                web.get("/v1/models", engine.models),
                web.get("/server_info", engine.server),
                web.get("/model_info", engine.server),
                web.get("/metrics", engine.metrics),
                web.get("/about", engine.about),
                web.post("/load_weights", engine.told),
                web.post("/admin", engine.admin),
            ]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        if options.ignore_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        await web.TCPSite(runner, "127.0.0.1", options.port).start()
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
