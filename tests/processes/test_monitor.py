"""Rank monitors and what may befall them: killed, stopped, wedged, flooded, lied to. The rank's deadlines hold."""

import os
import random
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest

from ft_launcher.errors import RankMonitorClientError
from ft_launcher.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL,
    ControlRequested,
    Hello,
    RankConnected,
    RankHung,
    Refused,
    Welcome,
    encode,
)
from ft_launcher.monitors import RESPAWNS, MonitorsFailedError
from ft_launcher.processes import wait_gone
from tests.processes.driven_rank import GENEROUS, HELLO, limits


def requests(watch, local_rank=None):
    """The texts of the control requests that the launcher holds, each once: one may come twice."""
    watch.listen()
    return {request.description for request in watch.all_heard(ControlRequested, local_rank)}


def open_files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


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
        assert requests(watch, local_rank) == {f"request {kill}" for kill in range(RESPAWNS)}
    assert watch.all_heard(RankHung) == []
    assert all(rank.is_alive() for rank in ranks)

    ranks[2].run("silent.set()")
    hung = watch.next(RankHung, local_rank=2)
    assert hung.pid == ranks[2].pid
    assert hung.cause.startswith("no heartbeat for 5.")
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
    assert watch.next(RankHung).cause.endswith("timeout 1 s")


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
    assert requests(watch, local_rank=1) == {"request 1"}
    setting.answer()
    assert before.isdisjoint(watch.monitors.pids())
    # The heartbeat timeout that was configured is not in force any more; the section's is.
    setting.run("silent.set(); client.start_section('step')")
    assert watch.next(RankHung, local_rank=2).cause.startswith("section 'step' open for 1.5")
    assert asking.is_alive()


def test_M3_a_monitor_that_is_wedged_in_a_system_call_is_replaced(watch):
    watch = watch(rank_heartbeat_timeout=1)
    rank = watch.start_connected()
    wedged = watch.monitor_pid()
    # It opens this for writing, and nobody reads: as with a file server that has gone.
    os.mkfifo(watch.stacks_path())
    rank.run("client.send_heartbeat()")
    watch.until(lambda: watch.monitor_pid() != wedged or wedged_in_open(wedged), "a monitor that is wedged")
    assert watch.monitor_pid() == wedged
    watch.stacks_path().unlink()
    watch.next(RankHung)
    assert rank.wait() == -signal.SIGKILL
    assert watch.monitor_pid() != wedged


def wedged_in_open(pid):
    return Path(f"/proc/{pid}/wchan").read_text() in ("wait_for_partner", "fifo_open")


def test_M5_sockets_that_were_removed_are_made_anew(watch):
    watch = watch(2, initial_rank_heartbeat_timeout=1)
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
    assert watch.next(RankHung, local_rank=1).cause.startswith("no heartbeat or section since its start")
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
    rank.run("beat()")
    watch.signal_monitor(signal.SIGSTOP)
    rank.process.send(signal.SIGSTOP)
    assert wait_gone([rank.process.pidfd], 2.5), "killed by nobody"
    stopped_at = watch.looked()
    # The monitor first, so that it sees a rank that has not moved for longer than it may.
    watch.signal_monitor(signal.SIGCONT)
    watch.until(lambda: watch.looked() > stopped_at, "a look of the monitor")
    rank.process.send(signal.SIGCONT)
    rank.run("client.send_heartbeat()")
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
    assert len(requests(watch)) == 10_000
    assert monitor.pid == watch.monitor_pid()
    assert monitor.memory_full_info().uss - before < 1 << 20


def test_M8_monitors_that_die_as_fast_as_they_are_started_are_given_up(watch):
    watch = watch(2)
    with pytest.raises(MonitorsFailedError, match="local rank 1 was lost 6 times within 60 s: hangs cannot be detecte"):
        for _ in range(RESPAWNS + 1):
            pid = watch.monitor_pid(1)
            watch.signal_monitor(signal.SIGKILL, 1)
            watch.until(lambda pid=pid: watch.monitor_pid(1) != pid, "another monitor")


def test_M8_a_job_without_monitors_ends_and_says_why(sandbox):
    job = sandbox.launch(
        "--nproc-per-node", "1", "--max-restarts", "3", sandbox.script("import signal\nprint('up')\nsignal.pause()")
    )
    job.wait_for("up")
    for kill in range(RESPAWNS + 1):
        [monitor] = (each for each in psutil.Process(job.pid).children() if "rank_monitor_server" in str(each.cmdline()))
        monitor.kill()
        if kill < RESPAWNS:
            job.wait_for("died; replacing it", count=kill + 1)
    assert job.wait() == 1, job.output
    job.wait_for("ending the job: the rank monitors keep failing")
    assert "restart 1" not in job.output
    sandbox.assert_clean()
