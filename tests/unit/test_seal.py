"""Seals: what was not made for this key with this token is refused."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_launcher.errors import UsageError
from ft_launcher.seal import SEAL_BYTES, Seal, SealBrokenError, derive_token, prefix, read_token

SEAL = Seal(b"a token of some bytes")
KEYS = st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF), max_size=20)


@given(KEYS, st.binary(max_size=200))
def test_what_was_sealed_opens(key: str, body: bytes) -> None:
    value = SEAL.seal(key, body)
    assert len(value) == len(body) + SEAL_BYTES
    assert SEAL.open(key, value) == body


@given(KEYS, KEYS, st.binary(max_size=50))
def test_a_value_replayed_under_another_key_is_refused(key: str, other: str, body: bytes) -> None:
    value = SEAL.seal(key, body)
    if other != key:
        with pytest.raises(SealBrokenError, match="seal of"):
            SEAL.open(other, value)


def test_a_flip_of_any_bit_is_refused() -> None:
    value = SEAL.seal("mail/a/1", b"the body")
    for bit in range(len(value) * 8):
        flipped = bytearray(value)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealBrokenError):
            SEAL.open("mail/a/1", bytes(flipped))


def test_what_is_too_short_or_too_long_is_refused() -> None:
    value = SEAL.seal("key", b"the body")
    for wrong in [*(value[:length] for length in range(len(value))), value + b"\0", b"\0" + value]:
        with pytest.raises(SealBrokenError):
            SEAL.open("key", wrong)


def test_another_token_does_not_open_it() -> None:
    with pytest.raises(SealBrokenError):
        Seal(b"another token of bytes").open("key", SEAL.seal("key", b"body"))


def test_without_a_token_it_follows_from_the_run_id() -> None:
    assert derive_token(b"given", "bert") == b"given"
    assert derive_token(None, "bert") == derive_token(None, "bert") != derive_token(None, "gpt")
    assert len(derive_token(None, "bert")) == 32


def test_the_prefix_differs_by_token_and_by_run() -> None:
    names = {prefix(token, run) for token in (b"one", b"two") for run in ("bert", "gpt")}
    assert len(names) == 4
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in names)


def test_ten_thousand_seals_take_no_time_that_matters() -> None:
    # 21 ms here. The leader seals one value for each node and round; this is no benchmark, but finds a slow way.
    began = time.process_time()
    for number in range(10_000):
        SEAL.seal("mail/0123456789abcdef/1", b"%100d" % number)
    assert time.process_time() - began < 0.3


def token_file(path: Path, mode: int, text: bytes = b"0123456789abcdef\n") -> Path:
    file = path / "token"
    file.write_bytes(text)
    file.chmod(mode)
    return file


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_a_token_is_read_from_a_file_that_only_its_owner_can_read(tmp_path: Path, mode: int) -> None:
    assert read_token(token_file(tmp_path, mode)) == b"0123456789abcdef"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o700, 0o660])
def test_a_token_that_others_can_read_is_refused_with_path_and_mode(tmp_path: Path, mode: int) -> None:
    file = token_file(tmp_path, mode)
    with pytest.raises(UsageError, match=rf"{file}: has mode {mode:04o}, must be 0600 or 0400"):
        read_token(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_token_that_is_somebody_elses_is_refused(tmp_path: Path) -> None:
    file = token_file(tmp_path, 0o600)
    os.chown(file, 12345, -1)
    with pytest.raises(UsageError, match="belongs to user 12345, must be yours"):
        read_token(file)


@pytest.mark.parametrize("text", [b"", b"short\n", b"\n" * 30, b"x" * 5000])
def test_a_token_of_a_useless_length_is_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(UsageError, match="must hold 16 to 4096 bytes"):
        read_token(token_file(tmp_path, 0o600, text))


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, why in {"none": "No such file", "pipe": "not a regular file", ".": "not a regular file"}.items():
        with pytest.raises(UsageError, match=rf"--ft-token-file {tmp_path / name}: {why}"):
            read_token(tmp_path / name)
