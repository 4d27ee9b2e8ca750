"""Hosts made of network namespaces on a bridge, so that a link is cut, and a machine loses power, for real."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import GENEROUS, Running, Sandbox, wait_until_gone

NAMES = ("node1", "node2", "node10")
"""In the order of the alphabet node10 would be the second: every rank that a test expects is in natural order."""


class Host:
    """One machine: a network namespace with a name, an address and files in /etc of its own."""

    def __init__(self, sandbox: Sandbox, token: str, number: int, name: str) -> None:
        self.name = name
        self.namespace = f"ft{token}-{number}"
        self.address = f"{_subnet(token)}.{number}"
        self.disk = sandbox.path / f"disk-{name}"
        self._link = f"v{number}-{token}"
        self._sandbox = sandbox

    def plug_in(self, bridge: str, hosts_file: str) -> None:
        """Make the namespace, and join it to the bridge."""
        self.disk.mkdir()
        etc = Path("/etc/netns", self.namespace)
        etc.mkdir(parents=True)
        (etc / "hosts").write_text(hosts_file)
        # Nobody listens there, which is heard at once: a name that is not in the file above costs no waiting.
        (etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        _ip("link", "set", self._link, "master", bridge, "up")
        _ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.namespace, "link", "set", "eth0", "up")
        _ip("-n", self.namespace, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Take away whatever of it is there."""
        # The namespace itself goes in the background; a name for the next test must be free now.
        _try_ip("link", "del", self._link)
        _try_ip("netns", "del", self.namespace)
        shutil.rmtree(Path("/etc/netns", self.namespace), ignore_errors=True)

    def start(self, *command: str, **env: str) -> Running:
        """Start a command on this host."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        rename = ["sh", "-c", 'hostname "$0"; exec "$@"', self.name]
        own = {"TMPDIR": str(self.disk), "XDG_RUNTIME_DIR": str(self.disk)}
        return self._sandbox.start(*enter, *rename, *command, **own | env)

    def launch(self, *arguments: str, **env: str) -> Running:
        """Start ft_launcher with `arguments` on this host."""
        return self.start(sys.executable, "-m", "ft_launcher", *arguments, **{"GLOO_SOCKET_IFNAME": "eth0"} | env)

    def believe(self, address: str, name: str) -> None:
        """Let /etc/hosts of this host say something else of `name`, for what is started from now on."""
        file = Path("/etc/netns", self.namespace, "hosts")
        others = [line for line in file.read_text().splitlines() if line.split()[1] != name]
        file.write_text("\n".join([f"{address} {name}", *others]) + "\n")

    def pids(self) -> list[int]:
        """Give the processes that are on this host."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def cut(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self._link, "down")

    def heal(self) -> None:
        """Plug the cable in again."""
        _ip("link", "set", self._link, "up")

    @contextmanager
    def cut_for(self, seconds: float) -> Iterator[None]:
        """Run the block with the cable pulled, and plug it in when `seconds` have passed."""
        self.cut()
        end = time.monotonic() + seconds
        yield
        # The time is the fault's own; nothing is awaited with it.
        threading.Event().wait(end - time.monotonic())
        self.heal()

    def lose_what_goes_to(self, other: "Host") -> None:
        """From now on lose each packet on its way to `other`, while what comes from there arrives."""
        # To a machine that nobody is: the sender hears of no error, as it would from a route that says no.
        nobody = ("lladdr", "02:00:00:00:00:fe", "dev", "eth0", "nud", "permanent")
        _ip("-n", self.namespace, "neigh", "replace", other.address, *nobody)

    def lose_power(self) -> None:
        """End without a word: the network is gone before the processes are, and hears of none of them.

        What would have been cleaned up is gone too, as all that is in the memory of a machine.
        """
        self.cut()
        pids = self.pids()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert wait_until_gone(pids, GENEROUS) == []
        shutil.rmtree(self.disk)


@contextmanager
def network(sandbox: Sandbox) -> Iterator[list[Host]]:
    """Give three hosts that reach each other and nobody else; skip, and say why, where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make network namespaces")
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} (Debian's iproute2 and util-linux)")
    token = uuid.uuid4().hex[:6]
    bridge = f"br-{token}"
    hosts = [Host(sandbox, token, number, name) for number, name in enumerate(NAMES, 1)]
    hosts_file = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)
    try:
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("link", "set", bridge, "up")
            for host in hosts:
                host.plug_in(bridge, hosts_file)
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}")
        yield hosts
    finally:
        # Who lives on a host keeps it there.
        sandbox.close()
        left = [f"process {pid}" for host in hosts if _exists(host) for pid in host.pids()]
        for host in hosts:
            host.remove()
        _try_ip("link", "del", bridge)
    left += [line for line in (_ip("link", "show") + _ip("netns", "list")).splitlines() if token in line]
    left += [host.namespace for host in hosts if Path("/etc/netns", host.namespace).exists()]
    left += [str(path.relative_to(sandbox.path)) for host in hosts for path in host.disk.rglob("*")]
    assert left == [], f"left behind: {left}"


def _subnet(token: str) -> str:
    return f"10.{int(token[:2], 16)}.{int(token[2:4], 16)}"


def _exists(host: Host) -> bool:
    return Path("/run/netns", host.namespace).exists()


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def _try_ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=False, capture_output=True)
