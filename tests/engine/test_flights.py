"""Blocks that a step writes are nobody's until it has ended, whoever goes meanwhile."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.hashing import BlockHasher
from baton.engine.block_manager import BlockLeak
from baton.engine.block_table import BlockTable, Flight
from baton.engine.plan import Slice, StepPlan
from baton.engine.sequence import Sequence
from tests.toy import request

SIZE = 4


class Books:
    """A block table, and by itself what steps that are under way write: [(flight, blocks, plan)]."""

    def __init__(self, seed: int, blocks: int) -> None:
        self.rng = random.Random(seed)
        self.table = BlockTable(blocks, BlockHasher(SIZE))
        self.held: list[Sequence] = []
        self.flights: deque[tuple[Flight, set[int], StepPlan]] = deque()
        self.tickets = 0

    def handed_out(self, blocks: Iterable[int]) -> None:
        """Nobody writes these."""
        for _, written, _ in self.flights:
            assert not written.intersection(blocks)

    def admit(self) -> None:
        self.tickets += 1
        prompt = [1, 2, 3, 4, 5, 6, 7, 8][: self.rng.choice([0, 4, 8])]
        prompt += [self.rng.randrange(99) for _ in range(self.rng.randrange(1, 12))]
        sequence = Sequence(("r", self.tickets), request("", prompt, 99), 1, 0.0, 0.0)
        if self.table.admit(sequence, len(prompt) - 1, len(prompt)):
            self.handed_out(sequence.blocks[sequence.computed // SIZE :])
            self.held.append(sequence)

    def launch(self) -> None:
        if len(self.flights) == 2:
            self.collect()
        plan = StepPlan(99)
        for sequence in self.rng.sample(self.held, self.rng.randrange(len(self.held) + 1)):
            before = len(sequence.blocks)
            if sequence.pending < 2 and self.table.grow(sequence, sequence.length):
                self.handed_out(sequence.blocks[before:])
                if sequence.missing == 1 and self.rng.random() < 0.7:
                    plan.decode(sequence)
                else:
                    plan.add(sequence, self.rng.randrange(1, sequence.missing + 1))
        written = {
            block for part in plan.parts for block in part.sequence.blocks[part.start // SIZE : -(-part.end // SIZE)]
        }
        self.flights.append((self.table.launch(plan), written, plan))

    def collect(self) -> None:
        if not self.flights:
            return
        flight, _, plan = self.flights[0]
        left = [part for part in plan.parts if part.sequence not in flight.gone]
        assert all(part.start == part.sequence.computed for part in left)
        self.table.computed(plan)
        for part in left:
            assert part.end == part.sequence.computed
            part.sequence.tokens += [self.rng.randrange(99)] * part.samples
        self.table.end()
        self.flights.popleft()

    def drop(self, anew: bool) -> None:
        """Somebody goes; `anew`: and begins again at once, as after a corrupted block."""
        if self.held:
            sequence = self.held.pop(self.rng.randrange(len(self.held)))
            self.table.drop(sequence)
            self.table.drop(sequence)
            assert not sequence.in_flight and not sequence.pending
            if anew and self.table.admit(sequence, len(sequence.tokens) - 1, len(sequence.tokens)):
                self.handed_out(sequence.blocks[sequence.computed // SIZE :])
                self.held.append(sequence)

    def turn(self, what: str) -> None:
        if what == "again":
            self.drop(anew=True)
        elif what == "drop":
            self.drop(anew=False)
        else:
            getattr(self, what)()
        self.table.check()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    blocks=st.integers(3, 24),
    turns=st.lists(st.sampled_from(["admit", "admit", "launch", "launch", "collect", "drop", "again"]), max_size=60),
)
def test_no_block_is_given_away_that_a_step_writes(seed: int, blocks: int, turns: list[str]) -> None:
    books = Books(seed, blocks)
    for what in turns:
        books.turn(what)
    while books.flights:
        books.turn("collect")
    while books.held:
        books.turn("drop")
    assert books.table.manager.free + books.table.manager.cached == blocks


def flying(tokens: int = 6) -> tuple[BlockTable, Sequence]:
    """A sequence, all of it in a step that is under way."""
    table, sequence = BlockTable(4, BlockHasher(SIZE)), Sequence(("r", 1), request("", range(tokens), 9), 1, 0.0, 0.0)
    assert table.admit(sequence, tokens - 1, tokens)
    table.launch(StepPlan(0, [Slice.of(sequence, 0, tokens)]))
    return table, sequence


def test_what_is_parked_is_known_to_the_books() -> None:
    table, sequence = flying()
    table.drop(sequence)
    assert table.manager.pinned == 2
    table.check()
    table._flights[0].parked.clear()
    with pytest.raises(BlockLeak):
        table.check()


def test_only_what_has_been_computed_is_found() -> None:
    table, sequence = flying(tokens=8)
    other = Sequence(("r", 2), request("", range(9), 9), 1, 0.0, 0.0)
    assert (sequence.launched, sequence.pending, sequence.length, sequence.missing) == (8, 1, 9, 1)
    assert table.cached_prefix(other, 9) == []
    table.computed(StepPlan(0, [Slice(sequence, 0, 8, samples=True)]))
    table.end()
    assert len(table.cached_prefix(other, 9)) == 2 and sequence.pending == 0


def test_of_a_step_whose_sequence_went_nothing_stays() -> None:
    table, sequence = flying(tokens=8)
    table.drop(sequence)
    table.end()
    assert table.manager.free == 4 and table.manager.cached == 0
