"""What one step computes: the value that planners make and the runner executes. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from typing import Protocol

from ..common.types import TokenLogprob
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Slice:
    """Compute KV of the sequence's positions start … start + count - 1. Where that reaches its `length` at planning
    time, the token at position `end` is sampled. The last token may be pending then: drawn by the step before, known to
    the device and not to the host."""

    sequence: Sequence
    start: int
    count: int
    samples: bool

    @classmethod
    def of(cls, sequence: Sequence, start: int, count: int) -> Slice:
        return cls(sequence, start, count, start + count == sequence.length)

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(slots=True)
class StepPlan:
    """What one step computes, for whom.

    budget   tokens that may still be added
    slices   chunks of prompts, and of what is computed again
    decodes  sequences that get their next token. They are most of what a worker does, so they are columns: no object is
             made for each of 256 requests. From step to step this is the same list for as long as it holds the same
             sequences (`repeat`): whoever derives something from it may keep that with it. One planner fills it, and
             nobody changes it once the step is planned
    starts   for each of `decodes`, the position of its last token: KV of that one is computed, and the next one drawn
    ahead    another step is under way, and what it draws is not known: nobody may be preempted
    short    set by a planner that would have to preempt: what is under way must end first
    """

    budget: int
    slices: list[Slice] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ahead: bool = False
    short: bool = False

    def __len__(self) -> int:
        return len(self.decodes) + len(self.slices)

    def decode(self, sequence: Sequence) -> None:
        """The last token of a sequence, and the only one that no launched step computes."""
        self.decodes.append(sequence)
        self.starts.append(sequence.launched)
        self.budget -= 1

    def repeat(self, decodes: list[Sequence], starts: list[int]) -> None:
        """The decodes of an earlier step, each at this position now."""
        assert not self.decodes
        self.decodes, self.starts = decodes, starts
        self.budget -= len(decodes)

    def add(self, sequence: Sequence, count: int) -> None:
        """The next `count` tokens of a sequence that no launched step computes, or as many as fit."""
        part = Slice.of(sequence, sequence.launched, min(count, self.budget))
        self.slices.append(part)
        self.budget -= part.count

    @property
    def tokens(self) -> int:
        return len(self.decodes) + sum(part.count for part in self.slices)

    @property
    def sequences(self) -> list[Sequence]:
        """In the order of a step's results: first `decodes`, then those of `slices`."""
        return [*self.decodes, *(part.sequence for part in self.slices)]

    @property
    def parts(self) -> list[Slice]:
        """All of it as slices, in the same order, for who is in no hurry."""
        decodes = zip(self.decodes, self.starts, strict=True)
        return [*(Slice(sequence, start, 1, True) for sequence, start in decodes), *self.slices]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token, with its log-probability where the request asked for it."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """What a step drew, in columns. Entry i is of `StepPlan.sequences[i]`; None where that samples nothing. `logprobs`
    has those that were asked for, by index. Iterating makes the `Sampled`s."""

    tokens: list[int | None]
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Sampled | None]:
        for index, token in enumerate(self.tokens):
            yield None if token is None else Sampled(token, self.logprobs.get(index))

    @property
    def drawn(self) -> list[int]:
        """The tokens that there are."""
        return [token for token in self.tokens if token is not None]

    def pick(self, entries: Listing[int | None]) -> Results:
        """These entries, in this order; None stands for what samples nothing."""
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
