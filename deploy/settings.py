"""What `baton serve` is told, from a YAML file and from flags, checked in one place.

Both sources become `Setting`s: a dotted path, a value, and where it was written. `resolve` lays them over the
defaults, later ones winning, and names the flag or the file, line and field of the first that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ..common.config import TRANSPORTS, EngineConfig, GatewayConfig, HandoverConfig, RouterConfig, WorkerConfig
from ..common.errors import InvalidRequest
from ..common.kv_format import ITEM_BYTES
from ..common.types import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """One cluster on this machine. The sections hold the values that all processes of a kind share; what differs
    between processes (names, ports, secrets) is filled in by `cluster.py`."""

    model: str = "demo"
    model_name: str = ""
    """Name that clients ask for; empty: derived from `model`."""
    prefill: int = 1
    decode: int = 1
    colocated: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    api_keys: tuple[str, ...] = ()
    threads: int = 0
    """CPU threads of all workers together; 0: one for each core."""
    log_dir: str = ""
    """Folder for one log file a process; empty: all logs go to standard error."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(model=""))
    prefill_engine: EngineConfig = field(default_factory=lambda: EngineConfig(model=""))
    """As `engine`, but for what is set here: the engine of prefill workers."""
    decode_engine: EngineConfig = field(default_factory=lambda: EngineConfig(model=""))
    """The same for decode workers."""
    handover: HandoverConfig = field(default_factory=HandoverConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    worker: WorkerConfig = field(
        default_factory=lambda: WorkerConfig(name="", role=Role.COLOCATED, engine=EngineConfig(model=""))
    )
    gateway: GatewayConfig = field(default_factory=lambda: GatewayConfig(model="", model_name=""))


@dataclass(frozen=True, slots=True)
class Setting:
    """One value and where it came from: `--port`, or `baton.yaml:3: port`."""

    path: str
    value: Any
    origin: str


_ENGINE = (EngineConfig, frozenset({"model", "threads"}))

SECTIONS: dict[str, tuple[type, frozenset[str]]] = {
    "engine": _ENGINE,
    "prefill_engine": _ENGINE,
    "decode_engine": _ENGINE,
    "handover": (HandoverConfig, frozenset()),
    "router": (RouterConfig, frozenset()),
    "worker": (
        WorkerConfig,
        frozenset(
            {
                *("name", "role", "engine", "handover", "model_name", "port"),
                *("controller", "cluster_token"),
            }
        ),
    ),
    "gateway": (
        GatewayConfig,
        frozenset(
            {
                *("model", "model_name", "host", "port", "api_keys", "controller", "cluster_token"),
                *("router", "block_size", "max_model_len"),
            }
        ),
    ),
}
"""Section, its type, and the fields of it that are not a user's to set there."""

OVERLAYS = {"prefill_engine": "engine", "decode_engine": "engine"}
"""Sections whose fields are another section's where they are not set."""

ZERO_ALLOWED = {
    *("prefill", "decode", "colocated", "port", "threads"),
    *("engine.max_model_len", "handover.headroom_tokens", "gateway.drain_s", "worker.drain_s"),
}
CHOICES = {
    "handover.transport": ("auto", *TRANSPORTS),
    "engine.dtype": ("auto", "float32", "bfloat16", "float16"),
    "engine.kv_dtype": ("auto", *ITEM_BYTES),
}


def _known() -> dict[str, Any]:
    """Dotted path of every field that may be set, with its type."""
    known = {name: kind for name, kind in get_type_hints(ServeConfig).items() if name not in SECTIONS}
    for section, (kind, managed) in SECTIONS.items():
        hints = get_type_hints(kind)
        known |= {f"{section}.{f.name}": hints[f.name] for f in fields(kind) if f.name not in managed}
    return known


KNOWN = _known()


def resolve(settings: Iterable[Setting]) -> ServeConfig:
    """Raises `InvalidRequest` in one line that begins with the origin of the wrong value."""
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for setting in settings:
        section, _, name = setting.path.rpartition(".")
        target = sections[section] if section else top
        target[name] = _checked(setting)
    for section, base in OVERLAYS.items():
        sections[section] = sections[base] | sections[section]
    if top.get("colocated"):  # asked for instead of the default pair, not beside it
        top = {"prefill": 0, "decode": 0} | top
    default = ServeConfig()
    config = replace(default, **top, **{s: replace(getattr(default, s), **v) for s, v in sections.items()})
    if not (config.prefill or config.colocated):
        raise InvalidRequest("no worker would prefill: set prefill or colocated to 1 or more")
    if not (config.decode or config.colocated):
        raise InvalidRequest("no worker would decode: set decode or colocated to 1 or more")
    return config


def _checked(setting: Setting) -> Any:
    try:
        value = _convert(setting.path, setting.value)
        if not isinstance(value, (bool, str, tuple)):
            _check_range(setting.path, value)
    except InvalidRequest as error:
        raise InvalidRequest(f"{setting.origin}: {error.message}", param=setting.path) from error
    choices = CHOICES.get(_rule(setting.path), (value,))
    if value not in choices:
        raise InvalidRequest(f"{setting.origin}: {value!r} is not one of {', '.join(choices)}")
    return value


def _rule(path: str) -> str:
    """The path under which `ZERO_ALLOWED` and `CHOICES` know this one."""
    section, dot, name = path.rpartition(".")
    return OVERLAYS.get(section, section) + dot + name


def _check_range(path: str, value: float) -> None:
    zero = _rule(path) in ZERO_ALLOWED
    if not value >= 0 or (value == 0 and not zero):  # a NaN is not >= 0
        raise InvalidRequest(f"{value} is out of range: it must be {'0 or more' if zero else 'above 0'}")
    if path == "port" and value > 65535:
        raise InvalidRequest(f"{value} is not a port (0 to 65535)")


def _convert(path: str, value: Any) -> Any:
    if path not in KNOWN:
        raise InvalidRequest(_unknown(path))
    kind = KNOWN[path]
    if kind is int and path.endswith(("_memory", "_bytes")):
        return parse_size(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int or kind is float or kind is bool or kind is str:
        if type(value) is not kind:
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            raise InvalidRequest(f"{value!r} is not {names[kind]}")
        return value
    words = [value] if isinstance(value, str) else value
    if not (isinstance(words, (list, tuple)) and all(isinstance(w, str) and w for w in words)):
        raise InvalidRequest("it must be a text, or a list of texts, none empty")
    return tuple(words)


def _unknown(path: str) -> str:
    section, _, _ = path.rpartition(".")
    known = [p.rpartition(".")[2] for p in KNOWN if p.rpartition(".")[0] == section]
    return f"no such field here; known: {', '.join(sorted(known if section else [*known, *SECTIONS]))}"


_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def parse_size(value: Any) -> int:
    """Bytes of `2GiB`, `512M`, `1.5g` (powers of 1024 all) or of a plain number. Raises `InvalidRequest`."""
    if type(value) is int:
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:ib?|b)?", str(value).strip().lower())
    if match is None:
        raise InvalidRequest(f"{value!r} is not a size: write 512MiB, 2GiB, or a number of bytes")
    return int(float(match[1]) * 2 ** _UNITS[match[2]])


def from_yaml(path: Path) -> list[Setting]:
    """The settings of a YAML file. Raises `InvalidRequest` with file and line where it is not a mapping of fields."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        return [] if root is None else list(_walk(path, "", root))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidRequest(f"{path}:{line}: not YAML: {error.problem}") from error


def _walk(file: Path, prefix: str, node: yaml.Node) -> Iterator[Setting]:
    if not isinstance(node, yaml.MappingNode):
        raise InvalidRequest(f"{file}:{node.start_mark.line + 1}: {prefix.rstrip('.') or 'the file'} must hold fields")
    seen: set[str] = set()
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise InvalidRequest(f"{file}:{line}: {prefix}{name}: given twice")
        seen.add(name)
        if not prefix and name in SECTIONS:
            yield from _walk(file, f"{name}.", value)
        else:
            origin = f"{file}:{line}: {prefix}{name}"
            try:
                plain = yaml.constructor.SafeConstructor().construct_object(value, deep=True)
            except ValueError as error:  # such as a date in a month that does not exist
                raise InvalidRequest(f"{origin}: {error}") from error
            yield Setting(f"{prefix}{name}", plain, origin)
