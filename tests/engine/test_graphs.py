"""Recorded decode steps, with a stand-in that records by remembering the function and repeats by calling it: it reads
the buffers that a graph would read, filled up as for a graph."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from baton.common.config import EngineConfig
from baton.engine.graphs import Graphs, ladder
from baton.engine.plan import Launched, Slice, StepPlan
from baton.engine.rank import Rank, load_rank
from baton.engine.runner import TorchRunner
from baton.engine.sequence import Sequence
from baton.kernels.triton_ops import TritonOps

from ..tiny import make_checkpoint
from .test_model import prompts, sequence

SIZES = [1, 2, 4]


@dataclass
class Recorder:
    """Implements `graphs.Capture`; `repeated` counts for each work, in the order of recording."""

    repeated: list[int] = field(default_factory=list)

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        number = len(self.repeated)
        self.repeated.append(0)

        def repeat() -> None:
            self.repeated[number] += 1
            work()

        return repeat


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "qwen3")


def plain(checkpoint: Path) -> TorchRunner:
    """Computes every step as it comes."""
    return TorchRunner(load(checkpoint), torch.zeros(64, dtype=torch.int64))


def recorded(checkpoint: Path) -> tuple[TorchRunner, Recorder, Rank]:
    """Over a pool in which there is nothing to be read."""
    rank, recorder, drawn = load(checkpoint), Recorder(), torch.zeros(64, dtype=torch.int64)
    for layer in rank.pool.layers:
        layer.fill_(float("nan"))
    graphs = Graphs(rank, SIZES, drawn, recorder, lambda share: None)
    return TorchRunner(rank, drawn, graphs=graphs), recorder, rank


def load(checkpoint: Path) -> Rank:
    config = EngineConfig(model=str(checkpoint), threads=1, device="cpu", kv_memory=4 << 20, max_batch_tokens=64)
    return load_rank(config, lambda share: None)


def talk(
    runner: TorchRunner, *, ahead: bool, lengths: tuple[int, ...] = (1, 16, 37), steps: int = 12
) -> list[list[int]]:
    """Greedy tokens of prompts that are computed one after the other, each joining those that decode. `ahead`: each
    step is launched before it is known what the one before it drew."""
    running: list[Sequence] = []
    waiting = [sequence(tokens, 1 + 20 * i, i) for i, tokens in enumerate(prompts(*lengths, vocabulary=60))]
    launched = None
    for _ in range(steps):
        if waiting:
            running.append(waiting.pop(0))
        plan = StepPlan(99)
        for each in running:
            if each.missing == 1:
                plan.decode(each)
            else:
                plan.add(each, each.missing)
        step = plan.sequences, runner.launch(plan)
        for each in running:
            each.launched = each.length
            each.pending += 1
        if launched is not None:
            collect(*launched)
        launched = step
        if not ahead:
            collect(*launched)
            launched = None
    if launched is not None:
        collect(*launched)
    return [each.tokens for each in running]


def collect(sequences: list[Sequence], step: Launched) -> None:
    for each, token in zip(sequences, step.results().tokens, strict=True):
        assert token is not None
        each.tokens.append(token)
        each.pending -= 1


def test_the_ladder_ends_with_the_largest_batch_and_has_no_wide_gaps() -> None:
    assert ladder(1) == [1]
    assert ladder(3) == [1, 2, 3]
    assert ladder(8) == [1, 2, 4, 8]
    assert ladder(30) == [1, 2, 4, 8, 16, 24, 30]
    for most in (64, 200, 256, 1000):
        sizes = ladder(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        for size, after in itertools.pairwise(sizes):
            assert after <= max(2 * size, 8)
            assert after - size <= max(8, size / 4)
    assert len(ladder(256)) < 30


def test_recorded_steps_draw_what_others_draw(checkpoint: Path) -> None:
    expected = talk(plain(checkpoint), ahead=False)
    runner, recorder, _ = recorded(checkpoint)
    assert talk(runner, ahead=False) == expected
    assert recorder.repeated == [9, 0, 1]  # of 4, 2 and 1: a prompt of one token is like a decode, the others are not
    assert talk(runner, ahead=True) == expected
    assert talk(plain(checkpoint), ahead=True) == expected


def test_triton_operations_take_batches_that_are_filled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
    folder = make_checkpoint(tmp_path, "llama", num_attention_heads=2, num_key_value_heads=1, **small)
    monkeypatch.setattr("baton.engine.rank.select_ops", lambda *shape: TritonOps(torch.float32))
    runner, recorder, rank = recorded(folder)
    assert rank.operations == "triton"
    talked = {"ahead": True, "lengths": (1, 5, 3), "steps": 4}
    assert talk(runner, **talked) == talk(plain(folder), **talked)
    assert recorder.repeated == [1, 0, 1]


def test_empty_rows_store_nothing(checkpoint: Path) -> None:
    runner, _, rank = recorded(checkpoint)
    talk(runner, ahead=False)
    held = {block for i in range(3) for block in sequence([0], 1 + 20 * i).blocks[:4]}
    others = [block for block in range(rank.pool.num_blocks) if block not in held]
    for layer in rank.pool.layers:
        assert bool(layer[others].isnan().all())


def test_a_step_that_no_graph_computes(checkpoint: Path) -> None:
    drawn = torch.zeros(8, dtype=torch.int64)
    graphs = Graphs(load(checkpoint), [2], drawn, Recorder(), lambda share: None)
    one, two, three = (sequence(range(9), 1 + 20 * i, i) for i in range(3))
    both = StepPlan(0, [], [one, two], [8, 8])
    assert graphs.size_for(both) == 2
    assert graphs.size_for(StepPlan(0, [], [one], [8])) == 2
    assert graphs.size_for(StepPlan(0, [], [one, two, three], [8, 8, 8])) == 0  # too many
    assert graphs.size_for(StepPlan(0, [Slice(two, 4, 5, True)], [one], [8])) == 0  # a chunk
    one.blocks *= 4
    assert graphs.size_for(both) == 0  # more blocks than the longest sequences have


def test_there_is_room_behind_the_longest_tables(checkpoint: Path) -> None:
    runner, recorder, rank = recorded(checkpoint)
    owners = [sequence([5], 1, i) for i in range(SIZES[-1])]
    for owner in owners:
        owner.blocks = array("i", range(rank.longest // rank.pool.format.block_size))
    runner.launch(StepPlan(9, [], owners, [0] * len(owners))).results()
    assert sum(recorder.repeated) == 1


def test_layers_are_told_of_after_a_recorded_step(checkpoint: Path) -> None:
    runner, recorder, rank = recorded(checkpoint)
    told: list[int] = []
    runner.launch(StepPlan(1, [], [sequence([5], 1)], [0]), told.append).results()
    assert recorder.repeated == [0, 0, 1]
    assert told == list(range(rank.model_config.num_layers))


def test_each_size_is_recorded_with_progress_from_the_largest_down(checkpoint: Path) -> None:
    shares: list[float] = []
    drawn = torch.zeros(8, dtype=torch.int64)
    graphs = Graphs(load(checkpoint), [1, 4, 2], drawn, Recorder(), shares.append)
    assert shares == [1 / 3, 2 / 3, 1.0]
    assert graphs.count == 3
