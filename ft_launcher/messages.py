"""Every message that goes over a socket between ranks, monitors and the launcher, and how it is put into bytes.

One message is one packet of a SOCK_SEQPACKET socket, so there is no framing and no half message. msgspec refuses
unknown kinds, unknown fields and wrong types, and says where.
"""

from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from ft_launcher.ladder import Checkpoint
from ft_launcher.watch import Limits

__all__ = [
    "MAX_MESSAGE_BYTES",
    "PROTOCOL",
    "CheckpointSaved",
    "ControlRequested",
    "FromLauncher",
    "FromMonitor",
    "FromRank",
    "Hello",
    "JobConnected",
    "LimitsChanged",
    "LimitsSet",
    "MonitorSettings",
    "ProtocolError",
    "RankConnected",
    "RankEnded",
    "RankHung",
    "RankReported",
    "RankStarted",
    "RankUnkillable",
    "Ready",
    "Refused",
    "RequestAcknowledged",
    "ResumedFrom",
    "SaveStepKnown",
    "Speaker",
    "SpeakerChanged",
    "ToRank",
    "Welcome",
    "WorkloadAction",
    "WorkloadControlRequest",
    "decode_from_launcher",
    "decode_from_monitor",
    "decode_from_rank",
    "decode_to_rank",
    "encode",
]

PROTOCOL = 3
"""Raised by one with every change that an older peer would misunderstand; peers with another one are refused."""

MAX_MESSAGE_BYTES = 32768
"""Room for the limits of 256 sections with names of 64 bytes. A longer packet is refused unread."""

Text = Annotated[str, Meta(max_length=512)]
Name = Annotated[str, Meta(max_length=64)]
Seconds = Annotated[float, Meta(gt=0)]


class ProtocolError(ValueError):
    """The bytes are not a message of the kind expected here."""


class WorkloadAction(Enum):
    """What a rank may ask of the launcher. The names are those that users of nvidia-resiliency-ext write."""

    Continue = "continue"
    ExcludeThisNode = "exclude_this_node"
    ShutdownWorkload = "shutdown_workload"


class WorkloadControlRequest(Struct, frozen=True):
    """`action`, and why, in words for the log (up to 512 characters).

    Continue: restart as usual after the failure that follows. ExcludeThisNode: this node takes no further part in the
    job. ShutdownWorkload: end the job, without restarts.
    """

    action: WorkloadAction
    description: str | None = None


class Hello(Struct, frozen=True, tag="hello"):
    """A rank's first message. `stack_signal`: the signal on which it writes its stacks, 0 for none."""

    protocol: int
    stack_signal: Annotated[int, Meta(ge=0, le=64)]


class LimitsSet(Struct, frozen=True, tag="limits"):
    """The rank has calculated or loaded timeouts; they replace the configured ones for this process.

    Answered by its number, so that none is lost with a monitor that is replaced.
    """

    initial: Seconds | None
    heartbeat: Seconds | None
    sections: dict[Name, Seconds | None]
    out_of_section: Seconds | None
    number: int = 0


class ControlRequested(Struct, frozen=True, tag="control"):
    """`send_workload_control_request`; answered by its number once the launcher's socket holds it."""

    number: int
    action: WorkloadAction
    description: Text | None = None


class ResumedFrom(Struct, frozen=True, tag="resumed"):
    """`report_resume`: the rank goes on from this checkpoint. Answered like ControlRequested."""

    number: int
    checkpoint: Checkpoint


class CheckpointSaved(Struct, frozen=True, tag="saved"):
    """`report_checkpoint`: it stands there now, or (step None) no more. Answered like ControlRequested."""

    number: int
    checkpoint: Checkpoint


class Welcome(Struct, frozen=True, tag="welcome"):
    """The answer to `Hello`; with it come the page and a file for stacks, as descriptors."""

    protocol: int
    config: msgspec.Raw


class RequestAcknowledged(Struct, frozen=True, tag="acknowledged"):
    """The launcher's socket holds request `number`, or the timeouts with that number are in force."""

    number: int


class Refused(Struct, frozen=True, tag="refused"):
    """The monitor will not listen to this process, and why."""

    reason: str


class SaveStepKnown(Struct, frozen=True, tag="save_step_known"):
    """The rank's page says at which step to save. From the launcher to the monitor, and on to a rank that waits."""


class MonitorSettings(Struct, frozen=True, tag="settings"):
    """The launcher's first message to a monitor. Times in seconds; `config` goes on to the ranks unread."""

    local_rank: int
    limits: Limits
    check_interval: float
    termination_signal: int
    termination_grace: float
    marker: str
    run_dir: str
    log_dir: str
    config: msgspec.Raw


class Speaker(Struct, frozen=True):
    """The process that speaks for a rank: the rank's own or a descendant. `stack_signal` as in `Hello`."""

    pid: int
    stack_signal: int


class RankStarted(Struct, frozen=True, tag="started"):
    """A new process of the rank; with it come its page and a file for its stacks, as descriptors.

    `started_ticks` (clock ticks since boot) tells it from a later process of the same number.
    """

    pid: int
    started_ticks: int
    started_at: float
    stacks_path: str
    speaker: Speaker | None = None
    limits: Limits | None = None


class RankEnded(Struct, frozen=True, tag="ended"):
    """The launcher stops this process or saw it end: it is no longer watched."""

    pid: int


class JobConnected(Struct, frozen=True, tag="job_connected"):
    """Some rank of the job has connected: the script uses the client."""


class LimitsChanged(Struct, frozen=True, tag="limits_changed"):
    """The rank `pid` has other limits now. The launcher keeps them for a monitor that takes over."""

    pid: int
    limits: Limits


class SpeakerChanged(Struct, frozen=True, tag="speaker_changed"):
    """Who speaks for the rank `pid` now. The launcher keeps it for a monitor that takes over."""

    pid: int
    speaker: Speaker


class Ready(Struct, frozen=True, tag="ready"):
    """The monitor listens."""


class RankConnected(Struct, frozen=True, tag="connected"):
    """The rank `pid` has begun its monitoring."""

    pid: int


class RankHung(Struct, frozen=True, tag="hung"):
    """The monitor has signalled the rank `pid`. `killed_at` in seconds of `time.monotonic()`."""

    pid: int
    cause: str
    killed_at: float
    stacks_path: str


class RankReported(Struct, frozen=True, tag="reported"):
    """What the rank `pid` said about checkpoints. The launcher must not take it for what the next process says."""

    pid: int
    report: ResumedFrom | CheckpointSaved


class RankUnkillable(Struct, frozen=True, tag="unkillable"):
    """Still there after SIGKILL and a wait: uninterruptible sleep, usually a wedged driver."""

    pid: int
    state: str


FromRank = Hello | LimitsSet | ControlRequested | ResumedFrom | CheckpointSaved
ToRank = Welcome | RequestAcknowledged | SaveStepKnown | Refused
FromLauncher = MonitorSettings | RankStarted | RankEnded | JobConnected | SaveStepKnown
FromMonitor = (
    Ready | SpeakerChanged | LimitsChanged | RankConnected | RankHung | RankReported | RankUnkillable | ControlRequested
)

encode = msgspec.msgpack.Encoder().encode


def _decoder(kind: Any) -> Callable[[bytes], Any]:
    """Give the function that reads a packet as one of the union `kind`, and raises ProtocolError for all else."""
    read = msgspec.msgpack.Decoder(kind).decode

    def decode(packet: bytes) -> Any:
        try:
            return read(packet)
        # msgspec lets UnicodeDecodeError (a ValueError) through for bytes that are not UTF-8.
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(str(error)) from None

    return decode


decode_from_rank: Callable[[bytes], FromRank] = _decoder(FromRank)
decode_to_rank: Callable[[bytes], ToRank] = _decoder(ToRank)
decode_from_launcher: Callable[[bytes], FromLauncher] = _decoder(FromLauncher)
decode_from_monitor: Callable[[bytes], FromMonitor] = _decoder(FromMonitor)
