"""Triton kernels for `sampling.py`, whose module docstring says what they compute.

`_edit` applies penalties and what is added, one program a row; `_survey` finds the largest logit, several programs a
row where there are few rows; `_draw`, one program a row, does the rest.

`_draw` looks for the bound that top_k or top_p sets by cutting the range of distances into 16 and adding up what lies
below each cut: four bits of the bound in one pass over the row. After the first pass it keeps only the tokens below the
cut that the bound lies under, at the beginning of the row's own memory. Those are a few hundred where a model is sure
of what it says, so the remaining passes cost nothing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# A kernel's parameters have Triton's types.

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .sampling import FAR, HOTTEST, LARGEST, MOST, UNIT

_FAR = tl.constexpr(FAR)
_HOTTEST = tl.constexpr(HOTTEST)
_LARGEST = tl.constexpr(LARGEST)
_MOST = tl.constexpr(MOST)
_UNIT = tl.constexpr(UNIT)
_ENTRY = tl.constexpr(0xFFFF)

# Places in a `RECORD`, in words of 64 and of 32 bits.
_SEED, _TOP_P, _PRESENCE, _FREQUENCY = (tl.constexpr(word) for word in range(4))
_TEMPERATURE, _REPETITION, _TOP_K, _FURTHEST = (tl.constexpr(word) for word in range(8, 12))
_POSITION, _SLOT, _ADDED_FROM, _ADDED_TO = (tl.constexpr(word) for word in range(12, 16))
_WORDS = tl.constexpr(8)
_HALVES = tl.constexpr(16)

_CUTS = tl.constexpr(16)
TILE = 2048
"""Tokens that a program reads at a time."""
BLOCK = 512
"""Those that it holds against 16 cuts at a time."""
WARPS, SURVEY_WARPS = 16, 8
_MOST_PARTS = 32
_PARTS_OF_A_MULTIPROCESSOR = 2


def launch_greedy(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See `sampling.greedy`."""
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device) if out is None else out
    if len(logits):
        best, where, parts = _surveyed(logits)
        _first[(len(logits),)](best, where, tokens, parts, num_warps=1)
    return tokens


def launch(
    logits: torch.Tensor, records: torch.Tensor, added: torch.Tensor, counts: torch.Tensor, spare: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """See `sampling.draw`."""
    rows, size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    if rows == 0:
        return tokens
    doubles, ints, floats = (records.view(kind) for kind in (torch.float64, torch.int32, torch.float32))
    _edit[(rows,)](
        logits, doubles, ints, floats, added, counts, size, TILE, num_warps=WARPS
    )  # fmt: skip
    best, where, parts = _surveyed(logits)
    _draw[(rows,)](
        logits, logits.view(torch.int32), spare, records, doubles, ints, floats, counts, best, where, tokens, size,
        parts, TILE, triton.next_power_of_2(-(-size // TILE)), BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return tokens


def _surveyed(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Largest logit of each part of each row [R, parts], where it is, and the number of parts."""
    rows, size = logits.shape
    wanted = -(-_PARTS_OF_A_MULTIPROCESSOR * _multiprocessors(logits.device) // rows)
    parts = min(triton.next_power_of_2(wanted), triton.next_power_of_2(-(-size // TILE)), _MOST_PARTS)
    best = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    where = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    share = -(-size // (parts * TILE)) * TILE
    _survey[(rows, parts)](logits, best, where, size, share, TILE, num_warps=SURVEY_WARPS)
    return best, where, parts


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _edit(logits, doubles, ints, floats, added, counts, size, TILE: tl.constexpr):
    """Penalties by the row's counts, then what is added to single logits."""
    row = tl.program_id(0).to(tl.int64)
    mine = logits + row * size
    slot = tl.load(ints + row * _HALVES + _SLOT).to(tl.int64)
    if slot >= 0:
        repetition = tl.load(floats + row * _HALVES + _REPETITION)
        presence = tl.load(doubles + row * _WORDS + _PRESENCE)
        frequency = tl.load(doubles + row * _WORDS + _FREQUENCY)
        for start in range(0, size, TILE):
            at = start + tl.arange(0, TILE)
            entry = tl.load(counts + slot * size + at, mask=at < size, other=0).to(tl.int32) & _ENTRY
            used = entry & _MOST
            x = tl.load(mine + at, mask=entry != 0, other=0.0)
            scaled = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition)
            scaled = tl.minimum(scaled, _HOTTEST)
            penalty = (presence + frequency * used.to(tl.float64)).to(tl.float32)
            tl.store(mine + at, tl.where(used > 0, scaled - penalty, scaled), mask=entry != 0)
        tl.debug_barrier()
    end = tl.load(ints + row * _HALVES + _ADDED_TO)
    for start in range(tl.load(ints + row * _HALVES + _ADDED_FROM), end, 512):
        at = start + tl.arange(0, 512)
        pair = tl.load(added + at, mask=at < end, other=0)
        value = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        tl.atomic_add(mine + (pair & 0xFFFFFFFF), value, mask=at < end, sem="relaxed")


@triton.jit
def _survey(logits, best, where, size, share, TILE: tl.constexpr):
    """The largest of one part of a row, and its first place. A NaN is never the largest."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * share
    lane = tl.arange(0, TILE)
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    place = begin + lane
    for start in range(begin, min(begin + share, size), TILE):
        at = start + lane
        x = tl.load(logits + row * size + at, mask=at < size, other=float("-inf"))
        place = tl.where(x > largest, at, place)
        largest = tl.maximum(largest, x)
    top = tl.max(largest, 0)
    to = row * tl.num_programs(1) + part
    tl.store(best + to, top)
    tl.store(where + to, tl.min(tl.where(largest == top, place, 0x7FFFFFFF), 0))


@triton.jit
def _best(best, where, row, parts):
    """A row's largest logit, and its first place."""
    part = tl.arange(0, 32)
    largest = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
    place = tl.load(where + row * parts + part, mask=part < parts, other=0x7FFFFFFF)
    top = tl.max(largest, 0)
    return top, tl.min(tl.where(largest == top, place, 0x7FFFFFFF), 0)


@triton.jit(do_not_specialize=["parts"])
def _first(best, where, tokens, parts):
    """The greedy token of a row."""
    row = tl.program_id(0)
    _, token = _best(best, where, row, parts)
    tl.store(tokens + row, token.to(tl.int64))


@triton.jit(do_not_specialize=["parts"])  # or a batch that has 1 would be compiled for, while others wait
def _draw(
    logits, near, spare, words, doubles, ints, floats, counts, best, where, tokens, size, parts,
    TILE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's token. `near` is the memory of `logits` as int32, where the distances of the tokens that may be drawn
    take the place of the logits once these have been read; `spare` then says which tokens they are."""
    row = tl.program_id(0).to(tl.int64)
    top, token = _best(best, where, row, parts)
    temperature = tl.load(floats + row * _HALVES + _TEMPERATURE)
    if temperature > 0.0:
        logits, near, spare = logits + row * size, near + row * size, spare + row * size
        top = tl.div_rn(top, temperature)
        top_k = tl.load(ints + row * _HALVES + _TOP_K)
        top_k = tl.where(top_k < size, top_k, 0)
        top_p = tl.load(doubles + row * _WORDS + _TOP_P)
        bound = tl.load(ints + row * _HALVES + _FURTHEST).to(tl.int64)
        bits = _bits(tl.load(words + row * _WORDS + _SEED), tl.load(ints + row * _HALVES + _POSITION))
        if (top_k > 0) | (top_p < 1.0):
            by_count = top_k > 0
            cuts = (tl.arange(0, _CUTS).to(tl.int64) + 1) * ((_FAR + 1) // _CUTS) - 1
            below = _below(logits, size, cuts, by_count, top, temperature, False, BLOCK)
            target = tl.where(by_count, top_k.to(tl.int64), _share(top_p, tl.max(below, 0)))
            low, high, least, most = _between(cuts, below, target, 0, _FAR, 0, tl.max(below, 0))
            count = _gather(logits, near, spare, size, high, top, temperature, TILE)
            last = _search(near, count, low, high, least, most, target, by_count, BLOCK)
            if by_count & (top_p < 1.0):
                total = tl.sum(_sums(near, count, last, top, temperature, True, TILE, TILES), 0)
                last = _search(near, count, 0, last, 0, total, _share(top_p, total), False, BLOCK)
            bound = tl.minimum(bound, last)
            index = _pick(near, count, bound, bits, top, temperature, True, TILE, TILES)
            if index >= 0:
                token = tl.load(spare + index)
        else:
            index = _pick(logits, size, bound, bits, top, temperature, False, TILE, TILES)
            token = tl.where(index >= 0, index, token)
    tl.store(tokens + row, token.to(tl.int64))
    slot = tl.load(ints + row * _HALVES + _SLOT).to(tl.int64)
    if slot >= 0:
        entry = tl.load(counts + slot * size + token).to(tl.int32) & _ENTRY
        tl.store(counts + slot * size + token, (entry + ((entry & _MOST) < _MOST)).to(tl.int16))


@triton.jit
def _distances(values, at, size, top, temperature, READY: tl.constexpr):
    """Of the tokens at `at`; from logits, or as they lie in memory where they are `READY`. FAR beyond `size`."""
    if READY:
        distances = tl.load(values + at, mask=at < size, other=_FAR)
    else:
        x = tl.load(values + at, mask=at < size, other=float("-inf"))
        x = tl.div_rn(x, tl.zeros_like(x) + temperature)
        far = (top.to(tl.float64) - x.to(tl.float64)) * (1.0 / _UNIT)
        distances = tl.where(far < _FAR, far, _FAR).to(tl.int32)  # also where it is not a number
    return distances


@triton.jit
def _weights(distances):
    return (tl.exp(distances.to(tl.float64) * -_UNIT) * _LARGEST).to(tl.int64)


@triton.jit
def _share(top_p, total):
    """The cumulative weight that a nucleus has to reach."""
    return tl.minimum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), total)


@triton.jit
def _below(values, size, cuts, by_count, top, temperature, READY: tl.constexpr, BLOCK: tl.constexpr):
    """Number, or weight, of the tokens whose distance is at most each of `cuts` [16] int64."""
    sums = tl.zeros((BLOCK, _CUTS), tl.int64)
    cuts = cuts.to(tl.int32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        distances = _distances(values, at, size, top, temperature, READY)
        if by_count:  # noqa: SIM108, not in a kernel
            mass = (at < size).to(tl.int64)
        else:
            mass = _weights(distances)
        sums += tl.where(distances[:, None] <= cuts[None, :], mass[:, None], 0)
    return tl.sum(sums, 0)


@triton.jit
def _between(cuts, below, target, low, high, least, most):
    """Between which cuts `target` is reached: first and last distance, and what lies below the first and the next."""
    reached = below >= target
    first = tl.max(tl.where(reached, low, cuts + 1), 0)
    last = tl.min(tl.where(reached, cuts, high), 0)
    return first, last, tl.max(tl.where(reached, least, below), 0), tl.min(tl.where(reached, below, most), 0)


@triton.jit
def _search(near, count, low, high, least, most, target, by_count, BLOCK: tl.constexpr):
    """A distance that parts the tokens within which `target` is reached from the others. Known is that it is reached in
    low … high, and that `least` lies below `low` and `most` within `high`: all is known where that leaves one token."""
    low, high = low + tl.zeros((), tl.int64), high + tl.zeros((), tl.int64)
    least, most = least + tl.zeros((), tl.int64), most + tl.zeros((), tl.int64)
    while (low < high) & (most - least >= 2 * tl.where(by_count, 1, _weights(high))):
        cuts = low + ((high - low + 1) * (tl.arange(0, _CUTS) + 1) // _CUTS) - 1
        below = _below(near, count, cuts, by_count, 0.0, 1.0, True, BLOCK)
        low, high, least, most = _between(cuts, below, target, low, high, least, most)
    return high


@triton.jit
def _gather(logits, near, spare, size, bound, top, temperature, TILE: tl.constexpr):
    """Distances and ids of the tokens within `bound`, in the order of ids; how many they are. They come to lie at or
    before the place of their logit, and a tile is read before any of it is written: the running sum needs it all."""
    count = 0
    for start in range(0, size, TILE):
        at = start + tl.arange(0, TILE)
        distances = _distances(logits, at, size, top, temperature, False)
        kept = (distances <= bound) & (at < size)
        to = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(near + to, distances, mask=kept)
        tl.store(spare + to, at, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()  # what some threads have written, others read
    return count


@triton.jit
def _sums(values, size, bound, top, temperature, READY: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Weight of the tokens within `bound`, tile by tile: [TILES]."""
    sums = tl.zeros((TILES,), tl.int64)
    for tile in range(tl.cdiv(size, TILE)):
        distances = _distances(values, tile * TILE + tl.arange(0, TILE), size, top, temperature, READY)
        mass = tl.sum(tl.where(distances <= bound, _weights(distances), 0), 0)
        sums = tl.where(tl.arange(0, TILES) == tile, mass, sums)
    return sums


@triton.jit
def _pick(
    values, size, bound, bits, top, temperature, READY: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """The first token within `bound` up to which the weights exceed their total times `bits` / 2^64; -1 if all are 0.
    First the tile, then the token in it."""
    sums = _sums(values, size, bound, top, temperature, READY, TILE, TILES)
    total = tl.sum(sums, 0)
    point = tl.umulhi(bits, total.to(tl.uint64)).to(tl.int64)
    index = -1
    if total > 0:
        ends = tl.cumsum(sums, 0)
        tile = tl.sum((ends <= point).to(tl.int32), 0)
        before = tl.max(tl.where(ends <= point, ends, 0), 0)
        distances = _distances(values, tile * TILE + tl.arange(0, TILE), size, top, temperature, READY)
        weights = tl.where(distances <= bound, _weights(distances), 0)
        index = tile * TILE + tl.sum((before + tl.cumsum(weights, 0) <= point).to(tl.int32), 0)
    return index


@triton.jit
def _bits(seed, position):
    """`sampling._bits`."""
    return _mix(_mix(seed.to(tl.uint64, bitcast=True)) + position.to(tl.uint64) * 0x9E3779B97F4A7C15) >> 12 << 12


@triton.jit
def _mix(value):
    value += 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)
