"""Two processes on one GPU, one that prefills and one that decodes, against one that does both, at the same load:
`python -m baton.bench.engine.pair`.

Some requests decode all the time, while long prompts arrive at random (Poisson). What the latter feel is the time to
their first token; what the former feel is the time between two of theirs, which a prompt on the same device lengthens.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...common.errors import BatonError
from ...common.types import Request, SamplingParams
from ...router.service import Router
from ..quantiles import Quantiles
from ..record import write
from .cluster import cluster

CONFIGS = Path(__file__).parent.parent / "configs"
SYSTEMS = {"colocated": {"colocated": 0.92}, "1P1D": {"prefill": 0.34, "decode": 0.58}}
"""Shares of the GPU's memory. A prefill worker's KV leaves soon, so it needs little more than its weights."""
START_TIMEOUT_S = 60.0
DRAIN_S = 20.0
"""How long prompts that came last may take to be answered."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """`decoding` requests with prompts of `context` tokens decode for all of the time; prompts of `prompt` tokens
    arrive at `rate` a second for `seconds`, and are answered with `answer` tokens."""

    decoding: int = 64
    context: int = 512
    prompt: int = 2048
    answer: int = 32
    rate: float = 6.0
    seconds: float = 14.0
    longest: int = 4096


@dataclass(frozen=True, slots=True)
class Latencies:
    """In seconds. `ttft`: of the prompts that arrive. `itl`: of the requests that decode all the time, all gaps pooled.
    `arriving_itl`: of the answers to the prompts."""

    system: str
    rate: float
    arrived: int
    answered: int
    ttft: Quantiles
    itl: Quantiles
    arriving_itl: Quantiles
    decode_tokens_per_s: float


@dataclass(slots=True)
class Heard:
    """When one request's tokens came, by `time.perf_counter`."""

    sent: float
    times: list[float] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False

    @property
    def gaps(self) -> Iterator[float]:
        return (after - before for before, after in zip(self.times, self.times[1:], strict=False))


def settings(device: str, shares: Mapping[str, float], common: Mapping[str, Any]) -> dict[str, Any]:
    """Of a cluster with one worker for each role in `shares`, which says how much of one GPU's memory it may use."""
    found: dict[str, Any] = {"engine.device": device, "engine.dummy_weights": True, **common}
    for role, share in shares.items():
        found |= {f"pools.{role}.role": role, f"pools.{role}.count": 1, f"pools.{role}.engine.device_memory": share}
        if device != "cpu":
            found[f"pools.{role}.resources.gpus"] = 1.0 / len(shares)
    return found


async def measure(system: str, model: Path, given: Mapping[str, Any], scenarios: list[Scenario]) -> list[Latencies]:
    """One cluster, one scenario after the other."""
    async with cluster(model, given) as router:
        return [await play(system, router, scenario, seed) for seed, scenario in enumerate(scenarios)]


async def play(system: str, router: Router, scenario: Scenario, seed: int = 0) -> Latencies:
    """Raises the `BatonError` that a request fails with."""
    rng = random.Random(seed)
    decoding, arrived = [], []
    async with asyncio.TaskGroup() as group:
        listeners = []
        for _ in range(scenario.decoding):
            heard = Heard(time.perf_counter())
            decoding.append(heard)
            listeners.append(
                group.create_task(_listen(router, _request(rng, scenario.context, scenario.longest), heard))
            )
        async with asyncio.timeout(START_TIMEOUT_S):
            for heard in decoding:
                await heard.begun.wait()
        begin = time.perf_counter()
        due = begin
        answers = []
        while (due := due + rng.expovariate(scenario.rate)) < begin + scenario.seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            heard = Heard(due)
            arrived.append(heard)
            answers.append(group.create_task(_listen(router, _request(rng, scenario.prompt, scenario.answer), heard)))
        end = time.perf_counter()
        if answers:
            await asyncio.wait(answers, timeout=DRAIN_S)
        for listener in (*listeners, *answers):
            listener.cancel()
    for heard in decoding:
        heard.times = [at for at in heard.times if begin <= at <= end]
    tokens = sum(len(heard.times) for heard in decoding)
    return Latencies(
        system, scenario.rate, len(arrived), sum(heard.ended for heard in arrived),
        Quantiles.of(heard.times[0] - heard.sent for heard in arrived if heard.times),
        Quantiles.of(gap for heard in decoding for gap in heard.gaps),
        Quantiles.of(gap for heard in arrived for gap in heard.gaps),
        tokens / (end - begin),
    )  # fmt: skip


async def _listen(router: Router, request: Request, heard: Heard) -> None:
    """Tokens that come in one batch came at one time: all but the first have no gap."""
    stream = router.submit(request)
    try:
        while not heard.ended:
            batch = await stream.next()
            heard.times += [time.perf_counter()] * len(batch.tokens)
            heard.begun.set()
            heard.ended = batch.finish is not None
    finally:
        stream.cancel()


def _request(rng: random.Random, prompt: int, answer: int) -> Request:
    tokens = tuple(rng.choices(range(3, 300), k=prompt))
    params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
    return Request(f"bench-{rng.getrandbits(48):x}", tokens, prompt, params)


def main(arguments: list[str] | None = None) -> int:
    """0 where both systems were measured and every prompt was answered."""
    parser = argparse.ArgumentParser(prog="baton bench pair", description="1P1D against colocated, on one GPU.")
    parser.add_argument("--model", type=Path, default=CONFIGS / "llama-3.1-8b", help="folder with a config.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rates", default="6", help="long prompts a second: 4,8")
    parser.add_argument("--seconds", type=float, default=14.0, help="of each rate")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file; default: bench/results")
    options = parser.parse_args(arguments)
    scenarios = [Scenario(rate=float(rate), seconds=options.seconds) for rate in options.rates.split(",")]
    common = {"engine.max_batch_tokens": 2048, "engine.max_model_len": 8192}
    found: list[Latencies] = []
    failed = False
    for system, shares in SYSTEMS.items():
        try:
            given = settings(options.device, shares, common)
            found += asyncio.run(measure(system, options.model, given, scenarios))
        except* BatonError as errors:
            failed = True
            print(f"{system}: {errors.exceptions[0]}", file=sys.stderr, flush=True)
        for row in found:
            print(row, flush=True)
        parameters = {
            "scenarios": [asdict(s) for s in scenarios],
            "model": options.model.name,
        }
        write("engine_pair", "engine_pair", [asdict(row) for row in found], parameters, options.out)
    return 1 if failed or any(row.answered < row.arrived for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
