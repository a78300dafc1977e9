"""What a cohort does with a step's tokens is what each of its sequences would."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from baton.common.types import FinishReason, SamplingParams
from baton.engine.cohort import Cohort
from baton.engine.sequence import Sequence
from tests.toy import request

EOS = 7


def sequence(ticket: int, tokens: int, params: SamplingParams) -> Sequence:
    what = replace(request("r", range(20, 20 + tokens), 9), params=params, prompt_len=1)
    return Sequence(("r", ticket), what, 1, 0.0, 9.0, eos_ids=frozenset({EOS}))


ASKED = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.sets(st.integers(3, 9), max_size=2).map(tuple),
)


@given(
    asked=st.lists(st.tuples(st.integers(1, 9), ASKED), max_size=5),
    steps=st.lists(st.lists(st.integers(3, 19), min_size=5, max_size=5), max_size=6),
)
def test_who_ends_and_where_the_tokens_stand(asked: list[tuple[int, SamplingParams]], steps: list[list[int]]) -> None:
    owners, others = ([sequence(n, *what) for n, what in enumerate(asked)] for _ in range(2))
    cohort = Cohort.of(owners)
    for drawn in steps:
        tokens = drawn[: len(owners)]
        expected: list[tuple[Sequence, FinishReason | None]] = [
            (owner, other.accept(token)) for owner, other, token in zip(owners, others, tokens, strict=True)
        ]
        positions, ended = cohort.accept(tokens)
        assert positions == [len(other.tokens) - 1 for other in others]
        assert [owner.tokens for owner in owners] == [other.tokens for other in others]
        assert ended == [(owner, reason) for owner, reason in expected if reason is not None]
