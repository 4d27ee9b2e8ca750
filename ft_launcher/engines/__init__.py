"""Rollout engines (vLLM, SGLang, any HTTP server) that come back with the right weights.

Needs the extra `engines`; loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_launcher.engines.client import EngineClient
    from ft_launcher.engines.config import EngineConfig
    from ft_launcher.engines.errors import EngineCapacityError, EngineError
    from ft_launcher.engines.fleet import State
    from ft_launcher.engines.metrics import EngineMetrics
    from ft_launcher.engines.presets import preset
    from ft_launcher.engines.probes import generates, healthy
    from ft_launcher.engines.routers import SglangRouter, VllmRouter
    from ft_launcher.engines.spec import EngineSpec
    from ft_launcher.engines.supervisor import Engine, EngineEvent, EngineSupervisor, Observer, Router

__all__ = [
    "Engine",
    "EngineCapacityError",
    "EngineClient",
    "EngineConfig",
    "EngineError",
    "EngineEvent",
    "EngineMetrics",
    "EngineSpec",
    "EngineSupervisor",
    "Observer",
    "Router",
    "SglangRouter",
    "State",
    "VllmRouter",
    "generates",
    "healthy",
    "preset",
]

_WHERE = {
    "Engine": "supervisor",
    "EngineCapacityError": "errors",
    "EngineClient": "client",
    "EngineConfig": "config",
    "EngineError": "errors",
    "EngineEvent": "supervisor",
    "EngineMetrics": "metrics",
    "EngineSpec": "spec",
    "EngineSupervisor": "supervisor",
    "Observer": "supervisor",
    "Router": "supervisor",
    "SglangRouter": "routers",
    "State": "fleet",
    "VllmRouter": "routers",
    "generates": "probes",
    "healthy": "probes",
    "preset": "presets",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ft_launcher.engines.{_WHERE[name]}"), name)
