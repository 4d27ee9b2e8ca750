"""What a rank's script calls: it never waits for a monitor, speaks for nobody else, and says what is wrong."""

import json
import os
import signal

import pytest

import ft_launcher
from ft_launcher import RankMonitorClient, RankMonitorClientError, WorkloadAction, WorkloadControlRequest
from ft_launcher.messages import RankConnected, RankHung
from tests.processes.conftest import RankError


def open_sections(watch, local_rank=0):
    return sorted(watch.monitors.stamps(local_rank).open_sections)


# -- never waiting ----------------------------------------------------------------------------------------------------


def test_C1_no_heartbeat_section_or_shutdown_waits_for_a_monitor_that_is_stopped(watch):
    watch = watch()
    rank = watch.start_connected()
    watch.signal_monitor(signal.SIGSTOP)
    work = """
for step in range(20_000):
    client.send_heartbeat()
    with client.section("step"):
        client.start_section("inner")
        client.end_all_sections()
"""
    rank.run_without_launcher(work)
    # Nor while another thread does wait for it.
    rank.run_without_launcher("asking = threading.Thread(target=ask, args=(1,)); asking.start()")
    rank.run_without_launcher(work)
    rank.run_without_launcher("client.start_section('open'); client.shutdown_workload_monitoring()")
    assert rank.run_without_launcher("asking.is_alive()") is True
    stamps = watch.monitors.stamps(0)
    assert stamps.teardown >= stamps.heartbeat
    assert open_sections(watch) == ["open"]
    watch.signal_monitor(signal.SIGCONT)
    rank.run("asking.join()")
    assert watch.requests() == {"request 1"}


def test_C1_a_rank_that_starts_beside_a_stopped_monitor_goes_on_and_is_watched_later(watch):
    watch = watch(rank_section_timeouts={"step": 60}, rank_heartbeat_timeout=77)
    rank = watch.start()
    watch.signal_monitor(signal.SIGSTOP)
    rank.run_without_launcher("client.init_workload_monitoring()")
    rank.run_without_launcher("client.send_heartbeat(); client.start_section('step')")
    assert rank.run_without_launcher("client.is_initialized") is True
    assert watch.monitors.stamps(0).heartbeat is None
    watch.signal_monitor(signal.SIGCONT)
    watch.next(RankConnected)
    # What it did meanwhile counts as if the monitor had been there.
    watch.until(lambda: watch.monitors.stamps(0).heartbeat is not None, "the page of the rank")
    assert open_sections(watch) == ["step"]
    watch.until(lambda: rank.run("client.cfg.rank_heartbeat_timeout") == 77, "the configuration")
    opened_at = watch.monitors.stamps(0).open_sections["step"]
    rank.begin("client.load_state_dict(state(step=0.1)); signal.pause()")
    hung = watch.next(RankHung)
    lasted = hung.killed_at - opened_at
    assert hung.cause == f"section 'step' open for {lasted:.{1 if lasted >= 10 else 2}f} s, timeout 0.1 s"
    assert "most recent call first" in watch.stacks()


# -- forked and spawned children, threads, signals --------------------------------------------------------------------


def test_C9_a_forked_child_neither_writes_the_page_nor_speaks(watch):
    watch = watch()
    rank = watch.start_connected()
    rank.run("client.send_heartbeat(); client.start_section('mine')")
    rank.run(
        """
def use_everything():
    client.send_heartbeat()
    client.start_section("other")
    client.end_section("other")
    client.end_all_sections()
    client.load_state_dict(state(heartbeat=0.1))
    client.abort()
    asked = ask(1)
    client.shutdown_workload_monitoring()
    try:
        client.init_workload_monitoring()
    except RankMonitorClientError as error:
        return asked, str(error)

"""
    )
    before = watch.monitors.stamps(0)
    refusal = "a forked child never speaks for its parent: make a client of its own"
    assert rank.run("in_child(use_everything)") == repr((False, refusal))
    # Not even while the parent is not connected either.
    watch.signal_monitor(signal.SIGKILL)
    watch.until(lambda: watch.monitors.filenos() and not watch.is_monitor_gone(), "another monitor")
    assert rank.run("in_child(use_everything)") == repr((False, refusal))
    assert watch.monitors.stamps(0) == before
    assert watch.requests() == set()
    assert watch.limits() is None
    assert rank.run("ask(2)") is True
    rank.run("client.end_section('mine')")
    assert open_sections(watch) == []


def test_C9_a_forked_child_does_not_answer_the_signal_for_stacks(watch):
    watch = watch()
    rank = watch.start_connected()
    assert rank.run("procfs.catches(os.getpid(), STACK_SIGNAL)") is True
    assert rank.run("in_child(lambda: procfs.catches(os.getpid(), STACK_SIGNAL))") == "False"
    # A child that forks again, and a client that was never used, are as good as new.
    assert rank.run("in_child(lambda: in_child(lambda: procfs.catches(os.getpid(), STACK_SIGNAL)))") == "'False'"


def test_a_client_that_was_not_used_before_the_fork_speaks_for_the_child(watch):
    watch = watch()
    rank = watch.start()
    child = "in_child(lambda: [client.init_workload_monitoring(), client.start_section('child'), ask(1)])"
    assert rank.run(child) == "[None, None, True]"
    assert open_sections(watch) == ["child"]


def test_a_fork_while_other_threads_use_the_client_gives_a_child_that_can(watch):
    watch = watch()
    rank = watch.start_connected()
    rank.run(
        """
def toggle(name):
    while not silent.is_set():
        client.start_section(name)
        client.end_section(name)

for name in "abcd":
    threading.Thread(target=toggle, args=(name,), daemon=True).start()
"""
    )
    child = "in_child(lambda: [client.start_section('child'), client.end_section('child')])"
    assert set(rank.run(f"[{child} for _ in range(50)]")) == {"[None, None]"}
    rank.run("silent.set()")


def test_eight_threads_may_open_and_close_sections_at_once(watch):
    watch = watch()
    rank = watch.start_connected()
    rank.run(
        """
sys.setswitchinterval(1e-6)
failed = []

def work(thread):
    try:
        start.wait()
        for round in range(5):
            for section in range(31):
                client.start_section(f"{thread}.{section}")
                client.send_heartbeat()
                client.end_section(f"{thread}.{section}")
        client.start_section(f"{thread}.30")
    except Exception as error:
        failed.append(repr(error))

for trial in range(40):
    # Every name is new again: a slot may be given away only once.
    client.shutdown_workload_monitoring()
    client.init_workload_monitoring()
    start = threading.Barrier(8)
    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""
    )
    assert rank.run("failed") == []
    assert open_sections(watch) == [f"{thread}.30" for thread in range(8)]
    rank.run("client.end_all_sections()")
    assert open_sections(watch) == []


def test_a_signal_handler_may_use_the_client_while_the_main_thread_does(watch):
    watch = watch()
    rank = watch.start_connected()
    rank.run("signal.signal(signal.SIGUSR1, lambda *_: (client.send_heartbeat(), client.end_all_sections()))")
    rank.begin("for _ in range(100_000):\n    with client.section('step'): pass")
    while not rank.has_answered():
        rank.process.send(signal.SIGUSR1)
    rank.answer()
    assert open_sections(watch) == []


# -- wrong use --------------------------------------------------------------------------------------------------------

NEEDS_INIT = [
    "client.send_heartbeat()",
    "client.start_section('step')",
    "client.end_section('step')",
    "client.end_all_sections()",
    "client.section('step').__enter__()",
    "client.calculate_and_set_hb_timeouts()",
    "client.calculate_and_set_section_timeouts()",
    "client.shutdown_workload_monitoring()",
]


def test_C13_a_client_used_before_its_start_or_after_its_end_says_so(watch):
    watch = watch()
    rank = watch.start()
    for call in NEEDS_INIT:
        with pytest.raises(RankError, match=r"^RankMonitorClientError: monitoring is off: call init"):
            rank.run(call)
    # These need none.
    rank.run("client.abort(); client.state_dict(); client.load_state_dict(client.state_dict())")
    assert rank.run("ask(1)") is True
    rank.run("client.init_workload_monitoring()")
    with pytest.raises(RankError, match="init_workload_monitoring\\(\\) was called already"):
        rank.run("client.init_workload_monitoring()")
    rank.run("client.shutdown_workload_monitoring()")
    for call in NEEDS_INIT:
        with pytest.raises(RankError, match="monitoring is off"):
            rank.run(call)
    assert rank.run("ask(2)") is True
    assert watch.requests() == {"request 1", "request 2"}
    # And it may begin again.
    rank.run("client.init_workload_monitoring(); client.send_heartbeat()")
    assert watch.monitors.stamps(0).teardown is None


def test_C13_a_child_that_multiprocessing_has_spawned_is_refused_beside_its_rank(watch):
    watch = watch()
    rank = watch.start_connected()
    assert rank.run("in_spawned_child(init_another)") == (
        "the rank monitor refused this process: another process speaks for this rank already"
    )
    rank.run("client.shutdown_workload_monitoring()")
    assert rank.run("in_spawned_child(init_another)") == "welcome"


def test_C13_without_the_launcher_a_client_says_who_is_missing():
    assert "FT_RANK_MONITOR_IPC_SOCKET" not in os.environ
    client = RankMonitorClient()
    for call in (
        client.init_workload_monitoring,
        lambda: client.send_workload_control_request(WorkloadControlRequest(WorkloadAction.Continue)),
    ):
        with pytest.raises(RankMonitorClientError, match="this process was not started by ft_launcher"):
            call()


def test_C14_sections_opened_twice_or_closed_unopened_or_misnamed_are_errors_and_change_nothing(watch):
    watch = watch()
    rank = watch.start_connected()
    rank.run("client.start_section('step')")
    before = watch.monitors.stamps(0)
    for call, complaint in (
        ("client.start_section('step')", "section 'step' is open already"),
        ("client.section('step').__enter__()", "section 'step' is open already"),
        ("client.end_section('other')", "section 'other' is not open"),
        ("client.start_section('')", "a section's name has 1 to 64 bytes of UTF-8, '' has 0"),
        ("client.start_section('\\u00e4' * 33)", f"a section's name has 1 to 64 bytes of UTF-8, '{'ä' * 33}' has 66"),
        ("client.start_section('x' * 10**6)", f"a section's name has 1 to 64 bytes of UTF-8, '{'x' * 80}' has 1000000"),
    ):
        with pytest.raises(RankError) as raised:
            rank.run(call)
        assert str(raised.value) == f"RankMonitorClientError: {complaint}"
    assert watch.monitors.stamps(0) == before
    rank.run("for n in range(254): client.start_section(str(n))")
    with pytest.raises(RankError, match="section 'more' would be number 257; 256 different names are allowed"):
        rank.run("client.start_section('more')")
    rank.run("client.end_all_sections(); client.start_section('0')")
    assert open_sections(watch) == ["0"]


# -- sections, the end, requests --------------------------------------------------------------------------------------


def test_sections_nest_and_overlap_in_any_order(watch):
    watch = watch(rank_out_of_section_timeout=1, rank_section_timeouts={"a": 60, "b": 60})
    rank = watch.start_connected()
    rank.run("client.start_section('a'); client.start_section('b')")
    assert open_sections(watch) == ["a", "b"]
    rank.run("client.end_section('a')")
    assert open_sections(watch) == ["b"]
    rank.run("client.start_section('a'); client.end_section('b')")
    assert open_sections(watch) == ["a"]
    rank.run("client.end_section('a')")
    # Only while none is open does this timeout count, and from the end of the last.
    idle_since = watch.monitors.stamps(0).idle_since
    hung = watch.next(RankHung)
    assert hung.cause == f"no section open for {hung.killed_at - idle_since:.2f} s, timeout 1 s"


def test_a_section_ends_with_its_block_and_with_what_goes_wrong_there(watch):
    watch = watch()
    rank = watch.start_connected()
    rank.run(
        """
seen = []
with client.section("outer"):
    with client.section("inner"):
        seen.append(sorted(client._page.read().open_sections))
    seen.append(sorted(client._page.read().open_sections))
    with contextlib.suppress(KeyError), client.section("wrong"):
        raise KeyError
    seen.append(sorted(client._page.read().open_sections))
    client.end_all_sections()
    seen.append(sorted(client._page.read().open_sections))
"""
    )
    assert rank.run("seen") == [["inner", "outer"], ["outer"], ["outer"], []]
    # What closes the section early is no error, and neither is the end of the monitoring.
    rank.run("with client.section('last'): client.shutdown_workload_monitoring()")


def test_after_abort_only_the_teardown_timeout_counts(watch):
    watch = watch(
        rank_section_timeouts={"step": 1}, rank_heartbeat_timeout=1, rank_teardown_timeout=2.5, rank_startup_timeout=30
    )
    rank = watch.start_connected()
    rank.run("client.send_heartbeat(); client.start_section('step'); client.abort()")
    aborted_at = watch.monitors.stamps(0).teardown
    hung = watch.next(RankHung)
    assert hung.cause == (
        f"not ended after it stopped its monitoring for {hung.killed_at - aborted_at:.2f} s, timeout 2.5 s"
    )


def test_a_client_as_a_context_manager_begins_and_ends_the_monitoring(watch):
    watch = watch()
    rank = watch.start()
    rank.run("with client: seen = [client.is_initialized, client._page.read().teardown]")
    assert rank.run("[*seen, client.is_initialized]") == [True, None, False]
    assert watch.monitors.stamps(0).teardown is not None
    with pytest.raises(RankError, match="KeyError"):
        rank.run("with client: raise KeyError")
    assert rank.run("client.is_initialized") is False
    assert watch.monitors.stamps(0).teardown is not None
    # Ended inside already: no error.
    rank.run("with client: client.shutdown_workload_monitoring()")


def test_a_client_knows_its_rank_and_the_configuration(watch):
    watch = watch(rank_section_timeouts={"step": 7}, rank_out_of_section_timeout=8, rank_heartbeat_timeout=9)
    rank = watch.start()
    rank.run("os.environ.update(RANK='5', LOCAL_RANK='1'); client.init_workload_monitoring()")
    assert rank.run("[client.rank_info.global_rank, client.rank_info.local_rank, client.rank_info.pid]") == [
        5,
        1,
        rank.pid,
    ]
    assert rank.run("[client.cfg.rank_section_timeouts, client.section_timeouts.section]") == [{"step": 7}, {"step": 7}]
    assert rank.run("[client.section_timeouts.out_of_section, client.hb_timeouts.subsequent]") == [8, 9]


def test_connect_gives_a_client_that_is_monitoring_under_the_launcher(watch):
    watch = watch()
    rank = watch.start()
    assert rank.run("type(client := ft_launcher.connect()).__name__") == "RankMonitorClient"
    rank.run("client.send_heartbeat()")
    assert watch.monitors.stamps(0).heartbeat is not None


def test_connect_gives_a_client_that_does_nothing_without_the_launcher():
    client = ft_launcher.connect()
    assert isinstance(client, ft_launcher.NoMonitorClient)
    with client, client.section("step"):
        client.init_workload_monitoring()
        client.send_heartbeat()
        client.end_section("never opened")
        client.start_section("step")
        client.start_section("step")
        client.end_all_sections()
        client.abort()
        assert client.calculate_and_set_hb_timeouts() is False
        assert client.calculate_and_set_section_timeouts(["step"]) is False
        assert client.process_group_timeout() is None
        assert client.send_workload_control_request(WorkloadControlRequest(WorkloadAction.ShutdownWorkload)) is False
        client.load_state_dict(client.state_dict())
        client.shutdown_workload_monitoring()
    assert client.is_initialized is False


# -- timeouts ---------------------------------------------------------------------------------------------------------

UNLIMITED = {"initial_rank_heartbeat_timeout": None, "rank_heartbeat_timeout": None}


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        ({"rank_section_timeouts": {"save": 900.0, "step": 9.0, "free": None}}, 900 + 5 + 60),
        ({"rank_out_of_section_timeout": 1000.0, "rank_termination_grace": 9.0}, 1000 + 9 + 60),
        ({"rank_heartbeat_timeout": 2000.0}, 2000 + 5 + 60),
        ({"rank_startup_timeout": 2000.0}, 2000 + 5 + 60),
        ({"rank_heartbeat_timeout": 3.0}, 600),
        ({"rank_teardown_timeout": 9000.0}, None),
    ],
)
def test_a_process_group_is_given_more_than_every_limit_but_that_of_the_teardown(watch, settings, seconds):
    rank = watch(**UNLIMITED | settings).start_connected()
    given = "(None if (timeout := client.process_group_timeout()) is None else timeout.total_seconds())"
    assert rank.run(given) == seconds


@pytest.mark.parametrize("sign", ["client.send_heartbeat()", "client.start_section('setup')"])
def test_the_limit_on_the_first_sign_of_life_counts_for_a_process_group_until_it_is_there(watch, sign):
    rank = watch(initial_rank_heartbeat_timeout=2000.0, rank_heartbeat_timeout=700.0).start_connected()
    assert rank.run("client.process_group_timeout().total_seconds()") == 2000 + 5 + 60
    rank.run(sign)
    assert rank.run("client.process_group_timeout().total_seconds()") == 700 + 5 + 60


def test_calculated_limits_count_for_a_process_group(watch):
    rank = watch(**UNLIMITED).start_connected()
    rank.run("client.load_state_dict(state(heartbeat=1234.0))")
    assert rank.run("client.process_group_timeout().total_seconds()") == 1234 + 5 + 60
    rank.run("client.shutdown_workload_monitoring()")
    with pytest.raises(RankError, match="monitoring is off"):
        rank.run("client.process_group_timeout()")


def test_timeouts_loaded_from_a_checkpoint_are_in_force_from_the_start(watch):
    watch = watch(rank_heartbeat_timeout=60)
    rank = watch.start()
    rank.run("client.load_state_dict(state(heartbeat=1.0, step=50.0)); client.init_workload_monitoring()")
    saved = rank.run("client.state_dict()")
    assert saved["current_timeouts"]["heartbeat"]["subsequent"] == 1.0
    assert saved["current_timeouts"]["section"]["section"] == {"step": 50.0}
    rank.run("client.send_heartbeat()")
    assert watch.next(RankHung).cause.endswith("timeout 1 s")


@pytest.mark.parametrize("state", [{}, {"current_timeouts": 1}, {"current_timeouts": {"heartbeat": {"initial": "x"}}}])
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(RankMonitorClientError, match="not a state of RankMonitorClient: "):
        RankMonitorClient().load_state_dict(state)


def test_timeouts_are_calculated_from_what_all_ranks_have_seen(watch):
    watch = watch(2, rank_heartbeat_timeout=60, rank_section_timeouts={"step": 60, "save": 60}, safety_factor=5)
    ranks = [watch.start_connected(local_rank) for local_rank in range(2)]

    def on_all(*code):
        """The values, or errors, of the code on both ranks at once; the last is for those that are left."""
        for rank, each in zip(ranks, code * 2, strict=False):
            rank.begin(each)
        return [rank.answer_or_error() for rank in ranks]

    calculate = "client.calculate_and_set_hb_timeouts()"
    assert (
        on_all(calculate)
        == ["RankMonitorClientError: timeouts are calculated over all ranks: call init_process_group() first"] * 2
    )
    store = watch.sandbox.path / "store"
    init = f"import torch.distributed as dist; dist.init_process_group('gloo', 'file://{store}', world_size=2, rank="
    on_all(f"{init}0)", f"{init}1)")

    # One rank is ready, the other is not.
    beats = "client.send_heartbeat(); silent.wait({}); client.send_heartbeat()"
    ranks[0].run(beats.format(0.6))
    assert on_all("client.calculate_and_set_hb_timeouts(skip_if_not_ready=True)") == [False] * 2
    assert (
        on_all(calculate)
        == ["RankMonitorClientError: too early to calculate timeouts: every rank needs two heartbeats"] * 2
    )
    ranks[1].run(f"{beats.format(0.2)}; beat()")
    ranks[0].run("beat()")
    assert on_all(calculate) == [True] * 2
    (first, second) = on_all("[client.hb_timeouts.initial, client.hb_timeouts.subsequent]")
    assert first == second
    assert second[1] >= 5 * 0.6
    assert watch.limits(0) == watch.limits(1)
    assert [watch.limits(0).initial, watch.limits(0).heartbeat] == second
    assert watch.limits(0).sections == {"step": 60, "save": 60}

    ranks[0].run("with client.section('step'): silent.wait(0.3)")
    ranks[1].run("with client.section('step'): pass\nwith client.section('save'): pass")
    calculate = "client.calculate_and_set_section_timeouts({})"
    assert on_all(calculate.format("['step']"), calculate.format("['step', 'save']")) == [
        "RankMonitorClientError: the ranks have different sections; this one has step",
        "RankMonitorClientError: the ranks have different sections; this one has save, step",
    ]
    assert on_all(calculate.format("skip_if_not_ready=True")) == [False] * 2
    assert on_all(calculate.format("['step'], calc_out_of_section=False")) == [True] * 2
    (first, second) = on_all("client.section_timeouts.section")
    assert first == second
    assert first["step"] >= 5 * 0.3
    assert first["save"] == 60
    assert watch.limits(1).sections == first
    assert watch.limits(1).out_of_section is None

    # What was calculated ends a hang, and goes with the checkpoint to the next start.
    saved = json.loads(json.dumps(ranks[0].run("client.state_dict()")))
    timeout = watch.limits(0).heartbeat
    ranks[0].run("silent.set()")
    assert watch.next(RankHung).cause.endswith(f"timeout {timeout:g} s")
    watch.monitors.ranks_ended()
    restarted = watch.start()
    restarted.run(f"client.load_state_dict({saved!r}); client.init_workload_monitoring()")
    assert watch.limits(0).heartbeat == timeout
    assert watch.limits(0).sections == first
    assert restarted.run("client.state_dict()") == saved
