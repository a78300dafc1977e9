"""Where settings come from, besides flags: a YAML file, and the environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ...common.errors import InvalidRequest
from .schema import KNOWN, POOL_SECTIONS, TOP_SECTIONS, Setting, rule_path, siblings

PREFIX = "BATON_"


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
    """`prefix`: the path of `node`, with a dot behind it."""
    where = prefix.rstrip(".")
    if not isinstance(node, yaml.MappingNode) or (where.startswith("pools.") and not node.value):
        raise InvalidRequest(f"{file}:{node.start_mark.line + 1}: {where or 'the file'} must hold fields")
    seen: set[str] = set()
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        path = prefix + name
        origin = f"{file}:{line}: {path}"
        if name in seen:
            raise InvalidRequest(f"{origin}: given twice")
        seen.add(name)
        if _holds_fields(path):
            yield from _walk(file, f"{path}.", value)
        else:
            yield Setting(path, _plain(value, origin), origin)


def _holds_fields(path: str) -> bool:
    match path.split("."):
        case [name]:
            return name == "pools" or name in TOP_SECTIONS
        case ["pools", _]:
            return True
        case ["pools", _, name]:
            return name in POOL_SECTIONS
    return False


def _plain(node: yaml.Node, origin: str) -> Any:
    try:
        return yaml.constructor.SafeConstructor().construct_object(node, deep=True)
    except ValueError as error:  # such as a date in a month that does not exist
        raise InvalidRequest(f"{origin}: {error}") from error


def from_environment(environ: Mapping[str, str]) -> list[Setting]:
    """The settings that variables make: `BATON_PORT` is `port`, `BATON_ENGINE__KV_MEMORY` is `engine.kv_memory`,
    `BATON_POOLS__LONG_PROMPTS__COUNT` is `pools.long-prompts.count`.

    A variable without `__` counts only where it is a field, since others have other meanings (`BATON_HOME`). Raises
    `InvalidRequest` naming the variable."""
    found = []
    for variable in sorted(environ):
        parts = variable.removeprefix(PREFIX).lower().split("__")
        if not variable.startswith(PREFIX) or (len(parts) == 1 and parts[0] not in KNOWN):
            continue
        if parts[0] == "pools" and len(parts) > 1:
            parts[1] = parts[1].replace("_", "-")
        path = ".".join(parts)
        if rule_path(path) not in KNOWN:
            raise InvalidRequest(f"{variable}: no such field; known there: {', '.join(siblings(path))}")
        found.append(from_text(path, environ[variable], variable))
    return found


def from_text(path: str, text: str, origin: str) -> Setting:
    """A setting written outside of a file: where the field is a text, it stays as it is; elsewhere YAML reads it.
    Raises `InvalidRequest`."""
    if KNOWN.get(rule_path(path)) is str:
        return Setting(path, text, origin)
    try:
        return Setting(path, yaml.safe_load(text), origin)
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidRequest(f"{origin}: {text!r} is not a value") from error
