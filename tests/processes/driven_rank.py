"""A rank that does what its test says: one line of JSON with Python code in, one with the value or the error out.

Run as a script it is the rank; `Peer` is also what tests themselves connect with.
"""

import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from ft_launcher.messages import MAX_MESSAGE_BYTES, PROTOCOL, Hello, ToRank, decode, encode

GENEROUS = 60.0


class Peer:
    """A connection to a monitor that says what it likes: packets of bytes, and descriptors with them."""

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
        """Send a packet; that the monitor has hung up is for `hear` to tell."""
        try:
            socket.send_fds(self.socket, [packet], descriptors or [])
        except (BrokenPipeError, ConnectionResetError):
            return

    def hear(self) -> Any:
        """Give the next answer, None when the monitor has closed the connection."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self.socket, MAX_MESSAGE_BYTES, 2)
        except ConnectionResetError:
            return None
        for descriptor in descriptors:
            os.close(descriptor)
        return decode(packet, ToRank) if packet else None  # type: ignore[arg-type,var-annotated]

    def ask(self, packet: bytes) -> Any:
        """Send a packet and give the answer."""
        self.say(packet)
        return self.hear()

    def greet(self) -> Any:
        """Say a hello that is right in all that a message can say, and give the answer."""
        return self.ask(encode(Hello(protocol=PROTOCOL, stack_signal=0)))

    def close(self) -> None:
        self.socket.close()


def _answer(**what: object) -> None:
    os.write(1, json.dumps(what, default=repr).encode() + b"\n")


def _obey(names: dict[str, Any]) -> None:
    for line in sys.stdin:
        code = json.loads(line)
        try:
            try:
                value = eval(compile(code, "<test>", "eval"), names)
            except SyntaxError:
                value = exec(compile(code, "<test>", "exec"), names)
        except Exception as error:  # noqa: BLE001 - told to the test
            _answer(error=f"{type(error).__name__}: {error}")
        else:
            _answer(value=value)


def _main() -> None:
    import ctypes
    import faulthandler
    import signal
    import time

    import ft_launcher
    from ft_launcher import procfs
    from ft_launcher.messages import LimitsSet, WorkloadAction, WorkloadControlRequest
    from ft_launcher.rank_monitor_client import SOCKET_ENV, STACK_SIGNAL, RankMonitorClient

    client = RankMonitorClient()
    silent = threading.Event()

    def beat() -> None:
        """Send heartbeats from a thread until `silent` is set."""

        def go() -> None:
            while not silent.wait(0.02):
                client.send_heartbeat()

        silent.clear()
        threading.Thread(target=go, daemon=True).start()

    def ask(number: int) -> bool:
        """Send the control request `number`."""
        request = WorkloadControlRequest(WorkloadAction.Continue, f"request {number}")
        return client.send_workload_control_request(request)

    def limits(heartbeat: float | None = None, **sections: float) -> LimitsSet:
        return LimitsSet(initial=None, heartbeat=heartbeat, sections=dict(sections), out_of_section=None)

    def state(heartbeat: float | None = None, **sections: float) -> dict[str, Any]:
        """Give a state dict with these timeouts."""
        return {"current_timeouts": {"heartbeat": {"subsequent": heartbeat}, "section": {"section": sections}}}

    def peer() -> Peer:
        return Peer(os.environ[SOCKET_ENV])

    def in_child(act: Any) -> Any:
        """Give what `act` gives in a forked child, or its error, as text."""
        read_end, write_end = os.pipe()
        if os.fork() == 0:
            try:
                text = repr(act())
            except BaseException as error:  # noqa: BLE001 - told to the test
                text = f"{type(error).__name__}: {error}"
            os.write(write_end, text.encode())
            os._exit(0)
        os.close(write_end)
        with open(read_end) as told:
            text = told.read()
        os.wait()
        return text

    _answer(value="ready")
    names = {"ctypes": ctypes, "faulthandler": faulthandler, "ft_launcher": ft_launcher, "os": os, "procfs": procfs}
    names |= {"signal": signal, "sys": sys, "threading": threading, "time": time, "encode": encode, "Hello": Hello}
    names |= {"STACK_SIGNAL": STACK_SIGNAL, "RankMonitorClient": RankMonitorClient, "client": client, "peer": peer}
    names |= {"silent": silent, "beat": beat, "ask": ask, "limits": limits, "state": state, "in_child": in_child}
    _obey(names | {"WorkloadAction": WorkloadAction, "WorkloadControlRequest": WorkloadControlRequest})


if __name__ == "__main__":
    _main()
