"""What clients get, through the whole application and a router that plays a script."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.common.errors import EngineFailure, NotReady, Overloaded
from baton.common.types import FinishReason

from .conftest import FakeStream, Gateway, MakeGateway, client_of

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
PLAIN = {"model": "tiny", "prompt": "Hi"}


def events(response: httpx.Response) -> list[Any]:
    """The data of all events; [DONE] as None."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [None if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def chat_text(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks if chunk for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def test_chat_answers_in_openai_format(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("Hello 東京!")
    response = await http.post("/v1/chat/completions", json=CHAT)
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello 東京!", "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt = gateway.router.streams[0].request.tokens
    output = len(gateway.tokens("Hello 東京!")) + 1
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": output,
        "total_tokens": len(prompt) + output,
        "prompt_tokens_details": {"cached_tokens": min(16, len(prompt))},
    }


async def test_the_prompt_of_a_chat_is_the_rendered_template(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("ok")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    await http.post("/v1/chat/completions", json={**CHAT, "messages": messages})
    request = gateway.router.streams[0].request
    text = "<|start|>system\nBe brief.<|end|>\n<|start|>user\nab<|end|>\n<|start|>assistant\n"
    assert gateway.service.model.tokenizer.decode(request.tokens) == text
    assert request.prompt_len == len(request.tokens)


async def test_what_a_client_said_before_may_be_sent_back(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("ok")
    said = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "audio": None}
    response = await http.post("/v1/chat/completions", json={**CHAT, "messages": [*CHAT["messages"], said]})
    assert response.status_code == 200


@pytest.mark.parametrize("pieces", [0, 1, 3])
async def test_a_stream_has_one_event_a_token(gateway: Gateway, http: httpx.AsyncClient, pieces: int) -> None:
    gateway.says("Hello 東京 😀!", pieces=pieces)
    response = await http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    chunks = events(response)
    tokens = gateway.tokens("Hello 東京 😀!")
    assert chunks[-1] is None
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert len(chunks) == 1 + len(tokens) + 2
    assert chat_text(chunks) == "Hello 東京 😀!"
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" and "usage" not in chunk for chunk in chunks[:-1])


async def test_the_final_usage_event_has_usage_and_timeline(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("Hello")
    asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(await http.post("/v1/chat/completions", json=asked))
    assert all(chunk["usage"] is None for chunk in chunks[:-2])
    last = chunks[-2]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(gateway.tokens("Hello")) + 1
    timeline = last["timeline"]
    assert list(timeline) == ["received", "routed", "prefill_start", "first_token", "last_token"]
    assert timeline["received"] == 0
    assert sorted(timeline.values()) == list(timeline.values())


async def test_an_answer_that_is_not_streamed_has_its_timeline_in_a_header(
    gateway: Gateway, http: httpx.AsyncClient
) -> None:
    gateway.says("Hello")
    response = await http.post("/v1/completions", json=PLAIN)
    assert list(json.loads(response.headers["baton-timeline"]))[:2] == ["received", "routed"]


async def test_completions_take_all_four_forms_of_a_prompt(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("x")
    bos = (0,)
    for prompt, expected in [
        ("Hi", [bos + gateway.tokens("Hi")]),
        (["Hi", "Hello"], [bos + gateway.tokens("Hi"), bos + gateway.tokens("Hello")]),
        ([5, 6, 7], [(5, 6, 7)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
    ]:
        gateway.router.streams.clear()
        body = (await http.post("/v1/completions", json={**PLAIN, "prompt": prompt})).json()
        assert [stream.request.tokens for stream in gateway.router.streams] == expected
        assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
        assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_n_choices_of_several_prompts(gateway: Gateway, http: httpx.AsyncClient) -> None:
    """Ordered by prompt, seeds count up, the prompt counts once; streamed and not."""
    tokens = gateway.tokens("abcdefgh")

    def script(stream: FakeStream) -> None:
        stream.emit(tokens[stream.request.params.seed - 40], stream.request.tokens[-1])
        stream.finish(FinishReason.STOP)

    gateway.router.script = script
    asked = {**PLAIN, "prompt": [[5, 60], [6, 61]], "n": 3, "seed": 40}
    body = (await http.post("/v1/completions", json=asked)).json()
    last = [gateway.service.model.tokenizer.decode([token]) for token in (60, 61)]
    first = [gateway.service.model.tokenizer.decode([token]) for token in tokens]
    expected = [first[number] + last[prompt] for prompt in range(2) for number in range(3)]
    assert [choice["text"] for choice in body["choices"]] == expected
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == 12
    ids = [stream.request.request_id for stream in gateway.router.streams]
    assert len(set(ids)) == 6

    asked["stream"] = True
    chunks = events(await http.post("/v1/completions", json=asked))
    texts = [""] * 6
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == expected


async def test_further_choices_wait_for_the_first_token_of_the_first(gateway: Gateway, http: httpx.AsyncClient) -> None:
    task = asyncio.create_task(http.post("/v1/chat/completions", json={**CHAT, "n": 3, "max_tokens": 2}))
    await wait_for(lambda: len(gateway.router.streams) == 1)
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(gateway.router.streams) == 1
    gateway.router.streams[0].emit(50)
    await wait_for(lambda: len(gateway.router.streams) == 3)
    for stream in gateway.router.streams:
        stream.emit(50, 51)
    assert len((await task).json()["choices"]) == 3


async def test_without_a_seed_every_request_gets_another(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("x")
    for _ in range(2):
        await http.post("/v1/completions", json=PLAIN)
    seeds = [stream.request.params.seed for stream in gateway.router.streams]
    assert seeds[0] != seeds[1]
    await http.post("/v1/completions", json={**PLAIN, "seed": -1})
    assert gateway.router.streams[-1].request.params.seed == 2**64 - 1


async def test_sampling_parameters_reach_the_router(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("x")
    values = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.1,
        "min_tokens": 1,
        "ignore_eos": True,
        "seed": 5,
    }
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": False, "tools": [], "response_format": {"type": "text"}}
    asked = {**CHAT, **values, **harmless, "logit_bias": {"17": -100, "3": 1.5}, "stop_token_ids": [9], "max_tokens": 4}
    response = await http.post("/v1/chat/completions", json={**asked, "max_completion_tokens": 3})
    assert response.status_code == 200, response.text
    params = gateway.router.streams[0].request.params
    assert {name: getattr(params, name) for name in values} == values
    assert params.max_tokens == 3
    assert params.logit_bias == ((17, -100.0), (3, 1.5))
    assert params.stop_token_ids == (9,)


async def test_max_tokens_defaults_to_what_fits(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("x")
    await http.post("/v1/completions", json={**PLAIN, "prompt": [5] * 100})
    assert gateway.router.streams[0].request.params.max_tokens == 156


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_end_the_text_and_the_request(
    gateway: Gateway, http: httpx.AsyncClient, stream: bool
) -> None:
    """The stop string lies across tokens, the router's request is cancelled, and its account is kept."""
    tokens = gateway.tokens("one two END three")
    gateway.router.script = lambda stream: stream.emit(*tokens)
    asked = {**CHAT, "stop": ["wo EN", "nothing"], "stream": stream, "max_tokens": 100}
    if stream:
        asked["stream_options"] = {"include_usage": True}
    response = await http.post("/v1/chat/completions", json=asked)
    if stream:
        chunks = events(response)
        text, reason, usage = chat_text(chunks), chunks[-3]["choices"][0]["finish_reason"], chunks[-2]["usage"]
    else:
        body = response.json()
        text, reason = body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]
        usage = body["usage"]
    assert text == "one t"
    assert reason == "stop"
    assert gateway.router.streams[0].cancelled
    assert 0 < usage["completion_tokens"] < len(tokens)
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0


async def test_a_stop_string_in_the_last_batch_keeps_the_account(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("one two END")
    body = (await http.post("/v1/completions", json={**PLAIN, "stop": "END"})).json()
    assert body["choices"][0]["text"] == "one two "
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


async def test_text_held_back_for_a_stop_string_is_given_at_the_end(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("ends with EN")
    body = (await http.post("/v1/completions", json={**PLAIN, "stop": "END"})).json()
    assert body["choices"][0]["text"] == "ends with EN"
    chunks = events(await http.post("/v1/completions", json={**PLAIN, "stop": "END", "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "ends with EN"


async def test_stop_strings_do_not_count_before_min_tokens(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("aa aa aa")
    tokens = len(gateway.tokens("aa aa aa"))
    body = (await http.post("/v1/completions", json={**PLAIN, "stop": "a", "min_tokens": tokens})).json()
    assert body["choices"][0]["text"] == "aa aa a"


async def test_the_token_that_stops_is_counted_and_not_shown(gateway: Gateway, http: httpx.AsyncClient) -> None:
    a, b = gateway.tokens("ab")

    def script(stream: FakeStream) -> None:
        stream.emit(a, b)
        stream.finish(FinishReason.STOP)

    gateway.router.script = script
    body = (await http.post("/v1/completions", json={**PLAIN, "stop_token_ids": [b]})).json()
    assert body["choices"][0]["text"] == "a"
    assert body["usage"]["completion_tokens"] == 2


async def test_an_incomplete_character_at_the_end_is_replaced(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("a東")
    count = len(gateway.tokens("a東")) - 1
    for stream in (False, True):
        response = await http.post("/v1/completions", json={**PLAIN, "max_tokens": count, "stream": stream})
        choices = [chunk["choices"][0] for chunk in (events(response)[:-1] if stream else [response.json()])]
        assert "".join(choice["text"] for choice in choices) == "a�"
        assert choices[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(gateway: Gateway, http: httpx.AsyncClient, stream: bool) -> None:
    gateway.says("a東")
    asked = {**CHAT, "logprobs": True, "top_logprobs": 2, "stream": stream}
    response = await http.post("/v1/chat/completions", json=asked)
    if stream:
        found = [chunk["choices"][0]["logprobs"] for chunk in events(response)[:-1]]
        content = [entry for logprobs in found if logprobs for entry in logprobs["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    tokens = gateway.tokens("a東")
    assert len(content) == len(tokens)
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "a東".encode()
    assert content[0]["token"] == "a"
    assert content[0]["logprob"] == -0.5
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-1.0, -2.0]
    assert content[0]["top_logprobs"][1]["token"] == "<|start|>"


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(gateway: Gateway, http: httpx.AsyncClient, stream: bool) -> None:
    gateway.says("a東b")
    response = await http.post("/v1/completions", json={**PLAIN, "logprobs": 1, "stream": stream})
    bodies = events(response)[:-1] if stream else [response.json()]
    found = [choice["logprobs"] for body in bodies for choice in body["choices"] if choice["logprobs"]]
    tokens, offsets, tops = (
        [item for logprobs in found for item in logprobs[name]] for name in ("tokens", "text_offset", "top_logprobs")
    )
    assert tokens[0] == "a"
    assert tokens[1].startswith("bytes:\\x")
    assert tokens[-1] == "b"
    assert offsets[0] == 0
    assert offsets[-1] == 2
    assert tops[0] == {"a": -0.5, "<|bos|>": -1.0}


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
    running = asyncio.create_task(http.post("/v1/completions", json={**PLAIN, "max_tokens": 2}))
    await wait_for(lambda: bool(gateway.router.streams))
    drained = asyncio.create_task(gateway.service.drain())
    await wait_for(lambda: gateway.service.draining)
    assert (await http.get("/ready")).json()["state"] == "draining"
    refused = await http.post("/v1/completions", json=PLAIN)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert not drained.done()
    gateway.router.streams[0].emit(50, 51)
    assert (await running).status_code == 200
    await asyncio.wait_for(drained, 5)


async def test_draining_ends_when_its_time_is_over(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(drain_s=0.01)
    async with client_of(gateway) as http:
        running = asyncio.create_task(http.post("/v1/completions", json={**PLAIN, "max_tokens": 2}))
        await wait_for(lambda: bool(gateway.router.streams))
        await asyncio.wait_for(gateway.service.drain(), 5)
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


async def wait_for(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)
