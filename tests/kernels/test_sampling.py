"""The sampling kernels draw the very tokens of their torch reference, and the reference those of plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from baton.kernels import sampling
from baton.kernels.sampling import ADDED, FAR, IN_PROMPT, LARGEST, MOST, RECORD, UNIT, draw, fill, furthest, uniform
from tests.kernels.hopper import DEVICE, compile_for_hopper

kernels = pytest.importorskip("baton.kernels.sampling_kernels")

SLOTS = 4
OFF: dict[str, Any] = {
    "top_p": 1.0, "temperature": 1.0, "repetition": 1.0, "furthest": FAR, "slot": -1, "position": 7
}  # fmt: skip


def records(*rows: dict[str, Any]) -> torch.Tensor:
    made = np.zeros(len(rows), RECORD)
    for record, row in zip(made, rows, strict=True):
        for name, value in (OFF | row).items():
            record[name] = value
    return torch.from_numpy(made.view(np.int64).reshape(-1, 8))


def pairs(*added: tuple[int, float]) -> torch.Tensor:
    return torch.from_numpy(np.array(list(added), ADDED).view(np.int64))


def both(
    logits: torch.Tensor, rows: Sequence[dict[str, Any]], added: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> list[int]:  # fmt: skip
    """The tokens of the reference, after a look at those of the kernels, and at what both leave behind."""
    added = pairs() if added is None else added
    counts = torch.zeros(SLOTS, logits.shape[1], dtype=torch.int16) if counts is None else counts
    its_logits, their_logits, their_counts = logits.clone(), logits.clone().to(DEVICE), counts.clone().to(DEVICE)
    spare = torch.empty(logits.shape, dtype=torch.int32, device=DEVICE)
    made = kernels.launch(their_logits, records(*rows).to(DEVICE), added.to(DEVICE), their_counts, spare)
    drawn = draw(its_logits, records(*rows), added, counts, spare.cpu())
    assert made.tolist() == drawn.tolist()
    assert torch.equal(their_counts.cpu(), counts)
    greedy = [index for index, row in enumerate(rows) if row.get("temperature") == 0.0]
    assert torch.equal(their_logits[greedy].nan_to_num().cpu(), its_logits[greedy].nan_to_num())
    return drawn.tolist()


def noise(rows: int, size: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * scale


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 400},
    {"top_p": 1e-9},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"top_p": 1 - 1e-15},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": 300, "top_p": 0.999},
    {"furthest": furthest(0.1)},
    {"furthest": furthest(1.0)},
    {"top_k": 9, "top_p": 0.8, "furthest": furthest(0.3)},
]


@pytest.mark.parametrize(("size", "temperature"), [(1, 0.9), (300, 1e-5), (5000, 0.9)])
def test_kernels_draw_what_the_reference_draws(size: int, temperature: float) -> None:
    rows = [{"temperature": temperature, "seed": 2**64 - 1 - i, "position": i} | knob for i, knob in enumerate(FILTERS)]
    both(noise(len(rows), size), rows)


@pytest.mark.parametrize("scale", [0.0, 1e-8, 0.05])
def test_flat_distributions(scale: float) -> None:
    """All equal; nearer than a unit; all in one sixteenth of the range."""
    both(noise(len(FILTERS), 1000, scale), [{"seed": i} | knob for i, knob in enumerate(FILTERS)])


def test_all_but_one_are_held_back() -> None:
    logits = torch.full((len(FILTERS), 600), -math.inf)
    logits[:, 417] = -3.0
    assert both(logits, FILTERS) == [417] * len(FILTERS)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("odd", [-math.inf, math.inf, math.nan])
def test_what_no_model_should_say_gives_a_token_of_the_vocabulary(odd: float) -> None:
    few = FILTERS[1::4]
    assert both(torch.full((len(few), 300), odd), few) == [0] * len(few)


def test_of_equal_logits_the_first_is_taken() -> None:
    logits = torch.zeros(3, 5000)
    logits[0, [4999, 4100, 77]], logits[1, [4097, 4098]] = 1.0, 1.0
    assert both(logits, [{"temperature": 0.0}] * 3) == [77, 4097, 0]
    assert kernels.launch_greedy(logits.to(DEVICE)).tolist() == [77, 4097, 0] == sampling.greedy(logits).tolist()


def test_tokens_as_near_as_the_last_one_are_kept() -> None:
    logits = torch.full((14, 64), -9.0)
    logits[:, 10:13] = 1.0
    drawn = both(logits, [{"seed": i} | ({"top_k": 2} if i < 7 else {"top_p": 0.4}) for i in range(14)])
    assert set(drawn[:7]) == set(drawn[7:]) == {10, 11, 12}


def test_all_that_are_as_near_count_for_top_p_also_where_they_are_very_many() -> None:
    """The first token has half of the weight, and more than that if one forgets some of the others."""
    logits = torch.full((6, 320), -math.log(300))
    logits[:, 5], logits[:, 301:] = 0.0, -9.0
    drawn = both(logits, [{"seed": i, "top_k": 2, "top_p": 0.52} for i in range(6)])
    assert set(drawn) > {5}


def test_draws_equal_plain_python() -> None:
    """The definition, in exact integers."""
    logits, rows = noise(15, 50), [{"seed": 5 * i, "position": i, "temperature": 0.8} for i in range(15)]
    expected = []
    for row, values in zip(rows, (logits / torch.tensor(0.8)).double().tolist(), strict=True):
        weights = [math.floor(math.exp(-math.floor((max(values) - v) / UNIT) * UNIT) * LARGEST) for v in values]
        point = int(uniform(row["seed"], row["position"]) * 2**52) * sum(weights) >> 52
        expected.append(next(i for i in range(50) if sum(weights[: i + 1]) > point))
    assert both(logits, rows) == expected


def test_penalties_come_before_what_is_added() -> None:
    logits, size = noise(6, 4500), 4500
    counts = torch.zeros(SLOTS, size, dtype=torch.int16)
    slots, places = torch.tensor([1, 2]), torch.tensor([size + 3, size + 4400, 2 * size + 9])
    fill(counts, slots, places, torch.tensor([2, IN_PROMPT, IN_PROMPT + MOST]))
    assert counts[1, 3] == 2 and int(counts[2, 9]) & 0xFFFF == IN_PROMPT + MOST and counts.count_nonzero() == 3
    logits[0, 3], logits[1, 9] = 50.0, 2e6
    knobs = {"temperature": 0.0, "repetition": 1.5, "presence": -0.25, "frequency": 0.5}
    rows = [{"slot": 1} | knobs, {"slot": 2} | knobs, {"slot": 3} | knobs, {}, {"temperature": 0.0}, {"top_p": 0.9}]
    for row, (start, end) in zip(rows, [(0, 2), (2, 2), (2, 3), (3, 700), (700, 702), (702, 702)], strict=True):
        row.update(added_from=start, added_to=end)
    added = pairs((3, -50 / 1.5 + 0.75 + 20.0), (8, 19.0), (7, 99.0), *([(0, 0.0)] * 697), (11, 60.0), (11, 50.0))
    logits[4, 12] = 105.0
    before = counts.clone()
    drawn = both(logits, rows, added, counts)
    assert drawn[0] == 3 and drawn[1] == 9 and drawn[2] == 7 and drawn[4] == 11
    assert [int(counts[1, 3]), int(counts[3, 7])] == [3, 1]
    assert torch.equal(counts[2], before[2]), "no more than that are counted"
    assert torch.equal(counts[0], before[0])


def test_a_slot_begins_anew() -> None:
    counts = torch.ones(SLOTS, 20, dtype=torch.int16)
    fill(counts, torch.tensor([3, 0]), torch.tensor([3 * 20 + 19]), torch.tensor([5]))
    assert counts.sum(1).tolist() == [0, 20, 20, 5]


@pytest.mark.parametrize(("min_p", "distance"), [(0.0, FAR), (1e-300, FAR), (1.0, 0), (0.5, int(math.log(2) * 2**26))])
def test_min_p_is_a_distance(min_p: float, distance: int) -> None:
    assert furthest(min_p) == distance


POINTERS = {
    "logits": "*fp32", "doubles": "*fp64", "ints": "*i32", "floats": "*fp32", "words": "*i64", "counts": "*i16",
    "near": "*i32", "spare": "*i32", "best": "*fp32", "where": "*i32", "tokens": "*i64", "added": "*i64",
}  # fmt: skip
TILES = {"TILE": kernels.TILE}


@pytest.mark.parametrize(
    ("kernel", "constants", "item", "warps"),
    [
        ("_edit", TILES, 2, kernels.WARPS),  # of logits it reads only those of tokens that have been said
        ("_survey", TILES, 4, kernels.SURVEY_WARPS),
        ("_draw", TILES | {"TILES": 64, "BLOCK": kernels.BLOCK}, 4, kernels.WARPS),
    ],
)
def test_on_hopper_nothing_spills_and_rows_are_read_sixteen_bytes_at_a_time(
    kernel: str, constants: dict[str, int], item: int, warps: int
) -> None:
    names = [name for name in getattr(kernels, kernel).arg_names if name not in constants]
    signature = {name: POINTERS.get(name, "i32") for name in names}
    aligned = {"size", "share"} & {*names}
    built = compile_for_hopper("sampling_kernels", kernel, signature, constants, aligned, num_warps=warps)
    assert built.spilled == 0
    assert built.accesses("ld").count(16) >= kernels.TILE * item // 16 // (32 * warps)
