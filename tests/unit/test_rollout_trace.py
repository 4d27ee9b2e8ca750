"""Traces: spans are closed with their status whatever ends them, the rollout feels nothing of it, and what is shown."""

import asyncio
import gc
import itertools
import json
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ft_launcher.rollout import (
    bind_trace,
    trace,
    trace_context,
    trace_event,
    trace_function,
    trace_sample,
    trace_span,
    tracing,
)
from ft_launcher.rollout.trace_command import main
from ft_launcher.rollout.trace_page import page
from ft_launcher.rollout.trace_perfetto import perfetto
from ft_launcher.rollout.trace_records import Span, Trace, TraceError, read_trace


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "traces" / "trace.jsonl"


def spans_of(path: Path) -> dict[str, Span]:
    found = read_trace(path)
    assert found.unreadable == 0
    assert len({each.name for each in found.spans}) == len(found.spans)
    return {each.name: each for each in found.spans}


def test_spans_nest_and_belong_to_their_sample(path):
    with tracing(path), trace_sample(12, group="g", attempt=1, prompt="hello"):
        with trace_span("generate", engine="a") as span:
            span["tokens"] = 3
            with trace_span("request"):
                trace_event("retry", why="connect")
        with trace_span("reward"):
            pass
    spans = spans_of(path)
    assert [spans[name].parent for name in ("sample", "generate", "request", "reward")] == [
        None,
        spans["sample"].id,
        spans["generate"].id,
        spans["sample"].id,
    ]
    assert {(each.sample, each.group, each.attempt, each.status) for each in spans.values()} == {("12", "g", 1, "ok")}
    assert spans["sample"].attributes == {"prompt": "hello"}
    assert spans["generate"].attributes == {"engine": "a", "tokens": 3}
    (event,) = read_trace(path).events
    assert (event.name, event.sample, event.attributes) == ("retry", "12", {"why": "connect"})
    assert spans["request"].begin <= event.at <= spans["request"].end


def test_what_runs_beside_another_is_not_within_it(path):
    async def work(number: int) -> None:
        async with trace_sample(number, name=f"sample{number}"):
            await asyncio.sleep(0)
            async with trace_span(f"span{number}"):
                await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(work(1), work(2))

    with tracing(path):
        asyncio.run(both())
    spans = spans_of(path)
    for number in (1, 2):
        assert spans[f"span{number}"].parent == spans[f"sample{number}"].id
        assert spans[f"span{number}"].sample == str(number)


def test_D5_cancelled_and_timed_out_and_failed_spans_are_closed_with_their_status(path):
    async def rollout() -> None:
        begun = asyncio.Event()

        async def hangs(name: str) -> None:
            async with trace_sample(name, name=name), trace_span(f"{name}'s request"):
                begun.set()
                await asyncio.Event().wait()

        async with trace_sample("slow", name="slow"):
            try:
                async with trace_span("limited"):
                    await asyncio.wait_for(hangs("timed out"), 0.01)
            except asyncio.TimeoutError:
                pass
        begun.clear()
        task = asyncio.create_task(hangs("cancelled"))
        await begun.wait()
        assert read_trace(path).spans[-1].status == "open"  # it is written while it happens
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(ZeroDivisionError):
            async with trace_span("broken"):
                1 / 0  # noqa: B018

    with tracing(path):
        asyncio.run(rollout())
    statuses = {name: span.status for name, span in spans_of(path).items()}
    assert statuses == {
        "slow": "ok",
        "limited": "timeout",
        "timed out": "cancelled",
        "timed out's request": "cancelled",
        "cancelled": "cancelled",
        "cancelled's request": "cancelled",
        "broken": "error",
    }
    assert spans_of(path)["broken"].attributes == {"error": "ZeroDivisionError: division by zero"}


def test_D5_a_coroutine_that_is_thrown_away_closes_its_spans(path):
    async def hangs() -> None:
        with trace_span("thrown away"):
            await asyncio.Event().wait()

    with tracing(path):
        coroutine = hangs()
        loop = asyncio.new_event_loop()
        loop.run_until_complete(asyncio.wait([task := loop.create_task(coroutine)], timeout=0))
        coroutine.close()
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()
        gc.collect()
    assert spans_of(path)["thrown away"].status == "cancelled"


def test_D5_a_wall_clock_that_is_set_in_the_middle_changes_no_duration(path):
    hours = itertools.count()

    def wall() -> int:
        return time.time_ns() + next(hours) * 3_600_000_000_000

    clock = itertools.count(5_000_000_000, 250_000_000)
    for number in range(3):  # each has a line that says what the wall clock says, an hour on
        tracer = trace.Tracer(path, clock=lambda: next(clock), wall=wall)
        place = trace._place.get()
        tracer.end(tracer.begin(f"span{number}", place, {}), "ok", {})
        tracer.close()
    found = read_trace(path)
    assert [each.seconds for each in found.spans] == [0.25, 0.25, 0.25]
    content = json.loads(perfetto(found))
    assert [(each["ts"], each["dur"]) for each in content["traceEvents"] if each["ph"] == "X"] == [
        (0.0, 250_000.0),
        (750_000.0, 250_000.0),
        (1_500_000.0, 250_000.0),
    ]


def test_functions_and_coroutine_functions_become_spans(path):
    @trace_function()
    def plain(value: int) -> int:
        return value + 1

    @trace_function("named", kind="async")
    async def asynchronous(value: int) -> int:
        await asyncio.sleep(0)
        return plain(value)

    with tracing(path):
        assert asyncio.run(asynchronous(1)) == 2
    spans = read_trace(path).spans
    assert [each.name.rpartition(".")[2] for each in spans] == ["named", "plain"]
    assert spans[1].parent == spans[0].id
    assert spans[0].attributes == {"kind": "async"}
    assert plain.__name__ == "plain"
    with pytest.raises(TypeError, match="is a generator"):

        @trace_function()
        def generator():
            yield


FORKS = """
import json, os, sys
from ft_launcher.rollout import bind_trace, trace_span, tracing
with tracing(sys.argv[1]), bind_trace(json.loads(sys.argv[2])):
    child = os.fork()
    with trace_span("parent" if child else "child"):
        pass
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_threads_and_other_processes_go_on_where_they_are_told_to(path):
    with tracing(path):
        with trace_sample(3):
            context = json.loads(json.dumps(trace_context()))

            def other() -> None:
                with bind_trace(context), trace_span("thread"):
                    pass

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            subprocess.run([sys.executable, "-c", FORKS, str(path), json.dumps(context)], check=True)
        with bind_trace({"sample": 5}), trace_span("not ours"):
            pass
    spans = spans_of(path)
    for name in ("thread", "child", "parent"):
        assert (spans[name].sample, spans[name].parent) == ("3", spans["sample"].id)
    assert len({each.id.partition("-")[0] for each in spans.values()}) == 3
    assert spans["not ours"].sample is None


def test_without_tracing_nothing_happens(path):
    with trace_sample(1), trace_span("a") as span:
        span["b"] = 1
        trace_event("c")
    assert not path.exists()


def test_a_trace_that_cannot_be_written_is_told_of_once_and_breaks_nothing(tmp_path, caplog):
    class Unspeakable:
        def __repr__(self) -> str:
            raise ValueError("no words for it")

    with tracing(tmp_path), trace_span("a"):  # a directory
        trace_event("b")
    assert "there will be no trace: Is a directory" in caplog.text
    caplog.clear()
    with tracing("/dev/full"), trace_sample(1), trace_span("a"):
        trace_event("b")
    assert len(caplog.records) == 1
    assert "could not be written: [Errno 28]" in caplog.text
    with tracing(tmp_path / "t"), trace_span("a", value=Unspeakable()) as span:
        span["fine"] = {1, 2}
        with trace_span("b", value=object()):
            pass
    assert "object object at" in spans_of(tmp_path / "t")["b"].attributes["value"]
    with tracing(tmp_path / "t"), pytest.raises(RuntimeError, match="traced already"), tracing(tmp_path / "u"):
        pytest.fail("it began")


def test_a_trace_of_a_process_that_died_is_read_without_its_torn_line(path):
    with tracing(path):
        with trace_span("whole"):
            pass
        with trace_span("open"):
            trace_event("last")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    found = read_trace(path)
    assert {each.name: each.status for each in found.spans} == {"whole": "ok", "open": "open"}
    assert found.spans[-1].end == found.events[0].at
    assert found.unreadable == 1
    with tracing(path), trace_span("next run"):  # on a line of its own
        pass
    assert [each.status for each in read_trace(path).spans] == ["ok", "open", "ok"]
    kinds = [json.loads(line)["kind"] for line in path.read_bytes().splitlines() if line.endswith(b"}")]
    assert kinds.count("anchor") == 2


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none")
    (tmp_path / "t").write_text('{"kind": "event", "name": "a", "at": 1}\nhello\n')
    with pytest.raises(TraceError, match="it is no trace"):
        read_trace(tmp_path / "t")
    (tmp_path / "t").write_text('{"kind":"anchor","format":2,"process":"a","pid":1,"at":1,"wall":1}\n')
    with pytest.raises(TraceError, match="it has format 2; this ft_launcher reads format 1"):
        read_trace(tmp_path / "t")


# -- what is shown ----------------------------------------------------------------------------------------------------


@pytest.fixture
def busy(path: Path) -> Trace:
    """A trace of samples with requests side by side, one of which is the tail."""
    now = itertools.count()  # every look at the clock is a millisecond on
    milliseconds = iter(lambda: next(now) * 1_000_000, None)
    tracer = trace.Tracer(path, clock=lambda: next(milliseconds))
    for number in range(20):
        place = trace._Place(sample=f"<{number}>", group="g&h")
        root = tracer.begin("sample", place, {"prompt": "<script>alert(1)</script>"})
        within = trace._Place(sample=f"<{number}>", group="g&h", span=root)
        for request in range(1 + number % 3 + 20 * (number == 7)):
            one = tracer.begin("request <&>", within, {"n": request})
            other = tracer.begin("reward", within, {})
            tracer.end(one, "timeout" if number == 7 else "ok", {})
            tracer.event("retry", within, {})
            tracer.end(other, "ok", {})
        tracer.end(root, "ok", {})
    tracer.begin("beside", trace._Place(), {})
    tracer.close()
    return read_trace(path)


def test_D6_what_is_exported_has_the_shape_that_perfetto_reads_and_nests(busy):
    content = json.loads(perfetto(busy))
    events = content["traceEvents"]
    assert {each["ph"] for each in events} == {"M", "X", "i"}
    spans = [each for each in events if each["ph"] == "X"]
    assert len(spans) == len(busy.spans)
    for each in spans:
        assert isinstance(each["name"], str)
        assert each["ts"] >= 0
        assert each["dur"] >= 0
        assert isinstance(each["pid"], int)
        assert isinstance(each["tid"], int)
    for thread in {(each["pid"], each["tid"]) for each in spans}:
        open_until: list[float] = []
        for each in (each for each in spans if (each["pid"], each["tid"]) == thread):  # in order of their begin
            while open_until and open_until[-1] <= each["ts"]:
                open_until.pop()
            assert not open_until or each["ts"] + each["dur"] <= open_until[-1]
            open_until.append(each["ts"] + each["dur"])
    named = {each["pid"]: each["args"]["name"] for each in events if each.get("name") == "process_name"}
    assert named[1].startswith("sample <7>: ")  # the slowest is the first
    assert named[0] == "beside samples"
    assert len(named) == 21
    assert {each["pid"] for each in events if each["ph"] == "i"} == set(range(1, 21))


class Elements(HTMLParser):
    """Checks that tags are balanced, and collects them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_D6_the_page_shows_the_slowest_samples_first_and_needs_nothing_else(busy):
    elements = Elements()
    elements.feed(page(busy, "a <trace>", count=5))
    elements.close()
    assert elements.open == []
    tags = [tag for tag, _ in elements.found]
    assert tags.count("details") == 5
    assert not {"script", "link", "img", "iframe"} & set(tags)
    for _, attributes in elements.found:
        assert not {"src", "href", "onclick"} & set(attributes)
    assert "url(" not in elements.text
    assert "a <trace>" in elements.text
    assert "<script>alert(1)</script>" in elements.text  # as text
    rows = [line for line in elements.text.splitlines() if "of group g&h" in line]
    assert rows[0].startswith("<7> of group g&h")
    assert len(rows) == 5
    widths = [attributes["style"] for tag, attributes in elements.found if tag == "span" and "style" in attributes]
    assert any("width:100.000%" in (each or "") for each in widths)


def test_a_page_of_a_trace_without_samples_says_so(path):
    with tracing(path):
        pass
    assert "No sample was traced" in page(read_trace(path), "empty")
    assert json.loads(perfetto(read_trace(path)))["traceEvents"] == []


def test_the_command_exports_both_and_says_what_is_wrong(busy, path, tmp_path, capsys):
    both = ["--perfetto", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert main(["export", str(path), *both]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["displayTimeUnit"] == "ms"
    assert "</html>" in (tmp_path / "out.html").read_text()
    assert main(["export", str(tmp_path / "none"), *both]) == 1
    assert main(["export", str(path), "--html", str(tmp_path)]) == 1
    for wrong, said in (([], "--perfetto OUT.json"), ([*both, "--slowest", "0"], "whole number above 0")):
        with pytest.raises(SystemExit) as end:
            main(["export", str(path), *wrong])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
