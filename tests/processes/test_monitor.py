"""Rank monitors and what may befall them: killed, stopped, wedged, flooded, lied to. The rank's deadlines hold."""

import os
import random
import re
import select
import shutil
import signal
import stat
from pathlib import Path

import psutil
import pytest

from ft_launcher.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL,
    RankConnected,
    RankHung,
    Refused,
    encode,
)
from ft_launcher.monitors import RESPAWNS, MonitorsFailedError
from ft_launcher.processes import wait_gone
from tests.processes.driven_rank import GENEROUS, HELLO


def reason(hung):
    """What the sentence says but for how long it has lasted, which is at least the timeout."""
    found = re.fullmatch(r"(.*) for (.*) s, timeout (.*) s", hung.cause)
    assert found, hung.cause
    what, lasted, timeout = found.groups()
    assert float(lasted) >= float(timeout)
    return f"{what}, {timeout} s"


def open_files(pid):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


# -- monitors that die or stop --------------------------------------------------------------------------------------


def test_M1_twenty_killed_monitors_cost_no_request_no_rank_and_no_hang(watch):
    # Four ranks and five kills each: a sixth within a minute would be M8.
    local_ranks = range(4)
    watch = watch(4, rank_heartbeat_timeout=5)
    ranks = [watch.start_connected(local_rank) for local_rank in local_ranks]
    for rank in ranks:
        rank.run("beat()")
    for kill in range(RESPAWNS):
        if kill % 2:
            for local_rank in local_ranks:
                watch.signal_monitor(signal.SIGKILL, local_rank)
        for rank in ranks:
            rank.begin(f"ask({kill})")
        if not kill % 2:
            for local_rank in local_ranks:
                watch.signal_monitor(signal.SIGKILL, local_rank)
        assert [rank.answer() for rank in ranks] == [True] * 4
    for local_rank in local_ranks:
        assert watch.requests(local_rank) == {f"request {kill}" for kill in range(RESPAWNS)}
    assert watch.all_heard(RankHung) == []
    assert all(rank.is_alive() for rank in ranks)

    ranks[2].run("silent.set()")
    hung = watch.next(RankHung, local_rank=2)
    assert hung.pid == ranks[2].pid
    assert reason(hung) == "no heartbeat, 5 s"
    assert ranks[2].wait() == -signal.SIGKILL
    assert [rank.is_alive() for rank in ranks] == [True, True, False, True]


def test_M1_a_wait_that_began_before_the_kill_of_a_monitor_is_counted_from_its_beginning(watch):
    watch = watch(rank_section_timeouts={"step": 2})
    rank = watch.start_connected()
    rank.run("client.start_section('step')")
    opened_at = watch.monitors.stamps(0).open_sections["step"]
    watch.signal_monitor(signal.SIGKILL)
    hung = watch.next(RankHung)
    assert hung.cause == f"section 'step' open for {hung.killed_at - opened_at:.2f} s, timeout 2 s"
    assert rank.wait() == -signal.SIGKILL


def test_M1_timeouts_that_a_rank_has_set_survive_its_monitor(watch):
    watch = watch()
    rank = watch.start_connected()
    rank.run("client.load_state_dict(state(heartbeat=1.0))")
    watch.signal_monitor(signal.SIGKILL)
    rank.run("client.send_heartbeat()")
    assert reason(watch.next(RankHung)) == "no heartbeat, 1 s"


def test_M1_what_a_monitor_has_acknowledged_is_heard_though_it_died_with_something_unread(watch):
    watch = watch()
    rank = watch.start_connected()
    assert rank.run_without_launcher("ask(1)") is True
    watch.signal_monitor(signal.SIGSTOP)
    watch.monitors.job_connected()
    watch.signal_monitor(signal.SIGKILL)
    assert watch.is_monitor_gone(within=GENEROUS)
    assert watch.requests() == {"request 1"}


def test_M2_a_stopped_monitor_is_replaced_and_what_it_missed_is_made_up_for(watch):
    watch = watch(3, rank_heartbeat_timeout=1)
    hanging, asking, setting = (watch.start_connected(local_rank) for local_rank in range(3))
    asking.run("beat()")
    setting.run("beat()")
    before = watch.monitors.pids()
    for local_rank in range(3):
        watch.signal_monitor(signal.SIGSTOP, local_rank)
    asking.begin("ask(1)")
    setting.begin("client.load_state_dict(state(heartbeat=None, step=1.5))")
    hanging.run("client.send_heartbeat()")

    assert watch.next(RankHung, local_rank=0).pid == hanging.pid
    assert hanging.wait() == -signal.SIGKILL
    assert asking.answer() is True
    assert watch.requests(local_rank=1) == {"request 1"}
    setting.answer()
    assert before.isdisjoint(watch.monitors.pids())
    # The heartbeat timeout that was configured is not in force any more; the section's is.
    setting.run("silent.set(); client.start_section('step')")
    assert reason(watch.next(RankHung, local_rank=2)) == "section 'step' open, 1.5 s"
    assert asking.is_alive()


def test_M3_a_monitor_that_is_wedged_in_a_system_call_is_replaced(watch):
    watch = watch(rank_heartbeat_timeout=1)
    rank = watch.start_connected()
    wedged = watch.monitor_pid()
    # It opens this for writing, and nobody reads: as with a file server that has gone.
    os.mkfifo(f"{watch.stacks_path()}.part")
    rank.run("client.send_heartbeat()")
    # The disk is no part of the kill.
    watch.next(RankHung)
    assert rank.wait() == -signal.SIGKILL
    watch.until(lambda: watch.monitor_pid() != wedged or wedged_in_open(wedged), "a monitor that is wedged")
    assert watch.monitor_pid() == wedged
    Path(f"{watch.stacks_path()}.part").unlink()
    # The next process of the rank is watched all the same.
    watch.start_connected().run("client.send_heartbeat()")
    watch.next(RankHung)
    assert watch.monitor_pid() != wedged


def wedged_in_open(pid):
    return Path(f"/proc/{pid}/wchan").read_text() in ("wait_for_partner", "fifo_open")


def test_M5_sockets_that_were_removed_are_made_anew(watch):
    watch = watch(2, initial_rank_heartbeat_timeout=5)
    watch.monitors.job_connected()
    before = [watch.monitors.socket_path(local_rank) for local_rank in range(2)]
    watch.monitors.restore_sockets()
    assert [watch.monitors.socket_path(local_rank) for local_rank in range(2)] == before
    Path(before[0]).unlink()
    watch.monitors.restore_sockets()
    shutil.rmtree(Path(watch.monitors.socket_path(0)).parent)
    watch.monitors.restore_sockets()
    rank = watch.start_connected()
    rank.run("client.send_heartbeat()")
    watch.start(local_rank=1)
    # The new monitors know what was told to the old ones: that the script uses the client.
    assert reason(watch.next(RankHung, local_rank=1)) == "no heartbeat or section since its start, 5 s"
    assert rank.is_alive()


def test_M5_a_job_whose_run_directory_was_removed_can_still_restart(sandbox):
    script = sandbox.script(
        """
import os, shutil, sys
from ft_launcher import RankMonitorClient
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    shutil.rmtree(os.path.dirname(os.environ["FT_RANK_MONITOR_IPC_SOCKET"]))
    sys.exit(1)
with RankMonitorClient() as client:
    client.send_heartbeat()
    print("connected", client.cfg.rank_heartbeat_timeout)
"""
    )
    job = sandbox.launch("--nproc-per-node", "1", "--max-restarts", "1", "--ft-rank-heartbeat-timeout", "77", script)
    assert job.wait() == 0, job.output
    job.wait_for("were removed; making new ones")
    job.wait_for("connected 77.0")
    sandbox.assert_clean()


def test_M6_a_rank_is_not_blamed_for_a_time_in_which_the_machine_stood_still(watch):
    watch = watch(rank_heartbeat_timeout=2)
    rank = watch.start_connected()
    rank.run("client.send_heartbeat(); beat()")
    watch.signal_monitor(signal.SIGSTOP)
    rank.process.send(signal.SIGSTOP)
    assert wait_gone([rank.process.pidfd], 2.5), "killed by nobody"
    stopped_at = watch.looked()
    # The monitor first, so that it sees a rank that has not moved for longer than it may.
    watch.signal_monitor(signal.SIGCONT)
    watch.until(lambda: watch.looked() > stopped_at, "a look of the monitor")
    rank.process.send(signal.SIGCONT)
    rank.run("client.send_heartbeat()")
    continued_at = watch.looked()
    watch.until(lambda: watch.looked() > continued_at, "another look")
    assert watch.all_heard(RankHung) == []
    rank.run("silent.set()")
    watch.next(RankHung)


def test_M7_a_monitor_does_not_grow_with_the_messages_it_gets(watch):
    watch = watch()
    rank = watch.start_connected()
    monitor = psutil.Process(watch.monitor_pid())
    settings = "state(heartbeat=99.0, step=88.0)"
    rank.run(f"for n in range(1000): ask(n); client.load_state_dict({settings})")
    watch.heard.clear()
    before = monitor.memory_full_info().uss
    rank.run(f"for n in range(10_000): ask(n); client.load_state_dict({settings})")
    assert len(watch.requests()) == 10_000
    assert monitor.pid == watch.monitor_pid()
    assert monitor.memory_full_info().uss - before < 1 << 20


def test_M8_monitors_that_die_as_fast_as_they_are_started_are_given_up(watch):
    watch = watch(2)

    def kill_and_replace():
        pid = watch.monitor_pid(1)
        watch.signal_monitor(signal.SIGKILL, 1)
        watch.until(lambda: watch.monitor_pid(1) != pid, "another monitor")

    for _ in range(RESPAWNS):
        kill_and_replace()
    with pytest.raises(MonitorsFailedError, match="local rank 1 was lost 6 times within 60 s: hangs cannot be det"):
        kill_and_replace()


def test_M8_a_job_without_monitors_ends_and_says_why(sandbox, wait_for):
    script = sandbox.script("import signal\nprint('up', flush=True)\nsignal.pause()")
    job = sandbox.launch("--nproc-per-node", "1", "--max-restarts", "3", script)
    job.wait_for("up")
    killed = set()

    def another_monitor():
        children = psutil.Process(job.pid).children()
        return [each for each in children if each.pid not in killed and "rank_monitor_server" in str(each.cmdline())]

    for _ in range(RESPAWNS + 1):
        wait_for(another_monitor, "a monitor")
        [monitor] = another_monitor()
        monitor.kill()
        killed.add(monitor.pid)
    assert job.wait() == 1, job.output
    job.wait_for("ending the job: the rank monitors keep failing")
    assert "restart 1" not in job.output
    sandbox.assert_clean()


# -- who speaks, and what they say ------------------------------------------------------------------------------------


def hostile_packets():
    chance = random.Random(4)
    hello = encode({"type": "hello", "protocol": PROTOCOL, "stack_signal": 43})
    yield from (
        b"",
        b"\xc1",
        b"\x91" * 20_000,
        b"\x80",
        encode(None),
        encode([1, 2]),
        encode("\ud800".encode("utf-8", "surrogatepass")),
    )
    yield from (hello[:cut] for cut in range(1, len(hello)))
    yield from (hello + b"\0", hello.replace(b"hello", b"hell\xff"))
    yield from (encode({"type": kind}) for kind in ("hello", "control", "limits", "started", "settings", "?" * 20_000))
    yield encode({"type": "hello", "protocol": PROTOCOL, "stack_signal": 43, "pid": 1})
    yield encode({"type": "hello", "protocol": PROTOCOL, "stack_signal": -1})
    yield encode({"type": "hello", "protocol": str(PROTOCOL), "stack_signal": 43})
    for limit in (float("nan"), -1.0, 0, True, "1"):
        yield encode({"type": "limits", "initial": limit, "heartbeat": None, "sections": {}, "out_of_section": None})
    yield encode({"type": "limits", "initial": None, "heartbeat": None, "sections": {"x" * 65: 1}, "out_of_section": 1})
    yield encode({"type": "control", "number": 1, "action": "reboot", "description": None})
    yield encode({"type": "control", "number": 1, "action": "continue", "description": "x" * 513})
    yield from (chance.randbytes(chance.randrange(1, 200)) for _ in range(300))


def test_C2_malformed_frames_end_their_connection_and_nothing_else(watch):
    watch = watch(rank_heartbeat_timeout=3)
    rank = watch.start_connected()
    rank.run("beat(); ask(1)")
    monitor, files = watch.monitor_pid(), open_files(watch.monitor_pid())
    for packet in hostile_packets():
        peer = watch.connect()
        answer = peer.ask(packet)
        assert answer is None or isinstance(answer, Refused), packet
        if answer is not None:
            assert peer.hear() is None, packet
        peer.close()
    # Even from one that was greeted; it speaks for the rank, so the client's own connection ends.
    rank.run("peer = connect_raw()")
    rank.run("peer.ask(HELLO)")
    assert "Refused" in rank.run("peer.ask(b'garbage')")
    assert rank.run("peer.hear()") is None
    # Descriptors that nobody asked for are not kept.
    peer = watch.connect()
    peer.say(b"garbage", [0, 0, 0, 0])
    assert isinstance(peer.hear(), Refused)
    peer.close()

    assert rank.run("ask(2)") is True
    assert watch.requests() == {"request 1", "request 2"}
    assert watch.monitor_pid() == monitor
    assert open_files(monitor) == files
    assert watch.all_heard(RankHung) == []
    rank.run("silent.set()")
    watch.next(RankHung)


def test_C3_those_who_connect_and_say_nothing_hold_nobody_up(watch):
    watch = watch(2)
    connected, coming = watch.start_connected(0), watch.start(1)
    connected.run("link = client._link._socket")
    files = open_files(watch.monitor_pid(0))
    silent = [watch.connect(local_rank) for local_rank in (0, 1) for _ in range(50)]
    coming.run("client.init_workload_monitoring()")
    watch.next(RankConnected, local_rank=1)
    assert connected.run("ask(1)") is True
    assert connected.run("client._link._socket is link") is True
    # Only so many are kept; the rest has been hung up on.
    assert open_files(watch.monitor_pid(0)) < files + 20
    assert silent[0].hear() is None
    for peer in silent:
        peer.close()


def test_C4_a_huge_message_is_refused_unread(watch):
    watch = watch()
    rank = watch.start_connected()
    monitor = psutil.Process(watch.monitor_pid())
    before = monitor.memory_full_info().uss
    for _ in range(100):
        peer = watch.connect()
        assert peer.ask(b"x" * 150_000) == Refused(f"a message is longer than {MAX_MESSAGE_BYTES} bytes")
        assert peer.hear() is None
        peer.close()
    assert rank.run("ask(1)") is True
    assert monitor.pid == watch.monitor_pid()
    assert monitor.memory_full_info().uss - before < 1 << 20


def test_C5_a_flood_of_messages_hides_no_hang(watch):
    watch = watch(2, rank_heartbeat_timeout=1.5)
    flooding, other = watch.start_connected(0), watch.start_connected(1)
    monitor = watch.monitor_pid(0)
    # It never listens to an answer; its children fill its connection and connect by themselves, as fast as they can.
    flooding.run(
        """
def flood():
    while True:
        for _ in range(50):
            peer.say(b"x" * 1000)
        with contextlib.suppress(OSError):
            connect_raw().close()

peer = connect_raw()
peer.ask(HELLO)
for _ in range(2):
    if os.fork() == 0:
        flood()
for _ in range(1000):
    peer.say(limits(heartbeat=1.5))
"""
    )
    other.run("client.send_heartbeat()")
    assert reason(watch.next(RankHung, local_rank=1)) == "no heartbeat, 1.5 s"
    assert flooding.is_alive()
    flooding.run("client.send_heartbeat()")
    assert watch.next(RankHung, local_rank=0).pid == flooding.pid
    assert watch.monitor_pid(0) == monitor
    assert flooding.wait() == -signal.SIGKILL


def test_C5_requests_that_come_faster_than_the_launcher_hears_them_are_not_lost(watch):
    watch = watch()
    rank = watch.start_connected()
    rank.begin("[ask(n) for n in range(1000)]")
    # The launcher's socket holds a few hundred; the rank waits with the others.
    assert not select.select([rank.fd], [], [], 1)[0]
    assert set(rank.answer()) == {True}
    assert watch.requests() == {f"request {n}" for n in range(1000)}


def test_C6_another_version_of_the_protocol_is_refused_with_a_sentence(watch):
    watch = watch()
    rank = watch.start()
    rank.run("peer = connect_raw()")
    answer = rank.run("peer.ask(encode(Hello(protocol=PROTOCOL + 1, stack_signal=0))).reason")
    assert answer == f"it speaks protocol {PROTOCOL + 1}, this monitor {PROTOCOL}; use one version"
    assert watch.all_heard(RankConnected) == []
    rank.run("client.init_workload_monitoring()")


def test_C7_a_process_outside_of_the_ranks_tree_is_refused(watch):
    watch = watch(2)
    rank, other = watch.start(0), watch.start(1)
    peer = watch.connect(0)
    assert peer.ask(HELLO) == Refused(f"process {os.getpid()} is not the rank's (pid {rank.pid}) or its descendant")
    peer.close()
    # Another rank of the same launcher is not it either.
    path = watch.monitors.socket_path(0)
    assert "is not the rank's" in other.run(f"Peer({path!r}).ask(HELLO).reason")
    assert watch.all_heard(RankConnected) == []
    # A descendant is: the script may start Python itself.
    assert "Welcome" in rank.run("in_child(lambda: connect_raw().ask(HELLO))")
    watch.next(RankConnected, local_rank=0)


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
def test_C7_another_user_is_refused_though_it_stands_in_the_ranks_tree(watch):
    watch = watch()
    rank = watch.start()
    path = Path(watch.monitors.socket_path(0))
    rank.run(f"os.chdir({str(path.parent)!r})")
    as_nobody = "in_child(lambda: [os.setgid(65534), os.setuid(65534), Peer('m0').ask(HELLO)])"
    assert rank.run(as_nobody).startswith("PermissionError")
    # Permissions of both the directory and the socket are the first guards; the last one holds without them.
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path.parent, path)] == [0o700, 0o600]
    path.parent.chmod(0o711)
    assert rank.run(as_nobody).startswith("PermissionError")
    path.chmod(0o666)
    assert "Refused(reason='it belongs to another user')" in rank.run(as_nobody)


def test_C8_of_two_clients_of_one_process_the_newest_speaks(watch):
    watch = watch(rank_section_timeouts={"step": 1})
    rank = watch.start_connected()
    rank.run("second = RankMonitorClient(); second.init_workload_monitoring()")
    assert rank.run("[ask(1), second.is_initialized, ask(2)]") == [True, True, True]
    # Both write the same page.
    rank.run("client.start_section('step')")
    assert set(watch.monitors.stamps(0).open_sections) == {"step"}
    assert watch.next(RankHung).pid == rank.pid


def test_C8_another_process_is_refused_while_one_speaks_for_the_rank(watch):
    watch = watch(rank_heartbeat_timeout=2)
    rank = watch.start_connected()
    rank.run("beat()")
    refused = rank.run("in_child(lambda: connect_raw().ask(HELLO))")
    assert refused == "Refused(reason='another process speaks for this rank already')"
    # Nor while the rank is not connected, as its monitor was replaced.
    watch.signal_monitor(signal.SIGKILL)
    watch.until(lambda: not watch.is_monitor_gone(), "another monitor")
    assert rank.run("in_child(lambda: connect_raw().ask(HELLO))") == refused
    rank.run("silent.set()")
    watch.next(RankHung)


def test_C9_what_a_forked_child_says_over_its_parents_connection_counts_for_nothing(watch):
    watch = watch()
    rank = watch.start()
    rank.run("peer = connect_raw()")
    assert "Welcome" in rank.run("peer.ask(HELLO)")
    child = "in_child(lambda: [peer.say(limits(heartbeat=0.5)), peer.say(b'garbage')])"
    assert rank.run(child) == "[None, None]"
    rank.run("peer.say(limits(heartbeat=77.0))")
    # The parent's connection is as good as before, and it alone has set a timeout.
    assert "RequestAcknowledged" in rank.run("peer.hear()")
    assert watch.limits(0).heartbeat == 77.0


def test_a_rank_cannot_end_its_monitor_or_the_launcher_by_cutting_the_page_short(watch):
    watch = watch(rank_heartbeat_timeout=1)
    rank = watch.start_connected()
    cut = """
for fd in os.listdir("/proc/self/fd"):
    if "ft_launcher_page" in os.path.realpath(f"/proc/self/fd/{fd}"):
        os.ftruncate(int(fd), 0)
"""
    rank.run("answer, fds, _, _ = (peer := connect_raw()).say(HELLO) or socket.recv_fds(peer.socket, 32768, 2)")
    with pytest.raises(Exception, match="PermissionError"):
        rank.run(cut)
    rank.run("client.send_heartbeat()")
    watch.next(RankHung)


def test_a_rank_that_is_started_in_place_of_a_hung_one_is_not_killed_with_it(watch):
    watch = watch(rank_heartbeat_timeout=0.2)
    for _ in range(10):
        hung = watch.start_connected()
        hung.run("client.send_heartbeat()")
        watch.next(RankHung)
        # It looks just like the one before: same parent, same variables.
        watch.monitors.ranks_ended()
        following = watch.start()
        assert hung.wait() == -signal.SIGKILL
        assert following.run("1 + 1") == 2
        watch.monitors.ranks_ended()


# -- ranks that behave oddly ------------------------------------------------------------------------------------------


def test_R14_a_rank_that_closes_all_its_descriptors_is_still_watched(watch):
    watch = watch(rank_heartbeat_timeout=1)
    rank = watch.start_connected()
    rank.run("beat()")
    rank.run("os.closerange(3, 4096)")
    # It connects again by itself when it has something to say.
    assert rank.run("ask(1)") is True
    rank.run("os.closerange(3, 4096); silent.set()")
    hung = watch.next(RankHung)
    assert reason(hung) == "no heartbeat, 1 s"
    assert rank.wait() == -signal.SIGKILL
    assert "thread " in watch.stacks()


def test_R18_a_rank_that_executes_itself_anew_connects_again(watch, wait_for):
    watch = watch(rank_startup_timeout=5, rank_heartbeat_timeout=4, rank_section_timeouts={"step": 99})
    rank = watch.start_connected()
    rank.run("client.start_section('step'); client.send_heartbeat(); client.end_section('step')")
    started_at = watch.started_at(0)
    wait_for(lambda: rank.run("client.send_heartbeat()") or watch.looked() > started_at + 5, "the startup timeout")
    rank.begin("os.execv(sys.executable, sys.orig_argv)")
    assert rank.answer() == "ready"
    rank.run("client.init_workload_monitoring()")
    # The new program has the time to start that the old one had, and nothing of the old one's sections.
    connected_at = watch.monitors.stamps(0).reconnected
    assert connected_at is not None
    hung = watch.next(RankHung)
    lasted = hung.killed_at - connected_at
    assert hung.cause == f"no heartbeat or section since its start for {lasted:.2f} s, timeout 5 s"
    assert "most recent call first" in watch.stacks()


def test_R18_a_rank_that_executes_another_program_is_not_killed_by_the_signal_for_stacks(watch):
    watch = watch(rank_heartbeat_timeout=1, rank_termination_signal="SIGTERM")
    rank = watch.start_connected()
    rank.run("client.send_heartbeat()")
    rank.begin("os.execv('/bin/sleep', ['sleep', '1000'])")
    watch.next(RankHung)
    assert rank.wait() == -signal.SIGTERM
    text = watch.stacks()
    assert "none: the rank did not write any" in text
    assert "(sleep): S (sleeping)" in text


def test_R19_a_rank_that_never_connects_is_killed_only_once_another_one_has(watch, wait_for):
    watch = watch(2, initial_rank_heartbeat_timeout=0.5)
    silent, other = watch.start(0), watch.start(1)
    wait_for(lambda: watch.looked(0) > watch.started_at(0) + 1, "a look long after the timeout")
    watch.listen()
    assert watch.all_heard(RankHung) == []
    assert silent.is_alive()
    other.run("client.init_workload_monitoring(); client.send_heartbeat()")
    watch.next(RankConnected, local_rank=1)
    watch.monitors.job_connected()
    hung = watch.next(RankHung, local_rank=0)
    assert reason(hung) == "no heartbeat or section since its start, 0.5 s"
    assert other.is_alive()


def test_R19_a_rank_without_a_client_is_killed_by_the_startup_timeout_with_what_the_kernel_knows(watch):
    watch = watch(rank_startup_timeout=0.5)
    rank = watch.start_command("sleep", "1000")
    hung = watch.next(RankHung)
    assert hung.stacks_path == str(watch.stacks_path())
    # Not by the signal for stacks, which nobody there waits for.
    assert rank.wait() == -signal.SIGKILL
    text = watch.stacks()
    assert text.startswith(hung.cause)
    assert "none: the rank did not write any" in text
    assert f"thread {rank.pid} (sleep): S (sleeping)" in text


def test_R6_the_stacks_of_all_threads_are_saved_though_one_holds_the_gil_in_c(watch):
    watch = watch(rank_heartbeat_timeout=1)
    rank = watch.start_connected()
    rank.run(
        """
def waits_in_a_thread():
    silent.wait()

def reads_with_the_gil():
    ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)

threading.Thread(target=waits_in_a_thread, daemon=True).start()
client.send_heartbeat()
"""
    )
    rank.begin("reads_with_the_gil()")
    watch.next(RankHung)
    assert rank.wait() == -signal.SIGKILL
    stacks = watch.stacks()
    assert "in reads_with_the_gil" in stacks
    assert "in waits_in_a_thread" in stacks
    assert f"thread {rank.pid} (" in stacks
