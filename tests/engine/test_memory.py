"""How much of a device the KV pool gets."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baton.common.config import EngineConfig
from baton.common.errors import InvalidRequest
from baton.engine import memory
from baton.engine.graphs import ladder
from baton.engine.memory import Demand, kv_memory
from baton.engine.rehearsal import largest, rehearsals

GB = 10**9
ALONE = Demand(total=80 * GB, free=60 * GB, held=18 * GB, step=3 * GB, graphs=2 * GB)
"""A model of 8 billion parameters on a GPU of 80 GB; 2 GB are nobody's that we know."""


def test_the_pool_gets_what_nothing_else_needs() -> None:
    assert kv_memory(ALONE, 1.0) == (60 - 3 - 2 - 0.8) * GB  # less than 80 - 18 are free


def test_a_share_counts_all_that_the_process_holds() -> None:
    assert kv_memory(ALONE, 0.5) == (40 - 18 - 3 - 2 - 0.8) * GB


def test_two_processes_on_one_device_fit() -> None:
    first = kv_memory(ALONE, 0.48)
    free = ALONE.total - ALONE.held - first - ALONE.step - ALONE.graphs
    second = kv_memory(replace(ALONE, free=free - ALONE.held), 0.48)
    assert second == first
    assert 2 * (first + ALONE.held + ALONE.step + ALONE.graphs) < ALONE.total


def test_what_others_hold_is_not_given_away() -> None:
    assert kv_memory(replace(ALONE, free=10 * GB), 1.0) == (10 - 3 - 2 - 0.8) * GB


@pytest.mark.parametrize("demand", [replace(ALONE, free=5 * GB), replace(ALONE, held=76 * GB)])
def test_nothing_left_is_refused_with_the_reason(demand: Demand) -> None:
    with pytest.raises(InvalidRequest, match=r"largest step takes 3\.0 GB and its graphs 2\.0 GB") as refused:
        kv_memory(demand, 1.0)
    assert refused.value.param == "device_memory"


class Device:
    """Where graphs take memory of torch's and of the driver's, while another process takes `greed`."""

    def __init__(self, greed: int) -> None:
        self.greed, self.free, self.held = greed, 60 * GB, 16 * GB

    def take(self, held: int, driver: int) -> None:
        self.held += held
        self.free -= held + driver


class Recorded:
    """Graphs of some sizes: memory that all share, and what each has beside it, until nobody has them any more."""

    def __init__(self, device: Device, sizes: list[int]) -> None:
        self.device, self.held, self.driver = device, GB + 5_000_000 * len(sizes), 20_000_000 * len(sizes)
        device.take(self.held, self.driver)
        device.free -= device.greed

    def __del__(self) -> None:
        self.device.take(-self.held, -self.driver)


@pytest.mark.parametrize("greed", [0, 10 * GB, -20 * GB])
def test_what_other_processes_do_meanwhile_is_not_what_graphs_take(monkeypatch: Any, greed: int) -> None:
    device = Device(greed)
    monkeypatch.setattr(memory, "Graphs", lambda rank, sizes, *others: Recorded(device, sizes))
    monkeypatch.setattr(memory, "CudaCapture", lambda: None)
    monkeypatch.setattr(memory, "_released", lambda where: device.held)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (device.free, 80 * GB))
    config = EngineConfig(model="", max_batch_tokens=512, max_running=256)
    rank: Any = SimpleNamespace(device=torch.device("cpu"))
    count = len(ladder(256))
    found = memory._graphs(rank, config)
    assert GB + 5_000_000 * count <= found <= GB + (5_000_000 + (64 << 20)) * count
    if greed == 0:
        assert found == GB + 25_000_000 * count


@pytest.mark.parametrize(("tokens", "running"), [(64, 8), (8, 64), (1, 1), (2048, 256)])
def test_the_largest_step_is_as_large_as_may_be(tokens: int, running: int) -> None:
    config = EngineConfig(model="", max_batch_tokens=tokens, max_running=running)
    plan = largest(config, longest=4096, num_blocks=4)
    assert plan.tokens == tokens
    assert len(plan) == min(tokens, running)
    assert all(part.samples and part.sequence.blocks for part in plan.parts)
    assert {block for sequence in plan.sequences for block in sequence.blocks} <= set(range(4))


def test_rehearsals_stay_within_the_longest_sequence() -> None:
    for tokens, longest in ((64, 48), (64, 512), (1, 512), (8, 2)):
        for plan in rehearsals(EngineConfig(model="", max_batch_tokens=tokens), longest, 3, batches=[1, tokens]):
            assert plan.tokens <= max(2, tokens)
            assert all(part.end <= longest and part.end <= 16 * len(part.sequence.blocks) for part in plan.parts)
