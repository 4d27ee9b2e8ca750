"""The command `ft_checkpoint`: what stands in a directory of checkpoints, whole or broken; what would be resumed."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from ft_launcher.checkpoint.bar import progress
from ft_launcher.checkpoint.directory import Directory
from ft_launcher.checkpoint.errors import CheckpointError
from ft_launcher.checkpoint.files import Verify, problems
from ft_launcher.checkpoint.manifest import Entry, Manifest, best, metrics_of, newest_first, step_of
from ft_launcher.command_words import Parser, one_of

__all__ = ["main"]

_COMMANDS = ("ls", "verify", "show")


def _parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="ft_checkpoint",
        description=__doc__,
        epilog="ls looks at names, manifests and sizes, verify at every byte; show tells of one checkpoint (the one "
        "that would be resumed, or --step N, or DIR/step_N). Nothing is changed but by verify --set-aside. "
        "Exit code: 0, 1 where something is broken or missing, 2 for a wrong command.",
    )
    made.add_argument("command", type=one_of(_COMMANDS), metavar="ls|verify|show")
    made.add_argument("directory", type=Path, metavar="DIR")
    made.add_argument("--step", type=int, metavar="N", help="only this step (show, verify)")
    made.add_argument("--best-metric", default="loss", metavar="NAME", help="the best is found by this metric (loss)")
    made.add_argument("--best-mode", choices=["min", "max"], default="min", help="(min)")
    made.add_argument(
        "--set-aside", action="store_true", help="with verify: give broken ones another name, broken-step_N"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.set_aside and options.command != "verify":
        parser.error("--set-aside belongs to verify")
    if options.directory.name and step_of(options.directory.name) is not None and options.step is None:
        options.step = step_of(options.directory.name)
        options.directory = options.directory.parent
    directory = Directory(options.directory.absolute())
    # A file or a pipe has no width that lines would have to be broken for.
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    try:
        if not directory.path.is_dir():
            parser.error(f"{options.directory}: no such directory")
        entries = [each for each in directory.entries() if options.step in (None, each.step)]
        if options.step is not None and not entries:
            steps = ", ".join(str(each.step) for each in directory.entries()) or "none"
            parser.error(f"--step {options.step}: there is no such checkpoint; there are {steps}")
        return _RUN[options.command](directory, entries, options, console)
    except (CheckpointError, OSError) as error:
        print(f"ft_checkpoint: {error}", file=sys.stderr)
        return 1


def _ls(directory: Directory, entries: list[Entry], options: argparse.Namespace, console: Console) -> int:
    found = {each.path: _found(each, "size") for each in entries}
    return _report(directory, entries, found, options, console)


def _verify(directory: Directory, entries: list[Entry], options: argparse.Namespace, console: Console) -> int:
    found = {each.path: _found(each, "full") for each in entries}
    code = _report(directory, entries, found, options, console)
    if options.set_aside:
        for path in [path for path, what in found.items() if what]:
            console.print(f"{path.name} is now {directory.set_aside(path).name}")
    return code


def _show(directory: Directory, entries: list[Entry], options: argparse.Namespace, console: Console) -> int:
    found: dict[Path, list[str]] = {}
    entry = entries[0] if options.step is not None else None
    for each in newest_first(entries):
        found[each.path] = _found(each, "full")
        if not found[each.path]:
            entry = each
            break  # the others need not be read
    if entry is None:
        console.print(f"{directory.path}: nothing would be resumed")
        return 1
    console.print(escape(str(entry.path)), style="bold")
    manifest = entry.manifest
    if manifest is not None:
        for name, value in _facts(manifest).items():
            console.print(f"  {name:9} {escape(value)}")
        for name, record in sorted(manifest.files.items()):
            console.print(f"  {escape(name):24} {decimal(record.bytes):>10}  sha256 {record.sha256}")
    for problem in found[entry.path]:
        console.print(f"  broken: {escape(problem)}", style="red")
    if not found[entry.path]:
        console.print("  every byte is as it was written", style="green")
    return 1 if found[entry.path] else 0


_RUN: dict[str, Callable[[Directory, list[Entry], argparse.Namespace, Console], int]] = {
    "ls": _ls,
    "verify": _verify,
    "show": _show,
}


def _found(entry: Entry, verify: Verify) -> list[str]:
    if entry.manifest is None:
        return [entry.problem]
    total = entry.manifest.total_bytes if verify == "full" else 0
    with progress(f"verifying step {entry.step}", total, shown=verify == "full") as on_bytes:
        return problems(entry.path, entry.manifest, entry.manifest.files, verify=verify, on_bytes=on_bytes)


def _resumed(entries: list[Entry], found: dict[Path, list[str]]) -> Entry | None:
    return next((each for each in newest_first(entries) if not found[each.path]), None)


def _report(
    directory: Directory,
    entries: list[Entry],
    found: dict[Path, list[str]],
    options: argparse.Namespace,
    console: Console,
) -> int:
    whole = [each for each in entries if not found[each.path]]
    champion = best(whole, options.best_metric, options.best_mode)
    resumed = _resumed(entries, found)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("step", "saved (UTC)", "size", "ranks", "metrics", "state"):
        table.add_column(title, no_wrap=title != "metrics")
    for entry in entries:
        what = found[entry.path]
        marks = ["[red]broken[/]" if what else "[green]whole[/]"]
        marks += ["[bold]best[/]"] if entry is champion else []
        marks += ["[bold]would be resumed[/]"] if entry is resumed else []
        manifest = entry.manifest
        if manifest is None:
            table.add_row(str(entry.step), "", "", "", "", ", ".join(marks))
        else:
            facts = _facts(manifest)
            table.add_row(
                str(entry.step),
                facts["saved"],
                facts["size"],
                facts["ranks"],
                escape(facts["metrics"]),
                ", ".join(marks),
            )
    console.print(table if entries else f"{directory.path}: no checkpoints")
    for path, what in found.items():
        for each in what:
            console.print(f"{path.name}: {escape(each)}", style="red")
    for path in directory.leftovers():
        console.print(f"{path.name}: a dead writer's, or being written; the next writer takes it away", style="yellow")
    if entries and resumed is None:
        console.print("nothing would be resumed", style="red")
    return 1 if any(found.values()) else 0


def _facts(manifest: Manifest) -> dict[str, str]:
    return {
        "step": str(manifest.step),
        "saved": manifest.saved_utc.replace("+00:00", "").replace("T", " "),
        "size": decimal(manifest.total_bytes),
        "ranks": str(manifest.world_size),
        "model": "in pieces (torch.distributed.checkpoint)" if manifest.sharded else "in one piece",
        "torch": manifest.torch,
        "metrics": ", ".join(f"{name} {value:.6g}" for name, value in metrics_of(manifest).items()),
    }


if __name__ == "__main__":
    sys.exit(main())
