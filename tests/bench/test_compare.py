"""The comparison's arithmetic, and its order of runs, on systems that are not there."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from rich.console import Console

from baton.bench import compare, systems, verdict
from baton.bench.client import Target
from baton.bench.compare import COLOCATED, HALF, PAIR, TRANSFORMERS, BatonSystem, Burst, Measured, Plan
from baton.bench.compare import TransformersSystem as Transformers
from baton.bench.systems import Generated
from baton.bench.wire import HttpClient
from baton.common.errors import BatonError, NotReady
from tests.bench.fake_server import fake_server


class Recorder:
    """A system that only notes what it is asked."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    async def burst(self, prompts, output_len, width):
        self.log.append((self.name, width, tuple(prompts)))
        return Burst(100.0, [0.1], [0.01])

    async def long(self, prompts, measured):
        self.log.append((self.name, "long", tuple(prompts)))
        measured.long_ttft.append(1.0)


async def test_each_round_runs_every_system_on_the_same_prompts_in_another_order(monkeypatch):
    log, order = [], []

    @asynccontextmanager
    async def running(name, plan):
        order.append(name)
        yield Recorder(log, name)

    monkeypatch.setattr(compare, "running", running)
    plan = Plan(model=Path(), rounds=2, widths=(1, 32), input_len=16)
    results = await compare.compare(plan, lambda _: None)
    assert order == [COLOCATED, PAIR, TRANSFORMERS, HALF, PAIR, TRANSFORMERS, HALF, COLOCATED]
    assert set(results[HALF].bursts) == set() and len(results[HALF].long_ttft) == 2
    assert {width: len(bursts) for width, bursts in results[PAIR].bursts.items()} == {1: 2, 32: 2}
    asked = {name: [entry[1:] for entry in log if entry[0] == name] for name in (COLOCATED, PAIR, TRANSFORMERS)}
    assert asked[COLOCATED] == asked[PAIR] == asked[TRANSFORMERS]
    counted = [prompts for _, width, prompts in log if width == 32]
    assert {len(prompts) for prompts in counted} == {32}
    assert {len(prompt) for prompts in counted for prompt in prompts} == {16}
    seen = [prompt for _, _, prompts in (e for e in log if e[0] == PAIR) for prompt in prompts]
    assert len(set(seen)) == len(seen)  # nothing is asked twice: no answer comes from a cache


async def test_baton_is_measured_through_http():
    async with fake_server() as server:
        http = HttpClient(server.url)
        system, measured = BatonSystem(http, Target("fake")), Measured()
        burst = await system.burst([(1, 2)] * 4, 3, 2)
        await system.long([(1, 2)] * 2, measured)
        with pytest.raises(BatonError, match="http_429"):
            await BatonSystem(http, Target("busy")).burst([(1, 2)], 3, 1)
        with pytest.raises(BatonError, match="http_429"):
            await BatonSystem(http, Target("busy")).long([(1, 2)], Measured())
        http.close()
    assert len(burst.ttft) == 4 and len(burst.itl) == 8 and burst.tokens_per_s > 0
    assert len(measured.long_ttft) == 2 and measured.timelines == [{"first_token": 0.5}] * 2
    assert measured.handover == {"handover_bytes": 1000.0, "requests": 2.0}


async def test_transformers_is_measured_batch_by_batch():
    class Process:
        async def generate(self, prompts, output_len):
            return Generated([0.5 + 0.1 * i for i in range(output_len)], 0.5 * len(prompts))

    burst = await Transformers(Process()).burst([(1,), (2,), (3,)], 4, 2)
    assert burst.tokens_per_s == pytest.approx(3 * 4 / 1.5)
    assert burst.ttft == [0.5, 0.5, 0.5]
    assert burst.itl == pytest.approx([0.1] * 6)


def measured(rate: float, ttft: float, **more) -> Measured:
    bursts = {1: [Burst(r, [0.2], [0.05]) for r in (rate, rate * 3, rate / 2)]}
    return Measured(bursts=bursts, long_ttft=[ttft], **more)


def test_ratios_and_bars_are_against_transformers_in_the_same_run():
    results = {COLOCATED: measured(26.0, 1.0), TRANSFORMERS: measured(12.0, 1.0)}
    ours = next(row for row in verdict.rows(results) if row.system == COLOCATED)
    assert (ours.tokens_per_s, ours.ratio) == (26.0, pytest.approx(26 / 12))  # medians
    assert list(verdict.bars(results).values()) == [True, True]
    results[COLOCATED] = measured(20.0, 1.2)
    assert list(verdict.bars(results).values()) == [False, False]


def test_what_a_handover_costs_is_the_difference_to_the_same_threads_without_one():
    counters = {"handover_bytes": 4e7, "handover_seconds": 4.0, "requests": 2.0}
    results = {PAIR: measured(10.0, 2.0, handover=counters), HALF: measured(10.0, 1.9)}
    cost = verdict.handover(results)
    assert cost is not None
    assert (cost.bytes, cost.seconds, cost.gb_per_s) == (2e7, 2.0, pytest.approx(0.01))
    assert (
        cost.after_prefill == pytest.approx(0.1)
        and cost.ttft_share == pytest.approx(0.05)
        and cost.hidden == pytest.approx(0.95)
    )
    assert verdict.handover({PAIR: measured(10.0, 2.0)}) is None


def test_a_comparison_without_transformers_has_no_ratio_and_no_verdict():
    results = {COLOCATED: measured(26.0, 1.0, timelines=[{"routed": 0.1, "first_token": None}, {"routed": 0.3}])}
    assert math.isnan(verdict.rows(results)[0].ratio)
    assert verdict.bars(results) == {}
    document = verdict.document(results, bandwidth=20e9, weights=500_000_000)
    assert document["limit_tokens_per_s_at_1"] == 40.0
    assert document["timeline_512_s"] == {COLOCATED: {"routed": pytest.approx(0.2)}}
    console = Console(width=160, record=True, quiet=True)
    console.print(verdict.table(results, 40.0))


async def test_a_server_to_be_measured_asks_for_no_key(monkeypatch, tmp_path):
    """Whoever has used one has its key in the environment, where the server would find it."""
    server = tmp_path / "baton"
    server.write_text('#!/bin/sh\necho "key: ${BATON_API_KEY-none}"\nexit 3\n')
    server.chmod(0o755)
    monkeypatch.setattr(systems, "BATON", str(server))
    monkeypatch.setenv("BATON_API_KEY", "secret")
    with pytest.raises(NotReady, match="ended with code 3\nkey: none"):
        async with systems.baton(tmp_path, (), 1):
            pass
