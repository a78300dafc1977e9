"""One request to an OpenAI-compatible server, measured from the client's side."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .wire import HttpClient

Prompt = tuple[int, ...] | str
"""Token ids, or text."""


@dataclass(frozen=True, slots=True)
class Target:
    """How to ask this server. `chat` sends text prompts to /v1/chat/completions as one user message.
    `ignore_eos` makes output lengths exact on servers that know it (Baton, vLLM, SGLang); off for others."""

    model: str
    chat: bool = False
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout_s: float = 600.0


@dataclass(slots=True)
class Sample:
    """What one request met. Times are seconds on the client's monotonic clock.

    start     when the request was due (open loop) or sent (closed loop)
    events    arrival of every event that carried text, in order
    end       arrival of the last byte
    tokens    output tokens: the server's own count, or that of the events where it sends none
    timeline  the server's account of where the time went (Baton only)
    error     empty, or a type: http_429, timeout, connection, stream, truncated, length
    """

    start: float
    events: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    timeline: dict[str, float | None] = field(default_factory=dict)
    error: str = ""
    detail: str = ""

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.events[0] - self.start

    @property
    def e2e(self) -> float:
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, the mean of one request; None with fewer than two tokens."""
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """Times between successive events."""
        return [b - a for a, b in zip(self.events, self.events[1:], strict=False)]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta
        return bool(self.text or (delta and (delta.content or delta.reasoning_content)))


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timeline: dict[str, float | None] | None = None
    error: Any = None


_CHUNK = msgspec.json.Decoder(_Chunk)


class _Reader:
    """Takes the events of one answer into its sample."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.finished = False

    def __call__(self, now: float, data: bytes) -> None:
        if data == b"[DONE]":
            self.finished = True
            return
        try:
            chunk = _CHUNK.decode(data)
        except msgspec.MsgspecError as error:
            self.sample.error, self.sample.detail = "stream", str(error)
            return
        sample = self.sample
        if chunk.choices and chunk.choices[0].has_text:
            sample.events.append(now)
        if chunk.usage is not None:
            details = chunk.usage.prompt_tokens_details
            sample.tokens, sample.prompt_tokens = chunk.usage.completion_tokens, chunk.usage.prompt_tokens
            sample.cached_tokens = (details.cached_tokens or 0) if details else 0
        if chunk.timeline is not None:
            sample.timeline = chunk.timeline
        if chunk.error is not None:
            sample.error, sample.detail = "stream", str(chunk.error)


def encode(target: Target, prompt: Prompt, output_len: int) -> tuple[str, bytes]:
    """Path and JSON body of a streamed request for exactly `output_len` tokens."""
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": output_len,
        "temperature": target.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.ignore_eos:
        body["ignore_eos"] = True
    if target.chat:
        body["messages"] = [{"role": "user", "content": prompt}]
        return "/v1/chat/completions", msgspec.json.encode(body)
    body["prompt"] = prompt
    return "/v1/completions", msgspec.json.encode(body)


async def ask(http: HttpClient, target: Target, prompt: Prompt, output_len: int, due: float | None = None) -> Sample:
    """Run one request to its end. Never raises for what the server does: the sample's `error` names it.

    `due` is when the request should have been sent; latencies count from there, so that a client that falls behind
    its schedule makes the numbers worse and never better.
    """
    path, body = encode(target, prompt, output_len)
    sample = Sample(start=time.monotonic() if due is None else due)
    reader = _Reader(sample)
    try:
        response = await http.post(path, body, reader, target.timeout_s)
    except TimeoutError:
        sample.error = "timeout"
    except OSError as error:
        sample.error, sample.detail = "connection", str(error)
    else:
        if response.status != 200:
            sample.error, sample.detail = f"http_{response.status}", response.body[:300].decode(errors="replace")
    sample.end = time.monotonic()
    sample.tokens = sample.tokens or len(sample.events)
    if not sample.error:
        sample.error = _verdict(sample, reader.finished, output_len if target.ignore_eos else None)
    return sample


def _verdict(sample: Sample, finished: bool, wanted: int | None) -> str:
    if not finished or not sample.events:
        return "truncated"
    return "length" if wanted is not None and sample.tokens != wanted else ""
