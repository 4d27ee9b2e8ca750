"""What a process and the engine service say to each other: one packet for each message, over a Unix socket."""

import socket
from typing import TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from ft_launcher.engines.beside import SOCKET_ENV
from ft_launcher.engines.errors import EngineError
from ft_launcher.engines.supervisor import Engine

__all__ = [
    "ANSWERS",
    "CALLS",
    "PROTOCOL",
    "REFRESHED",
    "REFRESHES",
    "SOCKET_ENV",
    "SOCKET_NAME",
    "Call",
    "Done",
    "Failed",
    "Look",
    "Pause",
    "Refresh",
    "Refreshed",
    "Refreshes",
    "Restart",
    "Round",
    "Seen",
    "Serving",
    "SetVersion",
    "WaitServing",
    "receive",
    "send",
]

PROTOCOL = 1
SOCKET_NAME = "engines"
MAX_BYTES = 1 << 17
"""Of a packet: 200 engines and their reasons. A Unix socket takes 208 KiB at once by default."""


class Look(Struct, tag="look", frozen=True, forbid_unknown_fields=True):
    """All engines: answered by Seen."""

    protocol: int = PROTOCOL


class Serving(Struct, tag="serving", frozen=True, forbid_unknown_fields=True):
    """Those that may be sent requests: answered by Seen."""


class WaitServing(Struct, tag="wait_serving", frozen=True, forbid_unknown_fields=True):
    """The same, as soon as there are `count` (None: min_serving)."""

    count: int | None


class SetVersion(Struct, tag="set_version", frozen=True, forbid_unknown_fields=True):
    """Let only these weights serve: answered by Done."""

    version: str


class Restart(Struct, tag="restart", frozen=True, forbid_unknown_fields=True):
    """Restart an engine: answered by Done."""

    name: str


class Round(Struct, tag="round", frozen=True, forbid_unknown_fields=True):
    """A round begins: answered by Seen. It ends with a Done from the caller, or with its connection."""

    number: int


class Pause(Struct, tag="pause", frozen=True, forbid_unknown_fields=True):
    """No probe, no kill, no start: answered by Done. It ends with a Done from the caller, or with its connection."""

    reason: str


class Refreshes(Struct, tag="refreshes", frozen=True, forbid_unknown_fields=True):
    """The caller gives engines their weights: it is sent Refresh, and answers Refreshed, again and again."""


class Done(Struct, tag="done", frozen=True, forbid_unknown_fields=True):
    """It is so; or: that was all."""


class Failed(Struct, tag="failed", frozen=True, forbid_unknown_fields=True):
    """It cannot be; `kind`: which error the caller shall raise."""

    kind: str
    text: str


class Seen(Struct, tag="seen", frozen=True, forbid_unknown_fields=True):
    """Engines as they are. `file`: what the service was started with."""

    engines: list[Engine]
    file: str
    pid: int
    version: str | None = None


class Refresh(Struct, tag="refresh", frozen=True, forbid_unknown_fields=True):
    """Give this engine the weights of `version`."""

    engine: Engine
    version: str


class Refreshed(Struct, tag="refreshed", frozen=True, forbid_unknown_fields=True):
    """It has them, or `problem` says why not."""

    problem: str


Call: TypeAlias = Look | Serving | WaitServing | SetVersion | Restart | Round | Pause | Refreshes | Done | Refreshed
Answer: TypeAlias = Done | Failed | Seen | Refresh
_T = TypeVar("_T")


def send(connection: socket.socket, message: Call | Answer) -> None:
    """Send it. OSError when the other side is gone."""
    connection.sendall(msgspec.msgpack.encode(message))


CALLS: msgspec.msgpack.Decoder[Call] = msgspec.msgpack.Decoder(Call)
ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
REFRESHES = msgspec.msgpack.Decoder(Refresh)
REFRESHED = msgspec.msgpack.Decoder(Refreshed)


def receive(connection: socket.socket, decoder: "msgspec.msgpack.Decoder[_T]") -> _T | None:
    """Give the next message, None at the end. EngineError for what is none; OSError when the other side is gone."""
    packet, _, flags, _ = connection.recvmsg(MAX_BYTES)
    if flags & socket.MSG_TRUNC:
        raise EngineError(f"a message has more than {MAX_BYTES} bytes")
    if not packet:
        return None
    try:
        return decoder.decode(packet)
    except msgspec.DecodeError as error:
        raise EngineError(f"not understood: {error}") from None
