"""The one block table of a worker: which sequence holds which blocks, and how far each is computed.

Both roles work on it, so that a request can pass from prefill to decode inside one worker without a copy. Only the
worker's own loop touches it.

Blocks outlive their sequence where a step that has been launched still writes them: whoever were given them next, a
handover that comes in, say, would find them overwritten. They are parked until that step has ended:

    admit, grow ──▶ held ──drop──▶ free or cached
                     └──drop, in flight──▶ parked ──end──▶ free or cached
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from ..common.hashing import BlockHash, BlockHasher
from .block_manager import BlockManager
from .plan import StepPlan
from .sequence import Sequence, SequenceKey


@dataclass(eq=False, slots=True)
class Flight:
    """A step from its launch to its end. What it finds for those that are `gone`, because they were dropped meanwhile,
    means nothing any more; `parked` are blocks that have to wait for its end."""

    gone: set[Sequence] = field(default_factory=set)
    parked: list[array[int]] = field(default_factory=list)


class BlockTable:
    """Maps sequences to blocks through `manager`; names full blocks with `hasher`."""

    def __init__(self, num_blocks: int, hasher: BlockHasher) -> None:
        self.manager = BlockManager(num_blocks)
        self.hasher = hasher
        self.block_size = hasher.block_size
        self._sequences: dict[SequenceKey, Sequence] = {}
        self._flights: list[Flight] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def holders(self) -> list[Sequence]:
        """All sequences that hold blocks."""
        return list(self._sequences.values())

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of this length could ever be held, alone."""
        return self.blocks_for(tokens) <= self.manager.num_blocks

    def chain(self, sequence: Sequence) -> list[BlockHash]:
        """Hashes of all full blocks of the sequence's tokens; remembered in the sequence and extended as it grows."""
        known = sequence.hashes
        parent = known[-1] if known else self.hasher.root(sequence.request.tenant)
        for i in range(len(known), len(sequence.tokens) // self.block_size):
            parent = self.hasher.child(parent, sequence.tokens[i * self.block_size : (i + 1) * self.block_size])
            known.append(parent)
        return known

    def cached_prefix(self, sequence: Sequence, upto: int) -> list[int]:
        """Blocks of the longest cached prefix that ends at or before token `upto`."""
        return self.manager.match(self.chain(sequence)[: upto // self.block_size])

    def admit(self, sequence: Sequence, cacheable: int, room: int) -> bool:
        """Give a sequence that holds nothing its cached prefix, of at most `cacheable` tokens, and fresh blocks up to
        `room` tokens in all. False, and nothing is taken, if the pool has no room now."""
        assert not sequence.blocks
        prefix = self.cached_prefix(sequence, cacheable)
        self.manager.acquire(prefix)
        fresh = max(0, self.blocks_for(room) - len(prefix))
        if fresh > self.manager.available:
            self.manager.release(prefix)
            return False
        sequence.blocks = array("i", prefix + self.manager.allocate(fresh))
        sequence.computed = sequence.launched = len(prefix) * self.block_size
        self._sequences[sequence.key] = sequence
        return True

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Make room for this many tokens in all. False, and nothing is taken, if the pool has none now."""
        held = len(sequence.blocks)
        if tokens <= held * self.block_size:
            return True
        fresh = self.blocks_for(tokens) - held
        if fresh > self.manager.available:
            return False
        sequence.blocks.extend(self.manager.allocate(fresh))
        return True

    def advance(self, sequence: Sequence, count: int) -> None:
        """KV of `count` more tokens is in the pool: blocks that became full can be found by others from now on."""
        sequence.computed = computed = sequence.computed + count
        if sequence.launched < computed:
            sequence.launched = computed
        if computed % self.block_size < count:
            self._seal(sequence, count)

    def _seal(self, sequence: Sequence, count: int) -> None:
        """The last `count` computed tokens have gone past the end of a block."""
        computed, hashes = sequence.computed, self.chain(sequence)
        for i in range((computed - count) // self.block_size, computed // self.block_size):
            self.manager.seal(sequence.blocks[i], hashes[i])

    def drop(self, sequence: Sequence) -> None:
        """Take all blocks back; what is full and computed stays cached. Does nothing the second time."""
        if self._sequences.pop(sequence.key, None) is None:
            return
        if sequence.in_flight:
            for flight in self._flights:
                flight.gone.add(sequence)
            self._flights[-1].parked.append(sequence.blocks)
        else:
            self.manager.release(sequence.blocks)
        sequence.blocks = array("i")
        sequence.computed = sequence.launched = sequence.pending = 0

    # --- steps ---

    def launch(self, plan: StepPlan) -> Flight:
        """A step is about to compute this. Flights end in the order of their launches."""
        for sequence in plan.decodes:
            sequence.launched += 1
            sequence.pending += 1
        for part in plan.slices:
            sequence = part.sequence
            sequence.launched += part.count
            sequence.pending += part.samples
        flight = Flight()
        self._flights.append(flight)
        return flight

    def computed(self, plan: StepPlan) -> None:
        """The oldest flight has come back with this. What it drew for those that are not gone is pending no more: the
        caller knows it."""
        block_size, gone = self.block_size, self._flights[0].gone
        for sequence in [s for s in plan.decodes if s not in gone] if gone else plan.decodes:
            sequence.pending -= 1
            sequence.computed = computed = sequence.computed + 1
            if computed % block_size == 0:
                self._seal(sequence, 1)
        for part in plan.slices:
            sequence, count = part.sequence, part.count
            if sequence not in gone:
                sequence.pending -= part.samples
                sequence.computed = computed = sequence.computed + count
                if computed % block_size < count:
                    self._seal(sequence, count)

    def end(self) -> None:
        """The oldest flight is over: nothing of it writes any more."""
        for blocks in self._flights.pop(0).parked:
            self.manager.release(blocks)

    def check(self) -> None:
        """Raises `BlockLeak` if any block is held by nobody that is known here, or held twice."""
        held = [s.blocks for s in self._sequences.values()]
        self.manager.check(held + [blocks for flight in self._flights for blocks in flight.parked])
