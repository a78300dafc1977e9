"""All choices of one HTTP request, followed from the router to whoever shows them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from ..common.errors import BatonError
from ..common.types import FinishReason, Request, SamplingParams, Timeline, Usage
from ..router.request import Finish
from .choice import Choice, Shown
from .ids import choice_id
from .metrics import Metrics
from .ports import RequestStream, Router
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to continue. `params.max_tokens` is what fits after them or less."""

    tokens: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Job:
    """What one HTTP request asks for: `n` choices for each prompt. `received` is on `time.perf_counter`'s clock."""

    request_id: str
    tenant: str
    prompts: tuple[Prompt, ...]
    n: int
    stops: tuple[str, ...]
    timeout_s: float
    received: float


class Sink(Protocol):
    """Where choices go: a stream of events, or one body."""

    async def show(self, choice: Choice, shown: Shown) -> None:
        """Tokens of a choice and, if its `finish_reason` is set, its end."""
        ...


class Generation:
    """Runs a job. Choice i of a prompt is sampled with the prompt's seed + i; the first of them is submitted alone, and
    the others when its first token is here, because then they find the whole prompt in the prefix cache."""

    def __init__(
        self, job: Job, router: Router, tokenizer: Tokenizer, eos_ids: frozenset[int], metrics: Metrics
    ) -> None:
        self.job = job
        self.submitted = job.received
        self._router = router
        self._metrics = metrics
        self.choices = [
            Choice(index, prompt.tokens, params, job.stops, eos_ids, tokenizer.detokenizer())
            for index, (prompt, params) in enumerate(_seeded(job))
        ]
        self._begun = [asyncio.Event() for _ in job.prompts]

    async def run(self, sink: Sink) -> None:
        """Until every choice has ended. Raises the first `BatonError` that a choice ends with; the others are then
        cancelled."""
        self.submitted = time.perf_counter()
        if len(self.choices) == 1:
            await self._follow(self.choices[0], sink)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for choice in self.choices:
                    group.create_task(self._follow(choice, sink))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self.cancel()

    async def _follow(self, choice: Choice, sink: Sink) -> None:
        prompt, number = divmod(choice.index, self.job.n)
        if number > 0:
            await self._begun[prompt].wait()
        last = self.job.received if number == 0 else time.perf_counter()
        stream = choice.stream = self._router.submit(self._request(choice))
        while choice.finish_reason is None:
            batch = await stream.next()
            if batch.tokens:
                now = time.perf_counter()
                self._metrics.arrived(now - last, len(batch.tokens), first=choice.completion_tokens == 0)
                last = now
            shown = choice.feed(batch)
            if choice.finish_reason is not None and (finish := batch.finish or await _stop(stream)):
                choice.account(finish)
            await sink.show(choice, shown)
            self._begun[prompt].set()

    def _request(self, choice: Choice) -> Request:
        return Request(
            request_id=choice_id(self.job.request_id, choice.index, len(self.choices)),
            tokens=choice.prompt,
            prompt_len=len(choice.prompt),
            params=choice.params,
            tenant=self.job.tenant,
            deadline_s=self.job.timeout_s - (time.perf_counter() - self.job.received),
        )

    @property
    def backlog(self) -> int:
        """Tokens that wait for a client that does not read, in the worst choice."""
        return max(choice.stream.backlog if choice.stream is not None else 0 for choice in self.choices)

    def usage(self) -> Usage:
        """Token counts of all choices; a prompt with several choices counts once, as at OpenAI."""
        firsts = [choice.usage for choice in self.choices[:: self.job.n]]
        return Usage(
            prompt_tokens=sum(first.prompt_tokens for first in firsts),
            cached_tokens=sum(first.cached_tokens for first in firsts),
            completion_tokens=sum(choice.completion_tokens for choice in self.choices),
        )

    def timeline(self) -> dict[str, float]:
        """Seconds since the gateway received the request, for every stage that the first choice has reached."""
        before = self.submitted - self.job.received  # the router's clock started this much later
        stages = {name: getattr(self.choices[0].timeline, name) for name in Timeline.__slots__}
        return {"received": 0.0, **{name: round(at + before, 6) for name, at in stages.items() if at is not None}}

    def cancel(self) -> None:
        """Free what every choice holds; nothing happens to those that have ended."""
        for choice in self.choices:
            choice.cancel()

    def account(self, outcome: str) -> None:
        """Write the end of the request into the metrics and the log."""
        usage, metrics = self.usage(), self._metrics
        elapsed = time.perf_counter() - self.job.received
        metrics.requests.labels(outcome).inc()
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_tokens.inc(usage.cached_tokens)
        metrics.output_tokens.inc(usage.completion_tokens)
        if outcome in (FinishReason.STOP, FinishReason.LENGTH):
            metrics.e2e.observe(elapsed)
            prefill_start = self.timeline().get("prefill_start")
            if prefill_start is not None:
                metrics.queue_wait.observe(prefill_start)
        log.info(
            "%s: %d prompt tokens (%d cached), %d output tokens, %.3f s",
            outcome,
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            elapsed,
            extra={"request_id": self.job.request_id},
        )


async def _stop(stream: RequestStream) -> Finish | None:
    """The gateway itself ended the output, at a stop string: nothing that the worker still says matters, only the
    account of the request that the router closes with."""
    stream.cancel()
    with suppress(BatonError):
        return (await stream.next()).finish
    return None


def _seeded(job: Job) -> Iterator[tuple[Prompt, SamplingParams]]:
    for prompt in job.prompts:
        for number in range(job.n):
            yield prompt, replace(prompt.params, seed=(prompt.params.seed + number) % 2**64)
