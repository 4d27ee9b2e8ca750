"""A torchrun that kills ranks that hang and restarts the job.

The names below are all that scripts need; they load nothing of torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_launcher.anywhere import NoMonitorClient, connect
    from ft_launcher.config import FaultToleranceConfig
    from ft_launcher.errors import FtLauncherError, RankMonitorClientError, UsageError
    from ft_launcher.ladder import ResumeHint
    from ft_launcher.messages import WorkloadAction, WorkloadControlRequest
    from ft_launcher.rank_monitor_client import RankMonitorClient

__all__ = [
    "FaultToleranceConfig",
    "FtLauncherError",
    "NoMonitorClient",
    "RankMonitorClient",
    "RankMonitorClientError",
    "ResumeHint",
    "UsageError",
    "WorkloadAction",
    "WorkloadControlRequest",
    "connect",
]

__version__ = "0.1.0"

_WHERE = {
    "FaultToleranceConfig": "config",
    "FtLauncherError": "errors",
    "NoMonitorClient": "anywhere",
    "RankMonitorClient": "rank_monitor_client",
    "RankMonitorClientError": "errors",
    "ResumeHint": "ladder",
    "UsageError": "errors",
    "WorkloadAction": "messages",
    "WorkloadControlRequest": "messages",
    "connect": "anywhere",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: a rank monitor imports this package too, and must stay small.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ft_launcher.{_WHERE[name]}"), name)
