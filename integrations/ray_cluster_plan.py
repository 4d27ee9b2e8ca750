"""Decides which launcher runs in which bundle, whom it is to meet, and what the job's exit code is."""

from collections import Counter
from collections.abc import Sequence
from enum import Enum
from typing import TypeAlias

from msgspec import Struct

__all__ = ["Action", "Create", "Finish", "Plan", "Start", "StopAll"]

_BY_SIGNAL = 128
"""Exit codes above it are the numbers of signals, which no launcher ends with by itself but for SIGTERM."""
_DO_NOT_RESTART = 93
_SIGTERM = 15
_FAILED = 1


class Create(Struct, frozen=True):
    """Make the actor of a bundle. `start`: its number, from 0 on; what is said of an earlier one counts no more."""

    bundle: int
    start: int


class Start(Struct, frozen=True):
    """Start the launcher of a bundle. `endpoints`: for --rdzv-endpoint; `joins`: it must not begin the job anew."""

    bundle: int
    start: int
    endpoints: tuple[str, ...]
    joins: bool


class StopAll(Struct, frozen=True):
    """Have all launchers that run told to end, after so many seconds."""

    after: float


class Finish(Struct, frozen=True):
    """The job has ended."""

    code: int


Action: TypeAlias = Create | Start | StopAll | Finish

FAREWELL_SECONDS = 15.0
"""After a launcher has ended with success the others end too; one that has only just come may still look for them."""


class _State(Enum):
    PLACING = "placing"  # the actor is not there yet
    READY = "ready"  # the others are not there yet
    RUNNING = "running"
    ENDED = "ended"


class _Bundle(Struct):
    start: int = 0
    state: _State = _State.PLACING
    endpoint: str = ""
    since: int = 0  # the more, the later it was started
    knows: tuple[str, ...] = ()  # the endpoints that it was given
    joined: bool = False  # it replaces another


class _End(Struct, frozen=True):
    code: int
    joined: bool


class Plan:
    """The bundles of a job. Feed it what happens; it gives what is to be done."""

    def __init__(self, bundles: int, max_replacements: int) -> None:
        self._bundles = [_Bundle() for _ in range(bundles)]
        self._replacements_left = max_replacements
        self._has_begun = False
        self._clock = 0
        self._ends: list[_End] = []
        self._stopped_by: int | None = None
        self.is_finished = False

    @property
    def is_stopping(self) -> bool:
        """A signal has ended the job."""
        return self._stopped_by is not None

    @property
    def has_begun(self) -> bool:
        """All bundles had their places, and launchers were started."""
        return self._has_begun

    @property
    def replacements_left(self) -> int:
        """How many lost launchers can still be replaced."""
        return self._replacements_left

    def is_current(self, bundle: int, start: int) -> bool:
        """Say whether this start is the bundle's last, and has not ended."""
        there = self._bundles[bundle]
        return there.start == start and there.state is not _State.ENDED

    def running(self) -> list[tuple[int, int]]:
        """Give bundle and start of each launcher that runs."""
        return [(i, each.start) for i, each in enumerate(self._bundles) if each.state is _State.RUNNING]

    # -- what happens ---------------------------------------------------------------------------------------------

    def begin(self) -> list[Action]:
        """Have an actor made for each bundle."""
        return [Create(bundle, 0) for bundle in range(len(self._bundles))]

    def prepared(self, bundle: int, endpoint: str) -> list[Action]:
        """The actor is there, and a launcher there would be met at `endpoint`."""
        there = self._bundles[bundle]
        there.endpoint, there.state = endpoint, _State.READY
        if self._has_begun:
            return self._start_one(bundle)
        if any(each.state is not _State.READY for each in self._bundles):
            return []
        self._has_begun = True
        endpoints = tuple(each.endpoint for each in self._bundles)
        return [self._started(i, endpoints, joins=False) for i in range(len(self._bundles))]

    def ended(self, bundle: int, code: int) -> list[Action]:
        """The launcher has ended with this code, as a shell gives it."""
        if code > _BY_SIGNAL and not self.is_stopping:
            return self.lost(bundle)
        return self._end(bundle, code)

    def lost(self, bundle: int) -> list[Action]:
        """The launcher, its actor or its node is gone."""
        there = self._bundles[bundle]
        if self.is_stopping or self._has_succeeded or not self._replacements_left:
            return self._end(bundle, None)
        self._replacements_left -= 1
        there.start += 1
        there.state = _State.PLACING
        return [Create(bundle, there.start)]

    def unfit(self, bundle: int) -> list[Action]:
        """No launcher can be started where the bundle is; the others go on without."""
        return self._end(bundle, None)

    def stopped(self, signum: int) -> list[Action]:
        """Somebody wants the job to end."""
        self._stopped_by = signum
        # How those ended that left the job before says nothing of how it ends now.
        self._ends = [end for end in self._ends if end.code == 0]
        for each in self._bundles:
            if each.state in (_State.PLACING, _State.READY):
                each.state = _State.ENDED
        return [StopAll(0.0), *self._finish_if_over()]

    # -- what comes of it -----------------------------------------------------------------------------------------

    @property
    def _has_succeeded(self) -> bool:
        return any(end.code == 0 for end in self._ends)

    def _start_one(self, bundle: int) -> list[Action]:
        # Those that run, the oldest first: whichever of them is the host now or becomes it, knows itself and is known
        # here. Whoever is the oldest at any time is known to all others, so that they always have a place to meet.
        alive = sorted((each for each in self._bundles if each.state is _State.RUNNING), key=lambda each: each.since)
        # One of several launchers on a machine may also be the host at the endpoint of another that is gone by now.
        machines = {_machine(each.endpoint) for each in alive}
        theirs = [each.endpoint for each in alive]
        theirs += [known for each in alive for known in each.knows if _machine(known) in machines]
        endpoints = tuple(dict.fromkeys([*theirs, self._bundles[bundle].endpoint]))
        return [self._started(bundle, endpoints, joins=bool(alive))]

    def _started(self, bundle: int, endpoints: tuple[str, ...], *, joins: bool) -> Start:
        there = self._bundles[bundle]
        self._clock += 1
        there.state, there.since, there.joined = _State.RUNNING, self._clock, joins
        there.knows = endpoints
        return Start(bundle, there.start, endpoints, joins)

    def _end(self, bundle: int, code: int | None) -> list[Action]:
        there = self._bundles[bundle]
        there.state = _State.ENDED
        had_succeeded = self._has_succeeded
        if code is not None:
            self._ends.append(_End(code, there.joined))
        actions = self._finish_if_over()
        if not actions and code == 0 and not had_succeeded:
            return [StopAll(FAREWELL_SECONDS)]
        return actions

    def _finish_if_over(self) -> list[Action]:
        # A bundle that waits for a node waits for a job that is over.
        states = {each.state for each in self._bundles}
        if _State.RUNNING in states or self.is_finished:
            return []
        if not self._ends and not self.is_stopping and states & {_State.PLACING, _State.READY}:
            return []
        self.is_finished = True
        return [Finish(exit_code([(end.code, end.joined) for end in self._ends], self._stopped_by))]


def _machine(endpoint: str) -> str:
    return endpoint.rpartition(":")[0]


def exit_code(ends: Sequence[tuple[int, bool]], stopped_by: int | None) -> int:
    """Give the job's code. `ends`: in the order of time, of each launcher its code and whether it replaced another.

    The launchers of a job end alike, but for those that left it early and those that came when it was over.
    """
    codes = [code for code, _ in ends]
    if stopped_by is not None:
        by_themselves = [code for code in codes if code != _BY_SIGNAL + _SIGTERM]
        return by_themselves[-1] if by_themselves else _BY_SIGNAL + stopped_by
    for decisive in (0, _DO_NOT_RESTART):
        if decisive in codes:
            return decisive
    if not codes:
        return _FAILED
    counts = Counter(codes)
    most = max(counts.values())
    often = [(code, joined) for code, joined in ends if counts[code] == most]
    return ([code for code, joined in often if not joined] or [code for code, _ in often])[-1]
