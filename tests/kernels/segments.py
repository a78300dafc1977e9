"""Made-up memories and places of segments in them."""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

Places = NDArray[np.int64]


def memory(size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def scattered(pieces: int, segments: int, size: int, room: int, seed: int = 0) -> Places:
    """Places of segments that do not overlap, in no order, in a memory with room for `room` of them."""
    order = np.random.default_rng(seed).permutation(room)[: pieces * segments]
    return (order * size).reshape(pieces, segments).astype(np.int64)


def read(memory: torch.Tensor, places: Places, size: int) -> list[bytes]:
    """The pieces at these places."""
    data = memory.numpy()
    return [b"".join(data[at : at + size].tobytes() for at in piece) for piece in places]


def xxh3(pieces: list[bytes]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(piece) for piece in pieces]


def unsigned(sums: torch.Tensor) -> list[int]:
    return [int(x) for x in sums.cpu().numpy().view(np.uint64)]
