"""Failures as clients see them, and what operators ask a gateway: models, readiness, draining, metrics."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from baton.common.errors import EngineFailure, NotReady, Overloaded

from .asking import CHAT, PLAIN, events, wait_for
from .conftest import FakeStream, Gateway, MakeGateway, client_of


async def test_an_error_before_the_first_token_has_its_status(gateway: Gateway, http: httpx.AsyncClient) -> None:
    for stream in (False, True):
        gateway.router.script = lambda stream: stream.fail(EngineFailure("step failed"))
        response = await http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        assert response.status_code == 500
        assert response.json()["error"] == {
            "message": "step failed",
            "type": "server_error",
            "param": None,
            "code": "engine_failure",
        }


async def test_an_error_after_the_first_token_ends_the_stream_with_an_event(
    gateway: Gateway, http: httpx.AsyncClient
) -> None:
    def script(stream: FakeStream) -> None:
        stream.emit(50)
        stream.fail(EngineFailure("step failed"))

    gateway.router.script = script
    chunks = events(await http.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    assert chunks[-1]["error"]["code"] == "engine_failure"
    assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 500


async def test_one_failed_choice_fails_the_request_and_frees_the_others(
    gateway: Gateway, http: httpx.AsyncClient
) -> None:
    def script(stream: FakeStream) -> None:
        stream.emit(50)
        if len(gateway.router.streams) == 3:
            stream.fail(EngineFailure("step failed"))

    gateway.router.script = script
    response = await http.post("/v1/completions", json={**PLAIN, "n": 4})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_failure"
    assert all(stream.cancelled for stream in gateway.router.streams if stream is not gateway.router.streams[2])


@pytest.mark.parametrize(("refusal", "status"), [(Overloaded("full", retry_after_s=2.3), 429), (NotReady("none"), 503)])
async def test_refusals_say_when_to_come_back(
    gateway: Gateway, http: httpx.AsyncClient, refusal: Overloaded | NotReady, status: int
) -> None:
    gateway.router.refusal = refusal
    response = await http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.status_code == status
    assert int(response.headers["retry-after"]) == (3 if status == 429 else 1)
    assert response.json()["error"]["code"] == refusal.code


async def test_models(gateway: Gateway, http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert card["id"] == "tiny"
    assert (await http.get("/v1/models/tiny")).json() == card
    unknown = await http.get("/v1/models/some/other")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"


async def test_tokenize_and_detokenize_are_inverse(gateway: Gateway, http: httpx.AsyncClient) -> None:
    found = (await http.post("/tokenize", json={"prompt": "Hello 東京"})).json()
    assert found["tokens"] == [0, *gateway.tokens("Hello 東京")]
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 256
    text = (await http.post("/detokenize", json={"tokens": found["tokens"]})).json()
    assert text == {"prompt": "<|bos|>Hello 東京"}
    chat = (await http.post("/tokenize", json={"messages": CHAT["messages"]})).json()
    assert gateway.service.model.tokenizer.decode(chat["tokens"]).endswith("<|start|>assistant\n")


async def test_ready_says_why(gateway: Gateway, http: httpx.AsyncClient) -> None:
    assert (await http.get("/health")).json() == {"status": "ok"}
    assert (await http.get("/ready")).json() == {"state": "ready", "reason": "2 workers"}
    gateway.router.state = ("loading", "prefill-0 40 %")
    response = await http.get("/ready")
    assert response.status_code == 503
    assert response.json() == {"state": "loading", "reason": "prefill-0 40 %"}


async def test_draining_takes_nothing_new_and_waits(gateway: Gateway, http: httpx.AsyncClient) -> None:
    assert "connection" not in (await http.get("/ready")).headers
    running = asyncio.create_task(http.post("/v1/completions", json={**PLAIN, "max_tokens": 2}))
    await wait_for(lambda: bool(gateway.router.streams))
    drained = asyncio.create_task(gateway.service.drain())
    await wait_for(lambda: gateway.service.draining)
    assert (await http.get("/ready")).json()["state"] == "draining"
    refused = await http.post("/v1/completions", json=PLAIN)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["connection"] == "close", "the next try would come to this gateway again"
    assert not drained.done()
    gateway.router.streams[0].emit(50, 51)
    assert (await running).status_code == 200
    await asyncio.wait_for(drained, 20)


async def test_draining_ends_when_its_time_is_over(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(drain_s=0.01)
    async with client_of(gateway) as http:
        running = asyncio.create_task(http.post("/v1/completions", json={**PLAIN, "max_tokens": 2}))
        await wait_for(lambda: bool(gateway.router.streams))
        await asyncio.wait_for(gateway.service.drain(), 20)
        assert not running.done()
        gateway.router.streams[0].emit(50, 51)
        await running


async def test_metrics_count_what_has_happened(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("Hello")
    await http.post("/v1/completions", json=PLAIN)
    response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    output = len(gateway.tokens("Hello")) + 1
    assert lines["baton_fake"] == "7.0"
    assert lines['baton_requests_total{outcome="stop"}'] == "1.0"
    assert float(lines["baton_output_tokens_total"]) == output
    assert float(lines["baton_cached_prompt_tokens_total"]) > 0
    assert lines["baton_time_to_first_token_seconds_count"] == "1.0"
    assert lines["baton_inter_token_latency_seconds_count"] == str(float(output - 1))
    for name in ("baton_time_to_first_token_seconds", "baton_request_seconds", "baton_queue_wait_seconds"):
        assert float(lines[f'{name}_bucket{{le="+Inf"}}']) == float(lines[f"{name}_count"]) > 0


async def test_refused_requests_are_counted_once_by_their_code(gateway: Gateway, http: httpx.AsyncClient) -> None:
    for path, body in [("chat/completions", CHAT), ("completions", PLAIN)]:
        await http.post(f"/v1/{path}", json={**body, "temperature": 9})
        await http.post(f"/v1/{path}", content=b"{")
        await http.post(f"/v1/{path}", json={**body, "model": "other"})
    gateway.router.refusal = Overloaded("full")
    await http.post("/v1/completions", json=PLAIN)
    lines = (await http.get("/metrics")).text.splitlines()
    assert [line for line in lines if line.startswith("baton_requests_total")] == [
        'baton_requests_total{outcome="invalid_value"} 4.0',
        'baton_requests_total{outcome="model_not_found"} 2.0',
        'baton_requests_total{outcome="overloaded"} 1.0',
    ]


async def test_the_openapi_page_describes_every_body(http: httpx.AsyncClient) -> None:
    page = (await http.get("/openapi.json")).json()
    schemas = page["components"]["schemas"]
    for path, kind in [("/v1/chat/completions", "ChatBody"), ("/v1/completions", "CompletionBody")]:
        schema = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{kind}"}
        assert "temperature" in schemas[kind]["properties"]
    assert "Message" in schemas
    assert (await http.get("/docs")).status_code == 200
    assert (await http.get("/version")).json()["version"]


async def test_every_response_has_a_request_id(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("x")
    own = await http.post("/v1/completions", json=PLAIN, headers={"x-request-id": "abc-1"})
    assert own.headers["x-request-id"] == "abc-1"
    assert gateway.router.streams[0].request.request_id == "abc-1"
    for bad in ("", "x" * 200, "a b", "ü"):
        given = await http.get("/nothing", headers={"x-request-id": bad.encode()})
        assert given.headers["x-request-id"].startswith("req-")


async def test_a_base_model_has_no_chat(make_gateway: MakeGateway, model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    gateway = make_gateway(model=str(tmp_path))
    async with client_of(gateway) as http:
        response = await http.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 400
        assert "no chat template" in response.json()["error"]["message"]
        gateway.says("x")
        assert (await http.post("/v1/completions", json=PLAIN)).status_code == 200
