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

import httpx
import pytest

from baton.common.config import GatewayConfig, RouterConfig
from baton.common.errors import BatonError
from baton.common.cluster import Members, WorkerStatus
from baton.common.types import Role
from baton.gateway.main import _listen, run
from baton.protos.control import controller_handlers
from baton.protos.rpc import listen, make_server
from tests.fake_worker import VOCAB, FakeWorker, fleet

TOKEN = "cluster"


@pytest.fixture
def wide_dir(model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with the vocabulary that the stand-in workers draw from."""
    for path in model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB}))
    return tmp_path


class FakeController:
    def __init__(self, *workers: FakeWorker) -> None:
        self._members = Members(1, tuple(worker.status for worker in workers))

    async def report(self, status: WorkerStatus) -> None:
        raise NotImplementedError  # these workers do not report

    async def watch(self) -> AsyncIterator[Members]:
        yield self._members
        await asyncio.Event().wait()


@asynccontextmanager
async def running(model_dir: Path, *workers: FakeWorker, drain_s: float = 5.0) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway process's whole inside, in this process; ended by SIGTERM if it still runs."""
    server = make_server(TOKEN, controller_handlers(FakeController(*workers)))
    controller = listen(server, "127.0.0.1", 0)
    await server.start()
    port = free_port()
    config = GatewayConfig(
        model=str(model_dir), model_name="tiny", port=port, controller=controller, cluster_token=TOKEN,
        router=RouterConfig(place_timeout_s=2.0), drain_s=drain_s, max_model_len=4096,
    )  # fmt: skip
    gateway = asyncio.create_task(run(config))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        try:
            yield client
        finally:
            if not gateway.done():
                os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(gateway, 15)
            await server.stop(0)


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
