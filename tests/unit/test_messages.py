"""The wire: every message survives it, and nothing else gets through."""

import contextlib
import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_launcher.ladder import Checkpoint
from ft_launcher.messages import (
    MAX_MESSAGE_BYTES,
    CheckpointSaved,
    ControlRequested,
    Hello,
    LimitsSet,
    ProtocolError,
    RankHung,
    RankReported,
    RankStarted,
    ResumedFrom,
    Welcome,
    WorkloadAction,
    decode_from_launcher,
    decode_from_monitor,
    decode_from_rank,
    decode_to_rank,
    encode,
)
from ft_launcher.watch import Limits

DECODERS: list[Callable[[bytes], object]] = [
    decode_from_rank,
    decode_to_rank,
    decode_from_launcher,
    decode_from_monitor,
]


@pytest.mark.parametrize(
    ("message", "decode"),
    [
        (Hello(protocol=1, stack_signal=43), decode_from_rank),
        (
            LimitsSet(initial=1.5, heartbeat=None, sections={"step": 2.0, "other": None}, out_of_section=3.0),
            decode_from_rank,
        ),
        (ControlRequested(7, WorkloadAction.ExcludeThisNode, "ECC error"), decode_from_rank),
        (RankStarted(42, 99, 1.5, "stacks.txt", None, Limits(heartbeat=2.0)), decode_from_launcher),
        (ResumedFrom(8, Checkpoint(None, 0)), decode_from_rank),
        (CheckpointSaved(9, Checkpoint("/c/30")), decode_from_rank),
        (RankHung(42, "no heartbeat", 1.5, "stacks.txt"), decode_from_monitor),
        (RankReported(42, ResumedFrom(8, Checkpoint("/c/30", 30))), decode_from_monitor),
        (RankReported(42, CheckpointSaved(8, Checkpoint("/c/30", 30))), decode_from_monitor),
    ],
)
def test_a_message_is_the_same_behind_the_wire(message, decode):
    assert decode(encode(message)) == message


def test_the_configuration_goes_through_the_monitor_unread():
    inner = encode({"a": [1, 2.5, None]})
    welcome = decode_to_rank(encode(Welcome(protocol=1, config=msgspec.Raw(inner))))
    assert isinstance(welcome, Welcome)
    assert bytes(welcome.config) == inner


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\xc1",
        encode({"type": "hello", "protocol": 1}),
        encode({"type": "hello", "protocol": "1", "stack_signal": 1}),
        encode({"type": "hello", "protocol": 1, "stack_signal": 65}),
        encode({"type": "no such", "protocol": 1}),
        encode({"type": "control", "number": 1, "action": "exclude_this_node", "description": "x" * 513}),
        encode({"type": "control", "number": 1, "action": "reboot"}),
        encode({"type": "limits", "initial": -1, "heartbeat": 1, "sections": {}, "out_of_section": None}),
        encode({"type": "resumed", "number": 1, "checkpoint": {"path": "x" * 513, "step": 1}}),
        encode({"type": "resumed", "number": 1, "checkpoint": {"path": "", "step": 1}}),
        encode({"type": "saved", "number": 1, "checkpoint": {"path": "x", "step": -1}}),
        b"\xa4\xff\xff\xff\xff",
    ],
)
def test_C2_what_is_no_message_is_refused_with_one_kind_of_error(packet):
    with pytest.raises(ProtocolError):
        decode_from_rank(packet)


def test_C2_a_rank_cannot_send_what_only_the_launcher_sends():
    with pytest.raises(ProtocolError):
        decode_from_rank(encode(RankStarted(42, 99, 1.5, "stacks.txt")))


@given(st.binary(max_size=200))
def test_C2_random_bytes_give_a_message_or_the_one_error(packet):
    for decode in DECODERS:
        with contextlib.suppress(ProtocolError):
            decode(packet)


def test_C2_half_a_million_mutated_frames_give_a_message_or_the_one_error():
    pick = random.Random(1)
    seeds = [
        encode(Hello(protocol=1, stack_signal=43)),
        encode(ControlRequested(7, WorkloadAction.ShutdownWorkload, "änderung")),
        encode(LimitsSet(initial=1.5, heartbeat=None, sections={"schritt": 2.0}, out_of_section=3.0)),
    ]
    refused = 0
    for _ in range(500_000):
        frame = bytearray(pick.choice(seeds))
        for _ in range(pick.randint(1, 3)):
            frame[pick.randrange(len(frame))] = pick.randrange(256)
        try:
            decode_from_rank(bytes(frame))
        except ProtocolError:
            refused += 1
    assert 400_000 < refused < 500_000


def test_the_longest_lawful_message_fits_into_one_packet():
    sections: dict[str, float | None] = {f"{number:064d}": 123456.789 for number in range(256)}
    packet = encode(LimitsSet(initial=1.0, heartbeat=1.0, sections=sections, out_of_section=1.0))
    assert len(packet) <= MAX_MESSAGE_BYTES
