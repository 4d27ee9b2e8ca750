"""Prints the tables of reference.md that derive from the code; with --write, puts them there.

python docs/generate_reference.py --write
"""

import re
import signal
import sys
from pathlib import Path

from msgspec import Struct

from ft_launcher.causes import (
    Cause,
    Excluded,
    Exhausted,
    ExitCodes,
    Exited,
    HostLost,
    Hung,
    LauncherSignalled,
    MonitorsFailed,
    NodeLost,
    NotMonitored,
    OutOfMemory,
    Preempted,
    Refused,
    ShutDown,
    Signalled,
    TooFewNodes,
    Unkillable,
    exit_code,
    sentence,
)
from ft_launcher.config import ConfigOptions, FaultToleranceConfig, described

REFERENCE = Path(__file__).with_name("reference.md")
STYLES: tuple[ExitCodes, ...] = ("torchrun", "classified")

CAUSES: dict[str, Cause] = {
    "every rank ended with 0": Exited(0),
    "a rank ended with another code": Exited(7),
    "a signal ended a rank": Signalled(signal.SIGSEGV),
    "a rank hung": Hung("section 'step' open for 12.3 s, timeout 12 s"),
    "a rank took more memory than there is": OutOfMemory(16 * 2**30),
    "no rank connected, under --ft-require-monitoring": NotMonitored(),
    "a rank asked to shut the job down": ShutDown("the loss is NaN"),
    "no checkpoint is left from which ranks do not fail": Exhausted("no checkpoint is left to go on from: ..."),
    "a rank asked to exclude its node": Excluded("GPU 3 has uncorrectable errors"),
    "monitors die as fast as they are started": MonitorsFailed("..."),
    "SIGKILL does not end a process": Unkillable(4242, "D", "python3"),
    "a node was lost, and no restart is left": NodeLost("node2", "its launcher died"),
    "fewer nodes than the minimum": TooFewNodes("after 600 s 1 node is there (a), and --nnodes asks for 2 at least"),
    "the host of the rendezvous was lost": HostLost("the rendezvous host at node1:29400 was lost (...)"),
    "nodes were told different things": Refused("node b (pid 7) has --nnodes 2:4, node a (pid 9) has 3:4; ..."),
    "the launcher was signalled": LauncherSignalled(signal.SIGTERM),
    "all ranks have ended for a notice": Preempted("SIGTERM", "node1", 41),
    "the time that a cloud gave was over": Preempted("aws: ...", unsaved="rank 1 (pid 4242, node b): at step 40"),
}


def tables() -> dict[str, str]:
    """Give the generated tables by the name that their place in reference.md has."""
    return {
        "settings": _settings(FaultToleranceConfig, with_keys=True),
        "options": _settings(ConfigOptions, with_keys=False),
        "exit codes": _exit_codes(),
    }


def _settings(record: type[Struct], *, with_keys: bool) -> str:
    head = ["flag", "variable", *["key"] * with_keys, "default", "meaning"]
    rows = []
    for name, field in described(record).items():
        value = f" {field.kind.metavar}" if field.kind.metavar else ""
        default = field.kind.write(field.default)
        row = [f"`--ft-{name.replace('_', '-')}{value}`", f"`PET_FT_{name.upper()}`"]
        rows.append([*row, *[f"`{name}`"] * with_keys, f"`{default}`", field.doc])
    return _table(head, rows)


def _exit_codes() -> str:
    rows = [
        [name, "" if cause == Exited(0) else sentence(cause), *(str(exit_code(cause, style)) for style in STYLES)]
        for name, cause in CAUSES.items()
    ]
    return _table(["end of the job", "as it is said", *(f"`{style}`" for style in STYLES)], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def filled(text: str) -> str:
    """Give the text of reference.md with each table in its place."""
    for name, table in tables().items():
        begin, end = f"<!-- generated: {name} -->\n\n", "\n\n<!-- end -->"
        pattern = f"({re.escape(begin)}).*?({re.escape(end)})"
        text, places = re.subn(pattern, lambda found, table=table: found[1] + table + found[2], text, flags=re.DOTALL)
        if places != 1:
            raise SystemExit(f"{REFERENCE.name} has {places} places for the table of {name}, not 1")
    return text


def main() -> None:
    """Print the tables, or write the file."""
    if sys.argv[1:] == ["--write"]:
        REFERENCE.write_text(filled(REFERENCE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, table in tables().items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
