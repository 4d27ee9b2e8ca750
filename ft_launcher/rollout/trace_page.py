"""The long tail of a trace as one page of HTML that needs nothing else: no script, no font, no network."""

import math
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from html import escape
from zlib import crc32

from ft_launcher.rollout.trace_records import Span, Trace, duration

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; } th, td { text-align: right; padding: .15em .8em; }
th:first-child, td:first-child { text-align: left; } th { color: var(--dim); font-weight: normal; }
details { border-top: 1px solid var(--line); }
summary { display: flex; gap: 1em; align-items: center; cursor: pointer; }
summary b { width: 14em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: normal; }
summary i { width: 6em; text-align: right; font-style: normal; font-variant-numeric: tabular-nums; }
.lane { flex: 1; position: relative; height: 1.3em; background: var(--line); }
.lane span { position: absolute; height: 100%; min-width: 1px; box-sizing: border-box; }
.tail { display: flex; align-items: flex-end; height: 8em; gap: 1px; border-bottom: 1px solid var(--line); }
.tail span { flex: 1; background: hsl(210 60% 55%); min-height: 1px; }
.bad { color: hsl(0 70% 50%); } .dim { color: var(--dim); } td.in { white-space: pre; }
""".strip()
_COLUMNS = 200
"""Bars of the figure of all samples: more are thinner than a dot."""


def page(trace: Trace, title: str, *, count: int = 100) -> str:
    """Give the page, with the `count` slowest samples, each with its spans."""
    samples = trace.samples()
    times = [duration(spans) for spans in samples]
    begin = trace.anchor.wall + min((each.begin for each in trace.spans), default=trace.anchor.at) - trace.anchor.at
    since = datetime.fromtimestamp(begin / 1e9, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    unreadable = f", {trace.unreadable} torn lines left out" if trace.unreadable else ""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">{len(samples)} samples, {len(trace.spans)} spans, from {since}{unreadable}</p>',
        *_summary(times),
        "<h2>Where the time goes</h2>",
        *_names(trace.spans),
        f"<h2>The slowest {min(count, len(samples))} samples</h2>",
        '<p class="dim">All on the scale of the slowest one. Select one to see its spans.</p>',
    ]
    longest = max(times, default=0.0)
    for spans in samples[:count]:
        parts += _sample(spans, longest)
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _summary(times: Sequence[float]) -> Iterator[str]:
    """The figures, and a bar for each sample from the slowest to the fastest. `times`: sorted that way."""
    if not times:
        yield "<p>No sample was traced.</p>"
        return
    yield "<table><tr><th></th><th>median</th><th>90 %</th><th>99 %</th><th>slowest</th><th>all</th></tr>"
    figures = [_quantile(times, part) for part in (0.5, 0.9, 0.99)]
    cells = "".join(f"<td>{_seconds(each)}</td>" for each in (*figures, times[0], sum(times)))
    yield f"<tr><td>a sample takes</td>{cells}</tr></table>"
    yield '<div class="tail">'
    step = max(1, math.ceil(len(times) / _COLUMNS))
    for each in times[::step]:
        yield f'<span style="height:{_part(each, times[0]):.2f}%" title="{_seconds(each)}"></span>'
    yield "</div>"


def _names(spans: Sequence[Span]) -> Iterator[str]:
    found: dict[str, list[Span]] = {}
    for span in spans:
        found.setdefault(span.name, []).append(span)
    yield "<table><tr><th>span</th><th>times</th><th>median</th><th>99 %</th><th>slowest</th><th>all</th>"
    yield "<th>not ok</th></tr>"
    for name, each in sorted(found.items(), key=lambda pair: -sum(span.seconds for span in pair[1])):
        times = sorted((span.seconds for span in each), reverse=True)
        figures = (_quantile(times, 0.5), _quantile(times, 0.99), times[0], sum(times))
        bad = sum(span.status != "ok" for span in each)
        cells = "".join(f"<td>{_seconds(figure)}</td>" for figure in figures)
        mark = f'<span style="color:{_colour(name)}">&#9632;</span>'
        yield f"<tr><td>{mark} {escape(name)}</td><td>{len(each)}</td>{cells}<td>{bad or ''}</td></tr>"
    yield "</table>"


def _sample(spans: list[Span], longest: float) -> Iterator[str]:
    begin = min(each.begin for each in spans)
    root = spans[0]
    attempts = len({each.attempt for each in spans})
    words = "" if root.group is None else f" of group {root.group}"
    words += f", {attempts} attempts" if attempts > 1 else ""
    yield f"<details><summary><b>{escape(f'{root.sample}{words}')}</b><i>{_seconds(duration(spans))}</i>"
    yield f'<span class="lane">{"".join(_bar(each, begin, longest) for each in spans)}</span>'
    yield f"<i>{_words_of(_worst(spans))}</i></summary>"
    yield "<table><tr><th>span</th><th>begin</th><th>takes</th><th>status</th><th>attributes</th></tr>"
    depths: dict[str, int] = {}
    for span in spans:
        depth = depths[span.id] = depths.get(span.parent or "", -1) + 1
        attributes = ", ".join(f"{name} {value}" for name, value in span.attributes.items())
        yield (
            f'<tr><td class="in">{"  " * depth}{escape(span.name)}</td><td>{_seconds((span.begin - begin) / 1e9)}</td>'
            f"<td>{_seconds(span.seconds)}</td><td>{_words_of(span.status)}</td><td>{escape(attributes)}</td></tr>"
        )
    yield "</table></details>"


def _bar(span: Span, begin: int, longest: float) -> str:
    left, width = _part((span.begin - begin) / 1e9, longest), _part(span.seconds, longest)
    words = escape(f"{span.name}: {_seconds(span.seconds)}, {span.status}")
    style = f"left:{left:.3f}%;width:{width:.3f}%;background:{_colour(span.name)}"
    return f'<span style="{style}" title="{words}"></span>'


def _worst(spans: Sequence[Span]) -> str:
    found = {each.status for each in spans}
    return next((each for each in ("open", "error", "timeout", "cancelled") if each in found), "ok")


def _words_of(status: str) -> str:
    return "" if status == "ok" else f'<span class="bad">{status}</span>'


def _colour(name: str) -> str:
    return f"hsl({crc32(name.encode()) % 360} 55% 55%)"  # the same one in every page


def _part(seconds: float, longest: float) -> float:
    return 100 * seconds / longest if longest > 0 else 0.0


def _quantile(times: Sequence[float], part: float) -> float:
    """The nearest rank; `times` are sorted from the longest to the shortest."""
    return times[len(times) - max(1, math.ceil(part * len(times)))]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
