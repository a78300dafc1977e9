"""Triton kernels for `pack.py`.

XXH3-64 (see `move.c`) takes in stripes of 64 bytes, and scrambles its eight sums after each block of 16 stripes. What
the stripes of one block add to the sums does not depend on what came before: so the kernel that touches the bytes adds
up all blocks at once, anywhere on the device, and a second, small one goes through each piece's blocks in their order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# A kernel's parameters have Triton's types.

from __future__ import annotations

import functools
import struct

import torch
import triton
import triton.language as tl

_BLOCK = 16  # stripes
_BLOCKS_OF_A_PROGRAM = 32
_PIECES_OF_A_PROGRAM = 4
_WARPS = 16

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_P32_1, _P32_2, _P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_P64_1, _P64_2, _P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P64_4, _P64_5, _P_MIX = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5, 0x165667919E3779F9

# Where in the table of constants its parts begin; all are words of 64 bits.
_FOR_SCRAMBLE = tl.constexpr(16)
_FOR_LAST = tl.constexpr(24)
_FOR_RESULT = tl.constexpr(32)
_FIRST = tl.constexpr(40)
_PRIMES = tl.constexpr(48)


def launch(
    source: torch.Tensor, places: torch.Tensor, target: torch.Tensor | None, pieces: int, segments: int, size: int,
    checked: bool, programs: int,
) -> torch.Tensor:  # fmt: skip
    """See `pack.Launch`. `places` [2 or, without a target, 1, pieces, segments] int64, in bytes."""
    device = places.device
    stripes = size // 64
    blocks = -(-segments * stripes // _BLOCK)
    constants = _constants(device)
    parts = torch.empty(pieces * blocks * 8 if checked else 0, dtype=torch.int64, device=device)
    grid = (min(programs, -(-pieces * blocks // _BLOCKS_OF_A_PROGRAM)),)
    words = source.view(torch.int64)
    _move[grid](
        words, places[0], words if target is None else target.view(torch.int64), places[-1], constants, parts,
        pieces, segments, stripes, blocks, target is not None, checked, _BLOCKS_OF_A_PROGRAM, num_warps=_WARPS,
    )  # fmt: skip
    sums = (torch.empty if checked else torch.zeros)(pieces, dtype=torch.int64, device=device)
    if checked:
        grid = (-(-pieces // _PIECES_OF_A_PROGRAM),)
        _finish[grid](parts, constants, sums, pieces, blocks, segments * size, _PIECES_OF_A_PROGRAM, num_warps=1)
    return sums


@functools.cache
def _constants(device: torch.device) -> torch.Tensor:
    """XXH3's secret from its places for stripes, scrambling, the last stripe and the result; the sums' first values;
    two factors."""
    first = (_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1)
    words = _SECRET + _SECRET[121:185] + _SECRET[11:75] + struct.pack("<10Q", *first, _P64_1, _P_MIX)
    return torch.frombuffer(bytearray(words), dtype=torch.int64).to(device)


@triton.jit(do_not_specialize=["pieces", "segments", "stripes", "blocks"])
def _move(
    source, source_at, target, target_at, constants, parts, pieces, segments, stripes, blocks,
    COPY: tl.constexpr, CHECK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Copy, and what each block of stripes adds to the eight sums: parts [pieces, blocks, 8]."""
    lane = tl.arange(0, 8)
    row = tl.arange(0, 16)
    key = tl.load(constants + row[:, None] + lane[None, :])[None]
    last_key = tl.load(constants + _FOR_LAST + lane)[None, None]
    for first in range(tl.program_id(0) * BLOCKS, pieces * blocks, tl.num_programs(0) * BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        stripe = (block % blocks)[:, None] * 16 + row[None, :]  # of its piece
        there = (block < pieces * blocks)[:, None] & (stripe < segments * stripes)
        segment = (block // blocks)[:, None] * segments + stripe // stripes
        inside = (stripe % stripes) * 8
        begin = tl.load(source_at + segment, mask=there, other=0) // 8 + inside
        at = tl.multiple_of(begin[:, :, None] + lane[None, None, :], (1, 1, 2))
        data = tl.load(source + at, mask=there[:, :, None], other=0)
        if COPY:
            begin = tl.load(target_at + segment, mask=there, other=0) // 8 + inside
            at = tl.multiple_of(begin[:, :, None] + lane[None, None, :], (1, 1, 2))
            tl.store(target + at, data, mask=there[:, :, None])
        if CHECK:
            is_last = stripe == segments * stripes - 1
            mixed = (data ^ tl.where(is_last[:, :, None], last_key, key)).to(tl.uint64, bitcast=True)
            product = tl.where(there[:, :, None], (mixed & 0xFFFFFFFF) * (mixed >> 32), 0)
            products = tl.sum(product.to(tl.int64, bitcast=True), 1)
            even, odd = tl.split(tl.reshape(tl.sum(data, 1), (BLOCKS, 4, 2)))
            part = products + tl.reshape(tl.join(odd, even), (BLOCKS, 8))  # each lane takes in its neighbour's data
            to = parts + block.to(tl.int64)[:, None] * 8 + lane[None, :]
            tl.store(to, part, mask=(block < pieces * blocks)[:, None])


@triton.jit(do_not_specialize=["pieces", "blocks", "length"])
def _finish(parts, constants, sums, pieces, blocks, length, PIECES: tl.constexpr):
    """From what blocks add to the sums of a piece, to its checksum."""
    lane = tl.arange(0, 8)
    piece = tl.program_id(0) * PIECES + tl.arange(0, PIECES)
    there = piece < pieces
    factor = tl.load(constants + _FIRST + 7).to(tl.uint64, bitcast=True)
    scramble = tl.load(constants + _FOR_SCRAMBLE + lane)[None].to(tl.uint64, bitcast=True)
    sum = tl.zeros((PIECES, 8), tl.uint64) + tl.load(constants + _FIRST + lane)[None].to(tl.uint64, bitcast=True)
    at = parts + piece.to(tl.int64)[:, None] * blocks * 8 + lane[None, :]
    for block in tl.range(0, blocks - 1, loop_unroll_factor=8):
        sum += tl.load(at + block * 8, mask=there[:, None], other=0).to(tl.uint64, bitcast=True)
        sum = (sum ^ (sum >> 47) ^ scramble) * factor
    sum += tl.load(at + (blocks - 1) * 8, mask=there[:, None], other=0).to(tl.uint64, bitcast=True)
    sum = sum ^ tl.load(constants + _FOR_RESULT + lane)[None].to(tl.uint64, bitcast=True)
    even, odd = tl.split(tl.reshape(sum, (PIECES, 4, 2)))
    folded = tl.sum(((even * odd) ^ tl.umulhi(even, odd)).to(tl.int64, bitcast=True), 1).to(tl.uint64, bitcast=True)
    result = folded + length.to(tl.uint64) * tl.load(constants + _PRIMES).to(tl.uint64, bitcast=True)
    result = (result ^ (result >> 37)) * tl.load(constants + _PRIMES + 1).to(tl.uint64, bitcast=True)
    result = result ^ (result >> 32)
    tl.store(sums + piece, result.to(tl.int64, bitcast=True), mask=there)
