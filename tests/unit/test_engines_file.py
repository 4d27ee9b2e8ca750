"""engines.yaml: what it may say, and the one line about each mistake."""

from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="needs the extra engines")

from ft_launcher.engines import EngineConfig, EngineSpec, EngineSupervisor, SglangRouter, VllmRouter
from ft_launcher.engines.file import ServiceSettings, read_engines_file
from ft_launcher.errors import UsageError


def read(tmp_path: Path, text: str) -> ServiceSettings:
    path = tmp_path / "engines.yaml"
    path.write_text(text)
    return read_engines_file(path)


def test_a_file_says_which_engines_there_are_and_how_they_are_watched(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        """
health_check_first_wait: 5m
health_check_timeout: 0.5
health_check_failures: 3
mass_failure_fraction: 0.25
min_serving: 0
preset: sglang
router: http://127.0.0.1:30000/
command: [serve, --port, "{port}", --json, '{"a": 1}']
env: {A: "1"}
refresh: push {url} {version}
log_dir: logs
metrics_port: 9100
engines:
  - {name: a, port: 0x10}
  - {name: b, command: serve --other, preset: http, health_path: /alive, router_kind: vllm}
  - {name: c, url: "http://10.0.0.1:8000", env: {B: "2"}}
""".replace("0x10", "8001"),
    )
    assert settings.config == EngineConfig(
        health_check_first_wait=300.0,
        health_check_timeout=0.5,
        health_check_failures=3,
        mass_failure_fraction=0.25,
        min_serving=0,
    )
    assert settings.engines == (
        EngineSpec(name="a", port=8001, command=("serve", "--port", "{port}", "--json", '{"a": 1}'), env={"A": "1"}),
        EngineSpec(name="b", command=("serve", "--other"), env={"A": "1"}),
        EngineSpec(name="c", url="http://10.0.0.1:8000", env={"B": "2"}),
    )
    assert settings.path == str(tmp_path / "engines.yaml")
    assert settings.refresh == ("push", "{url}", "{version}")
    assert (settings.log_dir, settings.metrics_port) == (Path("logs"), 9100)
    # One for all that are behind the same: what it has under way is known in one place.
    assert isinstance(settings.routers["a"], SglangRouter)
    assert settings.routers["a"] is settings.routers["c"]
    assert isinstance(settings.routers["b"], VllmRouter)


ONE = "engines: [{name: a, command: x}]"
MISTAKES = {
    "": "1: must be a mapping, with a list of engines under the key engines",
    "[1]": "1: must be a mapping, with a list of engines under the key engines",
    "preset: vllm": " engines: missing; it must be a list of engines",
    "engines: []": "1: engines: a sequence: must be a list of engines",
    "engines: [a]": "1: engines[0]: a: must be a mapping with a name and a command or a url",
    "engines:\n- {comand: x}": "2: engines[0].comand: no such key; did you mean command?",
    "engines:\n- {command: x}": "2: engines[0]: name: missing",
    "engines:\n- {name: a}": "2: engines[0]: engine 'a': give either command or url",
    "engines:\n- {name: a/b, command: x}": "2: engines[0]: engine 'a/b': its name must be 1 to 64 printable characters"
    " without a slash",
    "engines:\n- {name: a, command: x, url: 'http://b'}": "2: engines[0]: engine 'a': give either command or url",
    "engines:\n- {name: a, url: b}": "2: engines[0].url: b: must be a URL that begins with http:// or https://",
    "engines:\n- {name: a, command: x}\n- {name: a, command: y}": "3: engines[1].name: a: a second engine of this name",
    "engines:\n- {name: a, command: x, port: 70000}": "2: engines[0].port: 70000: must be a port from 0 to 65535",
    "engines:\n- {name: a, command: 'x \"'}": '2: engines[0].command: x ": no closing quotation',
    "engines:\n- {name: a, command: {}}": "2: engines[0].command: a mapping: must be a command: a text,"
    " or a list of texts",
    "engines:\n- {name: a, command: x, env: [1]}": "2: engines[0].env: a sequence: must be a mapping of names to texts",
    "engines:\n- {name: a, command: x, preset: vlm}": "2: engines[0].preset: vlm: must be vllm or sglang or http;"
    " did you mean vllm?",
    "engines:\n- {name: a, command: x, preset: vllm, health_path: /a}": "2: engines[0].health_path: /a: must be a path"
    " such as /health, and only with preset http",
    "engines:\n- {name: a, command: x, router: 'http://b'}": "2: engines[0].router: router_kind must be sglang or vllm",
    f"{ONE}\nengines: []": "2: engines: given twice",
    f"{ONE}\nhealth_check_intervall: 3": "2: health_check_intervall: no such key; did you mean health_check_interval?",
    f"{ONE}\nhealth_check_interval: 0": "2: health_check_interval: 0: must be a number of seconds above 0"
    " (90, 90s, 5m, 1h)",
    f"{ONE}\nhealth_check_interval: fast": "2: health_check_interval: fast: must be a number of seconds above 0"
    " (90, 90s, 5m, 1h)",
    f"{ONE}\nhealth_check_failures: 1.5": "2: health_check_failures: 1.5: must be a whole number, 1 or more",
    f"{ONE}\nmax_restarts: -1": "2: max_restarts: -1: must be a whole number, 0 or more",
    f"{ONE}\nmass_failure_fraction: 2": "2: mass_failure_fraction: 2: must be a number from 0 to 1",
    f"{ONE}\nmass_failure_fraction: nan": "2: mass_failure_fraction: nan: must be a number from 0 to 1",
    f"{ONE}\nterm_grace: [1]": "2: term_grace: a sequence: must be a number",
    f"{ONE}\nlog_dir: !!python/name:os.system x": "2:10: tag 'tag:yaml.org,2002:python/name:os.system' is not allowed",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_each_mistake_is_one_line_with_its_place_and_what_is_allowed(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError) as raised:
        read(tmp_path, text)
    assert str(raised.value) == f"{tmp_path / 'engines.yaml'}:{MISTAKES[text]}"
    assert raised.value.exit_code == 2


def test_a_file_that_is_not_there_is_named_with_one_that_is_like_it(tmp_path: Path) -> None:
    read(tmp_path, ONE)
    with pytest.raises(UsageError, match=r"engine.yaml: no such file; did you mean .*/engines.yaml\?"):
        read_engines_file(tmp_path / "engine.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"health_check_interval": 0.0}, "health_check_interval is 0.0; it must be a number of seconds above 0"),
        ({"health_check_timeout": nan}, "health_check_timeout is nan; it must be a number of seconds above 0"),
        ({"term_grace": -1.0}, "term_grace is -1.0; it must be a number of seconds, 0 or more"),
        ({"health_check_failures": 0}, "health_check_failures is 0; it must be a whole number, 1 or more"),
        ({"mass_failure_fraction": 1.1}, "mass_failure_fraction is 1.1; it must be a number from 0 to 1"),
    ],
)
def test_settings_from_python_are_checked_alike(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        EngineSupervisor(EngineConfig(**settings), [EngineSpec(name="a", command=["x"])])
    assert str(raised.value) == message


def test_whoever_wants_no_checks_may_say_so() -> None:
    EngineConfig(health_check_interval=inf, health_check_failures=1 << 62).check()
