"""What one step computes: the value that planners make and the runner executes. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ..common.types import TokenLogprob
from .sequence import Sequence


@dataclass(slots=True)  # not frozen: one is made for each sequence and step, and that would cost five times as much
class Slice:
    """Compute KV of the sequence's positions start … start + count - 1. Where that reaches its `length` at planning
    time, the token at position `end` is sampled. The last token may be pending then: drawn by the step before, known to
    the device and not to the host. count 1 with `samples` is a decode; anything else is a chunk of prefill (or of a
    recompute)."""

    sequence: Sequence
    start: int
    count: int
    samples: bool

    @classmethod
    def of(cls, sequence: Sequence, start: int, count: int) -> Slice:
        return cls(sequence, start, count, start + count == len(sequence.tokens) + sequence.pending)

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(slots=True)
class StepPlan:
    """The slices of one step.

    budget   tokens that may still be added
    ahead    another step is under way, and what it draws is not known: nobody may be preempted
    short    set by a planner that would have to preempt: what is under way must end first
    """

    budget: int
    slices: list[Slice] = field(default_factory=list)
    ahead: bool = False
    short: bool = False

    def add(self, sequence: Sequence, count: int) -> None:
        """The next `count` tokens of a sequence that no launched step computes, or as many as fit."""
        if count > self.budget:
            count = self.budget
        start = sequence.launched
        samples = start + count == len(sequence.tokens) + sequence.pending
        self.slices.append(Slice(sequence, start, count, samples))
        self.budget -= count

    @property
    def tokens(self) -> int:
        return sum(s.count for s in self.slices)


@dataclass(slots=True)  # as `Slice`
class Sampled:
    """A token drawn for a slice, with its log-probability where the request asked for it."""

    token: int
    logprob: TokenLogprob | None = None


OnLayer = Callable[[int], None]
"""Called after a layer's KV of this step is in the pool, with the layer's index, in order."""


class Launched(Protocol):
    """A step that has been given to the device, and may not be through."""

    def results(self) -> list[Sampled | None]:
        """Wait for its end. One entry for each slice, in order; None where the slice does not sample. Raises
        `EngineFailure` where the step failed, or does not end in time."""
        ...


@dataclass(frozen=True, slots=True)
class Ended:
    """Implements `Launched` for runners that compute at once."""

    sampled: list[Sampled | None]

    def results(self) -> list[Sampled | None]:
        return self.sampled


class Runner(Protocol):
    """Executes plans. The real one holds the model; the simulator's only knows what a step costs."""

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        """Give a step to the device. Steps run one after the other, so one may be launched while the one before it has
        not ended, and takes what that one draws (`Sequence.pending`) on the device. A device that is the processor
        itself computes here and now. Raises `EngineFailure`."""
        ...
