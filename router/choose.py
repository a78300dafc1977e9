"""Where a request goes: the pair of workers with the least predicted cost, in seconds. Pure.

    queue       prompt tokens that wait at the prefill worker, over its rate
    compute     prompt tokens that it does not cache, over its rate
    transfer    KV bytes that the decode worker does not cache, over the measured bandwidth
    decode      how long the request's first tokens take there, and how much it slows those that run there already
    room        a penalty where KV blocks are short; a decode worker that can not hold the prompt is out

Prefix affinity is no rule of its own: a cached prefix is compute saved, and it wins exactly until the queue in front
of it costs more. A prefix that everyone shares therefore spreads over the workers as load grows, and under imbalance
affinity fades instead of being switched off. The pair comes apart into two independent choices, because no term
depends on both workers; so the work is linear in the number of workers. (Cost-based placement over cache and load:
Preble, Mooncake, Dynamo.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..common.messages import Load
from ..common.types import Role
from .fleet import Worker

T = TypeVar("T")

DEFAULT_PREFILL_RATE = 1000.0
"""Tokens a second of a worker while no worker has measured its own."""
DEFAULT_BANDWIDTH = 0.5e9
"""Bytes a second of a handover until one has been measured."""
DEFAULT_STEP_S = 0.02
"""Seconds of a decode step until one has been measured."""
DECODE_HORIZON = 64
"""Output tokens that the decode term looks ahead: how long a request will run is not known."""
BATCH_SLOPE = 1 / 32
"""Growth of a decode step with each request in the batch, as a share of the step of one."""
SHORT_OF_ROOM_S = 10.0
"""What it costs to be placed where a running request will have to be preempted."""
TIE = 1e-6
"""Costs that differ by less, in seconds, are equal and take turns."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be placed: its tokens (prompt and output so far) and how many more it may produce."""

    tokens: int
    max_new: int


@dataclass(frozen=True, slots=True)
class Choice:
    """A pair, and why. `decode` None: the prefill worker decodes as well. `uncached` tokens are left to compute."""

    prefill: Worker
    decode: Worker | None
    cost_s: float
    cached: int
    uncached: int
    reason: str
    """cold: nobody caches any of it; prefix: the best match was taken; load: the best match was too busy."""


@dataclass(frozen=True, slots=True)
class _Rates:
    """Measured by the fleet; a worker that has measured nothing yet is taken for an average one."""

    prefill: float
    bandwidth: float
    step_s: float

    @classmethod
    def of(cls, workers: Sequence[Worker]) -> _Rates:
        loads = [w.load for w in workers if w.load]
        step_s = _mean([load.decode_step_s for load in loads], DEFAULT_STEP_S)
        # What hides behind compute costs nobody; and each commit waits for a decode step to end, however few its bytes.
        seconds = sum(load.handover_exposed_seconds - load.handovers * step_s for load in loads)
        moved = sum(load.handover_bytes for load in loads)
        return cls(
            _mean([load.prefill_tokens_per_s for load in loads], DEFAULT_PREFILL_RATE),
            moved / seconds if seconds > 0 and moved > 0 else DEFAULT_BANDWIDTH,
            _mean([_alone(load) for load in loads], DEFAULT_STEP_S),
        )


def choose(workers: Sequence[Worker], demand: Demand, cached: Mapping[str, int], turn: int) -> Choice | None:
    """The cheapest pair among usable `workers`, or None where none has room.

    cached   worker → tokens of the demand that it caches
    turn     any number that grows with each choice: equal costs take turns by it
    """
    rates = _Rates.of(workers)
    fitting = [w for w in workers if demand.tokens < w.longest]
    options: list[tuple[float, Worker, Worker | None]] = []
    for fingerprint in dict.fromkeys(w.info.fingerprint for w in fitting):
        group = [w for w in fitting if w.info.fingerprint == fingerprint]
        sources = [(_prefill_cost(w, demand, cached, rates), w) for w in group if w.info.role is Role.PREFILL]
        targets = [
            (_transfer_cost(w, demand, cached, rates) + _decode_cost(w, demand, rates), w)
            for w in group
            if w.info.role is Role.DECODE and _missing_blocks(w, demand.tokens, cached) <= w.available_blocks
        ]
        if sources and targets:
            (source_cost, source), (target_cost, target) = _cheapest(sources, turn), _cheapest(targets, turn)
            options.append((source_cost + target_cost, source, target))
        options += [
            (_prefill_cost(w, demand, cached, rates) + _decode_cost(w, demand, rates), w, None)
            for w in group
            if w.info.role is Role.COLOCATED
        ]
    if not options:
        return None
    cost, (_, source, decode) = _cheapest([(option[0], option) for option in options], turn)
    uncached = _uncached(source, demand, cached)
    return Choice(source, decode, cost, demand.tokens - uncached, uncached, _reason(source, fitting, cached))


def choose_decode(workers: Sequence[Worker], demand: Demand, turn: int) -> Worker | None:
    """The worker on which a request that runs elsewhere would best go on; None where none has room."""
    rates = _Rates.of(workers)
    fitting = [w for w in workers if w.info.role.decodes and demand.tokens < w.longest]
    roomy = [w for w in fitting if _missing_blocks(w, demand.tokens, {}) <= w.available_blocks]
    options = [(_decode_cost(w, demand, rates), w) for w in roomy]
    return _cheapest(options, turn)[1] if options else None


def _prefill_cost(worker: Worker, demand: Demand, cached: Mapping[str, int], rates: _Rates) -> float:
    rate = (worker.load.prefill_tokens_per_s if worker.load else 0.0) or rates.prefill
    return (worker.queued_tokens + _uncached(worker, demand, cached)) / rate


def _transfer_cost(worker: Worker, demand: Demand, cached: Mapping[str, int], rates: _Rates) -> float:
    missing = demand.tokens - cached.get(worker.name, 0)
    return missing * worker.info.kv_bytes_per_token / rates.bandwidth


def _decode_cost(worker: Worker, demand: Demand, rates: _Rates) -> float:
    running = worker.batch
    alone = (_alone(worker.load) if worker.load else 0.0) or rates.step_s
    mine = alone * (1 + BATCH_SLOPE * (running + 1))
    theirs = alone * BATCH_SLOPE * running
    ahead = min(demand.max_new, DECODE_HORIZON)
    short = _missing_blocks(worker, demand.tokens + ahead, {}) > worker.available_blocks
    return ahead * (mine + theirs) + (SHORT_OF_ROOM_S if short else 0.0)


def _alone(load: Load) -> float:
    """Seconds of a step that decodes next to nothing; 0 until one has been measured. What was measured is the step of
    some batch, and an idle worker must not be taken for as slow as it was when it was full."""
    return load.decode_step_s / (1 + BATCH_SLOPE * load.decode_batch)


def _uncached(worker: Worker, demand: Demand, cached: Mapping[str, int]) -> int:
    """At least one: the last token is always computed, since the next one is sampled from it."""
    return max(1, demand.tokens - cached.get(worker.name, 0))


def _missing_blocks(worker: Worker, tokens: int, cached: Mapping[str, int]) -> int:
    size = worker.info.block_size
    return -(-tokens // size) - cached.get(worker.name, 0) // size


def _reason(chosen: Worker, workers: Sequence[Worker], cached: Mapping[str, int]) -> str:
    best = max((cached.get(w.name, 0) for w in workers if w.info.role.prefills), default=0)
    if best == 0:
        return "cold"
    return "prefix" if cached.get(chosen.name, 0) == best else "load"


def _cheapest(costed: Sequence[tuple[float, T]], turn: int) -> tuple[float, T]:
    least = min(cost for cost, _ in costed)
    ties = [option for option in costed if option[0] <= least + TIE]
    return ties[turn % len(ties)]


def _mean(values: Sequence[float], default: float) -> float:
    measured = [value for value in values if value > 0]
    return sum(measured) / len(measured) if measured else default
