"""Make a chosen rank fail in a chosen way, at a chosen step of a chosen restart."""

import argparse
import ctypes
import difflib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NoReturn

KINDS = {
    "crash": "raises an exception",
    "exit": "exits with code 3",
    "kill": "kills itself with SIGKILL",
    "segv": "reads address 0",
    "hang": "sleeps for ever in Python",
    "hang-c": "sleeps for ever in C code that holds the GIL",
    "hang-outer": "stays in its section 'step' for ever and opens and closes 'checkpointing' inside",
    "hang-before-connect": "sleeps for ever before it connects to its monitor; 'step' does not matter",
    "hang-after-shutdown": "sleeps for ever after its last call of the client; 'step' does not matter",
    "stop": "stops itself with SIGSTOP; goes on if continued",
    "ignore-sigterm": "ignores SIGTERM from its start, sleeps for ever at the step: crash a peer there",
    "orphan": "starts children in sessions of their own, one of them double-forked, then crashes",
}

FAULT_HELP = "\n".join(
    [
        "--fault KIND:rank=R,step=S,restart=K makes rank R fail at step S (from 1; 1 if not given) of",
        "restart K (0 is the first start, and the default). KIND, and what the rank then does:",
        *(f"  {kind:<20}{what}" for kind, what in KINDS.items()),
    ]
)

Section = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Fault:
    kind: str
    rank: int
    step: int = 1
    restart: int = 0


def parse_fault(text: str) -> Fault:
    """Read `KIND:rank=R,step=S,restart=K`; the last two may be left out."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KINDS)}"
        raise argparse.ArgumentTypeError(f"{text!r}: no kind {kind!r}; {hint}")
    places: dict[str, int] = {}
    for part in rest.split(",") if rest else []:
        name, _, number = part.partition("=")
        if name not in ("rank", "step", "restart") or name in places or not (number.isascii() and number.isdigit()):
            raise argparse.ArgumentTypeError(
                f"{text!r}: {part!r} must be one of rank=N, step=N, restart=N, each once, N a whole number"
            )
        places[name] = int(number)
    if "rank" not in places:
        raise argparse.ArgumentTypeError(f"{text!r}: which rank? Write {kind}:rank=N")
    if places.get("step") == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: the first step is 1")
    return Fault(kind, **places)


class Faults:
    """The faults of this rank in this restart; training tells it where it is."""

    def __init__(self, faults: Iterable[Fault], *, rank: int, restart: int) -> None:
        self._mine = [fault for fault in faults if (fault.rank, fault.restart) == (rank, restart)]

    def before_connecting(self) -> None:
        for fault in self._mine:
            if fault.kind == "ignore-sigterm":
                # Now, not at its step: there the SIGTERM for a peer's crash could come before this line.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if fault.kind == "hang-before-connect":
                announce(fault)
                sleep_for_ever()

    def at_step(self, step: int, section: Section) -> None:
        for fault in self._mine:
            if fault.step == step and fault.kind not in ("hang-before-connect", "hang-after-shutdown"):
                announce(fault)
                fail(fault, section)

    def after_shutdown(self) -> None:
        for fault in self._mine:
            if fault.kind == "hang-after-shutdown":
                announce(fault)
                sleep_for_ever()


def fail(fault: Fault, section: Section) -> None:
    match fault.kind:
        case "crash":
            raise RuntimeError(f"simulated crash of rank {fault.rank} at step {fault.step}")
        case "exit":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segv":
            ctypes.string_at(0)
        case "hang" | "ignore-sigterm":
            sleep_for_ever()
        case "hang-c":
            while True:  # a signal with a handler ends a sleep in C
                ctypes.PyDLL(None).sleep(10**6)
        case "hang-outer":
            while True:
                with section("checkpointing"):
                    time.sleep(0.01)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "orphan":
            pids = start_orphans()
            say(f"fault: rank {fault.rank} leaves {' '.join(map(str, pids))} behind")
            raise RuntimeError(f"simulated crash of rank {fault.rank} at step {fault.step}, with orphans")


def sleep_for_ever() -> NoReturn:
    while True:
        time.sleep(3600)


def start_orphans() -> list[int]:
    """Start a child in a session of its own and a grandchild whose parent has gone; their pids."""
    child = subprocess.Popen(["sleep", "infinity"], start_new_session=True)
    # The shell's child leads no group, so setsid need not fork: the pid stays the one that the shell prints.
    command = "setsid sleep infinity </dev/null >/dev/null 2>&1 & echo $!"
    shell = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    return [child.pid, int(shell.stdout)]


def announce(fault: Fault) -> None:
    place = f"rank {fault.rank} (pid {os.getpid()}) at step {fault.step} of restart {fault.restart}"
    say(f"fault: {place}: {fault.kind}")


def say(line: str) -> None:
    """Print a line for sure in one write: with python -u, print makes two, and the lines of two ranks mix."""
    print(line + "\n", end="", flush=True)
