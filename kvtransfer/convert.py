"""KV rows from one type to another, for `HostStore`: apart from it, because this needs torch and a copy does not."""

from __future__ import annotations

import torch

from ..kernels.convert import convert_rows
from .host_store import Bytes


def convert(rows: Bytes, source: str, target: str, tokens: int, head_dim: int) -> Bytes:
    """See `host_store.Convert`."""
    converted: Bytes = convert_rows(torch.from_numpy(rows), source, target, tokens, head_dim).numpy()
    return converted
