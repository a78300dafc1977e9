"""The transfer hides behind the compute: a recorded timeline of one handover of the demo model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from baton.common.clock import RealClock
from baton.common.cluster import Members, WorkerStatus
from baton.common.config import EngineConfig, RouterConfig, WorkerConfig
from baton.common.types import Request, Role, SamplingParams
from baton.deploy import models
from baton.engine.gguf import import_gguf
from baton.prefill.role import PrefillRole
from baton.router.service import Router
from baton.worker.assembly import Worker
from baton.worker.compute import build

LAYERS = 30
PROMPT_TOKENS = 320
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def demo_model() -> Path:
    """The folder that `baton serve` uses as well."""
    return models.prepare(models.find("demo"), lambda job: import_gguf(Path(job.source), Path(job.target), job.dtype))


@asynccontextmanager
async def running(role: Role, model: Path) -> AsyncIterator[Worker]:
    """A worker with the real engine, its loop on a thread."""
    engine = EngineConfig(model=str(model), kv_memory=64 << 20, threads=1)
    config = WorkerConfig(name=str(role), role=role, engine=engine, cluster_token="secret")
    worker = Worker(config, build(config, lambda _: None), RealClock())
    stop = threading.Event()
    thread = threading.Thread(target=worker.loop.run, args=(stop,))
    await worker.start()
    thread.start()
    try:
        yield worker
    finally:
        stop.set()
        await worker.stop()
        await asyncio.to_thread(thread.join, 5.0)


async def members(workers: list[Worker]) -> AsyncIterator[Members]:
    yield Members(1, tuple(WorkerStatus(w.ref.name, "", "ready", w.ref.address, w.ref.epoch) for w in workers))


async def complete(router: Router, prompt: tuple[int, ...]) -> int:
    """Number of tokens that came."""
    request = Request("r", prompt, len(prompt), SamplingParams(max_tokens=4, temperature=0.0), deadline_s=60.0)
    stream, count = router.submit(request), 0
    while True:
        batch = await stream.next()
        count += len(batch.tokens)
        if batch.finish is not None:
            return count


def patient(worker: Worker) -> None:
    """A layer is computed when the one two before it has left, as a busy machine may delay either. Layers that leave
    only after the last one are waited for in vain, and not for ever."""
    (role,) = (role for role in worker.loop.roles if isinstance(role, PrefillRole))
    tell, trace, until = role.on_layer, worker.plane.outlet.trace, time.monotonic() + PATIENCE_S

    def on_layer(layer: int) -> None:
        handover = max(trace.computed_at)
        while layer > 1 and layer - 2 not in trace.left_at.get(handover, ()) and time.monotonic() < until:
            time.sleep(0.001)
        tell(layer)

    role.on_layer = on_layer  # type: ignore[method-assign]


async def test_a_layer_leaves_while_later_layers_compute(demo_model: Path) -> None:
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(running(Role.PREFILL, demo_model))
        decode = await stack.enter_async_context(running(Role.DECODE, demo_model))
        router = Router("router", RouterConfig(), "secret")
        await router.start(members([prefill, decode]))
        stack.push_async_callback(router.close)
        async with asyncio.timeout(60):
            while router.ready()[0] != "ready":
                await asyncio.sleep(0.02)
            await complete(router, tuple(range(100, 120)))  # opens the connections
            patient(prefill)
            assert await complete(router, tuple(range(1000, 1000 + PROMPT_TOKENS))) == 4
        trace = prefill.plane.outlet.trace
        handover = max(trace.left_at)
        computed, left = trace.computed_at[handover], trace.left_at[handover]
        assert computed.keys() == left.keys() == set(range(LAYERS))
        late = [layer for layer in range(LAYERS - 2) if left[layer] >= computed[layer + 2]]
        assert not late, f"layers {late} left only after two more were done: {computed}, {left}"
