"""When has a rank been silent for too long? Stamps and limits in, the next deadline out; no clock, no I/O."""

from collections.abc import Iterator

from msgspec import Struct

__all__ = ["Deadline", "Lag", "Limits", "Progress", "Stamps", "deadline", "evidence_at", "next_look"]

EVIDENCE_LEAD = 0.1
"""Seconds before a deadline at which stacks are taken: 20 times what writing them took on a loaded machine."""


LEASE_ENDED = "its node lost contact with the other nodes, which may start anew without it"


class Limits(Struct, frozen=True, kw_only=True):
    """The timeouts that apply to one rank now, in seconds; None: never."""

    startup: float | None = None
    initial: float | None = None
    heartbeat: float | None = None
    sections: dict[str, float | None] = {}
    out_of_section: float | None = None
    teardown: float | None = None

    def smallest(self) -> float | None:
        """The shortest of all, or None when nothing is limited."""
        every = (
            self.startup,
            self.initial,
            self.heartbeat,
            self.out_of_section,
            self.teardown,
            *self.sections.values(),
        )
        return min((limit for limit in every if limit is not None), default=None)


class Stamps(Struct, frozen=True, kw_only=True):
    """What a rank's page says: instants in seconds of `time.monotonic()`; None: never."""

    heartbeat: float | None = None
    idle_since: float | None = None
    connected: float | None = None
    reconnected: float | None = None
    teardown: float | None = None
    lease: float | None = None  # until then the node is certain that the others have not started anew without it
    used_sections: bool = False
    open_sections: dict[str, float] = {}


class Progress(Struct, frozen=True, kw_only=True):
    """What a rank's page says about steps, and notices of preemption by their numbers."""

    asked: int = -1  # the step that it asked about last; -1: it has never asked
    step: int = -1  # the last step that is known of it, from this or another report; -1: none
    saving: int = 0  # the last notice for which it was told to save
    saving_at: int = -1  # and the step
    saved: int = 0  # the last notice that it has done with: it has gone on since
    is_leaving: bool = False  # it has said that it ends for a notice


class Lag(Struct, frozen=True):
    """The watcher woke `seconds` late at `ended_at`: the machine, so perhaps the rank too, stood still."""

    ended_at: float
    seconds: float

    def within(self, since: float) -> float:
        """Give how much of it a wait that began at `since` has seen."""
        return min(self.seconds, max(0.0, self.ended_at - since))


class Deadline(Struct, frozen=True):
    """At `at`, `what` will have lasted longer than `limit` seconds since `since`."""

    at: float
    since: float
    limit: float
    what: str
    is_fence: bool = False  # not the rank's fault, and it must be dead at once

    def sentence(self, now: float) -> str:
        """Say it as at the moment `now`, for the log."""
        if self.is_fence:
            return self.what
        lasted = now - self.since
        return f"{self.what} for {lasted:.{1 if lasted >= 10 else 2}f} s, timeout {self.limit:g} s"


def deadline(
    stamps: Stamps, limits: Limits, started_at: float, *, job_connected: bool, lags: tuple[Lag, ...] = ()
) -> Deadline | None:
    """Give the earliest moment at which some limit will have passed, or None if no limit applies.

    `started_at` is when the rank's process was started. `job_connected`: some rank of the job has connected once, so
    the script does use the client, and a rank that stays silent hangs. What the watcher itself overslept (`lags`) is
    given to every wait that was on meanwhile.
    """
    due = [
        Deadline(since + limit + sum(lag.within(since) for lag in lags), since, limit, what)
        for since, limit, what in _waits(stamps, limits, started_at, job_connected=job_connected)
        if limit is not None
    ]
    if stamps.lease is not None:
        # Without the lags: the others did not stand still meanwhile.
        due.append(Deadline(stamps.lease, stamps.lease, 0.0, LEASE_ENDED, is_fence=True))
    # The earliest of *all*: an outer section counts while an inner one is alive.
    return min(due, key=lambda each: each.at, default=None)


def _waits(
    stamps: Stamps, limits: Limits, started_at: float, *, job_connected: bool
) -> Iterator[tuple[float, float | None, str]]:
    if stamps.teardown is not None:
        yield stamps.teardown, limits.teardown, "not ended after it stopped its monitoring"
        return
    if stamps.heartbeat is None and not stamps.used_sections:
        since = stamps.reconnected or started_at
        silent = "no heartbeat or section since its start"
        yield since, limits.startup, silent
        if job_connected:
            yield since, limits.initial, silent
    if stamps.heartbeat is not None:
        yield stamps.heartbeat, limits.heartbeat, "no heartbeat"
    for name, since in stamps.open_sections.items():
        yield since, limits.sections.get(name), f"section {name!r} open"
    # A script that sends heartbeats and has never opened a section has no outside of sections.
    uses_sections = stamps.used_sections or stamps.heartbeat is None
    if uses_sections and not stamps.open_sections and stamps.idle_since is not None:
        yield stamps.idle_since, limits.out_of_section, "no section open"


def evidence_at(due: Deadline) -> float:
    """Give the moment at which to gather evidence of a hang, shortly before the deadline, so that the kill is on time.

    A rank that moves after all has been looked at for nothing, which costs it microseconds.
    """
    return due.at - min(EVIDENCE_LEAD, due.limit / 10)


def next_look(due: Deadline | None, limits: Limits, now: float, *, at_most: float) -> float:
    """Give the moment at which the page must be looked at again.

    Never later than `at_most` seconds from now, nor than half of the smallest limit, so that a section opened
    meanwhile is seen before it can expire.
    """
    look = now + at_most
    smallest = limits.smallest()
    if smallest is not None:
        look = min(look, now + smallest / 2)
    if due is not None:
        look = min(look, evidence_at(due) if now < evidence_at(due) else due.at)
    return max(look, now)
