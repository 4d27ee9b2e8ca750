"""What a job on a Ray cluster was asked to be, checked before anything is placed."""

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from msgspec import Struct

from ft_launcher import config as configuration
from ft_launcher import torch_flags
from ft_launcher.causes import ExitCodes
from ft_launcher.config_file import read_config_file
from ft_launcher.errors import UsageError
from ft_launcher.launcher import get_args_parser

__all__ = ["STRATEGIES", "Request", "read_request"]

STRATEGIES = ("STRICT_SPREAD", "SPREAD", "PACK")
"""Ray's, but for STRICT_PACK: all on one node, whose loss nothing would survive."""

_OURS = {
    "nnodes": "give it to ft_ray itself, before --",
    "rdzv_backend": "ft_ray uses c10d",
    "rdzv_endpoint": "ft_ray takes a free port of each node",
    "rdzv_id": "ft_ray chooses it",
    "node_rank": "the rendezvous gives the ranks",
    "standalone": "ft_ray makes a job of several nodes",
    "local_addr": "each node has another one",
}
"""Flags of ft_launcher that a user may not give, and why."""

_OUR_KEYS = ("is_host", "joins_only")

STOP_SECONDS = 30.0
"""torch's default of --shutdown-timeout, for a torch that has no such flag."""

AFTER_STOP_SECONDS = 10.0
"""What a launcher needs, beside the time that its ranks have to end, to say goodbye."""


class Request(Struct, frozen=True, kw_only=True):
    """A job; see run_on_ray."""

    flags: tuple[str, ...]
    """ft_launcher's that were given."""
    command: tuple[str, ...]
    """The script and its arguments."""
    nnodes: str
    rdzv_conf: str
    bundles: int
    bundle: dict[str, float]
    strategy: str
    placement_timeout: float | None
    max_replacements: int
    exit_codes: ExitCodes
    grace: float
    """Seconds that a launcher has to end when it is told to."""
    has_token_file: bool
    address: str

    def arguments(self, run_id: str, endpoints: Sequence[str], *, joins: bool) -> list[str]:
        """Give the arguments of one launcher."""
        conf = ",".join(filter(None, (self.rdzv_conf, "joins_only=1" if joins else "")))
        return [
            *self.flags,
            *("--nnodes", self.nnodes, "--rdzv-backend", "c10d", "--rdzv-id", run_id),
            *("--rdzv-endpoint", ",".join(endpoints)),
            *(("--rdzv-conf", conf) if conf else ()),
            *self.command,
        ]


def read_request(
    arguments: Sequence[str],
    *,
    nnodes: str,
    bundle: Mapping[str, float],
    strategy: str,
    placement_timeout: float | None,
    max_replacements: int,
    address: str,
) -> Request:
    """Check all of it. Raises UsageError."""
    given = _parsed(list(arguments))
    given.nnodes = nnodes
    torch_flags.check_values(given)
    for name, amount in bundle.items():
        if not name or not isfinite(amount) or amount <= 0:
            raise UsageError(f"--bundle {name}={amount:g}: must be a resource of Ray (CPU, GPU, ...) and more than 0")
    if not bundle:
        raise UsageError("--bundle: must have at least one resource, CPU=4,GPU=8 for example")
    if strategy not in STRATEGIES:
        near = torch_flags.nearest(strategy.upper(), STRATEGIES)
        hint = f"; did you mean {near}?" if near else ""
        raise UsageError(f"--strategy {strategy}: must be one of {', '.join(STRATEGIES)}{hint}")
    if address.startswith("ray://"):
        raise UsageError(f"--address {address}: run it in the cluster, for example with: ray job submit -- ft_ray ...")
    if max_replacements < 0:
        raise UsageError(f"--max-replacements {max_replacements}: must be 0 or more")
    if placement_timeout is not None and not placement_timeout > 0:
        raise UsageError(f"--placement-timeout {placement_timeout:g}: must be more than 0 seconds, or null")
    cut = len(arguments) - len(given.training_script_args) - 1
    options = configuration.read_options(environ=os.environ, flags=vars(given))
    text = (
        None if options.cfg_path is None else read_config_file(options.cfg_path, missing_ok=options.ignore_missing_cfg)
    )
    resolved = configuration.resolve(
        text, options.cfg_path or "", os.environ, vars(given), lenient=options.lenient_config
    )
    stop = given.term_timeout if given.term_timeout is not None else getattr(given, "shutdown_timeout", None)
    return Request(
        flags=tuple(each for each in arguments[:cut] if each != "--"),
        command=tuple(arguments[cut:]),
        nnodes=nnodes,
        rdzv_conf=given.rdzv_conf,
        bundles=int(nnodes.rpartition(":")[2]),
        bundle={name: float(amount) for name, amount in bundle.items()},
        strategy=strategy,
        placement_timeout=placement_timeout,
        max_replacements=max_replacements,
        exit_codes=resolved.config.exit_codes,
        grace=(STOP_SECONDS if stop is None else float(stop)) + AFTER_STOP_SECONDS,
        has_token_file=options.token_file is not None,
        address=address,
    )


def _parsed(arguments: list[str]) -> Namespace:
    # What is there already, argparse does not set to its default: what is still None was not given.
    given: Any = get_args_parser().parse_args(arguments, Namespace(**dict.fromkeys(_OURS)))
    for name, why in _OURS.items():
        if getattr(given, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: does not belong behind --; {why}")
    for pair in given.rdzv_conf.split(","):
        if (key := pair.partition("=")[0].strip()) in _OUR_KEYS:
            raise UsageError(f"--rdzv-conf {key}: is for ft_ray to set")
    return given  # type: ignore[no-any-return]  # it is a Namespace
