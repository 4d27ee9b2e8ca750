"""The settings of a job: which there are, what they mean, and where each value came from.

A field of `FaultToleranceConfig` is the one place where a setting is declared; its flag, its PET_FT_
variable, its key in a file, its help and its check derive from it.
"""

import signal
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import force_setattr

from ft_launcher.config_file import SECTION, read_config_file, section_entries
from ft_launcher.config_kinds import (
    Bool,
    Count,
    FilePath,
    Given,
    Grace,
    Interval,
    Kind,
    LinkTemplate,
    LogLevel,
    Number,
    SectionTimeouts,
    Signal,
    SignalNames,
    SourceNames,
    Switch,
    Timeout,
    given_of,
    one_of,
    or_null,
    read,
    shown,
)
from ft_launcher.errors import UsageError

if TYPE_CHECKING:
    import argparse
    from os import PathLike

__all__ = [
    "ConfigOptions",
    "FaultToleranceConfig",
    "Resolved",
    "Setting",
    "add_flags",
    "described",
    "read_config_file",
    "read_options",
    "render",
    "resolve",
]

_WEEK = 7 * 86400.0
_ORIGIN_COLUMN = 40

_PEER_ONLY = (
    "attribution_endpoint attribution_export_url attribution_stop_action check_remaining_processes"
    " checkpoint_iteration_file cycle_info_dir enable_dist_storage_healthcheck enable_nic_healthcheck"
    " gpu_memory_poll_interval gpu_memory_reclaim_timeout gpu_memory_tolerance_mb install_exception_hook"
    " link_state_path_template max_no_progress_cycles min_progress_iterations num_warmup_iterations"
    " numa_bind_strict segment storage_healthcheck_path"
)
"""Keys of newer versions of nvidia-resiliency-ext, which are no slip of the pen."""

RestartPolicy = Literal["any-failed", "min-healthy"]
ExitCodes = Literal["torchrun", "classified"]
RdzvImpl = Literal["legacy", "barrier"]


class FaultToleranceConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a job is watched, and what is done about a rank that hangs. Times are seconds; None: never.

    Each way to make one reads and checks its values alike (ValueError; msgspec.ValidationError when decoded).
    """

    workload_check_interval: Annotated[
        Interval,
        "The longest time between two looks of a monitor at its rank; it looks sooner when a timeout asks.",
    ] = 5.0
    rank_startup_timeout: Annotated[
        Timeout, "Kill a rank that was not heard of within this time from the start of its process."
    ] = None
    initial_rank_heartbeat_timeout: Annotated[
        Timeout,
        "Kill a rank whose first heartbeat takes longer. Without rank_startup_timeout it counts from the"
        " start of the process, as soon as any rank of the job has connected.",
    ] = 3600.0
    rank_heartbeat_timeout: Annotated[
        Timeout, "Kill a rank that sent no heartbeat for this long, after its first one."
    ] = 2700.0
    rank_section_timeouts: Annotated[
        SectionTimeouts,
        "Kill a rank that has been in the section of this name for longer; each open one has its own clock.",
    ] = {}
    rank_out_of_section_timeout: Annotated[Timeout, "Kill a rank with no section open for this long."] = None
    rank_teardown_timeout: Annotated[
        Timeout, "Kill a rank whose process still runs this long after shutdown_workload_monitoring()."
    ] = 1800.0
    rank_termination_signal: Annotated[
        Signal,
        "The signal that ends a hung rank; SIGKILL follows when it is another one and does not suffice.",
    ] = signal.SIGKILL
    rank_termination_grace: Annotated[Grace, "The time between rank_termination_signal and SIGKILL."] = 5.0
    safety_factor: Annotated[Number, "A calculated timeout is the longest interval seen times this."] = 5.0
    restart_policy: Annotated[
        Annotated[RestartPolicy, one_of(RestartPolicy)],
        "any-failed: one failed node restarts all. min-healthy: the others run on while as many as the minimum of"
        " --nnodes run or have succeeded.",
    ] = "any-failed"
    suspect_after: Annotated[
        Count,
        "After so many attempts from one checkpoint that failed before a step beyond it, tell the next one to use"
        " another (resume_hint). null: never.",
    ] = 3
    require_monitoring: Annotated[Switch, "Make it an error when no rank ever connects."] = False
    exit_codes: Annotated[
        Annotated[ExitCodes, one_of(ExitCodes)],
        "torchrun: 1 for every failure of the job. classified: a code by cause, for a scheduler to act on.",
    ] = "torchrun"
    log_level: Annotated[LogLevel, "The least severe messages of ft_launcher that are logged."] = 20
    preemption_signals: Annotated[
        SignalNames,
        "Signals to the launcher that are notices of preemption: the ranks save (should_checkpoint) and it goes on."
        " null: SIGUSR1 and SIGUSR2, and SIGTERM while all its ranks call should_checkpoint.",
    ] = None
    preemption_sources: Annotated[
        SourceNames,
        "Ask these for notices of preemption: aws, gcp, azure, azure-acknowledge, file:/path, with commas between.",
    ] = None
    preemption_grace: Annotated[
        Timeout,
        "The time from SIGUSR1, SIGUSR2 or a file's notice to the end of the machine. SIGTERM's is --term-timeout.",
    ] = None
    node_health_check_interval: Annotated[
        Interval, "The time between two checks of a node's health. Not there yet."
    ] = 5.0
    use_infra_group_rank: Annotated[
        Bool,
        "Number the nodes as the infrastructure does (SLURM_PROCID, else GROUP_RANK). Without such a variable, or"
        " with false: nodes keep their ranks, and newcomers fill the gaps in the order of their names.",
    ] = True
    restart_check_interval: Annotated[
        Interval,
        "For files of nvidia-resiliency-ext, without effect: a restart is an event and not looked for.",
    ] = 60.0
    skip_section_response: Annotated[
        Bool,
        "For files of nvidia-resiliency-ext, without effect: a section is a stamp and waits for nobody.",
    ] = True
    enable_nic_monitor: Annotated[Bool, "Watch the network cards near the GPUs. Not there yet."] = False
    pci_topo_file: Annotated[FilePath, "For enable_nic_monitor: a description of the PCI topology."] = None
    link_down_path_template: Annotated[
        LinkTemplate, "For enable_nic_monitor: the path of a card's link-down counter."
    ] = None

    def __post_init__(self) -> None:
        with _errors_of_python():
            for name, field in described(type(self)).items():
                force_setattr(self, name, read(field.kind, given_of(getattr(self, name), name, f"{name}=")))

    @classmethod
    def from_kwargs(cls, ignore_not_recognized: bool = True, **kwargs: Any) -> "FaultToleranceConfig":
        """Make one of values or texts. Unknown names are a warning, or else ValueError, as bad values are."""
        given = ((name, given_of(value, name, f"{name}=")) for name, value in kwargs.items())
        with _errors_of_python():
            return _warned(_resolved(given, lenient=ignore_not_recognized))

    @classmethod
    def from_yaml_file(
        cls, cfg_path: "str | PathLike[str]", ignore_not_recognized: bool = True
    ) -> "FaultToleranceConfig":
        """Read the section of a file. OSError when that fails, else as `from_kwargs`."""
        with _errors_of_python():
            text = read_config_file(cfg_path)
            return _warned(resolve(text, str(cfg_path), {}, {}, lenient=ignore_not_recognized))

    @classmethod
    def from_args(cls, args: "argparse.Namespace") -> "FaultToleranceConfig":
        """Make one of the `ft_` attributes; `ft_cfg_path` counts least. ValueError if all are None."""
        flags = {name: value for name, value in vars(args).items() if name.startswith("ft_")}
        if all(value is None for value in flags.values()):
            raise ValueError("no configuration: neither ft_cfg_path nor another ft_ argument is set")
        path = flags.get("ft_cfg_path")
        with _errors_of_python():
            text = None if path is None else read_config_file(path)
            return _warned(resolve(text, str(path), {}, flags, lenient=True))

    def to_yaml_file(self, cfg_path: "str | PathLike[str]") -> None:
        """Write a file that `from_yaml_file` reads as the same."""
        from pathlib import Path

        settings = {name: Setting(getattr(self, name), "") for name in described(type(self))}
        Path(cfg_path).write_text(render(settings), encoding="utf-8")


class ConfigOptions(Struct, frozen=True, kw_only=True):
    """What flags and variables say about the configuration itself."""

    cfg_path: Annotated[FilePath, "Read a YAML file: its fault_tolerance section, at any depth."] = None
    ignore_missing_cfg: Annotated[Switch, "Go on when there is no file at --ft-cfg-path."] = False
    lenient_config: Annotated[Switch, "Ignore unknown keys of the file, with a warning."] = False
    dry_run: Annotated[Switch, "Print every setting and where it came from; start nothing."] = False
    token_file: Annotated[
        FilePath,
        "With several nodes: a file, yours alone (mode 0600), with the secret that seals what they tell each other;"
        " instead of it, the variable FT_TOKEN.",
    ] = None
    require_auth: Annotated[Switch, "Make it an error when several nodes have no secret."] = False
    service: Annotated[
        FilePath,
        "Start the engines of this file (engines.yaml) before the workers on this node, and end them with the job.",
    ] = None
    rdzv_impl: Annotated[
        Annotated[RdzvImpl | None, or_null(one_of(RdzvImpl))],
        "For command lines of nvidia-resiliency-ext, without effect.",
    ] = None


class Setting(NamedTuple):
    """A value in force, and the one place that it came from (`default`, `ft.yaml:7`, a variable, a flag)."""

    value: Any
    origin: str


class Resolved(NamedTuple):
    """What the sources come to. The warnings are lines for a person."""

    config: FaultToleranceConfig
    settings: dict[str, Setting]
    warnings: list[str]


class Field(NamedTuple):
    """What help and documentation say of a setting."""

    kind: Kind
    doc: str
    default: Any


@cache
def described(record: type[Struct]) -> Mapping[str, Field]:
    """Give the settings of `FaultToleranceConfig` or `ConfigOptions` by name."""
    fields = {}
    for field in msgspec.structs.fields(record):
        kind, doc = field.type.__metadata__
        default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        fields[field.name] = Field(kind, doc, default)
    return fields


def add_flags(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add a flag for every setting and option, spelled --ft-a-b, --ft_a_b or --ft-a_b.

    Their values stay text, and None when not given: `read_options` and `resolve` read them.
    """
    import argparse

    for name, field in chain(described(FaultToleranceConfig).items(), described(ConfigOptions).items()):
        is_switch = not field.kind.metavar
        takes: dict[str, Any] = {"dest": f"ft_{name}", "default": None}
        takes |= {"action": "store_const", "const": "true"} if is_switch else {"metavar": field.kind.metavar}
        text = field.doc if is_switch else f"{field.doc} (default: {field.kind.write(field.default)})"
        parser.add_argument(_flag(name), help=text.replace("%", "%%"), **takes)
        others = dict.fromkeys([f"--ft_{name}", f"--ft-{name}"])
        others.pop(_flag(name), None)  # a name of one word has two spellings only
        parser.add_argument(*others, help=argparse.SUPPRESS, **takes)


def read_options(*, environ: Mapping[str, str], flags: Mapping[str, Any]) -> ConfigOptions:
    """Give what flags (argparse's names: `ft_cfg_path`) and, below them, variables say. Raises UsageError."""
    fields = described(ConfigOptions)
    options: dict[str, Any] = {}
    for name, given in _asked(fields, environ, flags):
        options[name] = read(fields[name].kind, given)
    return ConfigOptions(**options)


def resolve(
    file_text: str | None,
    file_name: str,
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    lenient: bool = False,
) -> Resolved:
    """Give the configuration that the sources come to: default < file < PET_FT_ variable < flag.

    Reads nothing itself. `flags` has argparse's names (`vars(args)` will do) and None for what was not given;
    a variable that is empty is not given. `lenient`: unknown keys of the file are a warning. Raises
    UsageError, one line; a wrong value is one even where another source overrides it.
    """
    from_file = [] if file_text is None else section_entries(file_text, file_name)
    asked = _asked(described(FaultToleranceConfig), environ, flags)
    resolved = _resolved(chain(from_file, asked), lenient=lenient)
    options = read_options(environ=environ, flags=flags)
    if options.rdzv_impl is not None:
        resolved.warnings.append(f"{_flag('rdzv_impl')} {options.rdzv_impl}: has no effect in ft_launcher")
    resolved.warnings.extend(_unknown_variables(environ))
    return resolved


def render(settings: Mapping[str, Setting]) -> str:
    """Give every setting and its origin as a file that `resolve` reads as the same."""
    fields = described(FaultToleranceConfig)
    lines = [f"{SECTION}:"]
    for name, (value, origin) in settings.items():
        line = f"  {name}: {fields[name].kind.write(value)}"
        lines.append(f"{line:<{_ORIGIN_COLUMN}}  # {origin}" if origin else line)
    return "\n".join([*lines, ""])


def _resolved(given: Iterable[tuple[str, Given]], *, lenient: bool) -> Resolved:
    fields = described(FaultToleranceConfig)
    settings = {name: Setting(field.default, "default") for name, field in fields.items()}
    doubts: list[str] = []
    for name, each in given:
        if name in fields:
            value = read(fields[name].kind, each)
            settings[name] = Setting(value, each.origin)
            doubts.extend(_doubts(value, each))
        elif lenient:
            doubts.append(f"{_unknown(name, each)} (ignored)")
        else:
            advice = f"; {_flag('lenient_config')} ignores it" if name in _PEER_ONLY.split() else ""
            raise UsageError(f"{_unknown(name, each)}{advice}")
    config = FaultToleranceConfig(**{name: setting.value for name, setting in settings.items()})
    return Resolved(config, settings, [*doubts, *_contradictions(config)])


def _asked(
    fields: Mapping[str, Field], environ: Mapping[str, str], flags: Mapping[str, Any]
) -> Iterator[tuple[str, Given]]:
    """What the environment says, then what the flags say, which so wins."""
    for name in fields:
        if text := environ.get(_variable(name)):
            yield name, Given(text, _variable(name), f"{_variable(name)}=")
    for name in fields:
        if (value := flags.get(f"ft_{name}")) is not None:
            yield name, given_of(value, _flag(name), f"{_flag(name)} ")


def _flag(name: str) -> str:
    return f"--ft-{name.replace('_', '-')}"


def _variable(name: str) -> str:
    return f"PET_FT_{name.upper()}"


def _nearest(name: str, names: Iterable[str]) -> str | None:
    from difflib import get_close_matches

    return next(iter(get_close_matches(name.lower().replace("-", "_"), list(names), n=1, cutoff=0.7)), None)


def _unknown(name: str, given: Given) -> str:
    if name in _PEER_ONLY.split():
        return f"{given.place}: known to nvidia-resiliency-ext, not supported here"
    nearest = _nearest(name, described(FaultToleranceConfig))
    return f"{given.place}: no such key{f'; did you mean {nearest}?' if nearest else ''}"


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    names = [*described(FaultToleranceConfig), *described(ConfigOptions)]
    known = {_variable(name) for name in names}
    for variable in sorted(environ):
        if variable.startswith("PET_FT_") and variable not in known:
            nearest = _nearest(variable.removeprefix("PET_FT_"), names)
            advice = f"; did you mean {_variable(nearest)}?" if nearest else ""
            yield f"{shown(variable)}: no such variable{advice} (ignored)"


def _doubts(value: object, given: Given) -> Iterator[str]:
    """What is allowed but was hardly meant."""
    if given.value == "":
        yield f"{given.place}: empty, which is taken as null"
    for name, seconds in value.items() if isinstance(value, dict) else [("", value)]:
        if isinstance(seconds, float) and seconds > _WEEK:
            place = f"{given.place}: {shown(name)}" if name else given.written
            yield f"{place}: that is {seconds / 3600:.4g} h; a number without a unit is seconds"


def _contradictions(config: FaultToleranceConfig) -> Iterator[str]:
    startup, initial = config.rank_startup_timeout, config.initial_rank_heartbeat_timeout
    if startup is not None and initial is not None and startup > initial:
        yield (
            "rank_startup_timeout is longer than initial_rank_heartbeat_timeout: the shorter one ends"
            " the wait for a first heartbeat"
        )
    if config.enable_nic_monitor:
        yield "enable_nic_monitor: has no effect yet, no network card is watched"


def _warned(resolved: Resolved) -> FaultToleranceConfig:
    for line in resolved.warnings:
        warnings.warn(line, stacklevel=3)
    return resolved.config


@contextmanager
def _errors_of_python() -> Iterator[None]:
    """Turn errors for users of the launcher into what callers of a Python library catch."""
    try:
        yield
    except UsageError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise ValueError(str(error)) from None
