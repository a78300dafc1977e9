"""What clients must not send: answered at once, in OpenAI's format, with the parameter's name and never a 500."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import Gateway, MakeGateway, client_of

MESSAGES = [{"role": "user", "content": "Hi"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": MESSAGES, "max_tokens": 1},
    "/v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 1},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]},
}
TEXT_PATHS = ("/v1/chat/completions", "/v1/completions")
NAN, INFINITE = float("nan"), float("inf")

SAMPLING_ERRORS: list[tuple[str, Any]] = [
    ("model", 3),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "0.5"),
    ("temperature", NAN),
    ("temperature", INFINITE),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", 2**70),
    ("min_p", 2),
    ("seed", 2**64),
    ("seed", "x"),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"512": 1}),
    ("logit_bias", {"1": NAN}),
    ("logit_bias", []),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("max_tokens", 10**30),
    ("min_tokens", -1),
    ("min_tokens", 2),
    ("ignore_eos", 1),
    ("stop", ""),
    ("stop", 5),
    ("stop", ["a"] * 17),
    ("stop", "x" * 257),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [512]),
    ("stop_token_ids", ["a"]),
    ("n", 0),
    ("n", 129),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("stream_options", 1),
    ("best_of", 2),
    ("tools", [{"type": "function"}]),
    ("response_format", {"type": "json_object"}),
    ("suffix", "x"),
    ("echo", True),
    ("temprature", 1),
]
CHAT_ERRORS: list[tuple[str, Any]] = [
    ("messages", None),
    ("messages", []),
    ("messages", "Hi"),
    ("messages", [{"role": "user", "content": "x"}] * 4097),
    ("messages.0", ["Hi"]),
    ("messages.0.role", [{"role": "tool", "content": "x"}]),
    ("messages.0.role", [{"content": "x"}]),
    ("messages.0.content", [{"role": "user", "content": 5}]),
    ("messages.0.content.0.text", [{"role": "user", "content": [{"type": "text"}]}]),
    ("messages.0.content.0.type", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
    ("messages.0.tool_calls", [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]),
    ("top_logprobs", 3),
    ("top_logprobs", 21),
    ("logprobs", 1),
    ("max_completion_tokens", 0),
    ("prompt", "x"),
]
COMPLETION_ERRORS: list[tuple[str, Any]] = [
    ("prompt", None),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", {}),
    ("prompt", 5),
    ("prompt", [512]),
    ("prompt", [1.5]),
    ("prompt.0", [-1]),
    ("prompt.1", ["a", 1]),
    ("prompt.1.0", [[1], ["a"]]),
    ("prompt", ["a"] * 129),
    ("logprobs", 21),
    ("logprobs", True),
    ("messages", MESSAGES),
]


def check_error(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["param"] == param
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize("path", TEXT_PATHS)
@pytest.mark.parametrize(("param", "value"), SAMPLING_ERRORS)
async def test_wrong_sampling_values(http: httpx.AsyncClient, path: str, param: str, value: Any) -> None:
    body = json.dumps({**GOOD[path], param: value})
    response = await http.post(path, content=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"].split(".")[0] == param
    assert param in error["message"]


@pytest.mark.parametrize(("param", "value"), CHAT_ERRORS)
async def test_wrong_chat_values(http: httpx.AsyncClient, param: str, value: Any) -> None:
    body = {**GOOD["/v1/chat/completions"], param.split(".")[0]: value}
    check_error(await http.post("/v1/chat/completions", json=body), 400, param)


@pytest.mark.parametrize(("param", "value"), COMPLETION_ERRORS)
async def test_wrong_completion_values(http: httpx.AsyncClient, param: str, value: Any) -> None:
    body = {**GOOD["/v1/completions"], param.split(".")[0]: value}
    check_error(await http.post("/v1/completions", json=body), 400, param)


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b'\xff\xfe{"model": "tiny"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800", "model": "tiny"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "tiny", "prompt": ' + b"9" * 100_000 + b"}",
        b'{"model": "tiny", "messages": ' + b"[" * 500 + b"]" * 500 + b"}",
    ],
    ids=range(13),
)
async def test_bodies_that_are_not_json_objects(http: httpx.AsyncClient, path: str, body: bytes) -> None:
    response = await http.post(path, content=body)
    check_error(response, 400, response.json()["error"]["param"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from([name for name, _ in SAMPLING_ERRORS + CHAT_ERRORS + COMPLETION_ERRORS] + ["tokens", "user"])


@given(path=st.sampled_from(list(GOOD)), changes=st.dictionaries(NAMES, JSON, max_size=2))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_anything_at_all_gets_a_clean_answer(
    gateway: Gateway, http: httpx.AsyncClient, path: str, changes: dict[str, Any]
) -> None:
    gateway.says("x")
    response = await http.post(path, content=json.dumps({**GOOD[path], **changes}))
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        check_error(response, response.status_code, response.json()["error"]["param"])


@pytest.mark.parametrize("path", GOOD)
async def test_unknown_models(http: httpx.AsyncClient, path: str) -> None:
    error = check_error(await http.post(path, json={**GOOD[path], "model": "gpt-9"}), 404, "model")
    assert error["code"] == "model_not_found"
    assert "gpt-9" in error["message"]


async def test_prompts_that_are_too_long_are_told_both_lengths(http: httpx.AsyncClient) -> None:
    chat = [{"role": "user", "content": "hello " * 400}]
    for path, body, param in [
        ("/v1/completions", {"prompt": [5] * 256}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 200, "max_tokens": 57}, "max_tokens"),
        ("/v1/chat/completions", {"messages": chat}, "messages"),
    ]:
        error = check_error(await http.post(path, json={"model": "tiny", **body}), 400, param)
        assert error["code"] == "context_length_exceeded"
        assert "256" in error["message"]
        assert str(body.get("max_tokens", "")) in error["message"]
    assert "200 prompt tokens" in str(
        (await http.post("/v1/completions", json={"model": "tiny", "prompt": [5] * 200, "max_tokens": 57})).json()
    )


async def test_an_empty_prompt_of_a_model_without_a_first_token_is_refused(http: httpx.AsyncClient) -> None:
    assert (await http.post("/tokenize", json={"prompt": "", "add_special_tokens": False})).json()["count"] == 0
    check_error(await http.post("/v1/completions", json={"model": "tiny", "prompt": [[5], []]}), 400, "prompt")


async def test_tokenize_wants_one_of_prompt_and_messages(http: httpx.AsyncClient) -> None:
    for body in ({}, {"prompt": "a", "messages": MESSAGES}):
        check_error(await http.post("/tokenize", json=body), 400, "prompt")


@pytest.mark.parametrize("tokens", [None, "a", [512], [-1], [1.5], [[1]], {}])
async def test_detokenize_wants_token_ids(http: httpx.AsyncClient, tokens: Any) -> None:
    response = await http.post("/detokenize", json={"tokens": tokens})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tokens")


async def test_unknown_paths_and_methods(http: httpx.AsyncClient) -> None:
    assert check_error(await http.get("/v1/nothing"), 404)["code"] == "not_found"
    for path in GOOD:
        refused = await http.get(path)
        assert check_error(refused, 405)["code"] == "method_not_allowed"
        assert refused.headers["allow"] == "POST"
    for path in ("/health", "/ready", "/metrics", "/version", "/v1/models"):
        check_error(await http.post(path), 405)


async def test_bodies_that_are_too_large(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(max_body_bytes=1000)
    async with client_of(gateway) as http:
        for path in GOOD:
            check_error(await http.post(path, content=b" " * 1001), 413)
        small = await http.post("/tokenize", content=json.dumps({"prompt": "a"}).encode().ljust(1000))
        assert small.status_code == 200


async def test_keys(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(api_keys=("key-one", "key-two"))
    gateway.says("x")
    path = "/v1/completions"
    async with client_of(gateway) as http:
        for header in (None, "Bearer", "Bearer wrong", "Bearer key-one2", "Basic key-one", "key-one", "Bearer \xfc"):
            headers = {} if header is None else {"authorization": header.encode("latin-1")}
            for method, url in [("POST", path), ("GET", "/v1/models"), ("POST", "/tokenize"), ("GET", "/nothing")]:
                refused = await http.request(method, url, headers=headers)  # type: ignore[arg-type]
                assert check_error(refused, 401)["code"] == "invalid_api_key"
                assert refused.headers["www-authenticate"] == "Bearer"
        for key in ("key-one", "key-two", "key-one"):
            answered = await http.post(path, json=GOOD[path], headers={"authorization": f"Bearer {key}"})
            assert answered.status_code == 200
        for url in ("/health", "/ready", "/metrics", "/version", "/docs", "/openapi.json"):
            assert (await http.get(url)).status_code == 200
    one, two, again = (stream.request.tenant for stream in gateway.router.streams)
    assert one == again != two
    assert "key" not in one
