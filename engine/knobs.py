"""A request's sampling parameters in the form that the kernels read, made once for each sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernels.sampling import ADDED, COLDEST, RECORD, furthest
from .sequence import Sequence

Words = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Knobs:
    """How a sequence's tokens are chosen.

    record       a `RECORD` in which what changes from step to step is still open
    greedy       nothing to do but to take the largest logit
    edits        logits are changed before
    penalised    by what has been said so far
    bias         and by what is added to them: `ADDED` pairs, a word each
    held         the same, with what keeps the request from ending below length `until`
    logprobs     how many alternatives are reported beside the token; None: not even its own log-probability
    """

    record: bytes
    greedy: bool
    edits: bool
    penalised: bool
    bias: Words
    held: Words
    until: int
    logprobs: int | None

    @classmethod
    def of(cls, sequence: Sequence, eos_ids: tuple[int, ...]) -> Knobs:
        params = sequence.params
        record = np.zeros(1, RECORD)
        record["seed"] = params.seed
        record["top_p"] = params.top_p
        record["presence"] = params.presence_penalty
        record["frequency"] = params.frequency_penalty
        record["temperature"] = 0.0 if params.greedy else max(params.temperature, COLDEST)
        record["repetition"] = params.repetition_penalty
        record["top_k"] = params.top_k
        record["furthest"] = furthest(params.min_p)
        record["slot"] = -1
        ends = [(token, -np.inf) for token in eos_ids + params.stop_token_ids]
        edits = params.penalised or bool(params.logit_bias) or params.min_tokens > 0
        return cls(
            record=record.tobytes(),
            greedy=params.greedy and not edits,
            edits=edits,
            penalised=params.penalised,
            bias=_words(params.logit_bias),
            held=_words((*params.logit_bias, *ends)),
            until=sequence.prompt_len + params.min_tokens if params.min_tokens else 0,
            logprobs=params.logprobs,
        )

    def added(self, length: int) -> Words:
        """To the logits of a row whose sequence has `length` tokens."""
        return self.held if length < self.until else self.bias


def _words(pairs: tuple[tuple[int, float], ...]) -> Words:
    return np.array(list(pairs), ADDED).view(np.int64)
