"""The same request, the same bits: log-probabilities and KV, whatever else is computed, whoever goes on with it, and
with however many threads.

On a CPU that is the compiled operations, which never do otherwise; `tests/gpu` asks the same of a GPU's."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from pathlib import Path

import pytest

from baton.common.config import EngineConfig
from baton.common.errors import InvalidRequest
from baton.engine.plan import Sampled, Slice, StepPlan
from baton.engine.runner import Engine, build_engine
from baton.engine.sequence import Sequence

from ..tiny import make_checkpoint
from .test_model import prompts, sequence

PROMPT, OTHER, THIRD = prompts(50, 33, 7)
LENGTH = 62


def start(checkpoint: Path, **settings: object) -> Engine:
    defaults = {"threads": 1, "device": "cpu", "kv_memory": 4 << 20, "max_batch_tokens": 64, "deterministic": True}
    engine = build_engine(EngineConfig(model=str(checkpoint), **(defaults | settings)), lambda share: None)
    if engine.runner.operations == "torch":
        pytest.skip("there is no C compiler")
    return engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return start(make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama"))


def made(first_block: int, tokens: Listing[int] = PROMPT) -> Sequence:
    return sequence(tokens, first_block, temperature=0.8, seed=5, logprobs=3)


def step(engine: Engine, *parts: tuple[Sequence, int]) -> list[Sampled | None]:
    """One step over (sequence, tokens to compute); what is sampled is appended."""
    slices = [Slice.of(owner, owner.launched, count) for owner, count in parts]
    found = list(engine.runner.launch(StepPlan(99, slices)).results())
    for part, sampled in zip(slices, found, strict=True):
        part.sequence.launched = part.end
        part.sequence.tokens += [sampled.token] if sampled else []
    return found


def decoded(engine: Engine, owner: Sequence, beside: Listing[Sequence] = ()) -> list[Sampled | None]:
    """All that one sequence draws up to `LENGTH`, with others in its steps."""
    found = []
    while len(owner.tokens) < LENGTH:
        found.append(step(engine, *((other, other.missing) for other in beside), (owner, owner.missing))[-1])
    return found


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Sampled | None]:
    found = decoded(engine, made(1))
    assert len({sampled.token for sampled in found if sampled}) > 3
    return found


def test_in_a_crowd(engine: Engine, alone: list[Sampled | None]) -> None:
    others = [made(61, OTHER), made(81, THIRD)]
    assert decoded(engine, made(41), others) == alone


def test_in_chunks(engine: Engine, alone: list[Sampled | None]) -> None:
    owner, other = made(41), made(61, OTHER)
    for count in (1, 17, 5):
        assert step(engine, (other, other.missing), (owner, count))[-1] is None
    assert decoded(engine, owner) == alone


def test_computed_again_after_a_preemption(engine: Engine, alone: list[Sampled | None]) -> None:
    owner = made(41)
    found = [step(engine, (owner, owner.missing))[0] for _ in range(5)]
    again = made(61)
    again.tokens = list(owner.tokens)
    assert found + decoded(engine, again) == alone


def test_handed_over(engine: Engine, alone: list[Sampled | None], tmp_path: Path) -> None:
    """Another engine goes on, with two threads, over a copy of the prompt's KV in other blocks."""
    target = start(make_checkpoint(tmp_path, "llama"), threads=2)
    assert target.fingerprint == engine.fingerprint
    owner, taken = made(41), made(101)
    found = step(engine, (owner, owner.missing))
    for ours, theirs in zip(engine.pool.layers, target.pool.layers, strict=True):
        theirs[taken.blocks.tolist()] = ours[owner.blocks.tolist()]
    taken.tokens, taken.launched = list(owner.tokens), owner.launched
    assert found + decoded(target, taken, [made(61, OTHER)]) == alone


def test_where_there_are_no_such_operations_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no deterministic operations"):
        start(make_checkpoint(tmp_path, "llama"), dtype="bfloat16")
