"""Systems side by side in one run: Baton colocated, Baton with one prefill and one decode worker, and transformers.

All have the same threads in total, the same prompts and exact output lengths. Systems run one at a time; every round
runs all of them, in another order, so that what drifts on the machine meets each alike. Rates are the median of the
rounds; latencies are pooled over them.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from ..common.errors import BatonError
from .client import Target
from .load import Run, closed_loop, first_model
from .systems import Reference, baton, reference
from .wire import HttpClient
from .workload import Job, Words

COLOCATED, PAIR, TRANSFORMERS = "baton colocated", "baton 1P1D", "transformers"
HALF = "baton colocated, half the threads"
"""What 1P1D's prefill worker would be without a handover: the difference in TTFT is what the handover costs."""
SYSTEMS = (COLOCATED, PAIR, TRANSFORMERS)
SHAPES = {
    COLOCATED: ("--colocated", "1"),
    HALF: ("--colocated", "1"),
    PAIR: ("--prefill", "1", "--decode", "1"),
}
LONG_PROMPT = 512
LONG_REPEATS = 3
LONG_OUTPUT = 4
"""Tokens asked for after a long prompt: with one, 1P1D would hand nothing over."""

Ids = tuple[int, ...]
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is compared. Each burst has `2 * width` prompts, or `width` of them where that is 32 or more."""

    model: Path
    threads: int = 2
    rounds: int = 3
    widths: tuple[int, ...] = (1, 8, 32)
    input_len: int = 128
    output_len: int = 128
    systems: tuple[str, ...] = SYSTEMS
    seed: int = 0


@dataclass(slots=True)
class Burst:
    """Prompts of one width through one system. Seconds; `ttft` has an entry for each request."""

    tokens_per_s: float
    ttft: list[float]
    itl: list[float]


@dataclass(slots=True)
class Measured:
    """One system over all rounds: bursts by width, TTFT of long prompts alone, and what it tells of itself.

    timelines   of the long prompts: seconds from receipt to each stage
    handover    growth of the handover counters of /metrics over the long prompts, and "requests"
    """

    bursts: dict[int, list[Burst]] = field(default_factory=dict)
    long_ttft: list[float] = field(default_factory=list)
    timelines: list[dict[str, float | None]] = field(default_factory=list)
    handover: dict[str, float] = field(default_factory=dict)

    def tokens_per_s(self, width: int) -> float:
        return statistics.median(burst.tokens_per_s for burst in self.bursts[width])

    def pooled(self, width: int, what: str) -> list[float]:
        """All `ttft` or `itl` of one width."""
        return [value for burst in self.bursts[width] for value in getattr(burst, what)]


class System(Protocol):
    """A running system."""

    async def burst(self, prompts: Sequence[Ids], output_len: int, width: int) -> Burst:
        """Run prompts of equal length, `width` at a time. Raises `BatonError` where one fails."""
        ...

    async def long(self, prompts: Sequence[Ids], measured: Measured) -> None:
        """TTFT of each of these prompts, one at a time. Raises `BatonError` where one fails."""
        ...


@dataclass(frozen=True, slots=True)
class BatonSystem:
    """Baton through its HTTP door."""

    http: HttpClient
    target: Target

    async def burst(self, prompts: Sequence[Ids], output_len: int, width: int) -> Burst:
        run = await self._run(prompts, output_len, width)
        return Burst(
            sum(sample.tokens for sample in run.samples) / run.wall_s,
            [sample.ttft for sample in run.samples],
            [gap for sample in run.samples for gap in sample.itl],
        )

    async def long(self, prompts: Sequence[Ids], measured: Measured) -> None:
        before = await self._counters()
        run = await self._run(prompts, LONG_OUTPUT, 1)
        measured.long_ttft += [sample.ttft for sample in run.samples]
        measured.timelines += [sample.timeline for sample in run.samples]
        for name, value in (await self._counters()).items():
            measured.handover[name] = measured.handover.get(name, 0.0) + value - before.get(name, 0.0)
        measured.handover["requests"] = measured.handover.get("requests", 0.0) + len(prompts)

    async def _run(self, prompts: Sequence[Ids], output_len: int, width: int) -> Run:
        run = await closed_loop(self.http, self.target, [Job(0.0, p, output_len) for p in prompts], width)
        for sample in run.samples:
            if sample.error:
                raise BatonError(f"a request failed: {sample.error} {sample.detail}")
        return run

    async def _counters(self) -> dict[str, float]:
        """Totals of everything that /metrics tells about handovers, summed over workers."""
        text = (await self.http.get("/metrics")).body.decode()
        totals: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("baton_handover"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0].removeprefix("baton_").removesuffix("_total")
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals


@dataclass(frozen=True, slots=True)
class TransformersSystem:
    """Batched `generate`: each batch begins when the one before it is done."""

    process: Reference

    async def burst(self, prompts: Sequence[Ids], output_len: int, width: int) -> Burst:
        batches = [prompts[i : i + width] for i in range(0, len(prompts), width)]
        done = [await self.process.generate(batch, output_len) for batch in batches]
        return Burst(
            len(prompts) * output_len / sum(each.wall_s for each in done),
            [each.steps[0] for each, batch in zip(done, batches, strict=True) for _ in batch],
            [b - a for each in done for a, b in pairwise(each.steps)],
        )

    async def long(self, prompts: Sequence[Ids], measured: Measured) -> None:
        """`generate` with one new token: nothing comes after the first, so the call's time is TTFT."""
        for prompt in prompts:
            measured.long_ttft.append((await self.process.generate([prompt], 1)).wall_s)


@asynccontextmanager
async def running(name: str, plan: Plan) -> AsyncIterator[System]:
    """Start a system and end it afterwards."""
    if name == TRANSFORMERS:
        async with reference(plan.model, plan.threads) as process:
            yield TransformersSystem(process)
    else:
        threads = max(1, plan.threads // 2) if name == HALF else plan.threads
        async with baton(plan.model, SHAPES[name], threads) as http:
            yield BatonSystem(http, Target(await first_model(http)))


async def compare(plan: Plan, note: Note) -> dict[str, Measured]:
    """All systems of the plan, and HALF where 1P1D is among them. Raises `BatonError` where one does not run."""
    names = [*plan.systems, HALF] if PAIR in plan.systems else list(plan.systems)
    results = {name: Measured() for name in names}
    for turn in range(plan.rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            label = f"round {turn + 1} of {plan.rounds}, {name}"
            note(f"{label}: starting")
            async with running(name, plan) as system:
                await _measure(system, plan, () if name == HALF else plan.widths, turn, results[name], note, label)
    return results


async def _measure(
    system: System, plan: Plan, widths: Sequence[int], turn: int, measured: Measured, note: Note, label: str
) -> None:
    """One system, one round. All systems of a round get the same prompts; those of warm-up are others."""
    rng, warm = random.Random(f"{plan.seed}/{turn}"), random.Random(f"{plan.seed}/{turn}/warm-up")
    note(f"{label}: warm-up")
    await system.burst(_prompts(warm, 4, plan.input_len), 8, 4)
    await system.burst(_prompts(warm, 1, LONG_PROMPT), LONG_OUTPUT, 1)
    note(f"{label}: {LONG_PROMPT}-token prompts")
    await system.long(_prompts(rng, LONG_REPEATS, LONG_PROMPT), measured)
    for width in widths:
        note(f"{label}: concurrency {width}")
        prompts = _prompts(rng, width if width >= 32 else 2 * width, plan.input_len)
        measured.bursts.setdefault(width, []).append(await system.burst(prompts, plan.output_len, width))


def _prompts(rng: random.Random, count: int, length: int) -> list[Ids]:
    words = Words()
    return [tuple(words.ids[i] for i in words.draw(rng, length)) for _ in range(count)]
