"""Rows of KV from one type to another, on their way out of a pool: where the target keeps less, less travels."""

from __future__ import annotations

import itertools

import torch

from .quantised import LARGEST, TYPES, dequantise, quantise, split_rows

_SERIAL = 32_767
"""Elements at a time on a CPU: torch computes so few in the calling thread, and of more each thread that asks would
start a team of its own beside the engine's."""


def convert_rows(rows: torch.Tensor, source: str, target: str, tokens: int, head_dim: int) -> torch.Tensor:
    """rows [N, row bytes] uint8 of type `source` → [N, row bytes] uint8 of type `target`, keys of `TYPES`; a row holds
    `tokens` tokens (`common/kv_format.py`), here and there.

    What comes out is, bit for bit, what a pool of type `target` stores of the values that the rows stand for. Where
    the types are equal it is `rows` itself. May be called from any thread.
    """
    if source == target:
        return rows
    kept, wanted = TYPES[source], TYPES[target]
    scale_bytes = torch.float32.itemsize if wanted in LARGEST else 0
    out = rows.new_empty(len(rows), tokens * (head_dim * wanted.itemsize + scale_bytes))
    elements, scales = split_rows(rows, kept, head_dim)
    new_elements, new_scales = split_rows(out, wanted, head_dim)
    for part in _parts(len(rows), tokens, head_dim, _SERIAL if rows.device.type == "cpu" else max(1, elements.numel())):
        values = elements[part] if scales is None else dequantise(elements[part], scales[part])
        if new_scales is None:
            new_elements[part] = values.to(wanted)
        else:
            new_elements[part], new_scales[part] = quantise(values, wanted)
    return out


def _parts(rows: int, tokens: int, head_dim: int, limit: int) -> list[tuple[slice, slice]]:
    """Cut [rows, tokens] into rectangles of up to `limit` elements (of one token at least), whole rows if possible."""
    width = max(1, min(tokens, limit // head_dim))
    height = max(1, limit // (width * head_dim))
    return [
        (slice(row, row + height), slice(token, token + width))
        for row, token in itertools.product(range(0, rows, height), range(0, tokens, width))
    ]
