"""Every way to end has one printable sentence, one exit code in each style, and a place in the order of blame."""

import signal
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_launcher.causes import (
    Cause,
    Excluded,
    Exhausted,
    Exited,
    HostLost,
    Hung,
    LauncherSignalled,
    MonitorsFailed,
    NodeLost,
    NotMonitored,
    OutOfMemory,
    Preempted,
    Refused,
    ShutDown,
    Signalled,
    Stopped,
    TooFewNodes,
    Unkillable,
    exit_code,
    from_returncode,
    sentence,
    signal_name,
    worst,
)

SIGNALS = st.integers(1, 64)
OF_RANKS: st.SearchStrategy[Cause] = st.one_of(
    st.builds(Exited, st.integers(0, 255)),
    st.builds(Signalled, SIGNALS, st.sampled_from(["us", "unknown"]), st.booleans()),
    st.builds(Hung, st.text()),
    st.builds(OutOfMemory, st.none() | st.integers(0, 2**62)),
    st.builds(Stopped),
)
CAUSES: st.SearchStrategy[Cause] = st.one_of(
    OF_RANKS,
    st.builds(Excluded, st.none() | st.text()),
    st.builds(ShutDown, st.none() | st.text()),
    st.builds(LauncherSignalled, SIGNALS),
    st.builds(MonitorsFailed, st.text()),
    st.builds(NotMonitored),
    st.builds(Unkillable, st.integers(1, 2**22), st.sampled_from("DSTZ"), st.text()),
    st.builds(NodeLost, st.text(), st.text()),
    # A cause without a word would say nothing; the launcher has one for each.
    st.builds(HostLost, st.text(min_size=1)),
    st.builds(TooFewNodes, st.text(min_size=1)),
    st.builds(Refused, st.text(min_size=1)),
    st.builds(Exhausted, st.text(min_size=1)),
)


SENTENCES = [
    (Exited(7), "exited with code 7"),
    (Exited(137), "exited with code 137 (a shell's code for SIGKILL)"),
    (Signalled(signal.SIGSEGV), "killed by signal 11 (SIGSEGV, invalid memory reference)"),
    (Signalled(signal.SIGABRT), "killed by signal 6 (SIGABRT, it aborted itself)"),
    (
        Signalled(signal.SIGKILL),
        "killed by signal 9 (SIGKILL) that neither this launcher nor the kernel's OOM killer sent",
    ),
    (
        Signalled(signal.SIGKILL, oom_counted=False),
        (
            "killed by signal 9 (SIGKILL) that this launcher did not send; "
            "perhaps the OOM killer, whose count cannot be read here"
        ),
    ),
    (Signalled(signal.SIGKILL, "us"), "killed by signal 9 (SIGKILL) from this launcher"),
    (Signalled(signal.SIGTERM), "killed by signal 15 (SIGTERM, request to stop) that this launcher did not send"),
    (Signalled(signal.SIGUSR1), "killed by signal 10 (SIGUSR1) that this launcher did not send"),
    (Signalled(36), "killed by signal 36 (SIGRTMIN+2) that this launcher did not send"),
    (Signalled(32), "killed by signal 32 that this launcher did not send"),
    (
        Hung("section 'step' open for 12.3 s, timeout 12 s"),
        "hung: section 'step' open for 12.3 s, timeout 12 s; killed by its rank monitor",
    ),
    (OutOfMemory(16 << 30), "killed by the kernel's OOM killer (memory limit 16.0 GiB)"),
    (OutOfMemory(), "killed by the kernel's OOM killer (memory of the machine)"),
    (Stopped(), "stopped by this launcher because another rank failed"),
    (Excluded(), "a rank asked to exclude this node"),
    (Excluded("GPU 3 has ECC errors"), "a rank asked to exclude this node: GPU 3 has ECC errors"),
    (ShutDown("loss is NaN"), "a rank asked to shut the job down: loss is NaN"),
    (LauncherSignalled(signal.SIGTERM), "the launcher received signal 15 (SIGTERM)"),
    (MonitorsFailed("5 times in 60 s"), "the rank monitors keep failing: 5 times in 60 s"),
    (NotMonitored(), "no rank connected to its monitor, and monitoring is required"),
    (
        Unkillable(42, "D", "rank"),
        "process 42 (rank) does not die of SIGKILL: state D (uninterruptible: the kernel, usually a driver, holds it)",
    ),
    (Unkillable(42, "S"), "process 42 does not die of SIGKILL: state S"),
    (NodeLost("n2", "its launcher died"), "node n2 was lost: its launcher died"),
    (HostLost("the host n1 was lost"), "the host n1 was lost"),
    (TooFewNodes("1 node is there"), "1 node is there"),
    (Refused("n1 has --nnodes 2, n2 3"), "n1 has --nnodes 2, n2 3"),
    (Exhausted("no checkpoint is left"), "no checkpoint is left"),
    (Preempted(""), "preempted"),
    (Preempted("SIGTERM", "n1", 41), "preempted (SIGTERM at node n1): saved at step 41"),
    (Preempted("aws: terminate"), "preempted (aws: terminate)"),
    (
        Preempted("SIGTERM", step=41, unsaved="rank 1: at step 40"),
        "preempted (SIGTERM): saved at step 41; not saved in time: rank 1: at step 40",
    ),
]


def test_every_kind_of_cause_is_among_these():
    assert {type(cause) for cause, _ in SENTENCES} == set(get_args(Cause))


@pytest.mark.parametrize(("cause", "words"), SENTENCES)
def test_the_sentence(cause, words):
    assert sentence(cause) == words


@given(CAUSES)
def test_R16_a_sentence_is_one_printable_line(cause):
    words = sentence(cause)
    assert words
    assert words.isprintable()


def test_R16_a_description_cannot_forge_a_line():
    assert sentence(ShutDown("a\nft_launcher: ok\x1b[2J\x85")) == (
        "a rank asked to shut the job down: a\\nft_launcher: ok\\x1b[2J\\x85"
    )


@given(SIGNALS, st.sampled_from(["us", "unknown"]), st.booleans())
def test_every_signal_is_told_by_number_and_by_its_name_if_it_has_one(signum, by, oom_counted):
    words = sentence(Signalled(signum, by, oom_counted))
    assert words.startswith(f"killed by signal {signum}")
    # Python 3.10 does not know 16 (SIGSTKFLT); 32 and 33 belong to the C library.
    if signum > 33 or signum in set(signal.Signals):
        assert f"({signal.Signals(signum).name if signum <= 31 else 'SIGRT'}" in words


@given(SIGNALS)
def test_the_name_of_a_signal_leads_with_its_number(signum):
    assert signal_name(signum).split()[0] == str(signum)


@given(CAUSES)
def test_only_a_clean_exit_gives_0_and_every_other_cause_gives_a_code_in_both_styles(cause):
    for style in ("torchrun", "classified"):
        code = exit_code(cause, style)
        assert (code == 0) == (cause == Exited(0))
        assert 0 <= code <= 128 + 64
        # The code for a wrong command line, which two nodes can have only together.
        assert (code == 2) == isinstance(cause, Refused)


@given(CAUSES)
def test_in_torchruns_style_every_failure_is_1(cause):
    if isinstance(cause, LauncherSignalled | Refused | Preempted):
        return  # these have codes of their own
    assert exit_code(cause) == int(cause != Exited(0))


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (Excluded(), 75),
        (Unkillable(1, "D"), 75),
        (MonitorsFailed(""), 75),
        (ShutDown(), 93),
        (LauncherSignalled(signal.SIGTERM), 143),
        (Exited(7), 1),
        (Signalled(9), 1),
        (Hung(""), 1),
        (OutOfMemory(), 1),
        (NotMonitored(), 1),
        (HostLost(""), 75),
        (TooFewNodes(""), 75),
        (NodeLost("", ""), 1),
        (Refused(""), 2),
        (Exhausted(""), 93),
        (Preempted("SIGTERM"), 75),
        (Preempted("SIGTERM", unsaved="rank 1"), 1),
        (Exited(0), 0),
    ],
)
def test_the_classified_code(cause, code):
    assert exit_code(cause, "classified") == code


def test_the_code_for_a_preempted_job_is_the_same_in_both_styles():
    assert exit_code(Preempted("SIGTERM")) == exit_code(Preempted("SIGTERM"), "classified")


@pytest.mark.parametrize(("returncode", "cause"), [(0, Exited(0)), (3, Exited(3)), (-11, Signalled(11))])
def test_a_returncode_becomes_a_cause(returncode, cause):
    assert from_returncode(returncode) == cause


def test_a_signal_of_ours_is_known_as_such():
    assert from_returncode(-15, by="us") == Signalled(15, "us")


@given(st.lists(CAUSES))
def test_the_worst_is_one_of_them(causes):
    assert worst(causes) in causes or (causes == [] and worst(causes) is None)


@given(st.permutations([Hung("h"), Exited(1), Stopped(), Signalled(15, "us"), Exited(0)]))
def test_a_hang_is_the_root_in_any_order(causes):
    assert worst(causes) == Hung("h")


@pytest.mark.parametrize("root", [Hung("h"), OutOfMemory(), Exited(1), Signalled(11), Signalled(9)])
@pytest.mark.parametrize("consequence", [Stopped(), Signalled(15, "us"), Exited(0)])
def test_what_we_stopped_is_never_the_root(root, consequence):
    assert worst([consequence, root]) == root == worst([root, consequence])


def test_of_equals_the_first_in_time_is_the_root():
    # Which of a crash and an exit came of the other only time can tell: a peer's abort may follow a rank's exit.
    assert worst([Exited(1), Signalled(6)]) == Exited(1)
    assert worst([Signalled(11), Exited(1)]) == Signalled(11)


@pytest.mark.parametrize(
    "end",
    [
        LauncherSignalled(15),
        Excluded(),
        ShutDown(),
        MonitorsFailed(""),
        NotMonitored(),
        Unkillable(1, "D"),
        NodeLost("", ""),
        HostLost(""),
        TooFewNodes(""),
        Refused(""),
        Exhausted(""),
        Preempted("SIGTERM"),
    ],
)
@given(causes=st.lists(OF_RANKS))
def test_what_ends_the_node_comes_before_what_its_ranks_did(end, causes):
    assert worst([*causes, end]) == end
