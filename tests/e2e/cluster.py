"""A running cluster as tests use it: ask it for tokens, read its metrics, and look into its workers' books."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from baton.common.errors import BatonError
from baton.common.messages import CheckReport
from baton.protos.rpc import Peer
from tests.e2e.prompts import Prompt
from tests.e2e.serving import Serve

TIMEOUT_S = 90.0
"""For one answer. On two cores a long prompt behind fifteen others takes its time."""
QUIET_S = 2.0
"""How soon after the last request everything must have been given back."""
CLUSTER_TOKEN = "of-these-tests"
OUTPUT = 64
"""Tokens of an answer, unless said otherwise."""
BRIEF = 24
"""Tokens of an answer where its length is not the point: it still goes on in another block than it began in."""


@dataclass(slots=True)
class Answer:
    """What came back for one prompt; of a stream, also each event's text."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)

    @property
    def cached(self) -> int:
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])

    def take(self, choice: dict[str, Any]) -> None:
        """One event of a stream, or a whole answer's only choice."""
        text = choice.get("text")
        if text is None:
            text = choice["message" if "message" in choice else "delta"].get("content", "")
        self.tokens += choice.get("token_ids", [])
        self.pieces.append(text)
        self.text += text
        self.finish_reason = choice["finish_reason"]


@dataclass(slots=True)
class Cluster:
    """A client of one `baton serve` that is ready."""

    serve: Serve
    client: httpx.AsyncClient

    # --- asking ---

    async def ask(self, prompt: Prompt, **options: Any) -> Answer:
        """Greedy, `OUTPUT` tokens whatever the model says, unless `options` (of the HTTP body) say otherwise."""
        answer = Answer()
        if options.get("stream"):
            async with aclosing(self.follow(prompt, answer, **options)) as events:
                async for _ in events:
                    pass
            return answer
        path, body = _request(prompt, options)
        response = await self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        answer.take(response.json()["choices"][0])
        answer.usage = response.json()["usage"]
        return answer

    async def follow(self, prompt: Prompt, answer: Answer, **options: Any) -> AsyncGenerator[None, None]:
        """Stream into `answer`; yields after each of its events. Leaving early disconnects."""
        path, body = _request(prompt, options | {"stream": True, "stream_options": {"include_usage": True}})
        async with self.client.stream("POST", path, json=body) as response:
            assert response.status_code == 200, await response.aread()
            last = ""
            async for line in response.aiter_lines():
                last = line or last
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                if event["choices"]:
                    answer.take(event["choices"][0])
                    yield
                else:
                    answer.usage = event["usage"]
            assert last == "data: [DONE]", last

    async def ask_all(self, prompts: Sequence[Prompt], at_once: int = 16, **options: Any) -> list[Answer]:
        """An answer for each prompt, `at_once` of them under way together."""
        room = asyncio.Semaphore(at_once)

        async def one(prompt: Prompt) -> Answer:
            async with room:
                return await self.ask(prompt, **options)

        return await asyncio.gather(*(one(prompt) for prompt in prompts))

    # --- looking ---

    async def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that carry these labels; 0 if there is none."""
        return sum(await self._samples(name, labels))

    async def _samples(self, name: str, labels: dict[str, str]) -> list[float]:
        families = text_string_to_metric_families((await self.client.get("/metrics")).text)
        samples = (sample for family in families for sample in family.samples)
        return [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]

    async def reports(self) -> dict[str, CheckReport]:
        """Each worker's own books, by its name."""
        found = {}
        for name, address in self.addresses().items():
            peer = Peer(address, CLUSTER_TOKEN)
            try:
                found[name] = await peer.check(timeout_s=5.0)
            finally:
                await peer.close()
        return found

    def addresses(self) -> dict[str, str]:
        """Where each worker listens: its last word counts, since a worker may have been started again."""
        return dict(re.findall(r"(\S+) info ready at (\S+),", self.serve.output))

    async def quiet(self) -> None:
        """Within `QUIET_S` the router holds no request, everything is given back on every worker, and the books balance
        all the time."""
        deadline = time.monotonic() + QUIET_S
        while True:
            reports, held = await self.reports(), await self.metric("baton_router_requests")
            assert all(report.ok for report in reports.values()), reports
            if all(map(_idle, reports.values())) and not held:
                return
            assert time.monotonic() < deadline, f"not quiet after {QUIET_S:g} s: {reports}, {held:g} at the router"
            await asyncio.sleep(0.05)

    async def whole(self, workers: int, timeout_s: float = 60.0) -> None:
        """Wait until so many workers are in the router's fleet, and all of them answer."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with suppress(BatonError):  # the address of a worker that is starting again is its old one for a while
                fleet = await self._samples("baton_engine_steps_total", {})
                if len(fleet) == workers == len(await self.reports()):
                    return
            await asyncio.sleep(0.1)
        raise AssertionError(f"not {workers} workers after {timeout_s:g} s\n{self.serve.output[-4000:]}")


def _idle(report: CheckReport) -> bool:
    held = (report.pinned_blocks, report.reserved_blocks, report.sequences, report.handovers)
    return not any(held) and report.free_blocks + report.cached_blocks == report.total_blocks


def _request(prompt: Prompt, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    body = {"model": "demo", "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    if isinstance(prompt, str):
        return "/v1/completions", body | {"prompt": prompt} | options
    return "/v1/chat/completions", body | {"messages": prompt} | options


@contextmanager
def running(folder: Path, *flags: str, config: str = "", env: dict[str, str] | None = None) -> Iterator[Serve]:
    """A ready `baton serve` with these flags, YAML and variables, ended afterwards. Its log is in `folder`."""
    if config:
        (folder / "baton.yaml").write_text(config)
        flags = ("--config", str(folder / "baton.yaml"), *flags)
    serve = Serve.start(folder / "serve.log", *flags, env={"BATON_CLUSTER_TOKEN": CLUSTER_TOKEN} | (env or {}))
    try:
        yield serve.wait_ready()
    finally:
        serve.stop()


@asynccontextmanager
async def connected(serve: Serve, key: str = "") -> AsyncIterator[Cluster]:
    """A client for one test. `key`: the API key that it sends."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=serve.url, headers=headers, timeout=TIMEOUT_S, limits=limits) as client:
        yield Cluster(serve, client)
