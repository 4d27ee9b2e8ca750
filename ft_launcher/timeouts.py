"""Timeouts from what was observed: the largest intervals seen, times a safety factor, smoothed over runs."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

__all__ = [
    "HeartbeatTimeouts",
    "Observed",
    "SectionTimeouts",
    "calculated_heartbeats",
    "calculated_sections",
    "for_process_group",
    "from_state",
    "next_timeout",
    "with_calculated_heartbeats",
    "with_calculated_sections",
]


PROCESS_GROUP_MARGIN = 60.0
"""Seconds by which a process group outlasts the longest limit: a monitor that was stopped is replaced within 9 s, and a
rank gets the time back for which its machine stood still."""

PROCESS_GROUP_AT_LEAST = 600.0
"""NCCL's own default in torch 2.13: no wait that it lets live is cut short for limits that do not cover it."""


class HeartbeatTimeouts(Struct, frozen=True, kw_only=True):
    """The two heartbeat timeouts in force, in seconds; None: never."""

    initial: float | None = None
    subsequent: float | None = None
    were_calculated: bool = False

    @property
    def are_valid(self) -> bool:
        """Whether both are set."""
        return self.initial is not None and self.subsequent is not None


class SectionTimeouts(Struct, frozen=True, kw_only=True):
    """The section timeouts in force, in seconds by name; None: never."""

    section: dict[str, float | None] = {}
    out_of_section: float | None = None
    calculated_sections: frozenset[str] = frozenset()
    is_out_of_section_calculated: bool = False

    @property
    def were_calculated(self) -> bool:
        """Whether every one of them was calculated."""
        return self.is_out_of_section_calculated and self.calculated_sections >= self.section.keys()

    @property
    def are_valid(self) -> bool:
        """Whether every section has a timeout, and the time between them."""
        return self.out_of_section is not None and None not in self.section.values()


class Observed(Struct):
    """The largest intervals seen so far, in seconds; None: not seen yet. Kept over runs in the client's state."""

    initial: float | None = None
    heartbeat: float | None = None
    sections: dict[str, float] = {}
    out_of_section: float | None = None

    def merged(self, other: "Observed") -> "Observed":
        """Give the larger of both in every place."""
        return Observed(
            initial=largest(self.initial, other.initial),
            heartbeat=largest(self.heartbeat, other.heartbeat),
            sections={
                name: max(self.sections.get(name, 0.0), other.sections.get(name, 0.0))
                for name in self.sections.keys() | other.sections.keys()
            },
            out_of_section=largest(self.out_of_section, other.out_of_section),
        )

    def as_dict(self) -> dict[str, Any]:
        """Give it as plain dicts and floats."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def largest(*seconds: float | None) -> float | None:
    """Give the largest of those that are not None, or None."""
    return max((each for each in seconds if each is not None), default=None)


def next_timeout(
    seen: float, ever_seen: float, safety_factor: float, current: float | None, *, current_was_calculated: bool
) -> float:
    """Give the timeout that follows from an observed interval of `seen` seconds.

    A current one that was calculated too is averaged with the new one, so that one odd run moves it half-way. But
    never to less than the safety factor (2 at most) times the largest interval `ever_seen`: what took that long once
    without being a hang can take that long again.
    """
    timeout = seen * safety_factor
    if current_was_calculated and current is not None:
        timeout = (timeout + current) / 2
    return max(timeout, ever_seen * min(safety_factor, 2.0))


def calculated_heartbeats(
    seen: Observed, ever_seen: Observed, safety_factor: float, current: HeartbeatTimeouts
) -> HeartbeatTimeouts:
    """Give the heartbeat timeouts that follow from `seen`, in which both intervals must have been seen."""

    def timeout(value: float | None, ever: float | None, now: float | None) -> float:
        value = value or 0.0
        return next_timeout(
            value, max(value, ever or 0.0), safety_factor, now, current_was_calculated=current.were_calculated
        )

    return HeartbeatTimeouts(
        initial=timeout(seen.initial, ever_seen.initial, current.initial),
        subsequent=timeout(seen.heartbeat, ever_seen.heartbeat, current.subsequent),
        were_calculated=True,
    )


def calculated_sections(
    seen: Observed, ever_seen: Observed, safety_factor: float, current: SectionTimeouts, names: Collection[str]
) -> SectionTimeouts:
    """Give `current` with new timeouts for the sections `names`, and for the time between when `seen` has one."""
    section: dict[str, float | None] = dict(current.section)
    for name in names:
        longest = seen.sections[name]
        section[name] = next_timeout(
            longest,
            max(longest, ever_seen.sections.get(name, 0.0)),
            safety_factor,
            current.section.get(name),
            current_was_calculated=name in current.calculated_sections,
        )
    outside = current.out_of_section
    if seen.out_of_section is not None:
        outside = next_timeout(
            seen.out_of_section,
            max(seen.out_of_section, ever_seen.out_of_section or 0.0),
            safety_factor,
            current.out_of_section,
            current_was_calculated=current.is_out_of_section_calculated,
        )
    return SectionTimeouts(
        section=section,
        out_of_section=outside,
        calculated_sections=current.calculated_sections | frozenset(names),
        is_out_of_section_calculated=current.is_out_of_section_calculated or seen.out_of_section is not None,
    )


def for_process_group(limits: Iterable[float | None], termination_grace: float) -> float | None:
    """Give the timeout of a process group, in seconds, whose ranks have these limits (None: never).

    All limits pass before it, and who is killed for one of them has had its grace: a hang is found by its monitor,
    and the group's timeout is left for what no limit covers. None when nothing is limited: torch's default is as good.
    """
    longest = largest(*limits)
    return None if longest is None else max(longest + termination_grace + PROCESS_GROUP_MARGIN, PROCESS_GROUP_AT_LEAST)


def with_calculated_heartbeats(current: HeartbeatTimeouts, loaded: HeartbeatTimeouts) -> HeartbeatTimeouts:
    """Give `loaded` if it was calculated, else `current`."""
    return loaded if loaded.were_calculated else current


def with_calculated_sections(current: SectionTimeouts, loaded: SectionTimeouts) -> SectionTimeouts:
    """Give `current` with those timeouts of `loaded` that were calculated."""
    calculated = {name: loaded.section.get(name) for name in loaded.calculated_sections}
    return SectionTimeouts(
        section={**current.section, **calculated},
        out_of_section=loaded.out_of_section if loaded.is_out_of_section_calculated else current.out_of_section,
        calculated_sections=current.calculated_sections | loaded.calculated_sections,
        is_out_of_section_calculated=current.is_out_of_section_calculated or loaded.is_out_of_section_calculated,
    )


def from_state(state: Mapping[str, Any]) -> tuple[HeartbeatTimeouts, SectionTimeouts, Observed]:
    """Give what `RankMonitorClient.state_dict` put down; ValueError, naming the place, for anything else."""
    try:
        timeouts = state["current_timeouts"]
        return (
            msgspec.convert(timeouts["heartbeat"], HeartbeatTimeouts),
            msgspec.convert(timeouts["section"], SectionTimeouts),
            msgspec.convert(state.get("observed", {}), Observed),
        )
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise ValueError(f"not a state of RankMonitorClient: {error}") from None
