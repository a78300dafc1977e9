"""Which implementation of the operations a worker uses."""

from __future__ import annotations

import torch

from .native import NativeOps, load_library, supports
from .ops import Ops
from .reference import TorchOps


def select_ops(
    device: torch.device, dtype: torch.dtype, queries: int, keys: int, head_dim: int, block_size: int
) -> Ops:
    """By rule, not by measurement, so that all workers of one kind compute the same numbers: compiled C for float32
    on a CPU where there is a compiler and the shape fits, torch otherwise."""
    if device.type == "cpu" and dtype == torch.float32 and supports(queries, keys, head_dim, block_size):
        library = load_library()
        if library is not None:
            return NativeOps(library, torch.get_num_threads())
    return TorchOps()
