"""What a worker counts and measures of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..common.errors import BatonError
from .plan import StepPlan

MAX_CODES = 64
"""Reasons of failed handovers that are counted apart."""

OUTLIER = 2.0
"""A decode step counts for at most this many times what steps took before."""


@dataclass(slots=True)
class Stats:
    """Counters since the worker's start, and smoothed rates."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    handovers: int = 0
    handover_bytes: int = 0
    handover_seconds: float = 0.0
    handover_exposed_seconds: float = 0.0
    handover_skipped_blocks: int = 0
    moves: int = 0
    shared_tokens: int = 0
    handover_aborts: dict[str, int] = field(default_factory=dict)
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    decode_batch: float = 0.0

    def aborted(self, code: str) -> None:
        """Count a handover that failed. Codes may be a peer's own, so their number is bounded."""
        if code not in self.handover_aborts and len(self.handover_aborts) >= MAX_CODES:
            code = BatonError.code
        self.handover_aborts[code] = self.handover_aborts.get(code, 0) + 1

    def step(self, plan: StepPlan, seconds: float) -> None:
        """Measure a step. `seconds`: since its launch, or since the end of the one before if that came later."""
        self.steps += 1
        chunk = sum([part.count for part in plan.slices])
        if chunk >= 32:  # smaller chunks say more about overheads than about the rate
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, chunk / max(seconds, 1e-9))
        elif chunk == 0:
            # A step in which the process was stopped or starved says nothing of the next ones; taken at its word, it
            # would keep the router away, and with it the steps that tell better.
            most = OUTLIER * self.decode_step_s or seconds
            self.decode_step_s = _smooth(self.decode_step_s, min(seconds, most))
            self.decode_batch = _smooth(self.decode_batch, len(plan.decodes))


def _smooth(old: float, new: float, weight: float = 0.2) -> float:
    return new if old == 0.0 else (1 - weight) * old + weight * new
