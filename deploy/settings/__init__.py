"""What `baton serve` is told, from a YAML file, the environment and flags, checked in one place.

    sources.py   a file, the environment: where settings come from
    values.py    one setting: its type, its range, its choices
    resolve.py   all of them, laid over the defaults, later ones winning: one `ServeConfig`
    schema.py    what may be set

Each source becomes `Setting`s: a dotted path, a value, and where it was written. What is wrong is an `InvalidRequest`
in one line that begins with the flag, the variable, or the file, line and field.
"""

from .resolve import resolve
from .schema import KNOWN, PoolConfig, ServeConfig, Setting
from .sources import from_environment, from_text, from_yaml
from .values import checked, parse_size

__all__ = [
    "KNOWN",
    "PoolConfig",
    "ServeConfig",
    "Setting",
    "checked",
    "from_environment",
    "from_text",
    "from_yaml",
    "parse_size",
    "resolve",
]
