"""The timeouts in force for one rank: configured, loaded from a checkpoint, or calculated with all other ranks."""

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from ft_launcher import agreement, timeouts
from ft_launcher.config import FaultToleranceConfig
from ft_launcher.errors import RankMonitorClientError
from ft_launcher.messages import LimitsSet
from ft_launcher.timeouts import HeartbeatTimeouts, Observed, SectionTimeouts

__all__ = ["RankLimits"]


class RankLimits:
    """What is in force is in `heartbeat` and `section`."""

    def __init__(self) -> None:
        self.heartbeat = HeartbeatTimeouts()
        self.section = SectionTimeouts()
        self._loaded: tuple[HeartbeatTimeouts, SectionTimeouts] | None = None
        self._ever_observed = Observed()

    @property
    def are_loaded(self) -> bool:
        """A state was loaded, which the monitor may not know of yet."""
        return self._loaded is not None

    def configure(self, config: FaultToleranceConfig) -> None:
        """Put those of the file in force, and over them the calculated ones that were loaded."""
        self.heartbeat = HeartbeatTimeouts(
            initial=config.initial_rank_heartbeat_timeout, subsequent=config.rank_heartbeat_timeout
        )
        self.section = SectionTimeouts(
            section=dict(config.rank_section_timeouts), out_of_section=config.rank_out_of_section_timeout
        )
        self._put_loaded_in_force()

    def calculate_heartbeats(self, seen: Observed, safety_factor: float, *, skip_if_not_ready: bool) -> bool:
        """Calculate them with all ranks; False: some rank is not ready. Raises RankMonitorClientError."""
        if not _all_ready(seen.heartbeat is not None, (), skip_if_not_ready, "two heartbeats"):
            return False
        initial, heartbeat = agreement.largest_over_ranks([seen.initial or 0.0, seen.heartbeat or 0.0])
        agreed = Observed(initial=initial, heartbeat=heartbeat)
        self.heartbeat = timeouts.calculated_heartbeats(agreed, self._ever_observed, safety_factor, self.heartbeat)
        self._ever_observed = self._ever_observed.merged(agreed)
        return True

    def calculate_sections(
        self,
        seen: Observed,
        safety_factor: float,
        selected: Collection[str] | None,
        *,
        out_of_section: bool,
        skip_if_not_ready: bool,
    ) -> bool:
        """Calculate them with all ranks; False: some rank is not ready. Raises RankMonitorClientError."""
        names = sorted(self.section.section if selected is None else selected)
        is_ready = seen.sections.keys() >= set(names) and (not out_of_section or seen.out_of_section is not None)
        needed = f"every one of the sections {', '.join(names)} closed once"
        if not _all_ready(is_ready, names, skip_if_not_ready, needed):
            return False
        outside, *longest = agreement.largest_over_ranks(
            [seen.out_of_section or 0.0, *(seen.sections[name] for name in names)]
        )
        agreed = Observed(
            sections=dict(zip(names, longest, strict=True)), out_of_section=outside if out_of_section else None
        )
        self.section = timeouts.calculated_sections(agreed, self._ever_observed, safety_factor, self.section, names)
        self._ever_observed = self._ever_observed.merged(agreed)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Give what is in force, and what it was calculated from, as plain dicts."""
        return {
            "current_timeouts": {
                "heartbeat": msgspec.to_builtins(self.heartbeat),
                "section": msgspec.to_builtins(self.section),
            },
            "observed": self._ever_observed.as_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the calculated ones of `state_dict()` in force. Raises RankMonitorClientError for something else."""
        try:
            heartbeat, section, self._ever_observed = timeouts.from_state(state)
        except ValueError as error:
            raise RankMonitorClientError(str(error)) from None
        self._loaded = (heartbeat, section)
        self._put_loaded_in_force()

    def message(self, number: int) -> LimitsSet:
        """Give what the monitor is told of them."""
        return LimitsSet(
            initial=self.heartbeat.initial,
            heartbeat=self.heartbeat.subsequent,
            sections=self.section.section,
            out_of_section=self.section.out_of_section,
            number=number,
        )

    def _put_loaded_in_force(self) -> None:
        # Only what was calculated: a limit that the user has changed in the file since must not come back.
        if self._loaded is not None:
            self.heartbeat = timeouts.with_calculated_heartbeats(self.heartbeat, self._loaded[0])
            self.section = timeouts.with_calculated_sections(self.section, self._loaded[1])


def _all_ready(is_ready: bool, names: Collection[str], skip: bool, needed: str) -> bool:
    if agreement.all_ready(ready=is_ready, names=list(names)):
        return True
    if skip:
        return False
    raise RankMonitorClientError(f"too early to calculate timeouts: every rank needs {needed}")
