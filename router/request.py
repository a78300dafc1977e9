"""The state of one request in the router, from submit to its final word."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..common.errors import BatonError
from ..common.hashing import BlockHash, BlockHasher
from ..common.messages import TokenOut
from ..common.types import FinishReason, Request, Timeline, Usage
from .fleet import Attempt
from .story import Story

MAX_BACKLOG = 65_536
"""Tokens that may lie here unread, whatever the consumer allows itself."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The final word on a request that ended well."""

    reason: FinishReason
    usage: Usage
    timeline: Timeline


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens that have arrived since the last batch, in order; `finish` on the last one."""

    tokens: list[TokenOut]
    finish: Finish | None = None


@dataclass(slots=True)
class Waiting:
    """A request that is with no worker now. `next_try`: when to look again, unless room appears before."""

    since: float
    next_try: float


@dataclass(eq=False, slots=True)
class RequestState:
    """One request. The core writes; the shell reads `fresh` and `outcome` and may call `take`.

    output      ids of all output tokens so far: what a next attempt begins with
    fresh       tokens that the consumer has not taken yet
    attempt     the current one; None while waiting for a worker, and after the end
    excluded    worker → when it may be asked again for this request
    waited_s    time spent waiting for a worker since one last took the request
    routed …    instants of the stages on the router's clock; None while not reached
    outcome     the final word; set exactly once
    """

    request: Request
    received: float
    deadline: float
    output: list[int] = field(default_factory=list)
    fresh: list[TokenOut] = field(default_factory=list)
    attempt: Attempt | None = None
    attempts: int = 0
    refusals: int = 0
    losses: int = 0
    excluded: dict[str, float] = field(default_factory=dict)
    waited_s: float = 0.0
    cached_tokens: int | None = None
    fingerprint: str = ""
    """Of the workers that its first token came from; empty before."""
    ceiling: int = 0
    """Longest sequence that the last pair of workers could hold; 0 before the first."""
    routed: float | None = None
    prefill_start: float | None = None
    first_token: float | None = None
    handover_done: float | None = None
    last_token: float | None = None
    outcome: Finish | BatonError | None = None
    touched: bool = False
    story: Story = field(default_factory=Story)
    chains: dict[int, list[BlockHash]] = field(default_factory=dict)
    """Block hashes by block size, of prompt and output as they were at the last placement."""

    @property
    def position(self) -> int:
        """Absolute position of the next token."""
        return self.request.prompt_len + len(self.output)

    @property
    def complete(self) -> bool:
        """No output budget is left: the request ends by length, whoever was to say so."""
        return len(self.output) >= self.request.params.max_tokens or (
            bool(self.output) and self.position >= self.ceiling
        )

    def so_far(self, now: float) -> Request:
        """The request as the next worker gets it: with the output so far, and the time that remains."""
        prompt = self.request.tokens[: self.request.prompt_len]
        return replace(self.request, tokens=prompt + tuple(self.output), deadline_s=self.deadline - now)

    def chain(self, hasher: BlockHasher) -> list[BlockHash]:
        """Chained hashes of the full blocks of prompt and output so far."""
        chain = self.chains.get(hasher.block_size)
        if chain is None:
            tokens = self.request.tokens[: self.request.prompt_len] + tuple(self.output)
            chain = self.chains[hasher.block_size] = hasher.chain(tokens, self.request.tenant)
        return chain

    @property
    def pace(self) -> float | None:
        """Mean seconds between its tokens; None where there are fewer than two."""
        if self.first_token is None or self.last_token is None or len(self.output) < 2:
            return None
        return (self.last_token - self.first_token) / (len(self.output) - 1)

    def placed(self, attempt: Attempt, reason: str, now: float) -> None:
        """It was sent to a pair of workers."""
        self.attempt = attempt
        self.attempts += 1
        self.story.placed(attempt.prefill, reason, now)
        if self.routed is None:
            self.routed = now

    def started(self, cached_tokens: int, now: float) -> bool:
        """A worker has taken it. Returns whether it is the first."""
        self.waited_s = 0.0
        self.story.prefills(cached_tokens, now)
        if self.attempt is not None:
            self.attempt.computing = True
        if self.prefill_start is not None:
            return False
        self.prefill_start, self.cached_tokens = now, cached_tokens
        return True

    def begun(self, worker: str, now: float) -> bool:
        """The first token of an attempt came from `worker`. Returns whether it is the request's first."""
        if self.attempt is not None and worker == self.attempt.decoder:
            self.story.decodes(worker, now)
        if self.first_token is not None:
            return False
        self.first_token = now
        return True

    def take(self) -> Batch:
        """What has arrived since the last call. Raises the request's error once all tokens before it are taken."""
        tokens, self.fresh = self.fresh, []
        if isinstance(self.outcome, BatonError):
            if not tokens:
                raise self.outcome
            return Batch(tokens)
        return Batch(tokens, self.outcome)

    def finish(self, reason: FinishReason) -> Finish:
        """The final word of a request that ends well now."""
        prompt = self.request.prompt_len
        usage = Usage(prompt, min(self.cached_tokens or 0, prompt), len(self.output))
        stages = (self.routed, self.prefill_start, self.first_token, self.handover_done, self.last_token)
        return Finish(reason, usage, Timeline(*(None if at is None else at - self.received for at in stages)))
