"""The sampler against plain Python, and what must hold of its randomness."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch

from baton.common.errors import EngineFailure
from baton.common.types import Request, SamplingParams, TokenLogprob
from baton.engine.plan import Sampled
from baton.engine.sampler import Drawn, Sampler
from baton.engine.sequence import Sequence
from baton.kernels.sampling import uniform

EOS = 2
VOCABULARY = 50
tickets = itertools.count()


def sequence(prompt: tuple[int, ...] = (5, 6), output: tuple[int, ...] = (), **params: Any) -> Sequence:
    settings = SamplingParams(**({"max_tokens": 100} | params))
    return Sequence(("", next(tickets)), Request("", (*prompt, *output), len(prompt), settings), 0, 0.0, 0.0)


def logits(seed: int = 0, size: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def drawing(*sequences: Sequence) -> tuple[list[Sequence], list[int]]:
    """Who draws, and at which positions."""
    return list(sequences), [s.length for s in sequences]


def sample(row: torch.Tensor, *sequences: Sequence) -> list[Sampled]:
    sampler = Sampler(frozenset({EOS}), len(row))
    found = sampler.sample(row.expand(len(sequences), -1).clone(), *drawing(*sequences)).results()
    return [sampled for sampled in found if sampled is not None]


def support(row: torch.Tensor, draws: int = 400, **params: Any) -> Counter[int]:
    return Counter(s.token for s in sample(row, *(sequence(seed=seed, **params) for seed in range(draws))))


def best(row: torch.Tensor, count: int) -> set[int]:
    return set(row.topk(count).indices.tolist())


def test_uniform_numbers_are_even_and_unrelated() -> None:
    for numbers in ([uniform(s, 9) for s in range(20_000)], [uniform(9, p) for p in range(20_000)]):
        cells = Counter(int(u * 20) for u in numbers)
        assert min(numbers) >= 0.0
        assert max(numbers) < 1.0
        assert sum((cells[i] - 1000) ** 2 / 1000 for i in range(20)) < 50  # chi squared, 19 degrees of freedom
        pairs = [(a - 0.5) * (b - 0.5) for a, b in itertools.pairwise(numbers)]
        assert abs(sum(pairs) / len(pairs)) < 0.003
    assert uniform(2**64 - 1, 2**31) != uniform(2**64 - 2, 2**31)


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-30},
        {"temperature": 1e-40},  # what a logit is divided by: 0 or next to it in float32
        {"temperature": 1e-320},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e-40, "temperature": 1e-40},
    ],
)
def test_extreme_values_draw_a_token_of_the_vocabulary(extreme: dict[str, float]) -> None:
    """An index beyond it would fail the next step, and with it everybody in the batch."""
    row, target = logits(), sequence(prompt=(3, 4, 5, 6), **extreme)
    target.params.validate(VOCABULARY)
    row[5] = 3.0
    token = sample(row, target)[0].token
    assert token == 5 if "repetition_penalty" in extreme else token == int(row.argmax())


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    row = logits()
    target = sequence(prompt=(1, 2, 3), output=(4,), seed=77)
    alone = sample(row, target)[0].token
    crowd = [sequence(seed=i, temperature=t) for i, t in enumerate((0.0, 0.5, 1.5))]
    assert sample(row, *crowd, target)[-1].token == alone
    moved = sequence(prompt=(1, 2), output=(3, 9), seed=77)  # another boundary and other tokens, same position
    assert sample(row, moved)[0].token == alone
    assert len({sample(row, sequence(output=(3,) * n, seed=77))[0].token for n in range(20)}) > 1


def test_greedy_takes_the_largest() -> None:
    row = logits()
    assert sample(row, sequence(temperature=0.0))[0].token == int(row.argmax())


def test_temperature_draws_follow_the_softmax() -> None:
    row, draws = logits(size=8), 4000
    found = support(row, draws, temperature=1.3)
    for token, share in enumerate(torch.softmax(row / 1.3, 0).tolist()):
        assert abs(found[token] / draws - share) < 5 * math.sqrt(share * (1 - share) / draws)


def test_top_k_keeps_the_best() -> None:
    row = logits()
    assert set(support(row, top_k=3, temperature=2.0)) == best(row, 3)
    assert set(support(row, top_k=1)) == best(row, 1)


@pytest.mark.parametrize("size", [VOCABULARY, 2000])
def test_top_p_keeps_the_smallest_set_that_reaches_it(size: int) -> None:
    row = logits(size=size) / 4  # flat, so that the set is large
    probs = torch.softmax(row, 0, dtype=torch.float64)
    ordered = probs.sort(descending=True)
    for top_p in (0.05, 0.4, 0.9):
        count = int((ordered.values.cumsum(0) < top_p).sum()) + 1
        found = set(support(row, draws=200, top_p=top_p))
        assert found <= set(ordered.indices[:count].tolist())
        assert len(found) > min(count, 20) * 0.5


def test_min_p_drops_what_is_far_below_the_best() -> None:
    row = logits()
    probs = torch.softmax(row, 0)
    kept = set(torch.nonzero(probs >= 0.3 * probs.max())[:, 0].tolist())
    assert set(support(row, min_p=0.3)) == kept
    assert set(support(row, min_p=1.0)) == best(row, 1)


def test_top_p_counts_among_what_top_k_left() -> None:
    row = torch.tensor([3.0, 2.9, 2.8, 2.7])
    assert set(support(row, top_k=2, top_p=0.6)) == {0, 1}
    assert set(support(row, top_k=2, top_p=0.5)) == {0}


def test_penalties_equal_plain_python() -> None:
    prompt, output = (3, 4, 4, 9), (9, 9, 7, 3)
    rows = [logits(seed) for seed in range(30)]
    for row in rows:
        expected = row.tolist()
        for token in {*prompt, *output}:
            expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
        for token, count in Counter(output).items():
            expected[token] -= 0.9 + 0.4 * count
        expected[11] += 1.5
        expected[12] -= 100
        owner = sequence(
            prompt,
            output,
            temperature=0.0,
            repetition_penalty=1.7,
            presence_penalty=0.9,
            frequency_penalty=0.4,
            logit_bias=((11, 1.5), (12, -100.0)),
        )
        edited = row[None].clone()
        (found,) = Sampler(frozenset({EOS}), VOCABULARY).sample(edited, *drawing(owner)).results()
        assert edited[0].tolist() == pytest.approx(expected, rel=1e-5)
        assert found.token == expected.index(max(expected))


def test_min_tokens_holds_back_the_end() -> None:
    row = logits()
    row[EOS], row[8], row[9] = 30.0, 20.0, 10.0
    params: dict[str, Any] = {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": (8,)}
    assert [sample(row, sequence(output=(1,) * n, **params))[0].token for n in range(5)] == [9, 9, 9, EOS, EOS]


def test_logprobs_are_of_the_untouched_distribution() -> None:
    row = logits()
    raw = torch.log_softmax(row, 0)
    token = int(row.argmin())
    owner = sequence(temperature=0.5, top_k=1, logit_bias=((token, 100.0),), logprobs=3, frequency_penalty=1.0)
    found, plain, none = sample(row, owner, sequence(temperature=0.0, logprobs=0), sequence())
    assert found.token == token
    assert found.logprob is not None
    assert found.logprob.logprob == pytest.approx(float(raw[token]), abs=1e-5)
    assert [t for t, _ in found.logprob.top] == row.topk(3).indices.tolist()
    assert [p for _, p in found.logprob.top] == pytest.approx(raw.topk(3).values.tolist(), abs=1e-5)
    assert plain.logprob == TokenLogprob(pytest.approx(float(raw.max()), abs=1e-5), ())
    assert none.logprob is None


PENALTIES: dict[str, Any] = {"presence_penalty": 0.8, "frequency_penalty": 0.6, "repetition_penalty": 1.3}


def test_a_pending_token_counts_before_anybody_knows_it() -> None:
    """Each step is drawn while the results of the one before have not been looked at."""
    rows = [logits(seed) / 4 for seed in range(12)]
    params = [{"temperature": t, "seed": 3} | PENALTIES for t in (0.0, 1.0)]
    known = [sequence(**knobs) for knobs in params]
    for row in rows:
        for owner, found in zip(known, sample(row, *known), strict=True):
            owner.tokens.append(found.token)
    assert known[0].tokens[2:] != [int(row.argmax()) for row in rows], "penalties change something here"

    sampler, ahead = Sampler(frozenset({EOS}), VOCABULARY), [sequence(**knobs) for knobs in params]
    drawn: list[Drawn] = []
    for row in rows:
        drawn.append(sampler.sample(row.expand(2, -1).clone(), *drawing(*ahead)))
        for index, owner in enumerate(ahead):
            if owner.pending:
                owner.tokens.append(drawn[-2].results().tokens[index])
            owner.pending = 1
    for owner, other, last in zip(ahead, known, drawn[-1].results().tokens, strict=True):
        assert [*owner.tokens, last] == other.tokens


def test_a_draw_that_was_thrown_away_is_not_counted() -> None:
    sampler, owner, row = Sampler(frozenset({EOS}), VOCABULARY), sequence(temperature=0.0, **PENALTIES), logits()
    tokens = [sampler.sample(row[None].clone(), *drawing(owner)).results().tokens[0] for _ in range(3)]
    assert tokens == [int(row.argmax())] * 3


def test_who_joins_with_a_pending_token_that_was_drawn_elsewhere_is_refused() -> None:
    owner = sequence(**PENALTIES)
    owner.pending = 1
    with pytest.raises(EngineFailure, match="pending"):
        sample(logits(), owner)


def test_rows_do_not_care_who_stands_beside_them() -> None:
    """All kinds at once, and each alone."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 4, "top_p": 0.9, "logprobs": 2},
        {"min_p": 0.2, "logit_bias": ((3, 5.0), (3, 1.0), (40, -100.0))},
        {"temperature": 0.0, "min_tokens": 9, "logprobs": 5},
        {"temperature": 1.7, "stop_token_ids": (9,), "min_tokens": 2, "logit_bias": ((9, 50.0),)},
        PENALTIES,
        {"temperature": 0.0, "frequency_penalty": 2.0},
    ]
    owners = [sequence(output=(7, 7, 31), seed=n, **kind) for n, kind in enumerate(kinds)]
    batch = torch.stack([logits(seed) for seed in range(len(owners))])
    together = Sampler(frozenset({EOS}), VOCABULARY).sample(batch.clone(), *drawing(*owners)).results()
    for row, owner, found in zip(batch, owners, together, strict=True):
        alone = sample(row, owner)[0]
        assert found is not None and alone.token == found.token
        assert (alone.logprob is None) == (found.logprob is None)
        if alone.logprob is not None and found.logprob is not None:
            assert [t for t, _ in alone.logprob.top] == [t for t, _ in found.logprob.top]
            assert alone.logprob.logprob == pytest.approx(found.logprob.logprob, abs=1e-5)
    assert together.tokens[4] == 9, "the output is long enough for it to end"


@pytest.mark.parametrize("names", [(), ("logprobs",), ("edits",), ("greedy",), ("logprobs", "edits", "greedy")])
def test_who_goes_on_draws_as_if_asked_anew(names: tuple[str, ...]) -> None:
    """The same owners step by step, each a token further; and then others."""
    kinds: dict[str, dict[str, Any]] = {
        "logprobs": {"logprobs": 2},
        "edits": {"frequency_penalty": 2.0, "min_tokens": 3},
        "greedy": {"temperature": 0.0},
    }
    params: list[dict[str, Any]] = [{"temperature": 1.5}, {"top_k": 3}, *(kinds[name] for name in names)]
    anew, on = (Sampler(frozenset({EOS}), VOCABULARY) for _ in range(2))
    for length in (len(params), 1):
        first, second = ([sequence(seed=n, **kind) for n, kind in enumerate(params[:length])] for _ in range(2))
        for step in range(5):
            batch = torch.stack([logits(10 * step + row) for row in range(length)])
            expected = anew.sample(batch.clone(), *drawing(*first)).results()
            out = torch.zeros(length, dtype=torch.int64)
            drawn = on.sample_on(batch.clone(), out) if step else on.sample(batch.clone(), *drawing(*second), out)
            assert drawn.results() == expected
            assert drawn.tokens is out
            for owner, token in zip([*first, *second], expected.drawn * 2, strict=True):
                owner.tokens.append(token)
