"""From logits to the next token.

Order, row by row: repetition, presence and frequency penalty; logit_bias; end tokens masked below min_tokens; then
greedy, or temperature, top_k, top_p, min_p and one draw. The draw inverts the cumulative distribution at a uniform
number that is a pure function of (seed, position), so it does not depend on the device, on the batch, or on which
worker makes it. Reported log-probabilities are of the model's own distribution: log_softmax of the untouched logits.
"""

from __future__ import annotations

from collections.abc import Sequence as Rowwise

import numpy as np
import torch

from ..common.types import TokenLogprob
from .plan import Sampled
from .sequence import Sequence

_MASK = (1 << 64) - 1
_COLDEST = 1e-5
"""Lower temperatures count as this one, which is greedy in all but name: float32 overflows before they are used up."""
_HOTTEST = 1e30
"""Bound of a logit that a repetition penalty near 0 has raised, so that it stays finite at any temperature."""
_NUCLEUS = 256
"""Most probable tokens that are looked at before a whole row is sorted for top_p."""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 52 random bits: SplitMix64's output function over (seed, position), twice."""
    return (_mix(_mix(seed) + position * 0x9E3779B97F4A7C15) >> 12) * 2.0**-52


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Sampler:
    """`eos_ids` are what min_tokens holds back, beside a request's own stop token ids."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos = tuple(sorted(eos_ids))

    def sample(self, logits: torch.Tensor, sequences: Rowwise[Sequence]) -> list[Sampled]:
        """One token for each row of logits [R, V] float32, which are overwritten; `sequences[r]` owns row r."""
        wants = [s.params.logprobs is not None for s in sequences]
        raw = logits.clone() if any(wants) else logits
        for row, sequence in enumerate(sequences):
            if _edits(sequence):
                self._edit(logits[row], sequence)
        tokens = logits.argmax(dim=-1).tolist()
        drawn = [row for row, s in enumerate(sequences) if not s.params.greedy]
        if drawn:
            for row, token in zip(drawn, _draw(logits[drawn], [sequences[row] for row in drawn]), strict=True):
                tokens[row] = token
        logprobs: list[TokenLogprob | None] = [None] * len(tokens)
        for row in (row for row, want in enumerate(wants) if want):
            logprobs[row] = _logprob(raw[row], tokens[row], sequences[row].params.logprobs or 0)
        return [Sampled(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]

    def _edit(self, row: torch.Tensor, sequence: Sequence) -> None:
        params = sequence.params
        if params.penalised:
            _penalise(row, sequence)
        if params.logit_bias:
            tokens, biases = zip(*params.logit_bias, strict=True)
            row.index_add_(0, _index(tokens, row), torch.tensor(biases, dtype=row.dtype, device=row.device))
        if sequence.output_len < params.min_tokens:
            held = self._eos + params.stop_token_ids
            row.index_fill_(0, _index(held, row), float("-inf"))


def _edits(sequence: Sequence) -> bool:
    params = sequence.params
    return params.penalised or bool(params.logit_bias) or sequence.output_len < params.min_tokens


def _index(tokens: Rowwise[int], row: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=row.device)


def _penalise(row: torch.Tensor, sequence: Sequence) -> None:
    """Repetition looks at prompt and output (CTRL, arXiv 1909.05858, as transformers does it); presence and
    frequency at the output alone (OpenAI)."""
    params = sequence.params
    if params.repetition_penalty != 1.0:
        seen = _index(sorted(set(sequence.tokens)), row)
        values = row[seen]
        scaled = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        row[seen] = scaled.clamp(max=_HOTTEST)
    output = sequence.tokens[sequence.prompt_len :]
    if output and (params.presence_penalty or params.frequency_penalty):
        distinct, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
        penalty = params.presence_penalty + params.frequency_penalty * counts
        where = torch.from_numpy(distinct).to(row.device)
        row[where] -= torch.from_numpy(penalty).to(row)


def _draw(logits: torch.Tensor, sequences: Rowwise[Sequence]) -> list[int]:
    """One token for each row of logits [R, V], all of which sample."""
    params = [s.params for s in sequences]
    device = logits.device
    temperatures = torch.tensor([max(p.temperature, _COLDEST) for p in params], dtype=logits.dtype, device=device)
    logits = logits / temperatures[:, None]
    for row, p in enumerate(params):
        if p.top_k and p.top_k < logits.shape[1]:
            least = logits[row].topk(p.top_k).values[-1]
            logits[row].masked_fill_(logits[row] < least, float("-inf"))
    probs = torch.softmax(logits, dim=-1, dtype=torch.float64)
    for row, p in enumerate(params):
        if p.top_p < 1.0:
            probs[row].masked_fill_(probs[row] < _nucleus_floor(probs[row], p.top_p), 0.0)
        if p.min_p > 0.0:
            probs[row].masked_fill_(probs[row] < p.min_p * probs[row].max(), 0.0)
    # The first token whose cumulative probability exceeds u; u below the total by construction, also after rounding.
    cumulative = probs.cumsum(dim=-1)
    points = torch.tensor(
        [uniform(s.params.seed, len(s.tokens)) for s in sequences], dtype=torch.float64, device=device
    )
    targets = points * cumulative[:, -1]
    chosen: list[int] = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0].tolist()
    return chosen


def _nucleus_floor(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probability of the last token of the nucleus: the smallest set of most probable tokens that reaches top_p
    (Holtzman et al., arXiv 1904.09751). probs [V] → scalar. Tokens as probable as the last one belong to it."""
    best = probs.topk(min(_NUCLEUS, len(probs))).values
    if best.sum() < top_p:
        best = probs.sort(descending=True).values
    before = best.cumsum(dim=0) - best
    return best[before < top_p].min()


def _logprob(row: torch.Tensor, token: int, alternatives: int) -> TokenLogprob:
    logprobs = torch.log_softmax(row, dim=-1)
    best = logprobs.topk(alternatives)
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(float(logprobs[token]), top)
