from __future__ import annotations

from collections import Counter

from prometheus_client import CollectorRegistry, generate_latest

from baton.common.messages import Load
from baton.common.types import Role
from baton.gateway.fleet_metrics import FleetNumbers
from baton.gateway.metrics import Histogram, Metrics
from baton.router.stats import Snapshot, Stats, WorkerSnapshot


def test_histogram_buckets_are_cumulative_and_inclusive() -> None:
    histogram = Histogram("h", "help", (1.0, 2.0))
    for seconds in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(seconds)
    histogram.observe(2.0, times=3)
    samples = {tuple(sample.labels.values()): sample.value for sample in histogram.family().samples if sample.labels}
    assert samples == {("1.0",): 2, ("2.0",): 6, ("+Inf",): 7}
    totals = {sample.name: sample.value for sample in histogram.family().samples if not sample.labels}
    assert totals == {"h_count": 7, "h_sum": 18.0}


def test_tokens_that_come_together_count_one_gap_and_the_rest_as_none() -> None:
    metrics = Metrics("gateway-0", FleetNumbers(lambda: Snapshot((), 0, 0, 0, Stats()), lambda: 0.0))
    metrics.arrived(0.5, 3, first=True)
    metrics.arrived(0.25, 2, first=False)
    lines = dict(line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if not line.startswith("#"))
    assert float(lines["baton_time_to_first_token_seconds_count"]) == 1
    assert float(lines["baton_inter_token_latency_seconds_count"]) == 4
    assert float(lines["baton_inter_token_latency_seconds_sum"]) == 0.25


def test_every_number_of_the_fleet_is_there() -> None:
    load = Load(
        waiting=1, running=2, queued_prefill_tokens=3, total_blocks=4, free_blocks=5, cached_blocks=6,
        reserved_blocks=7, steps=8, preemptions=9, prompt_tokens=10, cached_tokens=11, output_tokens=12,
        handovers=13, handover_bytes=14, handover_seconds=15.5, handover_skipped_blocks=16,
        handover_aborts=(("lease", 17), ("checksum", 18)), moves=28, shared_tokens=29,
        loop_age_s=19.5, handover_exposed_seconds=31,
    )  # fmt: skip
    worker = WorkerSnapshot("decode-0", Role.DECODE, "ready", 1, load, 0, 0, 0)
    stats = Stats(
        decisions=Counter(prefix=20),
        prefix_hit_tokens=21,
        routed_tokens=22,
        losses=23,
        resyncs=24,
        moves=Counter(moved=30),
    )
    registry = CollectorRegistry()
    members = {("decode", "ready"): 33, ("decode", "unreachable"): 34}
    registry.register(FleetNumbers(lambda: Snapshot((worker,), 25, 26, 27, stats, None, members), lambda: 32.0))
    lines = [
        line.rsplit(" ", 1) for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")
    ]
    values = {
        name.replace('role="decode",', "").replace('worker="decode-0"', "w"): float(value) for name, value in lines
    }
    # Six other states have no worker; of 4 blocks 5 are free and 6 cached, which is -1.75 in use.
    assert sorted(values.values()) == [-1.75, *[0] * 6, *range(1, 15), 15.5, *range(16, 19), 19.5, *range(20, 35)]
    assert values['baton_workers{state="ready"}'] == 33
    assert values['baton_handover_aborts_total{reason="lease",w}'] == 17
    assert values['baton_kv_blocks{state="cached",w}'] == 6
    assert values["baton_prefix_hit_tokens_total"] == 21
