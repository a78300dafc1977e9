"""Triton's interpreter cuts off digits where a GPU rounds to the nearest number: here torch rounds for it."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch


def faithful_conversions() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.float32: (torch.float32, torch.int32),
        tl.bfloat16: (torch.bfloat16, torch.int16),
        tl.float16: (torch.float16, torch.int16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.int8),
    }

    def convert(data: np.ndarray[Any, Any], source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray[Any, Any]:
        (kind, bits), (new_kind, new_bits) = types[source], types[target]
        values = torch.frombuffer(bytearray(data.tobytes()), dtype=bits).view(kind)
        return values.to(new_kind).view(new_bits).numpy().reshape(data.shape)

    interpreter._convert_float = convert


if importlib.util.find_spec("triton"):
    faithful_conversions()
