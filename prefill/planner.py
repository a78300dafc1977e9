"""Chunked prefill: prompts are computed in pieces that fit the step's token budget (Sarathi-Serve, OSDI '24).

Pure: sequences and the block table in, slices out. First come, first served within a priority. A request whose next
missing block is being computed for another at this moment waits for it and finds it in the cache (SGLang does so
within a batch), so that n samples of one prompt, or many prompts with one new system prompt, cost one prefill.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

from ..common.hashing import BlockHash
from ..engine.block_table import BlockTable
from ..engine.plan import StepPlan
from ..engine.role import LocalBatch
from ..engine.sequence import Sequence


def turn(sequence: Sequence) -> tuple[int, float]:
    """Sort key: higher priority first, then who came first."""
    return (-sequence.request.priority, sequence.arrival)


class ChunkedPrefill:
    """`on_start` is told when a sequence is admitted. At most `most` are in work at a time, since the memory of a step
    grows with those that sample in it. `local`: the batch that computed sequences join, if that is on this worker; no
    more are started than find a place there."""

    def __init__(
        self, table: BlockTable, on_start: Callable[[Sequence], None], most: int, local: LocalBatch | None = None
    ) -> None:
        self._table = table
        self._most = most
        self._local = local
        self._on_start = on_start
        self.ready: list[Sequence] = []
        self.computing: list[Sequence] = []
        self._in_work: dict[BlockHash, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        insort(self.ready, sequence, key=turn)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its blocks stay its own."""
        if sequence in self.ready:
            self.ready.remove(sequence)
        if sequence in self.computing:
            self.computing.remove(sequence)
            for block_hash in self._table.chain(sequence):
                if self._in_work.get(block_hash) is sequence:
                    del self._in_work[block_hash]

    @property
    def queued_tokens(self) -> int:
        return sum(s.missing for s in self.ready) + sum(s.missing for s in self.computing)

    def plan(self, plan: StepPlan) -> None:
        """Add chunks until the budget is spent: of those in work first, then of newly admitted ones."""
        for sequence in self.computing:
            if plan.budget == 0:
                return
            if not sequence.pending:  # its last chunk is under way
                plan.add(sequence, sequence.missing)
        for sequence in list(self.ready):
            if plan.budget == 0 or not self._start(sequence):
                return
            if sequence in self.computing:
                plan.add(sequence, sequence.missing)

    def _start(self, sequence: Sequence) -> bool:
        """Admit a sequence, or pass it over because another computes what it needs. False: the pool is full, or as
        many are in work as may be, and whoever comes behind must not overtake it."""
        if len(self.computing) >= self._most:
            return False
        chain, last = self._table.chain(sequence), len(sequence.tokens) - 1
        prefix = len(self._table.cached_prefix(sequence, last))
        if prefix < last // self._table.block_size and chain[prefix] in self._in_work:
            return True
        fresh = self._table.blocks_for(len(sequence.tokens)) - prefix
        if self._local is not None:
            if self._local.places <= len(self.computing):
                return False
            fresh += self._local.headroom
        if self._table.holders() and fresh > self._table.manager.available:
            return False
        if not self._table.admit(sequence, last, len(sequence.tokens)):
            return False
        self.ready.remove(sequence)
        self.computing.append(sequence)
        sequence.cached = sequence.computed
        for block_hash in chain[prefix:]:
            self._in_work.setdefault(block_hash, sequence)
        self._on_start(sequence)
        return True
