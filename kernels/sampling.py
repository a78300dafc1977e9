"""From logits to the next token, on the device: what the sampling kernels compute, in torch.

Order, row by row: repetition, presence and frequency penalty; what is added (logit bias, and -inf to hold a token
back); then the largest logit, or temperature, top_k, top_p, min_p and one draw.

Everything after the temperature is integer arithmetic, so that it does not depend on the order in which a device adds:

    distance   of a token: (largest logit - its logit) / temperature, in units of 2^-26, cut off at `FAR` (32, where a
               probability is 10^-14 of the largest). The order of tokens is the order of distances; logits that are
               less than a unit apart count as equal.
    weight     floor(exp(-distance) 2^44): the probability, up to a factor. 2^19 of the largest still fit 63 bits.

Each filter is a bound on the distance, so a row's filters together are one number. The draw inverts the cumulative
weights in the order of token ids, at a uniform number that is a pure function of (seed, position): it does not depend
on the device, on the batch, or on which worker makes it. Exponentials are computed in float64, of which devices differ
in the last bit: two devices draw unequal tokens about once in 10^11 times.

`draw` and `greedy` take the kernels (`sampling_kernels.py`) on CUDA and never wait for the device there; anywhere else
they are what stands here, which is also what the kernels are tested against.
"""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import torch

FAR = 2**31 - 1
"""Distance of all tokens whose weight is 0."""
COLDEST = 1e-5
"""Lower temperatures count as this one, which is greedy in all but name: float32 overflows before they are used up."""
HOTTEST = 1e30
"""Bound of a logit that a repetition penalty near 0 has raised, so that it stays finite at any temperature."""
UNIT = 2.0**-26
LARGEST = 2.0**44

IN_PROMPT = 1 << 15
MOST = IN_PROMPT - 1
"""An entry of a table of counts, 16 bits: how often a token is in the output, up to `MOST`, and whether it is in the
prompt. The table is int16, which torch can index and fill; the bit is its sign."""

_NEAR = 256
"""Nearest tokens that are looked at before a whole row is sorted."""
_MASK = (1 << 64) - 1

RECORD = np.dtype(
    [
        ("seed", np.uint64),
        ("top_p", np.float64),  # 1: off
        ("presence", np.float64),
        ("frequency", np.float64),
        ("temperature", np.float32),  # 0: greedy
        ("repetition", np.float32),  # 1: off
        ("top_k", np.int32),  # 0: off
        ("furthest", np.int32),  # min_p as a distance; FAR: off
        ("position", np.int32),  # of the token that is drawn
        ("slot", np.int32),  # row of the table of counts; -1: no penalties
        ("added_from", np.int32),  # which of the pairs in `added` are this row's
        ("added_to", np.int32),
    ]
)
"""What sampling has to know of a row: 64 bytes, which the kernels read by their places."""
ADDED = np.dtype([("token", np.int32), ("value", np.float32)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 52 random bits: SplitMix64's output function over (seed, position), twice."""
    return _bits(seed, position) * 2.0**-64


def furthest(min_p: float) -> int:
    """The distance at which a token is `min_p` times as probable as the best one; FAR for 0."""
    return FAR if min_p <= 0.0 else min(FAR, int(-np.log(min_p) / UNIT))


def greedy(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The largest of each row of logits [R, V] float32, and of equal ones the first: [R] int64, in `out` if given."""
    if _compiled(logits.device.type):
        from .sampling_kernels import launch_greedy

        return launch_greedy(logits, out)
    return torch.argmax(logits, dim=-1, out=out)


def draw(
    logits: torch.Tensor, records: torch.Tensor, added: torch.Tensor, counts: torch.Tensor, spare: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """One token for each row of logits, and that token counted in the row's slot: [R] int64, in `out` if given.

    logits     [R, V] float32, contiguous; overwritten
    records    [R, 8] int64: `RECORD`s; may be the first R of more
    added      [E] int64: `ADDED` pairs of all rows, in any order within a row
    counts     [slots, V] int16; updated
    spare      [at least R, V] int32, not looked at on CPU: memory for the kernels

    On CUDA it is three launches whose grids follow from R, V and the device alone, nothing waits, and no memory but
    the result's and a few kilobytes is taken: it may be captured in a graph, over whose life `records`, `added` (as
    long as its records never name more pairs than it has), `counts` and `spare` stay where they are.
    Each row is read once if it is greedy, twice if it samples, three times if it is filtered (and then its nearest
    tokens a few times more: a cost only where probability is spread over most of the vocabulary); penalties read
    their counts once, half as many bytes, and the logits of tokens that have been said.
    """
    if _compiled(logits.device.type):
        from .sampling_kernels import launch

        return launch(logits, records, added, counts, spare, out)
    knobs = records.cpu().numpy().reshape(-1).view(RECORD)[: len(logits)]
    pairs = added.cpu().numpy().view(ADDED)
    for row, knob in zip(logits, knobs, strict=True):
        if knob["slot"] >= 0:
            _penalise(row, counts[knob["slot"]], knob)
        if knob["added_to"] > knob["added_from"]:
            mine = pairs[knob["added_from"] : knob["added_to"]]
            where = torch.from_numpy(mine["token"].astype(np.int64)).to(row.device)
            row.index_add_(0, where, torch.from_numpy(mine["value"].copy()).to(row.device))
    tokens = torch.argmax(logits, dim=-1, out=out)
    for index in np.flatnonzero(knobs["temperature"]):
        tokens[index] = _draw(logits[index], int(tokens[index]), knobs[index])
    for index in np.flatnonzero(knobs["slot"] >= 0):
        entry = counts[knobs["slot"][index], tokens[index]]
        entry += (entry & MOST) < MOST
    return tokens


def fill(counts: torch.Tensor, slots: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
    """Begin rows `slots` [S] int64 of a table of counts anew: zeros but for `values` [N] int64, entries as unsigned
    numbers, at `places` [N] int64 of the flat table."""
    counts.index_fill_(0, slots, 0)
    counts.view(-1).scatter_(0, places, values.to(torch.int16))


@functools.cache
def _compiled(kind: str) -> bool:
    return kind == "cuda" and importlib.util.find_spec("triton") is not None


def _bits(seed: int, position: int) -> int:
    """The uniform number as a fraction of 2^64."""
    return _mix(_mix(seed) + position * 0x9E3779B97F4A7C15) >> 12 << 12


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _penalise(row: torch.Tensor, counts: torch.Tensor, knob: np.void) -> None:
    """Repetition looks at prompt and output (CTRL, arXiv 1909.05858, as transformers does it); presence and
    frequency at the output alone (OpenAI)."""
    seen = counts.nonzero()[:, 0]
    values, used = row[seen], counts[seen] & MOST
    repetition = torch.tensor(knob["repetition"], device=row.device)
    values = torch.where(values > 0, values / repetition, values * repetition).clamp(max=HOTTEST)
    penalty = float(knob["presence"]) + float(knob["frequency"]) * used.double()
    row[seen] = torch.where(used > 0, values - penalty.float(), values)


def _draw(row: torch.Tensor, best: int, knob: np.void) -> int:
    """One token of a row of logits [V]; `best` if no other has a weight."""
    scaled = row / torch.tensor(knob["temperature"], device=row.device)
    distances = (scaled[best].double() - scaled.double()).div_(UNIT).nan_to_num_(FAR, FAR).clamp_(max=FAR).int()
    bound = _bound(distances, knob)
    if bound < FAR:
        kept = (distances <= bound).nonzero()[:, 0]
        distances = distances[kept]
    cumulative = _weights(distances).cumsum(dim=0)
    total = int(cumulative[-1]) if len(cumulative) else 0
    if total == 0:
        return best
    point = _bits(int(knob["seed"]), int(knob["position"])) * total >> 64  # below the total
    index = int(torch.searchsorted(cumulative, point, right=True))
    return int(kept[index]) if bound < FAR else index


def _weights(distances: torch.Tensor) -> torch.Tensor:
    return distances.double().mul_(-UNIT).exp_().mul_(LARGEST).long()


def _bound(distances: torch.Tensor, knob: np.void) -> int:
    """The largest distance [V] of a token that top_k, then top_p, and min_p leave. Tokens as near as the last one of
    the k, or of the nucleus (the smallest set of nearest tokens that reaches top_p: Holtzman et al., arXiv
    1904.09751), belong to it."""
    bound, top_k, top_p = int(knob["furthest"]), int(knob["top_k"]), float(knob["top_p"])
    limited = 0 < top_k < len(distances)
    if not limited and top_p == 1.0:
        return bound
    near = distances.topk(min(max(top_k, _NEAR), len(distances)), largest=False).values
    if limited:
        last = int(near[top_k - 1])
        bound = min(bound, last)
        if top_p == 1.0:
            return bound
        if near[-1] == last:  # there may be more that are as near
            near = distances.sort().values
        near = near[near <= last]
    total = _weights(near if limited else distances).sum()
    target = int(np.ceil(top_p * float(total)))
    reached = _weights(near).cumsum(dim=0)
    if reached[-1] < target:
        near = distances.sort().values
        reached = _weights(near).cumsum(dim=0)
    return min(bound, int(near[torch.searchsorted(reached, target)]))
