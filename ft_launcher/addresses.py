"""Numeric addresses: which mean this machine only, which are its own, and a socket that listens at one."""

import socket

__all__ = ["LOOPBACK", "family_of", "is_loopback", "is_own", "listen", "names_loopback"]

LOOPBACK = "127.0.0.1"

BACKLOG = 4096
"""All nodes or workers of a large job connect at once; the kernel takes less where net.core.somaxconn says so."""


def family_of(address: str) -> socket.AddressFamily:
    """Give the family of a numeric address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def is_loopback(address: str) -> bool:
    """Say whether the address means another machine on each machine."""
    return address.startswith("127.") or address == "::1"


def names_loopback(host: str) -> bool:
    """Say whether somebody who wrote this means this very machine."""
    return host == "localhost" or is_loopback(host)


def is_own(address: str) -> bool:
    """Say whether the address is one of this machine's."""
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def listen(address: str, port: int) -> socket.socket:
    """Give a socket that listens at the address ("": all). Raises OSError when the port is taken."""
    listener = socket.socket(family_of(address), socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
