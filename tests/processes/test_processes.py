"""Real process trees: found, signalled, killed to the last member, and nobody else touched."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from ft_launcher import exec_shim, processes, procfs
from ft_launcher.processes import Process, Survivor, Tree, kill_tree

GENEROUS = 120.0
"""Seconds for what must happen at once: only a broken test waits for them."""

MARK = "FT_TEST_FAMILY"

HEAD = """
import os, signal, subprocess, sys, time
TOKEN = sys.argv[1]
SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)", TOKEN]
def say(name, pid=None):
    os.write(1, f"{name} {pid or os.getpid()}\\n".encode())
def daemon(name, leave_session=True, env=None):
    if os.fork() == 0:
        if leave_session:
            os.setsid()
        child = subprocess.Popen(SLEEP, env=env)
        say(name, child.pid)
        os._exit(0)
    os.wait()
"""


class Rank:
    """A session leader that runs a script, as torch starts ranks; `pids` are the processes it told about."""

    def __init__(self, script: str, token: str, *, env: dict[str, str] | None = None) -> None:
        self.pids: dict[str, int] = {}
        self.popen = subprocess.Popen(
            [sys.executable, "-c", HEAD + script, token],
            env={**os.environ, MARK: token} if env is None else env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self.process = Process(self.popen.pid)

    def hear(self, *names: str) -> dict[str, int]:
        """Wait until it has told about these."""
        while not set(names) <= set(self.pids):
            name, number = self.line().split()
            self.pids[name] = int(number)
        return self.pids

    def line(self) -> str:
        out = self.popen.stdout
        assert out is not None
        if not select.select([out], [], [], GENEROUS)[0]:
            raise AssertionError(f"silent for {GENEROUS} s after {self.pids}")
        line = out.readline().decode()
        assert line, f"ended with {self.popen.wait(GENEROUS)} after {self.pids}"
        return line

    def close(self) -> None:
        self.process.close()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(GENEROUS)
        if self.popen.stdout is not None:
            self.popen.stdout.close()


class Family:
    """All that one test starts: it can be counted, because each member has the token in environment or arguments."""

    def __init__(self) -> None:
        self.token = uuid.uuid4().hex
        self.marker = f"{MARK}={self.token}"
        self._ranks: list[Rank] = []

    def start(self, script: str, *, env: dict[str, str] | None = None) -> Rank:
        rank = Rank(script, self.token, env=env)
        self._ranks.append(rank)
        return rank

    def run(self, script: str) -> str:
        """Run a script that plays the launcher, in a process of its own; what it printed."""
        command = [sys.executable, "-c", HEAD + script, self.token]
        env = {**os.environ, MARK: self.token}
        return subprocess.run(command, env=env, timeout=GENEROUS, check=True, stdout=subprocess.PIPE, text=True).stdout

    def living(self) -> list[int]:
        mine = self.token.encode()
        found = []
        for pid in procfs.read_pids():
            with contextlib.suppress(OSError):
                folder = Path(f"/proc/{pid}")
                if mine in (folder / "environ").read_bytes() or mine in (folder / "cmdline").read_bytes():
                    found.append(pid)
        return found

    def close(self) -> None:
        left = set(self.living()) - {rank.popen.pid for rank in self._ranks}
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.close()
        assert not left, f"the test left {left}"


@pytest.fixture
def family():
    family = Family()
    yield family
    family.close()


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


# -- one process ------------------------------------------------------------------------------------------------------


def test_a_process_is_gone_when_it_has_exited_though_nobody_has_reaped_it(family):
    rank = family.start("os._exit(0)")
    assert processes.wait_gone([rank.process.pidfd], GENEROUS) == set()
    assert procfs.state(rank.popen.pid) == "Z"
    assert rank.process.is_gone()


def test_waiting_tells_apart_who_is_gone_and_who_is_not(family):
    short, long = family.start("os._exit(0)"), family.start("time.sleep(600)")
    assert processes.wait_gone([short.process.pidfd], GENEROUS) == set()
    assert processes.wait_gone([short.process.pidfd, long.process.pidfd], 0.05) == {long.process.pidfd}
    assert processes.wait_gone([], 1000.0) == set()
    assert kill_tree([long.process], grace=float("inf")) == []


def test_a_process_that_started_at_another_time_is_not_opened(family):
    rank = family.start("time.sleep(600)")
    assert Process(rank.popen.pid, rank.process.started).started == rank.process.started
    with pytest.raises(ProcessLookupError, match="no process"):
        Process(rank.popen.pid, rank.process.started + 1)
    kill_tree([rank.process], grace=0.0)


def test_a_signal_to_a_process_that_was_reaped_is_lost(family):
    rank = family.start("os._exit(0)")
    rank.popen.wait(GENEROUS)
    rank.process.send(signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        Process(rank.popen.pid)


def test_L12_a_recycled_pid_is_neither_signalled_nor_taken_for_a_member(family):
    inside = """
from ft_launcher.processes import Process, Tree, kill_tree, wait_gone
first = subprocess.Popen(SLEEP, start_new_session=True)
held = Process(first.pid)
first.kill(); first.wait()
while time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") < held.started + 2:
    os.sched_yield()                            # the start time is in clock ticks
open("/proc/sys/kernel/ns_last_pid", "w").write(str(first.pid - 1))
second = subprocess.Popen(SLEEP, start_new_session=True)
assert second.pid == first.pid, (second.pid, first.pid)
assert kill_tree([held], grace=0.0) == []
held.send(signal.SIGKILL)
print(len(Tree([held]).look()), wait_gone([Process(second.pid).pidfd], 0.0) != set())
second.kill(); second.wait()
"""
    command = ["unshare", "-pf", "--mount-proc", sys.executable, "-c", HEAD + inside, family.token]
    if not shutil.which("unshare") or os.geteuid() != 0:
        pytest.skip("needs root and unshare, for a pid namespace")
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=GENEROUS).stdout == "0 True\n"


# -- who belongs to the tree ------------------------------------------------------------------------------------------


def members(*roots: Rank, markers: tuple[str, ...] = (), exclude: tuple[int, ...] = ()) -> set[int]:
    with contextlib.closing(Tree([root.process for root in roots], markers=markers, exclude=exclude)) as tree:
        return {member.pid for member in tree.look()}


def test_L16_children_in_sessions_of_their_own_are_found_and_killed(family):
    rank = family.start(
        """
script = '''
import os, subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], env={}, start_new_session=True)
print("grandchild", child.pid, flush=True)
time.sleep(600)
'''
say("child", subprocess.Popen([sys.executable, "-S", "-c", script, *SLEEP], env={}, start_new_session=True).pid)
time.sleep(600)
"""
    )
    pids = rank.hear("child", "grandchild")
    assert members(rank) == {rank.popen.pid, pids["child"], pids["grandchild"]}
    assert kill_tree([rank.process], grace=0.0) == []
    assert family.living() == []


def test_R11_daemons_that_left_session_and_parent_are_killed_by_their_environment(family):
    rank = family.start("daemon('one'); daemon('two'); say('ready'); time.sleep(600)")
    pids = rank.hear("ready")
    assert members(rank) == {rank.popen.pid}
    assert members(rank, markers=(family.marker,)) == {rank.popen.pid, pids["one"], pids["two"]}
    assert kill_tree([rank.process], markers=[family.marker], grace=0.0) == []
    assert family.living() == []


def test_R11_an_orphan_in_the_session_is_killed_though_its_environment_is_clean(family):
    rank = family.start("daemon('orphan', leave_session=False, env={}); say('ready'); time.sleep(600)")
    orphan = rank.hear("orphan", "ready")["orphan"]
    assert members(rank) == {rank.popen.pid, orphan}
    assert kill_tree([rank.process], grace=0.0) == []
    assert family.living() == []


@pytest.mark.parametrize("reaped", [False, True])
def test_R11_what_a_dead_rank_has_left_is_killed(family, reaped):
    rank = family.start("daemon('session', leave_session=False, env={}); daemon('marked'); os._exit(1)")
    pids = rank.hear("session", "marked")
    assert processes.wait_gone([rank.process.pidfd], GENEROUS) == set()
    if reaped:
        rank.popen.wait(GENEROUS)
    assert members(rank, markers=(family.marker,)) == {pids["session"], pids["marked"]}
    assert kill_tree([rank.process], markers=[family.marker], grace=0.0) == []
    assert family.living() == []


def test_the_environment_entry_must_be_the_same_to_the_end(family):
    rank = family.start("daemon('orphan'); say('ready'); time.sleep(600)")
    orphan = rank.hear("orphan", "ready")["orphan"]
    for other in (family.marker + "0", family.marker[:-1], family.marker[1:]):
        assert orphan not in members(rank, markers=(other,))
    kill_tree([rank.process], markers=[family.marker], grace=0.0)


def test_a_daemon_of_a_daemon_is_found_through_the_first_ones_session(family):
    # The second has a cleaned environment and its parent is dead; only the session, made by a member, tells.
    rank = family.start(
        """
if os.fork() == 0:
    os.setsid()
    daemon("second", leave_session=False, env={})
    say("first")
    time.sleep(600)
time.sleep(600)
"""
    )
    pids = rank.hear("first")
    assert members(rank) == {rank.popen.pid, pids["first"], pids["second"]}
    kill_tree([rank.process], grace=0.0)


def test_a_root_without_a_session_of_its_own_does_not_drag_its_launcher_in(family):
    launcher = """
from ft_launcher.processes import Process, kill_tree
rank, sibling = subprocess.Popen(SLEEP), subprocess.Popen(SLEEP)
print(kill_tree([Process(rank.pid)], signum=signal.SIGKILL, grace=0.0), rank.wait(), sibling.poll())
sibling.kill(); sibling.wait()
"""
    assert family.run(launcher) == "[] -9 None\n"


def test_a_root_in_somebody_elses_session_does_not_drag_that_in(family):
    rank = family.start(
        """
child, sibling = subprocess.Popen(SLEEP), subprocess.Popen(SLEEP)
say("sibling", sibling.pid); say("child", child.pid)
child.wait(); say("bereft"); time.sleep(600)
"""
    )
    with contextlib.closing(Process(rank.hear("child")["child"])) as child:
        assert kill_tree([child], grace=0.0) == []
        rank.hear("bereft")
        assert members(rank) == {rank.popen.pid, rank.pids["sibling"]}
        assert kill_tree([rank.process], grace=0.0) == []


def test_an_excluded_process_lives_on(family):
    rank = family.start(
        """
say("kept", subprocess.Popen(SLEEP).pid)
say("other", subprocess.Popen(SLEEP).pid)
time.sleep(600)
"""
    )
    pids = rank.hear("kept", "other")
    with contextlib.closing(Process(pids["kept"])) as kept:
        assert kill_tree([rank.process], markers=[family.marker], exclude=[kept.pid], grace=0.0) == []
        assert family.living() == [kept.pid]
        assert kill_tree([kept], grace=0.0) == []


def test_nothing_above_is_ever_killed(family):
    # The grandchild of a shell asks for its whole way up, and for all that have the mark that they have, too.
    script = """
from ft_launcher.processes import Process, Tree, kill_tree
if len(sys.argv) == 2:
    sys.exit(subprocess.run([sys.executable, *sys.orig_argv[1:], "below"]).returncode)
up = [Process(pid) for pid in (os.getpid(), os.getppid())]
mark = "FT_TEST_FAMILY=" + TOKEN
print([member.pid for member in Tree(up, markers=[mark]).look()], kill_tree(up, markers=[mark], grace=0.0))
"""
    assert family.run(script) == "[] []\n"


# -- the kill ---------------------------------------------------------------------------------------------------------


def test_a_root_and_its_group_get_the_signal_and_the_grace_to_end_by_themselves(family):
    rank = family.start(
        """
reading, writing = os.pipe()
def leave(*_):
    say("told"); sys.exit(5)
if os.fork() == 0:
    signal.signal(signal.SIGTERM, leave)
    os.write(writing, b"x")
    time.sleep(600)
os.read(reading, 1)
def after_child(*_):
    os.wait(); say("after"); sys.exit(3)
signal.signal(signal.SIGTERM, after_child)
say("ready"); time.sleep(600)
"""
    )
    rank.hear("ready")
    assert kill_tree([rank.process], grace=GENEROUS) == []
    rank.hear("told", "after")
    assert rank.popen.wait(GENEROUS) == 3


def test_R13_who_ignores_sigterm_is_killed_after_the_grace(family):
    rank = family.start("signal.signal(signal.SIGTERM, signal.SIG_IGN); say('ready'); time.sleep(600)")
    rank.hear("ready")
    assert kill_tree([rank.process], grace=0.2) == []
    assert rank.popen.wait(GENEROUS) == -signal.SIGKILL


def test_R8_a_stopped_rank_is_continued_and_can_end_by_itself(family):
    rank = family.start(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(4)); say('ready'); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    rank.hear("ready")
    os.waitid(os.P_PID, rank.popen.pid, os.WSTOPPED)
    assert kill_tree([rank.process], grace=GENEROUS) == []
    assert rank.popen.wait(GENEROUS) == 4


def test_several_ranks_share_one_grace(family):
    ranks = [family.start("signal.signal(signal.SIGTERM, signal.SIG_IGN); say('ready'); time.sleep(600)") for _ in "ab"]
    polite = family.start("signal.signal(signal.SIGTERM, lambda *_: sys.exit(4)); say('ready'); time.sleep(600)")
    for rank in (*ranks, polite):
        rank.hear("ready")
    assert kill_tree([rank.process for rank in (*ranks, polite)], grace=0.2) == []
    assert [rank.popen.wait(GENEROUS) for rank in (*ranks, polite)] == [-9, -9, 4]


@pytest.mark.parametrize("hides", [False, True])
def test_R12_a_chain_of_forks_is_caught(family, hides):
    # Each generation starts the next in a new process and ends: a snapshot alone always shows the one before.
    rank = family.start(
        f"""
for generation in range(50):
    if os.fork():
        os._exit(0)
    if {hides}:
        os.setsid()
    if generation == 10:
        say("going")
time.sleep(600)
"""
    )
    rank.hear("going")
    assert kill_tree([rank.process], markers=[family.marker] if hides else [], grace=0.0) == []
    assert family.living() == []


def test_R12_a_bomb_that_doubles_is_caught(family):
    rank = family.start(
        """
for generation in range(6):
    os.fork()
    if generation == 3:
        say(f"pid{os.getpid()}")
while True:
    if os.fork() == 0:
        time.sleep(0.02); os._exit(0)
    os.wait()
"""
    )
    rank.line()
    assert kill_tree([rank.process], markers=[family.marker], grace=0.0) == []
    assert family.living() == []


def test_R9_what_will_not_die_is_reported(family):
    freezer = Path("/sys/fs/cgroup/freezer") / f"ft-test-{family.token}"
    try:
        freezer.mkdir()
    except OSError as error:
        pytest.skip(f"needs a version 1 freezer cgroup: {error}")
    try:
        rank = family.start("say('ready'); time.sleep(600)")
        rank.hear("ready")
        (freezer / "cgroup.procs").write_text(str(rank.popen.pid))
        (freezer / "freezer.state").write_text("FROZEN")
        before = procfs.read_pids("/proc/self/fd")
        [survivor] = kill_tree([rank.process], signum=signal.SIGKILL, grace=0.0, limit=0.2)
        assert survivor == Survivor(rank.popen.pid, name_of(rank.popen.pid), "D")
        assert procfs.read_pids("/proc/self/fd") == before
    finally:
        (freezer / "freezer.state").write_text("THAWED")
        processes.wait_gone([rank.process.pidfd], GENEROUS)
        freezer.rmdir()
    assert rank.popen.wait(GENEROUS) == -signal.SIGKILL


def test_an_exception_in_the_grace_still_lets_nobody_live(family):
    class Impatient(Exception):
        pass

    def refuse(*_):
        raise Impatient

    rank = family.start(
        f"""
daemon("daemon")
signal.signal(signal.SIGTERM, lambda *_: os.kill({os.getpid()}, signal.SIGUSR2))
say("ready")
while True: time.sleep(600)
"""
    )
    rank.hear("ready")
    before = signal.signal(signal.SIGUSR2, refuse)
    try:
        with pytest.raises(Impatient):
            kill_tree([rank.process], markers=[family.marker], grace=600.0)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert rank.popen.wait(GENEROUS) == -signal.SIGKILL
    assert family.living() == []


def test_a_launcher_without_descriptors_still_kills_its_ranks(family):
    launcher = """
import resource
from ft_launcher.processes import Process, kill_tree
rank = subprocess.Popen(SLEEP, start_new_session=True)
held = Process(rank.pid)
resource.setrlimit(resource.RLIMIT_NOFILE, (held.pidfd + 1, held.pidfd + 1))
try:
    kill_tree([held], grace=0.0)
except OSError as error:
    print(error.errno, rank.wait())
"""
    assert family.run(launcher) == "24 -9\n"


def test_a_tree_larger_than_the_descriptors_is_killed_in_parts(family):
    launcher = """
import resource
from ft_launcher.processes import Process, kill_tree
script = '''
import os, time
for _ in range(60):
    if os.fork() == 0:
        time.sleep(600)
print(flush=True)
time.sleep(600)
'''
rank = subprocess.Popen([sys.executable, "-S", "-c", script], start_new_session=True, stdout=subprocess.PIPE)
rank.stdout.readline()
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
print(kill_tree([Process(rank.pid)], signum=signal.SIGKILL, grace=0.0), rank.wait())
"""
    assert family.run(launcher) == "[] -9\n"
    assert family.living() == []


def test_no_descriptor_is_kept(family):
    rank = family.start("subprocess.Popen(SLEEP); daemon('one'); say('ready'); time.sleep(600)")
    rank.hear("ready")
    before = procfs.read_pids("/proc/self/fd")
    kill_tree([rank.process], markers=[family.marker], grace=0.0)
    assert procfs.read_pids("/proc/self/fd") == before


# -- a subreaper's orphans --------------------------------------------------------------------------------------------

SUBREAPER = """
import json
from ft_launcher import processes, procfs
processes.become_subreaper()
script = '''
import os, subprocess, sys
if os.fork() == 0:
    os.setsid()
    subprocess.Popen(sys.argv[1:], env={})
    os._exit(0)
os.wait()
'''
def rank():
    return subprocess.Popen([sys.executable, "-S", "-c", script, *SLEEP], start_new_session=True)
"""


def test_R11_a_daemon_with_a_clean_environment_comes_back_to_the_launcher(family):
    launcher = """
first = rank()
first.wait()
monitor = subprocess.Popen(SLEEP, start_new_session=True)      # ours, in a session of its own: only `keep` tells
helper = subprocess.Popen(SLEEP)                               # ours, in our session
adopted = processes.orphans(os.getpid(), {monitor.pid})
survivors = processes.kill_tree([processes.Process(pid) for pid in adopted], grace=0.0)
reaped = processes.reap(adopted) == set(adopted)
children = [pid for pid in procfs.read_pids() if procfs.read_entry(pid).parent == os.getpid()]
print(json.dumps([len(adopted), survivors, reaped, sorted(children) == sorted([monitor.pid, helper.pid])]))
for ours in (monitor, helper):
    ours.kill(); ours.wait()
"""
    assert json.loads(family.run(SUBREAPER + launcher)) == [1, [], True, True]
    assert family.living() == []


def test_L15_adopted_zombies_are_reaped_and_workers_are_left_to_popen(family):
    launcher = """
import contextlib
script = "import os\\nif os.fork() == 0: os.setsid(); os._exit(0)\\nos._exit(7)"
worker = subprocess.Popen([sys.executable, "-S", "-c", script], start_new_session=True)
os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
while len(found := processes.orphans(os.getpid(), {worker.pid})) != 1 or procfs.state(found[0]) != "Z":
    os.sched_yield()
reaped = processes.reap(processes.orphans(os.getpid(), keep={worker.pid}))
print(json.dumps([reaped == set(found), processes.orphans(os.getpid(), set()) == [worker.pid], worker.wait()]))
"""
    assert json.loads(family.run(SUBREAPER + launcher)) == [True, True, 7]


def test_reaping_neither_waits_nor_minds_other_peoples_children(family):
    rank = family.start("time.sleep(600)")
    assert processes.reap([rank.popen.pid, 1]) == set()
    kill_tree([rank.process], grace=0.0)
    assert processes.reap([rank.popen.pid]) == {rank.popen.pid}
    rank.popen.returncode = -9  # Popen must not look for what the line above has taken from it


# -- what /proc tells -------------------------------------------------------------------------------------------------


def test_stacks_tell_about_every_thread(family, wait_for):
    rank = family.start(
        """
import threading
threading.Thread(target=time.sleep, args=(600,)).start()
say("ready"); signal.pause()
"""
    )
    pid = rank.hear("ready")["ready"]
    wait_for(lambda: procfs.stacks_from_proc(pid).count("S (sleeping)") == 2, "two threads asleep")
    text = procfs.stacks_from_proc(pid)
    assert text.startswith(f"thread {pid} ({name_of(pid)}): ")
    assert text.count("system call: ") == 2
    assert "and 1 more threads" in procfs.stacks_from_proc(pid, most_threads=1)
    kill_tree([rank.process], grace=0.0)
    rank.popen.wait(GENEROUS)
    assert procfs.stacks_from_proc(pid) == "\n"
    assert procfs.state(pid) == ""


def test_only_signals_with_a_handler_are_caught(family):
    rank = family.start(
        """
signal.signal(signal.SIGRTMIN + 2, print)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
say("ready"); time.sleep(600)
"""
    )
    pid = rank.hear("ready")["ready"]
    caught = [signum for signum in range(1, 65) if procfs.catches(pid, signum)]
    assert caught == [signal.SIGINT, signal.SIGRTMIN + 2]
    kill_tree([rank.process], grace=0.0)
    rank.popen.wait(GENEROUS)
    assert not procfs.catches(pid, signal.SIGINT)


def test_a_process_belongs_to_its_ancestors_and_its_session(family):
    rank = family.start(
        "daemon('orphan', leave_session=False); say('child', subprocess.Popen(SLEEP).pid); time.sleep(9e3)"
    )
    pids = rank.hear("orphan", "child")
    for pid in (rank.popen.pid, pids["orphan"], pids["child"]):
        assert procfs.belongs_to(pid, rank.popen.pid)
    assert procfs.belongs_to(rank.popen.pid, os.getpid())
    assert not procfs.belongs_to(os.getpid(), rank.popen.pid)
    assert not procfs.belongs_to(2**22 + 1, rank.popen.pid)
    kill_tree([rank.process], grace=0.0)


def test_R4_the_oom_killers_count_and_the_limit_are_those_of_the_ranks_cgroup(family):
    memory = Path("/sys/fs/cgroup/memory")
    own = memory / Path("/proc/self/cgroup").read_text().split(":memory:")[-1].split("\n")[0].lstrip("/")
    group = (own if own.is_dir() else memory) / f"ft-test-{family.token}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    except OSError as error:
        pytest.skip(f"needs a version 1 memory cgroup: {error}")
    ranks = []
    try:
        for _ in range(2):
            ranks.append(
                family.start(
                    """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
say("ready"); signal.sigwait({signal.SIGUSR1}); hog = b"x" * (200 << 20); time.sleep(600)
"""
                )
            )
            (group / "cgroup.procs").write_text(str(ranks[-1].hear("ready")["ready"]))
        witness, victim = ranks
        assert procfs.memory_limit(witness.popen.pid) == 64 << 20
        before = procfs.oom_kill_count(witness.popen.pid)
        assert before is not None
        victim.process.send(signal.SIGUSR1)
        assert victim.popen.wait(GENEROUS) == -signal.SIGKILL
        assert procfs.oom_kill_count(witness.popen.pid) == before + 1
    finally:
        kill_tree([rank.process for rank in ranks], grace=0.0)
        for rank in ranks:
            rank.popen.wait(GENEROUS)
        group.rmdir()


def test_the_memory_cgroup_of_a_process_that_is_gone_is_unknown():
    assert procfs.oom_kill_count(2**22 + 1) is None
    assert procfs.memory_limit(2**22 + 1) is None


# -- the shim ---------------------------------------------------------------------------------------------------------


def shim(*command: str, launcher: int | None = None) -> list[str]:
    return [sys.executable, "-I", "-S", exec_shim.__file__, str(launcher or os.getpid()), "--", *command]


def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, env=env, capture_output=True, timeout=GENEROUS)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_rank_dies_with_its_launcher(family, when):
    launcher = family.start(
        """
from ft_launcher import exec_shim
shim = [sys.executable, "-I", "-S", exec_shim.__file__, str(os.getpid()), "--"]
rank = [sys.executable, "-S", "-c", "import os, time; print('up', os.getpid(), flush=True); time.sleep(600)", TOKEN]
say("rank", subprocess.Popen([*shim, *rank], env={}, start_new_session=True).pid)
time.sleep(600)
"""
    )
    with contextlib.closing(Process(launcher.hear("rank")["rank"])) as rank:
        if when == "later":
            assert launcher.hear("up")["up"] == rank.pid
        launcher.popen.kill()
        assert processes.wait_gone([rank.pidfd], GENEROUS) == set()


def test_a_rank_whose_launcher_is_already_gone_does_not_start():
    started = run(*shim("echo", "started", launcher=1))
    assert (started.returncode, started.stdout, started.stderr) == (1, b"", b"")


def test_a_wrapper_that_execs_may_stand_in_front():
    started = run("sh", "-c", 'exec "$@"', "sh", *shim("echo", "started"))
    assert (started.returncode, started.stdout) == (0, b"started\n")


@pytest.mark.parametrize("env", [{}, {"LC_CTYPE": "C"}, {"LC_ALL": "C", "A": "\udcff"}, {"LANG": "C.UTF-8"}])
def test_the_command_gets_the_arguments_and_environment_that_were_given(env):
    env |= {"PATH": os.environ["PATH"]}
    arguments = ["%s.", "", "two words", "--", "\udcff", "\u00e9", "\n"]
    assert run(*shim("printf", *arguments), env=env).stdout == run("printf", *arguments, env=env).stdout
    given = run(*shim("cat", "/proc/self/environ"), env=env).stdout
    assert sorted(given.split(b"\0")) == sorted(run("cat", "/proc/self/environ", env=env).stdout.split(b"\0"))


def test_the_command_ignores_the_two_user_signals_and_nothing_else():
    status = run(*shim("cat", "/proc/self/status")).stdout.decode().splitlines()
    ignored = next(int(line.split()[1], 16) for line in status if line.startswith("SigIgn"))
    assert [n for n in range(1, 65) if ignored >> (n - 1) & 1] == [signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "plain").write_text("not executable")
    for name, text in {
        "broken": "#!/no/such/interpreter\n",
        "garbage": "\x01\x02",
        "good": "#!/bin/sh\necho good\n",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        ("no-such-command", 127, "no such file or directory"),
        ("/no/such/command", 127, "no such file or directory"),
        ("plain", 126, "permission denied"),
        ("broken", 127, "its interpreter (the #! line, or the dynamic loader) does not exist"),
        ("garbage", 126, "exec format error"),
    ],
)
def test_R20_a_command_that_cannot_run_is_named_with_the_reason(folder, command, code, reason):
    ended = run(*shim(command), env={"PATH": f"/no/such/folder:{folder}:/usr/bin"})
    assert ended.stderr.decode() == f"ft_launcher: cannot run {command}: {reason}\n"
    assert (ended.returncode, ended.stdout) == (code, b"")


def test_R16_the_name_of_a_command_cannot_write_to_the_terminal():
    assert run(*shim("\x1b[2Jgone\n")).stderr.decode() == (
        "ft_launcher: cannot run '\\x1b[2Jgone\\n': no such file or directory\n"
    )


def test_the_command_is_looked_up_past_what_cannot_run(folder):
    other = folder / "other"
    other.mkdir()
    (other / "plain").symlink_to(folder / "good")
    ended = run(*shim("plain", "argument"), env={"PATH": f"{folder}:{other}"})
    assert (ended.returncode, ended.stdout) == (0, b"good\n")
