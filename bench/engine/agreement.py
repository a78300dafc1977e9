"""Whether an engine says what another one says: greedy tokens and log-probabilities, token by token.

Another order of summation may swap two candidates that are almost equally likely, and what follows then has another
prefix. So outputs are compared until they part, and where they part, the choice must have been too close to call.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...common.config import EngineConfig
from ...common.types import Request, SamplingParams, TokenLogprob
from ...engine.plan import Sampled, StepPlan
from ...engine.runner import Engine, build_engine
from ...engine.sequence import Sequence

BLOCK = 16
TOP = 20
CLOSE = 1e-3
"""Two candidates whose log-probabilities on CPU differ by less may be swapped by another order of summation."""
WORST_LOGPROB = 2e-3


@dataclass(frozen=True, slots=True)
class Agreement:
    """`tokens` were compared, `ties` prompts ended early at a choice too close to call, `wrong` did at any other;
    `worst` is the largest difference of a log-probability among the candidates of equal prefixes."""

    model: str
    prompts: int
    tokens: int
    ties: int
    wrong: int
    worst: float

    @property
    def good(self) -> bool:
        return self.wrong == 0 and self.worst < WORST_LOGPROB and self.tokens > 0


def sequence(number: int, tokens: Listing[int], room: int, logprobs: int | None = None) -> Sequence:
    """A sequence with blocks of its own for `room` tokens, in an order that is not the natural one."""
    count = -(-room // BLOCK)
    blocks = array("i", range(number * count, (number + 1) * count))
    random.Random(number).shuffle(blocks)
    params = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True, logprobs=logprobs)
    return Sequence(("", number), Request(str(number), tuple(tokens), len(tokens), params), 0, 0.0, 0.0, blocks=blocks)


def generate(engine: Engine, sequences: Listing[Sequence], count: int, chunk: int) -> list[list[Sampled]]:
    """Greedy: prefill in chunks of `chunk` tokens, one sequence after the other, then decode all together."""
    outputs: list[list[Sampled]] = [[] for _ in sequences]

    def step(parts: Listing[tuple[int, int]]) -> None:
        plan = StepPlan(1 << 30)
        for index, tokens in parts:
            one = sequences[index]
            if tokens == one.missing == 1:
                plan.decode(one)
            else:
                plan.add(one, tokens)
        for (index, tokens), sampled in zip(parts, engine.runner.launch(plan).results(), strict=True):
            sequences[index].launched += tokens
            if sampled is not None:
                sequences[index].tokens.append(sampled.token)
                outputs[index].append(sampled)

    for index, one in enumerate(sequences):
        while not outputs[index]:
            step([(index, min(chunk, one.missing))])
    for _ in range(count - 1):
        step([(index, 1) for index in range(len(sequences))])
    return outputs


def compare(name: str, expected: list[list[Sampled]], got: list[list[Sampled]]) -> Agreement:
    """Token by token, until a prompt's outputs part."""
    tokens = ties = wrong = 0
    worst = 0.0
    for theirs, ours in zip(expected, got, strict=True):
        for a, b in zip(theirs, ours, strict=True):
            assert a.logprob is not None and b.logprob is not None, "compared sequences ask for log-probabilities"
            worst = max(worst, _difference(a.logprob, b.logprob))
            tokens += 1
            if a.token != b.token:
                close = a.logprob.top[0][1] - dict(a.logprob.top).get(b.token, float("-inf")) < CLOSE
                ties, wrong = ties + close, wrong + (not close)
                break
    return Agreement(name, len(expected), tokens, ties, wrong, worst)


def _difference(a: TokenLogprob, b: TokenLogprob) -> float:
    other = dict(b.top)
    return max(abs(value - other[token]) for token, value in a.top[: TOP // 2] if token in other)


def agreement(name: str, folder: Path, vocab: int, device: str) -> Agreement:
    """Sixteen prompts of 5 to 230 tokens, 32 tokens each, in float32 on CPU and on `device`."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, vocab) for _ in range(5 + 15 * i)] for i in range(16)]
    results = []
    for where in ("cpu", device):
        config = EngineConfig(
            model=str(folder), dtype="float32", device=where, block_size=BLOCK, kv_memory=1 << 30, max_batch_tokens=64,
            max_model_len=512,
        )  # fmt: skip
        engine = build_engine(config, lambda share: None)
        sequences = [sequence(i, prompt, 288, TOP) for i, prompt in enumerate(prompts)]
        results.append(generate(engine, sequences, 32, chunk=64))
    return compare(name, *results)


def checkpoint(folder: Path, **overrides: Any) -> Path:
    """A random Llama checkpoint; a large `initializer_range` spreads its logits, so that greedy choices are clear."""
    import transformers  # needed for nothing else here

    config = transformers.LlamaConfig(**{"tie_word_embeddings": False, "initializer_range": 0.06} | overrides)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder
