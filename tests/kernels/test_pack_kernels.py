"""The packing kernels, bit for bit, and what Triton makes of them for a Hopper GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.hopper import DEVICE, compile_for_hopper
from tests.kernels.segments import Places, memory, read, scattered, unsigned, xxh3

pytest.importorskip("triton")
from baton.kernels import pack_kernels

PIECES = 5


def launch(
    source: torch.Tensor, places: tuple[Places, ...], target: torch.Tensor | None, size: int, checked: bool,
    programs: int,
) -> list[int]:  # fmt: skip
    """The kernels on memories of the host, wherever they run."""
    at = torch.from_numpy(np.stack(places)).to(DEVICE)
    there = None if target is None else target.to(DEVICE)
    sums = pack_kernels.launch(source.to(DEVICE), at, there, *places[0].shape, size, checked, programs)
    if target is not None and there is not None:
        target.copy_(there)
    return unsigned(sums)


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
    sums = launch(source, (here, there), target, size, checked, 2)
    assert read(target, there, size) == read(source, here, size)
    assert all(torch.equal(target[at : at + size], before[at : at + size]) for at in untouched)
    assert sums == (xxh3(read(source, here, size)) if checked else [0] * PIECES)


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_any_number_of_programs_does_all_of_it(programs: int) -> None:
    pieces, size, room = 70, 1024, 150
    source, target = memory(room * size), memory(room * size, seed=1)
    here, there = (scattered(pieces, 2, size, room, seed) for seed in (2, 3))
    sums = launch(source, (here, there), target, size, True, programs)
    assert read(target, there, size) == read(source, here, size)
    assert sums == xxh3(read(source, here, size))


def test_sums_without_a_copy() -> None:
    source, here = memory(20 * 320), scattered(6, 2, 320, 20)
    before = source.clone()
    sums = launch(source, (here,), None, 320, True, 4)
    assert torch.equal(source, before)
    assert sums == xxh3(read(source, here, 320))


def test_every_access_to_the_bytes_takes_sixteen_of_them() -> None:
    """What else is loaded are places and constants."""
    pointers = dict.fromkeys(("source", "source_at", "target", "target_at", "constants", "parts"), "*i64")
    numbers = dict.fromkeys(("pieces", "segments", "stripes", "blocks"), "i32")
    constants = {"COPY": True, "CHECK": True, "BLOCKS": pack_kernels._BLOCKS_OF_A_PROGRAM}
    built = compile_for_hopper("pack_kernels", "_move", pointers | numbers, constants, num_warps=pack_kernels._WARPS)
    tile = pack_kernels._BLOCKS_OF_A_PROGRAM * 16 * 64  # bytes: blocks of a program, stripes of a block
    each = tile // (32 * pack_kernels._WARPS) // 16
    assert built.accesses("st").count(16) == each
    assert built.accesses("ld").count(16) >= each
    assert built.spilled == 0
