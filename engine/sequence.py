"""A request while a worker holds it."""

from __future__ import annotations

import sys
from array import array
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

from ..common.hashing import BlockHash
from ..common.types import FinishReason, Request, SamplingParams

if TYPE_CHECKING:  # planners and the simulator load no torch
    from .knobs import Knobs

SequenceKey = tuple[str, int]
"""(router, ticket): one attempt of one request, unique on a worker."""


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens, and how far their KV is computed.

    tokens        prompt and output so far, as far as they are known; KV exists for tokens[:computed]. Always the same
                  list, and only ever added to
    prompt_len    boundary between prompt and output (an earlier attempt's output lies beyond it)
    blocks        ids of the KV blocks that hold positions [i * block_size, (i + 1) * block_size); an array of int32, so
                  that a step's block table is one join of bytes
    hashes        chained hashes of the leading full blocks, as far as they were needed
    computed      number of leading tokens whose KV is in the pool: steps that have ended computed it
    launched      the same, but counting what launched steps are computing as well: launched >= computed
    pending       tokens that launched steps draw and nobody knows yet; none or one when a step is planned
    limit         length at which the request ends, whatever is drawn: by max_tokens, or by `max_model_len`
    ends          tokens that end the request, once it has `ends_from` of them: the model's `eos_ids` and its own
    deadline      on the worker's own clock, seconds
    knobs         what the sampler made of `params`

    What is asked of a request at every token (`limit`, `ends`) is kept here, so that no step walks through requests and
    their parameters: after a step's wait for the device, each object that is touched has to come from memory.
    """

    key: SequenceKey
    request: Request
    attempt: int
    arrival: float
    deadline: float
    tokens: list[int] = field(default_factory=list)
    blocks: array[int] = field(default_factory=lambda: array("i"))
    hashes: list[BlockHash] = field(default_factory=list)
    computed: int = 0
    launched: int = 0
    pending: int = 0
    cached: int = 0
    preemptions: int = 0
    limit: int = 0
    ends: frozenset[int] = frozenset()
    ends_from: int = 0
    knobs: Knobs | None = None
    max_model_len: InitVar[int] = sys.maxsize
    eos_ids: InitVar[frozenset[int]] = frozenset()

    def __post_init__(self, max_model_len: int, eos_ids: frozenset[int]) -> None:
        prompt_len, params = self.request.prompt_len, self.request.params
        self.tokens = list(self.request.tokens)
        self.limit = min(prompt_len + params.max_tokens, max_model_len)
        ends = frozenset() if params.ignore_eos else eos_ids
        self.ends = ends.union(params.stop_token_ids) if params.stop_token_ids else ends
        self.ends_from = prompt_len + params.min_tokens

    def accept(self, token: int) -> FinishReason | None:
        """Append a token; say why the request ends with it, None if it goes on."""
        self.tokens.append(token)
        return self.ended

    @property
    def ended(self) -> FinishReason | None:
        """Why the request ends with the last of its tokens; None: it goes on."""
        tokens = self.tokens
        length = len(tokens)
        if tokens[-1] in self.ends and length >= self.ends_from:
            return FinishReason.STOP
        return FinishReason.LENGTH if length >= self.limit else None

    @property
    def prompt_len(self) -> int:
        return self.request.prompt_len

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def output_len(self) -> int:
        """Output tokens so far, earlier attempts' included."""
        return len(self.tokens) - self.prompt_len

    @property
    def length(self) -> int:
        """Tokens so far, pending ones included."""
        return len(self.tokens) + self.pending

    @property
    def missing(self) -> int:
        """Tokens whose KV no step computes yet, and that the next one to be sampled waits for."""
        return self.length - self.launched

    @property
    def in_flight(self) -> bool:
        """Whether a launched step computes something of it."""
        return self.launched > self.computed

    @property
    def named(self) -> dict[str, str]:
        """`extra` of a log line about this request."""
        return {"request_id": self.request.request_id}
