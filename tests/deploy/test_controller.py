"""The controller's shell: what it does in time, with a parent and workers that are only pretended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest

from baton.common.clock import ManualClock
from baton.common.cluster import (
    End,
    FromController,
    FromGateway,
    GatewayHello,
    Launch,
    LogLines,
    LogQuestion,
    Members,
    Phase,
    Processes,
    ProcessStatus,
    Span,
    Trace,
    TraceAnswer,
    TraceQuestion,
    Traffic,
    WorkerState,
    WorkerStatus,
)
from baton.common.config import ControllerConfig, WorkerConfig, from_json
from baton.common.errors import BatonError, InvalidRequest, NotReady, WorkerLost
from baton.common.messages import Load, Turn
from baton.common.types import Role
from baton.deploy.control import autoscale, turns
from baton.deploy.control.admin import build
from baton.deploy.control.controller import ADOPT_S, PAUSE_S, Controller
from baton.deploy.control.desired import Desired, load, save
from baton.deploy.control.planner import AutoscaleConfig
from baton.deploy.control.revise import revise
from tests.deploy.pools import desired, pool
from tests.deploy.stage import until

P, D = Role.PREFILL, Role.DECODE
TOKEN = {"Authorization": "Bearer operator"}


class Household:
    """A parent whose processes run as soon as they are launched, and end as soon as they are ended."""

    def __init__(self, saved: Desired) -> None:
        self.saved = save(saved)
        self.processes: dict[str, ProcessStatus] = {}
        self.orders: list[Launch | End] = []
        self.closed = False
        self._pids = 100
        self._version = 0
        self._changed = asyncio.Event()

    def change(self, name: str, **changes: object) -> None:
        self.processes[name] = replace(self.processes[name], **changes)  # type: ignore[arg-type]
        self.announce()

    def announce(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def launch(self, order: Launch) -> None:
        if self.closed:
            raise NotReady("the cluster is ending")
        self.orders.append(order)
        self._pids += 1
        self.processes[order.name] = ProcessStatus(order.name, Phase.RUNNING, order.digest, pid=self._pids)
        self.announce()

    async def end(self, order: End) -> None:
        self.orders.append(order)
        self.processes.pop(order.name, None)
        self.announce()

    async def watch(self) -> AsyncIterator[Processes]:
        while True:
            changed = self._changed
            yield Processes(self._version, tuple(self.processes.values()))
            await changed.wait()

    async def tail(self, question: LogQuestion) -> LogLines:
        return LogLines(7, (f"{question.name} from {question.after}",))

    async def save(self, data: bytes) -> None:
        self.saved = data

    async def load(self) -> bytes:
        return self.saved


class GatewayStream:
    """The controller's end of a gateway's stream."""

    def __init__(self, name: str) -> None:
        self.incoming: asyncio.Queue[FromGateway | None] = asyncio.Queue()
        self.heard: list[FromController] = []
        self.incoming.put_nowait(GatewayHello(name, "http://here", 1))

    async def read(self) -> FromGateway | None:
        return await self.incoming.get()

    async def write(self, message: FromController) -> None:
        self.heard.append(message)

    @property
    def states(self) -> dict[str, str]:
        members = [m for m in self.heard if isinstance(m, Members)]
        return {w.name: str(w.state) for w in members[-1].workers} if members else {}


@dataclass
class Rig:
    """A controller at work."""

    house: Household
    clock: ManualClock = field(default_factory=lambda: ManualClock(1000.0))
    asked: list[tuple[str, Turn]] = field(default_factory=list)
    refusal: BatonError | None = None
    stopped: int = 0

    @asynccontextmanager
    async def controller(self) -> AsyncIterator[Controller]:
        config = ControllerConfig(parent="", round_s=0.005, silence_s=60.0, model_name="n")
        controller = Controller(config, self.house, self.clock, self.turn, self.stop)
        await controller.load()
        task = asyncio.create_task(controller.run())
        try:
            async with asyncio.timeout(20):
                yield controller
        finally:
            if task.done():
                task.result()
            task.cancel()
            await asyncio.wait({task})

    async def turn(self, address: str, order: Turn) -> None:
        self.asked.append((address, order))
        if self.refusal is not None:
            raise self.refusal

    def stop(self) -> None:
        self.stopped += 1

    def word(self, name: str, **changes: object) -> WorkerStatus:
        assignment = next(a for a in load(self.house.saved).assignments if a.name == name)
        role = str(assignment.worker.role)
        status = WorkerStatus(name, role, WorkerState.READY, "a:1", 1, pid=self.house.processes[name].pid, load=Load())
        return replace(status, **changes)  # type: ignore[arg-type]

    async def report(self, controller: Controller) -> None:
        """All workers say that they are ready."""
        for name in [name for name in self.house.processes if not name.startswith("gateway")]:
            await controller.report(self.word(name))

    async def up(self, controller: Controller) -> None:
        names = {a.name for a in load(self.house.saved).assignments}
        await until(lambda: names <= self.house.processes.keys())
        await self.report(controller)
        await until(lambda: all(w.state == "ready" for w in controller.status().workers))


async def attend(controller: Controller, name: str = "gateway-0") -> tuple[GatewayStream, asyncio.Task[None]]:
    stream = GatewayStream(name)
    return stream, asyncio.create_task(controller.attend(stream))


async def test_what_is_saved_comes_up_and_gateways_hear_of_it() -> None:
    rig = Rig(Household(desired()))
    async with rig.controller() as controller:
        stream, attending = await attend(controller)
        assert controller.readiness() == "loading"
        await rig.up(controller)
        await until(lambda: stream.states == {"prefill-0": "ready", "decode-0": "ready"})
        assert controller.readiness() == "ready"
        assert [(o.name, o.kind) for o in rig.house.orders if isinstance(o, Launch)] == [
            ("gateway-0", "gateway"),
            ("prefill-0", "worker"),
            ("decode-0", "worker"),
        ]
        stream.incoming.put_nowait(None)
        await attending
        assert controller.readiness() == "unhealthy"


async def test_one_that_comes_back_says_nothing_before_it_knows_who_lives_and_starts_nobody() -> None:
    rig = Rig(Household(desired({P: 1, D: 2})))
    async with rig.controller() as controller:
        await rig.up(controller)
        version = controller.gateways.members
    launched = len(rig.house.orders)
    async with rig.controller() as again:
        stream, _ = await attend(again)
        await again.report(rig.word("prefill-0"))
        await again.report(rig.word("decode-0"))
        await asyncio.sleep(0.03)
        assert stream.heard == []
        await again.report(rig.word("decode-1"))
        await until(lambda: len(stream.states) == 3)
        assert len(rig.house.orders) == launched
        assert version is not None
        assert again.gateways.members is not None
        assert again.gateways.members.version > version.version
    async with rig.controller() as third:  # nor does it wait for ever for one that is frozen
        stream, _ = await attend(third)
        await third.report(rig.word("prefill-0"))
        await asyncio.sleep(0.02)
        rig.clock.advance(ADOPT_S)
        await until(lambda: stream.states == {"prefill-0": "ready"})


async def test_a_dead_incarnations_word_is_not_its_successors() -> None:
    rig = Rig(Household(desired()))
    async with rig.controller() as controller:
        await rig.up(controller)
        late = rig.word("decode-0")
        rig.house.change("decode-0", pid=999)
        await controller.report(late)
        await asyncio.sleep(0.02)
        assert {w.name: w.state for w in controller.status().workers}["decode-0"] == "starting"
        await controller.report(replace(late, pid=999))
        await until(lambda: all(w.state == "ready" for w in controller.status().workers))


async def test_a_silent_worker_is_replaced_unless_it_was_the_controller_who_was_away() -> None:
    rig = Rig(Household(desired()))
    async with rig.controller() as controller:
        await rig.up(controller)
        rig.clock.advance(500.0)  # in one go: the controller itself was frozen
        await until(lambda: any("was away" in e.text for e in controller.events.list()))
        await asyncio.sleep(0.02)
        assert not [o for o in rig.house.orders if isinstance(o, End)]
        for _ in range(16):
            rig.clock.advance(PAUSE_S - 1)
            await controller.report(rig.word("prefill-0"))
            await asyncio.sleep(0.01)
        await until(lambda: End("decode-0", 0.0) in rig.house.orders)
        await until(lambda: "decode-0" in rig.house.processes)
        assert End("prefill-0", 0.0) not in rig.house.orders


async def test_an_edit_is_saved_before_anything_follows_from_it() -> None:
    rig = Rig(Household(desired()))
    async with rig.controller() as controller:
        await rig.up(controller)
        assert await controller.scale({"decode": 2}) == ("start decode-1",)
        assert load(rig.house.saved).size("decode") == 2
        await until(lambda: "decode-1" in rig.house.processes)
        with pytest.raises(InvalidRequest):
            await controller.scale({"decode": 0})
        assert load(rig.house.saved).size("decode") == 2


async def test_a_worker_is_turned_and_one_that_will_not_is_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PAUSE_S", 0.01)
    rig = Rig(Household(desired({P: 2, D: 1})))
    async with rig.controller() as controller:
        stream, _ = await attend(controller)
        await rig.up(controller)
        rig.refusal = NotReady("not now")
        await controller.scale({"prefill": 1, "decode": 2})
        await until(lambda: stream.states.get("prefill-1") == "leaving")
        await until(lambda: len(rig.asked) == turns.TRIES)
        assert rig.asked[0] == ("a:1", Turn("decode", turns.WITHIN_S))
        await until(lambda: any(isinstance(o, End) and o.name == "prefill-1" for o in rig.house.orders))
        await until(lambda: "prefill-1" in rig.house.processes)
        (*_, order) = (o for o in rig.house.orders if isinstance(o, Launch))
        assert (order.name, from_json(order.config, WorkerConfig).role) == ("prefill-1", D)
        rig.refusal = None
        await controller.report(rig.word("prefill-1"))
        await until(lambda: stream.states.get("prefill-1") == "ready")
        await controller.scale({"prefill": 2, "decode": 1})
        await until(lambda: controller.turns.turned == 1)
        roles = {w.name: w.role for w in controller.status().workers if w.pool == "prefill"}
        assert set(roles.values()) == {"prefill"}, "its answer counts, though it has not reported yet"


async def test_a_rollout_whose_workers_do_not_live_goes_back() -> None:
    rig = Rig(Household(desired()))
    async with rig.controller() as controller:
        await rig.up(controller)
        await controller.rollout(None, {"engine.max_running": 7})
        await until(lambda: "decode-1" in rig.house.processes and "prefill-1" in rig.house.processes)
        assert controller.status().rollout == "to revision 2: 0 of 2 workers ready"
        rig.house.change("decode-1", phase=Phase.GIVEN_UP, why="exit code 1", last_lines=("no such thing",))
        await until(lambda: rig.house.processes.keys() == {"gateway-0", "prefill-0", "decode-0"})
        await until(lambda: controller.desired.rollout is None)
        assert controller.desired.revision == 1
        assert any("failed: decode-1 cannot be kept running" in e.text for e in controller.events.list())


async def test_the_way_back_does_not_wait_for_a_worker_that_was_lost_before() -> None:
    rig = Rig(Household(desired({P: 1, D: 2})))
    async with rig.controller() as controller:
        await rig.up(controller)
        rig.house.change("decode-1", phase=Phase.GIVEN_UP, why="exit code 1")
        await controller.rollout(None, {"engine.max_running": 7})
        await until(lambda: "decode-2" in rig.house.processes and "prefill-1" in rig.house.processes)
        rig.house.change("decode-2", phase=Phase.GIVEN_UP, why="exit code 1")
        await until(lambda: controller.desired.rollout is None)
        assert rig.house.processes.keys() == {"gateway-0", "prefill-0", "decode-0", "decode-1"}
        await controller.scale({"decode": 1})


async def test_when_the_parent_ends_everything_nothing_is_said_of_it() -> None:
    rig = Rig(Household(desired()))
    async with rig.controller() as controller:
        await rig.up(controller)
        rig.house.closed = True
        del rig.house.processes["gateway-0"]
        rig.house.announce()
        await asyncio.sleep(0.03)
        assert not [e for e in controller.events.list() if e.level != "info"]


async def test_gateways_are_asked_for_a_trace_and_the_slowest_wins() -> None:
    rig = Rig(Household(desired()))
    async with rig.controller() as controller:
        await rig.up(controller)
        with pytest.raises(InvalidRequest, match="no gateway remembers"):
            await controller.trace("r1")
        streams = [(await attend(controller, f"gateway-{i}"))[0] for i in range(3)]
        asking = asyncio.create_task(controller.trace("slowest"))
        for seconds, stream in zip((1.0, 9.0, None), streams, strict=True):
            await until(lambda s=stream: any(isinstance(m, TraceQuestion) for m in s.heard))  # type: ignore[misc]
            (question,) = (m for m in stream.heard if isinstance(m, TraceQuestion))
            assert question.request_id == ""
            spans = (Span("decode", "decode-0", 0.0, seconds),)
            trace = None if seconds is None else Trace(f"r{seconds}", "g", 20.0, "stop", 1, 0, 1, spans)
            stream.incoming.put_nowait(TraceAnswer(question.question, trace))
        assert (await asking).request_id == "r9.0"


async def test_the_admin_api_wants_its_token_and_answers_errors_with_their_code() -> None:
    rig = Rig(Household(desired()))
    async with rig.controller() as controller:
        await rig.up(controller)
        stream, _ = await attend(controller)
        transport = httpx.ASGITransport(build(controller, "operator"))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            for path in ("/v1/status", "/v1/logs/decode-0", "/v1/trace/x"):
                refused = await http.get(path, headers={"Authorization": "Bearer guess"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (await http.get("/health")).json() == {"status": "ok"}
            await until(lambda: bool(controller.gateways.present))
            assert ((await http.get("/ready")).status_code, (await http.get("/ready")).json()) == (
                200,
                {"status": "ready"},
            )
            stream.incoming.put_nowait(
                Traffic(1.0, arrived=6, prompt_tokens=60, started=6, cached_tokens=30, running=2)
            )
            await until(lambda: controller.status().traffic.running == 2)
            http.headers.update(TOKEN)
            status = (await http.get("/v1/status")).json()
            assert [p["ready"] for p in status["pools"]] == [1, 1]
            assert status["traffic"]["hit_rate"] == 0.5
            assert status["gateways"][0] | {"pid": 0} == {
                "name": "gateway-0", "url": "http://here", "state": "serving", "pid": 0, "running": 2, "waiting": 0,
                "restarts": 0, "detail": "",
            }  # fmt: skip
            logs = (await http.get("/v1/logs/decode-0", params={"after": -5})).json()
            assert logs == {"next": 7, "lines": ["decode-0 from -5"]}
            for body in (b"{", b'{"pools": {"decode": "x"}}', b'{"pools": {}, "more": 1}', b'{"pools": {"decode": 0}}'):
                wrong = await http.post("/v1/scale", content=body)
                assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_value")
            assert (await http.post("/v1/scale", json={"pools": {"decode": 2}})).json() == {"steps": ["start decode-1"]}
            assert (await http.post("/v1/rollout", json={"set": {"engine.max_running": 9}})).json() == {"revision": 2}
            conflict = await http.post("/v1/drain", json={"worker": "decode-0"})
            assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "conflict")
            assert 'baton_controller_workers_wanted{pool="prefill",role="prefill"}' in (await http.get("/metrics")).text
            await http.post("/v1/down", json={})
            assert rig.stopped == 1


# --- what a rollout may change ---------------------------------------------------------------------------------------


def test_options_are_those_of_workers_for_all_pools_or_one() -> None:
    changes = {"engine.kv_memory": "1GiB", "worker.drain_s": 7, "decode.engine.max_running": 3, "handover.lease_s": 2}
    prefill, decode = revise(desired(), None, changes)
    assert (prefill.worker.engine.kv_memory, prefill.worker.drain_s, prefill.worker.handover.lease_s) == (1 << 30, 7, 2)
    assert (prefill.worker.engine.max_running, decode.worker.engine.max_running) == (256, 3)
    assert revise(desired(), None, {"decode.engine.tp": 2})[1].resources.ranks == 2
    for path, value in (("router.lease_s", 1), ("engine.x", 1), ("nobody.engine.tp", 2), ("engine.tp", "two"), ("", 1)):
        with pytest.raises(InvalidRequest):
            revise(desired(), None, {path: value})


def test_other_weights_must_have_the_same_tokenizer(tmp_path: Path) -> None:
    for name, tokenizer in (("old", "{}"), ("new", "{}"), ("alien", "{ }")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(tokenizer)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    old = pool(D)
    engine = replace(old.worker.engine, model=str(tmp_path / "old"))
    wanted = Desired(pools=(replace(old, worker=replace(old.worker, engine=engine)),))
    assert revise(wanted, str(tmp_path / "new"), {})[0].worker.engine.model == str(tmp_path / "new")
    with pytest.raises(InvalidRequest, match="another tokenizer"):
        revise(wanted, str(tmp_path / "alien"), {})
    with pytest.raises(InvalidRequest):
        revise(wanted, str(tmp_path / "nowhere"), {})


# --- the planner's hook ----------------------------------------------------------------------------------------------


def test_what_the_planner_wants_is_spread_over_pools_within_their_limits() -> None:
    wanted = replace(desired(), pools=(pool(P), replace(pool(D), max=2), replace(pool(D), name="more", max=3)))
    assert autoscale.spread(wanted, D, 3) == {"decode": 2, "more": 2}
    assert autoscale.spread(wanted, D, 9) == {"decode": 2, "more": 3}
    assert autoscale.spread(wanted, D, 0) == {}
    assert autoscale.spread(wanted, D, -1) == {"decode": 0}
    assert autoscale.spread(wanted, P, 1) == {"prefill": 2}


async def test_the_planner_is_asked_at_its_interval_and_says_why() -> None:
    wanted = replace(desired(), autoscale=AutoscaleConfig(enabled=True, interval_s=5.0))
    rig = Rig(Household(wanted))
    async with rig.controller() as controller:
        await rig.up(controller)
        rig.clock.advance(1.0)
        await until(lambda: bool(controller.status().why))
        (line,) = controller.status().why
        assert line.text
        assert controller.status().autoscale


async def test_what_goes_wrong_each_round_is_said_once() -> None:
    rig = Rig(Household(desired()))

    async def launch(order: Launch) -> None:
        raise WorkerLost("the parent is slow")

    rig.house.launch = launch  # type: ignore[method-assign]
    async with rig.controller() as controller:
        await until(lambda: bool([e for e in controller.events.list() if e.level == "warning"]))
        await asyncio.sleep(0.05)
        said = [e.text for e in controller.events.list() if e.level == "warning"]
        assert len(said) == len(set(said)) == 3
