"""Copying segments of device memory: plain torch against XXH3 itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baton.kernels import pack
from tests.kernels.segments import memory, read, scattered, unsigned, xxh3


@pytest.mark.parametrize(("segments", "size"), [(2, 512), (1, 256), (2, 2560), (3, 100), (2, 7), (1, 1)])
def test_torch_copies_and_sums(segments: int, size: int) -> None:
    room = 5 * segments + 3
    source, target = memory(room * size), memory(room * size, seed=1)
    here, there = (scattered(5, segments, size, room, seed) for seed in (2, 3))
    sums = pack.copy(source, here, target, there, size)
    assert read(target, there, size) == read(source, here, size)
    assert unsigned(sums) == unsigned(pack.checksums(source, here, size)) == xxh3(read(source, here, size))


def test_places_need_not_be_multiples_of_the_size() -> None:
    """Some heads of a block: their rows begin where those of others end."""
    source, target = memory(4096), torch.zeros(4096, dtype=torch.uint8)
    here, there = np.array([[64, 320], [1024 + 64, 3968]]), np.array([[0, 128], [256, 3900]])
    sums = pack.copy(source, here, target, there, 128)
    assert read(target, there, 128) == read(source, here, 128)
    assert unsigned(sums) == xxh3(read(source, here, 128))


def test_unchecked_sums_are_zero() -> None:
    source, at = memory(1024), np.array([[0, 512]])
    assert unsigned(pack.copy(source, at, torch.zeros_like(source), at, 256, checked=False)) == [0]


@pytest.mark.parametrize("at", [-1, -64, 1024 - 63, 1024, 1 << 62])
def test_a_segment_outside_of_its_memory_is_refused_and_nothing_copied(at: int) -> None:
    source, target = memory(1024), torch.zeros(1024, dtype=torch.uint8)
    good, bad = np.array([[0], [64]]), np.array([[0], [at]])
    for places in ((good, bad), (bad, good)):
        with pytest.raises(IndexError):
            pack.copy(source, places[0], target, places[1], 64)
    with pytest.raises(IndexError):
        pack.checksums(source, bad, 64)
    assert not target.any()


def test_what_does_not_fit_together_is_refused() -> None:
    source, at = memory(1024), np.array([[0, 512]])
    for arguments in (
        (source, at, source, at[:, :1], 64),
        (source, at.astype(np.int32), source, at.astype(np.int32), 64),
        (source.view(torch.int64), at, source, at, 64),
        (source[::2], at, source, at, 64),
    ):
        with pytest.raises(ValueError):
            pack.copy(*arguments)
