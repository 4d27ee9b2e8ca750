"""Seals of what nodes tell each other: nobody without the token can make one, move it to another key, or change it.

A seal is a keyed BLAKE2b (RFC 7693) of the key and the body. It hides nothing: what is sealed can be read by whoever
sees it. A leader makes and checks two for each node and round: an HMAC-SHA256 would take it three times as long.
"""

import hashlib
import hmac
import os
import stat
from pathlib import Path

from ft_launcher.errors import UsageError

__all__ = ["SEAL_BYTES", "Seal", "SealBrokenError", "derive_token", "prefix", "read_token"]

SEAL_BYTES = 32
"""By so much a sealed value is longer than its body."""

MIN_TOKEN_BYTES = 16
MAX_TOKEN_BYTES = 4096


class SealBrokenError(ValueError):
    """The value was not sealed for this key with this token, or was changed since."""


class Seal:
    """Seals values for keys with a token that all nodes of the job have."""

    def __init__(self, token: bytes) -> None:
        # BLAKE2b takes keys of up to 64 bytes; tokens may be longer.
        self._keyed = hashlib.blake2b(key=hashlib.blake2b(token).digest(), digest_size=SEAL_BYTES)

    def seal(self, key: str, body: bytes) -> bytes:
        """Give `body` with its seal. `key` says what it is for, and has no NUL in it."""
        return body + self._seal_of(key, body)

    def open(self, key: str, value: bytes) -> bytes:
        """Give the body of a sealed value. Raises SealBrokenError."""
        body = value[:-SEAL_BYTES]
        if not hmac.compare_digest(self._seal_of(key, body), value[-SEAL_BYTES:]):
            raise SealBrokenError(f"the seal of {key!r} is broken ({len(value)} bytes)")
        return body

    def _seal_of(self, key: str, body: bytes) -> bytes:
        seal = self._keyed.copy()
        seal.update(b"%b\0%b" % (key.encode(), body))
        return seal.digest()


def derive_token(given: bytes | None, run_id: str) -> bytes:
    """Give the token to seal with: the given one, else one that follows from the run id.

    The latter keeps jobs from mistaking each other's values, but whoever knows the run id can seal too.
    """
    return given or hashlib.sha256(b"ft_launcher\0" + run_id.encode()).digest()


def prefix(token: bytes, run_id: str) -> str:
    """Give what the names of a job begin with (16 hexadecimal digits): no other job's do, and none can be guessed."""
    return hmac.digest(token, run_id.encode(), "sha256")[:8].hex()


def read_token(path: str | Path) -> bytes:
    """Give the token in a file, without white space around it. Raises UsageError when others can read the file."""
    try:
        # Without O_NONBLOCK, a pipe given by mistake would have us wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"--ft-token-file {path}: {error.strerror}") from error
    try:
        wrong = _what_is_wrong(os.fstat(descriptor))
        if wrong is not None:
            raise UsageError(f"--ft-token-file {path}: {wrong}")
        token = os.read(descriptor, MAX_TOKEN_BYTES + 1).strip()
    finally:
        os.close(descriptor)
    if not MIN_TOKEN_BYTES <= len(token) <= MAX_TOKEN_BYTES:
        raise UsageError(f"--ft-token-file {path}: must hold {MIN_TOKEN_BYTES} to {MAX_TOKEN_BYTES} bytes of token")
    return token


def _what_is_wrong(status: os.stat_result) -> str | None:
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, must be yours ({os.geteuid()})"
    if mode not in (0o400, 0o600):
        return f"has mode {mode:04o}, must be 0600 or 0400 (chmod 600)"
    return None
