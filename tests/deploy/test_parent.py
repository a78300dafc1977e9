"""A cluster's whole life: the real parent and the real controller over gRPC, with processes that are pretended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from baton.common.child import EXIT_CONFIG
from baton.common.cluster import GatewayHello, WorkerState, WorkerStatus
from baton.common.config import ControllerConfig, GatewayConfig, WorkerConfig
from baton.common.errors import BatonError
from baton.deploy.control.main import control
from baton.deploy.control.status import WorkerRow
from baton.deploy.display import curl_line
from baton.deploy.launch.launcher import Spec
from baton.deploy.launch.logs import LogTails
from baton.deploy.launch.parent import Parent, Plan
from baton.deploy.launch.ports import claim_port
from baton.deploy.launch.supervisor import RestartPolicy
from baton.protos.control import ControllerClient
from baton.protos.rpc import Peer
from tests.deploy.pools import desired
from tests.deploy.stage import Pretended, Stage, until


@dataclass
class Screen:
    notes: list[str] = field(default_factory=list)
    url: str = ""
    shown: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False

    def log(self, name: str, line: str) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def workers(self, rows: Sequence[WorkerRow]) -> None: ...

    def ready(self, url: str, curl: str) -> None:
        self.url = url
        self.shown.set()

    def close(self) -> None:
        self.closed = True


async def act(spec: Spec, process: Pretended) -> None:
    """A controller is a real one; a worker reports that it is ready; a gateway attends, and its /ready says yes."""
    match spec.config:
        case ControllerConfig():
            stop = asyncio.Event()
            controlling = asyncio.create_task(control(spec.config, stop, lambda: None))
            try:
                await asyncio.wait({controlling})
                process.end(1)  # its address is not free yet
            finally:
                stop.set()
                await asyncio.wait({controlling})
        case WorkerConfig(name=name, role=role, controller=address, cluster_token=token):
            peer = Peer(address, token)
            status = WorkerStatus(name, str(role), WorkerState.READY, "a:1", 1, 1.0, pid=process.pid)
            try:
                while True:
                    await quietly(ControllerClient(peer).report(status, 1.0))
                    await asyncio.sleep(0.1)
            finally:
                await peer.close()
        case GatewayConfig():
            async with await asyncio.start_server(answer, spec.config.host, spec.config.port, reuse_port=False):
                while True:
                    await quietly(attend(spec.config))
                    await asyncio.sleep(0.1)


async def quietly(work: object) -> None:
    try:
        await work  # type: ignore[misc]
    except BatonError:
        return


async def attend(config: GatewayConfig) -> None:
    peer = Peer(config.controller, config.cluster_token)
    try:
        stream = ControllerClient(peer).attend()
        await stream.write(GatewayHello(config.name, "http://here", 1))
        while await stream.read() is not None:
            pass
    finally:
        await peer.close()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    writer.close()


class Life:
    """One cluster of a prefill and a decode worker."""

    def __init__(self, **fails: int) -> None:
        self.stage = Stage(act, {name.replace("_", "-"): code for name, code in fails.items()})
        self.screen = Screen()
        control, admin, door = (claim_port("127.0.0.1", 0) for _ in range(3))
        wanted = desired(controller=f"127.0.0.1:{control.port}", port=door.port)
        config = ControllerConfig(
            parent="",
            port=control.port,
            cluster_token="t",
            admin_port=admin.port,
            admin_token="operator",
            round_s=0.05,
        )
        plan = Plan(controller=config, desired=wanted, door=door, admin=admin)
        self.ports = (control, admin, door)
        policy = RestartPolicy(first_delay_s=0.01, max_delay_s=0.01, max_deaths=3)
        logs = LogTails(lambda name, line: None)
        self.parent = Parent(plan, self.stage, self.stage, logs, self.screen, policy)
        self.admin = httpx.AsyncClient(
            base_url=admin.url, headers={"Authorization": "Bearer operator"}, trust_env=False, timeout=5.0
        )
        self.task = asyncio.create_task(self.parent.run())

    async def shown(self) -> None:
        async with asyncio.timeout(20):
            while not self.screen.shown.is_set():
                assert not self.task.done(), self.task.result()
                await asyncio.sleep(0.005)

    async def states(self) -> dict[str, str]:
        try:
            answer = (await self.admin.get("/v1/status")).json()
        except httpx.HTTPError:
            return {}
        return {row["name"]: row["state"] for row in answer.get("workers", [])}

    async def until_states(self, **states: str) -> None:
        wanted = {name.replace("_", "-"): state for name, state in states.items()}
        async with asyncio.timeout(20):
            while await self.states() != wanted:
                await asyncio.sleep(0.01)

    async def ended(self) -> None:
        try:
            async with asyncio.timeout(20):
                await self.task
        finally:
            await asyncio.wait(self.stage.lives)
            await self.admin.aclose()
            for port in self.ports:
                port.hold.close()


async def test_a_cluster_comes_up_survives_deaths_and_drains_gateways_first() -> None:
    life = Life()
    await life.shown()
    assert life.screen.url.startswith("http://127.0.0.1:")
    await life.until_states(prefill_0="ready", decode_0="ready")
    pids = {name: process.pid for name, process in life.stage.live.items()}
    for name in ("decode-0", "gateway-0", "controller"):
        life.stage.live[name].end(1)
        await until(lambda name=name: life.stage.starts.count(name) == 2)  # type: ignore[misc]
        await life.until_states(prefill_0="ready", decode_0="ready")
    assert life.stage.live["prefill-0"].pid == pids["prefill-0"], "nobody else was started again"
    assert len(life.stage.starts) == 4 + 3
    life.stage.diary.clear()
    life.parent.request_stop()
    await life.ended()
    first, *workers, last = life.stage.diary
    assert (first, last) == ("gateway-0 ended 0", "controller ended 0")
    assert sorted(workers) == ["decode-0 ended 0", "prefill-0 ended 0"]
    assert life.screen.closed


async def test_a_second_request_to_stop_does_not_wait_for_the_drain() -> None:
    life = Life()
    await life.shown()
    for process in life.stage.live.values():
        process.heeds_term = False
    life.parent.request_stop()
    await asyncio.sleep(0)
    assert not life.task.done()
    life.parent.request_stop()
    await life.ended()
    assert sorted(life.stage.diary) == [f"{n} ended -9" for n in ("controller", "decode-0", "gateway-0", "prefill-0")]


@pytest.mark.parametrize(("code", "starts"), [(1, 3), (EXIT_CONFIG, 1)])
async def test_a_worker_that_cannot_start_ends_the_start_with_the_reason(code: int, starts: int) -> None:
    life = Life(prefill_0=code)
    with pytest.raises(BatonError, match=rf"prefill-0 cannot be kept running \(exit code {code}\): prefill-0 says"):
        await life.ended()
    assert life.stage.starts.count("prefill-0") == starts
    assert "prefill-0 says goodbye" in life.screen.notes[-1]
    assert len(life.stage.diary) == len(life.stage.starts), "nobody is left"


async def test_once_it_serves_a_lost_worker_is_shown_and_the_last_lost_gateway_is_the_end() -> None:
    life = Life()
    await life.shown()
    life.stage.fails = {"decode-0": 1, "gateway-0": 1}
    life.stage.live["decode-0"].end(1)
    await life.until_states(prefill_0="ready", decode_0="failed")
    (row,) = (w for w in (await life.admin.get("/v1/status")).json()["workers"] if w["name"] == "decode-0")
    assert row["detail"] == "exit code 1: decode-0 says goodbye; to try again: baton scale decode=1"
    assert not life.task.done()
    life.stage.live["gateway-0"].end(1)
    with pytest.raises(BatonError, match="gateway-0 cannot be kept running"):
        await life.ended()
    assert "prefill-0 ended 0" in life.stage.diary


async def test_operators_scale_it_and_new_workers_come() -> None:
    life = Life()
    await life.shown()
    answer = await life.admin.post("/v1/scale", json={"pools": {"decode": 2}})
    assert answer.json() == {"steps": ["start decode-1"]}
    await life.until_states(prefill_0="ready", decode_0="ready", decode_1="ready")
    await life.admin.post("/v1/drain", json={"worker": "decode-0", "now": True})
    await life.until_states(prefill_0="ready", decode_1="ready")
    assert "decode-0 ended 0" in life.stage.diary
    life.parent.request_stop()
    await life.ended()


def test_the_first_request_fits_the_model(tmp_path: Path) -> None:
    gateway = GatewayConfig(model=str(tmp_path), model_name="it's", api_keys=("secret",))
    plain = curl_line("http://127.0.0.1:80", gateway)
    assert "/v1/completions" in plain
    assert "secret" not in plain
    assert "$BATON_API_KEY" in plain
    assert "it'\\''s" in plain
    for name in ("tokenizer_config.json", "chat_template.json"):
        (tmp_path / name).write_text(json.dumps({"chat_template": "{{ messages }}"}))
        assert "/v1/chat/completions" in curl_line("http://127.0.0.1:80", gateway)
        (tmp_path / name).unlink()
