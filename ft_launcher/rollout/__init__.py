"""The rollout side of an RL job: its flags, dumps of its samples, replay, traces of its long tail, and profiles.

Only what is used is loaded; without tensors in the samples nothing here needs torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_launcher.rollout.dumps import RolloutDump, RoundWriter
    from ft_launcher.rollout.errors import DumpError
    from ft_launcher.rollout.flags import add_rollout_ft_arguments, check_rollout_ft_arguments, engine_config
    from ft_launcher.rollout.profile import (
        ProfileResult,
        profile_engines,
        start_profiling,
        stop_profiling,
        trainer_profile,
    )
    from ft_launcher.rollout.round_file import EngineRecord, LoadedRound
    from ft_launcher.rollout.runner import RolloutRunner
    from ft_launcher.rollout.trace import (
        bind_trace,
        trace_context,
        trace_event,
        trace_function,
        trace_sample,
        trace_span,
        tracing,
    )

__all__ = [
    "DumpError",
    "EngineRecord",
    "LoadedRound",
    "ProfileResult",
    "RolloutDump",
    "RolloutRunner",
    "RoundWriter",
    "add_rollout_ft_arguments",
    "bind_trace",
    "check_rollout_ft_arguments",
    "engine_config",
    "profile_engines",
    "start_profiling",
    "stop_profiling",
    "trace_context",
    "trace_event",
    "trace_function",
    "trace_sample",
    "trace_span",
    "tracing",
    "trainer_profile",
]

_WHERE = {
    "DumpError": "errors",
    "EngineRecord": "round_file",
    "LoadedRound": "round_file",
    "ProfileResult": "profile",
    "RolloutDump": "dumps",
    "RolloutRunner": "runner",
    "RoundWriter": "dumps",
    "add_rollout_ft_arguments": "flags",
    "bind_trace": "trace",
    "check_rollout_ft_arguments": "flags",
    "engine_config": "flags",
    "profile_engines": "profile",
    "start_profiling": "profile",
    "stop_profiling": "profile",
    "trace_context": "trace",
    "trace_event": "trace",
    "trace_function": "trace",
    "trace_sample": "trace",
    "trace_span": "trace",
    "tracing": "trace",
    "trainer_profile": "profile",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ft_launcher.rollout.{_WHERE[name]}"), name)
