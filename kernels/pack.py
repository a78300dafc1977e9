"""Copying segments of device memory, and summing them with XXH3-64 on the way: `move.py` for an accelerator.

Packing pieces of a paged pool into a buffer, unpacking them, and fetching them out of a peer's pool are one operation:
copy segments from places to places. On CUDA it is two Triton kernels (`pack_kernels.py`); anywhere else, and where a
shape does not suit them, it is plain torch, which also is what the kernels are tested against.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import numpy as np
import torch

from . import move
from .move import Grid, Offsets, Places

log = logging.getLogger(__name__)

PROGRAMS = 16
"""Programs of the kernel that touches the bytes, each on a multiprocessor of its own at most: the rest of the device
goes on computing. A guess until `bench/gpu_kvtransfer.py` has measured how many a link or a copy needs."""

_STRIPE = 64
_LONG_PIECE = 240
_WORD = 8
_ALIGNED = 16
"""Bytes of one load: what the kernels need places to be multiples of."""

Launch = Callable[..., torch.Tensor]
"""(source, places [2, pieces, segments], target, pieces, segments of each, bytes of a segment, checked, programs)
→ checksums [pieces]"""


def copy(
    source: torch.Tensor, source_at: Offsets, target: torch.Tensor, target_at: Offsets, size: int, *,
    checked: bool = True, programs: int = PROGRAMS,
) -> torch.Tensor:  # fmt: skip
    """Copy each piece's segments of `size` bytes between flat uint8 tensors and return [pieces] checksums as int64 on
    the target's device, zeros where `checked` is not asked for. Runs on that device's current stream and is not waited
    for; the source may lie on another one that it reaches.

    The checksums are those of the bytes as they were stored, even if somebody writes to the source meanwhile. Source
    and target must not overlap. Raises `IndexError`, with nothing copied, where a segment does not lie in its memory,
    and `ValueError` where the arguments do not fit together.
    """
    if source_at.shape != target_at.shape:
        raise ValueError(f"segments from places {source_at.shape} to places {target_at.shape}")
    _within(source, source_at, size)
    _within(target, target_at, size)
    if source.device.type == "cuda" and _suits(source, source_at, size) and _suits(target, target_at, size):
        launch = _kernels()
        if launch is not None:
            places = torch.from_numpy(np.stack((source_at, target_at))).to(target.device)
            return launch(source, places, target, *source_at.shape, size, checked, programs)
    data = _gather(source, source_at, size).to(target.device)
    rows, index = _rows(target, target_at, size)
    rows.index_copy_(0, index, data.view(-1, rows.shape[1]))
    return _sums(data) if checked else torch.zeros(len(data), dtype=torch.int64, device=data.device)


def checksums(source: torch.Tensor, source_at: Offsets, size: int, *, programs: int = PROGRAMS) -> torch.Tensor:
    """[pieces] checksums, as `copy` would return them. Raises as it does."""
    _within(source, source_at, size)
    if source.device.type == "cuda" and _suits(source, source_at, size):
        launch = _kernels()
        if launch is not None:
            places = torch.from_numpy(source_at[None]).to(source.device)
            return launch(source, places, None, *source_at.shape, size, True, programs)
    return _sums(_gather(source, source_at, size))


def compiled() -> bool:
    """Whether the kernels can be had here; a line in the log says why not."""
    return _kernels() is not None


def _within(memory: torch.Tensor, places: Offsets, size: int) -> None:
    if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
        raise ValueError(f"a memory is contiguous bytes, not {memory.dtype} {tuple(memory.shape)}")
    if places.dtype != np.int64 or places.ndim != 2 or size < 0:
        raise ValueError(f"segments are int64 [pieces, segments], not {places.dtype} {places.shape}, of size {size}")
    if places.size and not 0 <= int(places.min()) <= int(places.max()) <= memory.numel() - size:
        raise IndexError(
            f"segments of {size} bytes from {places.min()} to {places.max()} in a memory of {memory.numel()} bytes"
        )


def _suits(memory: torch.Tensor, places: Offsets, size: int) -> bool:
    """Whether the kernels can do it: whole stripes, summed as XXH3 sums what is long, aligned."""
    if places.size == 0 or size % _STRIPE or places.shape[1] * size <= _LONG_PIECE or memory.numel() % _WORD:
        return False
    return (memory.data_ptr() | int(np.bitwise_or.reduce(places, axis=None))) % _ALIGNED == 0


@functools.cache
def _kernels() -> Launch | None:
    """The kernels, tried once; None, with a line in the log, where they cannot be compiled."""
    try:
        from .pack_kernels import launch

        some = torch.zeros(256, dtype=torch.uint8, device="cuda")
        launch(some, torch.zeros(1, 1, 1, dtype=torch.int64, device="cuda"), None, 1, 1, 256, True, 1)
    except (ImportError, OSError, RuntimeError) as error:  # no Triton, no C compiler, a device it does not know
        log.warning("the packing kernels are not available, plain torch is used: %s", error)
        return None
    return launch


# --- in plain torch ---


def _rows(memory: torch.Tensor, places: Offsets, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`memory` as rows [rows, bytes] as long as they can be if each segment is to be a run of whole rows, and which
    rows [segments × rows of a segment] the segments are."""
    unit = int(np.gcd.reduce(places, axis=None, initial=size)) or 1
    index = places.reshape(-1, 1) // unit + np.arange(size // unit)
    rows = memory[: memory.numel() // unit * unit].view(-1, unit)
    return rows, torch.from_numpy(index.reshape(-1)).to(memory.device)


def _gather(memory: torch.Tensor, places: Offsets, size: int) -> torch.Tensor:
    """[pieces, segments × size]: a copy."""
    rows, index = _rows(memory, places, size)
    return rows.index_select(0, index).view(len(places), places.shape[1] * size)


def _sums(data: torch.Tensor) -> torch.Tensor:
    """Of rows [pieces, bytes], by the processor."""
    rows = Grid(0, data.shape[1], 0, 1, len(data))
    every = Places(rows, np.arange(len(data), dtype=np.int64))
    sums = move.checksums(data.reshape(-1).cpu().numpy(), every, data.shape[1])
    return torch.from_numpy(sums.view(np.int64)).to(data.device)
