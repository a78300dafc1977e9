"""The official `openai` client, sync and async, against the real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.conftest import KEY
from tests.e2e.prompts import CHAT
from tests.e2e.reference import Judge
from tests.e2e.serving import Serve

pytestmark = pytest.mark.timeout(300)

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.fixture
def client(pair_serve: Serve) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{pair_serve.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
async def aclient(pair_serve: Serve) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{pair_serve.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_completion_tokens=32)
    assert reply.choices[0].message.content == ANSWER
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_chat_streamed(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *events, last = list(stream)
    assert "".join(event.choices[0].delta.content or "" for event in events) == ANSWER
    assert events[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.completion_tokens == 8


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="demo", prompt=["The capital of France is", "2 + 2 ="], temperature=0, max_tokens=4
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.choices[0].text.startswith(" Paris")
    assert reply.choices[0].finish_reason == "length"
    streamed = client.completions.create(
        model="demo", prompt="The capital of France is", temperature=0, max_tokens=4, stream=True
    )
    assert "".join(event.choices[0].text for event in streamed) == reply.choices[0].text


async def test_async(aclient: openai.AsyncOpenAI) -> None:
    async def whole() -> str | None:
        reply = await aclient.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
        return reply.choices[0].message.content

    async def streamed() -> str:
        stream = await aclient.chat.completions.create(model="demo", messages=QUESTION, temperature=0, stream=True)
        return "".join([event.choices[0].delta.content or "" async for event in stream])

    assert await asyncio.gather(whole(), streamed(), whole(), streamed()) == [ANSWER] * 4


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "baton"


def test_cached_tokens_are_told(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "You know all about cheese. " * 12}, *QUESTION]
    first, second = (
        client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=4) for _ in range(2)
    )
    assert second.usage.prompt_tokens_details.cached_tokens >= 80 > first.usage.prompt_tokens_details.cached_tokens
    assert second.choices[0].message.content == first.choices[0].message.content


def test_n(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="demo", messages=CHAT[1], n=3, temperature=1.0, seed=7, max_tokens=24)
    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert reply.usage.completion_tokens <= 3 * 24
    again = client.chat.completions.create(model="demo", messages=CHAT[1], n=3, temperature=1.0, seed=7, max_tokens=24)
    assert [choice.message.content for choice in again.choices] == texts, "the same seed draws the same"


def test_logprobs(client: openai.OpenAI, judge: Judge) -> None:
    reply = client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"return_token_ids": True},
    )
    content = reply.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == ANSWER
    assert all(entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 3 for entry in content)
    tokens = tuple(reply.choices[0].model_extra["token_ids"])
    wanted = judge.logprobs(judge.encode(QUESTION), tokens)
    assert [entry.logprob for entry in content] == pytest.approx(wanted, abs=1e-3)
    plain = client.completions.create(model="demo", prompt="2 + 2 =", temperature=0, max_tokens=3, logprobs=2)
    assert len(plain.choices[0].logprobs.token_logprobs) == 3
    assert all(len(top) == 2 for top in plain.choices[0].logprobs.top_logprobs)


def test_stop(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, stop=[" is P"])
    assert reply.choices[0].message.content == "The capital of France"
    assert reply.choices[0].finish_reason == "stop"


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="demo", messages=QUESTION, temperature=5.0)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt=[7] * 7000, max_tokens=5)
    assert long.value.code == "context_length_exceeded"
    assert "7000" in long.value.message and "5824" in long.value.message, "both lengths: 364 blocks of 16 hold 5824"
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": ""}):
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="demo", messages=QUESTION, extra_headers=headers)


async def test_a_client_that_leaves_frees_its_blocks(pair: Cluster, aclient: openai.AsyncOpenAI) -> None:
    """In the middle of a stream, and while it waits for the whole: on both workers at once."""
    endless = {"model": "demo", "prompt": "Count: 1, 2, 3,", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    stream = await aclient.completions.create(**endless, stream=True)
    whole = asyncio.create_task(aclient.completions.create(**endless))
    events = aiter(stream)
    for _ in range(5):
        await anext(events)
    async with asyncio.timeout(10):
        while (await pair.reports())["decode-0"].sequences < 2:
            await asyncio.sleep(0.05)
    await stream.close()
    whole.cancel()
    await asyncio.wait([whole])
    await pair.quiet()
