"""A client for scripts that run under ft_launcher and without it."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

from ft_launcher.messages import WorkloadControlRequest
from ft_launcher.rank_monitor_client import SOCKET_ENV, RankMonitorClient

__all__ = ["NoMonitorClient", "connect"]


class NoMonitorClient(RankMonitorClient):
    """A client with the same methods that watches nothing, for a script that runs without ft_launcher too."""

    def init_workload_monitoring(self) -> None:
        """Do nothing."""

    def shutdown_workload_monitoring(self) -> None:
        """Do nothing."""

    def send_heartbeat(self) -> None:
        """Do nothing."""

    def start_section(self, name: str) -> None:
        """Do nothing."""

    def end_section(self, name: str) -> None:
        """Do nothing."""

    def end_all_sections(self) -> None:
        """Do nothing."""

    @contextmanager
    def section(self, name: str) -> Iterator[None]:  # noqa: ARG002
        """Do nothing."""
        yield

    def should_checkpoint(self, step: int) -> bool:  # noqa: ARG002
        """Say no: nobody is there who could give notice."""
        return False

    def resume_hint(self) -> None:
        """Say that no checkpoint is suspect."""

    def report_resume(self, path: "str | os.PathLike[str] | None", step: int | None = None) -> bool:  # noqa: ARG002
        """Do nothing, and say so."""
        return False

    def report_checkpoint(self, path: "str | os.PathLike[str]", step: int | None) -> bool:  # noqa: ARG002
        """Do nothing, and say so."""
        return False

    def report_step(self, step: int) -> None:
        """Do nothing."""

    def exit_for_preemption(self) -> NoReturn:
        """Raise SystemExit with the code that it has under ft_launcher."""
        raise SystemExit(os.EX_TEMPFAIL)

    def calculate_and_set_hb_timeouts(self, skip_if_not_ready: bool = False) -> bool:  # noqa: ARG002
        """Do nothing, and say so."""
        return False

    def calculate_and_set_section_timeouts(
        self,
        selected_sections: Collection[str] | None = None,  # noqa: ARG002
        calc_out_of_section: bool = True,  # noqa: ARG002
        skip_if_not_ready: bool = False,  # noqa: ARG002
    ) -> bool:
        """Do nothing, and say so."""
        return False

    def process_group_timeout(self) -> timedelta | None:
        """Give None: torch's default, which depends on the backend."""
        return None

    def send_workload_control_request(self, req: WorkloadControlRequest) -> bool:  # noqa: ARG002
        """Do nothing, and say so."""
        return False


def connect() -> RankMonitorClient:
    """Give a client that is already monitoring, or one that does nothing where the script runs without ft_launcher."""
    client = RankMonitorClient() if os.environ.get(SOCKET_ENV) else NoMonitorClient()
    client.init_workload_monitoring()
    return client
