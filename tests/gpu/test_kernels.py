"""The kernels on CUDA at an 8B model's sizes: against plain torch, and repeated by a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from baton.bench.kernels import attention as attending
from baton.bench.kernels import sampling, small
from baton.bench.kernels.__main__ import TOLERANCE
from baton.bench.kernels.cases import relative_error
from baton.bench.kernels.shapes import LLAMA_8B, pool, random, rows
from baton.kernels import attention
from baton.kernels.ops import Heads
from baton.kernels.reference import TorchOps

from ..kernels import test_attention as tiny

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
ENOUGH = TOLERANCE["bfloat16"]
WIDE = replace(LLAMA_8B, heads=Heads(queries=64, keys=8, dim=128))
"""A 70B model's heads."""
FEW = replace(LLAMA_8B, heads=Heads(queries=12, keys=4, dim=64))
"""Groups of three."""
SLIDING = replace(LLAMA_8B, heads=Heads(queries=32, keys=8, dim=128, window=1000))


@pytest.mark.parametrize("shape", [LLAMA_8B, WIDE, FEW, SLIDING], ids=["8B", "70B", "groups of three", "window"])
def test_attention_is_that_of_plain_torch(shape):
    lengths = [1, 15, 16, 17, 4000, *(100 * i for i in range(1, 40))]
    cases = (
        attending.decode(shape, DEVICE, lengths, "ragged"),
        attending.decode(shape, DEVICE, [9000], "alone"),
        attending.prefill(shape, DEVICE, 1500, 700),
    )
    for case in cases:
        assert case.error is not None and case.error() < ENOUGH, case.shape


@pytest.mark.parametrize("draft", [2, 4, 8, 16])
def test_drafts_are_those_of_plain_torch(draft):
    case = attending.verify(LLAMA_8B, DEVICE, 5, 2100, draft)
    assert case.error is not None and case.error() < ENOUGH


@pytest.mark.parametrize("kept", ["int8", "float8_e4m3"])
def test_eight_bit_pools_are_read_as_they_are_kept(kept):
    heads, lengths = LLAMA_8B.heads, [(1, 1), (700, 1), (33, 1), (300, 40)]
    own = tiny.batch(lengths, 16)
    dtype = tiny.TYPES[kept]
    kv, values = tiny.stored(tiny.pool(own, heads, 16).nan_to_num(0.0), dtype)
    query = random(len(own.positions), heads.queries, heads.dim, like=torch.bfloat16, device=DEVICE)
    qkv = torch.zeros(len(query), heads.queries + 2 * heads.keys, heads.dim, device=DEVICE)
    qkv[:, : heads.queries] = query
    expected = TorchOps().attention(qkv.flatten(1), heads, own, values).view(query.shape)
    for deterministic in (False, True):
        found = attention.attend(query, heads, own, kv, dtype, deterministic)
        assert relative_error(found, expected) < ENOUGH


def test_a_graph_of_decode_follows_lengths_that_change():
    """What is recorded for one batch serves another of the same size: nothing of lengths is read on the host."""
    heads = LLAMA_8B.heads
    kv = pool(LLAMA_8B, 40_000, DEVICE)
    static = rows([1] * 8, [2000] * 8, kv)
    query = random(8, heads.queries, heads.dim, like=torch.bfloat16, device=DEVICE)
    attention.decode(query, heads, static, kv, torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.decode(query, heads, static, kv, torch.bfloat16)
    for lengths in ([2000] * 8, [1, 17, 900, 16, 32, 3000, 5, 640], [5000, 0, 0, 1, 0, 0, 0, 0]):
        own = rows([1] * 8, lengths, kv)
        static.lengths.copy_(own.lengths)
        static.table_starts.copy_(own.table_starts)
        static.tables[: len(own.tables)] = own.tables
        out.fill_(float("nan"))
        graph.replay()
        expected = attention.decode(query, heads, own, kv, torch.bfloat16)
        assert torch.equal(out, expected)
        assert not out.isnan().any()


def test_the_small_operations_are_those_of_plain_torch():
    for case in small.cases(replace(LLAMA_8B, rows=(1, 257), packed=1 << 26), DEVICE):
        assert case.error is not None and case.error() < ENOUGH, (case.kernel, case.shape)


@pytest.mark.parametrize("batch", [1, 5, 130])
def test_sampling_draws_what_torch_draws(batch):
    for case in (sampling.greedy(LLAMA_8B, DEVICE, batch), sampling.mixed(LLAMA_8B, DEVICE, batch)):
        assert case.error is not None and case.error() == 0.0, case.kernel
