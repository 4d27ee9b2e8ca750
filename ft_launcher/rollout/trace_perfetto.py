"""A trace in the JSON that Perfetto (ui.perfetto.dev) and chrome://tracing read."""

from collections.abc import Iterable
from typing import Any

import msgspec

from ft_launcher.rollout.trace_records import Span, Trace, duration

__all__ = ["perfetto"]

_BESIDE = 0
"""The process under which what belongs to no sample stands."""


def perfetto(trace: Trace) -> bytes:
    """Give the file: a process for each sample, the one that took longest first, and as many threads as it needs.

    Spans of one thread nest, as the format asks; what ran at the same time stands in threads of its own.
    """
    begin = min((each.begin for each in trace.spans), default=trace.anchor.at)
    samples = trace.samples()
    places = {spans[0].sample: number for number, spans in enumerate(samples, 1)}
    events: list[dict[str, Any]] = []
    for number, spans in enumerate(samples, 1):
        title = f"sample {spans[0].sample}: {duration(spans):.3f} s"
        events += _process(number, title, spans, begin)
    rest = [each for each in trace.spans if each.sample is None]
    events += _process(_BESIDE, "beside samples", rest, begin)
    for mark in trace.events:
        place = {"pid": places.get(mark.sample, _BESIDE), "tid": 0}
        events.append(
            {"ph": "i", "s": "p", "name": mark.name, "ts": (mark.at - begin) / 1e3, **place, "args": mark.attributes}
        )
    wall = trace.anchor.wall + begin - trace.anchor.at
    content = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"begin_unix_ns": str(wall)}}
    return msgspec.json.encode(content)


def _process(number: int, title: str, spans: list[Span], begin: int) -> Iterable[dict[str, Any]]:
    if not spans:
        return
    yield {"ph": "M", "name": "process_name", "pid": number, "args": {"name": title}}
    yield {"ph": "M", "name": "process_sort_index", "pid": number, "args": {"sort_index": number}}
    for thread, span in _threads(spans):
        known = {"status": span.status, "attempt": span.attempt, "span": span.id}
        known |= {} if span.group is None else {"group": span.group}
        yield {
            "ph": "X",
            "name": span.name,
            "cat": span.status,
            "ts": (span.begin - begin) / 1e3,
            "dur": (span.end - span.begin) / 1e3,
            "pid": number,
            "tid": thread,
            "args": span.attributes | known,
        }


def _threads(spans: list[Span]) -> Iterable[tuple[int, Span]]:
    """Put each span into the first thread in which it lies beside, or within, what is there."""
    threads: list[list[Span]] = []  # of each, the spans that are not over
    for span in sorted(spans, key=lambda each: (each.begin, -each.end)):
        for number, within in enumerate(threads):
            while within and within[-1].end <= span.begin:
                within.pop()
            if not within or within[-1].end >= span.end:
                within.append(span)
                yield number, span
                break
        else:
            threads.append([span])
            yield len(threads) - 1, span
