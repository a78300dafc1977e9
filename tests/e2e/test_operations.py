"""A cluster is operated while 16 clients stream from it: nothing fails, and every token is the reference's."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from baton.common.json_form import from_json
from baton.deploy import models
from baton.deploy.control.status import ClusterStatus
from tests.e2e.cluster import BRIEF, Answer, Cluster, connected, running
from tests.e2e.prompts import ALL, LONG, Prompt
from tests.e2e.reference import Judge, Tokens
from tests.e2e.serving import Serve

pytestmark = pytest.mark.timeout(300)

STREAMS = 16
TOKENS = BRIEF
OPERATION_S = 120.0
"""How long an operation may take: workers load a model meanwhile, on cores that are busy."""
PROMPTS: list[Prompt] = [prompt for prompt in ALL if prompt not in LONG][:STREAMS]


@dataclass(slots=True)
class Load:
    """A closed loop: each client asks its next question as soon as the last is answered."""

    cluster: Cluster
    finished: list[tuple[Prompt, Answer]] = field(default_factory=list)
    whose: list[int] = field(default_factory=list)
    """In the end, how many answers each judge agrees with."""

    async def client(self, number: int) -> None:
        for turn in itertools.count(number):
            prompt = PROMPTS[turn % len(PROMPTS)]
            answer = await self.cluster.ask(prompt, stream=True, max_tokens=TOKENS)
            self.finished.append((prompt, answer))

    def check(self, judges: Sequence[Judge]) -> list[int]:
        """Every answer is the reference's; with several, that of one of them from its first token to its last. Returns
        how many answers are whose."""
        pairs: list[list[tuple[Tokens, Tokens]]] = [[] for _ in judges]
        for prompt, answer in self.finished:
            assert len(answer.tokens) == TOKENS
            pair = judges[0].encode(prompt), tuple(answer.tokens)
            whose = [number for number, judge in enumerate(judges[:-1]) if not judge.verdict(*pair).wrong]
            pairs[whose[0] if whose else -1].append(pair)
        for judge, answers in zip(judges, pairs, strict=True):
            judge.check(answers)
        return list(map(len, pairs))


@asynccontextmanager
async def under_load(cluster: Cluster, *judges: Judge) -> AsyncIterator[Load]:
    """`STREAMS` clients, before, during and after what is done here; then every answer is looked at."""
    load = Load(cluster)
    clients = [asyncio.create_task(load.client(number)) for number in range(STREAMS)]
    try:
        await more(load, clients)
        yield load
        await more(load, clients)
    finally:
        for client in clients:
            client.cancel()
        await asyncio.wait(clients)
    load.whose = load.check(judges)


async def more(load: Load, clients: list[asyncio.Task[None]]) -> None:
    """Until each client could have finished once more; none of them has failed."""
    wanted = len(load.finished) + STREAMS
    while len(load.finished) < wanted:
        for client in clients:
            if client.done():
                client.result()
        await asyncio.sleep(0.05)


@dataclass(slots=True)
class Operator:
    """An operator's end of the admin API."""

    http: httpx.AsyncClient

    async def status(self) -> ClusterStatus:
        return from_json((await self.http.get("/v1/status")).content, ClusterStatus)

    async def one_of(self, pool: str) -> str:
        """A worker of this pool, whatever it is called: it may have been turned."""
        return next(w.name for w in (await self.status()).workers if w.pool == pool)

    async def do(self, path: str, body: dict[str, Any], done: Callable[[ClusterStatus], bool]) -> None:
        """Ask for something and wait until it is so; say how long it took."""
        began = time.monotonic()
        answer = await self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        while not done(status := await self.status()):
            assert time.monotonic() < began + OPERATION_S, status
            await asyncio.sleep(0.02)
        print(f"{path} {body}: {time.monotonic() - began:.2f} s")

    async def scale(self, **pools: int) -> None:
        await self.do("/v1/scale", {"pools": pools}, lambda status: sizes(status) == sizes(status) | pools)

    async def drain(self, worker: str, now: bool) -> None:
        body = {"worker": worker, "now": now}
        await self.do("/v1/drain", body, lambda status: worker not in {w.name for w in status.workers})

    async def rollout(self, body: dict[str, Any]) -> None:
        new = (await self.status()).revision + 1
        await self.do(
            "/v1/rollout", body, lambda s: s.revision == new and not s.rollout and -1 not in sizes(s).values()
        )


def sizes(status: ClusterStatus) -> dict[str, int]:
    """Workers of each pool, where the pool is as it shall be; else -1."""
    have = {pool.name: [w.role for w in status.workers if w.pool == pool.name] for pool in status.pools}
    as_wanted = {p.name: have[p.name] == [p.role] * p.wanted and p.ready == p.wanted for p in status.pools}
    return {p.name: p.ready if as_wanted[p.name] else -1 for p in status.pools}


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Two prefill workers and one decode worker, behind two gateways."""
    flags = ("--prefill", "2", "--decode", "1", "--threads", "3", "--max-batch-tokens", "64", "--kv-memory", "128MiB")
    with running(tmp_path_factory.mktemp("operated"), *flags, config="gateways: 2") as serve:
        yield serve


@pytest.fixture
async def cluster(serve: Serve) -> AsyncIterator[Cluster]:
    async with connected(serve) as cluster:
        yield cluster


@pytest.fixture
async def operator(serve: Serve) -> AsyncIterator[Operator]:
    run = serve.run_file
    headers = {"Authorization": f"Bearer {run.token}"}
    async with httpx.AsyncClient(base_url=run.admin, headers=headers, timeout=30.0, trust_env=False) as http:
        yield Operator(http)


async def test_a_controller_that_is_killed_or_frozen_is_not_missed(
    cluster: Cluster, operator: Operator, judge: Judge, serve: Serve
) -> None:
    before = serve.children()
    async with under_load(cluster, judge):
        before["controller"].kill()
        began = time.monotonic()
        while True:
            try:
                status = await operator.status()
                if status.controller_age_s < time.monotonic() - began and sizes(status) == {"prefill": 2, "decode": 1}:
                    break
            except httpx.HTTPError:
                assert time.monotonic() < began + OPERATION_S
            await asyncio.sleep(0.02)
        print(f"the controller is back, and knows everybody, after {time.monotonic() - began:.2f} s")
        again = serve.children()["controller"]
        again.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(8.0)
        finally:
            again.send_signal(signal.SIGCONT)
        assert sizes(await operator.status()) == {"prefill": 2, "decode": 1}
    after = serve.children()
    assert after.pop("controller") == again != before.pop("controller")
    assert after == before, "no other process was touched"


async def test_workers_turn(cluster: Cluster, operator: Operator, judge: Judge, serve: Serve) -> None:
    before = serve.children()
    await operator.scale(prefill=1, decode=2)  # idle
    await operator.scale(prefill=2, decode=1)
    async with under_load(cluster, judge) as load:
        await operator.scale(prefill=1, decode=2)
        await cluster.ask_all(PROMPTS, max_tokens=TOKENS)
        await operator.scale(prefill=2, decode=1)
        await cluster.ask_all(PROMPTS, max_tokens=TOKENS)
        assert load.finished
    assert serve.children() == before, "they keep their weights: nobody was started again"


async def test_pools_scale_and_workers_drain(cluster: Cluster, operator: Operator, judge: Judge) -> None:
    async with under_load(cluster, judge):
        await operator.scale(decode=2)
        await operator.scale(decode=1)
        await operator.scale(decode=2)
        await operator.drain(await operator.one_of("decode"), now=True)
        await operator.drain(await operator.one_of("prefill"), now=False)
    assert sizes(await operator.status()) == {"prefill": 1, "decode": 1}


async def test_a_rollout(cluster: Cluster, operator: Operator, judge: Judge) -> None:
    before = await operator.status()
    async with under_load(cluster, judge):
        await operator.rollout({"set": {"engine.max_running": 64}})
    after = await operator.status()
    assert not {w.pid for w in before.workers} & {w.pid for w in after.workers}
    assert {w.revision for w in after.workers} == {after.revision}
    assert sizes(after) == sizes(before)


@pytest.fixture(scope="module")
def others(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's folder with slightly other weights."""
    gguf = models.find("demo").gguf
    assert gguf is not None
    folder = shutil.copytree(models.cached_folder(gguf), tmp_path_factory.mktemp("weights") / "other")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.12.mlp.down_proj.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


async def test_a_rollout_of_other_weights(cluster: Cluster, operator: Operator, judge: Judge, others: Path) -> None:
    """No answer is begun by one model and ended by the other."""
    async with under_load(cluster, judge, Judge.load(others)) as load:
        await operator.rollout({"model": str(others)})
    print(f"answers by the old weights and by the new: {load.whose}")
    assert min(load.whose) >= STREAMS
