"""The controller's shell: what it does in time, with a parent and workers that are only pretended."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest

from baton.common.cluster import (
    End,
    Launch,
    Phase,
    Span,
    Trace,
    TraceAnswer,
    TraceQuestion,
    Traffic,
)
from baton.common.config import WorkerConfig
from baton.common.errors import InvalidRequest, NotReady, WorkerLost
from baton.common.json_form import from_json
from baton.common.messages import Turn
from baton.common.types import Role
from baton.deploy.control import turns
from baton.deploy.control.admin import build
from baton.deploy.control.controller import ADOPT_S, PAUSE_S
from baton.deploy.control.desired import load
from tests.deploy.pools import desired
from tests.deploy.rig import Household, Rig, attend
from tests.deploy.stage import until

P, D = Role.PREFILL, Role.DECODE
TOKEN = {"Authorization": "Bearer operator"}


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


async def test_scaling_tries_again_what_was_given_up() -> None:
    rig = Rig(Household(desired({P: 1, D: 2})))
    async with rig.controller() as controller:
        await rig.up(controller)
        rig.house.change("decode-1", phase=Phase.GIVEN_UP, why="exit code 1", pid=0)
        await until(lambda: controller.status().workers[2].state == "failed")
        assert controller.status().workers[2].detail == "exit code 1; to try again: baton scale decode=2"
        assert await controller.scale({"prefill": 1}) == ()
        assert await controller.scale({"decode": 2}) == ("start decode-1 again",)
        await rig.report(controller)
        await until(lambda: controller.status().workers[2].state == "ready")


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
            for path, says in (("/v1/nothing", "Not Found"), ("/v1/logs/decode-0?after=x", "after")):
                wrong = await http.get(path)
                assert says in wrong.json()["error"]["message"]
            for _ in range(2):
                await http.post("/v1/down", json={})
            assert rig.stopped == 1, "a second signal would cut requests short"


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
