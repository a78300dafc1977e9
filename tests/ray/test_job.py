"""Baton as a Ray job on two nodes, by the very commands of docs/ray.md: placed as asked, alive after a node died, and
gone when it is stopped."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.deploy import models
from tests.e2e.reference import Judge
from tests.ray.nodes import ROOT, Loopback, Nodes, actors, ended, environment, eventually, groups

URL = "http://127.0.0.1:8000"
READY_TIMEOUT_S = 120.0
COMMAND_TIMEOUT_S = 240.0
BEGUN_TIMEOUT_S = 60.0
BACK_TIMEOUT_S = 90.0
"""Workers of a node that died run again on the other: Ray's word, an actor's start, the model."""
OUTPUT = 96
PROMPTS = [f"{name} opened the old book on page {page} and read aloud:" for page, name in enumerate(("Ada", "Bo"), 3)]


def documented(begin: str) -> list[str]:
    """The command of docs/ray.md that begins so."""
    text = (ROOT / "docs" / "ray.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return shlex.split(next(line for line in blocks.splitlines() if line.startswith(begin)))


@dataclass(frozen=True)
class Job:
    """What a reader of docs/ray.md has at hand: a checkout, with Baton installed."""

    folder: Path

    def run(self, begin: str, *more: str) -> str:
        """What the documented command that begins so prints."""
        return self._do([*documented(begin), *more])

    def _do(self, command: list[str]) -> str:
        env = environment(self.folder)
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def operate(self, *words: str) -> str:
        """What an operator's command prints, which nobody is asked about."""
        return self._do(["baton", *words, "--yes"])

    def workers(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.run("baton status", "--json"))["workers"]
        return rows


def nodes_of(rows: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
    """How many ready workers of each pool each node has."""
    return Counter((row["pool"], row["node"]) for row in rows if row["state"] == "ready")


def pools(rows: list[dict[str, Any]]) -> Counter[tuple[str, int]]:
    """How many workers each pool has of each revision, all of which are ready."""
    assert all(row["state"] == "ready" for row in rows), rows
    return Counter((row["pool"], row["revision"]) for row in rows)


def is_ready() -> bool:
    try:
        return httpx.get(f"{URL}/ready", timeout=5).is_success
    except httpx.HTTPError:
        return False


class Closed(Exception):
    """The door takes nothing new."""


async def ask(client: httpx.AsyncClient, prompt: str, tokens: list[int]) -> None:
    """Stream a greedy answer's tokens into `tokens`: all of them, once it is taken. Raises `Closed` if it is not."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "stream": True}
    try:
        response = await client.send(client.build_request("POST", f"{URL}/v1/completions", json=body), stream=True)
    except httpx.TransportError as error:
        raise Closed(str(error)) from error
    async with aclosing(response):
        if response.status_code != 200:
            raise Closed(await response.aread())
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                tokens += [t for choice in event["choices"] for t in choice.get("token_ids", [])]
    assert len(tokens) == OUTPUT


@dataclass
class Load:
    """Clients that ask their next question as soon as the last is answered: whenever something happens to the cluster,
    something runs there. `answers`: prompts with the tokens that have come so far."""

    client: httpx.AsyncClient
    answers: list[tuple[str, list[int]]] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def stream(self, prompt: str) -> None:
        """One client, until it is over."""
        while not self.over.is_set():
            tokens: list[int] = []
            self.answers.append((prompt, tokens))
            await ask(self.client, prompt, tokens)

    async def begun(self, streams: int) -> None:
        """Each of so many clients has a first token."""
        async with asyncio.timeout(BEGUN_TIMEOUT_S):
            while not all(tokens for _, tokens in self.answers[:streams]):
                await asyncio.sleep(0.05)


@asynccontextmanager
async def under_load(client: httpx.AsyncClient, judge: Judge, prompts: list[str]) -> AsyncIterator[None]:
    """A client for each prompt before, during and after what is done here; all their answers are the reference's."""
    load = Load(client)
    async with asyncio.TaskGroup() as streams:
        for prompt in prompts:
            streams.create_task(load.stream(prompt))
        await asyncio.sleep(0)
        await load.begun(len(prompts))
        yield
        load.over.set()
    judge.check([(judge.encode(prompt), tuple(tokens)) for prompt, tokens in load.answers])


async def retries(client: httpx.AsyncClient) -> float:
    """Requests that were placed again since the job began."""
    families = text_string_to_metric_families((await client.get(f"{URL}/metrics")).text)
    return sum(s.value for family in families for s in family.samples if s.name == "baton_router_retries_total")


@pytest.fixture(scope="module")
def job(loopback: Loopback, started: Nodes) -> Iterator[Job]:
    """The job that docs/ray.md submits, ready. The tests of this module stand in the order of its life."""
    job = Job(started.logs)
    with loopback.entered():
        started.whole()
        job.run("ray job submit")
        try:
            eventually(is_ready, "the door is open", READY_TIMEOUT_S)
            eventually(lambda: nodes_of(job.workers()).total() == 4, "all workers are ready", READY_TIMEOUT_S)
        except AssertionError:
            print(job.run("ray job logs"))
            raise
    yield job
    with loopback.entered():
        job.run("ray job stop")


@pytest.fixture(autouse=True)
def network(loopback: Loopback) -> Iterator[None]:
    with loopback.entered():
        yield


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def judge() -> Judge:
    """The reference, on the weights that the job serves."""
    source = models.find("demo")
    assert source.gguf is not None
    return Judge.load(models.cached_folder(source.gguf))


def test_pools_are_spread_over_the_nodes(job: Job) -> None:
    pairs = [(pool, node) for pool in ("prefill", "decode") for node in ("first", "second")]
    assert nodes_of(job.workers()) == Counter(pairs)
    assert sorted(groups()) == ["decode-0", "decode-1", "prefill-0", "prefill-1"]


async def test_requests_survive_a_node_and_its_workers_come_back_on_the_other(
    job: Job, started: Nodes, client: httpx.AsyncClient, judge: Judge
) -> None:
    before = await retries(client)
    assert started.second is not None
    async with under_load(client, judge, PROMPTS * 4), asyncio.timeout(BACK_TIMEOUT_S):
        started.second.crash()
        while any(node == "second" for _, node in nodes_of(await asyncio.to_thread(job.workers))):
            await asyncio.sleep(0.1)
    assert await retries(client) > before, "nothing ran on the node that died"
    async with asyncio.timeout(BACK_TIMEOUT_S):
        while nodes_of(await asyncio.to_thread(job.workers)) != {("prefill", "first"): 2, ("decode", "first"): 2}:
            await asyncio.sleep(0.5)


async def test_pools_turn_scale_drain_and_roll_out_under_load(
    job: Job, client: httpx.AsyncClient, judge: Judge
) -> None:
    """As on one machine (`tests/e2e/test_operations.py`), by the operators' commands."""

    async def operate(*words: str) -> list[dict[str, Any]]:
        print(words, await asyncio.to_thread(job.operate, *words))
        return await asyncio.to_thread(job.workers)

    async with under_load(client, judge, PROMPTS):
        assert pools(await operate("scale", "prefill=1", "decode=3")) == {("prefill", 1): 1, ("decode", 1): 3}
        rows = await operate("scale", "prefill=2", "decode=2")
        assert pools(rows) == {("prefill", 1): 2, ("decode", 1): 2}
        name = next(row["name"] for row in rows if row["pool"] == "decode")  # whatever it is called: some were turned
        assert pools(await operate("drain", name, "--now")) == {("prefill", 1): 2, ("decode", 1): 1}
        assert pools(await operate("scale", "decode=2")) == {("prefill", 1): 2, ("decode", 1): 2}
        assert pools(await operate("rollout", "--set", "engine.max_running=20")) == {
            ("prefill", 2): 2,
            ("decode", 2): 2,
        }


async def test_stopping_finishes_what_runs_and_leaves_no_process_and_no_placement_group(
    job: Job, client: httpx.AsyncClient, judge: Judge
) -> None:
    rows = job.workers()
    assert pools(rows) == {("prefill", 2): 2, ("decode", 2): 2}
    children = [psutil.Process(row["pid"]) for row in rows]
    load = Load(client)
    asking = asyncio.create_task(load.stream(PROMPTS[0]))
    await asyncio.sleep(0)
    await load.begun(1)
    await asyncio.to_thread(job.run, "ray job stop")
    with pytest.raises(Closed):
        await asking
    *answers, (_, refused) = load.answers
    assert not refused
    judge.check([(judge.encode(prompt), tuple(tokens)) for prompt, tokens in answers])
    eventually(lambda: all(map(ended, children)), "no worker is left")
    eventually(lambda: not groups() and "WorkerHost" not in actors(), "no placement group is left, and no actor")
