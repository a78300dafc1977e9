"""The engine on CUDA: against the engine on CPU, and against itself however its requests are scheduled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.bench.engine.agreement import TOP, agreement, checkpoint, compare, generate, sequence
from baton.bench.engine.local import answers
from baton.common.config import EngineConfig
from baton.common.types import Request, SamplingParams
from baton.engine.runner import Engine, build_engine
from baton.kernels.quantised import TYPES, quantise

from ..tiny import ARCHITECTURES, make_checkpoint
from .two_workers import hand_over

pytestmark = pytest.mark.gpu

SHORT_8B = {
    "vocab_size": 8192, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
"""Its sizes, with two layers and a small vocabulary."""


def engine(path: Path, **settings: object) -> Engine:
    given = {"device": "cuda", "kv_memory": 64 << 20, "max_batch_tokens": 64, "max_running": 32} | settings
    made = build_engine(EngineConfig(model=str(path), **given), lambda share: None)
    assert made.runner.operations.startswith("triton"), "plain torch took over: the log says why"
    return made


def prompts(count: int) -> list[list[int]]:
    return [[3 + (7 * i + j) % 300 for j in range(20 + 11 * i)] for i in range(count)]


def requests(count: int, tokens: int = 24, **params: object) -> list[Request]:
    """Greedy and sampled in turn."""
    kinds: list[dict[str, object]] = [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9, "seed": 7}]
    asked = [
        SamplingParams(max_tokens=tokens, ignore_eos=True, **(kinds[i % 2] | params))  # type: ignore[arg-type]
        for i in range(count)
    ]
    return [Request(str(i), tuple(p), len(p), asked[i]) for i, p in enumerate(prompts(count))]


# --- against the CPU --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_cuda_says_what_cpu_says(tmp_path, arch):
    found = agreement(arch, make_checkpoint(tmp_path, arch), vocab=320, device="cuda")
    assert found.good, found


def test_cuda_says_what_cpu_says_at_an_8b_models_sizes(tmp_path):
    found = agreement("8B-shaped", checkpoint(tmp_path, **SHORT_8B), vocab=8192, device="cuda")
    assert found.good, found


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
    path = make_checkpoint(tmp_path, head_dim=64)
    prompt = list(range(5, 60))
    narrow, full = (
        generate(engine(path, dtype="float32", kv_dtype=kept), [sequence(0, prompt, 128, TOP)], 2, chunk=16)[0][0]
        for kept in (kv_dtype, "auto")
    )
    near = dict(full.logprob.top)
    assert all(abs(value - near[token]) < 0.8 for token, value in narrow.logprob.top[:5] if token in near)


# --- against itself ---------------------------------------------------------------------------------------------------


def test_alone_or_in_a_batch_whole_or_in_chunks(tmp_path):
    """On one device the same request gets the same tokens, however it is scheduled."""
    one = engine(make_checkpoint(tmp_path), dtype="float32")

    def run(group, chunk):
        sequences = [sequence(number, prompt, 160, TOP) for number, prompt in group]
        return [[s.token for s in said] for said in generate(one, sequences, 24, chunk)]

    together = run(list(enumerate(prompts(8))), chunk=64)
    alone = [run([(0, prompt)], chunk=16)[0] for prompt in prompts(8)]
    assert together == alone


def test_graphs_compute_what_their_launches_do(tmp_path):
    """At sizes of the ladder and between two of them."""
    path = make_checkpoint(tmp_path)
    for count in (1, 7, 8, 20):
        recorded, launched = (
            generate(
                engine(path, dtype="float32", graphs=graphs),
                [sequence(i, prompt, 320, TOP) for i, prompt in enumerate(prompts(count))], 12, chunk=64,
            )
            for graphs in (True, False)
        )  # fmt: skip
        found = compare("graphs", launched, recorded)
        assert found.good, found


def test_both_loops_give_the_same_tokens(tmp_path):
    one = engine(make_checkpoint(tmp_path), dtype="float32")
    plain, overlapped = (
        [[token.token for token in said] for said in answers(one, requests(20), 64, overlap)]
        for overlap in (False, True)
    )
    assert plain == overlapped
    assert [len(said) for said in plain] == [24] * 20


def test_deterministic_bits_do_not_depend_on_company_or_chunks(tmp_path):
    """Equal log-probabilities, bit for bit: alone or in a crowd, in chunks of two sizes, preempted or not."""
    path = make_checkpoint(tmp_path)
    settings = {"dtype": "bfloat16", "deterministic": True}
    asked = requests(20, logprobs=3)

    def bits(said):
        return [(token.token, token.logprob) for token in said]

    whole = engine(path, **settings)
    crowd = [bits(said) for said in answers(whole, asked, 64, True)]
    alone = [bits(answers(whole, [request], 64, False)[0]) for request in asked[:6]]
    assert crowd[:6] == alone
    chunked = engine(path, max_batch_tokens=33, **settings)
    assert [bits(said) for said in answers(chunked, asked, 33, True)] == crowd
    tight = engine(path, kv_memory=chunked.format.bytes_per_token * 16 * 60, **settings)
    assert [bits(said) for said in answers(tight, asked, 64, False)] == crowd


def test_deterministic_tokens_do_not_depend_on_who_continues(tmp_path):
    """In bfloat16, where any other order of summation would soon show."""
    path = make_checkpoint(tmp_path)
    settings = {"dtype": "bfloat16", "deterministic": True}
    params = SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True)
    asked = [Request(str(i), tuple(prompt), len(prompt), params) for i, prompt in enumerate(prompts(8))]
    one = engine(path, **settings)
    here = [[token.token for token in answers(one, [request], 64, False)[0]] for request in asked]
    there, _ = hand_over(path, "cuda", "cuda-ipc", prompts(8), 48, **settings)
    assert there == here


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_in_several_files_is_on_the_device_as_it_is_on_disk(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make_checkpoint(whole)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(parts, max_shard_size="100KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    said = [
        generate(engine(path, dtype="float32"), [sequence(0, list(range(5, 60)), 128, TOP)], 8, chunk=64)
        for path in (whole, parts)
    ]
    assert said[0] == said[1]
