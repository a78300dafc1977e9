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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from baton.deploy import models
from tests.e2e.reference import Judge
from tests.ray.nodes import ROOT, Loopback, Nodes, actors, ended, environment, eventually, groups

URL = "http://127.0.0.1:8000"
READY_TIMEOUT_S = 120.0
COMMAND_TIMEOUT_S = 120.0
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


def is_ready() -> bool:
    try:
        return httpx.get(f"{URL}/ready", timeout=5).is_success
    except httpx.HTTPError:
        return False


async def ask(client: httpx.AsyncClient, prompt: str, tokens: list[int]) -> None:
    """Stream a greedy answer's tokens into `tokens`."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "stream": True}
    async with client.stream("POST", f"{URL}/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                tokens += [t for choice in event["choices"] for t in choice.get("token_ids", [])]
    assert len(tokens) == OUTPUT


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
    prompts = PROMPTS * 4
    answers: list[list[int]] = [[] for _ in prompts]
    asking = [asyncio.create_task(ask(client, prompt, to)) for prompt, to in zip(prompts, answers, strict=True)]
    async with asyncio.timeout(60):
        while not all(answers):
            await asyncio.sleep(0.05)
    assert started.second is not None
    started.second.crash()
    assert not any(len(tokens) == OUTPUT for tokens in answers), "all were under way"
    await asyncio.gather(*asking)
    judge.check([(judge.encode(prompt), tuple(tokens)) for prompt, tokens in zip(prompts, answers, strict=True)])
    async with asyncio.timeout(BACK_TIMEOUT_S):
        while nodes_of(await asyncio.to_thread(job.workers)) != {("prefill", "first"): 2, ("decode", "first"): 2}:
            await asyncio.sleep(0.5)


async def test_pools_turn_scale_drain_and_roll_out_under_load(
    job: Job, client: httpx.AsyncClient, judge: Judge
) -> None:
    """As on one machine (`tests/e2e/test_operations.py`), by the operators' commands."""
    answers: list[tuple[str, list[int]]] = []
    over = asyncio.Event()

    async def stream(prompt: str) -> None:
        while not over.is_set():
            tokens: list[int] = []
            await ask(client, prompt, tokens)
            answers.append((prompt, tokens))

    streams = [asyncio.create_task(stream(prompt)) for prompt in PROMPTS * 2]
    operations = (
        ("scale", "prefill=1", "decode=3"),
        ("scale", "prefill=2", "decode=2"),
        ("drain", "decode-0", "--now"),
        ("scale", "decode=2"),
        ("rollout", "--set", "engine.max_running=20"),
    )
    for operation in operations:
        print(operation, await asyncio.to_thread(job.operate, *operation))
    over.set()
    await asyncio.gather(*streams)
    assert all(row["state"] == "ready" and row["revision"] == 2 for row in job.workers())
    judge.check([(judge.encode(prompt), tuple(tokens)) for prompt, tokens in answers])


async def test_stopping_finishes_what_runs_and_leaves_no_process_and_no_placement_group(
    job: Job, client: httpx.AsyncClient, judge: Judge
) -> None:
    children = [psutil.Process(row["pid"]) for row in job.workers()]
    assert len(children) == 4
    tokens: list[int] = []
    asking = asyncio.create_task(ask(client, PROMPTS[0], tokens))
    async with asyncio.timeout(30):
        while not tokens:
            await asyncio.sleep(0.05)
    await asyncio.to_thread(job.run, "ray job stop")
    await asking
    judge.check([(judge.encode(PROMPTS[0]), tuple(tokens))])
    eventually(lambda: all(map(ended, children)), "no worker is left")
    eventually(lambda: not groups() and "WorkerHost" not in actors(), "no placement group is left, and no actor")
