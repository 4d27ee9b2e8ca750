"""Two ranks that take steps together, and save for notices; what they have saved is in files.

They meet over a socket, as in a collective: who comes first waits for the other, and fails when that is gone. With
torch's collectives a start would take five times as long.
"""

import argparse
import json
import os
import signal
import socket
import time
from pathlib import Path

from ft_launcher import RankMonitorClient

RANK = int(os.environ["RANK"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--begin-when", help="this file is there")
    parser.add_argument("--stay", action="store_true", help="go on after a save")
    parser.add_argument("--end-after-saves", type=int, default=0)
    parser.add_argument("--save-until", help="this file is there")
    parser.add_argument("--save-at-once", type=int, help="the rank that does not wait for it")
    parser.add_argument("--deaf", type=int, help="the rank that never asks")
    parser.add_argument("--fail-once-saving", action="store_true", help="rank 1, before its first save")
    options = parser.parse_args()
    say(f"has pid {os.getpid()}")
    if options.begin_when:
        wait_for(options.directory / options.begin_when)
    client = RankMonitorClient()
    client.init_workload_monitoring()
    with connect(options.directory) as other:
        train(options, client, other)
    client.shutdown_workload_monitoring()


def connect(directory: Path) -> socket.socket:
    """Give a connection to the other rank of this attempt."""
    address = directory / f"{os.getppid()}.{os.environ['TORCHELASTIC_RESTART_COUNT']}.address"
    if RANK == 1:
        wait_for(address)
        return socket.create_connection(("127.0.0.1", int(address.read_text())))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        temporary = address.with_suffix(".part")
        temporary.write_text(str(listener.getsockname()[1]))
        temporary.replace(address)
        return listener.accept()[0]


def meet(other: socket.socket) -> None:
    """Wait for the other rank to come here too."""
    other.sendall(b"x")
    if not other.recv(1):
        raise ConnectionError("the other rank is gone")


def train(options: argparse.Namespace, client: RankMonitorClient, other: socket.socket) -> None:
    checkpoint, saves = options.directory / "checkpoint.json", 0
    first = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
    say(f"begins at step {first}")
    for step in range(first, options.steps):
        is_saving = options.deaf != RANK and client.should_checkpoint(step)
        if is_saving:
            save(options, checkpoint, step, other)
            saves += 1
            if not options.stay:
                client.exit_for_preemption()
            if saves == options.end_after_saves:
                client.should_checkpoint(step + 1)  # as the next step would
                return
        if not is_saving or not options.save_until:
            meet(other)
        if step - first <= 5:
            say(f"at step {step - first}")
        time.sleep(0.005)  # others want to use the machine


def save(options: argparse.Namespace, checkpoint: Path, step: int, other: socket.socket) -> None:
    if options.fail_once_saving and RANK == 1 and not (options.directory / "failed").exists():
        (options.directory / "failed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    say("is saving")
    if options.save_until and options.save_at_once != RANK:
        wait_for(options.directory / options.save_until)
    (options.directory / f"saved.{step}.{RANK}").touch()
    if RANK == 0:
        temporary = checkpoint.with_suffix(".part")
        temporary.write_text(json.dumps({"step": step}))
        temporary.replace(checkpoint)
    if not options.save_until:
        meet(other)


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def say(text: str) -> None:
    # In one write, so that lines of several ranks do not mix.
    os.write(1, f"rank {RANK} {text}\n".encode())


if __name__ == "__main__":
    main()
