"""What clients get, through the whole application and a router that plays a script."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from baton.common.types import FinishReason

from .asking import CHAT, PLAIN, chat_text, events, wait_for
from .conftest import FakeStream, Gateway


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
