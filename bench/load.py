"""Send a workload to a server and measure every request: open loop (by arrival) or closed loop (by concurrency).

Open loop is how users arrive: they do not wait for each other, and queues show. Closed loop keeps a fixed number of
requests in flight, and shows what the server can do at that width.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from .client import Sample, Target, ask
from .wire import HttpClient
from .workload import Job

MAX_IN_FLIGHT = 4096
"""Open-loop requests that may be in flight; a request beyond them is recorded as the error `client_limit`."""

OnDone = Callable[[Sample], None]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run met: all samples, and the seconds from the first request to the last byte."""

    samples: list[Sample]
    wall_s: float


async def first_model(http: HttpClient) -> str:
    """Name of the first model that the server offers. Raises `ConnectionError` where it offers none."""
    response = await http.get("/v1/models")
    if response.status != 200:
        raise ConnectionError(f"/v1/models answered {response.status}")
    models = msgspec.json.decode(response.body)["data"]
    if not models:
        raise ConnectionError("/v1/models is empty")
    return str(models[0]["id"])


async def closed_loop(
    http: HttpClient, target: Target, jobs: Sequence[Job], concurrency: int, on_done: OnDone | None = None
) -> Run:
    """Keep `concurrency` requests in flight until all jobs are done; arrivals are ignored."""
    queue = iter(jobs)
    samples: list[Sample] = []

    async def lane() -> None:
        for job in queue:
            sample = await ask(http, target, job.prompt, job.output_len)
            samples.append(sample)
            if on_done is not None:
                on_done(sample)

    begin = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(lane())
    return Run(samples, time.monotonic() - begin)


async def open_loop(http: HttpClient, target: Target, jobs: Sequence[Job], on_done: OnDone | None = None) -> Run:
    """Send each job at its arrival, whatever became of those before it."""
    samples: list[Sample] = []
    in_flight = 0

    def done(sample: Sample) -> None:
        samples.append(sample)
        if on_done is not None:
            on_done(sample)

    async def one(job: Job, due: float) -> None:
        nonlocal in_flight
        in_flight += 1
        done(await ask(http, target, job.prompt, job.output_len, due))
        in_flight -= 1

    begin = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for job in sorted(jobs, key=lambda job: job.arrival):
            due = begin + job.arrival
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if in_flight >= MAX_IN_FLIGHT:
                done(Sample(start=due, end=due, error="client_limit"))
            else:
                group.create_task(one(job, due))
    return Run(samples, time.monotonic() - begin)


async def warm_up(http: HttpClient, target: Target, jobs: Sequence[Job], concurrency: int) -> None:
    """Run jobs and forget them: connections are opened, caches and allocators filled. Raises `ConnectionError` where
    not one of them succeeds, so that a wrong URL is known before a long run."""
    run = await closed_loop(http, target, jobs, concurrency)
    failures = [sample for sample in run.samples if sample.error]
    if failures and len(failures) == len(run.samples):
        raise ConnectionError(f"every warm-up request failed: {failures[0].error} {failures[0].detail}".strip())
