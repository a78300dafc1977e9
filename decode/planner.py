"""Continuous batching: every running request gets one token in every step (Orca, OSDI '22).

Pure: sequences and the block table in, a step's plan out. When the pool runs out, the youngest request is preempted:
its blocks go back (what was full stays in the prefix cache as long as nobody else needs it), and later its KV is
computed again in place. A request is older than another if it arrived before it, and the oldest is never preempted for
another's sake, so somebody always gets on and the pool cannot livelock.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from operator import ge

from ..engine.block_table import BlockTable
from ..engine.plan import StepPlan
from ..engine.sequence import Sequence


def _age(sequence: Sequence) -> tuple[int, float]:
    return (-sequence.request.priority, sequence.arrival)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step in which all that run have decoded: two columns of its plan, and of each sequence the position of the last
    token that it may have."""

    decodes: list[Sequence]
    starts: list[int]
    last: list[int]

    @property
    def launched(self) -> bool:
        """Planned is not yet launched, and those of a step are launched together."""
        return self.decodes[0].launched == self.starts[0] + 1


class ContinuousBatching:
    """Plans all sequences that have their prompt's KV, or had it before they were preempted. Whoever calls `join`
    bounds their number: it must not exceed the step's token budget."""

    def __init__(self, table: BlockTable) -> None:
        self._table = table
        self.running: list[Sequence] = []  # oldest first
        self.preempted: list[Sequence] = []  # oldest first
        self._paused: set[Sequence] = set()
        self._before: _Step | None = None  # the step planned last; None once somebody has come to run, or gone
        self.preemptions = 0

    def join(self, sequence: Sequence) -> None:
        """A sequence whose next token is known and whose KV before it is in the pool joins the batch."""
        insort(self.running, sequence, key=_age)
        self._before = None

    def pause(self, sequence: Sequence) -> None:
        """Plan nothing for a running sequence from here on; its blocks stay its own. A step that is under way may still
        compute it."""
        if sequence not in self._paused:
            self._paused.add(sequence)
            self._stop(sequence)

    def paused(self, sequence: Sequence) -> bool:
        return sequence in self._paused

    def resume(self, sequence: Sequence) -> None:
        """Go on with a sequence if it is paused."""
        if sequence in self._paused:
            self._paused.remove(sequence)
            self.join(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and take its blocks back."""
        if sequence in self.running:
            self._stop(sequence)
        if sequence in self.preempted:
            self.preempted.remove(sequence)
        self._paused.discard(sequence)
        self._table.drop(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """It is among those that run, and shall not be."""
        self.running.remove(sequence)
        self._before = None

    def recompute(self, sequence: Sequence) -> None:
        """The KV of a running sequence is in doubt: it gives up its blocks, and gets it computed again."""
        self._table.manager.disown(sequence.blocks)
        self._preempt(sequence)

    def plan(self, plan: StepPlan) -> None:
        """Add the next token of each running sequence, and for who was preempted what it lacks, as far as the budget
        goes; first resume who fits again. Where a step is under way that may end somebody, nobody is preempted before
        it has: the plan is `short` then."""
        self._resume()
        if self._go_on(plan):
            return
        self._plan_each(plan)
        if self.running and len(plan.decodes) == len(self.running):
            self._before = _Step(plan.decodes, plan.starts, [sequence.limit - 1 for sequence in plan.decodes])

    def _go_on(self, plan: StepPlan) -> bool:
        """As long as the same sequences run, a step is the one before, each of them one token further. What it takes
        follows from that step's columns, so that no sequence is asked but those that enter a new block. False, and
        nothing is planned, where that is not so, somebody ends, or has no room."""
        before = self._before
        if before is None or not before.launched or plan.budget < len(before.decodes):
            return False
        starts = [start + 1 for start in before.starts]
        if any(map(ge, starts, before.last)):
            return False
        block_size = self._table.block_size
        for row in [row for row, start in enumerate(starts) if start % block_size == 0]:
            if not self._table.grow(before.decodes[row], starts[row] + 1):
                return False
        plan.repeat(before.decodes, starts)
        self._before = _Step(before.decodes, starts, before.last)
        return True

    def _plan_each(self, plan: StepPlan) -> None:
        """Ask each sequence what it needs."""
        block_size = self._table.block_size
        for sequence in list(self.running):
            if plan.budget == 0:
                break
            pending = sequence.pending
            length = len(sequence.tokens) + pending
            if pending and length >= sequence.limit:
                continue  # the step that is under way draws its last token
            if length <= len(sequence.blocks) * block_size or self._make_room(sequence, plan):
                if length == sequence.launched + 1:
                    plan.decode(sequence)
                else:  # it was preempted
                    plan.add(sequence, length - sequence.launched)
            elif plan.short:
                break

    def _make_room(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Room for the KV of all tokens of this sequence, at the cost of younger ones if need be."""
        if not sequence.blocks:
            return False  # preempted a moment ago for an older one
        while not self._table.grow(sequence, sequence.length):
            if plan.ahead:
                plan.short = True
                return False
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self._table.drop(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        insort(self.preempted, sequence, key=_age)

    def _resume(self) -> None:
        """Bring back the oldest preempted sequences while there is room for them and one block more for each that
        runs, so that they are not thrown out again at once."""
        while self.preempted:
            sequence = self.preempted[0]
            need = self._table.blocks_for(len(sequence.tokens) + 1) + len(self.running)
            if self.running and need > self._table.manager.available:
                break
            if not self._table.admit(sequence, len(sequence.tokens) - 1, len(sequence.tokens)):
                break
            self.preempted.pop(0)
            self.join(sequence)
