"""All of a device's memory is used, and never more. It wants the device for itself: `gpu_check.sh` runs it alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from baton.bench.engine.local import answers
from baton.common.config import EngineConfig
from baton.common.types import Request, SamplingParams
from baton.engine.runner import build_engine

pytestmark = pytest.mark.gpu

LLAMA_8B = Path(__file__).parents[2] / "bench" / "configs" / "llama-3.1-8b"


def test_a_full_pool_and_the_longest_prompts_do_not_run_out_of_memory():
    """The 8B model with all of the device: more than fits at once, prompts of the greatest length among them."""
    longest, chunk, running = 16384, 4096, 256
    config = EngineConfig(
        model=str(LLAMA_8B), device="cuda", kv_memory=0, max_batch_tokens=chunk, max_running=running,
        max_model_len=longest, dummy_weights=True,
    )  # fmt: skip
    one = build_engine(config, lambda share: None)
    capacity, rng = one.num_blocks * one.format.block_size, random.Random(0)
    assert capacity > 200_000, "this device was said to be empty"
    lengths = [longest - 8] * 10 + [2000] * 200
    asked = [
        Request(
            str(i), tuple(rng.choices(range(one.vocab_size), k=length)), length,
            SamplingParams(max_tokens=4, temperature=0.9, top_p=0.9, seed=i, logprobs=20, ignore_eos=True),
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip
    assert all(len(said) == 4 for said in answers(one, asked, chunk, True))
