"""The command that turns a trace into what people look at: `python -m ft_launcher.rollout.trace export FILE …`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ft_launcher.command_words import Parser
from ft_launcher.rollout.trace_page import page
from ft_launcher.rollout.trace_perfetto import perfetto
from ft_launcher.rollout.trace_records import TraceError, read_trace

__all__ = ["main"]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    made = Parser(prog="ft_trace", description=__doc__)
    made.add_argument("command", choices=["export"])
    made.add_argument("trace", type=Path, metavar="FILE", help="what `tracing` has written")
    made.add_argument("--perfetto", type=Path, metavar="OUT.json", help="for ui.perfetto.dev and chrome://tracing")
    made.add_argument("--html", type=Path, metavar="OUT.html", help="a page with the samples that took longest")
    made.add_argument("--slowest", type=_count, default=100, metavar="N", help="so many in the page (%(default)s)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0, 1 where a file cannot be read or written, 2 for a wrong command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.perfetto is None and options.html is None:
        parser.error("give --perfetto OUT.json, --html OUT.html, or both")
    try:
        trace = read_trace(options.trace)
        if options.perfetto is not None:
            options.perfetto.write_bytes(perfetto(trace))
        if options.html is not None:
            options.html.write_text(page(trace, options.trace.name, count=options.slowest), encoding="utf-8")
    except (TraceError, OSError) as error:
        sys.stderr.write(f"ft_trace: {error}\n")
        return 1
    return 0
