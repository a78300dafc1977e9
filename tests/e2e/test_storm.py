"""A storm of requests that end in every way there is; soon after, every worker's books are empty and balance."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import aclosing, suppress

import httpx
import pytest

from tests.e2e.cluster import Answer, Cluster
from tests.e2e.prompts import ALL, LONG, Prompt, talk
from tests.e2e.reference import Judge

pytestmark = pytest.mark.timeout(300)

CLIENTS = 16
REQUESTS = 5
"""Of each client, one after the other."""

ABORTS = "baton_handover_aborts_total"
HEARD_S = 10.0
"""Workers tell the router of what they count now and then."""

Finished = tuple[Prompt, Answer]


def distinct(prompt: Prompt, number: int) -> Prompt:
    """Nobody has asked this before: it has to be computed and handed over."""
    if isinstance(prompt, str):
        return f"{number} {prompt}"
    return [*talk(f"This is question {number}.", "Go on."), *prompt]


async def one(cluster: Cluster, prompts: list[Prompt], rng: random.Random, number: int) -> Finished | None:
    """A random request, and its end: by itself, by a client that leaves, or by a timeout before anything came."""
    prompt, answer = rng.choice(prompts), Answer()
    options = {"max_tokens": rng.choice([1, 2, 8, 24, 64])}
    match rng.choice(["finish", "finish", "leave", "leave", "impatient", "impatient", "samples", "stop"]):
        case "finish":
            return prompt, await cluster.ask(prompt, **options, stream=rng.random() < 0.5)
        case "leave":
            events = rng.randrange(1, 12)
            async with aclosing(cluster.follow(distinct(prompt, number), answer, max_tokens=100)) as follow:
                async for _ in follow:
                    if len(answer.pieces) >= events:
                        break
        case "impatient":
            with suppress(TimeoutError):
                async with asyncio.timeout(rng.choice([0.01, 0.1, 0.3, 0.6])):
                    await cluster.ask(distinct(prompt, number), max_tokens=100, stream=rng.random() < 0.5)
        case "samples":
            await cluster.ask(prompt, n=3, max_tokens=16, temperature=1.0)
        case "stop":
            await cluster.ask(prompt, stop=["e", " "], max_tokens=64)
    return None


async def client(cluster: Cluster, prompts: list[Prompt], seed: int) -> list[Finished]:
    rng, finished = random.Random(seed), []
    for number in range(REQUESTS):
        await asyncio.sleep(rng.random() * 0.2)
        if done := await one(cluster, prompts, rng, seed * REQUESTS + number):
            finished.append(done)
    return finished


async def storm(cluster: Cluster, prompts: list[Prompt], judge: Judge, steady: Sequence[Prompt] = ()) -> None:
    """Random clients, and beside them some that ask all at once and stay to the end."""
    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(client(cluster, prompts, seed)) for seed in range(CLIENTS)]
        asked = group.create_task(cluster.ask_all(steady))
    await cluster.quiet()
    finished = [done for each in clients for done in each.result()] + list(zip(steady, asked.result(), strict=True))
    judge.check([(judge.encode(prompt), tuple(answer.tokens)) for prompt, answer in finished])


async def test_with_room_for_all(pair: Cluster, judge: Judge) -> None:
    await storm(pair, ALL, judge)


async def test_where_requests_are_preempted(tight: Cluster, judge: Judge) -> None:
    before = (await tight.reports())["decode-0"].preemptions
    short = [prompt for prompt in ALL if prompt not in LONG]
    await storm(tight, short, judge, steady=short[:16])  # which together outgrow the pool, whatever the others do
    assert (await tight.reports())["decode-0"].preemptions > before


async def test_disconnects_while_nothing_has_come(pair: Cluster) -> None:
    """All at once, from connections that close without a word more."""
    body = {"model": "demo", "prompt": "Once", "max_tokens": 500, "ignore_eos": True}
    headers = pair.client.headers
    async with httpx.AsyncClient(base_url=pair.serve.url, headers=headers) as client:
        tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(32)]
        await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    await pair.quiet()


async def test_a_client_leaves_while_its_prompt_is_handed_over(pair: Cluster) -> None:
    aborted = await pair.metric(ABORTS)
    asking = asyncio.create_task(pair.ask(distinct(LONG[3], -1)))
    while not any(report.handovers for report in (await pair.reports()).values()):
        assert not asking.done(), "it was over before it was seen to be handed over"
        await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.wait({asking})
    await pair.quiet()
    async with asyncio.timeout(HEARD_S):
        while await pair.metric(ABORTS) == aborted:
            await asyncio.sleep(0.05)
