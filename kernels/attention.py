"""Attention over the paged KV pool, on an accelerator: prompts, running requests, and drafts of several tokens.

    prefill    many rows of a sequence at once                 compute-bound: M = rows × query heads of a KV head
    decode     one row of each sequence                        memory-bound: each key and value is read once
    verify     a few rows of each, the last of its tokens      decode's kernel; decode is its case of one row

`reference.py` computes the same in plain torch and is what the tests compare with. All three read a pool of any type
in `quantised.TYPES`, and convert in registers. Nothing is read on the host and no shape depends on lengths, so decode
and verify can be captured in a CUDA graph, and prefill makes nobody wait.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton

from . import attention_kernels as kernels
from .attention_tile import FLOAT8, INT8
from .ops import Heads, Rows
from .quantised import LARGEST, split_rows


@dataclass(frozen=True, slots=True)
class Config:
    """How a kernel cuts its work.

    rows         of a tile of queries: sequence rows × query heads of a KV head
    values       of a tile of keys in two bytes or less each: half as many where pool or queries have four
    stages       of the pipeline: one tile of keys and values is computed with, the others are on their way
    resident     programs that shall share a multiprocessor, where the grid is ours to choose
    """

    rows: int
    values: int
    warps: int
    stages: int
    resident: int = 1

    def tokens(self, dim: int, item_bytes: int) -> int:
        """Of a tile: no fewer than a matrix unit takes. `item_bytes`: the larger of the pool's and the queries'."""
        return min(max(2 * self.values // (dim * item_bytes), 16), 128)


PREFILL = Config(rows=128, values=8192, warps=8, stages=3)
UNIFORM = Config(rows=64, values=8192, warps=4, stages=3)
SPLIT = Config(rows=32, values=8192, warps=4, stages=3, resident=2)
SPLIT_WIDE = Config(rows=64, values=8192, warps=8, stages=3)
"""Chosen by reasoning, for a Hopper multiprocessor, which has 228 KiB of shared memory and gets about 25 bytes a
nanosecond: with a latency of 1 µs it must have 25 KiB on their way, and more while a program goes to its next sequence.
No more stages than three: a fourth would cost registers, and spill with pools of eight bits.

PREFILL      two groups of four warps share each tile of keys; a larger one would not leave a thread's 255 registers
             enough for the scores and what is being fetched
UNIFORM      for `deterministic`: the fewest rows that a matrix unit takes from shared memory, because most tiles of a
             decode batch hold one row
SPLIT        16 or 32 rows; two programs a multiprocessor, each with two tiles of 32 KiB (bfloat16) on their way
SPLIT_WIDE   more rows than that take the registers of both programs for one
"""

_CHUNK = 256
_MERGED_ROWS = 4
_MERGED_PIECES = 8
_INTERPRETED = not isinstance(kernels.split, triton.runtime.JITFunction)


def supports(heads: Heads, dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
    """Whether the kernels take heads of this shape, with queries of `dtype` and a pool of `kv_dtype`: a power of two of
    dimensions, as `tl.arange` wants it, of which a product takes 16, from a pool of pairs every other one; which leaves
    room in shared memory; and a group of query heads that fits a tile."""
    least = 32 if kv_dtype in LARGEST else 16
    return (
        least <= heads.dim <= 512 // dtype.itemsize
        and heads.dim & (heads.dim - 1) == 0
        and heads.queries % heads.keys == 0
        and heads.queries // heads.keys <= UNIFORM.rows
    )


def attend(
    query: torch.Tensor, heads: Heads, rows: Rows, kv: torch.Tensor, kv_dtype: torch.dtype, deterministic: bool = False
) -> torch.Tensor:
    """Causal attention of a mixed batch, query [T, H, D] → [T, H, D]: sequences of one row, which come first, by
    `decode`, the others by `prefill`.

    `deterministic`: all by `prefill` in one configuration and one loop over tiles at fixed places of the sequence. A
    row's numbers then are the same bits whatever else is in its batch and however its prompt was cut.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    singles = 0 if deterministic else rows.singles
    if singles:
        decode(query[:singles], heads, rows, kv, kv_dtype, out=out[:singles])
    if len(query) > singles:
        config = UNIFORM if deterministic else PREFILL
        prefill(query, heads, rows, kv, kv_dtype, first=singles, out=out, config=config, uniform=deterministic)
    return out


def prefill(
    query: torch.Tensor, heads: Heads, rows: Rows, kv: torch.Tensor, kv_dtype: torch.dtype, *, out: torch.Tensor,
    first: int = 0, config: Config = PREFILL, uniform: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Sequences from number `first` on, the ones before it having one row each: query [T, H, D] → rows from `first` on
    of `out`, alike. Each row sees its sequence's tokens up to itself, through the block table, whether they were
    computed in this step, in an earlier chunk or found in the cache.

    4 D operations for each row, query head and visible token. Each tile of `config.rows` reads the K and V before it
    once, mostly out of the L2 cache, since the tiles of a KV head run side by side.

    Idea: FlashAttention-2 (Dao, 2023) over pages (vLLM; Kwon et al., 2023), variable lengths in one launch.
    """
    group = heads.queries // heads.keys
    sequences = len(rows.row_lengths) - first
    pool = _pool(kv, kv_dtype, heads)
    grid = ((len(query) - first) // (config.rows // group) + sequences, heads.keys)
    kernels.prefill[grid](
        query, *pool.memory, out, rows.starts[first:], rows.lengths[first:], rows.tables, rows.table_starts[first:],
        sequences, first, _softmax_scale(heads), query.stride(0), out.stride(0), *pool.strides,
        group, heads.dim, pool.block_size, heads.window,
        config.rows, config.tokens(heads.dim, max(pool.item_bytes, query.itemsize)), config.stages,
        uniform, pool.pairs, _wide(query.dtype), num_warps=config.warps,
    )  # fmt: skip
    return out


def decode(
    query: torch.Tensor, heads: Heads, rows: Rows, kv: torch.Tensor, kv_dtype: torch.dtype, *,
    out: torch.Tensor | None = None, config: Config | None = None, programs: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """One row of each of the first B sequences, its last token's: query [B, H, D] → [B, H, D]. See `verify`."""
    flat = None if out is None else out[:, None]
    return verify(query[:, None], heads, rows, kv, kv_dtype, out=flat, config=config, programs=programs)[:, 0]


def verify(
    query: torch.Tensor, heads: Heads, rows: Rows, kv: torch.Tensor, kv_dtype: torch.dtype, *,
    trees: torch.Tensor | None = None, out: torch.Tensor | None = None,
    config: Config | None = None, programs: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """The last Q tokens of each of the first B sequences, which are its draft: query [B, Q, H, D] → [B, Q, H, D].

    `trees` [B, Q] int64: bit j of row i says whether the draft's token i sees its token j (Q ≤ 64). A token of a tree
    sees itself and its ancestors, so that its depth is the number of its bits; of what comes before the draft it sees
    what a token at that depth would: all of it, or a window's part. Without `trees` the draft is a chain. A sequence of
    length 0, as graphs are padded with, gets zeros.

    Bytes: each visible key and value once, 2 G D elements a token, whatever Q is; the queries and `out`; and where a
    sequence is split, 8 (D + 1) bytes for each row and piece, at most programs + B of them.

    Ideas: split KV (Flash-Decoding; Dao et al., 2023); equal parts of all sequences' tiles, whatever their lengths, for
    a grid that fits the device (Stream-K, Osama et al., 2023; LeanAttention, Sanovar et al., 2024); queries of one
    sequence in one tile. The grid depends on B, Q and the device only. `config` and `programs`, the latter for each KV
    head and tile of rows, replace what would be chosen.
    """
    batch, queries, group = len(query), query.shape[1], heads.queries // heads.keys
    if queries > 1 and query.stride(0) != queries * query.stride(1):
        raise ValueError("the queries of a draft must follow those of the one before")
    pool = _pool(kv, kv_dtype, heads)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    config = config or (SPLIT if queries * group <= SPLIT.rows else SPLIT_WIDE)
    tile_rows = min(max(triton.next_power_of_2(queries * group), 16), config.rows)
    row_tiles = triton.cdiv(queries * group, tile_rows)
    if programs is None:
        programs = triton.cdiv(_multiprocessors(query.device) * config.resident, heads.keys * row_tiles)
    slots = programs + batch
    parts = torch.empty(slots, heads.keys, queries * group, heads.dim, dtype=torch.float32, device=query.device)
    logs = torch.empty(slots, heads.keys, queries * group, dtype=torch.float32, device=query.device)
    pieces = torch.empty(2, batch, dtype=torch.int32, device=query.device)
    kernels.split[(programs, heads.keys, row_tiles)](
        query, *pool.memory, out, parts, logs, pieces, rows.lengths, rows.tables, rows.table_starts, trees, batch,
        _softmax_scale(heads), query.stride(0) // queries, *pool.strides,
        heads.keys, group, queries, heads.dim, pool.block_size, heads.window, trees is not None,
        tile_rows, config.tokens(heads.dim, max(pool.item_bytes, query.itemsize)), config.stages, _CHUNK,
        pool.pairs, _wide(query.dtype), num_warps=config.warps,
    )  # fmt: skip
    merged_rows = min(triton.next_power_of_2(queries * group), _MERGED_ROWS)
    kernels.merge[(batch, heads.keys, triton.cdiv(queries * group, merged_rows))](
        parts, logs, pieces, rows.lengths, out, batch,
        heads.keys, group, queries, heads.dim, merged_rows, _MERGED_PIECES, num_warps=4,
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class _Pool:
    """A KV pool as the kernels take it. Strides in elements and scales: of a block, from K to V, of a head."""

    memory: tuple[torch.Tensor, torch.Tensor | None]
    strides: tuple[int, ...]
    block_size: int
    item_bytes: int
    pairs: int


def _pool(kv: torch.Tensor, dtype: torch.dtype, heads: Heads) -> _Pool:
    if dtype not in LARGEST:
        return _Pool((kv, None), (*kv.stride()[:3], 0, 0, 0), kv.shape[3], kv.itemsize, 0)
    elements, scales = split_rows(kv, dtype, heads.dim)
    assert scales is not None
    pairs, kind = elements.view(torch.int16), INT8 if dtype == torch.int8 else FLOAT8
    strides = (*pairs.stride()[:3], *scales.stride()[:3])
    return _Pool((pairs, scales), strides, elements.shape[3], 1, kind.value)


def _softmax_scale(heads: Heads) -> float:
    """What makes of a product of query and key an exponent of 2."""
    return math.log2(math.e) / math.sqrt(heads.dim)


def _wide(dtype: torch.dtype) -> bool:
    """Whether products are made in float32: the queries' type, or the interpreter's, which multiplies bfloat16
    wrongly."""
    return _INTERPRETED or dtype == torch.float32


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # the interpreter's: any number will do
