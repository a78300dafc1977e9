"""A step's plan and its results, in columns."""

from __future__ import annotations

import pytest

from baton.common.types import FinishReason, Request, SamplingParams, TokenLogprob
from baton.engine.plan import Results, Sampled, Slice, StepPlan
from baton.engine.sequence import Sequence

SAID = {0: TokenLogprob(-0.5), 2: TokenLogprob(-1.5)}


def sequence(tokens: int = 3, max_tokens: int = 9, longest: int = 99, **params: object) -> Sequence:
    settings = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    what = Request("r", tuple(range(tokens)), 3, settings)
    return Sequence(("r", 1), what, 1, 0.0, 9.0, max_model_len=longest, eos_ids=frozenset({50}))


def test_decodes_come_before_slices() -> None:
    one, two, three = sequence(), sequence(), sequence()
    plan = StepPlan(10)
    assert not plan
    one.launched, three.launched = 2, 1
    plan.add(two, 3)
    plan.decode(one)
    plan.add(three, 1)
    assert plan.sequences == [one, two, three] and len(plan) == 3
    assert plan.parts == [Slice(one, 2, 1, True), Slice(two, 0, 3, True), Slice(three, 1, 1, False)]
    assert (plan.tokens, plan.budget) == (5, 5)


def test_results_are_picked_with_what_belongs_to_them() -> None:
    results = Results([7, None, 8, 9], SAID)
    assert list(results) == [Sampled(7, SAID[0]), None, Sampled(8, SAID[2]), Sampled(9)]
    assert results.drawn == [7, 8, 9]
    assert results.pick([2, None, 0]) == Results([8, None, 7], {0: SAID[2], 2: SAID[0]})
    assert results.pick([3]) == Results([9])
    assert results.pick(range(4)) is results
    assert Results([4, 5]).pick([1, 0]) == Results([5, 4])


@pytest.mark.parametrize(
    ("token", "params", "reason"),
    [
        (50, {}, FinishReason.STOP),
        (50, {"ignore_eos": True}, None),
        (50, {"min_tokens": 2}, None),
        (50, {"min_tokens": 1}, FinishReason.STOP),
        (51, {}, None),
        (51, {"stop_token_ids": (51,)}, FinishReason.STOP),
        (50, {"stop_token_ids": (51,)}, FinishReason.STOP),
        (51, {"stop_token_ids": (51,), "ignore_eos": True}, FinishReason.STOP),
        (51, {"stop_token_ids": (51,), "min_tokens": 2}, None),
        (51, {"max_tokens": 1}, FinishReason.LENGTH),
        (50, {"max_tokens": 1}, FinishReason.STOP),
        (51, {"longest": 4}, FinishReason.LENGTH),
        (51, {"longest": 5}, None),
    ],
)
def test_why_a_request_ends_with_a_token(token: int, params: dict[str, int], reason: FinishReason | None) -> None:
    owner = sequence(**params)
    assert owner.accept(token) is reason
    assert owner.tokens == [0, 1, 2, token]


def test_output_of_earlier_attempts_counts() -> None:
    assert sequence(tokens=5, min_tokens=3).accept(50) is FinishReason.STOP
    assert sequence(tokens=5, min_tokens=4).accept(50) is None
    assert sequence(tokens=5, max_tokens=3).accept(51) is FinishReason.LENGTH
