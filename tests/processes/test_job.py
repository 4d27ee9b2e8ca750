"""Whole jobs under the real launcher: what fails is noticed, killed and restarted, and nothing is left behind."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import GENEROUS, free_port, marked_processes

HEAD = """
import ctypes, os, signal, sys, threading, time
from ft_launcher import RankMonitorClient, WorkloadAction, WorkloadControlRequest
rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
os.write(1, f"rank {rank} restart {restart} pid {os.getpid()}\\n".encode())  # in one piece, as two ranks write
client = RankMonitorClient()
"""

PLAIN_HEAD = """
import os, signal, subprocess, sys, time
rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def say(*words):
    os.write(1, f"rank {rank} restart {restart} {' '.join(map(str, words))}\\n".encode())

def tell(word):
    open(f"{word}.{restart}", "w").close()

def wait_for(word):
    while not os.path.exists(f"{word}.{restart}"):
        time.sleep(0.01)
"""


@pytest.fixture
def config(sandbox):
    path = sandbox.path / "ft.yaml"
    path.write_text(
        "fault_tolerance:\n"
        "  initial_rank_heartbeat_timeout: 20\n"
        "  rank_heartbeat_timeout: 1\n"
        "  rank_section_timeouts: {outer: 1, inner: 0.7, step: 1}\n"
        "  rank_teardown_timeout: 1\n"
    )
    return str(path)


def make_cgroup(controller: str, mark: str) -> Path:
    """Make a cgroup (version 1) for one test, or skip the test and say why."""
    folder = Path("/sys/fs/cgroup", controller, f"ft_test_{mark}")
    if os.geteuid() != 0 or not (folder.parent / "tasks").exists():
        pytest.skip(f"needs root and the {controller} controller of cgroup version 1")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"{folder} cannot be made: {error.strerror}")
    return folder


@pytest.fixture
def memory(sandbox) -> Iterator[Path]:
    """A memory cgroup with room for a launcher, and not for a rank that takes all it can get."""
    folder = make_cgroup("memory", sandbox.mark)
    try:
        (folder / "memory.limit_in_bytes").write_text(str(640 << 20))
        yield folder
    finally:
        sandbox.close()
        folder.rmdir()


@pytest.fixture
def freezer(sandbox) -> Iterator[Path]:
    """A cgroup whose frozen processes are in uninterruptible sleep, as behind a wedged driver: SIGKILL must wait."""
    folder = make_cgroup("freezer", sandbox.mark)
    try:
        yield folder
    finally:
        (folder / "freezer.state").write_text("THAWED")
        sandbox.close()
        folder.rmdir()


# -- ranks that end ---------------------------------------------------------------------------------------------------


def test_a_job_that_succeeds_ends_with_0_and_leaves_nothing(sandbox):
    job = sandbox.launch("--nproc-per-node", "2", sandbox.script("print('hello')"))
    assert job.wait() == 0, job.output
    assert job.output.count("hello") == 2
    sandbox.assert_clean()


def test_R1_a_rank_that_exits_with_a_code_is_restarted_with_all_others(sandbox):
    script = sandbox.script(
        HEAD
        + """
client.init_workload_monitoring()
client.send_heartbeat()
if restart == 0:
    if rank == 1:
        sys.exit(7)
    signal.pause()
"""
    )
    job = sandbox.launch("--nproc-per-node", "2", "--max-restarts", "1", script)
    assert job.wait() == 0, job.output
    job.wait_for("exited with code 7")
    assert "rank 0 restart 1" in job.output
    assert "rank 1 restart 1" in job.output
    sandbox.assert_clean()


def test_R1_R2_R3_each_way_to_die_is_named_and_the_budget_of_restarts_is_kept(sandbox):
    script = sandbox.script(
        PLAIN_HEAD
        + """
import ctypes, resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
say("starts")
if rank == 0:
    signal.pause()
if restart == 0: os.kill(os.getpid(), signal.SIGKILL)
if restart == 1: ctypes.string_at(0)
if restart == 2: os.abort()
if restart == 3: os.kill(os.getpid(), signal.SIGBUS)
sys.exit(7)
"""
    )
    job = sandbox.launch("--nproc-per-node", "2", "--max-restarts", "4", script)
    assert job.wait() == 1, job.output
    for restart, what in enumerate(
        [
            "killed by signal 9 (SIGKILL)",
            "killed by signal 11 (SIGSEGV, invalid memory reference)",
            "killed by signal 6 (SIGABRT, it aborted itself)",
            "killed by signal 7 (SIGBUS",
            "exited with code 7",
        ]
    ):
        said = [line for line in job.lines if line.startswith("ft_launcher: rank 1 (pid") and what in line]
        assert said, job.output
        before = job.lines[: job.lines.index(said[0])]
        assert sum("rank 1 restart" in line for line in before) == restart + 1, job.output
    assert job.output.count("started rank 0 (pid") == 5
    root_cause = job.output.partition("Root Cause")[2]
    assert "exitcode  : 7" in root_cause
    assert "killed by signal 15 (SIGTERM, request to stop) from this launcher" in job.output
    sandbox.assert_clean()


def test_the_rank_that_raised_first_is_named_though_another_is_gone_sooner(sandbox):
    script = sandbox.script(
        PLAIN_HEAD
        + """
import atexit
from torch.distributed.elastic.multiprocessing.errors import record

@record
def main():
    if rank == 0:
        wait_for("raised")
        raise ConnectionError("the other one is away")
    atexit.register(time.sleep, 0.3)  # long enough to be gone last
    atexit.register(tell, "raised")
    raise ValueError("the root")

main()
"""
    )
    job = sandbox.launch("--nproc-per-node", "2", "--log-dir", str(sandbox.path / "logs"), script)
    assert job.wait() == 1, job.output
    said = [line for line in job.lines if line.startswith("ft_launcher: rank") and "exited with code 1" in line]
    assert [line.split()[2] for line in said] == ["1", "0"], job.output
    assert "ValueError: the root" in job.output.partition("Root Cause")[2]
    sandbox.assert_clean()


def test_R4_a_rank_that_the_oom_killer_ended_is_said_to_be_with_the_limit(sandbox, memory):
    script = sandbox.script(
        PLAIN_HEAD
        + """
if restart == 0:
    open("/proc/self/oom_score_adj", "w").write("1000")
    taken = []
    while True:
        taken.append(bytearray(os.urandom(1 << 16) * 64))
"""
    )
    # In a shell of its own, which becomes the launcher, so that nothing else is ever in that cgroup.
    enter = ["sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', str(memory)]
    job = sandbox.start(*enter, sys.executable, "-m", "ft_launcher", "--max-restarts", "1", script)
    assert job.wait() == 0, job.output
    said = job.wait_for("OOM killer")
    assert "ft_launcher: rank 0 (pid" in said
    assert "killed by the kernel's OOM killer (memory limit 0.6 GiB)" in said
    sandbox.assert_clean()


def test_R11_nothing_that_a_rank_started_outlives_its_attempt(sandbox):
    script = sandbox.script(
        PLAIN_HEAD
        + """
def daemon(environment):
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write, str(os.getpid()).encode())
            os.execvpe("sleep", ["sleep", "600"], environment)
        os._exit(0)
    os.wait()
    return int(os.read(read, 20))

alive = [pid for pid in open("pids").read().split() if os.path.exists(f"/proc/{pid}")] if restart else []
say("of the last attempt are alive:", alive)
children = [
    subprocess.Popen(["sleep", "600"]).pid,
    subprocess.Popen(["sleep", "600"], start_new_session=True).pid,
    daemon(os.environ),
    daemon({"PATH": os.environ["PATH"], "FT_TEST_RUN": os.environ["FT_TEST_RUN"]}),
]
with open("pids", "w") as file:
    print(*children, file=file)
if restart == 0: sys.exit(1)
if restart == 1: os.kill(os.getpid(), signal.SIGKILL)
os._exit(0)
"""
    )
    job = sandbox.launch("--max-restarts", "2", script)
    assert job.wait() == 0, job.output
    assert "rank 0 restart 1 of the last attempt are alive: []" in job.output
    assert "rank 0 restart 2 of the last attempt are alive: []" in job.output
    sandbox.assert_clean()


def test_R12_a_fork_bomb_is_put_out(sandbox):
    # Each process of the bomb starts the next one and ends, so that no look at the process table finds them all.
    script = sandbox.script(
        PLAIN_HEAD
        + """
counter = os.open("counter", os.O_RDWR | os.O_APPEND | os.O_CREAT)
if rank == 1:
    while os.fstat(counter).st_size < 200:
        time.sleep(0.01)
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(8):
    if os.fork() == 0:
        while os.fstat(counter).st_size < 10000:
            os.setsid()
            os.write(counter, b".")
            time.sleep(0.05)
            if os.fork():
                os._exit(0)
        time.sleep(600)
signal.pause()
"""
    )
    job = sandbox.launch("--nproc-per-node", "2", "--shutdown-timeout", "0", script)
    assert job.wait() == 1, job.output
    job.wait_for("exited with code 3")
    assert marked_processes(sandbox.mark) == []
    assert (sandbox.path / "counter").stat().st_size < 10000
    sandbox.assert_clean()


# -- ranks that do not want to stop -----------------------------------------------------------------------------------

STUBBORN = (
    PLAIN_HEAD
    + """
def asked(number, frame):
    say("was asked by signal", number)
    if sys.argv[1] == "saves":
        time.sleep(1.5)
        say("saved")
        os._exit(0)

if rank == 0:
    signal.signal(signal.SIGTERM, asked)
    tell("ready")
    say("is ready")
elif sys.argv[2] == "always" or restart == 0:
    wait_for("ready")
    sys.exit(5)
while True:
    signal.pause()
"""
)


@pytest.mark.parametrize(
    "flags", [["--shutdown-timeout", "1"], ["--shutdown-timeout", "600", "--workers-stop-timeout", "1"]]
)
def test_R13_a_rank_that_ignores_sigterm_is_killed_for_a_restart_and_after_a_failure(sandbox, flags):
    script = sandbox.script(STUBBORN)
    job = sandbox.launch("--nproc-per-node", "2", "--max-restarts", "1", *flags, script, "ignores", "always")
    assert job.wait() == 1, job.output
    for restart in (0, 1):
        assert job.output.count(f"rank 0 restart {restart} was asked by signal 15") == 1, job.output
    assert "killed by signal 9 (SIGKILL) from this launcher" in job.output
    sandbox.assert_clean()


@pytest.mark.parametrize("flags", [["--shutdown-timeout", "1"], ["--shutdown-timeout", "600", "--term-timeout", "1"]])
def test_R13_a_rank_that_ignores_sigterm_is_killed_when_the_launcher_is_stopped(sandbox, flags):
    job = sandbox.launch(*flags, sandbox.script(STUBBORN), "ignores", "once")
    job.wait_for("is ready")
    job.send(signal.SIGTERM)
    assert job.wait() == 143, job.output
    assert job.output.count("was asked by signal 15") == 1, job.output
    sandbox.assert_clean()


def test_R13_a_rank_that_saves_on_sigterm_has_the_time_that_was_asked_for(sandbox):
    flags = ["--shutdown-timeout", "0", "--workers-stop-timeout", "600", "--term-timeout", "600"]
    script = sandbox.script(STUBBORN)
    job = sandbox.launch("--nproc-per-node", "2", "--max-restarts", "1", *flags, script, "saves", "once")
    job.wait_for("rank 0 restart 1 is ready")
    assert "rank 0 restart 0 saved" in job.output
    job.send(signal.SIGTERM)
    assert job.wait() == 143, job.output
    assert "rank 0 restart 1 saved" in job.output
    sandbox.assert_clean()


def test_R9_a_rank_that_cannot_be_killed_is_given_up_with_its_node(sandbox, freezer):
    script = sandbox.script(
        HEAD
        + """
client.init_workload_monitoring()
while True:
    client.send_heartbeat()
    time.sleep(0.02)
"""
    )
    job = sandbox.launch(
        "--max-restarts", "3", "--shutdown-timeout", "0", "--ft-rank-heartbeat-timeout", "1",
        "--ft-exit-codes", "classified", script,
    )  # fmt: skip
    pid = int(job.wait_for("rank 0 restart 0 pid").split()[-1])
    (freezer / "cgroup.procs").write_text(str(pid))
    (freezer / "freezer.state").write_text("FROZEN")
    assert job.process.wait(GENEROUS) == 75, job.output
    assert Path(f"/proc/{pid}").exists()
    (freezer / "freezer.state").write_text("THAWED")
    job.wait()  # for the end of its output, which the rank has held open
    assert f"process {pid} does not die of SIGKILL: state D" in job.output
    assert "restart 1" not in job.output


# -- ranks that cannot start, or end early ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "command", "env", "code", "said"),
    [
        ([], "missing.py", {}, 2, "missing.py: no such script"),
        (["--no-python"], "./plain.py", {}, 2, "./plain.py: no such command, or it may not be executed"),
        ([], "./plain.py", {"PYTHON_EXEC": "/no/python"}, 2, "PYTHON_EXEC=/no/python: no such command"),
        (["--no-python"], "./orphan.sh", {}, 1, "cannot run ./orphan.sh: its interpreter"),
        (["--no-python"], "./garbage", {}, 1, "cannot run ./garbage: exec format error"),
    ],
)
def test_R20_a_rank_that_dies_before_its_program_runs_is_told_apart(sandbox, flags, command, env, code, said):
    sandbox.script("print('runs')", "plain.py")
    for name, text in {"orphan.sh": "#!/no/such/shell\n", "garbage": "\0\1\2 no program"}.items():
        Path(sandbox.script(text, name)).chmod(0o755)
    job = sandbox.launch(*flags, command, **env)
    assert job.wait() == code, job.output
    assert len([line for line in job.lines if said in line]) == 1, job.output
    assert "Traceback" not in job.output
    if code == 2:
        assert job.lines == [f"ft_launcher: {job.lines[0].removeprefix('ft_launcher: ')}", "<end of output>"]
    sandbox.assert_clean()


def test_R21_a_rank_that_is_done_early_is_no_failure_and_is_restarted_with_the_others(sandbox):
    script = sandbox.script(
        PLAIN_HEAD
        + """
if rank == 0:
    with open(f"pid.{restart}", "w") as file:
        file.write(str(os.getpid()))
    tell("written")
    sys.exit(0)
wait_for("written")
pid = open(f"pid.{restart}").read()
while os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/stat").read().split()[2] != "Z":
    time.sleep(0.01)
say("goes on alone")
sys.exit(4 if restart == 0 else 0)
"""
    )
    job = sandbox.launch("--nproc-per-node", "2", "--max-restarts", "1", script)
    assert job.wait() == 0, job.output
    assert "rank 1 restart 1 goes on alone" in job.output
    assert "ft_launcher: rank 0" not in job.output
    sandbox.assert_clean()


# -- ranks that hang --------------------------------------------------------------------------------------------------

HANGS = {
    "R5_in_python": "client.send_heartbeat()\nwhile True: time.sleep(100)",
    "R6_in_c_with_the_gil": (
        "client.send_heartbeat()\nctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)"
    ),
    "R8_stopped": "client.send_heartbeat()\nos.kill(os.getpid(), signal.SIGSTOP)",
    "R7_in_an_outer_section": (
        "client.start_section('outer')\n"
        "while True:\n    client.start_section('inner')\n    time.sleep(0.05)\n    client.end_section('inner')\n"
    ),
    "R10_after_shutdown": "client.send_heartbeat()\nclient.shutdown_workload_monitoring()\nwhile True: time.sleep(100)",
    "R10_at_exit": (
        "client.send_heartbeat()\nclient.shutdown_workload_monitoring()\n"
        "threading.Thread(target=threading.Event().wait).start()\nsys.exit(0)"
    ),
}


@pytest.mark.parametrize("where", HANGS)
def test_a_rank_that_hangs_is_killed_and_the_job_goes_on(sandbox, config, where):
    script = sandbox.script(
        HEAD
        + "client.init_workload_monitoring()\nif restart == 0 and rank == 1:\n"
        + "".join(f"    {line}\n" for line in HANGS[where].splitlines())
        + "if restart == 0:\n    while True:\n        client.send_heartbeat()\n        time.sleep(0.05)\n"
    )
    job = sandbox.launch("--nproc-per-node", "2", "--max-restarts", "1", "--ft-cfg-path", config, script)
    assert job.wait() == 0, job.output
    said = job.wait_for("; killing")
    assert "rank 1 (pid" in said
    assert "rank 0 restart 1" in job.output
    stacks = said.rpartition("its stacks are in ")[2]
    assert "most recent call first" in Path(stacks).read_text()


def test_R19_a_rank_that_hangs_before_it_connects_is_killed_once_another_has(sandbox):
    script = sandbox.script(
        HEAD
        + """
if restart == 0:
    if rank == 1:
        time.sleep(600)
    client.init_workload_monitoring()
    while True:
        client.send_heartbeat()
        time.sleep(0.05)
"""
    )
    flags = ["--nproc-per-node", "2", "--max-restarts", "1", "--ft-initial-rank-heartbeat-timeout", "5"]
    job = sandbox.launch(*flags, script)
    assert job.wait() == 0, job.output
    said = job.wait_for("; killing")
    assert "ft_launcher: rank 1 (pid" in said
    assert "no heartbeat or section since its start for" in said
    assert "timeout 5 s" in said
    assert "rank 1 restart 1" in job.output
    assert "no rank connected" not in job.output


def test_R19_a_script_that_never_connects_is_not_killed_and_the_launcher_says_so_once(sandbox):
    script = sandbox.script("import time; time.sleep(1); print('done')")
    job = sandbox.launch("--nproc-per-node", "2", "--ft-initial-rank-heartbeat-timeout", "0.3", script)
    assert job.wait() == 0, job.output
    assert job.output.count("done") == 2
    assert job.output.count("ft_launcher: no rank connected to its monitor") == 1
    assert job.lines[-2] == job.wait_for("no rank connected to its monitor")
    sandbox.assert_clean()


def test_R19_a_script_that_never_connects_is_an_error_where_monitoring_is_required(sandbox):
    job = sandbox.launch("--ft-require-monitoring", sandbox.script("print('done')"))
    assert job.wait() == 1, job.output
    assert job.output.count("ft_launcher: no rank connected to its monitor, and monitoring is required") == 1
    sandbox.assert_clean()


def test_R19_a_rank_that_ends_as_soon_as_it_connected_was_monitored(sandbox):
    # Its monitor is stopped before it ends, so the launcher must have been told by the time that the rank was.
    script = sandbox.script(
        HEAD
        + """
client.init_workload_monitoring()
for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
    try:
        stat, command = open(f"/proc/{pid}/stat").read(), open(f"/proc/{pid}/cmdline").read()
    except OSError:
        continue
    if int(stat.rpartition(")")[2].split()[1]) == os.getppid() and "rank_monitor_server" in command:
        os.kill(pid, signal.SIGSTOP)
        print("stopped the monitor", flush=True)
os._exit(0)
"""
    )
    job = sandbox.launch("--ft-require-monitoring", script)
    assert job.wait() == 0, job.output
    assert "stopped the monitor" in job.output
    sandbox.assert_clean()


# -- ranks that ask for something -------------------------------------------------------------------------------------

REQUEST = """
client.init_workload_monitoring()
if rank == 0:
    request = WorkloadControlRequest(WorkloadAction.{action}, "the loss is not a number")
    client.send_workload_control_request(request)
    {then}
"""
GO_ON = "while True: time.sleep(1)"


@pytest.mark.parametrize(
    ("action", "style", "code", "sentence"),
    [
        ("ShutdownWorkload", "torchrun", 1, "a rank asked to shut the job down: the loss is not a number"),
        ("ShutdownWorkload", "classified", 93, "a rank asked to shut the job down: the loss is not a number"),
        ("ExcludeThisNode", "classified", 75, "a rank asked to exclude this node: the loss is not a number"),
    ],
)
def test_V11_a_healthy_rank_ends_the_job_at_once_without_a_restart(sandbox, action, style, code, sentence):
    script = sandbox.script(HEAD + REQUEST.format(action=action, then="pass") + GO_ON)
    flags = ["--nproc-per-node", "2", "--max-restarts", "3", "--ft-exit-codes", style]
    job = sandbox.launch(*flags, script)
    assert job.wait() == code, job.output
    assert f"ft_launcher: ending the job: {sentence}" in job.output
    assert "restart 1" not in job.output
    sandbox.assert_clean()


def test_V11_a_request_to_continue_changes_nothing(sandbox):
    script = sandbox.script(HEAD + REQUEST.format(action="Continue", then="print('goes on')"))
    job = sandbox.launch("--nproc-per-node", "2", script)
    assert job.wait() == 0, job.output
    assert "goes on" in job.output
    assert "ending the job" not in job.output
    sandbox.assert_clean()


def test_V10_a_request_is_honoured_although_its_rank_dies_right_after_it(sandbox):
    script = sandbox.script(
        HEAD + REQUEST.format(action="ShutdownWorkload", then="os.kill(os.getpid(), signal.SIGKILL)") + GO_ON
    )
    flags = ["--nproc-per-node", "2", "--max-restarts", "3", "--ft-exit-codes", "classified"]
    jobs = [sandbox.launch(*flags, script) for _ in range(5)]
    for job in jobs:
        assert job.wait() == 93, job.output
        assert "ending the job: a rank asked to shut the job down" in job.output
        assert "restart 1" not in job.output
    sandbox.assert_clean()


# -- restarts ---------------------------------------------------------------------------------------------------------

SHOW_PORT = PLAIN_HEAD + "say('port', os.environ['MASTER_PORT'])\nsys.exit(1 if restart < 2 else 0)\n"


def ports(job):
    assert job.wait() == 0, job.output
    return [line.rpartition(" ")[2] for line in job.lines if line.startswith("rank 0 restart ")]


def test_each_restart_has_a_store_on_a_port_of_its_own(sandbox):
    found = ports(sandbox.launch("--max-restarts", "2", sandbox.script(SHOW_PORT)))
    assert len(set(found)) == 3, found


def test_a_master_port_that_was_given_stays(sandbox):
    port = str(free_port())
    assert ports(sandbox.launch("--max-restarts", "2", "--master-port", port, sandbox.script(SHOW_PORT))) == [port] * 3
