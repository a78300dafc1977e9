"""The packing kernels in Triton's interpreter, bit for bit: run by `test_pack.py` in a process of its own, because
Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baton.kernels.pack_kernels import launch
from tests.kernels.segments import memory, read, scattered, unsigned, xxh3

PIECES = 5


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(
    ("segments", "stripes"), [(1, 4), (1, 5), (2, 2), (2, 8), (1, 16), (1, 17), (2, 16), (2, 17), (3, 11), (2, 40)]
)
def test_copies_and_sums(segments: int, stripes: int, checked: bool) -> None:
    """Pieces of less than a block of 16 stripes, of whole ones, of one more, of blocks that span two segments."""
    size, room = stripes * 64, PIECES * segments + 3
    source, target = memory(room * size), memory(room * size, seed=1)
    here, there = (scattered(PIECES, segments, size, room, seed) for seed in (2, 3))
    untouched = set(range(0, room * size, size)) - {int(at) for at in there.flat}
    before = target.clone()
    sums = launch(source, torch.from_numpy(np.stack((here, there))), target, PIECES, segments, size, checked, 2)
    assert read(target, there, size) == read(source, here, size)
    assert all(torch.equal(target[at : at + size], before[at : at + size]) for at in untouched)
    assert unsigned(sums) == (xxh3(read(source, here, size)) if checked else [0] * PIECES)


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_any_number_of_programs_does_all_of_it(programs: int) -> None:
    pieces, size, room = 70, 1024, 150
    source, target = memory(room * size), memory(room * size, seed=1)
    here, there = (scattered(pieces, 2, size, room, seed) for seed in (2, 3))
    sums = launch(source, torch.from_numpy(np.stack((here, there))), target, pieces, 2, size, True, programs)
    assert read(target, there, size) == read(source, here, size)
    assert unsigned(sums) == xxh3(read(source, here, size))


def test_sums_without_a_copy() -> None:
    source, here = memory(20 * 320), scattered(6, 2, 320, 20)
    before = source.clone()
    sums = launch(source, torch.from_numpy(here[None]), None, 6, 2, 320, True, 4)
    assert torch.equal(source, before)
    assert unsigned(sums) == xxh3(read(source, here, 320))
