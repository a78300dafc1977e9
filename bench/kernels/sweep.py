"""The configurations that attention is tried in. What each came to stands in the result file, whichever is in use."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ...kernels.attention import Config
from .attention import decode, prefill
from .cases import Case
from .shapes import Shape

SPLITS = tuple(
    Config(rows=rows, values=values, warps=warps, stages=stages, resident=resident)
    for rows, values, warps, stages, resident in (
        *itertools.product((32,), (4096, 8192, 16384), (4,), (2, 3, 4, 5), (1, 2)),
        (32, 8192, 8, 4, 2), (32, 4096, 4, 4, 4), (32, 8192, 2, 4, 2),
    )
)  # fmt: skip
PREFILLS = tuple(
    Config(rows=rows, values=values, warps=warps, stages=stages)
    for rows, values, warps, stages in (
        *itertools.product((128,), (8192, 16384), (4, 8), (2, 3)),
        (64, 8192, 4, 3), (64, 16384, 4, 2), (128, 8192, 8, 4),
    )
)  # fmt: skip
SHARED_MEMORY = 227 << 10
"""Of one Hopper multiprocessor."""


def attention_sweep(shape: Shape, device: torch.device) -> Iterator[tuple[str, Case]]:
    """Decode at the shape's middle batch and context, prefill at its first, in each configuration that fits."""
    batch, context = shape.decodes[len(shape.decodes) // 2]
    for config in SPLITS:
        if fits(config):
            name = f"batch {batch}, context {context}"
            yield str(config), decode(shape, device, [context] * batch, name, config)
    for config in PREFILLS:
        yield str(config), prefill(shape, device, *shape.prefills[0], config)


def fits(config: Config) -> bool:
    """Whether the tiles of K and V that are on their way fit a multiprocessor, with all programs that shall share it:
    two bytes a value, and all stages but the one that is computed with."""
    return 4 * config.values * (config.stages - 1) * config.resident <= SHARED_MEMORY
