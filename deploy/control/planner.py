"""How many prefill and how many decode workers there should be: a pure function of what was observed. The controller
calls it at each interval, and the simulator does the same in virtual time (`baton bench autoscale`).

Each role's need is worked out as a number of workers, with fractions; then the split is chosen, then the size.

    prefill   tokens to compute in a second, those that queue included, over what one worker may take so that its queue
              keeps to the TTFT
    decode    requests that decode now, over the batch at which a step keeps to the TPOT; tokens a second, over what
              that batch yields; KV in use

    strain = the larger of need / workers over the two roles.   Above 1: turn roles if another split is better, since
    weights stay and it takes a second; start workers if no split is enough, which costs the time to load. Far below 1
    for long: let one go. Otherwise everything stays as it is.

DistServe (Zhong et al., OSDI'24) sizes the two pools apart, each for its own SLO; Dynamo's planner corrects a model of
rates by what is measured, but looked at rates only, and let queues stand for minutes (ai-dynamo/dynamo#10528). Here
whatever waits counts as work, and its age as a violation that has happened already. How many prefill workers keep to
the TTFT is the M/M/n queue's answer, since the router sends each prompt where the queue is shortest: with n workers for
a load (work a second over one worker's rate), one waits longer than t with a probability of at most
exp(-(n - load) t / S), S being a prompt's own time; so n = load + S / t · ln(1 / (1 - attainment)) is enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from .observation import Observation, StepLine


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscaleConfig:
    """The section `autoscale`. Times in seconds; a limit of 0 is none, but for `max_workers`."""

    enabled: bool = False
    ttft_s: float = 2.0
    """From arrival to the first token, at most, for a share of `attainment` of all requests."""
    tpot_s: float = 0.1
    """Mean time between the tokens of a request, at most, for the same share."""
    attainment: float = 0.9
    interval_s: float = 2.0
    """How often it is decided."""
    window_s: float = 10.0
    """Traffic that is looked at: the last so many seconds."""
    drain_s: float = 5.0
    """Within this time a queue shall be gone, beside the work that comes meanwhile."""
    confirm: int = 2
    """How many times in a row a change must be called for before it is made, unless the strain is above `URGENT`."""
    hold_down_s: float = 300.0
    """How long there must have been too many workers before one is let go."""
    shrink_below: float = 0.7
    """There are too many where one less would be strained by no more than this."""
    gain: float = 0.1
    """Roles are turned only where that takes away this share of the strain: what is nearly equal does not swing."""
    max_step: int = 2
    """Workers that one decision turns, starts or lets go, at most."""
    min_workers: int = 0
    max_workers: int = 0
    """0: no worker is started or let go; only roles are turned."""
    min_prefill: int = 1
    max_prefill: int = 0
    min_decode: int = 1
    max_decode: int = 0


Split = tuple[int, int]
"""(prefill, decode) workers."""

MAX_USE = 0.85
"""Prefill workers are not planned to compute for more than this share of the time: arrivals come in bursts, and prompts
are less alike than the formula takes them to be."""
MAX_HEADROOM = 1.0
"""Nor is more kept free for the queue's sake than this times the load: a prompt that takes longer than the TTFT alone
is not saved by any number of workers."""
URGENT = 1.5
"""Strain that is no noise: it need not show twice."""
STEP_SHARE = 0.9
"""A decode step is planned to take this share of the TPOT: what remains is for handovers, moves and noise."""
MIN_BATCH = 4.0
"""A decode worker is never planned for fewer requests, also where not even one keeps to the TPOT."""
KV_SHARE = 0.9
"""KV pools are planned to be used by no more than this. Above it, who waits is taken to wait for room there."""
MAX_LATENESS = 2.0
"""How much a queue that is too old raises the need, at most: its age tells that it is too long, not by how much."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Workers that each role needs, with fractions, and the words for it."""

    prefill: float
    decode: float
    prefill_why: str
    decode_why: str

    def strain(self, split: Split) -> float:
        """How hard the busier role has it: 1 is as hard as it should."""
        return max(self.prefill / split[0], self.decode / split[1])


@dataclass(frozen=True, slots=True)
class Decision:
    """What there should be, and why, in one line. `changes` is False where everything stays."""

    prefill: int
    decode: int
    why: str
    changes: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """What the planner keeps from one call to the next. Begin with `Memory()`.

    wish, wished   the direction in which a change was called for, and how many times in a row. It stays when the change
                   is made: more in the same direction need not be called for twice, as it may be a step of many
    roomy_since    since when there are too many workers; None: there are not
    line           a decode step's time by its batch, learnt from what was measured
    """

    wish: str = ""
    wished: int = 0
    roomy_since: float | None = None
    line: StepLine = field(default_factory=StepLine)


def plan(seen: Observation, memory: Memory, config: AutoscaleConfig) -> tuple[Decision, Memory]:
    """What to do now. Changes nothing by itself: the caller carries it out, and says by `Observation.changing` that it
    is under way."""
    memory = replace(memory, line=memory.line.learn(seen.steps))
    split = (seen.prefill, seen.decode)
    if seen.changing:
        return _stay(split, f"{seen.changing}; nothing else until that is done"), memory
    if not seen.prefill or not seen.decode:
        return _stay(split, "there is no pair of a prefill and a decode worker to be planned"), _calm(memory)
    if not seen.seconds or not seen.prefill_rate:
        return _stay(split, "nothing has been measured yet"), _calm(memory)
    need = needs(seen, memory.line, config)
    strain = need.strain(split)
    if strain > 1.0:
        return _relieve(seen, need, replace(memory, roomy_since=None), config)
    smaller = _best(_smaller(split, config), need)
    roomy = smaller is not None and need.strain(smaller) <= config.shrink_below and _attained(seen, config)
    if smaller is None or not roomy:
        return _stay(split, f"{_state(need, split)}: enough"), replace(_calm(memory), roomy_since=None)
    since = seen.now if memory.roomy_since is None else memory.roomy_since
    if seen.now - since < config.hold_down_s:
        why = f"{_state(need, split)}: one worker less would do, if that lasts {config.hold_down_s:.0f} s"
        return _stay(split, why), replace(_calm(memory), roomy_since=since)
    why = f"{_state(need, split)} for {seen.now - since:.0f} s"
    return _decide(split, smaller, why), replace(_calm(memory), roomy_since=None)


def needs(seen: Observation, line: StepLine, config: AutoscaleConfig) -> Needs:
    """Workers that this traffic takes. Never falls where arrivals, tokens, queues or batches grow."""
    full = seen.kv_used > KV_SHARE
    alone = seen.uncached_len / seen.prefill_rate
    allowed = max(config.ttft_s - alone, config.ttft_s / 4)
    # A queue that has become too old says that the rates promise too much. One old request alone does not: it may just
    # be long.
    drain = seen.backlog_tokens / (seen.prefill_rate * seen.prefill)
    age = min(seen.oldest_wait_s, max(drain, seen.queue_p90_s))
    lateness, late_why = min(age / allowed, MAX_LATENESS), f"queue {age:.1f} s > {allowed:.1f} s"
    # Prefill: the work that comes, and the queue gone in time.
    backlog = 0.0 if full else seen.backlog_tokens
    work = seen.uncached_tokens_per_s + backlog / config.drain_s
    load = work / seen.prefill_rate
    headroom = alone / allowed * math.log(1.0 / max(1e-3, 1.0 - config.attainment))
    prefill = max(load / MAX_USE, load + min(headroom, load * MAX_HEADROOM))
    why = (
        f"{backlog:.0f} prompt tokens queue" if backlog / config.drain_s > 0.5 * work else f"{work:.0f} prompt tokens/s"
    )
    if lateness > 1.0 and not full:
        prefill, why = max(prefill, seen.prefill * lateness), late_why
    # Decode: the requests that are there, the tokens that come, the KV that is held.
    batch = max(MIN_BATCH, line.batch(config.tpot_s * STEP_SHARE))
    held, held_why = seen.kv_used * seen.decode / KV_SHARE, f"KV {seen.kv_used:.0%} used"
    if lateness > 1.0 and full:
        held, held_why = held * lateness, f"{held_why}, {late_why}"
    decode, decode_why = max(
        (seen.batch / batch, f"{seen.batch} requests, {batch:.0f} a worker"),
        (seen.output_tokens_per_s * config.tpot_s * STEP_SHARE / batch, f"{seen.output_tokens_per_s:.0f} tokens/s"),
        (held, held_why),
    )
    return Needs(prefill, decode, why, decode_why)


# --- from needs to a decision ---


def _relieve(seen: Observation, need: Needs, memory: Memory, config: AutoscaleConfig) -> tuple[Decision, Memory]:
    """There is too much work for this split: turn roles first, start workers second."""
    split = (seen.prefill, seen.decode)
    strain = need.strain(split)
    turned, larger = _best(_turned(split, config), need), _best(_larger(split, need, config), need)
    if turned is not None and need.strain(turned) <= strain * (1.0 - config.gain):
        chosen, wish = turned, f"turn to {'prefill' if turned[0] > split[0] else 'decode'}"
    elif turned is not None and need.strain(turned) <= 1.0:
        return _stay(split, f"{_state(need, split)}: another split would be hardly better"), _calm(memory)
    elif larger is not None and need.strain(larger) < strain:
        chosen, wish = larger, "start"
    else:
        return _stay(split, f"{_state(need, split)}: too little, but no better split is allowed"), _calm(memory)
    wished = memory.wished + 1 if memory.wish == wish else 1
    if wished < config.confirm and strain <= URGENT:
        return _stay(split, f"{_state(need, split)}: will {wish}, if it lasts"), replace(
            memory, wish=wish, wished=wished
        )
    return _decide(split, chosen, _state(need, split)), replace(memory, wish=wish, wished=wished)


def _best(splits: Iterable[Split], need: Needs) -> Split | None:
    """The least strained; among equals the first."""
    return min(splits, key=lambda split: round(need.strain(split), 6), default=None)


def _turned(split: Split, config: AutoscaleConfig) -> list[Split]:
    """As many workers with other roles; the smallest changes first."""
    steps = [step for size in range(1, config.max_step + 1) for step in (size, -size)]
    return [s for step in steps if _allowed(s := (split[0] + step, split[1] - step), config)]


def _larger(split: Split, need: Needs, config: AutoscaleConfig) -> list[Split]:
    """With workers started, as many as are wanting."""
    now = sum(split)
    wanted = math.ceil(need.prefill) + math.ceil(need.decode)
    more = min(config.max_step, max(1, wanted - now), config.max_workers - now)
    return [s for p in range(more + 1) if more > 0 and _allowed(s := (split[0] + p, split[1] + more - p), config)]


def _smaller(split: Split, config: AutoscaleConfig) -> list[Split]:
    """With one worker let go."""
    if not config.max_workers or sum(split) <= config.min_workers:
        return []
    return [s for s in ((split[0] - 1, split[1]), (split[0], split[1] - 1)) if _allowed(s, config)]


def _allowed(split: Split, config: AutoscaleConfig) -> bool:
    prefill, decode = split
    return max(1, config.min_prefill) <= prefill <= (config.max_prefill or prefill) and (
        max(1, config.min_decode) <= decode <= (config.max_decode or decode)
    )


def _attained(seen: Observation, config: AutoscaleConfig) -> bool:
    return min(seen.ttft_attained, seen.tpot_attained) >= config.attainment


# --- words ---


def _stay(split: Split, why: str) -> Decision:
    return Decision(*split, f"stay at {split[0]} prefill, {split[1]} decode: {why}")


def _decide(split: Split, target: Split, why: str) -> Decision:
    prefill, decode = target[0] - split[0], target[1] - split[1]
    if prefill + decode == 0:
        steps = [f"turn {prefill} decode to prefill" if prefill > 0 else f"turn {decode} prefill to decode"]
    else:
        both = (("prefill", prefill), ("decode", decode))
        steps = [f"{'start' if more > 0 else 'let go'} {abs(more)} {role}" for role, more in both if more]
    return Decision(*target, f"{', '.join(steps)}: {why}", changes=True)


def _state(need: Needs, split: Split) -> str:
    """What is needed of what is there, the busier role first."""
    parts = [
        (need.prefill / split[0], f"prefill needs {need.prefill:.1f} of {split[0]} ({need.prefill_why})"),
        (need.decode / split[1], f"decode needs {need.decode:.1f} of {split[1]} ({need.decode_why})"),
    ]
    return ", ".join(words for _, words in sorted(parts, reverse=True))


def _calm(memory: Memory) -> Memory:
    """Nothing is called for."""
    return replace(memory, wish="", wished=0)
