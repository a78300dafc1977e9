"""Who holds which row of the table of counts: against a plain account of what was drawn."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.slots import Slots

ROWS = 3
Step = dict[int, bool]
"""Who draws in a step, and whether his draw is thrown away."""


@settings(max_examples=300, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 9), st.booleans(), max_size=ROWS), max_size=40))
def test_a_right_slot_holds_just_what_its_sequence_has_drawn(steps: list[Step]) -> None:
    slots, drawn, table = Slots(), dict.fromkeys(range(10), 0), dict[int, tuple[int, int]]()
    slots.make_room(2 * ROWS)
    before: Step = {}
    for step in steps:
        taken = set()
        for who, lost in step.items():
            slot, right = slots.take(("", who), drawn[who])
            assert 0 <= slot < slots.count
            assert right == (table.get(slot) == (who, drawn[who]))
            if before.get(who) is False:
                assert right, "who drew in the step before need not know what"
            table[slot] = who, drawn[who] + 1
            drawn[who] += not lost
            taken.add(slot)
        assert len(taken) == len(step)
        before = step


def test_room_grows_and_what_was_there_stays() -> None:
    slots = Slots()
    slots.make_room(2)
    assert [slots.take(("", who), 5) for who in range(2)] == [(0, False), (1, False)]
    slots.make_room(4)
    slots.make_room(1)
    assert slots.count == 4
    assert [slots.take(("", who), 6) for who in range(3)] == [(0, True), (1, True), (2, False)]
    assert slots.take(("elsewhere", 0), 6) == (3, False)
