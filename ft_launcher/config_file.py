"""Finds the `fault_tolerance` section in a YAML file, and refuses files that are not what they should be."""

import re
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ft_launcher.config_kinds import Given, shown, unique
from ft_launcher.errors import UsageError

if TYPE_CHECKING:
    from os import PathLike

    import yaml

# Modules are imported and patterns compiled where they are used: FaultToleranceConfig is loaded in every
# rank, which reads no file, and this would be 1 MB of it.

__all__ = ["SECTION", "document", "read_config_file", "section_entries"]

SECTION = "fault_tolerance"
_MAX_FILE_BYTES = 1 << 20
_MAX_DEPTH = 32
_MAX_ALIASES = 50
_NOT_YAML = "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
_PLAIN_TAG = r"!|tag:yaml\.org,2002:[a-z]+"  # nothing of `!!python/…`, nothing of anybody's own


def read_config_file(path: "str | PathLike[str]", *, missing_ok: bool = False) -> str | None:
    """Give the file's text, or None when it is missing and may be. Raises UsageError (from any OSError)."""
    from pathlib import Path

    where = _shown_path(path)
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        if missing_ok:
            return None
        raise UsageError(f"{where}: no such file{_similar_file(Path(path))}") from error
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror}") from error
    if len(content) > _MAX_FILE_BYTES:
        raise UsageError(f"{where}: larger than 1 MiB, which no configuration is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{where}:{line}: not UTF-8 (byte 0x{content[error.start]:02x})") from None


def _shown_path(path: "str | PathLike[str]") -> str:
    return shown(str(path), at_most=4096)


def _similar_file(path: Any) -> str:
    from difflib import get_close_matches

    with suppress(OSError):
        near = get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
        return f"; did you mean {_shown_path(path.with_name(near[0]))}?" if near else ""
    return ""


def section_entries(text: str, file_name: str) -> list[tuple[str, Given]]:
    """Give what the section of a file says, key by key. Raises UsageError."""
    file_name = _shown_path(file_name)
    key, section = _section(document(text, file_name), file_name)
    if section.id != "mapping":
        raise UsageError(f"{file_name}:{key.start_mark.line + 1}: {SECTION}: must be a mapping of settings")
    return list(unique(_entries(section, file_name, SECTION)).items())


def _entries(mapping: "yaml.Node", file_name: str, path: str) -> list[tuple[str, Given]]:
    entries = []
    for key, value in mapping.value:
        name = key.value if key.id == "scalar" else f"a {key.id} as a key"
        origin = f"{file_name}:{key.start_mark.line + 1}"
        found: Any = None
        if value.id == "scalar":
            found = value.value
        elif value.id == "mapping":
            # No setting is nested deeper, and what aliases stand for may be endless.
            found = _entries(value, file_name, f"{path}.{shown(name)}") if path == SECTION else []
        entries.append((name, Given(found, origin, f"{origin}: {path}.{shown(name)}: ")))
    return entries


def _section(document: "yaml.Node | None", file_name: str) -> tuple[Any, Any]:
    """Find the section's key and value at any depth."""
    found: list[tuple[Any, Any]] = []
    keys: dict[str, int] = {}
    seen: set[int] = set()  # an alias is the node that it stands for: each is looked at once
    queue: deque[Any] = deque([document] if document is not None else [])
    while queue:
        node = queue.popleft()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.id == "sequence":
            queue.extend(node.value)
        for key, value in node.value if node.id == "mapping" else ():
            if key.value == SECTION:
                found.append((key, value))
            else:
                queue.append(value)
                keys.setdefault(str(key.value), key.start_mark.line + 1)
    if len(found) > 1:
        first, second = (key.start_mark.line + 1 for key, _ in found[:2])
        raise UsageError(f"{file_name}:{second}: a second {SECTION} section, after the one at line {first}")
    if not found:
        raise UsageError(f"{file_name}: no {SECTION} section{_similar_key(keys)}")
    return found[0]


def _similar_key(keys: dict[str, int]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(SECTION, keys, n=1, cutoff=0.75)
    return f"; is it {near[0]!r} at line {keys[near[0]]}?" if near else ""


def document(text: str, file_name: str) -> "yaml.Node | None":
    """Give the root of a YAML text, None for an empty one, with nothing built from it. Raises UsageError."""
    import yaml

    def at(line: int, column: int) -> str:
        return f"{file_name}:{line + 1}:{column + 1}"

    if strange := re.search(_NOT_YAML, text):
        before = text[: strange.start()].split("\n")
        raise UsageError(f"{at(len(before) - 1, len(before[-1]))}: not YAML: character {strange[0]!r}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml reads 1 MiB in 0.1 s, Python in 2
    try:
        # First without building anything: composing a file that is nested too deep ends the process.
        depth = aliases = 0
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            if refusal := _refusal(depth, aliases, getattr(event, "tag", None)):
                start: Any = event.start_mark
                raise UsageError(f"{at(start.line, start.column)}: {refusal}")
        return yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark
        problem = "a tab, where YAML wants spaces" if text.startswith("\t", mark.index) else error.problem
        raise UsageError(f"{at(mark.line, mark.column)}: not YAML: {problem}") from None


def _refusal(depth: int, aliases: int, tag: str | None) -> str | None:
    if depth > _MAX_DEPTH:
        return f"nested deeper than {_MAX_DEPTH} levels"
    if aliases > _MAX_ALIASES:
        return f"more than {_MAX_ALIASES} aliases (*name)"
    if tag is not None and not re.fullmatch(_PLAIN_TAG, tag):
        return f"tag {tag!r} is not allowed"
    return None
