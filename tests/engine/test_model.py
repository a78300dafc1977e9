"""The model against transformers, on tiny random checkpoints of every architecture."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Listing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from baton.common.config import EngineConfig
from baton.common.types import Request, SamplingParams
from baton.engine.plan import StepPlan
from baton.engine.runner import Engine, build_engine
from baton.engine.sequence import Sequence

from ..tiny import make_checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied-all-heads": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd-sizes": ("llama", {"vocab_size": 301, "intermediate_size": 90, "head_dim": 32}),
    "llama-tiny-heads": ("llama", {"head_dim": 8}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "yarn-rope": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
}


def start(path: Path, **settings: Any) -> Engine:
    """An engine with a pool that holds a few hundred tokens; `settings` are fields of `EngineConfig`."""
    defaults = {"model": str(path), "threads": 1, "device": "cpu", "kv_memory": 4 << 20, "max_batch_tokens": 64}
    return build_engine(EngineConfig(**(defaults | settings)), lambda share: None)


def sequence(tokens: Listing[int], first_block: int, number: int = 0, **params: Any) -> Sequence:
    """A sequence with 20 blocks of 16 tokens, in an order that is not the natural one."""
    settings = SamplingParams(**({"max_tokens": 1000, "temperature": 0.0} | params))
    blocks = array("i", [first_block + (i * 7) % 20 for i in range(20)])
    return Sequence(
        ("", number), Request(str(number), tuple(tokens), len(tokens), settings), 0, 0.0, 0.0, blocks=blocks
    )


def advance(engine: Engine, parts: Listing[tuple[Sequence, int]]) -> None:
    """One step over (sequence, tokens to compute); what is sampled is appended."""
    plan = StepPlan(budget=10_000)
    for owner, count in parts:
        plan.add(owner, count)
    results = engine.runner.launch(plan).results()
    for (owner, count), result in zip(parts, results, strict=True):
        owner.launched += count
        if result is not None:
            owner.tokens.append(result.token)


def reference(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def check(model: Any, tokens: Listing[int], prompt_len: int) -> None:
    """Each token after the prompt is the one that the reference would choose after those before it. Fails where one
    is so close that rounding may decide it."""
    with torch.no_grad():
        best = model(torch.tensor([tokens])).logits[0, prompt_len - 1 : -1].topk(2)
    assert (best.values[:, 0] - best.values[:, 1]).min() > 1e-4
    assert tokens[prompt_len:] == best.indices[:, 0].tolist()


def prompts(*lengths: int, vocabulary: int = 300) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens_equal_transformers(tmp_path: Path, name: str) -> None:
    arch, overrides = VARIANTS[name]
    path = make_checkpoint(tmp_path, arch, **overrides)
    model, engine = reference(path), start(path)
    running = [sequence(tokens, 1 + 20 * i, i) for i, tokens in enumerate(prompts(1, 16, 37, 70))]
    first, second, third, fourth = running
    advance(engine, [(first, 1), (fourth, 33)])
    advance(engine, [(second, 16), (first, 1), (fourth, 37), (third, 5)])
    advance(engine, [(third, 32), (second, 1), (fourth, 1), (first, 1)])
    while len(first.tokens) < 30:
        advance(engine, [(each, each.missing) for each in running])
    for each in running:
        check(model, each.tokens, each.prompt_len)
