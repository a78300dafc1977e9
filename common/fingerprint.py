"""Fingerprint of everything that must agree before one worker may continue another's computation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

Fact = str | int | float | bool | None


def fingerprint(facts: Mapping[str, Fact]) -> str:
    """Short hex name of a set of named facts; any changed, added or missing fact gives another name.

    The order of the facts does not matter. 16 hex digits: it guards against mistakes, not against an adversary.
    """
    text = json.dumps(dict(facts), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
