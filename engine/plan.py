"""What one step computes: the value that planners make and the runner executes. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ..common.types import TokenLogprob
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Slice:
    """Compute KV for `sequence.tokens[start : start + count]`. If that reaches the end of the tokens, the next token
    is sampled. count 1 with `samples` is a decode; anything else is a chunk of prefill (or of a recompute)."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        return self.end == len(self.sequence.tokens)


@dataclass(slots=True)
class StepPlan:
    """The slices of one step. `budget`: tokens that may still be added."""

    budget: int
    slices: list[Slice] = field(default_factory=list)

    def add(self, sequence: Sequence, count: int) -> Slice:
        part = Slice(sequence, sequence.computed, count)
        self.slices.append(part)
        self.budget -= count
        return part

    @property
    def tokens(self) -> int:
        return sum(s.count for s in self.slices)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token drawn for a slice, with its log-probability where the request asked for it."""

    token: int
    logprob: TokenLogprob | None = None


OnLayer = Callable[[int], None]
"""Called after a layer's KV of this step is in the pool, with the layer's index, in order."""


class Runner(Protocol):
    """Executes a plan. The real one holds the model; the simulator's only knows what a step costs."""

    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> list[Sampled | None]:
        """One entry for each slice, in order; None where the slice does not sample. Raises `EngineFailure`."""
        ...
