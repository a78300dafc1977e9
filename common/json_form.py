"""Our own types as JSON, and back: configurations on a child's standard input, the operators' API, what is saved.

Both ends are ours, so this is no guard against strangers: what people send is checked where it comes in. By cattrs,
which is all Python: a worker shall need nothing compiled that an image with torch and gRPC lacks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from typing import Any, TypeVar

from cattrs import BaseValidationError, transform_error
from cattrs.gen import make_dict_structure_fn
from cattrs.preconf.json import make_converter

from .errors import InvalidRequest

T = TypeVar("T")

_converter = make_converter()


def _exactly(plain: type, value: object, kind: Callable[[object], object]) -> object:
    """`kind` is `plain`, or an enumeration of such. By itself, cattrs makes True of "false", and "None" of None."""
    if not isinstance(value, plain) or isinstance(value, bool) is not (plain is bool):
        raise ValueError(value)
    return kind(value)


def _number(value: object, _: type) -> float:
    if type(value) not in (int, float):
        raise ValueError(value)
    return float(value)  # type: ignore[arg-type]


@_converter.register_structure_hook_factory(is_dataclass)
def _from_object(kind: type[T]) -> Callable[[object, type[T]], T]:
    """By itself, cattrs finds no field in a list either, and takes the defaults of all."""
    fill = make_dict_structure_fn(kind, _converter)

    def structure(value: object, _: type[T]) -> T:
        if not isinstance(value, dict):
            raise ValueError(value)
        return fill(value, kind)

    return structure


for _kind in (int, str, bool):
    _converter.register_structure_hook(_kind, partial(_exactly, _kind))
_converter.register_structure_hook(float, _number)


def to_plain(value: object) -> Any:
    """The same in objects, lists, strings, numbers, booleans and None."""
    return _converter.unstructure(value)


def from_plain(value: object, kind: type[T]) -> T:
    """The other way; fields that `kind` does not have are passed over, and no value passes for one of another type,
    but a whole number for any. Raises `InvalidRequest` that names each field that is wrong."""
    try:
        return _converter.structure(value, kind)
    except (BaseValidationError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidRequest("; ".join(transform_error(error))) from error


def to_json(value: object) -> bytes:
    """One line of JSON, without its end."""
    return json.dumps(to_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def from_json(data: bytes, kind: type[T]) -> T:
    """See `from_plain`. Raises `InvalidRequest` where it is no JSON, too."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not JSON: {error}") from error
    return from_plain(value, kind)
