"""Triton kernels for `attention.py`: flash attention over a paged KV pool, for prompts and for running requests.

Both walk the tiles of keys that a tile of queries sees (`attention_tile.walk`). The query heads that share a KV head
lie one behind the other in the rows of a tile (GQA packing), so that each key is read once for all of them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# A kernel's parameters have Triton's types.

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tile import LOWEST, blocks, products, walk

# --- how the tiles of a ragged batch fall to programs: plain arithmetic, which the tests run as Python ---


@triton.jit
def first_tile(length, queries, WINDOW: tl.constexpr, TOKENS: tl.constexpr):
    """The first tile of a sequence that any of its last `queries` tokens sees."""
    oldest = length - queries + 1 - WINDOW
    return oldest * (oldest > 0) // TOKENS if WINDOW else 0


@triton.jit
def share(total, program, programs):
    """Where a program's part of all `total` tiles begins; it ends where the next one's begins."""
    return total * program // programs


@triton.jit
def owner(total, tile, programs):
    """The program whose part has a tile: the last one that begins at or before it."""
    return ((tile + 1) * programs - 1) // total


# --- prompts ---


@triton.jit(do_not_specialize=["starts", "lengths", "tables", "table_starts", "sequences", "first_row"])
def prefill(
    query, elements, scales, out, starts, lengths, tables, table_starts, sequences, first_row, softmax_scale,
    query_stride, out_stride, element_block, element_value, element_head, scale_block, scale_value, scale_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    UNIFORM: tl.constexpr, PAIRS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """See `attention.prefill`. A program computes one tile of ROWS // GROUP rows of one sequence and KV head.

    Sequence i has the tiles from `(starts[i] - first_row) // QUERIES + i` on, which are always enough for it: so a
    program finds its sequence by binary search, and the host need know only how many rows and sequences there are.
    Late tiles, which see most, start first. UNIFORM: every tile of tokens goes through the same code.
    """
    DOT: tl.constexpr = products(query, PAIRS, WIDE)
    QUERIES: tl.constexpr = ROWS // GROUP
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(starts + middle) - first_row) // QUERIES + middle <= number:
            low = middle
        else:
            high = middle
    start = tl.load(starts + low)
    count = tl.load(starts + low + 1) - start
    begin = (number - (start - first_row) // QUERIES - low) * QUERIES  # the tile's first row, counted in the sequence
    if begin >= count:
        return

    head = tl.program_id(1)
    row = tl.arange(0, ROWS)
    chosen = begin + row // GROUP
    mine = (chosen < count) & (row < QUERIES * GROUP)
    dim = tl.arange(0, DIM)
    line = (start + chosen).to(tl.int64)
    inside = ((head * GROUP + row % GROUP) * DIM)[:, None] + dim[None, :]
    queries = tl.load(query + line[:, None] * query_stride + inside, mask=mine[:, None], other=0.0).to(DOT)
    odd_queries = 0
    if PAIRS:
        queries, odd_queries = tl.split(tl.reshape(queries, (ROWS, DIM // 2, 2)))

    length = tl.load(lengths + low)
    before = length - count + begin  # tokens before the tile's first row
    place = length - count + chosen
    stop = tl.minimum(before + QUERIES, length)
    table = tables + tl.load(table_starts + low)
    element_part = elements + head * element_head
    scale_part = scales + head * scale_head if PAIRS else scales
    oldest = tl.maximum(before + 1 - WINDOW, 0) if WINDOW else 0
    # Tiles [first, clean) and [soiled, last) hold tokens that some row of the tile does not see, those between none.
    first, last = oldest // TOKENS, tl.cdiv(stop, TOKENS)
    clean, soiled = last, last
    if not UNIFORM:
        soiled = (before + 1) // TOKENS
        clean = tl.minimum(tl.cdiv(tl.maximum(stop - WINDOW, 0), TOKENS), soiled) if WINDOW else 0

    top = tl.full((ROWS,), LOWEST, tl.float32)
    sum = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, DIM // 2 if PAIRS else DIM), tl.float32)
    odd_result = result if PAIRS else 0
    block = blocks(table, first, oldest, stop, BLOCK, TOKENS)
    if UNIFORM or WINDOW:
        top, sum, result, odd_result, block = walk(
            queries, odd_queries, top, sum, result, odd_result, first, clean, block, table, stop, oldest, place, 0, 0,
            element_part, scale_part, element_block, element_value, scale_block, scale_value, softmax_scale,
            BLOCK, DIM, TOKENS, WINDOW, False, True, PAIRS, DOT, STAGES,
        )  # fmt: skip
    if not UNIFORM:
        top, sum, result, odd_result, block = walk(
            queries, odd_queries, top, sum, result, odd_result, clean, soiled, block, table, stop, oldest, place, 0, 0,
            element_part, scale_part, element_block, element_value, scale_block, scale_value, softmax_scale,
            BLOCK, DIM, TOKENS, WINDOW, False, False, PAIRS, DOT, STAGES,
        )  # fmt: skip
        top, sum, result, odd_result, block = walk(
            queries, odd_queries, top, sum, result, odd_result, soiled, last, block, table, stop, oldest, place, 0, 0,
            element_part, scale_part, element_block, element_value, scale_block, scale_value, softmax_scale,
            BLOCK, DIM, TOKENS, WINDOW, False, True, PAIRS, DOT, STAGES,
        )  # fmt: skip
    if PAIRS:
        result = tl.reshape(tl.join(result, odd_result), (ROWS, DIM))
    result = result / tl.where(sum == 0, 1.0, sum)[:, None]
    tl.store(out + line[:, None] * out_stride + inside, result.to(out.dtype.element_ty), mask=mine[:, None])


# --- running requests ---


@triton.jit
def _count(lengths, sequence, batch, queries, WINDOW: tl.constexpr, TOKENS: tl.constexpr):
    """How many tiles sequences have; none where there is no such sequence."""
    length = tl.load(lengths + sequence, mask=sequence < batch, other=0)
    return tl.cdiv(length, TOKENS) - first_tile(length, queries, WINDOW, TOKENS)


@triton.jit(do_not_specialize=["lengths", "tables", "table_starts", "trees", "batch"])
def split(
    query, elements, scales, out, parts, logs, pieces, lengths, tables, table_starts, trees, batch, softmax_scale,
    query_stride, element_block, element_value, element_head, scale_block, scale_value, scale_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, TREE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    CHUNK: tl.constexpr, PAIRS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """See `attention.verify`. All tiles of all sequences, one after the other, are cut into one range for each program
    (axis 0) of a KV head (axis 1) and ROWS of its QUERIES × GROUP rows (axis 2).

    What a program computes of one sequence is a piece. A piece that is the whole sequence goes to `out`; another one to
    slot program + sequence of `parts` [slots, HEADS, QUERIES * GROUP, DIM], with the logarithm of its sum in `logs`.
    Programs and sequences both only go on, and never both stand still, so no two pieces have one slot. `pieces`
    [2, batch] tells `merge` where a sequence's pieces begin and how many they are.
    """
    DOT: tl.constexpr = products(query, PAIRS, WIDE)
    total = tl.zeros((), tl.int64)
    for at in range(0, batch, CHUNK):
        total += tl.sum(_count(lengths, at + tl.arange(0, CHUNK), batch, QUERIES, WINDOW, TOKENS), 0)
    programs = tl.minimum(tl.num_programs(0), total)
    program = tl.program_id(0)
    if program >= programs:
        return
    tile = share(total, program, programs)
    end = share(total, program + 1, programs)

    sequence, first, passed = 0, tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for at in range(0, batch, CHUNK):
        candidate = at + tl.arange(0, CHUNK)
        count = _count(lengths, candidate, batch, QUERIES, WINDOW, TOKENS)
        over = (passed + tl.cumsum(count, 0) <= tile) & (candidate < batch)
        sequence += tl.sum(over.to(tl.int32), 0)
        first += tl.sum(tl.where(over, count, 0), 0)
        passed += tl.sum(count, 0)

    head = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    chosen = row // GROUP
    mine = row < QUERIES * GROUP
    dim = tl.arange(0, DIM)
    inside = ((head * GROUP + row % GROUP) * DIM)[:, None] + dim[None, :]
    element_part = elements + head * element_head
    scale_part = scales + head * scale_head if PAIRS else scales
    while tile < end:
        length = tl.load(lengths + sequence)
        skipped = first_tile(length, QUERIES, WINDOW, TOKENS)
        last = first + tl.cdiv(length, TOKENS) - skipped
        stop = tl.minimum(end, last)
        line = (sequence * QUERIES + chosen).to(tl.int64)
        queries = tl.load(query + line[:, None] * query_stride + inside, mask=mine[:, None], other=0.0).to(DOT)
        odd_queries = 0
        if PAIRS:
            queries, odd_queries = tl.split(tl.reshape(queries, (ROWS, DIM // 2, 2)))
        root = length - QUERIES
        place = root + chosen
        bits = 0
        if TREE:
            bits = tl.load(trees + line, mask=mine, other=0)
            place = root + _ones(bits) - 1
        oldest = tl.maximum(root + 1 - WINDOW, 0) if WINDOW else 0
        table = tables + tl.load(table_starts + sequence)

        top = tl.full((ROWS,), LOWEST, tl.float32)
        sum = tl.zeros((ROWS,), tl.float32)
        result = tl.zeros((ROWS, DIM // 2 if PAIRS else DIM), tl.float32)
        odd_result = result if PAIRS else 0
        begin = (tile - first).to(tl.int32) + skipped
        behind = begin + (stop - tile).to(tl.int32)
        block = blocks(table, begin, oldest, length, BLOCK, TOKENS)
        top, sum, result, odd_result, block = walk(
            queries, odd_queries, top, sum, result, odd_result, begin, behind, block, table, length, oldest, place,
            root, bits, element_part, scale_part, element_block, element_value, scale_block, scale_value,
            softmax_scale, BLOCK, DIM, TOKENS, WINDOW, TREE, True, PAIRS, DOT, STAGES,
        )  # fmt: skip
        if PAIRS:
            result = tl.reshape(tl.join(result, odd_result), (ROWS, DIM))
        sum = tl.where(sum == 0, 1.0, sum)  # a row that sees nothing of this piece
        result = result / sum[:, None]
        if (tile == first) & (stop == last):
            to = line[:, None] * (HEADS * GROUP * DIM) + inside
            tl.store(out + to, result.to(out.dtype.element_ty), mask=mine[:, None])
        else:
            slot = ((program + sequence) * HEADS + head).to(tl.int64) * (QUERIES * GROUP) + row
            tl.store(parts + slot[:, None] * DIM + dim[None, :], result, mask=mine[:, None])
            tl.store(logs + slot, top * softmax_scale + tl.log2(sum), mask=mine)
        if tile == first:
            tl.store(pieces + sequence, program + sequence)
            tl.store(pieces + batch + sequence, (owner(total, last - 1, programs) - program + 1).to(tl.int32))
        tile = stop
        first = last
        sequence += 1


@triton.jit
def _ones(bits):
    """How many bits of an int64 are set, counted in pairs, fours and so on at once."""
    word = bits.to(tl.uint64, bitcast=True)
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((word * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit(do_not_specialize=["lengths", "batch"])
def merge(
    parts, logs, pieces, lengths, out, batch,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """What `split` left in pieces, for one sequence (axis 0), KV head (axis 1) and ROWS of its rows (axis 2): their
    weighted mean, by their sums' logarithms, in the order of the sequence. A sequence without tokens gets zeros."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(lengths + sequence)
    count = tl.load(pieces + batch + sequence)
    slot = tl.load(pieces + sequence)
    count = tl.where(length > 0, count, 0)
    if count == 1:
        return
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    mine = row < QUERIES * GROUP
    dim = tl.arange(0, DIM)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    sum = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, DIM), tl.float32)
    for at in range(0, count, PIECES):
        piece = at + tl.arange(0, PIECES)
        line = ((slot + piece) * HEADS + head).to(tl.int64)[:, None] * (QUERIES * GROUP) + row[None, :]
        there = (piece < count)[:, None] & mine[None, :]
        log = tl.load(logs + line, mask=there, other=LOWEST)
        part = tl.load(parts + line[:, :, None] * DIM + dim[None, None, :], mask=there[:, :, None], other=0.0)
        new_top = tl.maximum(top, tl.max(log, 0))
        base = tl.where(new_top == LOWEST, 0.0, new_top)
        weight = tl.exp2(log - base[None, :])
        shrink = tl.exp2(top - base)
        sum = sum * shrink + tl.sum(weight, 0)
        result = result * shrink[:, None] + tl.sum(part * weight[:, :, None], 0)
        top = new_top
    result = result / tl.where(sum == 0, 1.0, sum)[:, None]
    line = (sequence * QUERIES + row // GROUP).to(tl.int64) * (HEADS * GROUP) + head * GROUP + row % GROUP
    tl.store(out + line[:, None] * DIM + dim[None, :], result.to(out.dtype.element_ty), mask=mine[:, None])
