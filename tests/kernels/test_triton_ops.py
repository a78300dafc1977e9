"""A whole model on the Triton operations against plain torch, and against itself where it is to be deterministic."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from baton.engine.plan import Sampled
from baton.engine.runner import Engine
from baton.kernels import select
from baton.kernels.converted import ConvertedKvOps
from baton.kernels.ops import Heads, Ops, Rows
from baton.kernels.quantised import TYPES
from baton.kernels.reference import TorchOps

from ..engine.test_model import prompts, sequence, start
from ..engine.test_parallel import step
from ..engine.test_runner import kept
from ..tiny import make_checkpoint
from .hopper import DEVICE

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from baton.kernels.triton_ops import TritonOps

Start = Callable[..., Engine]

WINDOW = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts an engine on the operations that are made for the type of its pool."""

    def build(path: Path, make: Callable[[torch.dtype], Ops], **settings: Any) -> Engine:
        monkeypatch.setattr("baton.engine.rank.select_ops", lambda device, dtype, kept, *shape: make(kept))
        here = {"device": DEVICE.type, "graphs": DEVICE.type == "cuda", "max_batch_tokens": 8, "dtype": "float32"}
        return start(path, **(here | settings))

    return build


def plain(kept: torch.dtype) -> Ops:
    return TorchOps() if kept == torch.float32 else ConvertedKvOps(TorchOps(), kept)


def deterministic(kept: torch.dtype) -> Ops:
    return TritonOps(kept, deterministic=True)


def talk(engine: Engine) -> list[Sampled]:
    """Two requests: chunks of both, a chunk beside a decode, then decodes of both."""
    first, second = (sequence(tokens, 1 + 20 * i, i, logprobs=5) for i, tokens in enumerate(prompts(26, 7)))
    found = step(engine, (first, 20))
    found += step(engine, (first, 6), (second, 4))
    found += step(engine, (second, 3), (first, 1))
    found += step(engine, (first, 1), (second, 1))
    return [each for each in found if each is not None]


@pytest.mark.parametrize(
    ("arch", "overrides", "kv_dtype"),
    [("qwen3", {}, "float32"), ("qwen3", {}, "int8"), ("qwen2", WINDOW, "float8_e4m3")],
)
def test_a_model_computes_what_plain_torch_does(
    tmp_path: Path, started: Start, arch: str, overrides: dict[str, Any], kv_dtype: str
) -> None:
    """With norms of queries and keys, with biases and a sliding window."""
    path = make_checkpoint(tmp_path, arch, num_hidden_layers=2, **overrides)
    expected = talk(started(path, plain, kv_dtype=kv_dtype))
    found = talk(started(path, TritonOps, kv_dtype=kv_dtype))
    assert [each.token for each in found] == [each.token for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprob and theirs.logprob
        assert dict(ours.logprob.top) == pytest.approx(dict(theirs.logprob.top), abs=1e-3)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_the_deterministic_variant_computes_the_same_bits_however_a_request_is_scheduled(
    tmp_path: Path, started: Start, kv_dtype: str
) -> None:
    """Decoded alone; and again after all of it was lost, in chunks beside others and as one prompt."""
    path = make_checkpoint(tmp_path, "llama", num_hidden_layers=2)
    engine = started(path, deterministic, dtype="bfloat16", kv_dtype=kv_dtype)
    assert engine.runner.operations == "triton-deterministic"
    tokens, other = prompts(14, 20)
    alone = sequence(tokens, 1, logprobs=5)
    step(engine, (alone, 14))
    said = [step(engine, (alone, 1)) for _ in range(3)][-1]
    crowd = sequence(other, 61)
    chunked, whole = (sequence(alone.tokens[:-1], first, logprobs=5) for first in (21, 41))
    step(engine, (crowd, 11), (chunked, 3))
    step(engine, (chunked, 1), (crowd, 9))
    assert step(engine, (chunked, 13), (crowd, 1))[0] == said[0]
    assert step(engine, (crowd, 1), (whole, 17))[1] == said[0]
    expected = kept(engine, alone.blocks, 17)
    for owner in (chunked, whole):
        for found, wanted in zip(kept(engine, owner.blocks, 17), expected, strict=True):
            assert torch.equal(found, wanted)


def test_they_are_chosen_where_they_can_be_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind = TYPES["int8"]
    found = [
        select._triton(DEVICE, torch.bfloat16, kept, Heads(4, 2, 64), 16, deterministic)
        for kept, deterministic in ((kind, False), (kind, True), (torch.bfloat16, False))
    ]
    assert [each and each.name for each in found] == ["triton", "triton-deterministic", "triton"]
    assert caplog.records == []
    assert select._triton(DEVICE, torch.bfloat16, kind, Heads(4, 2, 80), 16, False) is None

    small = OutOfResources(160 << 10, 99 << 10, "shared memory")
    for error in (RuntimeError("0 active drivers"), subprocess.CalledProcessError(1, "gcc"), small):
        monkeypatch.setattr("baton.kernels.row_kernels.silu_mul", Mock(side_effect=error))
        assert select._triton(DEVICE, torch.bfloat16, kind, Heads(4, 2, 64), 16, False) is None
    for said, why in zip(caplog.messages, ("heads of 80", "0 active drivers", "gcc", "shared memory"), strict=True):
        assert why in said


@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_a_rehearsal_keeps_within_its_pool(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind it may be weights."""
    seen: list[tuple[Rows, torch.Tensor]] = []
    monkeypatch.setattr(
        "baton.kernels.row_kernels.rotate_and_store", lambda qkv, heads, table, rows, kv, kept: seen.append((rows, kv))
    )
    TritonOps(torch.bfloat16).rehearse(DEVICE, torch.bfloat16, Heads(4, 2, 16), block_size)
    ((rows, kv),) = seen
    assert max(rows.slots.tolist()) < len(kv) * block_size and max(rows.tables.tolist()) < len(kv)
    held = rows.table_starts.diff() * block_size
    assert (rows.lengths <= held).all() and rows.table_starts[-1] == len(rows.tables)
