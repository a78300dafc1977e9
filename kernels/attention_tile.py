"""One step of attention, of which the kernels in `attention_kernels.py` are made: a tile of queries meets one of keys.

The softmax is computed as tiles come (Dao et al., FlashAttention, 2022), with base-2 exponentials. Keys and values
come through the block table: each token of a tile finds its block by itself, so a tile may be made of any number of
blocks; a block of 16 tokens of one head is one run of memory, 4 KiB in bfloat16 with 128 values a head.

Elements of eight bits go into the products as they are: a key's scale multiplies its scores, a value's scale its
probabilities, one multiplication for each row and token instead of one for each value of a token. They are read in
pairs, because what brings a tile from shared memory to the matrix units moves sixteen bits; a pair's elements belong to
neighbouring dimensions, so even and odd ones make products of their own.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# A kernel's parameters have Triton's types.

from __future__ import annotations

import triton
import triton.language as tl

INT8, FLOAT8 = tl.constexpr(1), tl.constexpr(2)
"""PAIRS, the kind of elements of eight bits that a pool keeps; 0: it keeps others."""

LOWEST = tl.constexpr(float("-inf"))
_PRECISION = tl.constexpr("tf32x3")
"""Of float32 products: three of 11 bits, which is nearly all of its 24. Others are not affected."""


@triton.constexpr_function
def products(query, PAIRS, WIDE):
    """The type that products are made in: the queries', or float32. float16 has no room for a probability times the
    scale of a value."""
    if WIDE:
        return tl.float32
    return tl.bfloat16 if PAIRS else query.dtype.element_ty


_FROM_INT8 = tl.constexpr("""{ .reg .b32 a, b, high, base;
    mov.b32 base, 0x43004300;
    shr.u32 high, $2, 8;
    lop3.b32 a, $2, 0x007f007f, base, 0xea;
    lop3.b32 b, $2, 0x00800080, base, 0xea;
    sub.rn.bf16x2 $0, a, b;
    lop3.b32 a, high, 0x007f007f, base, 0xea;
    lop3.b32 b, high, 0x00800080, base, 0xea;
    sub.rn.bf16x2 $1, a, b; }""")
_FROM_FLOAT8 = tl.constexpr("""{ .reg .b32 a, b, factor;
    mov.b32 factor, 0x7b807b80;
    shl.b32 a, $2, 8;
    shl.b32 b, $2, 4;
    and.b32 b, b, 0x07f007f0;
    lop3.b32 a, a, 0x80008000, b, 0xea;
    mul.rn.bf16x2 $0, a, factor;
    shr.u32 b, $2, 4;
    and.b32 b, b, 0x07f007f0;
    lop3.b32 a, $2, 0x80008000, b, 0xea;
    mul.rn.bf16x2 $1, a, factor; }""")
"""lop3 with table 0xea: (first & second) | third."""


@triton.jit
def _unpair(pair, PAIRS: tl.constexpr, DOT: tl.constexpr):
    """Two elements of eight bits, which lie in one of sixteen, as two numbers.

    In bfloat16, two pairs at once. An int8 is 7 bits less 128 times its sign: both, put under the exponent of 128, are
    numbers from 128 on, whose difference is exact. A float8_e4m3 shifted to bfloat16's place has an exponent that is
    2**120 too small.
    """
    if DOT.is_bf16():
        FORM: tl.constexpr = _FROM_INT8 if PAIRS == INT8 else _FROM_FLOAT8
        return tl.inline_asm_elementwise(FORM, "=r,=r,r", [pair], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)
    wide = pair.to(tl.int32)
    if PAIRS == INT8:
        return (wide << 24 >> 24).to(DOT), (wide >> 8).to(DOT)
    low = (wide << 24 & -0x80000000) | (wide << 20 & 0x07F00000)
    high = (wide << 16 & -0x80000000) | (wide << 12 & 0x07F00000)
    return (low.to(tl.float32, bitcast=True) * 2.0**120).to(DOT), (high.to(tl.float32, bitcast=True) * 2.0**120).to(DOT)


@triton.jit
def blocks(table, tile, oldest, length, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """The block of each token of a tile."""
    token = tile * TOKENS + tl.arange(0, TOKENS)
    return tl.load(table + token // BLOCK, mask=(token >= oldest) & (token < length), other=0)


@triton.jit
def _attend(
    query, odd_query, top, sum, result, odd_result, tile, block, length, oldest, place, root, bits,
    elements, scales, element_block, element_value, scale_block, scale_value, softmax_scale,
    BLOCK: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr,
    MASKED: tl.constexpr, PAIRS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One step of the softmax, over tile number `tile`: the rows' maxima `top` [R] (of scores before they are scaled),
    `sum` [R] and `result` [R, DIM] go on. Over a pool of pairs, queries and result are apart in even and odd elements.

    `elements` and `scales` point to the KV head's part of block 0, `block` says which blocks the tile's tokens are in.
    Row r stands at `place[r]` and sees what is not after it and, with a window, not too far before. With a tree it sees
    of the tokens from `root` on those whose bit is set. Nothing before `oldest` or from `length` on is read: it may be
    another sequence's, or not finite. A tile that is not MASKED lies between these, and every row sees all of it.
    """
    token = tile * TOKENS + tl.arange(0, TOKENS)
    there = (token >= oldest) & (token < length) if MASKED else tl.full((TOKENS,), True, tl.int1)
    block = block.to(tl.int64)
    WIDTH: tl.constexpr = DIM // 2 if PAIRS else DIM
    at = (block * element_block + token % BLOCK * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    key = tl.load(elements + at, mask=there[:, None], other=0)
    if PAIRS:
        even, odd = _unpair(key, PAIRS, DOT)
        score = tl.dot(query, tl.trans(even), input_precision=_PRECISION)
        score = tl.dot(odd_query, tl.trans(odd), score, input_precision=_PRECISION)
        scale_at = (block * scale_block + token % BLOCK)[:, None] + tl.arange(0, 2)[None, :] * scale_value
        key_scale, value_scale = tl.split(tl.load(scales + scale_at, mask=there[:, None], other=0.0))
        score *= key_scale[None, :]
    else:
        score = tl.dot(query, tl.trans(key.to(DOT)), input_precision=_PRECISION)
    if MASKED:
        seen = token[None, :] <= place[:, None]
        if WINDOW:
            seen &= token[None, :] > place[:, None] - WINDOW
        if TREE:
            ahead = token - root
            bit = (bits[:, None] >> tl.minimum(tl.maximum(ahead, 0), 63)[None, :].to(tl.int64)) & 1
            seen = tl.where(ahead[None, :] < 0, seen, bit != 0)
        score = tl.where(seen & there[None, :], score, LOWEST)
    new_top = tl.maximum(top, tl.max(score, 1))
    base = tl.where(new_top == LOWEST, 0.0, new_top)  # a row that has seen nothing yet
    probability = tl.exp2(score * softmax_scale - (base * softmax_scale)[:, None])
    # The difference first: a row that sees nothing of this tile must shrink by 1 exactly. Of two products, one of which
    # becomes part of a fused multiply-add, the difference is not 0, and bits would depend on who shares a row's tile.
    shrink = tl.exp2((top - base) * softmax_scale)
    sum = sum * shrink + tl.sum(probability, 1)
    value = tl.load(elements + element_value + at, mask=there[:, None], other=0)
    result *= shrink[:, None]
    if PAIRS:
        probability *= value_scale[None, :]
        even, odd = _unpair(value, PAIRS, DOT)
        result = tl.dot(probability.to(DOT), even, result, input_precision=_PRECISION)
        odd_result = tl.dot(probability.to(DOT), odd, odd_result * shrink[:, None], input_precision=_PRECISION)
    else:
        result = tl.dot(probability.to(DOT), value.to(DOT), result, input_precision=_PRECISION)
    return new_top, sum, result, odd_result


@triton.jit
def walk(
    query, odd_query, top, sum, result, odd_result, begin, end, block, table, length, oldest, place, root, bits,
    elements, scales, element_block, element_value, scale_block, scale_value, softmax_scale,
    BLOCK: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr,
    MASKED: tl.constexpr, PAIRS: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_attend` over the tiles [begin, end). `block` are the blocks of the first one, and in what is returned those of
    tile `end`: each tile's are read one tile before, so that no copy of keys and values waits for the block table."""
    for tile in tl.range(begin, end, num_stages=STAGES):
        following = blocks(table, tile + 1, oldest, length, BLOCK, TOKENS)
        top, sum, result, odd_result = _attend(
            query, odd_query, top, sum, result, odd_result, tile, block, length, oldest, place, root, bits,
            elements, scales, element_block, element_value, scale_block, scale_value, softmax_scale,
            BLOCK, DIM, TOKENS, WINDOW, TREE, MASKED, PAIRS, DOT,
        )  # fmt: skip
        block = following
    return top, sum, result, odd_result, block
