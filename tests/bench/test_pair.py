"""Two worker processes against one, through the local launcher: on a CPU here, with a model that is nobody's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.bench.engine.cluster import cluster
from baton.bench.engine.pair import SYSTEMS, Scenario, measure, settings
from baton.common.errors import NotReady
from baton.deploy.settings import Setting, resolve
from tests.tiny import make_checkpoint

SCENARIO = Scenario(decoding=2, context=40, prompt=200, answer=4, rate=8.0, seconds=0.8, longest=3000)
COMMON = {"threads": 2, "engine.max_batch_tokens": 64, "engine.kv_memory": 16 << 20}


def test_workers_of_a_system_share_one_gpu() -> None:
    given = settings("cuda", SYSTEMS["1P1D"], COMMON)
    config = resolve(Setting(path, value, "test") for path, value in given.items())
    assert [(pool.name, pool.resources.gpus, pool.engine.device_memory) for pool in config.pools] == [
        ("prefill", 0.5, 0.34),
        ("decode", 0.5, 0.58),
    ]
    assert all(pool.engine.dummy_weights and pool.engine.device == "cuda" for pool in config.pools)


async def test_one_prefills_one_decodes_and_both_latencies_are_seen(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, max_position_embeddings=4096)
    given = settings("cpu", SYSTEMS["1P1D"], COMMON)
    (found,) = await measure("1P1D", model, given, [SCENARIO])
    assert found.answered == found.arrived > 0
    assert 0 < found.ttft.p50 <= found.ttft.p99 and 0 < found.itl.p50 <= found.itl.p99 and found.arriving_itl.mean > 0
    assert found.decode_tokens_per_s > 0


async def test_a_worker_that_cannot_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotReady, match=r"colocated-0 cannot be kept running[\s\S]*architecture"):
        async with asyncio.timeout(60), cluster(tmp_path, settings("cpu", SYSTEMS["colocated"], COMMON)):
            pass
