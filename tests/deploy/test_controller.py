"""The controller: membership over real gRPC, and a cluster's whole life with processes that are only pretended."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from baton.common.child import EXIT_CONFIG
from baton.common.config import EngineConfig, GatewayConfig, WorkerConfig
from baton.common.errors import BatonError, StaleEpoch, Unauthorized
from baton.common.cluster import Members, WorkerStatus
from baton.common.types import Role
from baton.deploy.control.controller import Controller, Endpoint, claim_port, curl_line
from baton.deploy.launch.launcher import Spec
from baton.deploy.control.members import MemberTable
from baton.deploy.launch.supervisor import RestartPolicy
from baton.protos.control import controller_handlers
from baton.protos.rpc import Peer, listen, make_server

LOADING = WorkerStatus("decode-0", "decode", "loading", pid=7)


@asynccontextmanager
async def serving(table: MemberTable) -> AsyncIterator[str]:
    server = make_server("secret", controller_handlers(table))
    address = listen(server, "127.0.0.1", 0)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(grace=None)


async def test_what_workers_report_is_what_gateways_watch() -> None:
    table = MemberTable()
    async with serving(table) as address, asyncio.timeout(20):
        worker, gateway = Peer(address, "secret"), Peer(address, "secret")
        watch = gateway.watch()
        assert (await anext(watch)).workers == ()
        table.put(replace(LOADING, state="starting"))
        first = await anext(watch)
        assert [w.state for w in first.workers] == ["starting"]
        ready = replace(LOADING, state="ready", address="127.0.0.1:5", epoch=3, progress=1.0, detail="here")
        await worker.report(ready, timeout_s=5)
        second = await anext(watch)
        assert second == Members(first.version + 1, (ready,))
        table.remove("decode-0")
        assert await anext(watch) == Members(second.version + 1, ())
        await watch.aclose()
        await worker.close()
        await gateway.close()


async def test_only_the_process_that_owns_a_row_may_change_it() -> None:
    table = MemberTable()
    table.put(LOADING)
    async with serving(table) as address, asyncio.timeout(20):
        peer = Peer(address, "secret")
        for stranger in (replace(LOADING, pid=8), replace(LOADING, name="decode-1")):
            with pytest.raises(StaleEpoch, match="is not a worker of this controller"):
                await peer.report(stranger, timeout_s=5)
        await peer.close()
    assert table.members.workers == (LOADING,)


async def test_without_the_token_there_is_no_answer() -> None:
    table = MemberTable()
    table.put(LOADING)
    async with serving(table) as address, asyncio.timeout(20):
        peer = Peer(address, "guess")
        with pytest.raises(Unauthorized):
            await peer.report(LOADING, timeout_s=5)
        with pytest.raises(Unauthorized):
            await anext(peer.watch())
        await peer.close()


async def test_the_version_grows_with_changes_only_and_a_slow_watcher_gets_the_newest() -> None:
    table = MemberTable()
    watch = table.watch()
    assert (await anext(watch)).version == 0
    table.put(LOADING)
    table.put(LOADING)
    await table.report(LOADING)
    table.remove("nobody")
    assert table.members.version == 1
    table.put(replace(LOADING, progress=0.5))
    assert (await anext(watch)) == Members(2, (replace(LOADING, progress=0.5),))
    await watch.aclose()


# --- a whole life ----------------------------------------------------------------------------------------------------


@dataclass
class Screen:
    notes: list[str] = field(default_factory=list)
    url: str = ""
    shown: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False

    def log(self, name: str, line: str) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def members(self, members: Members) -> None: ...

    def ready(self, url: str, curl: str) -> None:
        self.url = url
        self.shown.set()

    def close(self) -> None:
        self.closed = True


class Pretended:
    """A process made of a task: a worker that reports itself ready, or a gateway whose /ready says yes."""

    def __init__(self, spec: Spec, pid: int, diary: list[str], fails: int | None) -> None:
        self.pid = pid
        self.last_lines: deque[str] = deque([f"{spec.name} says goodbye"])
        self._name, self._diary, self._heeds_term = spec.name, diary, True
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(spec.config, fails))

    async def _live(self, config: object, fails: int | None) -> None:
        if fails is not None:
            self.end(fails)
        elif isinstance(config, WorkerConfig):
            peer = Peer(config.controller, config.cluster_token)
            await peer.report(WorkerStatus(config.name, str(config.role), "ready", "a:1", 1, 1.0, pid=self.pid), 5)
            await peer.close()
        elif isinstance(config, GatewayConfig):
            async with await asyncio.start_server(self._answer, config.host, config.port):
                await asyncio.shield(self._exit)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    def end(self, code: int) -> None:
        if not self._exit.done():
            self._diary.append(f"{self._name} ended {code}")
            self._exit.set_result(code)

    async def wait(self) -> int:
        return await asyncio.shield(self._exit)

    def terminate(self) -> None:
        if self._heeds_term:
            self.end(0)

    def kill(self) -> None:
        self.end(-9)

    def ignore_term(self) -> None:
        self._heeds_term = False


@dataclass
class Stage:
    """A launcher. `fails`: exit codes with which the named process ends at once, each time it is started."""

    fails: dict[str, int] = field(default_factory=dict)
    diary: list[str] = field(default_factory=list)
    live: dict[str, Pretended] = field(default_factory=dict)
    starts: list[str] = field(default_factory=list)

    async def start(self, spec: Spec) -> Pretended:
        self.starts.append(spec.name)
        process = Pretended(spec, 1000 + len(self.starts), self.diary, self.fails.get(spec.name))
        self.live[spec.name] = process
        return process


def cluster(stage: Stage, screen: Screen) -> Controller:
    engine = EngineConfig(model="m")
    workers = [WorkerConfig(name=f"{role}-0", role=role, engine=engine) for role in (Role.PREFILL, Role.DECODE)]
    gateway = GatewayConfig(model="m", model_name="n", port=claim_port("127.0.0.1", 0).port, drain_s=60)
    policy = RestartPolicy(first_delay_s=0.01, max_delay_s=0.01, max_deaths=3)
    return Controller(workers, gateway, stage, screen, policy)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


async def test_a_cluster_comes_up_survives_deaths_and_drains_gateway_first() -> None:
    stage, screen = Stage(), Screen()
    controller = cluster(stage, screen)
    life = asyncio.create_task(controller.run())
    async with asyncio.timeout(20):
        await screen.shown.wait()
    assert screen.url.startswith("http://127.0.0.1:")
    assert {w.name: w.state for w in controller.table.members.workers} == {"prefill-0": "ready", "decode-0": "ready"}

    version = controller.table.members.version
    first = stage.live["decode-0"]
    first.end(1)
    await until(lambda: stage.live["decode-0"] is not first and controller.table.members.version >= version + 3)
    assert {w.name: w.state for w in controller.table.members.workers} == {"prefill-0": "ready", "decode-0": "ready"}
    stage.live["gateway"].end(1)
    await until(lambda: stage.starts.count("gateway") == 2)

    stage.diary.clear()
    controller.request_stop()
    async with asyncio.timeout(20):
        await life
    assert stage.diary[0] == "gateway ended 0"
    assert sorted(stage.diary[1:]) == ["decode-0 ended 0", "prefill-0 ended 0"]
    assert screen.closed


async def test_a_second_request_to_stop_does_not_wait_for_the_drain() -> None:
    stage, screen = Stage(), Screen()
    controller = cluster(stage, screen)
    life = asyncio.create_task(controller.run())
    async with asyncio.timeout(20):
        await screen.shown.wait()
        for process in stage.live.values():
            process.ignore_term()
        controller.request_stop()
        await asyncio.sleep(0)
        assert not life.done()
        controller.request_stop()
        await life
    assert sorted(stage.diary) == ["decode-0 ended -9", "gateway ended -9", "prefill-0 ended -9"]


@pytest.mark.parametrize(("code", "starts"), [(1, 3), (EXIT_CONFIG, 1)])
async def test_a_worker_that_cannot_start_ends_the_start_with_the_reason(code: int, starts: int) -> None:
    stage, screen = Stage(fails={"prefill-0": code}), Screen()
    controller = cluster(stage, screen)
    async with asyncio.timeout(20):
        with pytest.raises(BatonError, match=rf"prefill-0 cannot be kept running \(exit code {code}\)"):
            await controller.run()
    assert stage.starts.count("prefill-0") == starts
    assert "prefill-0 says goodbye" in screen.notes[-1]
    assert {"gateway ended 0", "decode-0 ended 0"} <= set(stage.diary)


async def test_once_it_serves_a_lost_worker_is_marked_and_a_lost_gateway_is_the_end() -> None:
    stage, screen = Stage(), Screen()
    controller = cluster(stage, screen)
    life = asyncio.create_task(controller.run())
    async with asyncio.timeout(20):
        await screen.shown.wait()
    stage.fails = {"decode-0": 1, "gateway": 1}
    stage.live["decode-0"].end(1)
    await until(lambda: any(w.state == "failed" for w in controller.table.members.workers))
    assert "given up: exit code 1" in [w.detail for w in controller.table.members.workers]
    assert not life.done()
    stage.live["gateway"].end(1)
    async with asyncio.timeout(20):
        with pytest.raises(BatonError, match="gateway cannot be kept running"):
            await life
    assert "prefill-0 ended 0" in stage.diary


# --- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80"), ("10.0.0.1", "http://10.0.0.1:80")],
)
def test_the_url_is_one_that_works_from_here(host: str, url: str) -> None:
    assert Endpoint(host, 80).url == url


def test_the_first_request_fits_the_model(tmp_path: Path) -> None:
    gateway = GatewayConfig(model=str(tmp_path), model_name="it's", api_keys=("secret",))
    plain = curl_line(Endpoint("127.0.0.1", 80), gateway)
    assert "/v1/completions" in plain
    assert "secret" not in plain
    assert "$BATON_API_KEY" in plain
    assert "it'\\''s" in plain
    for name in ("tokenizer_config.json", "chat_template.json"):
        (tmp_path / name).write_text(json.dumps({"chat_template": "{{ messages }}"}))
        assert "/v1/chat/completions" in curl_line(Endpoint("127.0.0.1", 80), gateway)
        (tmp_path / name).unlink()
