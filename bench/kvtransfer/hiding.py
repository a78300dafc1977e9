"""How much of a handover hides behind prefill's compute: real workers, one prefill and one decode, over shared memory.

What does not hide is the time from the end of compute to the acknowledged commit, as the prefill worker counts it
(`Load.handover_exposed_seconds`): its share of the time to first token is how much sooner that token could have come.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.config import EngineConfig, HandoverConfig, WorkerConfig
from ...common.messages import Submit
from ...common.types import Role
from .fleet import Fleet, fleet, request

ANSWER = 2
"""Tokens of an answer: with one, nothing would be handed over."""

TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Hiding:
    """Seconds, an entry for each prompt. `ttft`: from submitting to the first token, which the decode worker tells."""

    transport: str
    tokens: int
    ttft: list[float]
    exposed: list[float]

    @property
    def share(self) -> float:
        return statistics.median(e / t for e, t in zip(self.exposed, self.ttft, strict=True))


async def measure(model: Path, tokens: int, prompts: int, transport: str = "shm") -> Hiding:
    """Raises `BatonError` where a worker does not start or a request fails."""
    engine = EngineConfig(model=str(model), kv_memory=1 << 30, threads=1)
    handover = HandoverConfig(transport=transport)
    rng, hiding = np.random.default_rng(0), Hiding(transport, tokens, [], [])
    async with fleet() as workers:
        decode = await workers.start(WorkerConfig(name="decode", role=Role.DECODE, engine=engine, handover=handover))
        await workers.start(WorkerConfig(name="prefill", role=Role.PREFILL, engine=engine))
        await _one(workers, Submit(workers.ticket(), 1, request(64, ANSWER, rng), decode), 1)  # opens the connections
        for number in range(prompts):
            before = workers.loads["prefill"].handover_exposed_seconds
            submit = Submit(workers.ticket(), 1, request(tokens, ANSWER, rng), decode)
            hiding.ttft.append(await _one(workers, submit, number + 2))
            hiding.exposed.append(workers.loads["prefill"].handover_exposed_seconds - before)
    return hiding


async def _one(workers: Fleet, submit: Submit, handovers: int) -> float:
    """Seconds to the first token of the worker's so manieth handover."""
    begin = time.monotonic()
    workers.send("prefill", submit)
    await workers.until(lambda: submit.ticket in workers.finished, TIMEOUT_S)
    await workers.until(lambda: workers.loads["prefill"].handovers == handovers, TIMEOUT_S)
    return workers.arrivals[submit.ticket][0] - begin
