"""Continuous batching: every running request gets one token in every step (Orca, OSDI '22).

Pure: sequences and the block table in, a step's plan out. When the pool runs out, the youngest request is preempted:
its blocks go back (what was full stays in the prefix cache as long as nobody else needs it), and later its KV is
computed again in place. A request is older than another if it arrived before it, and the oldest is never preempted for
another's sake, so somebody always gets on and the pool cannot livelock.
"""

from __future__ import annotations

from bisect import insort

from ..engine.block_table import BlockTable
from ..engine.plan import StepPlan
from ..engine.sequence import Sequence


def _age(sequence: Sequence) -> tuple[int, float]:
    return (-sequence.request.priority, sequence.arrival)


class ContinuousBatching:
    """Plans all sequences that have their prompt's KV, or had it before they were preempted. Whoever calls `join`
    bounds their number: it must not exceed the step's token budget."""

    def __init__(self, table: BlockTable) -> None:
        self._table = table
        self.running: list[Sequence] = []  # oldest first
        self.preempted: list[Sequence] = []  # oldest first
        self._paused: set[Sequence] = set()
        self.preemptions = 0

    def join(self, sequence: Sequence) -> None:
        """A sequence whose next token is known and whose KV before it is in the pool joins the batch."""
        insort(self.running, sequence, key=_age)

    def pause(self, sequence: Sequence) -> None:
        """Plan nothing for a running sequence from here on; its blocks stay its own. A step that is under way may still
        compute it."""
        if sequence not in self._paused:
            self._paused.add(sequence)
            self.running.remove(sequence)

    def paused(self, sequence: Sequence) -> bool:
        return sequence in self._paused

    def resume(self, sequence: Sequence) -> None:
        """Go on with a sequence if it is paused."""
        if sequence in self._paused:
            self._paused.remove(sequence)
            self.join(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and take its blocks back."""
        for group in (self.running, self.preempted):
            if sequence in group:
                group.remove(sequence)
        self._paused.discard(sequence)
        self._table.drop(sequence)

    def recompute(self, sequence: Sequence) -> None:
        """The KV of a running sequence is in doubt: it gives up its blocks, and gets it computed again."""
        self._table.manager.disown(sequence.blocks)
        self._preempt(sequence)

    def plan(self, plan: StepPlan) -> None:
        """Add the next token of each running sequence, and for who was preempted what it lacks, as far as the budget
        goes; first resume who fits again. Where a step is under way that may end somebody, nobody is preempted before
        it has: the plan is `short` then."""
        self._resume()
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
        self.running.remove(sequence)
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
