"""What may be written for a setting, where, and what a person is told when it cannot be meant."""

import argparse
import os
import signal
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_launcher import page
from ft_launcher.config import (
    ConfigOptions,
    FaultToleranceConfig,
    Setting,
    add_flags,
    described,
    read_config_file,
    read_options,
    render,
    resolve,
)
from ft_launcher.errors import UsageError

PEER_DEFAULTS = {
    "workload_check_interval": 5.0,
    "initial_rank_heartbeat_timeout": 3600.0,
    "rank_heartbeat_timeout": 2700.0,
    "rank_section_timeouts": {},
    "rank_out_of_section_timeout": None,
    "node_health_check_interval": 5.0,
    "safety_factor": 5.0,
    "rank_termination_signal": signal.SIGKILL,
    "log_level": 20,
    "restart_check_interval": 60.0,
    "enable_nic_monitor": False,
    "pci_topo_file": None,
    "link_down_path_template": None,
    "skip_section_response": True,
    "use_infra_group_rank": True,
}
OUR_DEFAULTS = {
    "rank_startup_timeout": None,
    "rank_teardown_timeout": 1800.0,
    "rank_termination_grace": 5.0,
    "restart_policy": "any-failed",
    "suspect_after": 3,
    "require_monitoring": False,
    "exit_codes": "torchrun",
    "preemption_signals": None,
    "preemption_sources": None,
    "preemption_grace": None,
}
"""Nvidia-resiliency-ext 0.5.0's, and those that only we have."""

LIMIT = "must be a duration above 0 (90, 90s, 5m, 1h)"
TIMEOUT = f"{LIMIT} or null"
NAME = "the name of a section must be 1 to 64 bytes of printable UTF-8"
LEVEL = "must be debug, info, warning, error, critical or a number from 10 to 50"
KEY = "ft.yaml:2: fault_tolerance"


def from_file(*lines: str, lenient: bool = False):
    text = "fault_tolerance:\n" + "".join(f"  {line}\n" for line in lines)
    return resolve(text, "ft.yaml", {}, {}, lenient=lenient)


def from_text(text: str):
    return resolve(text, "ft.yaml", {}, {})


def from_flags(**flags):
    return resolve(None, "", {}, {f"ft_{name}": value for name, value in flags.items()})


def from_environ(**variables):
    return resolve(None, "", {f"PET_FT_{name}": value for name, value in variables.items()}, {})


def parse(*arguments: str) -> dict[str, str | None]:
    parser = argparse.ArgumentParser()
    add_flags(parser.add_argument_group("fault tolerance"))
    return vars(parser.parse_args(arguments))


def complaints(ask) -> list[str]:
    """The lines that a person would see, none when all is well."""
    try:
        ask()
    except UsageError as error:
        return str(error).splitlines()
    return []


def complaint(ask) -> str:
    with pytest.raises(UsageError) as error:
        ask()
    return str(error.value)


def test_every_key_of_the_peer_and_ours_has_its_default():
    config = FaultToleranceConfig()
    values = {name: getattr(config, name) for name in described(FaultToleranceConfig)}
    assert values == PEER_DEFAULTS | OUR_DEFAULTS


# Durations.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90.0),
        ("90.5", 90.5),
        ("90s", 90.0),
        ("500ms", 0.5),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("1.5h", 5400.0),
        (".5", 0.5),
        ("1e-3", 0.001),
        ("010", 10.0),
        ("null", None),
        ("None", None),
    ],
)
def test_F3_a_duration_means_the_same_from_every_source(text, seconds):
    found = {
        from_file(f"rank_heartbeat_timeout: {text}").config.rank_heartbeat_timeout,
        from_file(f"rank_heartbeat_timeout: '{text}'").config.rank_heartbeat_timeout,
        from_flags(rank_heartbeat_timeout=text).config.rank_heartbeat_timeout,
        from_environ(RANK_HEARTBEAT_TIMEOUT=text).config.rank_heartbeat_timeout,
        FaultToleranceConfig.from_kwargs(rank_heartbeat_timeout=text).rank_heartbeat_timeout,
        from_flags(rank_section_timeouts=f"step:{text}").config.rank_section_timeouts["step"],
    }
    assert found == {seconds}


@pytest.mark.parametrize(
    "text", ["-5", "0", "0s", "nan", "inf", ".inf", "1e9", "1e999", "5 m", "5d", "1:30", "1_000", "0x10"]
)
def test_F2_no_duration_is_negative_zero_infinite_or_no_number(text):
    for ask in (
        lambda: from_file(f"rank_heartbeat_timeout: {text}"),
        lambda: from_flags(rank_heartbeat_timeout=text),
        lambda: from_environ(WORKLOAD_CHECK_INTERVAL=text),
        lambda: from_flags(rank_section_timeouts=f"step:{text}"),
    ):
        assert LIMIT in complaint(ask) or "durations by section" in complaint(ask)


def test_F2_only_the_grace_may_be_zero():
    assert from_flags(rank_termination_grace="0").config.rank_termination_grace == 0.0
    assert complaint(lambda: from_flags(rank_termination_grace="null")) == (
        "--ft-rank-termination-grace null: must be a duration (90, 90s, 5m, 1h)"
    )


@given(st.floats(min_value=0, max_value=1e9, exclude_min=True, exclude_max=True))
def test_a_duration_survives_being_written_and_read(seconds):
    written = described(FaultToleranceConfig)["rank_heartbeat_timeout"].kind.write(seconds)
    assert from_flags(rank_heartbeat_timeout=written).config.rank_heartbeat_timeout == seconds
    assert FaultToleranceConfig(rank_heartbeat_timeout=seconds).rank_heartbeat_timeout == seconds


@given(st.integers(1, 10**6), st.sampled_from([("ms", 0.001), ("s", 1), ("m", 60), ("", 1)]))
def test_a_unit_is_what_it_says(count, unit):
    letters, seconds = unit
    found = from_flags(rank_heartbeat_timeout=f"{count}{letters}").config.rank_heartbeat_timeout
    assert found == pytest.approx(count * seconds)


@pytest.mark.parametrize(("setting", "seen"), [("1800000", True), ("168h", False), ("169h", True)])
def test_F9_a_timeout_of_more_than_a_week_is_doubted(setting, seen):
    assert bool(from_flags(rank_heartbeat_timeout=setting).warnings) is seen
    assert bool(from_flags(rank_section_timeouts=f"step:{setting}").warnings) is seen


def test_F9_the_doubt_says_how_long_it_is_and_where_it_stands():
    assert from_file("rank_heartbeat_timeout: 1800000", "rank_section_timeouts: {s: 999h}").warnings == [
        f"{KEY}.rank_heartbeat_timeout: 1800000: that is 500 h; a number without a unit is seconds",
        f"{KEY.replace('2', '3')}.rank_section_timeouts: s: that is 999 h; a number without a unit is seconds",
    ]


def test_a_value_that_was_forgotten_is_null_and_doubted():
    found = from_file("rank_heartbeat_timeout:")
    assert found.config.rank_heartbeat_timeout is None
    assert found.warnings == [f"{KEY}.rank_heartbeat_timeout: empty, which is taken as null"]
    assert from_file("rank_heartbeat_timeout: ~").warnings == []


def test_F10_contradictory_timeouts_are_doubted():
    (line,) = from_flags(rank_startup_timeout="2h").warnings
    assert line.startswith("rank_startup_timeout is longer than initial_rank_heartbeat_timeout")
    assert from_flags(rank_startup_timeout="30m").warnings == []
    assert from_flags(rank_startup_timeout="2h", initial_rank_heartbeat_timeout="null").warnings == []


# Precedence and origins.

OTHER_VALUES: dict[str, tuple[list[str], list[Any]]] = {
    "rank_heartbeat_timeout": (["1s", "2s", "3s"], [1.0, 2.0, 3.0]),
    "rank_section_timeouts": (["a:1", "b:2", "a:3,b:4"], [{"a": 1.0}, {"b": 2.0}, {"a": 3.0, "b": 4.0}]),
    "log_level": (["debug", "WARN", "45"], [10, 30, 45]),
    "require_monitoring": (["yes", "0", "On"], [True, False, True]),
    "restart_policy": (
        ["min-healthy", "any-failed", "min-healthy"],
        ["min-healthy", "any-failed", "min-healthy"],
    ),
    "rank_termination_signal": (
        ["SIGTERM", "sigusr1", "6"],
        [signal.SIGTERM, signal.SIGUSR1, signal.SIGABRT],
    ),
    "pci_topo_file": (["a b.xml", "/c", "null"], ["a b.xml", "/c", None]),
}


@given(st.sampled_from(sorted(OTHER_VALUES)), st.sets(st.sampled_from(["file", "environ", "flags"])))
def test_F8_the_last_of_default_file_variable_and_flag_wins_and_is_named(name, sources):
    texts, values = OTHER_VALUES[name]
    flag, variable = f"--ft-{name.replace('_', '-')}", f"PET_FT_{name.upper()}"
    found = resolve(
        f"x:\n  fault_tolerance: {{{name}: '{texts[0]}'}}\n" if "file" in sources else None,
        "ft.yaml",
        {variable: texts[1]} if "environ" in sources else {},
        {f"ft_{name}": texts[2] if "flags" in sources else None},
    )
    default = described(FaultToleranceConfig)[name].default
    expected = Setting(default, "default")
    for source, setting in (
        ("file", Setting(values[0], "ft.yaml:2")),
        ("environ", Setting(values[1], variable)),
        ("flags", Setting(values[2], flag)),
    ):
        expected = setting if source in sources else expected
    assert found.settings[name] == expected
    assert getattr(found.config, name) == expected.value
    assert {other: each for other, each in found.settings.items() if other != name} == {
        other: Setting(field.default, "default")
        for other, field in described(FaultToleranceConfig).items()
        if other != name
    }


def test_F8_a_wrong_value_is_an_error_even_where_a_flag_overrides_it():
    text = "fault_tolerance: {rank_heartbeat_timeout: -5}"
    flags = {"ft_rank_heartbeat_timeout": "5"}
    assert complaint(lambda: resolve(text, "ft.yaml", {}, flags)).endswith(f"-5: {TIMEOUT}")


def test_an_empty_variable_is_not_given_and_an_empty_flag_is_null():
    # PET_FT_X="$UNSET" must not end the hang detection; an empty flag does, as in the peer.
    assert from_environ(RANK_HEARTBEAT_TIMEOUT="").settings["rank_heartbeat_timeout"].origin == "default"
    found = from_flags(rank_heartbeat_timeout="")
    assert found.config.rank_heartbeat_timeout is None
    assert found.warnings == ["--ft-rank-heartbeat-timeout: empty, which is taken as null"]


def test_F1_an_unknown_variable_is_a_warning_that_names_the_nearest():
    assert from_environ(LOGLEVEL="5", CFG_PATHS="x", ZZZ="1", CFG_PATH="x").warnings == [
        "PET_FT_CFG_PATHS: no such variable; did you mean PET_FT_CFG_PATH? (ignored)",
        "PET_FT_LOGLEVEL: no such variable; did you mean PET_FT_LOG_LEVEL? (ignored)",
        "PET_FT_ZZZ: no such variable (ignored)",
    ]


def test_the_table_of_settings_is_a_file_that_means_the_same():
    found = resolve(
        "fault_tolerance:\n  pci_topo_file: /a b/\u00e9.xml\n",
        "ft.yaml",
        {"PET_FT_RANK_SECTION_TIMEOUTS": "step:30,eval:null"},
        parse("--ft-log-level", "debug", "--ft-require-monitoring"),
    )
    table = render(found.settings)
    lines = table.splitlines()
    assert lines[0] == "fault_tolerance:"
    assert "  rank_heartbeat_timeout: 45m             # default" in lines
    assert '  rank_section_timeouts: {"step": 30s, "eval": null}  # PET_FT_RANK_SECTION_TIMEOUTS' in lines
    assert '  pci_topo_file: "/a b/\u00e9.xml"             # ft.yaml:2' in lines
    assert "  require_monitoring: true                # --ft-require-monitoring" in lines
    assert len(lines) == 1 + len(described(FaultToleranceConfig))
    assert from_text(table).config == found.config


TIMES = st.none() | st.floats(min_value=1e-6, max_value=1e8)
PRINTABLE = st.text(min_size=1, max_size=16).filter(lambda name: name.isprintable())
FIELDS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "rank_heartbeat_timeout": TIMES,
        "rank_section_timeouts": st.dictionaries(PRINTABLE, TIMES, max_size=4),
        "rank_termination_signal": st.sampled_from([signal.SIGTERM, signal.SIGKILL, signal.SIGRTMIN]),
        "log_level": st.integers(10, 50),
        "preemption_signals": st.sampled_from([None, "off", "sigterm", "SIGUSR1,SIGTERM"]),
        "preemption_sources": st.sampled_from([None, "aws, gcp", "file:/run/preempt"]),
        "preemption_grace": TIMES,
        "suspect_after": st.none() | st.integers(1, 1000),
        "safety_factor": st.floats(1, 1000),
        "exit_codes": st.sampled_from(["torchrun", "classified"]),
        "pci_topo_file": PRINTABLE.map(lambda name: f"/{name.strip()}"),
        "require_monitoring": st.booleans(),
    },
)


@given(FIELDS.map(lambda fields: FaultToleranceConfig(**fields)))
def test_a_configuration_survives_a_socket_and_a_file(config):
    sent = msgspec.msgpack.encode(config)
    received = msgspec.msgpack.decode(sent, type=FaultToleranceConfig)
    assert received == config
    assert isinstance(received.rank_termination_signal, signal.Signals)
    settings = {name: Setting(getattr(config, name), "here") for name in described(FaultToleranceConfig)}
    assert from_text(render(settings)).config == config


@pytest.mark.parametrize("fields", [{"safety_factor": -1.0}, {"rank_hartbeat": 1.0}, {"restart_policy": "x"}])
def test_what_comes_over_a_socket_is_checked_too(fields):
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=FaultToleranceConfig)


# Wrong inputs and their lines.

WRONG_LINES = {
    "F1_unknown_key_names_the_nearest": (
        "rank_hartbeat_timeout: 5",
        f"{KEY}.rank_hartbeat_timeout: no such key; did you mean rank_heartbeat_timeout?",
    ),
    "F1_dashes_and_capitals": (
        "Rank-Heartbeat-Timeout: 5",
        f"{KEY}.Rank-Heartbeat-Timeout: no such key; did you mean rank_heartbeat_timeout?",
    ),
    "F1_unknown_key_far_from_all": ("colour: 5", f"{KEY}.colour: no such key"),
    "F1_newer_peers_key": (
        "segment: 2",
        f"{KEY}.segment: known to nvidia-resiliency-ext, not supported here; --ft-lenient-config ignores it",
    ),
    "F1_key_is_a_list": ("? [a, b]\n  : 5", f"{KEY}.a sequence as a key: no such key"),
    "F1_merge_key": ("<<: {log_level: 10}", f"{KEY}.<<: no such key"),
    "F2_negative": ("rank_heartbeat_timeout: -5", f"{KEY}.rank_heartbeat_timeout: -5: {TIMEOUT}"),
    "F2_nan": ("rank_heartbeat_timeout: .nan", f"{KEY}.rank_heartbeat_timeout: .nan: {TIMEOUT}"),
    "F2_zero_interval": ("workload_check_interval: 0", f"{KEY}.workload_check_interval: 0: {LIMIT}"),
    "F2_null_interval": ("workload_check_interval: null", f"{KEY}.workload_check_interval: null: {LIMIT}"),
    "F2_factor_below_1": ("safety_factor: 0.5", f"{KEY}.safety_factor: 0.5: must be a number from 1 to 1000"),
    "F2_factor_nan": ("safety_factor: nan", f"{KEY}.safety_factor: nan: must be a number from 1 to 1000"),
    "F2_no_attempts": ("suspect_after: 0", f"{KEY}.suspect_after: 0: must be a whole number from 1 to 1000 or null"),
    "F2_half_an_attempt": (
        "suspect_after: 2.5",
        f"{KEY}.suspect_after: 2.5: must be a whole number from 1 to 1000 or null",
    ),
    "F3_unit": ("rank_heartbeat_timeout: 5 min", f"{KEY}.rank_heartbeat_timeout: 5 min: {TIMEOUT}"),
    "F4_yes_as_a_timeout": ("rank_heartbeat_timeout: yes", f"{KEY}.rank_heartbeat_timeout: yes: {TIMEOUT}"),
    "F4_list_as_a_timeout": (
        "rank_heartbeat_timeout: [5]",
        f"{KEY}.rank_heartbeat_timeout: a list: {TIMEOUT}",
    ),
    "F4_mapping_as_a_path": (
        "pci_topo_file: {a: b}",
        f"{KEY}.pci_topo_file: a mapping: must be a path or null",
    ),
    "F4_list_for_a_mapping": (
        "rank_section_timeouts: [5]",
        f"{KEY}.rank_section_timeouts: a list: must be durations by section (step:90s,eval:5m)",
    ),
    "F4_number_for_a_mapping": (
        "rank_section_timeouts: 5",
        f"{KEY}.rank_section_timeouts: 5: must be durations by section (step:90s,eval:5m)",
    ),
    "F4_mapping_in_a_mapping": (
        "rank_section_timeouts: {step: {a: 5}}",
        f"{KEY}.rank_section_timeouts.step: a mapping: {TIMEOUT}",
    ),
    "F4_not_a_bool": ("require_monitoring: 2", f"{KEY}.require_monitoring: 2: must be true or false"),
    "F4_word": (
        "restart_policy: min-helthy",
        f"{KEY}.restart_policy: min-helthy: must be any-failed or min-healthy",
    ),
    "F5_unknown_signal": (
        "rank_termination_signal: SIGTREM",
        f"{KEY}.rank_termination_signal: SIGTREM: must be a signal that ends a process (SIGTERM, SIGKILL)",
    ),
    "F5_a_signal_that_ends_nothing": (
        "rank_termination_signal: SIGSTOP",
        f"{KEY}.rank_termination_signal: SIGSTOP: must be a signal that ends a process (SIGTERM, SIGKILL)",
    ),
    "F5_preemption_signals": (
        "preemption_signals: SIGUSR1, SIGINT",
        f"{KEY}.preemption_signals: SIGUSR1, SIGINT: must be off, or SIGTERM, SIGUSR1, SIGUSR2 with commas between"
        " or null",
    ),
    "F5_preemption_sources": (
        "preemption_sources: aws,asure",
        f"{KEY}.preemption_sources: aws,asure: must be aws, gcp, azure, azure-acknowledge or file:/path, with commas"
        " between or null",
    ),
    "F5_log_level": (
        "log_level: 99",
        f"{KEY}.log_level: 99: {LEVEL}",
    ),
    "F5_template": (
        "link_down_path_template: /sys/link_downed",
        f"{KEY}.link_down_path_template: /sys/link_downed: must be a path with {{dev_name}} in it or null",
    ),
    "F6_key_twice": (
        "log_level: 10\n  safety_factor: 2\n  log_level: 20",
        "ft.yaml:4: fault_tolerance.log_level: given twice, first at ft.yaml:2",
    ),
    "F6_section_timeout_twice": (
        "rank_section_timeouts:\n    a: 1\n    a: 2",
        "ft.yaml:4: fault_tolerance.rank_section_timeouts.a: given twice, first at ft.yaml:3",
    ),
    "long_section_name": (
        f"rank_section_timeouts: {{{'x' * 65}: 1}}",
        f"{KEY}.rank_section_timeouts: {'x' * 65}: {NAME}",
    ),
    "long_section_name_in_bytes": (
        f"rank_section_timeouts: {{{'é' * 33}: 1}}",
        f"{KEY}.rank_section_timeouts: {'é' * 33}: {NAME}",
    ),
    "empty_section_name": (
        "rank_section_timeouts: {'': 1}",
        f"{KEY}.rank_section_timeouts: '': {NAME}",
    ),
    "too_many_sections": (
        f"rank_section_timeouts: {{{', '.join(f's{i}: 1' for i in range(257))}}}",
        f"{KEY}.rank_section_timeouts: 257 sections; 256 are the most",
    ),
    "bad_section_timeout": (
        "rank_section_timeouts:\n    step: -5",
        f"ft.yaml:3: fault_tolerance.rank_section_timeouts.step: -5: {TIMEOUT}",
    ),
    "a_line_break_stays_on_one_line": (
        '"a\\nb": 1',
        f"{KEY}.'a\\nb': no such key",
    ),
    "a_long_value_is_cut": (
        f"log_level: {'x' * 99}",
        f"{KEY}.log_level: '{'x' * 80}'...: {LEVEL}",
    ),
}


@pytest.mark.parametrize("case", sorted(WRONG_LINES))
def test_a_wrong_line_of_the_section_is_named(case):
    line, expected = WRONG_LINES[case]
    assert complaint(lambda: from_file(line)) == expected


WRONG_FILES = {
    "F6_empty_file": ("", "ft.yaml: no fault_tolerance section"),
    "F6_no_section": ("a: {b: 1}", "ft.yaml: no fault_tolerance section"),
    "F6_misspelled_section": (
        "a: 1\nb:\n  - fault_tolerence: {log_level: 10}\n",
        "ft.yaml: no fault_tolerance section; is it 'fault_tolerence' at line 3?",
    ),
    "F6_empty_section": ("fault_tolerance:\n", "ft.yaml:1: fault_tolerance: must be a mapping of settings"),
    "F6_section_is_a_list": (
        "fault_tolerance: []\n",
        "ft.yaml:1: fault_tolerance: must be a mapping of settings",
    ),
    "F6_two_sections": (
        "a:\n  fault_tolerance: {}\nfault_tolerance: {}\n",
        "ft.yaml:2: a second fault_tolerance section, after the one at line 3",
    ),
    "F7_tab": (
        "fault_tolerance:\n\tlog_level: 10\n",
        "ft.yaml:2:1: not YAML: a tab, where YAML wants spaces",
    ),
    "F7_colon": ("a: 1\n b: 2", "ft.yaml:2:3: not YAML: mapping values are not allowed in this context"),
    "F7_two_documents": ("a: 1\n--- 2\n", "ft.yaml:2:1: not YAML: but found another document"),
    "F7_undefined_alias": ("a: *b\n", "ft.yaml:1:4: not YAML: found undefined alias"),
    "F7_control_character": ("a: 1\nb: \x07\n", "ft.yaml:2:4: not YAML: character '\\x07'"),
    "F12_python_object": (
        "fault_tolerance:\n  pci_topo_file: !!python/object/apply:os.getcwd []\n",
        "ft.yaml:2:18: tag 'tag:yaml.org,2002:python/object/apply:os.getcwd' is not allowed",
    ),
    "F12_python_object_elsewhere": (
        "a: !!python/name:os.system\n",
        "ft.yaml:1:4: tag 'tag:yaml.org,2002:python/name:os.system' is not allowed",
    ),
    "F12_own_tag": ("a: !include b.yaml\n", "ft.yaml:1:4: tag '!include' is not allowed"),
    "F12_deep_file": ("[" * 100_000, "ft.yaml:1:33: nested deeper than 32 levels"),
    "F12_alias_bomb": (
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
        "ft.yaml:7:35: more than 50 aliases (*name)",
    ),
}


@pytest.mark.parametrize("case", sorted(WRONG_FILES))
def test_a_wrong_file_is_refused_with_its_place(case):
    text, expected = WRONG_FILES[case]
    assert complaint(lambda: from_text(text)) == expected


WRONG_FLAGS = {
    "F2_negative": ({"rank_heartbeat_timeout": "-5"}, f"--ft-rank-heartbeat-timeout -5: {TIMEOUT}"),
    "F2_infinite": ({"rank_heartbeat_timeout": "inf"}, f"--ft-rank-heartbeat-timeout inf: {TIMEOUT}"),
    "F4_word": (
        {"restart_policy": "min-helthy"},
        "--ft-restart-policy min-helthy: must be any-failed or min-healthy",
    ),
    "F4_bool": ({"enable_nic_monitor": "maybe"}, "--ft-enable-nic-monitor maybe: must be true or false"),
    "F4_empty_bool": ({"enable_nic_monitor": ""}, "--ft-enable-nic-monitor '': must be true or false"),
    "section_without_time": (
        {"rank_section_timeouts": "step"},
        "--ft-rank-section-timeouts step: must be durations by section (step:90s,eval:5m)",
    ),
    "section_with_two_colons": (
        {"rank_section_timeouts": "a:b:5"},
        "--ft-rank-section-timeouts a:b:5: must be durations by section (step:90s,eval:5m)",
    ),
    "section_with_bad_time": (
        {"rank_section_timeouts": "a:5, b:x"},
        f"--ft-rank-section-timeouts a:5, b:x: b: x: {TIMEOUT}",
    ),
    "section_twice": (
        {"rank_section_timeouts": "a:5,a:6"},
        "--ft-rank-section-timeouts a:5,a:6: a: given twice, first at --ft-rank-section-timeouts",
    ),
    "section_with_a_lone_surrogate": (
        {"rank_section_timeouts": "\udcff:5"},
        f"--ft-rank-section-timeouts '\\udcff': {NAME}",
    ),
    "rendezvous": ({"rdzv_impl": "etcd"}, "--ft-rdzv-impl etcd: must be legacy or barrier or null"),
}


@pytest.mark.parametrize("case", sorted(WRONG_FLAGS))
def test_a_wrong_flag_is_named_with_what_it_takes(case):
    flags, expected = WRONG_FLAGS[case]
    assert complaint(lambda: from_flags(**flags)) == expected


def test_a_wrong_variable_is_named_with_what_it_takes():
    line = complaint(lambda: from_environ(RANK_HEARTBEAT_TIMEOUT="-5"))
    assert line == f"PET_FT_RANK_HEARTBEAT_TIMEOUT=-5: {TIMEOUT}"


@given(
    st.sampled_from([*described(FaultToleranceConfig), "rdzv_impl", "lenient_config"]),
    st.text() | st.sampled_from(["9" * 5000, "1e99999", "\udcff", "step:\n5", "²", "SIGKILL\n"]),
    st.sampled_from(["flag", "variable", "file"]),
)
def test_whatever_is_given_is_taken_or_refused_in_one_line(name, text, source):
    ask = {
        "flag": lambda: from_flags(**{name: text}),
        "variable": lambda: from_environ(**{name.upper(): text}),
        "file": lambda: from_file(f"{name}: {text}"),
    }[source]
    assert len(complaints(ask)) <= 1


@given(st.text() | st.text(alphabet="ab:-[]{}&*!<>\n \t'\"#%?|,"))
def test_whatever_a_file_holds_it_is_taken_or_refused_in_one_line(text):
    assert len(complaints(lambda: from_text(text))) <= 1
    assert len(complaints(lambda: from_text(f"fault_tolerance: {{{text}}}"))) <= 1


# Where the section may stand, and what else may stand in the file.


def test_the_section_may_stand_at_any_depth_also_in_lists():
    text = "trainer:\n  - x: 1\n  - {a: {fault_tolerance: {log_level: debug}}}\n"
    assert from_text(text).settings["log_level"] == Setting(10, "ft.yaml:3")


def test_aliases_elsewhere_in_the_file_are_fine_and_an_endless_one_ends():
    found = from_text("x: &x {y: *x, t: &t 5m}\nfault_tolerance:\n  rank_heartbeat_timeout: *t\n")
    assert found.config.rank_heartbeat_timeout == 300.0
    assert "a mapping: must be" in complaint(lambda: from_file("rank_section_timeouts: &s {a: *s}"))


def test_lenient_ignores_unknown_keys_with_a_warning_and_still_refuses_bad_values():
    found = from_file("rank_hartbeat_timeout: 5", "segment: 2", "log_level: 10", lenient=True)
    assert found.config.log_level == 10
    assert found.warnings == [
        f"{KEY}.rank_hartbeat_timeout: no such key; did you mean rank_heartbeat_timeout? (ignored)",
        "ft.yaml:3: fault_tolerance.segment: known to nvidia-resiliency-ext, not supported here (ignored)",
    ]
    assert LIMIT in complaint(lambda: from_file("rank_heartbeat_timeout: -5", lenient=True))


def test_what_has_no_effect_says_so():
    (line,) = from_flags(rdzv_impl="barrier").warnings
    assert line == "--ft-rdzv-impl barrier: has no effect in ft_launcher"
    assert from_flags(enable_nic_monitor="true").warnings == [
        "enable_nic_monitor: has no effect yet, no network card is watched"
    ]


# Reading the file.


def test_F7_a_missing_file_is_named_with_the_nearest(tmp_path):
    (tmp_path / "ft.yaml").write_text("")
    assert complaint(lambda: read_config_file(tmp_path / "ft.yml")) == (
        f"{tmp_path}/ft.yml: no such file; did you mean {tmp_path}/ft.yaml?"
    )
    assert complaint(lambda: read_config_file(tmp_path / "no" / "ft")) == f"{tmp_path}/no/ft: no such file"
    assert read_config_file(tmp_path / "ft.yml", missing_ok=True) is None


def test_F7_a_directory_is_no_file(tmp_path):
    assert complaint(lambda: read_config_file(tmp_path)) == f"{tmp_path}: cannot be read: Is a directory"


def test_F7_a_file_that_may_not_be_read_is_named(tmp_path):
    path = tmp_path / "ft.yaml"
    path.touch(mode=0)
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)  # root may read everything
    try:
        assert complaint(lambda: read_config_file(path)) == f"{path}: cannot be read: Permission denied"
    finally:
        os.seteuid(user)


def test_F12_a_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "ft.yaml"
    path.write_bytes(b"#" * (1 << 20))
    assert read_config_file(path) == "#" * (1 << 20)
    with path.open("ab") as file:
        file.truncate(1 << 40)
    line = complaint(lambda: read_config_file(path))
    assert line == f"{path}: larger than 1 MiB, which no configuration is"


def test_F7_a_file_that_is_not_utf_8_is_named_with_the_line(tmp_path):
    path = tmp_path / "ft.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    assert complaint(lambda: read_config_file(path)) == f"{path}:2: not UTF-8 (byte 0xff)"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_config_file(path) == "a: 1\n"


# Flags.


def test_every_setting_has_its_flag_in_three_spellings_and_its_help():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = " ".join(parser.format_help().split())
    for name, field in {**described(FaultToleranceConfig), **described(ConfigOptions)}.items():
        assert field.doc in text
        for flag in (f"--ft-{name.replace('_', '-')}", f"--ft_{name}", f"--ft-{name}"):
            value = [] if not field.kind.metavar else ["some text"]
            assert vars(parser.parse_args([flag, *value]))[f"ft_{name}"] == (value[0] if value else "true")
    assert set(vars(parser.parse_args([])).values()) == {None}


def test_the_options_come_from_flags_and_variables():
    assert read_options(environ={}, flags=parse()) == ConfigOptions()
    assert read_options(
        environ={"PET_FT_CFG_PATH": "a", "PET_FT_LENIENT_CONFIG": "1", "PET_FT_IGNORE_MISSING_CFG": "0"},
        flags=parse("--ft-cfg-path", "b", "--ft-dry-run", "--ft_rdzv_impl", "legacy"),
    ) == ConfigOptions(cfg_path="b", lenient_config=True, dry_run=True, rdzv_impl="legacy")
    assert complaint(lambda: read_options(environ={"PET_FT_DRY_RUN": "2"}, flags={})) == (
        "PET_FT_DRY_RUN=2: must be true or false"
    )


# What scripts of the peer call.


def test_scripts_of_the_peer_can_make_one_of_arguments():
    config = FaultToleranceConfig.from_kwargs(
        rank_heartbeat_timeout=5,
        rank_section_timeouts={"step": 2, "eval": None},
        rank_termination_signal="SIGTERM",
    )
    assert (config.rank_heartbeat_timeout, config.rank_section_timeouts) == (5.0, {"step": 2.0, "eval": None})
    assert config.rank_termination_signal is signal.SIGTERM
    with pytest.warns(UserWarning, match="^rank_hartbeat_timeout: no such key; did you mean rank_heartbeat"):
        FaultToleranceConfig.from_kwargs(rank_hartbeat_timeout=5)
    with pytest.raises(ValueError, match="no such key"):
        FaultToleranceConfig.from_kwargs(ignore_not_recognized=False, rank_hartbeat_timeout=5)


@pytest.mark.parametrize(
    "values",
    [
        {"rank_heartbeat_timeout": float("nan")},
        {"rank_heartbeat_timeout": True},
        {"rank_heartbeat_timeout": [5]},
        {"rank_section_timeouts": {"step": -1}},
        {"pci_topo_file": ["a"]},
        {"rank_section_timeouts": {"step": {}}},
        {"rank_section_timeouts": {"": 1}},
        {"rank_termination_signal": "SIGNOT"},
        {"log_level": "loud"},
        {"restart_policy": None},
    ],
)
def test_a_bad_value_is_a_value_error_however_it_comes(values):
    (name,) = values
    for make in (FaultToleranceConfig, FaultToleranceConfig.from_kwargs):
        with pytest.raises(ValueError, match=f"^{name}.*must be"):
            make(**values)


def test_scripts_of_the_peer_can_read_and_write_files(tmp_path):
    path = tmp_path / "ft.yaml"
    config = FaultToleranceConfig(rank_section_timeouts={"step": 2.0, "é: #": None}, log_level=30)
    config.to_yaml_file(path)
    assert FaultToleranceConfig.from_yaml_file(str(path)) == config
    with pytest.raises(FileNotFoundError):
        FaultToleranceConfig.from_yaml_file(tmp_path / "no.yaml")
    path.write_text("fault_tolerance: {segment: 2}")
    with pytest.warns(UserWarning, match="known to nvidia-resiliency-ext"):
        assert FaultToleranceConfig.from_yaml_file(path) == FaultToleranceConfig()
    with pytest.raises(ValueError, match="known to nvidia-resiliency-ext"):
        FaultToleranceConfig.from_yaml_file(path, ignore_not_recognized=False)
    path.write_text("other: 1")
    with pytest.raises(ValueError, match="no fault_tolerance section"):
        FaultToleranceConfig.from_yaml_file(path)


def test_scripts_of_the_peer_can_make_one_of_parsed_flags(tmp_path):
    path = tmp_path / "ft.yaml"
    path.write_text("fault_tolerance: {log_level: 10, safety_factor: 3}")
    args = argparse.Namespace(
        ft_cfg_path=str(path), ft_safety_factor=2.5, ft_rank_section_timeouts="a:1", other=object()
    )
    config = FaultToleranceConfig.from_args(args)
    assert (config.log_level, config.safety_factor, config.rank_section_timeouts) == (10, 2.5, {"a": 1.0})
    with pytest.raises(ValueError, match="no configuration"):
        FaultToleranceConfig.from_args(argparse.Namespace(ft_cfg_path=None))


# What it costs a rank.


def test_a_rank_that_imports_the_configuration_loads_no_reader_of_files():
    code = "import sys, ft_launcher.config as c; c.FaultToleranceConfig(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(found.stdout.split())
    assert "ft_launcher.config" in loaded
    assert not {"torch", "numpy", "yaml", "argparse", "logging", "difflib"} & loaded


def test_the_names_that_may_be_configured_are_those_that_a_page_holds():
    longest = ["x" * page.MAX_NAME_BYTES, *(f"s{i}" for i in range(page.MAX_SECTIONS - 1))]
    config = FaultToleranceConfig(rank_section_timeouts=dict.fromkeys(longest, 1.0))
    assert [*config.rank_section_timeouts] == longest
    for too_much in ([*longest, "one more"], ["x" * (page.MAX_NAME_BYTES + 1)]):
        with pytest.raises(ValueError, match=r"the most|the name of a section"):
            FaultToleranceConfig(rank_section_timeouts=dict.fromkeys(too_much, 1.0))
