"""The official client as the judge, on a real socket; and clients that leave, or do not read."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest

from baton.common.errors import EngineFailure, Overloaded
from baton.common.types import FinishReason
from baton.gateway import reply

from .conftest import FakeStream, Gateway, MakeGateway, serve

MESSAGES = [{"role": "user", "content": "Hi"}]
TEXT = "Hello 東京 😀, how are you?"


@pytest.fixture
def client(served: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served + "/v1", api_key="any", max_retries=0, timeout=20) as client:
        yield client


@contextmanager
def async_client(served: str) -> Iterator[openai.AsyncOpenAI]:
    yield openai.AsyncOpenAI(base_url=served + "/v1", api_key="any", max_retries=0, timeout=20)


def eventually(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


def test_chat(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.says(TEXT, pieces=1)
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens is not None
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode() == TEXT


def test_streamed_chat(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.says(TEXT, pieces=2)
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == TEXT
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(gateway.tokens(TEXT)) + 1


def test_the_clients_own_stream_helper(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.says(TEXT, pieces=1)
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:  # type: ignore[arg-type]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT


def test_completions(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.says(TEXT)
    answer = client.completions.create(model="tiny", prompt=["a", "b"], n=2, logprobs=2, extra_body={"top_k": 5})
    assert [choice.text for choice in answer.choices] == [TEXT] * 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {stream.request.params.top_k for stream in gateway.router.streams} == {5}
    stream = client.completions.create(model="tiny", prompt=[1, 2, 3], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_every_error_is_the_one_that_the_client_knows(gateway: Gateway, client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="tiny", messages=MESSAGES, temperature=9)  # type: ignore[call-overload]
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        create(model="other", messages=MESSAGES)  # type: ignore[arg-type]
    gateway.router.refusal = Overloaded("full", retry_after_s=1)
    with pytest.raises(openai.RateLimitError) as full:
        create(model="tiny", messages=MESSAGES, stream=True)  # type: ignore[arg-type]
    assert full.value.response.headers["retry-after"] == "1"


def test_an_error_within_a_stream_is_raised_to_who_reads_it(gateway: Gateway, client: openai.OpenAI) -> None:
    def script(stream: FakeStream) -> None:
        stream.emit(*gateway.tokens("Hello"))
        stream.fail(EngineFailure("step failed"))

    gateway.router.script = script
    seen = ""
    with pytest.raises(openai.APIError, match="step failed"):
        for chunk in client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True):  # type: ignore[arg-type]
            seen += chunk.choices[0].delta.content or ""
    assert seen == "Hello"


def test_keys(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(api_keys=("secret",))
    gateway.says("x")
    with serve(gateway) as address:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=address + "/v1", api_key="wrong", max_retries=0).models.list()
        assert list(openai.OpenAI(base_url=address + "/v1", api_key="secret", max_retries=0).models.list())


async def test_many_at_once_through_the_async_client(gateway: Gateway, served: str) -> None:
    gateway.says(TEXT, pieces=1)
    with async_client(served) as client:

        async def streamed() -> str:
            stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)  # type: ignore[arg-type]
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def whole() -> str | None:
            answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)  # type: ignore[arg-type]
            return answer.choices[0].message.content

        found = await asyncio.gather(*(make() for _ in range(16) for make in (streamed, whole)))
    assert found == [TEXT] * 32


def test_a_client_that_leaves_a_stream_frees_the_request(gateway: Gateway, served: str) -> None:
    gateway.router.script = lambda stream: stream.emit(50)
    body = {"model": "tiny", "messages": MESSAGES, "stream": True, "n": 2}
    with httpx.stream("POST", served + "/v1/chat/completions", json=body) as response:
        assert next(response.iter_lines()).startswith("data: ")
        eventually(lambda: len(gateway.router.streams) == 2)
    eventually(lambda: all(stream.cancelled for stream in gateway.router.streams))


def test_a_client_that_leaves_before_the_answer_frees_the_request(gateway: Gateway, served: str) -> None:
    host, port = served.removeprefix("http://").split(":")
    body = b'{"model": "tiny", "prompt": "a"}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        eventually(lambda: len(gateway.router.streams) == 1)
    eventually(lambda: gateway.router.streams[0].cancelled)


def test_a_client_that_leaves_within_its_body_disturbs_nobody(gateway: Gateway, served: str) -> None:
    host, port = served.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    gateway.says("x")
    assert httpx.post(served + "/v1/completions", json={"model": "tiny", "prompt": "a"}).status_code == 200
    assert len(gateway.router.streams) == 1


def test_a_client_that_does_not_read_is_aborted(make_gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens come without end; the connection fills, tokens pile up, and the request is given up."""
    monkeypatch.setattr(reply, "_LOOK_S", 0.05)
    gateway = make_gateway(max_stream_backlog=200, max_model_len=1 << 30)
    tasks: list[asyncio.Task[None]] = []

    def script(stream: FakeStream) -> None:
        async def play() -> None:
            while not stream.cancelled:
                stream.emit(*[50] * 50)
                await asyncio.sleep(0)

        tasks.append(asyncio.get_running_loop().create_task(play()))

    gateway.router.script = script
    with serve(gateway) as address:
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"model": "tiny", "prompt": "a", "stream": True}).encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            eventually(lambda: bool(gateway.router.streams) and gateway.router.streams[0].cancelled)
        metrics = httpx.get(address + "/metrics").text
    assert 'baton_requests_total{outcome="client_not_reading"} 1.0' in metrics


def test_a_request_that_ends_while_its_client_reads_slowly_arrives_whole(gateway: Gateway, served: str) -> None:
    tokens = gateway.tokens("abc " * 50)

    def script(stream: FakeStream) -> None:
        stream.emit(*tokens)
        stream.finish(FinishReason.STOP)

    gateway.router.script = script
    body = {"model": "tiny", "prompt": "a", "stream": True}
    text = ""
    with httpx.stream("POST", served + "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            time.sleep(0.0005)
    assert text == "abc " * 50
