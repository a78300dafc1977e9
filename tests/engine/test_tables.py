"""What is joined of the step before must be what a join of all tables gives, whatever has happened in between."""

from __future__ import annotations

import random
from array import array

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.tables import Tables

TURNS = ["grow", "grow", "grow", "swap", "leave", "join", "anew"]


def turn(what: str, held: list[array[int]], rng: random.Random) -> None:
    if what == "join" or not held:
        held.insert(rng.randrange(len(held) + 1), array("i", rng.choices(range(99), k=rng.randrange(4))))
    elif what == "grow":
        for blocks in rng.sample(held, rng.randrange(len(held) + 1)):
            blocks.extend(rng.choices(range(99), k=rng.randrange(3)))
    elif what == "swap":
        rng.shuffle(held)
    elif what == "leave":
        held.pop(rng.randrange(len(held)))
    else:  # given up, and taken again: perhaps the same numbers, perhaps as many others
        at = rng.randrange(len(held))
        held[at] = array("i", rng.choice([held[at].tolist(), rng.choices(range(99), k=len(held[at]))]))


@given(steps=st.lists(st.lists(st.sampled_from(TURNS), max_size=3), max_size=30), seed=st.integers(0, 1 << 30))
def test_what_is_kept_from_step_to_step_is_what_a_join_of_all_gives(steps: list[list[str]], seed: int) -> None:
    held: list[array[int]] = []
    tables, rng = Tables(), random.Random(seed)
    for turns in steps:
        for what in turns:
            turn(what, held, rng)
        sizes, joined = tables.join(list(held))
        assert sizes == [len(blocks) for blocks in held]
        assert joined == b"".join(held)


def test_who_only_grows_is_not_joined_again() -> None:
    """By the fact that a change that is against the promise goes unseen."""
    tables, held = Tables(), [array("i", [1, 2]), array("i", [3]), array("i", [])]
    tables.join(held)
    held[0][0] = 99
    held[1].append(4)
    held[2].append(5)
    _, joined = tables.join(list(held))
    assert array("i", joined).tolist() == [1, 2, 3, 4, 5]
