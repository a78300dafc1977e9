"""A batch that was carried on from step to step must say what one that is made anew says, whatever happens in
between."""

from __future__ import annotations

import random
from array import array

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.batch import NOT_DRAWN, Batch
from baton.engine.batches import ROOM, Batches
from baton.engine.plan import Slice, StepPlan
from baton.engine.sequence import Sequence

from .test_model import sequence

BLOCK = 4
TURNS = ["decode"] * 12 + ["join", "leave", "swap", "recompute", "chunk", "fail"]


def decodes(owners: list[Sequence]) -> StepPlan:
    """The next token of each, for whose KV it makes room."""
    plan = StepPlan(999)
    for owner in owners:
        plan.decode(owner)
    return plan


def grow(owner: Sequence, rng: random.Random) -> None:
    """Room for its last token, and now and then for more."""
    missing = -(-owner.length // BLOCK) - len(owner.blocks)
    owner.blocks.extend(rng.choices(range(999), k=max(0, missing) + (rng.random() < 0.1)))


def turn(what: str, owners: list[Sequence], rng: random.Random) -> None:
    """Something happens to somebody between two steps."""
    if what == "join" or not owners:
        owners.insert(rng.randrange(len(owners) + 1), begun(rng))
    elif what == "leave" and len(owners) > 1:
        owners.pop(rng.randrange(len(owners)))
    elif what == "swap":
        rng.shuffle(owners)
    elif what == "recompute":  # preempted, and back with all but its last token found in the cache
        owner = rng.choice(owners)
        owner.blocks = array("i", rng.choices(range(999), k=len(owner.blocks)))


def begun(rng: random.Random) -> Sequence:
    owner = sequence(rng.choices(range(99), k=rng.randrange(1, 30)), 0)
    owner.blocks, owner.launched = array("i"), len(owner.tokens) - 1
    return owner


def check(found: Batch, plan: StepPlan, drawn: dict[Sequence, int], fill: int, tokens: list[int]) -> None:
    """That it says what one says that is made anew, once it is known what the step before drew: `tokens`."""
    expected = Batch.of(plan, BLOCK, drawn, fill)
    assert found.singles == expected.singles
    found, expected = (Batch(each.layout, each.data.clone(), each.singles, False) for each in (found, expected))
    for each in (found, expected):
        each.complete(tokens)
    mine, new = found.arrays(), expected.arrays()
    for name in ("tokens", "positions", "slots", "wanted", "starts", "lengths"):
        assert getattr(mine, name).tolist() == getattr(new, name).tolist(), name
    for row, length in enumerate(new.lengths):
        read = -(-length // BLOCK)
        blocks = [each.tables[each.table_starts[row] :][:read].tolist() for each in (mine, new)]
        assert blocks[0] == blocks[1]


@given(
    turns=st.lists(st.sampled_from(TURNS), min_size=1, max_size=60),
    ahead=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_what_is_carried_on_is_what_would_be_made(turns: list[str], ahead: bool, seed: int) -> None:
    """`ahead`: each step is planned before it is known what the one before it draws."""
    rng, batches = random.Random(seed), Batches(BLOCK)
    owners = [begun(rng) for _ in range(rng.randrange(1, 5))]
    drew: list[Sequence] = []
    tokens: list[int] = []
    for what in turns:
        turn(what, owners, rng)
        if what == "fail":
            batches.forget()
        for owner in owners:
            grow(owner, rng)
        plan = decodes(owners)
        if what == "chunk":
            plan.slices.append(Slice(sequence(range(20), 0), 0, rng.randrange(1, 9), False))
        fill = 0 if plan.slices else rng.choice([0, len(owners), len(owners) + 2])
        drawn = {owner: row for row, owner in enumerate(drew)}
        batch = batches.carry_on(plan)
        if batch is None:
            batch = batches.make(plan, drawn, fill)
        else:
            assert owners == drew and what not in ("recompute", "chunk", "fail")
            fill = batch.layout.sequences
        check(batch, plan, drawn, fill, tokens)
        settle(drew, tokens)
        drew, tokens = list(owners), rng.choices(range(99), k=len(owners))
        for owner in owners:
            owner.launched, owner.pending = owner.launched + 1, 1
        if not ahead:
            settle(drew, tokens)


def settle(drew: list[Sequence], tokens: list[int]) -> None:
    """What a step drew is known."""
    for owner, token in zip(drew, tokens, strict=True):
        if owner.pending:
            owner.tokens.append(token)
            owner.pending = 0


def test_nobody_makes_a_batch_while_the_same_sequences_decode() -> None:
    """But for when the room behind the tables is used up."""
    rng, batches = random.Random(1), Batches(BLOCK)
    owners = [begun(rng) for _ in range(5)]
    made = []
    for step in range(3 * ROOM * BLOCK):
        for owner in owners:
            grow(owner, rng)
        plan = decodes(owners)
        if batches.carry_on(plan) is None:
            batches.make(plan, {}, 8)
            made.append(step)
        for owner in owners:
            owner.launched += 1
            owner.tokens.append(step)
    assert made == [0, ROOM * BLOCK + 1, 2 * (ROOM * BLOCK + 1)]


def test_a_step_that_is_under_way_keeps_its_bytes() -> None:
    owner, batches = sequence(range(5), 0), Batches(BLOCK)
    seen: list[tuple[Batch, list[int]]] = []
    for step in range(6):
        plan = StepPlan(9, [], [owner], [4 + step])
        batch = batches.carry_on(plan) or batches.make(plan, {owner: 0})
        for under_way, positions in seen[-1:]:
            assert under_way.arrays().positions.tolist() == positions
        seen.append((batch, batch.arrays().positions.tolist()))
    assert [positions for _, positions in seen] == [[4 + step] for step in range(6)]
    assert seen[-1][0].arrays().drawn.tolist() == [0] != [NOT_DRAWN]


def test_who_does_not_go_on_is_no_batch_to_carry() -> None:
    owner, batches = sequence(range(9), 0), Batches(BLOCK)
    batches.make(StepPlan(9, [], [owner], [5]), {})
    assert batches.carry_on(StepPlan(9, [], [owner], [5])) is None, "the same step once more"
    assert batches.carry_on(StepPlan(9, [], [owner], [7])) is None, "a step was left out"
    assert batches.carry_on(StepPlan(9, [Slice(owner, 6, 1, True)], [owner], [6])) is None
    assert batches.carry_on(StepPlan(9, [], [owner], [6])) is not None


def test_a_step_without_them_stands_between() -> None:
    """What lies on the device then is what others have drawn."""
    owner, other, batches = sequence(range(9), 0), sequence(range(4), 20, 1), Batches(BLOCK)
    batches.make(StepPlan(9, [], [owner], [5]), {})
    batches.make(StepPlan(9, [Slice(other, 0, 4, True)]), {})
    assert batches.carry_on(StepPlan(9, [], [owner], [6])) is None
