"""What `baton bench load` does: the same workload at one or several widths or rates, summarised run by run."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from .client import Target
from .load import Run, closed_loop, first_model, open_loop, warm_up
from .report import Slo, Summary, summarise
from .trace import fit, read_trace
from .wire import HttpClient
from .workload import Job, Words, poisson, random_jobs, trace_jobs

OnRun = Callable[[str, int], None]
"""Called when a run begins, with its label and number of requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that decides a sweep. Exactly one of `concurrency`, `rates` and `trace` is set. SLOs in seconds."""

    url: str
    api_key: str = ""
    model: str = ""
    tokenizer: str = ""
    chat: bool = False
    text: bool = False
    ignore_eos: bool = True
    timeout_s: float = 600.0
    concurrency: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    trace: Path | None = None
    speed: float = 1.0
    limit: int = 0
    shrink: int = 1
    max_len: int = 0
    requests: int = 64
    input_len: int = 128
    output_len: int = 128
    shared: float = 0.0
    warmup: int = 4
    seed: int = 0
    slo_s: tuple[float, float] | None = None

    @property
    def title(self) -> str:
        if self.trace is not None:
            return f"{self.trace.name.split('.')[0]} at {self.speed:g}× speed, lengths / {self.shrink}"
        return f"{self.requests} requests, {self.input_len} → {self.output_len} tokens"

    def parameters(self) -> dict[str, Any]:
        """What goes into the result file: no address, no key, no path."""
        hidden = {"url", "api_key", "tokenizer", "trace"}
        shown = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in hidden}
        return {**shown, "trace": self.trace.name if self.trace else None}


def fresh_seed() -> int:
    """A seed not used before: the same prompts twice would be answered from the server's prefix cache."""
    return secrets.randbelow(2**32)


def run(plan: Plan, on_run: OnRun, on_done: Callable[[], None]) -> list[tuple[Summary, Run]]:
    """All runs of a plan, one after the other. Raises `OSError` where the server cannot be reached and `ValueError`
    where the plan cannot be."""
    words = Words.from_tokenizer(plan.tokenizer) if plan.tokenizer else Words()
    return uvloop.run(_run(plan, words, on_run, on_done))


async def _run(plan: Plan, words: Words, on_run: OnRun, on_done: Callable[[], None]) -> list[tuple[Summary, Run]]:
    http = HttpClient(plan.url, plan.api_key)
    target = Target(plan.model or await first_model(http), plan.chat, plan.ignore_eos, timeout_s=plan.timeout_s)
    slo = Slo(*plan.slo_s) if plan.slo_s else None
    done: list[tuple[Summary, Run]] = []
    for label, width, jobs in _runs(plan, words):
        if plan.warmup:
            extra = random_jobs(
                plan.warmup, plan.input_len, plan.output_len, seed=fresh_seed(), words=words, text=plan.text
            )
            on_run(f"warm-up for {label}", len(extra))
            await warm_up(http, target, extra, min(plan.warmup, width or plan.warmup))
        on_run(label, len(jobs))
        if width:
            result = await closed_loop(http, target, jobs, width, lambda _: on_done())
        else:
            result = await open_loop(http, target, jobs, lambda _: on_done())
        done.append((summarise(label, result, slo), result))
    http.close()
    return done


def _runs(plan: Plan, words: Words) -> Iterator[tuple[str, int, list[Job]]]:
    """(label, width or 0 for open loop, jobs). Each run has prompts of its own, so that none is answered from what
    an earlier one left in a cache."""
    if plan.trace is not None:
        rows = fit(read_trace(plan.trace, plan.seed), shrink=plan.shrink, max_len=plan.max_len, limit=plan.limit)
        yield "trace", 0, trace_jobs(rows, seed=plan.seed, words=words, speed=plan.speed, text=plan.text)
        return
    for index, value in enumerate(plan.concurrency or plan.rates):
        seed = plan.seed + index
        jobs = random_jobs(
            plan.requests, plan.input_len, plan.output_len, seed=seed, words=words, shared=plan.shared, text=plan.text
        )
        if plan.concurrency:
            yield f"concurrency {value}", int(value), jobs
        else:
            yield f"rate {value:g}", 0, poisson(jobs, value, seed)
