"""What must hold of the runner beside the right tokens: nothing in a batch touches anything else in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from baton.common.config import EngineConfig
from baton.common.errors import EngineFailure, InvalidRequest
from baton.engine.batch import Batch
from baton.engine.batches import Batches
from baton.engine.checkpoint import weights_digest
from baton.engine.follower import Followers
from baton.engine.plan import Slice, StepPlan
from baton.engine.runner import Engine, TorchRunner, build_engine
from baton.engine.weights import load_weights
from baton.kernels.reference import TorchOps

from ..tiny import make_checkpoint
from .test_model import advance, prompts, sequence, start

EACH_TYPE = pytest.mark.parametrize("kv_dtype", ["auto", "int8", "float8_e4m3", "bfloat16"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture
def engine(checkpoint: Path) -> Engine:
    return start(checkpoint)


def kept(engine: Engine, blocks: Sequence[int], count: int) -> list[torch.Tensor]:
    """Elements and scales of the first `count` tokens that `blocks` hold, layer by layer."""
    pool, blocks = engine.pool, list(blocks)
    found = [layer[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :count].float() for layer in pool.layers]
    return found + [layer[blocks].permute(1, 2, 0, 3).flatten(2, 3)[:, :, :count] for layer in pool.scales]


@EACH_TYPE
def test_chunks_batches_and_decodes_compute_the_same_bits(checkpoint: Path, kv_dtype: str) -> None:
    engine = start(checkpoint, kv_dtype=kv_dtype)
    if engine.runner.operations == "torch":
        pytest.skip("only the compiled operations promise this")
    tokens, other = prompts(90, 70)
    whole, chunked, stepped = sequence(tokens, 1), sequence(tokens, 21), sequence(tokens[:60], 41)
    stepped.tokens = list(tokens)
    advance(engine, [(whole, 90)])
    for count in (1, 30, 7, 52):
        advance(engine, [(sequence(other, 61), 40), (chunked, count)])
    advance(engine, [(stepped, 60)])
    for _ in range(30):
        advance(engine, [(sequence(other, 81), 1), (stepped, 1)])
    expected = kept(engine, whole.blocks, 90)
    for again in (chunked, stepped):
        assert again.tokens == whole.tokens
        for found, wanted in zip(kept(engine, again.blocks, 90), expected, strict=True):
            assert torch.equal(found, wanted)


@EACH_TYPE
def test_what_free_blocks_hold_does_not_matter(checkpoint: Path, kv_dtype: str) -> None:
    engine = start(checkpoint, kv_dtype=kv_dtype)
    (tokens,) = prompts(37)
    clean, dirty = sequence(tokens, 1), sequence(tokens, 1)
    for each in (clean, dirty):
        while len(each.tokens) < 60:
            advance(engine, [(each, each.missing)])
        engine.pool.fill(range(engine.num_blocks), float("nan"))
    assert dirty.tokens == clean.tokens


def test_layers_report_in_order_once_their_kv_is_in_the_pool(engine: Engine) -> None:
    (tokens,) = prompts(20)
    owner = sequence(tokens, 1)
    engine.pool.fill(owner.blocks, float("nan"))
    seen: list[tuple[int, bool, bool]] = []

    def on_layer(index: int) -> None:
        layers = kept(engine, owner.blocks, 20)
        later = all(bool(layer.isnan().all()) for layer in layers[index + 1 :])
        seen.append((index, bool(layers[index].isfinite().all()), later))

    engine.runner.launch(StepPlan(20, [Slice.of(owner, 0, 20)]), on_layer).results()
    assert seen == [(i, True, True) for i in range(engine.model_config.num_layers)]


def test_results_are_in_the_plan_order(engine: Engine) -> None:
    first, second, third = (sequence(tokens, 1 + 20 * i) for i, tokens in enumerate(prompts(12, 30, 5)))
    advance(engine, [(third, 4), (first, 11)])
    alone = [
        engine.runner.launch(StepPlan(99, [Slice.of(s, s.launched, s.missing)])).results().tokens[0]
        for s in (third, first)
    ]
    found = engine.runner.launch(
        StepPlan(99, [Slice.of(second, 0, 10), Slice.of(third, 4, 1), Slice.of(first, 11, 1)])
    ).results()
    assert found.tokens == [None, *alone]
    assert all(isinstance(each, int) for each in alone)


def test_a_step_that_samples_nothing(engine: Engine) -> None:
    (tokens,) = prompts(30)
    assert engine.runner.launch(StepPlan(99, [Slice.of(sequence(tokens, 1), 0, 10)])).results().tokens == [None]


def test_compiled_and_torch_operations_agree(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tokens,) = prompts(40)
    fast = start(checkpoint)
    monkeypatch.setattr("baton.engine.rank.select_ops", lambda *shape: TorchOps())
    plain = start(checkpoint)
    assert plain.runner.operations == "torch"
    assert plain.fingerprint != fast.fingerprint or fast.runner.operations == "torch"
    for engine in (fast, plain):
        owner = sequence(tokens, 1)
        while len(owner.tokens) < 70:
            advance(engine, [(owner, owner.missing)])
    torch.testing.assert_close(kept(fast, owner.blocks, 69), kept(plain, owner.blocks, 69), rtol=1e-4, atol=1e-4)


def test_bfloat16_and_dummy_weights_run(checkpoint: Path) -> None:
    engine = start(checkpoint, dtype="bfloat16", dummy_weights=True)
    (tokens,) = prompts(40)
    owner = sequence(tokens, 1)
    advance(engine, [(owner, 40)])
    advance(engine, [(owner, 1)])
    assert all(0 <= token < engine.vocab_size for token in owner.tokens)


def test_fingerprint_tells_what_differs(checkpoint: Path, tmp_path: Path) -> None:
    same = start(checkpoint).fingerprint
    others = [
        start(checkpoint, dtype="bfloat16").fingerprint,
        start(make_checkpoint(tmp_path / "b", "llama", seed=1)).fingerprint,
    ]
    assert start(checkpoint, kv_memory=8 << 20, max_batch_tokens=32).fingerprint == same
    assert start(checkpoint, block_size=32, kv_dtype="int8").fingerprint == same  # the KV format tells these
    assert len({same, *others}) == 3


def test_lengths_are_bounded_by_the_pool(checkpoint: Path) -> None:
    engine = start(checkpoint)
    block = engine.format.num_layers * engine.format.block_bytes
    assert engine.max_model_len == 512
    assert start(checkpoint, max_model_len=100).max_model_len == 100
    small = start(checkpoint, kv_memory=3 * block)
    assert (small.num_blocks, small.max_model_len) == (3, 48)
    with pytest.raises(InvalidRequest):
        start(checkpoint, kv_memory=block - 1)


def test_other_ranks_are_told_what_was_drawn(engine: Engine) -> None:
    """They have not seen it, also where this rank takes it from the device."""
    told: list[list[int]] = []

    class Told:
        def send(self, _command: str, *batch: Any) -> None:
            told.append(Batch.unpack(*batch).arrays().tokens.tolist())

    runner = TorchRunner(engine.runner._rank, torch.zeros(9, dtype=torch.int64), cast(Followers, Told()))
    owner = sequence([5, 6, 7], 1)
    for last in range(2, 6):
        owner.tokens += runner.launch(StepPlan(9, [], [owner], [last])).results().drawn
    assert told == [[token] for token in owner.tokens[2:-1]]


def test_no_memory_for_the_batch_itself_is_typed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is memory from which a device fetches, and there may be none."""

    def make(*_: object) -> Batch:
        raise torch.OutOfMemoryError("no pinned memory")

    monkeypatch.setattr(Batches, "make", make)
    with pytest.raises(EngineFailure, match="no pinned memory"):
        engine.runner.launch(StepPlan(9, [], [sequence([5], 1)], [0]))


def test_a_failure_inside_torch_is_typed(engine: Engine) -> None:
    owner = sequence([10_000], 1)  # beyond the vocabulary
    with pytest.raises(EngineFailure):
        engine.runner.launch(StepPlan(1, [Slice.of(owner, 0, 1)])).results()


def test_weights_that_do_not_fit_are_named(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from baton.engine.model_config import ModelConfig
    from baton.engine.shard import shard

    whole, tensors = shard(ModelConfig.load(checkpoint)), load_file(checkpoint / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())

    def load(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, tmp_path / "model.safetensors")
        load_weights(tmp_path, whole, TorchOps(), torch.float32, torch.device("cpu"), lambda share: None)

    name = "model.layers.1.mlp.up_proj.weight"
    load(tensors | {"lm_head.weight": torch.zeros(2)})
    with pytest.raises(InvalidRequest, match=f"{name} is missing"):
        load({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(InvalidRequest, match=f"{name} is"):
        load(tensors | {name: torch.zeros(3, 3)})
    with pytest.raises(InvalidRequest, match=r"unexpected tensors: model\.extra"):
        load(tensors | {"model.extra": torch.zeros(3)})
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_weights(tmp_path, whole, TorchOps(), torch.float32, torch.device("cpu"), lambda share: None)


def test_shards_load_like_one_file(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    (tokens,) = prompts(33)
    plan = StepPlan(99, [Slice.of(sequence(tokens, 1), 0, 33)])
    assert start(tmp_path).runner.launch(plan).results() == start(checkpoint).runner.launch(plan).results()


def test_progress_rises_to_one(checkpoint: Path) -> None:
    shares: list[float] = []
    build_engine(EngineConfig(model=str(checkpoint), device="cpu", threads=1, kv_memory=1 << 20), shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_digest_sees_a_changed_weight(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert weights_digest(tmp_path) == weights_digest(checkpoint)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert weights_digest(tmp_path) != weights_digest(checkpoint)
