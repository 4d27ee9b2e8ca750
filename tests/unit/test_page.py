"""The shared page: what is written is what is read, and nothing a rank writes there upsets its reader."""

import os
import random
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_launcher.page import MAX_SECTIONS, PAGE_BYTES, Slot, StampPage, create_page
from ft_launcher.watch import Progress


@pytest.fixture
def pages():
    """One page, mapped twice: as the rank and as its monitor map it."""
    fd = create_page()
    writer, reader = StampPage(fd), StampPage(fd)
    yield writer, reader
    writer.close()
    reader.close()
    os.close(fd)


def test_a_fresh_page_says_nothing(pages):
    _, reader = pages
    stamps = reader.read()
    assert (stamps.heartbeat, stamps.connected, stamps.teardown, stamps.used_sections) == (None, None, None, False)
    assert stamps.open_sections == {}


def test_a_heartbeat_is_seen_at_once_in_seconds_of_the_monotonic_clock(pages):
    writer, reader = pages
    before = time.monotonic()
    writer.begin()
    writer.stamps[Slot.HEARTBEAT] = time.monotonic_ns()
    heartbeat = reader.read().heartbeat
    assert heartbeat is not None
    assert before <= heartbeat <= time.monotonic()


@given(st.lists(st.text(min_size=1, max_size=16), unique=True, min_size=1, max_size=20))
def test_open_sections_are_read_by_the_names_they_were_opened_with(names):
    fd = create_page()
    page = StampPage(fd)
    try:
        page.begin()
        for index, name in enumerate(names):
            page.stamps[page.section_slot(name)] = (index + 1) * 1_000_000_000
        stripped = {name.rstrip("\0"): index + 1.0 for index, name in enumerate(names)}
        assert page.read().open_sections == pytest.approx(stripped)
    finally:
        page.close()
        os.close(fd)


def test_C14_names_that_are_empty_or_too_long_or_too_many_are_refused(pages):
    writer, _ = pages
    writer.begin()
    with pytest.raises(ValueError, match="1 to 64 bytes of UTF-8, '' has 0"):
        writer.section_slot("")
    with pytest.raises(ValueError, match="has 65"):
        writer.section_slot("x" * 65)
    with pytest.raises(ValueError, match="has 66"):
        writer.section_slot("é" * 33)
    for number in range(MAX_SECTIONS):
        writer.section_slot(f"section {number}")
    with pytest.raises(ValueError, match="'one more' would be number 257"):
        writer.section_slot("one more")


@given(st.integers(0, 2**32), st.sampled_from([-1, 0, 1, 3, 256, 2**62]))
def test_reading_survives_whatever_a_rank_wrote(seed, count):
    page = StampPage(-1)
    try:
        page._map[:] = random.Random(seed).randbytes(PAGE_BYTES)
        page.stamps[Slot.SECTIONS] = count
        page.read()
    finally:
        page.close()


OPENS_AND_CLOSES = """
import sys, time
from ft_launcher.page import StampPage
stamps, slot = StampPage(int(sys.argv[1])).stamps, int(sys.argv[2])
while True:
    stamps[slot] = time.monotonic_ns()
    stamps[slot] = 0
"""


def test_a_section_that_is_closed_while_the_page_is_read_was_not_open_since_the_machine_started(pages):
    writer, reader = pages
    writer.begin()
    begin = reader.read().connected
    slot = writer.section_slot("step")
    rank = subprocess.Popen([sys.executable, "-c", OPENS_AND_CLOSES, str(writer.fd), str(slot)], pass_fds=[writer.fd])
    try:
        seen: set[float] = set()
        while len(seen) < 2000:
            seen.update(reader.read().open_sections.values())
            assert rank.poll() is None
    finally:
        rank.kill()
        rank.wait()
    assert min(seen) >= begin


def test_R18_a_program_that_begins_anew_leaves_nothing_of_the_one_before(pages):
    writer, reader = pages
    writer.begin()
    writer.stamps[Slot.HEARTBEAT] = 1
    writer.stamps[writer.section_slot("step")] = 1
    assert reader.read().reconnected is None
    after_exec = StampPage(writer.fd)
    after_exec.begin()
    stamps = reader.read()
    after_exec.close()
    assert (stamps.heartbeat, stamps.used_sections, stamps.open_sections) == (None, False, {})
    assert stamps.reconnected is not None


def test_what_a_page_said_moves_to_another_but_for_the_monitors_own_stamp(pages):
    writer, reader = pages
    writer.stamps[Slot.LOOKED] = 7
    private = StampPage(-1)
    private.begin()
    private.stamps[private.section_slot("step")] = 9_000_000_000
    private.stamps[Slot.LOOKED] = 1
    private.stamps[Slot.ASKED] = 42
    private.stamps[Slot.NOTICE] = -1
    writer.stamps[Slot.LEASE], writer.stamps[Slot.STOPPED] = 8, 1
    writer.stamps[Slot.NOTICE], writer.stamps[Slot.SAVE_AT] = 3, 43
    writer.copy_from(private)
    private.close()
    assert reader.read().lease == pytest.approx(8e-9)
    assert reader.read().open_sections == {"step": pytest.approx(9.0)}
    assert reader.stamps[Slot.LOOKED] == 7
    assert (reader.stamps[Slot.NOTICE], reader.stamps[Slot.SAVE_AT], reader.stamps[Slot.STOPPED]) == (3, 43, 1)
    assert reader.progress() == Progress(asked=41, step=41)
    assert reader.stamps[writer.section_slot("step")] == 9_000_000_000
