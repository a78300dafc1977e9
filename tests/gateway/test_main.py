"""The gateway's process as a whole, in front of the real router and stand-in workers on the real protocol."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.common.cluster import TraceQuestion
from baton.common.config import GatewayConfig, RouterConfig
from baton.common.errors import BatonError
from baton.common.types import Role
from baton.gateway.main import _listen, _url, run
from tests.fake_worker import VOCAB, FakeWorker, fleet
from tests.gateway.controllers import FakeController, controlled

TOKEN = "cluster"


@pytest.fixture
def wide_dir(model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with the vocabulary that the stand-in workers draw from."""
    for path in model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB}))
    return tmp_path


@asynccontextmanager
async def running(
    model_dir: Path, *workers: FakeWorker, drain_s: float = 5.0, **rest: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway as in `attended`, without its controller."""
    async with attended(model_dir, *workers, drain_s=drain_s, **rest) as (_, client):
        yield client


@asynccontextmanager
async def attended(
    model_dir: Path, *workers: FakeWorker, drain_s: float = 5.0, **rest: Any
) -> AsyncIterator[tuple[FakeController, httpx.AsyncClient]]:
    """A gateway process's whole inside, in this process; ended by SIGTERM if it still runs."""
    controller = FakeController(*(worker.status for worker in workers))
    port = free_port()
    async with controlled(controller, TOKEN) as address:
        config = GatewayConfig(
            model=str(model_dir), model_name="tiny", name="gateway-0", port=port, controller=address,
            cluster_token=TOKEN, router=RouterConfig(place_timeout_s=2.0), drain_s=drain_s, max_model_len=4096, **rest,
        )  # fmt: skip
        gateway = asyncio.create_task(run(config))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            try:
                yield controller, client
            finally:
                if not gateway.done():
                    os.kill(os.getpid(), signal.SIGTERM)
                async with asyncio.timeout(15):
                    await gateway


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


async def until_ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                if (await client.get("/ready")).status_code == 200:
                    return
            except httpx.ConnectError:
                pass
            await asyncio.sleep(0.02)


def pair(**options: float) -> tuple[FakeWorker, FakeWorker]:
    return (
        FakeWorker("prefill-0", Role.PREFILL, token=TOKEN, **options),  # type: ignore[arg-type]
        FakeWorker("decode-0", Role.DECODE, token=TOKEN, **options),  # type: ignore[arg-type]
    )


async def test_a_request_all_the_way(wide_dir: Path) -> None:
    workers = pair()
    async with fleet(*workers), running(wide_dir, *workers) as client:
        await until_ready(client)
        body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 20, "ignore_eos": True}
        whole = await client.post("/v1/completions", json=body)
        assert whole.status_code == 200
        assert whole.json()["usage"]["completion_tokens"] == 20
        stages = json.loads(whole.headers["baton-timeline"])
        assert list(stages)[:2] == ["received", "routed"]
        assert "handover_done" in stages and "last_token" in stages
        streamed = await client.post("/v1/completions", json={**body, "stream": True})
        events = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
        text = whole.json()["choices"][0]["text"]
        assert text
        assert "".join(event["choices"][0]["text"] for event in events) == text
        assert len(events) == 21


async def test_metrics_of_workers_and_router(wide_dir: Path) -> None:
    workers = pair()
    async with fleet(*workers), running(wide_dir, *workers) as client:
        await until_ready(client)
        await client.post("/v1/completions", json={"model": "tiny", "prompt": [5] * 40, "max_tokens": 2})
        lines = dict(
            line.rsplit(" ", 1) for line in (await client.get("/metrics")).text.splitlines() if not line.startswith("#")
        )
        assert lines['baton_kv_blocks{role="decode",state="total",worker="decode-0"}'] == "4096.0"
        assert 'baton_requests_running{role="prefill",worker="prefill-0"}' in lines
        assert 'baton_preemptions_total{role="decode",worker="decode-0"}' in lines
        assert 'baton_handover_bytes_total{role="prefill",worker="prefill-0"}' in lines
        assert sum(float(value) for name, value in lines.items() if name.startswith("baton_router_decisions")) == 1
        assert float(lines["baton_routed_tokens_total"]) == 40
        assert float(lines["baton_request_seconds_count"]) == 1
        assert float(lines["baton_router_oldest_wait_seconds"]) == 0
        assert float(lines['baton_workers{role="decode",state="ready"}']) == 1
        assert float(lines['baton_workers{role="decode",state="failed"}']) == 0


async def test_the_controller_hears_of_the_gateway_and_finds_each_choice_of_a_request(wide_dir: Path) -> None:
    workers = pair()
    async with fleet(*workers), attended(wide_dir, *workers) as (controller, client):
        await until_ready(client)
        (hello,) = controller.hellos
        assert (hello.name, hello.url) == ("gateway-0", str(client.base_url).rstrip("/"))
        body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, "n": 2}
        response = await client.post("/v1/completions", json=body)
        names = [response.json()["id"], response.headers["x-request-id"]]
        for number, name in enumerate((*names, names[0] + "-1", names[1] + "-1")):
            trace = (await controller.ask(TraceQuestion(number, name))).trace
            assert trace is not None and trace.request_id == f"{names[1]}-{number // 2}"
            assert (trace.gateway, trace.outcome, trace.output_tokens) == ("gateway-0", "length", 4)
            assert {span.worker for span in trace.spans} == {"", "prefill-0", "decode-0"}
        await client.post("/v1/completions", json={**body, "n": 1}, headers={"x-request-id": "mine"})
        assert (await controller.ask(TraceQuestion(9, "cmpl-mine"))).trace is not None
        async with asyncio.timeout(10):
            while sum(traffic.finished for traffic in controller.traffic) < 3:
                await asyncio.sleep(0.05)


async def test_a_gateway_that_shares_its_port_leaves_it_when_it_drains_and_keeps_its_own(wide_dir: Path) -> None:
    workers = pair(step_s=0.01)
    own = free_port()
    async with (
        fleet(*workers),
        running(wide_dir, *workers, reuse_port=True, own_port=own) as shared,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{own}", timeout=20) as client,
    ):
        await until_ready(client)
        assert 'baton_gateway_info{name="gateway-0"' in (await client.get("/metrics")).text
        with _listen("127.0.0.1", shared.base_url.port or 0, shared=True):
            pass  # another gateway may listen there
        with pytest.raises(BatonError, match="cannot listen"):
            _listen("127.0.0.1", own)
        body = {"model": "tiny", "prompt": [5], "max_tokens": 100, "ignore_eos": True, "stream": True}
        async with shared.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
            async with httpx.AsyncClient(base_url=shared.base_url) as late:
                with pytest.raises(httpx.ConnectError):
                    await late.get("/ready")
            assert (await client.get("/ready")).json()["state"] == "draining"
            assert [line async for line in lines if line][-1] == "data: [DONE]"


async def test_without_workers_it_is_alive_and_not_ready(model_dir: Path) -> None:
    async with running(model_dir) as client:
        async with asyncio.timeout(10):
            while True:
                try:
                    response = await client.get("/ready")
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.02)
        assert response.status_code == 503
        assert response.json()["state"] == "loading"
        assert (await client.get("/health")).status_code == 200
        refused = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers


async def test_sigterm_lets_streams_finish_and_takes_nothing_new(wide_dir: Path) -> None:
    workers = pair(step_s=0.01)
    async with fleet(*workers), running(wide_dir, *workers) as client:
        await until_ready(client)
        body = {"model": "tiny", "prompt": [5], "max_tokens": 60, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
            assert (await client.get("/ready")).json()["state"] == "draining"
            assert (await client.post("/v1/completions", json=body)).status_code == 503
            rest = [line async for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) == 61
    assert not workers[1].running


async def test_streams_that_outlast_the_drain_end_with_an_error(wide_dir: Path) -> None:
    workers = pair(step_s=0.02)
    async with fleet(*workers), running(wide_dir, *workers, drain_s=0.1) as client:
        await until_ready(client)
        body = {"model": "tiny", "prompt": [5], "max_tokens": 3000, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            rest = [line async for line in lines if line.startswith("data: ")]
        assert "error" in json.loads(rest[-1][6:])


@pytest.mark.parametrize("host", ["192.0.2.1", "not a host"])
async def test_an_address_that_cannot_be_had_is_a_clear_error(model_dir: Path, host: str) -> None:
    with pytest.raises(BatonError, match="cannot listen"):
        await run(GatewayConfig(model=str(model_dir), model_name="tiny", host=host, port=0))


async def test_a_folder_that_is_no_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BatonError, match=r"config\.json is missing"):
        await run(GatewayConfig(model=str(tmp_path), model_name="tiny"))


def test_it_listens_where_the_system_has_no_timeout_for_unread_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)  # macOS
    with _listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > 0


def test_the_address_of_a_listener() -> None:
    with _listen("127.0.0.1", 0) as listener:
        assert _url(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
    with _listen("::1", 0) as listener:
        assert _url(listener) == f"http://[::1]:{listener.getsockname()[1]}"
