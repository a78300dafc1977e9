"""The engine on CUDA against the engine on CPU: same checkpoint, same float32, same tokens."""

from __future__ import annotations

import pytest
import torch

from baton.bench.engine.agreement import TOP, agreement, generate, sequence
from baton.common.config import EngineConfig
from baton.engine.runner import build_engine
from baton.kernels.quantised import TYPES, quantise

from ..tiny import ARCHITECTURES, make_checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_matrix_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_cuda_says_what_cpu_says(tmp_path, arch):
    found = agreement(arch, make_checkpoint(tmp_path, arch), vocab=320, device="cuda")
    assert found.good, found


def engine(path, **settings):
    config = EngineConfig(model=str(path), device="cuda", kv_memory=64 << 20, max_batch_tokens=64, **settings)
    return build_engine(config, lambda share: None)


def test_alone_or_in_a_batch_whole_or_in_chunks(tmp_path):
    """On one device the same request gets the same tokens, however it is scheduled."""
    path = make_checkpoint(tmp_path)
    prompts = [[3 + (7 * i + j) % 300 for j in range(20 + 11 * i)] for i in range(8)]

    def run(group, chunk):
        sequences = [sequence(number, prompt, 160, TOP) for number, prompt in group]
        return [[s.token for s in one] for one in generate(engine(path, dtype="float32"), sequences, 24, chunk)]

    together = run(list(enumerate(prompts)), chunk=64)
    alone = [run([(0, prompt)], chunk=16)[0] for prompt in prompts]
    assert together == alone


def test_bfloat16_is_what_auto_means_and_stays_near_float32(tmp_path):
    path = make_checkpoint(tmp_path)
    prompt = list(range(5, 60))
    half, full = (
        generate(engine(path, dtype=dtype), [sequence(0, prompt, 128, TOP)], 1, chunk=64)[0][0]
        for dtype in ("auto", "float32")
    )
    near = dict(full.logprob.top)
    assert any(abs(value - near[token]) > 1e-5 for token, value in half.logprob.top if token in near)
    assert all(abs(value - near[token]) < 0.3 for token, value in half.logprob.top[:5] if token in near)


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3"])
def test_eight_bit_kv_is_on_cuda_what_it_is_on_cpu(tmp_path, kv_dtype):
    values = torch.randn(50, 4, 64, generator=torch.Generator().manual_seed(0))
    expected, found = (quantise(values.to(device), TYPES[kv_dtype]) for device in ("cpu", "cuda"))
    assert torch.equal(found[0].cpu().view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(found[1].cpu(), expected[1])
    path = make_checkpoint(tmp_path)
    prompt = list(range(5, 60))
    narrow, full = (
        generate(engine(path, dtype="float32", kv_dtype=kept), [sequence(0, prompt, 128, TOP)], 2, chunk=16)[0][0]
        for kept in (kv_dtype, "auto")
    )
    near = dict(full.logprob.top)
    assert all(abs(value - near[token]) < 0.8 for token, value in narrow.logprob.top[:5] if token in near)
