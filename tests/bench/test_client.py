"""One request, and what the client makes of every way in which an answer can go."""

from __future__ import annotations

import pytest

from baton.bench.client import Sample, Target, ask
from baton.bench.wire import HttpClient
from tests.bench.fake_server import fake_server


@pytest.mark.parametrize("chat", [False, True])
async def test_a_sample_has_every_event_and_the_servers_own_counts(chat):
    async with fake_server() as server:
        http = HttpClient(server.url)
        sample = await ask(http, Target("fake", chat=chat), "hello" if chat else (1, 2, 3), 5)
        http.close()
    assert (sample.error, sample.tokens, len(sample.events)) == ("", 5, 5)
    assert (sample.prompt_tokens, sample.cached_tokens, sample.timeline) == (7, 3, {"first_token": 0.5})
    assert sample.start < sample.events[0] <= sample.events[-1] <= sample.end
    assert len(sample.itl) == 4


@pytest.mark.parametrize(
    ("model", "error"),
    [("busy", "http_429"), ("dies", "connection"), ("breaks", "stream"), ("short", "length")],
)
async def test_failures_are_named_by_type(model, error):
    async with fake_server() as server:
        http = HttpClient(server.url)
        sample = await ask(http, Target(model), (1,), 4)
        http.close()
    assert sample.error == error


async def test_a_server_that_does_not_answer_is_a_timeout():
    async with fake_server(first_s=60) as server:
        http = HttpClient(server.url)
        sample = await ask(http, Target("fake", timeout_s=0.05), (1,), 4)
    assert sample.error == "timeout"


async def test_no_server_is_a_connection_error():
    sample = await ask(HttpClient("http://127.0.0.1:9"), Target("fake"), (1,), 4)
    assert sample.error == "connection"


async def test_a_shorter_answer_is_right_where_the_end_of_text_is_respected():
    async with fake_server() as server:
        http = HttpClient(server.url)
        sample = await ask(http, Target("short", ignore_eos=False), (1,), 4)
        http.close()
    assert (sample.error, sample.tokens) == ("", 3)
    assert "ignore_eos" not in server.bodies[0]


async def test_connections_are_used_again_unless_an_answer_was_abandoned():
    async with fake_server(gap_s=0.01) as server:
        http = HttpClient(f"{server.url}/v1/")
        for _ in range(3):
            assert not (await ask(http, Target("fake"), (1,), 2)).error
        assert server.connections == 1
        assert (await ask(http, Target("fake", timeout_s=0.02), (1,), 50)).error == "timeout"
        assert not (await ask(http, Target("fake"), (1,), 2)).error
        assert server.connections == 2
        http.close()


def test_latencies_follow_their_definitions():
    sample = Sample(start=10.0, events=[10.5, 10.6, 10.9], end=11.0, tokens=3)
    assert sample.ttft == 0.5
    assert sample.e2e == 1.0
    assert sample.tpot == 0.25
    assert sample.itl == pytest.approx([0.1, 0.3])
    assert Sample(start=0.0, events=[1.0], end=1.0, tokens=1).tpot is None
