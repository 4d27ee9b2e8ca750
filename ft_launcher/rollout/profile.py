"""Profiles of a few steps: of vLLM and SGLang engines over HTTP, and of the trainer with torch.profiler."""

import asyncio
import json
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from ft_launcher.errors import UsageError

if TYPE_CHECKING:
    import aiohttp
    from torch.profiler import profile

__all__ = ["EngineKind", "ProfileResult", "profile_engines", "start_profiling", "stop_profiling", "trainer_profile"]

EngineKind = Literal["vllm", "sglang"]

_ACTIVITIES = ("CPU", "GPU")
_TIMEOUT = 120.0
"""Seconds. Engines write their profiles before they answer to the stop, which takes them from seconds to a minute."""


class ProfileResult(Struct, frozen=True):
    """What an engine said. `problem` is empty where it did what was asked."""

    url: str
    problem: str = ""


def start_profiling(
    urls: Sequence[str],
    *,
    kind: EngineKind,
    steps: int | None = 3,
    directory: str | None = None,
    activities: Sequence[str] = _ACTIVITIES,
    with_stack: bool = False,
    record_shapes: bool = False,
    by_stage: bool = False,
    timeout: float = _TIMEOUT,
) -> list[ProfileResult]:
    """Have all these engines begin a profile, at the same time; one result for each, in their order.

    sglang: it ends after so many steps of the engine (None: at `stop_profiling`) and is written to `directory`, on the
    engine's machine; None: where SGLANG_TORCH_PROFILER_DIR says. by_stage: prefill and decode apart.
    vllm: takes nothing of that from a request; it was started with a profiler's configuration, and writes there.
    timeout: seconds for each engine's answer. Not to be called from a coroutine. Raises UsageError.
    """
    _check(kind, steps, timeout)
    body: dict[str, Any] | None = None
    if kind == "sglang":
        body = {
            "output_dir": directory,
            "num_steps": steps,
            "activities": list(activities),
            "with_stack": with_stack,
            "record_shapes": record_shapes,
            "profile_by_stage": by_stage,
        }
        body = {name: value for name, value in body.items() if value is not None}
    return asyncio.run(_ask_all(urls, "/start_profile", body, timeout))


def stop_profiling(urls: Sequence[str], *, timeout: float = _TIMEOUT) -> list[ProfileResult]:
    """Have all these engines end their profiles and write them; one result for each, in their order."""
    return asyncio.run(_ask_all(urls, "/stop_profile", None, timeout))


@contextmanager
def profile_engines(
    urls: Sequence[str],
    *,
    kind: EngineKind,
    steps: int | None = 3,
    directory: str | None = None,
    timeout: float = _TIMEOUT,
) -> Iterator[list[ProfileResult]]:
    """Profile engines in this block; gives what came of the start, and after the block of the stop as well.

    Those that did not start are not stopped, nor are those of SGLang with `steps`, which stop by themselves.
    """
    results = start_profiling(urls, kind=kind, steps=steps, directory=directory, timeout=timeout)
    try:
        yield results
    finally:
        if kind == "vllm" or steps is None:
            started = [index for index, each in enumerate(results) if not each.problem]
            stopped = stop_profiling([results[index].url for index in started], timeout=timeout)
            for index, each in zip(started, stopped, strict=True):
                results[index] = each


def _check(kind: str, steps: int | None, timeout: float) -> None:
    if kind not in ("vllm", "sglang"):
        raise UsageError(f"kind is {kind!r}; it must be 'vllm' or 'sglang'")
    if steps is not None and steps < 1:
        raise UsageError(f"steps is {steps}; it must be 1 or more, or None")
    if not timeout > 0:
        raise UsageError(f"timeout is {timeout:g}; it must be a number of seconds above 0")


async def _ask_all(urls: Sequence[str], path: str, body: Any, seconds: float) -> list[ProfileResult]:
    from ft_launcher.engines.probes import open_session

    async with await open_session() as http:
        work: list[Coroutine[Any, Any, str]] = [_ask(http, url.rstrip("/") + path, body, seconds) for url in urls]
        problems = await asyncio.gather(*work)
    return [ProfileResult(url, problem) for url, problem in zip(urls, problems, strict=True)]


async def _ask(http: "aiohttp.ClientSession", url: str, body: Any, seconds: float) -> str:
    import aiohttp

    async def post() -> str:
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        async with http.post(url, data=data, headers=headers, allow_redirects=False) as answer:
            text = (await answer.text(errors="replace")).strip().partition("\n")[0]
            if answer.status == 404:  # vLLM has the route only where it was started with a profiler's configuration
                return "it is not configured for profiling (404)"
            return "" if answer.status == 200 else f"it answered {answer.status}: {text[:200]}"

    try:
        return await asyncio.wait_for(post(), seconds)
    except asyncio.TimeoutError:
        return f"no answer within {seconds:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return str(error) or type(error).__name__


def trainer_profile(
    directory: str | Path,
    *,
    skip_first: int = 0,
    wait: int = 1,
    warmup: int = 1,
    active: int = 3,
    repeat: int = 1,
    with_stack: bool = False,
    record_shapes: bool = False,
    memory: bool = False,
) -> "profile":
    """Give a torch.profiler.profile for `with`; call its `step()` after each step of the training.

    After `skip_first` steps, `repeat` times: `wait` steps without, `warmup` steps whose figures are dropped, and
    `active` ones that are written to `directory`, one file for each process, for Perfetto and TensorBoard. repeat 0:
    to the end. Raises UsageError.
    """
    for name, value, least in (
        ("skip_first", skip_first, 0),
        ("wait", wait, 0),
        ("warmup", warmup, 0),
        ("active", active, 1),
        ("repeat", repeat, 0),
    ):
        if value < least:
            raise UsageError(f"{name} is {value}; it must be {least} or more")
    from torch import profiler

    return profiler.profile(
        schedule=profiler.schedule(skip_first=skip_first, wait=wait, warmup=warmup, active=active, repeat=repeat),
        on_trace_ready=profiler.tensorboard_trace_handler(str(directory)),
        with_stack=with_stack,
        record_shapes=record_shapes,
        profile_memory=memory,
    )
