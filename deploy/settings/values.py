"""One setting: from what was written to a value of its field's type, within its range."""

from __future__ import annotations

import re
from typing import Any

from ...common.errors import InvalidRequest
from ...common.types import Role
from .schema import CHOICES, KNOWN, NAME, SHARES, ZERO_ALLOWED, Setting, rule_path, siblings

RESERVED = ("controller", "gateway")
"""Names of other processes."""


def checked(setting: Setting) -> Any:
    """The value that was meant. Raises `InvalidRequest` beginning with the setting's origin."""
    try:
        return _check(setting.path, setting.value)
    except InvalidRequest as error:
        raise InvalidRequest(f"{setting.origin}: {error.message}", param=setting.path) from error
    except OverflowError as error:
        raise InvalidRequest(f"{setting.origin}: the number is too large", param=setting.path) from error


def _check(path: str, written: Any) -> Any:
    rule = rule_path(path)
    if path.startswith("pools."):
        _check_name("a pool", path.split(".")[1])
    if rule not in KNOWN:
        raise InvalidRequest(f"no such field here; known: {', '.join(siblings(path))}")
    value = _convert(rule, written)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_range(rule, value)
    if rule == "name":
        _check_name("a cluster", value)
    if value not in CHOICES.get(rule, (value,)):
        raise InvalidRequest(f"{value!r} is not one of {', '.join(CHOICES[rule])}")
    return Role(value) if rule == "pool.role" else value


def _check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} is no name for {what}: small letters, digits and '-', a letter first, 40 at most"
        )
    if name in RESERVED:
        raise InvalidRequest(f"{name!r} is no name for {what}: another process is called so")


def _check_range(rule: str, value: float) -> None:
    zero = rule in ZERO_ALLOWED
    if not value >= 0 or (value == 0 and not zero):  # a NaN is not >= 0
        raise InvalidRequest(f"{value} is out of range: it must be {'0 or more' if zero else 'above 0'}")
    if value == float("inf"):
        raise InvalidRequest("it must be a number that has an end")
    if rule.endswith("port") and value > 65535:
        raise InvalidRequest(f"{value} is not a port (0 to 65535)")
    if rule in SHARES and value > 1:
        raise InvalidRequest(f"{value} is out of range: it is a share, at most 1")


def _convert(rule: str, value: Any) -> Any:
    kind = KNOWN[rule]
    if type(value) is bool and "on" in CHOICES.get(rule, ()):
        return "on" if value else "off"  # as YAML reads these words
    if kind is int and rule.endswith(("_memory", "_bytes")):
        return parse_size(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, bool, str, Role):
        kind = str if kind is Role else kind
        if type(value) is not kind:
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            raise InvalidRequest(f"{value!r} is not {names[kind]}")
        return value
    return _amounts(value) if rule == "resources.custom" else _texts(value)


def _texts(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not (isinstance(words, (list, tuple)) and all(isinstance(w, str) and w for w in words)):
        raise InvalidRequest("it must be a text, or a list of texts, none empty")
    return tuple(words)


def _amounts(value: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, dict):
        raise InvalidRequest("it must be names with amounts, as in {fast_disk: 1}")
    for name, amount in value.items():
        if not (isinstance(name, str) and name and type(amount) in (int, float) and 0 < amount < float("inf")):
            raise InvalidRequest(f"{name}: {amount!r} is not a resource with an amount above 0")
    return tuple((name, float(amount)) for name, amount in value.items())


_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def parse_size(value: Any) -> int:
    """Bytes of `2GiB`, `512M`, `1.5g` (powers of 1024 all) or of a plain number. Raises `InvalidRequest`."""
    if type(value) is int:
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:ib?|b)?", str(value).strip().lower())
    if match is None:
        raise InvalidRequest(f"{value!r} is not a size: write 512MiB, 2GiB, or a number of bytes")
    return int(float(match[1]) * 2 ** _UNITS[match[2]])
