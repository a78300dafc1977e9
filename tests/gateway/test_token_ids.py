"""`return_token_ids`: the tokens of the shown text, exactly, whatever characters they are cut across."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.gateway.conftest import Gateway

BODIES = {
    "/v1/completions": {"model": "tiny", "prompt": "a"},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "a"}]},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [False, True])
async def test_token_ids(gateway: Gateway, http: httpx.AsyncClient, path: str, stream: bool, logprobs: bool) -> None:
    gateway.says("a東🦜b")
    wanted = 0 if path == "/v1/completions" else True
    body = BODIES[path] | {"return_token_ids": True, "stream": stream} | ({"logprobs": wanted} if logprobs else {})
    response = await http.post(path, json=body)
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        choices = [event["choices"][0] for event in events]
        assert all(len(choice.get("token_ids", [])) <= 1 for choice in choices)
    else:
        choices = [response.json()["choices"][0]]
    assert tuple(t for choice in choices for t in choice.get("token_ids", [])) == gateway.tokens("a東🦜b")
    assert any(choice["logprobs"] for choice in choices) == logprobs


async def test_they_are_not_there_unless_asked_for(gateway: Gateway, http: httpx.AsyncClient) -> None:
    gateway.says("a")
    for path, body in BODIES.items():
        assert "token_ids" not in (await http.post(path, json=body)).text
