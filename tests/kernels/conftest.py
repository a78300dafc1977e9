"""Triton's interpreter, for these tests. It cuts off digits where a GPU rounds to the nearest number: here torch rounds
for it. And it need not make itself ready again for each function that a kernel calls."""

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


def patched_once() -> None:
    """The interpreter replaces what `triton.language` holds for the time of a call, by looking through all of it. In a
    kernel that has happened: a function that it calls finds nothing to replace, and leaves nothing to restore."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_lang(function: Any) -> Any:
        seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if all(lang.static_print is print for lang in seen):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_lang


if importlib.util.find_spec("triton"):
    faithful_conversions()
    patched_once()
