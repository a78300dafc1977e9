"""A request's sampling parameters in the form that the kernels read, made once for each sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernels.sampling import ADDED, COLDEST, RECORD, furthest
from .sequence import Sequence

Pairs = npt.NDArray[np.void]
"""`ADDED`: tokens, and what is added to their logits."""


@dataclass(frozen=True, slots=True)
class Knobs:
    """`record`      a `RECORD` in which what changes from step to step is still open
    `greedy`      nothing to do but to take the largest logit
    `edits`       logits are changed before
    `penalised`   by what has been said so far
    `bias`        and by these pairs
    `held`        and, below length `until`, by these, which keep the request from ending
    """

    record: bytes
    greedy: bool
    edits: bool
    penalised: bool
    bias: Pairs
    held: Pairs
    until: int

    @classmethod
    def of(cls, sequence: Sequence, eos_ids: tuple[int, ...]) -> Knobs:
        params = sequence.params
        record = np.zeros(1, RECORD)
        record["seed"] = params.seed
        record["top_p"] = params.top_p
        record["presence"] = params.presence_penalty
        record["frequency"] = params.frequency_penalty
        record["temperature"] = 0.0 if params.greedy else max(params.temperature, COLDEST)
        with np.errstate(under="ignore"):
            record["repetition"] = params.repetition_penalty
        record["top_k"] = params.top_k
        record["furthest"] = furthest(params.min_p)
        record["slot"] = -1
        edits = params.penalised or bool(params.logit_bias) or params.min_tokens > 0
        return cls(
            record=record.tobytes(),
            greedy=params.greedy and not edits,
            edits=edits,
            penalised=params.penalised,
            bias=np.array(list(params.logit_bias), ADDED),
            held=np.array([(token, -np.inf) for token in eos_ids + params.stop_token_ids], ADDED),
            until=sequence.prompt_len + params.min_tokens if params.min_tokens else 0,
        )

    def added(self, length: int) -> Pairs:
        """The pairs of a row whose sequence has `length` tokens."""
        return np.concatenate((self.bias, self.held)) if length < self.until else self.bias
