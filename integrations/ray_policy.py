"""What becomes of Ray actors and of their calls: restart, send again, give up. Decisions only, without Ray."""

from enum import Enum
from math import inf

from msgspec import Struct

from ft_launcher.integrations.ray_config import UNLIMITED, RayFaultToleranceConfig

__all__ = ["Ailing", "Budget", "Call", "Limits", "Pulse", "Verdict", "Vitals", "after_death"]


class Budget(Struct):
    """The restarts of one actor or gang."""

    limit: int
    used: int = 0

    @classmethod
    def of(cls, config: RayFaultToleranceConfig) -> "Budget":
        """Give a full one; one that allows none where fault tolerance is off."""
        return cls(config.max_restarts if config.enable_fault_tolerance else 0)

    def spend(self) -> bool:
        """Take one restart out; False: there is none left."""
        if self.limit != UNLIMITED and self.used >= self.limit:
            return False
        self.used += 1
        return True

    def __str__(self) -> str:
        return f"restart {self.used}" + ("" if self.limit == UNLIMITED else f" of {self.limit}")


class Call(Struct):
    """One call of a method of an actor, over all its attempts."""

    method: str
    may_repeat: bool
    """False: it was marked `@no_retry`, and is sent once."""
    retries: int = 0
    crashes: int = 0
    """How many processes of the actor ended while they ran it."""
    goes_alone: bool = False
    """It is sent when nothing else runs, and nothing is sent beside it: then it is known whether it is to blame."""


class Verdict(Enum):
    """What becomes of a call whose actor has died."""

    SEND = "send it"
    NOT_REPEATED = "it may have run, and is not to run twice"
    NO_RETRIES_LEFT = "its retries are used up"
    POISON = "it has ended each actor that it was sent to"


def after_death(
    call: Call, *, was_alone: bool, node_lost: bool, config: RayFaultToleranceConfig, poison_after: int | None
) -> Verdict:
    """Decide about a call that was running when its actor died; notes in `call` what is known now.

    `was_alone`: nothing else was running. `node_lost`: the whole machine went away, for which no call is to blame.
    `poison_after`: None is never.
    """
    if not call.may_repeat:
        return Verdict.NOT_REPEATED
    call.crashes += not node_lost
    if poison_after is not None and call.crashes >= poison_after and not node_lost:
        if was_alone:
            return Verdict.POISON
        call.goes_alone = True
    most = config.max_task_retries if config.enable_fault_tolerance else 0
    if most != UNLIMITED and call.retries >= most:
        return Verdict.NO_RETRIES_LEFT
    call.retries += 1
    return Verdict.SEND


class Pulse(Struct, frozen=True):
    """An actor's answer to a ping."""

    pid: int
    is_initialised: bool
    running: tuple[tuple[str, float], ...]
    """The methods that it runs, each with the seconds since it began."""


class Limits(Struct, frozen=True, kw_only=True):
    """How an actor is watched, and after how long it is taken for hung. Seconds; None: never."""

    ping_every: float = 10.0
    """Between an answer (or the lack of one) and the next ping."""
    ping_timeout: float = 5.0
    start: float | None = None
    """From its creation to the end of its initialisation."""
    call: float | None = None
    """Of one call, where `calls` says nothing else."""
    calls: dict[str, float | None] = {}
    """The same by method."""
    missed_pings: int | None = 3
    """Pings in a row without an answer: the process is stopped, or something in it holds the interpreter's lock."""

    def of(self, method: str) -> float | None:
        """Give the limit of a method."""
        return self.calls.get(method, self.call)

    def heeding(self, config: RayFaultToleranceConfig) -> "Limits":
        """Give these, or those of nobody who looks where health monitoring is off."""
        if config.enable_fault_tolerance and config.enable_health_monitoring:
            return self
        return Limits(ping_every=inf, missed_pings=None)


class Ailing(Struct, frozen=True):
    """An actor is hung, and has to be killed."""

    reason: str


class Vitals(Struct):
    """What is known of the health of one incarnation. Times are seconds of one monotonic clock."""

    created_at: float
    ready_at: float | None = None
    missed: int = 0
    pulse: Pulse | None = None

    def ready(self, now: float) -> None:
        """Note that it is initialised."""
        self.ready_at = now

    def missed_ping(self, limits: Limits) -> Ailing | None:
        """Note a ping without an answer."""
        self.missed += 1
        if limits.missed_pings is None or self.missed < limits.missed_pings:
            return None
        pings = "a ping" if self.missed == 1 else f"{self.missed} pings in a row"
        return Ailing(f"no answer to {pings} within {limits.ping_timeout:g} s")

    def answered(self, pulse: Pulse, limits: Limits) -> Ailing | None:
        """Note an answer."""
        self.missed, self.pulse = 0, pulse
        for method, seconds in pulse.running:
            limit = limits.of(method)
            if limit is not None and seconds >= limit:
                return Ailing(f"{method!r} has run for {seconds:.1f} s, its limit is {limit:g} s")
        return None

    def overdue(self, now: float, limits: Limits) -> Ailing | None:
        """Judge one that is not initialised yet."""
        if self.ready_at is not None or limits.start is None or now - self.created_at < limits.start:
            return None
        return Ailing(f"not initialised after {now - self.created_at:.1f} s, its limit is {limits.start:g} s")

    def next_look(self, now: float, limits: Limits) -> float | None:
        """Give the moment at which a limit runs out, by what is known now; None: there is none."""
        running = self.pulse.running if self.pulse is not None else ()
        left = [limit - seconds for method, seconds in running if (limit := limits.of(method)) is not None]
        return now + max(0.0, min(left)) if left else None

    @property
    def is_healthy(self) -> bool:
        """It is initialised, and answered the last ping."""
        return self.ready_at is not None and self.missed == 0
