"""The stand-in worker speaks the real protocol: what a router would read from it."""

from __future__ import annotations

import asyncio

import pytest

from baton.bench.gateway import TOKEN, StandinProcess, cpu_seconds
from baton.bench.workload import Words
from baton.common.messages import Hello, StepReport, Submit
from baton.common.types import FinishReason, Request, SamplingParams, WorkerInfo
from baton.protos.rpc import Peer


@pytest.fixture
async def standin():
    process, status = await StandinProcess.start(Words([5, 6, 7], ["a", "b", "c"]), 100)
    peer = Peer(status.address, TOKEN)
    yield process, status, peer
    await peer.close()
    await process.stop()


def submit(ticket: int, prompt: tuple[int, ...], max_tokens: int) -> Submit:
    return Submit(ticket, 1, Request("r", prompt, len(prompt), SamplingParams(max_tokens)))


async def read_until_finished(stream, tickets: set[int]) -> list[StepReport]:
    reports = []
    async with asyncio.timeout(10):
        while tickets:
            report = await stream.read()
            reports.append(report)
            tickets = tickets - {end.ticket for end in report.finished}
    return reports


async def test_every_request_gets_its_tokens_in_order_one_a_step(standin):
    process, status, peer = standin
    assert (await process.tell({"step_s": 0.001})) == {"step_s": 0.001}
    stream = peer.session()
    await stream.write(Hello("router", 1, status.epoch))
    info = await stream.read()
    assert isinstance(info, WorkerInfo) and info.ref.epoch == status.epoch
    await stream.write(submit(1, (40, 41, 42), 4))
    await stream.write(submit(2, (50, 51), 2))
    reports = await read_until_finished(stream, {1, 2})
    tokens = [token for report in reports for token in report.tokens]
    assert [(t.position, t.token) for t in tokens if t.ticket == 1] == [(3, 5), (4, 6), (5, 7), (6, 5)]
    assert [(t.position, t.token) for t in tokens if t.ticket == 2] == [(2, 7), (3, 5)]
    assert all(len({t.ticket for t in report.tokens}) == len(report.tokens) for report in reports)
    assert [s.ticket for report in reports for s in report.started] == [1, 2]
    assert {end.reason for report in reports for end in report.finished} == {FinishReason.LENGTH}
    stamps = (await process.tell({"stamps": True}))["stamps"]
    assert {key: len(times) for key, times in stamps.items()} == {"40-41": 4, "50-51": 2}
    assert (await process.tell({"stamps": True}))["stamps"] == {}
    stream.cancel()


async def test_its_books_balance_and_its_processor_time_can_be_read(standin):
    _, status, peer = standin
    report = await peer.check(timeout_s=5)
    assert report.ok and report.free_blocks == report.total_blocks
    assert cpu_seconds(status.pid) > 0
