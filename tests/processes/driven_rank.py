"""A rank that does what its test says: a line of JSON with Python code in, one with its value or error out.

Run as a script it is the rank, and the code sees all names of this file. `Peer` is for tests too.
"""

# ruff: noqa: F401 - tests use these names in the code that they send
import contextlib
import ctypes
import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ft_launcher
from ft_launcher import procfs
from ft_launcher.errors import RankMonitorClientError
from ft_launcher.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL,
    Hello,
    LimitsSet,
    ToRank,
    WorkloadAction,
    WorkloadControlRequest,
    decode_to_rank,
    encode,
)
from ft_launcher.rank_monitor_client import SOCKET_ENV, STACK_SIGNAL, RankMonitorClient

GENEROUS = 120.0
"""Seconds for what must happen at once: only a broken test waits for them."""

HELLO = encode(Hello(protocol=PROTOCOL, stack_signal=0))

client: RankMonitorClient
silent = threading.Event()


class Peer:
    """A connection to the monitor at `path` that says what it likes."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(GENEROUS)
        directory = os.open(Path(path).parent, os.O_PATH)
        try:
            self.socket.connect(f"/proc/self/fd/{directory}/{Path(path).name}")
        except OSError:
            self.socket.close()
            raise
        finally:
            os.close(directory)

    def say(self, packet: bytes, descriptors: list[int] | None = None) -> None:
        """Send a packet. That the monitor has hung up is for `hear` to tell."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self.socket, [packet], descriptors or [])

    def hear(self) -> Any:
        """Give the next answer, None once the monitor has hung up."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self.socket, MAX_MESSAGE_BYTES, 2)
        except ConnectionResetError:
            return None
        for descriptor in descriptors:
            os.close(descriptor)
        return decode_to_rank(packet) if packet else None

    def ask(self, packet: bytes) -> Any:
        """Send a packet and give the answer."""
        self.say(packet)
        return self.hear()

    def close(self) -> None:
        self.socket.close()


def connect_raw() -> Peer:
    """Connect to this rank's monitor without a client."""
    return Peer(os.environ[SOCKET_ENV])


def beat() -> None:
    """Send heartbeats from a thread until `silent` is set."""

    def go() -> None:
        while not silent.wait(0.02):
            client.send_heartbeat()

    silent.clear()
    threading.Thread(target=go, daemon=True).start()


def ask(number: int) -> bool:
    """Send the control request `number`."""
    return client.send_workload_control_request(WorkloadControlRequest(WorkloadAction.Continue, f"request {number}"))


def limits(heartbeat: float | None = None, **sections: float | None) -> bytes:
    """Give the packet that sets these timeouts."""
    return encode(LimitsSet(initial=None, heartbeat=heartbeat, sections=sections, out_of_section=None))


def state(heartbeat: float | None = None, **sections: float | None) -> dict[str, Any]:
    """Give the `state_dict()` of a client that has calculated these timeouts."""
    return {
        "current_timeouts": {
            "heartbeat": {"subsequent": heartbeat, "were_calculated": True},
            "section": {"section": sections, "calculated_sections": list(sections)},
        }
    }


def in_child(act: Callable[[], object]) -> str:
    """Give what `act` gives in a forked child, or its error, as text."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        try:
            told = repr(act())
        except BaseException as error:  # noqa: BLE001 - told to the test
            told = f"{type(error).__name__}: {error}"
        os.write(write_end, told.encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end) as pipe:  # noqa: PTH123
        text = pipe.read()
    os.wait()
    return text


def in_spawned_child(act: Callable[[Any], None]) -> Any:
    """Give what `act`, a function of this file, puts into its queue in a child that multiprocessing has spawned."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=act, args=(queue,))
    child.start()
    told = queue.get()
    child.join()
    return told


def init_another(queue: Any) -> None:
    """Try to begin the monitoring of this process, and tell how that went."""
    try:
        RankMonitorClient().init_workload_monitoring()
        queue.put("welcome")
    except RankMonitorClientError as error:
        queue.put(str(error))


def _answer(**what: object) -> None:
    os.write(1, json.dumps(what, default=repr).encode() + b"\n")


def _obey() -> None:
    _answer(value="ready")
    for line in sys.stdin:
        code = json.loads(line)
        try:
            try:
                compiled = compile(code, "<test>", "eval")
            except SyntaxError:
                compiled = compile(code, "<test>", "exec")
            _answer(value=eval(compiled, globals()))
        except Exception as error:  # noqa: BLE001 - told to the test
            _answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    client = RankMonitorClient()
    _obey()
