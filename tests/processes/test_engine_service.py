"""The command ft_engines, and the service that ft_launcher runs beside a trainer, as people and trainers use them."""

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytest.importorskip("aiohttp", reason="needs the extra engines")

from ft_launcher.engines import Engine, EngineCapacityError, EngineClient, EngineError, State
from ft_launcher.engines.file import read_engines_file
from ft_launcher.engines.service import EngineService
from tests.conftest import GENEROUS, Running, Sandbox, wait_until_gone
from tests.processes.test_engines import FAKE, ask, ask_to_die, load

WaitFor = Callable[[Callable[[], bool], str], None]
COMMAND = (sys.executable, "-m", "ft_launcher.engines.command")
FILE = f"""
health_check_first_wait: 1ms
health_check_interval: 500ms
health_check_timeout: 1s
ready_interval: 50ms
term_grace: 1s
backoff_first: 50ms
command: [{sys.executable}, {FAKE}, "{{port}}"]
engines: [{{name: a}}, {{name: b}}]
"""
PUSH = """
import json, sys, urllib.request
url, version = sys.argv[1:]
body = json.dumps({"version": version}).encode()
urllib.request.urlopen(urllib.request.Request(url + "/load_weights", body)).read()
"""


def started(sandbox: Sandbox, *more: str, text: str = FILE) -> tuple[Running, EngineClient]:
    """Start ft_engines on a file; its process, and a client."""
    running = sandbox.start(*COMMAND, "run", sandbox.script(text, "engines.yaml"), *more)
    path = running.wait_for("; socket ").rpartition("; socket ")[2]
    return running, EngineClient(path)


@pytest.fixture
def service(sandbox: Sandbox) -> EngineClient:
    """A client of a service in another process, with two engines that serve."""
    client = started(sandbox)[1]
    client.wait_serving(2)
    return client


def test_a_service_ends_on_sigterm_with_all_that_it_has_started(sandbox: Sandbox) -> None:
    running, client = started(sandbox)
    client.wait_serving(2)
    running.send(signal.SIGTERM)
    assert running.wait() == 128 + signal.SIGTERM
    sandbox.assert_clean()
    with pytest.raises(EngineError, match="no engine service at"):
        client.engines()


def test_a_service_that_is_killed_leaves_no_engine_and_the_next_one_clears_its_socket_away(sandbox: Sandbox) -> None:
    running, client = started(sandbox)
    client.wait_serving(2)
    family = [each.pid for each in psutil.Process(running.pid).children(recursive=True)]
    running.send(signal.SIGKILL)
    running.wait()
    assert wait_until_gone(family, GENEROUS) == []
    assert sandbox.leftovers()
    status = sandbox.start(*COMMAND, "status", "engines.yaml")
    assert status.wait() == 1
    assert "no service of this file runs here; start one with: ft_engines run engines.yaml" in status.output
    again, client = started(sandbox)
    client.wait_serving(2)
    assert sockets(sandbox) == [client.socket_path]
    again.send(signal.SIGINT)
    assert again.wait() == 128 + signal.SIGINT
    sandbox.assert_clean()


def test_status_shows_the_engines_of_a_file_or_a_socket(sandbox: Sandbox, service: EngineClient) -> None:
    service.set_version("v1")  # nobody gives it to them: they are refreshed for ever
    status = sandbox.start(*COMMAND, "status", "engines.yaml")
    assert status.wait() == 1
    assert "0 of 2 serve, weights v1; " in status.output
    shown = sandbox.start(*COMMAND, "status", "--json", service.socket_path)
    assert shown.wait() == 1
    seen = json.loads("\n".join(shown.lines[:-1]))
    assert [(each["name"], each["state"]) for each in seen["engines"]] == [("a", "refreshing"), ("b", "refreshing")]
    assert (seen["file"], seen["version"]) == (str(sandbox.path / "engines.yaml"), "v1")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "bad.yaml"], "bad.yaml:2: engines[0].comand: no such key; did you mean command?"),
        (["run", "none.yaml"], "none.yaml: no such file"),
        (["runn", "bad.yaml"], "argument run|status: 'runn' must be one of run, status; did you mean run?"),
        (["status", "bad.yaml", "--", "x"], "--: a trainer's command after it belongs to run"),
        (["run", "bad.yaml", "--json"], "--json belongs to status"),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(sandbox: Sandbox, arguments: list[str], line: str) -> None:
    sandbox.script("engines:\n- {comand: x}\n", "bad.yaml")
    running = sandbox.start(*COMMAND, *arguments)
    assert running.wait() == 2
    assert running.lines[:-1] == [f"ft_engines: {line}"]


def test_a_trainer_has_the_engines_while_it_runs_and_its_exit_code_is_the_commands(sandbox: Sandbox) -> None:
    trainer = sandbox.script(
        """
import os, sys
from ft_launcher.engines import EngineClient
client = EngineClient.from_environment()
with client.round(0) as engines:
    print("round", len(engines) >= 1, flush=True)
os.system("sleep 1000 &")  # what it leaves behind ends too
sys.exit(7)
"""
    )
    running, _ = started(sandbox, "--", sys.executable, trainer, "--json")
    assert running.wait() == 7
    assert "round True" in running.lines
    sandbox.assert_clean()


def test_a_signal_reaches_the_trainer_first(sandbox: Sandbox) -> None:
    trainer = sandbox.script(
        """
import signal, sys
from ft_launcher.engines import EngineClient
client = EngineClient.from_environment()
def save(number, frame):
    print("saved with", len(client.wait_serving(2)), "engines", flush=True)
    sys.exit(5)
signal.signal(signal.SIGTERM, save)
print("trains with", len(client.wait_serving(2)), flush=True)
while True:
    signal.pause()
"""
    )
    # The grace for the trainer is the one for engines.
    running, _ = started(sandbox, "--", sys.executable, trainer, text=FILE.replace("term_grace: 1s", "term_grace: 30s"))
    running.wait_for("trains with 2")
    running.send(signal.SIGTERM)
    assert running.wait() == 5
    assert "saved with 2 engines" in running.output
    sandbox.assert_clean()


def test_a_client_does_what_the_supervisor_does(service: EngineClient, wait_for: WaitFor) -> None:
    engines = service.wait_serving(2)
    assert [(each.name, each.state, each.incarnation) for each in engines] == [
        ("a", State.SERVING, 1),
        ("b", State.SERVING, 1),
    ]
    with service.paused("weights"):
        ask_to_die(engines[0])
        assert [each.name for each in service.serving()] in (["a", "b"], ["b"])
    wait_for(lambda: service.wait_serving(2)[0].incarnation == 2, "it is back after the pause")
    with pytest.raises(KeyError, match="c"):
        service.request_restart("c")
    service.request_restart("b")
    with service.round(1) as serving:
        assert serving
    assert {each.name: each.incarnation for each in service.wait_serving(2)} == {"a": 2, "b": 2}


def test_an_error_of_the_supervisor_is_the_clients(sandbox: Sandbox) -> None:
    _, client = started(sandbox, text="max_restarts: 0\nengines: [{name: a, command: /no/such/program}]")
    with pytest.raises(EngineCapacityError, match="a: exited with code 127"):
        client.wait_serving(1)


def test_what_a_client_holds_ends_with_it(sandbox: Sandbox, service: EngineClient, wait_for: WaitFor) -> None:
    holder = sandbox.start(
        sys.executable,
        sandbox.script(
            f"""
import signal
from ft_launcher.engines import EngineClient
client = EngineClient({service.socket_path!r})
with client.round(0), client.paused("weights"):
    print("holds", flush=True)
    signal.pause()
"""
        ),
    )
    holder.wait_for("holds")
    engine = service.wait_serving(2)[0]
    ask_to_die(engine)
    # Neither in a round nor in a pause is it started again.
    holder.send(signal.SIGKILL)
    holder.wait()
    wait_for(lambda: any(each.incarnation == 2 for each in service.wait_serving(2)), "it is started again")


def test_a_trainer_in_another_process_gives_engines_their_weights(service: EngineClient, wait_for: WaitFor) -> None:
    given: list[tuple[str, int, str]] = []

    def refresh(engine: Engine, version: str) -> None:
        given.append((engine.name, engine.incarnation, version))
        load(engine, version)

    service.set_version("v1")
    assert service.serving() == []  # while nobody gives them the weights
    with service.refreshing(refresh):
        for engine in service.wait_serving(2):
            assert engine.version == ask(engine.url, "/generate", {})["version"] == "v1"
        ask_to_die(service.serving()[0])
        wait_for(lambda: service.wait_serving(2)[0].incarnation == 2, "it is back with its weights")
    assert sorted(given) == [("a", 1, "v1"), ("a", 2, "v1"), ("b", 1, "v1")]


def test_weights_that_one_trainer_began_to_give_are_given_by_the_next(sandbox: Sandbox, service: EngineClient) -> None:
    dies = sandbox.start(
        sys.executable,
        sandbox.script(
            f"""
import signal
from ft_launcher.engines import EngineClient
client = EngineClient({service.socket_path!r})
def refresh(engine, version):
    print("begins", flush=True)
    signal.pause()
with client.refreshing(refresh):
    client.set_version("v1")
    signal.pause()
"""
        ),
    )
    dies.wait_for("begins")
    dies.send(signal.SIGKILL)
    dies.wait()
    with service.refreshing(load):
        for engine in service.wait_serving(2):
            assert (engine.incarnation, ask(engine.url, "/generate", {})["version"]) == (1, "v1")


def test_a_hook_that_fails_is_the_engines_reason(service: EngineClient) -> None:
    failed = threading.Event()

    def refresh(engine: Engine, version: str) -> None:
        if engine.name == "a" and engine.incarnation == 1:
            failed.set()
            raise ValueError("no such weights")
        load(engine, version)

    with service.refreshing(refresh):
        service.set_version("v1")
        assert {each.name: each.incarnation for each in service.wait_serving(2)} == {"a": 2, "b": 1}
    assert failed.is_set()


def test_a_command_of_the_file_gives_engines_their_weights(sandbox: Sandbox) -> None:
    push = sandbox.script(PUSH, "push.py")
    text = f"{FILE}refresh: [{sys.executable}, {push}, '{{url}}', '{{version}}']\n"
    _, client = started(sandbox, text=text)
    client.set_version("v7")
    for engine in client.wait_serving(2):
        assert ask(engine.url, "/generate", {})["version"] == "v7"


def test_a_call_that_nobody_understands_ends_that_connection_alone(service: EngineClient) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as strange:
        strange.connect(service.socket_path)
        strange.send(b"\x00\xff")
        assert strange.recv(100) == b""
    assert len(service.engines()) == 2


def test_only_this_user_can_reach_the_socket(service: EngineClient) -> None:
    path = Path(service.socket_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_service_in_this_process_lets_waiting_callers_go_when_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "engines.yaml"
    path.write_text(f"engines: [{{name: a, command: '{sys.executable} {FAKE} {{port}}'}}]")
    answers: list[str] = []
    with EngineService(read_engines_file(path), os.environ) as service:
        client = EngineClient(service.socket_path)
        client.wait_serving(1)

        def wait() -> None:
            try:
                client.wait_serving(2)
            except EngineError as error:
                answers.append(str(error))

        waiting = threading.Thread(target=wait)
        waiting.start()
    waiting.join(GENEROUS)
    assert len(answers) == 1


TRAIN = """
import os
from ft_launcher.engines import EngineClient
client = EngineClient.from_environment()
restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
print("restart", restart, sorted((each.name, each.incarnation) for each in client.wait_serving(2)), flush=True)
if restart == "0":
    raise SystemExit(3)
"""


def test_engines_beside_a_job_outlive_restarts_of_its_workers_and_end_with_it(sandbox: Sandbox) -> None:
    sandbox.script(FILE, "engines.yaml")
    job = sandbox.launch("--max-restarts", "1", "--ft-service", "engines.yaml", sandbox.script(TRAIN))
    assert job.wait() == 0
    for restart in "01":
        assert f"restart {restart} [('a', 1), ('b', 1)]" in job.output
    assert job.output.count("(start 1): starting") == 2
    sandbox.assert_clean()


def test_engines_beside_a_job_end_with_its_launcher_however_that_ends(sandbox: Sandbox) -> None:
    sandbox.script(FILE, "engines.yaml")
    script = sandbox.script(TRAIN.replace('if restart == "0":', "import signal; signal.pause()\nif False:"))
    job = sandbox.launch("--ft-service", "engines.yaml", script)
    job.wait_for("restart 0")
    # All of the step are warned and told to end, as by Slurm; the engines are there until the workers have ended.
    service = next(each for each in psutil.Process(job.pid).children() if "engines.command" in " ".join(each.cmdline()))
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        service.send_signal(number)
    assert ask(EngineClient(*sockets(sandbox)).wait_serving(2)[0].url, "/about")
    job.send(signal.SIGKILL)
    job.wait()
    sandbox.assert_clean(GENEROUS)


def sockets(sandbox: Sandbox) -> list[str]:
    return [str(sandbox.temporary / path) for path in sandbox.leftovers() if Path(path).name == "engines"]


def test_a_mistake_in_the_file_of_a_jobs_engines_is_one_line_and_no_worker_starts(sandbox: Sandbox) -> None:
    sandbox.script("engines:\n- {name: a, command: x, prot: 3}\n", "engines.yaml")
    job = sandbox.launch("--ft-service", "engines.yaml", sandbox.script(TRAIN))
    assert job.wait() == 2
    expected = "ft_launcher: --ft-service: engines.yaml:2: engines[0].prot: no such key; did you mean port?"
    assert job.lines[:-1] == [expected]
    sandbox.assert_clean()
