"""Our own types as JSON, and back: configurations on a child's standard input, the operators' API, what is saved.

Both ends are ours, so this is no guard against strangers: what people send is checked where it comes in. By cattrs,
which is all Python: a worker shall need nothing compiled that an image with torch and gRPC lacks.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from cattrs import BaseValidationError, transform_error
from cattrs.preconf.json import make_converter

from .errors import InvalidRequest

T = TypeVar("T")

_converter = make_converter()


def to_plain(value: object) -> Any:
    """The same in objects, lists, strings, numbers, booleans and None."""
    return _converter.unstructure(value)


def from_plain(value: object, kind: type[T]) -> T:
    """The other way; fields that `kind` does not have are passed over. Raises `InvalidRequest` that names each field
    that is wrong."""
    try:
        return _converter.structure(value, kind)
    except (BaseValidationError, ValueError, TypeError, KeyError) as error:
        raise InvalidRequest("; ".join(transform_error(error))) from error


def to_json(value: object) -> bytes:
    """One line of JSON, without its end."""
    return json.dumps(to_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def from_json(data: bytes, kind: type[T]) -> T:
    """See `from_plain`. Raises `InvalidRequest` where it is no JSON, too."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InvalidRequest(f"not JSON: {error}") from error
    return from_plain(value, kind)
