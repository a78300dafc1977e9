"""What one step computes: the value that planners make and the runner executes. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listing
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


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token drawn for a slice, with its log-probability where the request asked for it."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """What a step drew, in columns: no object is made for each of 256 requests. Entry i is of slice i; None where that
    samples nothing. `logprobs` has those that were asked for, by index. Iterating makes the `Sampled`s."""

    tokens: list[int | None]
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Sampled | None]:
        for index, token in enumerate(self.tokens):
            yield None if token is None else Sampled(token, self.logprobs.get(index))

    @property
    def drawn(self) -> int:
        """How many tokens."""
        return len(self.tokens) - self.tokens.count(None)

    def pick(self, entries: Listing[int | None]) -> Results:
        """These entries, in this order; None is a slice that samples nothing."""
        tokens = self.tokens
        if entries == range(len(tokens)):
            return self
        picked = [None if entry is None else tokens[entry] for entry in entries]
        if not self.logprobs:
            return Results(picked)
        found = [(i, self.logprobs.get(entry)) for i, entry in enumerate(entries) if entry is not None]
        return Results(picked, {i: logprob for i, logprob in found if logprob is not None})


OnLayer = Callable[[int], None]
"""Called after a layer's KV of this step is in the pool, with the layer's index, in order."""


class Launched(Protocol):
    """A step that has been given to the device, and may not be through."""

    def results(self) -> Results:
        """Wait for its end. Raises `EngineFailure` where the step failed, or does not end in time."""
        ...


@dataclass(frozen=True, slots=True)
class Ended:
    """Implements `Launched` for runners that compute at once."""

    tokens: list[int | None]

    def results(self) -> Results:
        return Results(self.tokens)


class Runner(Protocol):
    """Executes plans. The real one holds the model; the simulator's only knows what a step costs."""

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        """Give a step to the device. Steps run one after the other, so one may be launched while the one before it has
        not ended, and takes what that one draws (`Sequence.pending`) on the device. A device that is the processor
        itself computes here and now. Raises `EngineFailure`."""
        ...
