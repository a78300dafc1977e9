"""Closed loop, open loop, warm-up."""

from __future__ import annotations

import pytest

from baton.bench import load
from baton.bench.client import Target
from baton.bench.wire import HttpClient
from baton.bench.workload import Job, Words, poisson, random_jobs
from tests.bench.fake_server import fake_server


def jobs(count: int, output_len: int = 3) -> list[Job]:
    return random_jobs(count, 8, output_len, seed=1, words=Words())


async def test_closed_loop_keeps_exactly_so_many_in_flight():
    async with fake_server(gap_s=0.01) as server:
        http = HttpClient(server.url)
        seen = []
        run = await load.closed_loop(http, Target("fake"), jobs(12), 4, seen.append)
        http.close()
    assert server.most_in_flight == 4
    assert server.connections == 4
    assert len(run.samples) == len(seen) == 12
    assert not any(sample.error for sample in run.samples)
    assert run.wall_s > 0


async def test_open_loop_does_not_wait_for_earlier_requests():
    async with fake_server(first_s=0.3) as server:
        http = HttpClient(server.url)
        run = await load.open_loop(http, Target("fake"), poisson(jobs(10), rate=1000, seed=2))
        http.close()
    assert server.most_in_flight == 10
    assert [sample.error for sample in run.samples] == [""] * 10


async def test_open_loop_is_bounded(monkeypatch):
    monkeypatch.setattr(load, "MAX_IN_FLIGHT", 3)
    async with fake_server(first_s=0.2) as server:
        http = HttpClient(server.url)
        run = await load.open_loop(http, Target("fake"), jobs(5))
        http.close()
    assert server.most_in_flight == 3
    assert sorted(sample.error for sample in run.samples) == ["", "", "", "client_limit", "client_limit"]


async def test_open_loop_counts_from_when_a_request_was_due():
    async with fake_server() as server:
        http = HttpClient(server.url)
        run = await load.open_loop(http, Target("fake"), poisson(jobs(5), rate=100, seed=2))
        http.close()
    starts = [sample.start for sample in sorted(run.samples, key=lambda s: s.start)]
    due = [job.arrival for job in poisson(jobs(5), rate=100, seed=2)]
    assert [start - starts[0] for start in starts] == pytest.approx(due)


async def test_warm_up_reports_a_server_that_fails_every_request():
    async with fake_server() as server:
        http = HttpClient(server.url)
        assert await load.first_model(http) == "fake"
        await load.warm_up(http, Target("fake"), jobs(2), 2)
        with pytest.raises(ConnectionError, match="http_429"):
            await load.warm_up(http, Target("busy"), jobs(2), 2)
        http.close()
