"""Single steps, without scheduler or server: decode and prefill against what bytes and FLOPs allow."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...engine.plan import Slice, StepPlan
from ...engine.runner import Engine
from ..ceilings import Ceilings
from .agreement import sequence
from .limits import Costs, decode_step_s, prefill_s

REPEATS = 24
WARM = 3


@dataclass(frozen=True, slots=True)
class Step:
    """`share`: the limit's time over the time that it took. For a prefill `batch` is 1 and `context` the prompt."""

    kind: str
    batch: int
    context: int
    seconds: float
    tokens_per_s: float
    share: float


def decode_steps(
    engine: Engine, costs: Costs, ceilings: Ceilings, batches: Iterable[int], context: int
) -> Iterator[Step]:
    """One token for each of `batch` sequences that have `context` tokens. The next step is launched before the last
    one is waited for, as the overlapped loop does, so that what is measured is the device."""
    for batch in batches:
        owners = [sequence(i, _tokens(context + 1, engine.vocab_size), context + 2) for i in range(batch)]
        plan = StepPlan(0, [], owners, [context] * batch)
        seconds = _median(engine, [plan], REPEATS)
        share = decode_step_s(costs, ceilings, batch, context) / seconds
        yield Step("decode", batch, context, seconds, batch / seconds, share)


def prefills(
    engine: Engine, costs: Costs, ceilings: Ceilings, prompts: Iterable[int], chunk: int, repeats: int = 5
) -> Iterator[Step]:
    """One prompt after the other, in as many steps as chunks."""
    for prompt in prompts:
        owner = sequence(0, _tokens(prompt, engine.vocab_size), prompt + 1)
        chunks = [StepPlan(0, [Slice.of(owner, at, min(chunk, prompt - at))]) for at in range(0, prompt, chunk)]
        seconds = _median(engine, chunks, repeats)
        yield Step("prefill", 1, prompt, seconds, prompt / seconds, prefill_s(costs, ceilings, prompt) / seconds)


def _median(engine: Engine, plans: list[StepPlan], repeats: int) -> float:
    """Seconds of all `plans` once, from one end to the next. At most two steps are under way."""
    ends = []
    last = None
    for _ in range(WARM + repeats):
        for plan in plans:
            launched = engine.runner.launch(plan)
            if last is not None:
                last.results()
            last = launched
        ends.append(time.perf_counter())
    assert last is not None
    last.results()
    return statistics.median(after - before for before, after in zip(ends[WARM - 1 :], ends[WARM:], strict=False))


def _tokens(count: int, vocab: int) -> list[int]:
    return random.Random(count).choices(range(vocab), k=count)
