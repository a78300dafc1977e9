"""What a request is: the values every process agrees on.

All types are frozen; a request that is tried again is the same `Request` with more tokens, under a new ticket.
Token positions are absolute: position 0 is the first prompt token, `prompt_len` the first output token.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from .errors import InvalidRequest

MAX_LOGPROBS = 20
"""Most alternatives a client may ask for at each position (OpenAI's limit)."""


class Role(enum.StrEnum):
    """What a worker does: the set of planners it runs."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"

    @property
    def prefills(self) -> bool:
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class FinishReason(enum.StrEnum):
    """Why a request ended well; OpenAI's `finish_reason`."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How output tokens are chosen. `seed` is resolved before a request leaves the gateway, so that any worker that
    takes the request over draws the same numbers: randomness is a pure function of (seed, position).

    temperature 0 is greedy. top_k 0 and top_p 1 switch those filters off. `logprobs` None asks for none, k asks for
    the chosen token's log-probability and the k best alternatives.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def validate(self, vocab_size: int) -> None:
        """Raise `InvalidRequest`, naming the parameter, where a value is out of its range."""
        unknown = f"a token id not in 0..{vocab_size - 1}"
        checks = (
            ("max_tokens", self.max_tokens >= 1, "must be at least 1"),
            ("temperature", 0.0 <= self.temperature <= 2.0, "must be between 0 and 2"),
            ("top_p", 0.0 < self.top_p <= 1.0, "must be above 0 and at most 1"),
            ("top_k", 0 <= self.top_k < 2**31, "must be 0 (off) or more"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "must be between 0 and 1"),
            ("seed", 0 <= self.seed < 2**64, "must fit 64 bits"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "must be between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "must be between -2 and 2"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 10.0, "must be above 0 and at most 10"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "must be between 0 and max_tokens"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"must be 0 to {MAX_LOGPROBS}"),
            ("logit_bias", all(0 <= t < vocab_size for t, _ in self.logit_bias), f"has {unknown}"),
            ("logit_bias", all(-100 <= b <= 100 for _, b in self.logit_bias), "must have values between -100 and 100"),
            ("stop_token_ids", all(0 <= t < vocab_size for t in self.stop_token_ids), f"has {unknown}"),
        )
        for name, ok, why in checks:
            if not ok:  # a NaN fails every comparison and lands here too
                raise InvalidRequest(f"{name} {why}", param=name)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued, as it travels from router to worker and from worker to worker.

    `tokens` is the prompt followed by any output that earlier attempts produced; `prompt_len` is the boundary.
    `deadline_s` is the time that remains, in seconds, never an instant: clocks differ between hosts.
    """

    request_id: str
    tokens: tuple[int, ...]
    prompt_len: int
    params: SamplingParams
    tenant: str = ""
    priority: int = 0
    deadline_s: float = 600.0

    def validate(self, vocab_size: int) -> None:
        """Raises `InvalidRequest` where a value is out of range: in the engine it would cost a whole step."""
        if self.tokens and max(self.tokens) >= vocab_size:
            raise InvalidRequest(f"a token that is none of the model's {vocab_size}")
        self.params.validate(vocab_size)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of the chosen token, and of the best alternatives (token, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timeline:
    """Seconds since the router received the request, at each stage; None while a stage has not been reached.

    Stages on other processes are durations measured there and laid out on the router's clock, because clocks differ.
    The idea of a request's timestamps at every stage is DistServe's.
    """

    routed: float | None = None
    prefill_start: float | None = None
    first_token: float | None = None
    handover_done: float | None = None
    last_token: float | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one finished request. `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class WorkerRef:
    """Which worker is meant: its name, where it listens, and which incarnation of it. A message to an older or
    newer `epoch` is refused with `StaleEpoch`."""

    name: str
    address: str
    epoch: int


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself in the handshake. `fingerprint` covers weights, KV layout, dtype and numeric
    choices; workers whose fingerprints differ never hand over. Rates are 0 until measured."""

    ref: WorkerRef
    role: Role
    fingerprint: str
    model: str
    block_size: int
    total_blocks: int
    max_model_len: int
    kv_bytes_per_token: int
    vocab_size: int
    host: str = ""
    pid: int = 0
    labels: tuple[tuple[str, str], ...] = field(default=())
