"""Steps of throw-away tokens, before anybody is served: they find out what memory a step takes, and leave everything
warm (kernels compiled, workspaces and thread teams made, memory at its place)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Listing

from ..common.config import EngineConfig
from ..common.types import Request, SamplingParams
from .plan import Slice, StepPlan
from .sequence import Sequence

_EVERYTHING = SamplingParams(
    max_tokens=2, temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.1,
    frequency_penalty=0.1, logit_bias=((0, 1.0),), logprobs=5, min_tokens=1, seed=1,
)  # fmt: skip
_NOTHING = SamplingParams(max_tokens=2, temperature=0.0)


def rehearsals(config: EngineConfig, longest: int, num_blocks: int, batches: Listing[int] = ()) -> list[StepPlan]:
    """A prefill chunk, a decode, and a step of both with all that a request may ask for when it samples; then, plain
    and with all of that, decodes of each of these batch sizes, from which kernels may follow."""
    count = max(1, min(config.max_batch_tokens, longest - 1))
    first = _sequence(0, count + 1, config, num_blocks, _NOTHING)
    second = _sequence(1, 2, config, num_blocks, _EVERYTHING)
    few = 1 if config.max_batch_tokens >= 3 else 0
    plans = [
        StepPlan(0, [Slice(first, 0, count, False)]),
        StepPlan(0, [], [first], [count]),
        StepPlan(0, [Slice(second, 0, 2, True)], [first] * few, [count] * few),
    ]
    for size in batches:
        for params in (_NOTHING, _EVERYTHING):
            owners = [_sequence(i, 1, config, num_blocks, params) for i in range(size)]
            plans.append(StepPlan(0, [], owners, [0] * size))
    return plans


def largest(config: EngineConfig, longest: int, num_blocks: int) -> StepPlan:
    """As many tokens as a step may have, of as many sequences as may run, all of which sample."""
    sequences = min(config.max_running, config.max_batch_tokens)
    chunk = max(1, min(config.max_batch_tokens - sequences + 1, longest))
    owners = [_sequence(i, 1, config, num_blocks, _NOTHING) for i in range(sequences - 1)]
    last = _sequence(sequences, chunk, config, num_blocks, _NOTHING)
    return StepPlan(0, [Slice(last, 0, chunk, True)], owners, [0] * len(owners))


def _sequence(number: int, tokens: int, config: EngineConfig, num_blocks: int, params: SamplingParams) -> Sequence:
    """In blocks that belong to nobody yet; where there are too few, some of them hold several places."""
    blocks = array("i", (i % num_blocks for i in range(-(-tokens // config.block_size))))
    return Sequence(("", number), Request("rehearsal", (0,) * tokens, tokens, params), 0, 0.0, 0.0, blocks=blocks)
