"""The configurations that attention is tried in. What each came to stands in the result file, whichever is in use."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from triton.runtime.errors import OutOfResources

from ...kernels.attention import Config
from ..ceilings import Ceilings
from .attention import decode, prefill
from .cases import Case, Measured, measure
from .shapes import Shape

SPLITS = tuple(
    Config(rows=32, values=values, warps=warps, stages=stages, resident=resident)
    for values, warps, stages, resident in (
        *itertools.product((4096, 8192, 16384), (4,), (2, 3, 4, 5), (1, 2)),
        (4096, 4, 3, 4), (4096, 4, 4, 4), (4096, 4, 5, 3), (8192, 4, 3, 3), (8192, 2, 4, 2), (8192, 8, 4, 1),
    )
)  # fmt: skip
PREFILLS = tuple(
    Config(rows=rows, values=values, warps=warps, stages=stages)
    for rows, values, warps, stages in (
        (128, 8192, 8, 2), (128, 8192, 8, 3), (128, 8192, 8, 4), (128, 16384, 8, 2), (128, 16384, 8, 3),
        (64, 8192, 4, 3), (64, 16384, 4, 2), (128, 8192, 4, 2),
    )
)  # fmt: skip
"""`compiled.py` tells what each takes: half as many warps for a tile of 128 rows, of which one is left here, spill
hundreds of bytes a thread."""
SHARED_MEMORY = 227 << 10
"""Of one Hopper multiprocessor."""
COMPILERS = 8
"""Processes that compile before anything is timed, one configuration after the other."""


def attention_sweep(shape: Shape, device: torch.device, ceilings: Ceilings) -> Iterator[Measured]:
    """Decode at the shape's middle batch and context, prefill at its first, in each configuration that fits."""
    batch, context = shape.decodes[len(shape.decodes) // 2]
    splits = [config for config in SPLITS if fits(config)]
    if device.type == "cuda":
        _compile(shape, [(config, True) for config in splits] + [(config, False) for config in PREFILLS])
    for config in splits:
        case = decode(shape, device, [context] * batch, f"batch {batch}, context {context}", config)
        yield _measure(device, case, ceilings, config)
    for config in PREFILLS:
        yield _measure(device, prefill(shape, device, *shape.prefills[0], config), ceilings, config)


def fits(config: Config) -> bool:
    """Whether the tiles of K and V that are on their way fit a multiprocessor, with all programs that shall share it:
    two bytes a value, and all stages but the one that is computed with."""
    return 4 * config.values * (config.stages - 1) * config.resident <= SHARED_MEMORY


def _measure(device: torch.device, case: Case, ceilings: Ceilings, config: Config) -> Measured:
    """NaN where the device has not what the configuration takes."""
    try:
        return measure(device, case, ceilings, str(config))
    except OutOfResources as error:
        nan = float("nan")
        return Measured(case.kernel, case.shape, nan, "bytes", nan, nan, nan, None, f"{config}: {error}")


def _compile(shape: Shape, wanted: list[tuple[Config, bool]]) -> None:
    """Into Triton's cache, from which this process then takes them."""
    workers = min(COMPILERS, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_run_once, [shape] * len(wanted), *zip(*wanted, strict=True)))


def _run_once(shape: Shape, config: Config, decodes: bool) -> None:
    """On little. What the device has not enough for is told where it is timed."""
    device = torch.device("cuda")
    case = decode(shape, device, [64], "", config) if decodes else prefill(shape, device, 64, 0, config)
    with contextlib.suppress(OutOfResources):
        case.calls[0]()
