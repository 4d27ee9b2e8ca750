"""The flags of rollout fault tolerance: the command lines of the documents, the defaults, and what is refused."""

import argparse
import math
import shlex
import subprocess
import sys

import pytest

from ft_launcher import UsageError
from ft_launcher.engines import EngineConfig
from ft_launcher.rollout import add_rollout_ft_arguments, check_rollout_ft_arguments, engine_config

SEED_EXAMPLE = """
--use-fault-tolerance \
--rollout-health-check-first-wait 600 \
--rollout-health-check-interval 10 \
--rollout-health-check-timeout 5
"""


def parser_of_a_trainer() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train.py")
    parser.add_argument("--save-interval", type=int)
    add_rollout_ft_arguments(parser)
    return parser


def parsed(line: str) -> argparse.Namespace:
    parser = parser_of_a_trainer()
    args = parser.parse_args(shlex.split(line))
    check_rollout_ft_arguments(args, parser)
    return args


@pytest.mark.parametrize(
    "line",
    [
        "--use-fault-tolerance",
        SEED_EXAMPLE,
        "--use-fault-tolerance --save-interval 20",
        "--debug-rollout-only",
        "--save-debug-rollout-data /path/to/rollout_{rollout_id}.pt",
        "--debug-rollout-only --save-debug-rollout-data /path/to/rollout_{rollout_id}.pt",
        "--load-debug-rollout-data /path/to/rollout_{rollout_id}.pt",
        "--load-debug-rollout-data /path/to/rollout_{rollout_id}.pt --debug-train-only",
        "--debug-train-only",
    ],
)
def test_E8_the_command_lines_of_the_documents_parse(line):
    parsed(line)


def test_E8_the_defaults_are_those_of_the_documents():
    args = parsed("")
    assert args.use_fault_tolerance is False
    assert args.rollout_health_check_first_wait == 300
    assert args.rollout_health_check_interval == 10
    assert args.rollout_health_check_timeout == 5
    assert engine_config(parsed("--use-fault-tolerance")) == EngineConfig()


def test_what_the_flags_say_reaches_the_supervisor():
    config = engine_config(parsed(SEED_EXAMPLE + " --rollout-health-check-timeout 7"), min_serving=2)
    assert config == EngineConfig(
        health_check_first_wait=600.0, health_check_interval=10.0, health_check_timeout=7.0, min_serving=2
    )


def test_without_use_fault_tolerance_engines_are_neither_checked_nor_killed_nor_restarted():
    config = engine_config(parsed("--rollout-health-check-interval 3"), max_restarts=5, min_serving=2)
    assert config.health_check_interval == math.inf
    assert config.health_check_failures > 1_000_000
    assert config.max_restarts == 0
    assert config.min_serving == 2


def test_to_load_rounds_means_to_train_only():
    assert parsed("").debug_train_only is False
    assert parsed("--load-debug-rollout-data a_{rollout_id}.pt").debug_train_only is True


REFUSED = [
    ("--rollout-health-check-interval 0", ["--rollout-health-check-interval", "'0'", "above 0"]),
    ("--rollout-health-check-timeout -1", ["--rollout-health-check-timeout", "'-1'", "above 0"]),
    ("--rollout-health-check-timeout nan", ["--rollout-health-check-timeout", "'nan'", "above 0"]),
    ("--rollout-health-check-interval inf", ["--rollout-health-check-interval", "'inf'", "above 0"]),
    ("--rollout-health-check-interval soon", ["--rollout-health-check-interval", "'soon'", "above 0"]),
    ("--rollout-health-check-first-wait=-5", ["--rollout-health-check-first-wait", "'-5'", "0 or more"]),
    ("--debug-rollout-only --debug-train-only", ["--debug-rollout-only", "--debug-train-only", "only one"]),
    (
        "--debug-rollout-only --load-debug-rollout-data a_{rollout_id}.pt",
        ["--load-debug-rollout-data", "a_{rollout_id}.pt", "--debug-rollout-only"],
    ),
    (
        "--save-debug-rollout-data a_{rollout_id}.pt --load-debug-rollout-data ./x/../a_{rollout_id}.pt",
        ["--save-debug-rollout-data a_{rollout_id}.pt", "--load-debug-rollout-data", "another"],
    ),
    ("--save-debug-rollout-data a.pt", ["--save-debug-rollout-data a.pt", "{rollout_id}", "--allow-overwrite"]),
    ("--save-debug-rollout-data ''", ["--save-debug-rollout-data", "''", "path"]),
    ("--load-debug-rollout-data ''", ["--load-debug-rollout-data", "''", "path"]),
    ("--load-debug-rollout-data-subsample 0.5", ["--load-debug-rollout-data-subsample 0.5", "only with"]),
    ("--load-debug-rollout-data a --load-debug-rollout-data-subsample 0", ["subsample", "'0'", "above 0"]),
    ("--load-debug-rollout-data a --load-debug-rollout-data-subsample 1.5", ["subsample", "'1.5'", "1 at most"]),
]


@pytest.mark.parametrize(("line", "words"), REFUSED, ids=[line for line, _ in REFUSED])
def test_what_contradicts_itself_is_refused_in_one_line_with_flag_and_value_and_what_is_allowed(line, words, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(line)
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("train.py: error: ")
    for word in words:
        assert word in said


def test_without_a_parser_the_same_is_raised():
    args = parser_of_a_trainer().parse_args(["--debug-rollout-only", "--debug-train-only"])
    with pytest.raises(UsageError, match="only one of them"):
        check_rollout_ft_arguments(args)
    with pytest.raises(UsageError, match="only one of them"):
        engine_config(args)


def test_a_first_wait_of_0_and_an_overwriting_path_are_allowed():
    assert parsed("--rollout-health-check-first-wait 0").rollout_health_check_first_wait == 0
    parsed("--save-debug-rollout-data a.pt --allow-overwrite")
    parsed("--save-debug-rollout-data a_{rollout_id}.pt --load-debug-rollout-data b_{rollout_id}.pt")


def test_all_names_of_the_package_load_without_torch_and_aiohttp():
    program = (
        "import sys, ft_launcher.rollout as rollout\n"
        "for name in rollout.__all__: getattr(rollout, name)\n"
        "sys.exit(str([each for each in ('torch', 'aiohttp', 'numpy') if each in sys.modules]))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == "[]"
