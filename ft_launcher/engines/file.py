"""Reads engines.yaml: which engines there are, how they are watched, and who else is told.

Everything is read as text, as in the launcher's own file: what is wrong is one line with file, line and key.
"""

import shlex
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import msgspec
from msgspec import Struct

from ft_launcher.config_file import document, read_config_file
from ft_launcher.config_kinds import Grace, shown
from ft_launcher.engines.config import EngineConfig, out_of_range
from ft_launcher.engines.presets import Preset, preset
from ft_launcher.engines.probes import ProbeFunction
from ft_launcher.engines.routers import SglangRouter, VllmRouter
from ft_launcher.engines.spec import EngineSpec
from ft_launcher.errors import UsageError

__all__ = ["ServiceSettings", "read_engines_file"]

_SECONDS = Grace.__metadata__[0]  # type: ignore[attr-defined]  # Annotated has it
_ROUTERS: dict[str, Callable[[str], SglangRouter | VllmRouter]] = {"sglang": SglangRouter, "vllm": VllmRouter}


class ServiceSettings(Struct, frozen=True, kw_only=True):
    """What a file says."""

    path: str
    """Of the file; absolute."""
    config: EngineConfig
    engines: tuple[EngineSpec, ...]
    probes: dict[str, ProbeFunction]
    routers: dict[str, SglangRouter | VllmRouter]
    refresh: tuple[str, ...] = ()
    """A command that gives an engine its weights; (): a trainer does it (EngineClient.refreshing)."""
    log_dir: Path | None = None
    metrics_port: int | None = None


class _Text(Struct, frozen=True):
    """A key and what stands behind it. `node` is never of a class that could be built from a file's tag."""

    place: str
    node: Any

    def refused(self, wanted: str) -> UsageError:
        """The error for a value that is not what it must be."""
        given = shown(str(self.node.value)) if self.node.id == "scalar" else f"a {self.node.id}"
        return UsageError(f"{self.place}: {given}: must be {wanted}")

    def scalar(self, wanted: str) -> str:
        """Give its text."""
        if self.node.id != "scalar":
            raise self.refused(wanted)
        return str(self.node.value).strip()


def read_engines_file(path: str | Path) -> ServiceSettings:
    """Read it. Raises UsageError, one line, for whatever is wrong with it."""
    text = read_config_file(path) or ""
    file = shown(str(path), at_most=4096)
    root: Any = document(text, file)
    if root is None or root.id != "mapping":
        raise UsageError(f"{file}:1: must be a mapping, with a list of engines under the key engines")
    top = _entries(root, file, "", {*_CONFIG, *_COMMON, *_TOP})
    if "engines" not in top:
        raise UsageError(f"{file}: engines: missing; it must be a list of engines")
    config: dict[str, Any] = {name: _number(name, top[name]) for name in _CONFIG if name in top}
    common = {name: top[name] for name in _COMMON if name in top}
    listed = top["engines"]
    if listed.node.id != "sequence" or not listed.node.value:
        raise listed.refused("a list of engines")
    specs: dict[str, EngineSpec] = {}
    probes: dict[str, ProbeFunction] = {}
    routers: dict[str, SglangRouter | VllmRouter] = {}
    by_url: dict[tuple[str, str], SglangRouter | VllmRouter] = {}
    for number, node in enumerate(listed.node.value):
        place = f"{file}:{node.start_mark.line + 1}: engines[{number}]"
        if node.id != "mapping":
            raise _Text(place, node).refused("a mapping with a name and a command or a url")
        own = _entries(node, file, f"engines[{number}].", {*_ENGINE, *_COMMON})
        spec = _spec(place, own, common)
        if spec.name in specs:
            raise UsageError(f"{own['name'].place}: {shown(spec.name)}: a second engine of this name")
        specs[spec.name] = spec
        settings = common | own
        probes[spec.name] = _probe(settings)
        if "router" in settings:
            key = _router(settings)
            routers[spec.name] = by_url.setdefault(key, _ROUTERS[key[0]](key[1]))
    found = {name: _TOP[name](top[name]) for name in _TOP if name in top and name != "engines"}
    return ServiceSettings(
        path=str(Path(path).absolute()),
        config=EngineConfig(**config),
        engines=tuple(specs.values()),
        probes=probes,
        routers=routers,
        **found,
    )


def _entries(mapping: Any, file: str, prefix: str, known: set[str]) -> dict[str, _Text]:
    found: dict[str, _Text] = {}
    for key, value in mapping.value:
        place = f"{file}:{key.start_mark.line + 1}: {prefix}"
        name = str(key.value) if key.id == "scalar" else f"a {key.id} as a key"
        if name not in known:
            near = get_close_matches(name.lower().replace("-", "_"), sorted(known), n=1, cutoff=0.7)
            advice = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{place}{shown(name)}: no such key{advice}")
        if name in found:
            raise UsageError(f"{place}{name}: given twice")
        found[name] = _Text(place + name, value)
    return found


def _spec(place: str, own: dict[str, _Text], common: dict[str, _Text]) -> EngineSpec:
    if "name" not in own:
        raise UsageError(f"{place}: name: missing")
    # Somebody else's engine has no use for how ours are started.
    started = {name: common[name] for name in _STARTED if name in common and "url" not in own}
    values: dict[str, Any] = {}
    for name, text in (started | own).items():
        if name in _ENGINE or name in _STARTED:
            values[name] = (_ENGINE | _STARTED)[name](text)
    spec = EngineSpec(**values)
    try:
        spec.check()
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None
    return spec


def _probe(settings: dict[str, _Text]) -> ProbeFunction:
    kind = _one_of(settings["preset"], get_args(Preset)) if "preset" in settings else "http"
    model = _line(settings["model"]) if "model" in settings else ""
    path = "/health"
    if "health_path" in settings:
        path = _line(settings["health_path"])
        if kind != "http" or not path.startswith("/"):
            raise settings["health_path"].refused("a path such as /health, and only with preset http")
    return preset(kind, model=model, path=path)  # type: ignore[arg-type]  # one of its words


def _router(settings: dict[str, _Text]) -> tuple[str, str]:
    url = _url(settings["router"])
    text = settings.get("router_kind", settings.get("preset"))
    kind = text.scalar("a word") if text is not None else ""
    if kind not in _ROUTERS:
        place = settings.get("router_kind", settings["router"])
        raise UsageError(f"{place.place}: router_kind must be {' or '.join(_ROUTERS)}")
    return kind, url.rstrip("/")


def _number(name: str, text: _Text) -> float:
    is_whole = isinstance(getattr(EngineConfig(), name), int)
    value: Any = None
    with suppress(ValueError, KeyError):
        written = text.scalar("a number")
        is_plain = is_whole or name == "mass_failure_fraction"
        value = (int if is_whole else float)(written) if is_plain else _SECONDS.read(written)
    problem = "a number" if value is None else out_of_range(name, value)
    if value is None:
        problem = out_of_range(name, -1) or problem
    if problem:
        durations = " (90, 90s, 5m, 1h)" if "seconds" in problem else ""
        raise text.refused(problem + durations)
    number: float = value
    return number


def _line(text: _Text) -> str:
    value = text.scalar("a text")
    if not value or not value.isprintable():
        raise text.refused("a text on one line")
    return value


def _url(text: _Text) -> str:
    value = _line(text)
    if not value.startswith(("http://", "https://")):
        raise text.refused("a URL that begins with http:// or https://")
    return value


def _port(text: _Text) -> int:
    value = text.scalar("a port")
    if not (value.isascii() and value.isdigit() and int(value) < 65536):
        raise text.refused("a port from 0 to 65535")
    return int(value)


def _command(text: _Text) -> tuple[str, ...]:
    wanted = "a command: a text, or a list of texts"
    if text.node.id == "scalar":
        try:
            words = shlex.split(str(text.node.value))
        except ValueError as error:
            raise UsageError(f"{text.place}: {shown(str(text.node.value))}: {str(error).lower()}") from None
    elif text.node.id == "sequence" and all(each.id == "scalar" for each in text.node.value):
        words = [str(each.value) for each in text.node.value]
    else:
        raise text.refused(wanted)
    if not words or any("\0" in word for word in words):
        raise text.refused(wanted)
    return tuple(words)


def _environment(text: _Text) -> dict[str, str]:
    if text.node.id != "mapping":
        raise text.refused("a mapping of names to texts")
    found = {}
    for key, value in text.node.value:
        if key.id != "scalar" or value.id != "scalar" or not key.value or "=" in key.value:
            raise _Text(text.place, key).refused("names and texts only")
        found[str(key.value)] = str(value.value)
    return found


def _one_of(text: _Text, words: tuple[str, ...]) -> str:
    value = text.scalar(" or ".join(words))
    if value not in words:
        near = get_close_matches(value.lower(), words, n=1)
        raise text.refused(" or ".join(words) + (f"; did you mean {near[0]}?" if near else ""))
    return value


_Reader = Callable[[_Text], Any]
_CONFIG = tuple(field.name for field in msgspec.structs.fields(EngineConfig))
_STARTED: dict[str, _Reader] = {"command": _command, "env": _environment, "cwd": _line, "host": _line}
_ENGINE: dict[str, _Reader] = {"name": _line, "url": _url, "port": _port}
_COMMON = (*_STARTED, "preset", "model", "health_path", "router", "router_kind")
"""Keys of an engine that may also stand at the top, for all that do not say otherwise."""
_TOP: dict[str, _Reader] = {
    "engines": lambda text: text,
    "refresh": _command,
    "log_dir": lambda text: Path(_line(text)),
    "metrics_port": _port,
}
