"""What happens to the launcher itself: signals, its death, its output, its directories, its limits; and to its job."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HEAD = """
import os, signal, subprocess, sys, time
rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def say(*words):
    os.write(1, f"rank {rank} restart {restart} {' '.join(map(str, words))}\\n".encode())
"""

LAUNCHER = [sys.executable, "-m", "ft_launcher"]


def state(pid: int) -> str:
    """The letter that ps shows for a process; "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


# -- signals ----------------------------------------------------------------------------------------------------------

HEEDS_SIGNALS = (
    HEAD
    + """
def asked(number, frame):
    say("received signal", number)
    time.sleep(float(sys.argv[2]))
    say("has saved")
    os._exit(int(sys.argv[1]) if rank else 0)

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, asked)
say("is ready")
while True:
    signal.pause()
"""
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_L1_a_signal_is_forwarded_once_and_shows_in_the_exit_code(sandbox, number, code):
    job = sandbox.launch("--nproc-per-node", "2", "--max-restarts", "3", sandbox.script(HEEDS_SIGNALS), "9", "0")
    job.wait_for("is ready", count=2)
    job.send(number)
    assert job.wait() == code, job.output
    for rank in (0, 1):
        assert job.output.count(f"rank {rank} restart 0 received signal {int(number)}") == 1, job.output
    assert f"the launcher received signal {int(number)} ({number.name})" in job.lines[-2]
    assert "Traceback" not in job.output
    assert "restart 1" not in job.output
    sandbox.assert_clean()


def test_L1_L2_ranks_that_all_end_well_make_0_of_a_signal_that_comes_twice(sandbox):
    job = sandbox.launch("--nproc-per-node", "2", sandbox.script(HEEDS_SIGNALS), "0", "1")
    job.wait_for("is ready", count=2)
    job.send(signal.SIGTERM)
    job.send(signal.SIGTERM)
    job.wait_for("restart 0 received signal", count=2)
    job.send(signal.SIGTERM)
    assert job.wait() == 0, job.output
    assert job.output.count("restart 0 received signal") == 2
    assert job.output.count("has saved") == 2
    sandbox.assert_clean()


@pytest.fixture
def loading(sandbox, wait_for):
    """Start a job, and give it at the moment when its launcher loads torch."""

    def start(script, *flags):
        job = sandbox.launch(*flags, sandbox.script(script))

        def is_loading() -> bool:
            status = Path(f"/proc/{job.pid}/status").read_text()
            blocked = next(line for line in status.splitlines() if line.startswith("SigBlk:"))
            return bool(int(blocked.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

        wait_for(is_loading, "signals are put off")
        return job

    return start


@pytest.mark.parametrize(("flags", "code"), [((), 143), (("--ft-preemption-signals", "SIGTERM"), 75)])
def test_L3_sigterm_while_the_launcher_loads_torch_ends_it_as_it_says(sandbox, loading, flags, code):
    job = loading("raise SystemExit('never')", *flags)
    job.send(signal.SIGTERM)
    assert job.wait() == code, job.output
    assert "started rank" not in job.output
    sandbox.assert_clean()


SAVES = """
import ft_launcher
client = ft_launcher.connect()
step = 0
while not client.should_checkpoint(step):
    step += 1
client.exit_for_preemption()
"""


def test_L3_a_warning_while_the_launcher_loads_torch_is_heard(sandbox, loading):
    job = loading(SAVES)
    job.send(signal.SIGUSR1)
    assert job.wait() == 75, job.output
    sandbox.assert_clean()


def test_L2_a_second_signal_a_while_later_means_now(sandbox):
    script = sandbox.script(
        HEAD
        + """
def asked(number, frame):
    say("received signal", number)
    time.sleep(1.3)
    say("does not care")

signal.signal(signal.SIGTERM, asked)
say("is ready")
while True:
    signal.pause()
"""
    )
    job = sandbox.launch("--shutdown-timeout", "600", script)
    job.wait_for("is ready")
    job.send(signal.SIGTERM)
    job.wait_for("does not care")
    job.send(signal.SIGTERM)
    assert job.wait() == 143, job.output
    assert job.output.count("restart 0 received signal") == 1
    sandbox.assert_clean()


DRIVER = """
import os, signal, sys
import psutil
from ft_launcher.launcher import main

module, function, turn, event, deed = sys.argv[1].split(":")
turns = 0

def at(frame, what, argument):
    global turns
    if what == event and frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
        turns += 1
        if turns == int(turn):
            sys.setprofile(None)
            os.write(2, f"{deed} in {function}\\n".encode())
            if deed == "fail":
                raise MemoryError(f"in {function}")
            if deed == "lose":
                rank = next(child for child in psutil.Process().children() if sys.argv[-1] in child.cmdline())
                rank.kill()
                os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)
                return
            os.kill(os.getpid(), signal.Signals[deed])

sys.setprofile(at)
main(sys.argv[2:])
"""
"""Runs ft_launcher, and lets a signal, an error or a rank's death come exactly when a function is entered or left."""

RESTARTS_ONCE = (
    HEAD
    + """
if rank == 0 and os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        # A daemon that nothing ties to its rank any more.
        os.execvpe("sleep", ["sleep", "600"], {"PATH": os.environ["PATH"], "FT_TEST_RUN": os.environ["FT_TEST_RUN"]})
    open(f"daemon.{restart}", "w").close()
    os._exit(0)
while not os.path.exists(f"daemon.{restart}"):
    time.sleep(0.01)
if restart == 0 and rank == 1:
    sys.exit(5)
say("waits")
while True:
    signal.pause()
"""
)
SUBPROCESS = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"


@pytest.mark.parametrize(
    "point",
    [
        "ft_launcher.run_dir:__init__:1:return",
        "ft_launcher.monitors:_start:2:call",
        "ft_launcher.job_rendezvous:next_rendezvous:1:return",
        f"{SUBPROCESS}:_popen:2:call",
        "ft_launcher.agent:_start_workers:1:return",
        "ft_launcher.processes:kill_tree:1:call",
        "ft_launcher.agent:_kill_orphans:1:call",
    ],
)
def test_L3_a_signal_at_any_moment_ends_the_launcher_alike(sandbox, point):
    driver = sandbox.script(DRIVER, "driver.py")
    flags = ["--nproc-per-node", "2", "--max-restarts", "1"]
    job = sandbox.start(sys.executable, driver, f"{point}:SIGTERM", *flags, sandbox.script(RESTARTS_ONCE))
    assert job.wait() == 143, job.output
    assert f"SIGTERM in {point.split(':')[1]}" in job.output
    assert "the launcher received signal 15 (SIGTERM)" in job.output
    assert "Traceback" not in job.output
    sandbox.assert_clean()


@pytest.mark.parametrize("point", ["ft_launcher.agent:clean_up:1:call", "ft_launcher.monitors:__exit__:1:call"])
def test_L3_a_signal_after_the_end_of_the_ranks_changes_nothing(sandbox, point):
    driver = sandbox.script(DRIVER, "driver.py")
    job = sandbox.start(sys.executable, driver, f"{point}:SIGTERM", sandbox.script("print('done')"))
    assert job.wait() == 0, job.output
    assert "SIGTERM in" in job.output
    assert "Traceback" not in job.output
    sandbox.assert_clean()


@pytest.mark.parametrize(
    "point",
    [
        "ft_launcher.monitors:_start:2:call",
        "ft_launcher.job_rendezvous:next_rendezvous:2:call",
        f"{SUBPROCESS}:_popen:2:call",
        "ft_launcher.monitors:hear:1:call",
        "ft_launcher.processes:kill_tree:1:call",
    ],
)
def test_L13_an_error_of_the_launcher_itself_leaves_nothing_running(sandbox, point):
    driver = sandbox.script(DRIVER, "driver.py")
    flags = ["--nproc-per-node", "2", "--max-restarts", "1"]
    job = sandbox.start(sys.executable, driver, f"{point}:fail", *flags, sandbox.script(RESTARTS_ONCE))
    assert job.wait() == 1, job.output
    assert f"MemoryError: in {point.split(':')[1]}" in job.output
    sandbox.assert_clean()


def test_R2_a_rank_that_dies_between_two_looks_is_stopped_and_told_like_any_other(sandbox):
    driver = sandbox.script(DRIVER, "driver.py")
    script = sandbox.script(HEAD + "if restart == 0: signal.pause()")
    flags = ["--nproc-per-node", "2", "--max-restarts", "1"]
    job = sandbox.start(sys.executable, driver, "ft_launcher.agent:_hear:1:call:lose", *flags, script)
    assert job.wait() == 0, job.output
    assert "lose in _hear" in job.output
    assert [line for line in job.lines if line.startswith("ft_launcher: rank") and "(SIGKILL)" in line], job.output
    sandbox.assert_clean()


def test_L13_a_master_port_that_is_taken_is_said_in_one_line(sandbox):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        job = sandbox.launch("--master-port", port, sandbox.script("print('runs')"))
        assert job.wait() == 2, job.output
    assert job.output.count("\n") == 1, job.output
    assert job.lines[0].startswith("ft_launcher: ")
    assert "ddress already in use" in job.lines[0]
    assert port in job.lines[0]
    sandbox.assert_clean()


# -- its death and its sleep ------------------------------------------------------------------------------------------

HAS_FAMILY = (
    HEAD
    + """
signal.signal(signal.SIGTERM, lambda number, frame: say("received signal", number))
subprocess.Popen(["sleep", "600"])
subprocess.Popen(["sleep", "600"], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execlp("sleep", "sleep", "600")
    os._exit(0)
os.wait()
say("is ready")
while True:
    signal.pause()
"""
)


@pytest.mark.parametrize("when", ["running", "stopping"])
def test_L4_nothing_outlives_a_launcher_that_was_killed(sandbox, when):
    flags = ["--nproc-per-node", "2", "--shutdown-timeout", "600"]
    job = sandbox.launch(*flags, sandbox.script(HAS_FAMILY))
    job.wait_for("is ready", count=2)
    assert sandbox.leftovers() != []
    if when == "stopping":
        job.send(signal.SIGTERM)
        job.wait_for("received signal 15", count=2)
    job.send(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    sandbox.assert_clean()


def test_L5_a_hang_is_found_while_the_launcher_is_stopped_and_healed_when_it_goes_on(sandbox, wait_for):
    script = sandbox.script(
        HEAD
        + """
from ft_launcher import RankMonitorClient
client = RankMonitorClient()
client.init_workload_monitoring()
say("pid", os.getpid())
while restart == 0 and not (rank == 1 and os.path.exists("hang")):
    client.send_heartbeat()
    time.sleep(0.02)
if restart == 0:
    time.sleep(600)
"""
    )
    flags = ["--nproc-per-node", "2", "--max-restarts", "1", "--ft-rank-heartbeat-timeout", "1"]
    job = sandbox.launch(*flags, script)
    job.wait_for("rank 0 restart 0 pid")
    pid = int(job.wait_for("rank 1 restart 0 pid").split()[-1])
    job.send(signal.SIGSTOP)
    wait_for(lambda: state(job.pid) == "T", "the launcher is stopped")
    (sandbox.path / "hang").touch()
    wait_for(lambda: state(pid) == "Z", "the hung rank was killed")
    job.send(signal.SIGCONT)
    assert job.wait() == 0, job.output
    assert "ft_launcher: rank 1 (pid" in job.wait_for("; killing")
    assert "rank 1 restart 1 pid" in job.output
    assert "rank 0 restart 1 pid" in job.output


# -- its output -------------------------------------------------------------------------------------------------------

SILENT = """
import os, sys
restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
open(f"ran.{restart}", "w").close()
sys.exit(1 if restart == 0 else int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        pytest.param('"$@" >&- 2>&-', 0, id="closed"),
        pytest.param('"$@" 2>&1 | head -c1 >/dev/null; exit ${PIPESTATUS[0]}', 1, id="its reader has gone"),
        # A pipe that nobody reads is first filled, as far as it takes at once.
        pytest.param(
            'mkfifo full; exec 3<>full; dd if=/dev/zero of=full bs=4096 oflag=nonblock 2>/dev/null; "$@" >&3 2>&3',
            1,
            id="a full pipe",
        ),
    ],
)
def test_L6_a_job_goes_on_and_ends_with_its_code_whatever_becomes_of_its_output(sandbox, shell, code):
    flags = ["--nproc-per-node", "2", "--max-restarts", "1"]
    job = sandbox.start("bash", "-c", shell, "bash", *LAUNCHER, *flags, sandbox.script(SILENT), str(code))
    assert job.wait() == code, job.output
    assert (sandbox.path / "ran.1").exists()
    sandbox.assert_clean()


# -- its directories and limits ---------------------------------------------------------------------------------------

CONNECTS = """
import os
from ft_launcher import RankMonitorClient
with RankMonitorClient() as client:
    client.send_heartbeat()
    os.write(1, f"connected at {os.environ['FT_RANK_MONITOR_IPC_SOCKET']}\\n".encode())
"""


def test_L8_a_log_directory_that_cannot_be_made_is_said_in_one_line(sandbox):
    job = sandbox.launch("-r", "3", "--log-dir", "/proc/logs", sandbox.script("print('runs')"))
    assert job.wait() == 2, job.output
    assert job.lines == ["ft_launcher: --log-dir /proc/logs: No such file or directory", "<end of output>"]
    sandbox.assert_clean()


@pytest.mark.parametrize("unusable", ["missing", "a file"])
def test_L9_a_runtime_directory_that_cannot_be_used_is_passed_over(sandbox, unusable):
    place = sandbox.path / "runtime"
    if unusable == "a file":
        place.touch()
    flags = ["--nproc-per-node", "2", "--ft-require-monitoring"]
    job = sandbox.launch(*flags, sandbox.script(CONNECTS), XDG_RUNTIME_DIR=str(place))
    assert job.wait() == 0, job.output
    path = Path(job.wait_for("connected at").split()[-1])
    assert place not in path.parents
    assert not path.parent.exists()
    sandbox.assert_clean()


def test_L10_a_temporary_directory_too_long_for_a_socket_address_does(sandbox):
    place = sandbox.temporary / ("d" * 119)
    place.mkdir()
    flags = ["--nproc-per-node", "2", "--ft-require-monitoring"]
    job = sandbox.launch(*flags, sandbox.script(CONNECTS), XDG_RUNTIME_DIR=str(place), TMPDIR=str(place))
    assert job.wait() == 0, job.output
    assert str(place) in job.wait_for("connected at")
    place.rmdir()
    sandbox.assert_clean()


def test_L11_a_limit_of_descriptors_that_is_too_low_is_said_in_one_line(sandbox):
    command = [*LAUNCHER, "--nproc-per-node", "4", sandbox.script("print('runs')")]
    job = sandbox.start("sh", "-c", 'ulimit -n 40; exec "$@"', "sh", *command)
    assert job.wait() == 2, job.output
    assert job.lines == [
        "ft_launcher: ulimit -n 40: the launcher needs 112 open files for 4 ranks",
        "<end of output>",
    ]
    sandbox.assert_clean()


def test_L11_a_limit_of_descriptors_that_may_be_raised_is_raised(sandbox):
    command = [*LAUNCHER, "--nproc-per-node", "4", sandbox.script("print('runs')")]
    job = sandbox.start("sh", "-c", 'ulimit -Sn 40; exec "$@"', "sh", *command)
    assert job.wait() == 0, job.output
    assert job.output.count("runs") == 4
    sandbox.assert_clean()


def test_L14_two_launchers_of_the_same_job_do_not_meet(sandbox):
    script = sandbox.script(CONNECTS)
    flags = ["--nproc-per-node", "2", "--rdzv-id", "same", "--log-dir", str(sandbox.path / "logs"), "-t", "3"]
    jobs = [sandbox.launch(*flags, "--ft-require-monitoring", script) for _ in range(2)]
    sockets = []
    for job in jobs:
        assert job.wait() == 0, job.output
        sockets += re.findall(r"connected at (\S+)", job.output)
    assert len(set(sockets)) == 4
    sandbox.assert_clean()


def test_L15_as_the_first_process_of_a_container_it_reaps_what_ranks_leave(sandbox):
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a pid namespace of its own: root, and unshare")
    script = sandbox.script(
        HEAD
        + """
zombies = []
for pid in (name for name in os.listdir("/proc") if name.isdigit()):
    try:
        if open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z":
            zombies.append(pid)
    except OSError:
        pass
say("sees zombies:", zombies)
for _ in range(20):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os._exit(0)
        os._exit(0)
    os.wait()
sys.exit(5 if restart == 0 else 0)
"""
    )
    job = sandbox.start(*unshare, *LAUNCHER, "--max-restarts", "1", script)
    assert job.wait() == 0, job.output
    assert "rank 0 restart 1 sees zombies: []" in job.output
    sandbox.assert_clean()


def test_L16_a_script_with_handlers_sessions_and_groups_of_its_own_is_stopped_whole(sandbox):
    script = sandbox.script(
        HEAD
        + """
if rank == 1:
    while not os.path.exists("ready"):
        time.sleep(0.01)
    sys.exit(5)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.nice(5)
if os.fork():
    os.waitid(os.P_ALL, 0, os.WEXITED)
os.setsid()
if os.fork() == 0:
    os.setpgid(0, 0)
open("ready", "w").close()
time.sleep(600)
"""
    )
    job = sandbox.launch("--nproc-per-node", "2", "--shutdown-timeout", "1", script)
    assert job.wait() == 1, job.output
    assert "exited with code 5" in job.output
    sandbox.assert_clean()


# -- its two names ----------------------------------------------------------------------------------------------------


def test_the_module_and_the_console_script_are_the_same_command(sandbox):
    script = sandbox.script("import sys; print('runs', *sys.argv[1:]); sys.exit(int(sys.argv[1]))")
    console = str(Path(sys.executable).with_name("ft_launcher"))
    for arguments in (["--help"], ["missing.py"], [script, "3"]):
        jobs = [sandbox.start(*command, *arguments) for command in (LAUNCHER, [console])]
        codes = [job.wait() for job in jobs]
        assert codes[0] == codes[1]
        # Processes, times and directories have names of their own in each run.
        texts = [re.sub(r"\d\d:\d\d:\d\d|pid\W+\d+|torchelastic_\S+", "*", job.output) for job in jobs]
        assert texts[0] == texts[1]
    sandbox.assert_clean()
