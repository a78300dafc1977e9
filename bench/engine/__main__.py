"""The engine on an accelerator against what the device can do: `python -m baton.bench.engine`, or `baton bench engine`.

A Llama-3.1-8B's shape with made-up weights. All ratios are against ceilings and limits of the same run, and the result
file is written after each thing that was measured, so that a run cut short leaves what it found.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...common.config import EngineConfig
from ...common.errors import BatonError
from ...engine.rank import resolve
from ...engine.runner import Engine, build_engine
from .. import ceilings as most
from ..ceilings import Ceilings
from ..record import write
from .idle import profile
from .limits import Costs, throughput
from .loop import Load, closed_loop
from .served import Streams, served_loop
from .steps import decode_steps, prefills

CONFIGS = Path(__file__).parent.parent / "configs"
GOAL = 17_000
"""Output tokens a second that one H100 should pass in some setting."""
ROOM = 0.95
"""Of the KV pool, that a closed loop fills on average: what it needs varies, and a preemption costs a prompt."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured. `loads`: closed loops, the most important first; their concurrency is bounded by what the KV
    pool holds. `idle`: batches at which the loop's idle share is measured, over `idle_steps` steps."""

    batches: tuple[int, ...] = (1, 8, 64, 128, 256)
    context: int = 1024
    prompts: tuple[int, ...] = (4096, 16384)
    loads: tuple[Load, ...] = (
        Load(1024, 128, 128), Load(512, 1000, 1000), Load(512, 128, 128), Load(1024, 128, 512)
    )  # fmt: skip
    seconds: float = 6.0
    idle: tuple[int, ...] = (64, 256)
    idle_steps: int = 100
    sizes: most.Sizes = field(default_factory=most.Sizes)


TINY = Workload(
    batches=(1, 4), context=40, prompts=(100,), loads=(Load(4, 20, 16),), seconds=0.3, idle=(2,), idle_steps=5,
    sizes=most.TINY,
)  # fmt: skip
"""For a CPU: everything runs, and nothing is worth knowing."""


@dataclass(frozen=True, slots=True)
class Bench:
    """`say` takes each result, under the name of its part."""

    engine: Engine
    config: EngineConfig
    costs: Costs
    ceilings: Ceilings
    workload: Workload
    say: Callable[[str, Any], None]

    @property
    def kv_tokens(self) -> int:
        return self.engine.num_blocks * self.engine.format.block_size

    def steps(self, part: str = "steps") -> None:
        """Measured 1 and 2."""
        work = self.workload
        for step in decode_steps(self.engine, self.costs, self.ceilings, work.batches, work.context):
            self.say(part, asdict(step))
        for step in prefills(self.engine, self.costs, self.ceilings, work.prompts, self.config.max_batch_tokens):
            self.say(part, asdict(step))

    def idle(self) -> None:
        """Measured 4: the overlapped loop, its plain twin beside it, and the former with every token streamed to a
        router in another process."""
        for batch in self.workload.idle:
            load = Load(batch, self.workload.context, 4 * self.workload.idle_steps + 64)
            for overlap in (True, False):
                with closed_loop(self.engine, load, self.config.max_batch_tokens, overlap, spread=False) as loop:
                    found = self._idle(loop.step)
                self.say("idle", {"batch": batch, "overlap": overlap, "served": False, **found})
            with served_loop(self.engine, self.config, Streams(batch, load.prompt, load.output)) as served:
                found = self._idle(served.step)
                found["router"] = served.said()
            self.say("idle", {"batch": batch, "overlap": True, "served": True, **found})

    def _idle(self, step: Callable[[int], None]) -> dict[str, Any]:
        """Of so many steps, which a profiler would slow, and of as many again, with one where there is a device."""
        count = self.workload.idle_steps
        step(count // 4)
        begin = time.perf_counter()
        step(count)
        found: dict[str, Any] = {"step_s": (time.perf_counter() - begin) / count}
        if self.engine.pool.flat.device.type == "cuda":
            found |= asdict(profile(lambda: step(count)))
        return found

    def throughput(self) -> None:
        """Measured 3. `passes`: whether this is a setting with 17,000 tokens a second."""
        for load in self.workload.loads:
            limit = throughput(self.costs, self.ceilings, load.prompt, load.output, self.kv_tokens)
            room = int(ROOM * limit.batch)
            used = replace(load, concurrency=min(load.concurrency, room, self.config.max_running))
            with closed_loop(self.engine, used, self.config.max_batch_tokens, overlap=True) as loop:
                seen = loop.run(self.workload.seconds)
            found = asdict(used) | asdict(seen) | {
                "tokens_per_s": seen.tokens_per_s, "limit_tokens_per_s": limit.tokens_per_s, "limit_batch": limit.batch,
                "share": seen.tokens_per_s / limit.tokens_per_s, "passes": seen.tokens_per_s >= GOAL,
            }  # fmt: skip
            self.say("throughput", found)


def build(config: EngineConfig) -> tuple[Engine, float]:
    """And how many seconds it took."""
    begin = time.perf_counter()
    engine = build_engine(config, lambda share: None)
    return engine, time.perf_counter() - begin


def parts(wanted: str, config: EngineConfig, workload: Workload, say: Callable[[str, Any], None]) -> Iterator[str]:
    """Runs them; the name of each when it is through."""
    device, dtype = resolve(config)
    ceilings = most.measure(device, dtype, workload.sizes)
    say("ceilings", asdict(ceilings))
    engine, seconds = build(config)
    say("start", {"seconds": seconds, "kv_tokens": engine.num_blocks * engine.format.block_size})
    costs = Costs.of(engine.model_config, ceilings.dtype, engine.format.bytes_per_token)
    bench = Bench(engine, config, costs, ceilings, workload, say)
    for name, part in (("steps", bench.steps), ("throughput", bench.throughput), ("idle", bench.idle)):
        if name in wanted:
            part()
            yield name
    if "deterministic" in wanted:  # its cost: the same steps again
        del bench, engine, part
        gc.collect()
        torch.cuda.empty_cache()
        config = replace(config, deterministic=True)
        engine, _ = build(config)
        Bench(engine, config, costs, ceilings, workload, say).steps("deterministic")
        yield "deterministic"


def main(arguments: list[str] | None = None) -> int:
    """0 where all parts ran."""
    parser = argparse.ArgumentParser(prog="baton bench engine", description="The engine against the device's ceilings.")
    parser.add_argument("--model", type=Path, default=CONFIGS / "llama-3.1-8b", help="folder with a config.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--parts", default="steps,throughput,idle,deterministic")
    parser.add_argument("--max-running", type=int, default=1024)
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--tiny", action="store_true", help="small numbers of everything, for a small model on a CPU")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file; default: bench/results")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        print(
            "baton bench engine: no CUDA device here; --device cpu --tiny proves the code without one", file=sys.stderr
        )
        return 2
    config = EngineConfig(
        model=str(options.model), device=options.device, kv_dtype=options.kv_dtype, dummy_weights=True,
        kv_memory=(64 << 20) if options.tiny else 0, max_running=options.max_running,
        max_batch_tokens=options.max_batch_tokens, max_model_len=0 if options.tiny else 32768,
        threads=1 if options.tiny else 0,
    )  # fmt: skip
    found: dict[str, list[Any]] = {}
    parameters = {"torch": torch.__version__, "engine": asdict(replace(config, model=options.model.name))}

    def say(part: str, what: Any) -> None:
        found.setdefault(part, []).append(what)
        print(f"{part}: " + ", ".join(f"{name} {_short(value)}" for name, value in what.items()), flush=True)
        write("engine", "engine", found, parameters, options.out)

    workload = TINY if options.tiny else Workload()
    try:
        done = list(parts(options.parts, config, workload, say))
    except BatonError as error:
        print(f"baton bench engine: {error.message}", file=sys.stderr)
        return 1
    return 0 if set(done) == set(options.parts.split(",")) else 1


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
