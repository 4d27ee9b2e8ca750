"""What the documents show is so: scripts run, files are read, output comes as printed, links lead somewhere.

A comment before each fenced block says how it is tested:

    <!-- test: run -->                     a shell runs it; `run, exits with 1`
    <!-- test: output -->                  the block above printed such lines; `output, and nothing else like it`
    <!-- test: python on 2 ranks -->       ft_launcher runs it; `python on 1 rank, with 1 restart`
    <!-- test: saved as train.py -->       a block that follows runs it
    <!-- test: yaml -->                    ft_launcher reads it; `yaml, saved as ft.yaml`
    <!-- test: output of the demo -->      the second job of examples/demo.py prints such lines
    <!-- test: no, because ... -->         it cannot be run here
"""

import ast
import inspect
import os
import re
import runpy
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

import ft_launcher
from ft_launcher import RankMonitorClient
from ft_launcher.checkpoint import CheckpointManager
from ft_launcher.config import resolve
from tests.conftest import Running, Sandbox

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
LINKED = [*DOCUMENTS, REPOSITORY / "CHANGELOG.md", REPOSITORY / "examples" / "README.md"]

FENCE = re.compile(r"(?:^ *<!-- test: (.+) -->\n)?^( *)```(.*)\n((?:.*\n)*?)\2```$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
VARIES = {
    r"\.\.\.": ".*",
    r"node \w+": r"node \S+",
    r"\b[0-9a-f]{8,}": "[0-9a-f]+",
    r"\d+(?:\.\d+)?": r"\d+(?:\.\d+)?",
    r" +": r"\s+",
}
"""What differs from one run to the next, and what may stand in its place."""

SOON = {"PET_FT_RANK_SECTION_TIMEOUTS": "setup:60,step:3,checkpointing:60"}
"""The demo's limits are far above what it needs; waiting for its hang would be most of the time spent here."""


NEEDED = {
    "engines": ("aiohttp", "prometheus_client"),
    "hugging_face": ("transformers", "accelerate"),
    "lightning": ("lightning",),
    "ray": ("ray",),
    "ray_cluster": ("ray",),
}
"""Packages without which a document's examples cannot be run."""


class Block(NamedTuple):
    """A fenced block of a document."""

    place: str
    mark: str
    language: str
    text: str


def blocks(document: Path) -> Iterator[Block]:
    content = document.read_text(encoding="utf-8")
    for found in FENCE.finditer(content):
        mark, indent, language, text = found.groups()
        line = content.count("\n", 0, found.start()) + 1
        yield Block(f"{document.name}:{line}", mark or "", language, textwrap.dedent(text) if indent else text)


class Reader:
    """Somebody who does in a directory of their own what a document says, from top to bottom."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._output = ""
        self._not_run: set[str] = set()
        self._beside: list[tuple[Running, Callable[[str], None]]] = []

    def do(self, block: Block) -> None:
        match block.mark.split(", "):
            case ["no", reason, *_] if reason.startswith("because "):
                pass
            case [word] if word.startswith("saved as "):
                self._save(word, block)
            case ["yaml", *saved]:
                assert resolve(block.text, block.place, {}, {}).warnings == []
                for word in saved:
                    self._save(word, block)
            case ["python on 2 ranks" | "python on 1 rank" as ranks, *restarts]:
                self._launch(block, ranks.split()[2], restarts)
            case ["run", *ends]:
                self._run(block, int(ends[0].removeprefix("exits with ")) if ends else 0)
            case ["output", *only]:
                self._compare(block, self._output)
                if only:
                    kills = [text.count("; killing") for text in (self._output, block.text)]
                    assert kills[0] == kills[1], f"{block.place}: not all that came:\n{self._output}"
            case ["output of the demo"]:
                self._beside.append((self._start_demo(), partial(self._compare, block)))
            case other:
                pytest.fail(f"{block.place}: how is this block tested? {', '.join(other) or 'it has no comment'}")

    def finish(self) -> None:
        """Wait for the jobs on which nothing else depends: they have run beside the others."""
        for running, check in self._beside:
            check(self._end(running, 0))
        assert not self._not_run, f"saved, and never run: {self._not_run}"

    def _save(self, word: str, block: Block) -> None:
        name = word.removeprefix("saved as ")
        self._sandbox.script(block.text, name)
        self._not_run.add(name)

    def _launch(self, block: Block, ranks: str, restarts: list[str]) -> None:
        script = self._sandbox.script(block.text, f"block_{block.place.partition(':')[2]}.py")
        flags = ["--max-restarts", "1"] if restarts == ["with 1 restart"] else []
        command = (sys.executable, "-m", "ft_launcher", "--nproc-per-node", ranks, "--log-dir", "logs", *flags, script)

        def check(output: str) -> None:
            assert output.count("started rank 0") == 1 + len(restarts), f"{block.place}:\n{output}"

        self._beside.append((self._start(*command), check))

    def _run(self, block: Block, code: int) -> None:
        self._not_run -= {name for name in self._not_run if name in block.text}
        self._output = self._end(self._start("bash", "-euc", block.text), code)

    def _start_demo(self) -> Running:
        """Start the job of the demo that has the faults; the other one is like it."""
        demo = runpy.run_path(str(REPOSITORY / "examples" / "demo.py"))
        words = [*demo["JOB"], "examples/train_ddp.py", "--checkpoint-dir", str(self._sandbox.path / "checkpoints")]
        script = f"cd {REPOSITORY}; set -x; PS4='$ '; {shlex.join([*words, *demo['FAULTS']])}"
        return self._start("bash", "-euc", script, **SOON)

    def _start(self, *command: str, **env: str) -> Running:
        return self._sandbox.start(*command, PATH=self._path, **env)

    def _end(self, running: Running, code: int) -> str:
        ended = running.wait()
        assert ended == code, f"exit code {ended}, not {code}:\n{running.output}"
        return running.output

    def _compare(self, block: Block, output: str) -> None:
        came = [line.strip() for line in output.splitlines()]
        for line in filter(None, map(str.strip, block.text.splitlines())):
            like = re.compile(roughly(line))
            assert any(map(like.fullmatch, came)), f"{block.place}: no line like {line!r} came:\n{output}"


def roughly(line: str) -> str:
    """Give a pattern for lines like this one."""
    parts = re.split(f"({'|'.join(VARIES)})", line)
    return "".join(
        next((stands for varies, stands in VARIES.items() if re.fullmatch(varies, part)), re.escape(part))
        for part in parts
    )


@pytest.fixture
def short_directory() -> Iterator[str]:
    """For Ray, whose sockets have long names below it."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as directory:
        yield directory


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_a_document_shows_what_happens(sandbox, short_directory, document):
    for package in NEEDED.get(document.stem, ()):
        pytest.importorskip(package, reason="an extra is not installed")
    sandbox.env["RAY_TMPDIR"] = short_directory
    reader = Reader(sandbox)
    for block in blocks(document):
        reader.do(block)
    reader.finish()


def test_every_fence_of_the_documents_is_found():
    for document in DOCUMENTS:
        fences = re.findall(r"^ *```", document.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(list(blocks(document))), f"{document.name}: a fence is not closed"


def test_links_between_documents_lead_somewhere():
    for document in LINKED:
        for target in LINK.findall(document.read_text(encoding="utf-8")):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            there = (document.parent / path).resolve() if path else document
            assert there.exists(), f"{document.name}: {target} leads nowhere"
            assert not anchor or anchor in anchors(there), f"{document.name}: {target}: no such heading"


def anchors(document: Path) -> set[str]:
    """What GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tables_of_the_reference_are_those_of_the_code():
    reference = REPOSITORY / "docs" / "reference.md"
    text = reference.read_text(encoding="utf-8")
    filled = runpy.run_path(str(REPOSITORY / "docs" / "generate_reference.py"))["filled"]
    assert filled(text) == text, "run: python docs/generate_reference.py --write"


def test_the_reference_has_every_public_name():
    text = (REPOSITORY / "docs" / "reference.md").read_text(encoding="utf-8")
    missing = [name for name in ft_launcher.__all__ if f"`{name}" not in text]
    client = RankMonitorClient()
    missing += [name for name in vars(client) if name[0] != "_" and f"`{name}`" not in text]
    for name, method in inspect.getmembers(RankMonitorClient, inspect.isfunction):
        parameters = [
            each.name if each.default is each.empty else f"{each.name}={each.default}"
            for each in inspect.signature(method).parameters.values()
            if each.name != "self"
        ]
        call = f"{name}({', '.join(parameters)})"
        missing += [call] if name[0] != "_" and call not in text else []
    assert not missing


def test_the_document_of_checkpoints_names_every_method_and_parameter():
    text = (REPOSITORY / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    methods = inspect.getmembers(CheckpointManager, inspect.isfunction)
    names = {name for name, _ in methods if name[0] != "_"}
    for name, method in methods:
        if name in names or name == "__init__":
            names |= inspect.signature(method).parameters.keys()
    missing = [name for name in sorted(names - {"self"}) if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_the_messages_explained_are_those_of_the_code():
    text = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?`) \|", text.partition("## Messages")[2], re.MULTILINE)
    said = list(literals())
    messages = [message for row in rows for message in re.findall(r"`(.+?)`", row)]
    assert len(messages) > 30
    for message in messages:
        for part in filter(None, map(str.strip, message.split("..."))):
            assert is_said(part, said, pieces=3), f"{message!r} is explained, and {part!r} is said nowhere"


def literals() -> Iterator[str]:
    """The text between the values in every string of the code."""
    for module in (REPOSITORY / "ft_launcher").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from re.split("%[a-z]", node.value)


def is_said(text: str, said: list[str], *, pieces: int) -> bool:
    """Whether `text` is in one of the strings, or put together from `pieces` of them at most."""
    if any(text in each for each in said):
        return True
    cuts = [found.start() for found in re.finditer(r"(?<=\W)(?=\w)|(?<=\w)(?=\W)", text)] if pieces > 1 else []
    return any(
        any(text[:cut] in each for each in said) and is_said(text[cut:], said, pieces=pieces - 1) for cut in cuts
    )


def test_no_document_names_the_machine_that_it_was_written_on():
    for document in LINKED:
        found = re.search(r"/root\b|/work\b|/home\b", document.read_text(encoding="utf-8"))
        assert found is None, f"{document.name}: {found}"
