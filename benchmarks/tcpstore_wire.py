"""A client of torch's TCPStore that never waits: the frames of its private wire protocol, for thousands of connections.

For benchmarks only. The protocol belongs to torch and may change with it, so `check` compares this client with torch's
own at the start of everything that uses it. What is sent for an operation is what torch's client sends for it as
ft_launcher/exchange.py performs it: every read is a WAIT, which torch puts before it by itself, and then the GET.
"""

import socket
import struct
from collections.abc import Callable, Generator
from datetime import timedelta
from math import inf
from typing import Any

from torch._C._distributed_c10d import TCPStore

from ft_launcher.exchange import Add, CompareSet, Delete, Get, MultiGet, MultiSet, Now, Operation, Wait

# torch/csrc/distributed/c10d/TCPStoreBackend.hpp, enum class QueryType
VALIDATE, SET, COMPARE_SET, GET, ADD, CHECK, WAIT, GETNUMKEYS, DELETE_KEY, APPEND, MULTI_GET, MULTI_SET = range(12)
MAGIC = 0x3C85F7CE  # validationMagicNumber there
PREFIX = b"/"  # keyPrefix_ in TCPStore.hpp: of all keys that torch's client sends

HELLO = struct.pack("<BI", VALIDATE, MAGIC)
"""The first bytes of a connection. The server does not answer."""

NO_BYTES, ONE_BYTE, NUMBER, STRING = -1, 1, 8, 0
"""How the answer to a frame looks: none, a byte, 8 bytes, or a length of 8 bytes with so many behind it."""


Frame = tuple[bytes, int, int]
"""What is sent, and the shape and the number of the answers."""


def _string(value: bytes) -> bytes:
    return len(value).to_bytes(8, "little") + value


def _key(key: str) -> bytes:
    return _string(PREFIX + key.encode())


def _wait(keys: list[str]) -> Frame:
    return struct.pack("<BQ", WAIT, len(keys)) + b"".join(map(_key, keys)), ONE_BYTE, 1


def _get(operation: Get) -> list[Frame]:
    key = _key(operation.key)
    return [(b"\x06\x01\0\0\0\0\0\0\0" + key, ONE_BYTE, 1), (b"\x03" + key, STRING, 1)]


def _compare_set(operation: CompareSet) -> list[Frame]:
    return [(b"\x02%b\0\0\0\0\0\0\0\0%b" % (_key(operation.key), _string(operation.value)), STRING, 1)]


def _multi_get(operation: MultiGet) -> list[Frame]:
    keys = operation.keys
    body = b"".join(map(_key, keys))
    return [_wait(keys), (struct.pack("<BQ", MULTI_GET, len(keys)) + body, STRING, len(keys))]


def _multi_set(operation: MultiSet) -> list[Frame]:
    pairs = zip(operation.keys, operation.values, strict=True)
    body = b"".join(_key(key) + _string(value) for key, value in pairs)
    return [(struct.pack("<BQ", MULTI_SET, len(operation.keys)) + body, NO_BYTES, 0)]


# Looked up by its type, since this is done for every operation of thousands of agents in one process.
_FRAMES: dict[type, Callable[[Any], list[Frame]]] = {
    Add: lambda each: [(b"\x04" + _key(each.key) + each.amount.to_bytes(8, "little", signed=True), NUMBER, 1)],
    CompareSet: _compare_set,
    Delete: lambda each: [(b"\x08" + _key(each.key), NUMBER, 1)],
    Get: _get,
    MultiGet: _multi_get,
    MultiSet: _multi_set,
    Now: lambda _: [],
    Wait: lambda each: [_wait(each.keys)],
}


def frames(operation: Operation) -> list[Frame]:
    """Give what torch's client sends for `operation`: each frame when the one before it is answered."""
    return _FRAMES[type(operation)](operation)


def answer_bytes(shape: int, values: list[bytes]) -> int:
    """Say how long an answer of this shape is."""
    return sum(8 + len(value) for value in values) if shape == STRING else max(0, shape)


class Connection:
    """One connection, on which one generator of exchange.py runs at a time."""

    __slots__ = ("_count", "_expected", "_frames", "_on_end", "_pending", "_recv", "_send", "_shape", "_steps", "sock")

    def __init__(self, address: tuple[str, int]) -> None:
        """`address` is numeric."""
        self.sock = socket.create_connection(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.sendall(HELLO)
        self.sock.setblocking(False)
        self._send, self._recv = self.sock.send, self.sock.recv
        self._frames: list[tuple[bytes, int, int]] = []
        self._pending = b""
        self._shape, self._count = NO_BYTES, 0

    def start(self, steps: Generator[Operation, Any, Any], on_end: Callable[[Any], None]) -> None:
        """Begin to run `steps`; `on_end` is called with what they give."""
        self._steps, self._on_end = steps, on_end
        self._advance(None)

    def readable(self) -> None:
        """Take in what has come, and go on."""
        received = self._recv(4096)
        if not received:
            raise SystemExit("torch's TCPStore has closed a connection: it does not know what was sent there")
        self._pending = self._pending + received if self._pending else received
        result: Any = None
        if self._shape == STRING:
            values = []
            at = 0
            for _ in range(self._count):
                end = at + 8 + int.from_bytes(self._pending[at : at + 8], "little")
                if len(self._pending) < max(end, at + 8):
                    return
                values.append(self._pending[at + 8 : end])
                at = end
            result = values[0] if self._expected is not MultiGet else values
        elif len(self._pending) < self._shape:
            return
        else:
            at = self._shape
            result = int.from_bytes(self._pending[:at], "little", signed=True)
            if self._shape == ONE_BYTE:
                result = result == 0  # STOP_WAITING
        self._pending = self._pending[at:]
        if self._frames:
            self._send_next()
        else:
            self._advance(result)

    def _advance(self, result: Any) -> None:
        while True:
            try:
                operation = self._steps.send(result)
            except StopIteration as end:
                self._on_end(end.value)
                return
            self._expected = type(operation)
            self._frames = frames(operation)
            self._frames.reverse()
            if not self._send_next():
                return
            result = None

    def _send_next(self) -> bool:
        """Send the next frame of the operation; say whether it has no answer."""
        frame, self._shape, self._count = self._frames.pop()
        sent = self._send(frame)
        if sent < len(frame):  # the kernel's buffer is full; only a MultiSet is as long as that
            self.sock.setblocking(True)
            self.sock.sendall(frame[sent:])
            self.sock.setblocking(False)
        return self._shape == NO_BYTES


def perform_one(connection: Connection, operation: Operation) -> Any:
    """Run one operation to its end, waiting for it."""
    import select

    ended: list[Any] = []

    def steps() -> Generator[Operation, Any, Any]:
        return (yield operation)

    connection.start(steps(), ended.append)
    while not ended:
        if not select.select([connection.sock], [], [], 10.0)[0]:
            raise SystemExit(f"torch's TCPStore does not answer {operation}: its protocol is not the one known here")
        connection.readable()
    return ended[0]


def check(address: str, port: int) -> None:
    """Make sure that this client and torch's understand the same; raise SystemExit if not."""
    torchs = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    ours = Connection((address, port))
    try:
        torchs.set("wire/text", "from torch")
        seen = [
            perform_one(ours, Get("wire/text")),
            perform_one(ours, Add("wire/count", 3)),
            perform_one(ours, CompareSet("wire/once", b"first")),
            perform_one(ours, CompareSet("wire/once", b"second")),
            perform_one(ours, MultiSet(["wire/a", "wire/b"], [b"A", b""])),
            perform_one(ours, MultiGet(["wire/a", "wire/b"], 1.0)),
            perform_one(ours, Wait(["wire/a"], 1.0)),
            perform_one(ours, Wait(["wire/a", "wire/b"], inf)),
            perform_one(ours, Delete("wire/a")),
        ]
        seen += [torchs.add("wire/count", 0), torchs.get("wire/once"), torchs.check(["wire/a"])]
        for key in ("wire/text", "wire/count", "wire/once", "wire/b"):
            torchs.delete_key(key)
    finally:
        ours.sock.close()
    wanted = [b"from torch", 3, b"first", b"first", None, [b"A", b""], True, True, 1, 3, b"first", False]
    if seen != wanted:
        raise SystemExit(f"torch's TCPStore speaks another protocol than the one known here: {seen}, not {wanted}")
