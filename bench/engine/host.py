"""What a worker's Python costs a step, with a device that computes nothing (`device.py`).

A whole colocated worker runs in this process as it does in its own: the engine loop on one thread, gRPC on the other.
It decodes `batch` requests with 1k tokens of context in steps that take as long as an H100 needs for them, either for
nobody or for a router in another process (`streams.py`) that every token is streamed to; and once more in steps that
take no time at all. Measured are the time of the loop's thread, part by part, and how long the device had nothing to
do. Where the loop waits for a device, it comes back to caches that others have used: the same Python then takes longer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ...common.clock import RealClock
from ...common.config import EngineConfig, WorkerConfig
from ...common.errors import NotReady
from ...common.json_form import to_json
from ...common.messages import Submit
from ...common.types import Role
from ...engine.mailbox import FromRouter, RouterJoined
from ...kvtransfer.convert import convert
from ...kvtransfer.host_store import HostStore
from ...worker.assembly import Worker
from .device import EOS, FORMAT, LONGEST, MAX_BATCH_TOKENS, StandinDevice, Watch, Window, no_kernels
from .streams import request

STEP_S = {1: 5e-3, 64: 8e-3, 256: 16e-3}
"""By batch size, a decode step of an 8B model in bf16 on one H100 at 1k tokens of context, about."""
PROMPT = 1024
OUTPUT = 3000
VOCAB = 128_256
REQUEST = (PROMPT, OUTPUT, VOCAB, 0.8)
"""The arguments of `streams.request`: every token is sampled."""
NUM_BLOCKS = 48_000
SKIP = 50
"""Steps that are not measured, from the first one of full size on: the way to and from the router fills."""
TOKEN = "bench"
TIMEOUT_S = 60.0
PYTHON_S, IDLE_SHARE = 1.5e-3, 0.03
"""The bars: Python of a step at the largest batch, and the share of time in which the device has nothing to do."""


class StandinEngine:
    """Implements `worker.assembly.Computes`."""

    def __init__(self, runner: StandinDevice) -> None:
        self.runner = runner
        self.store = HostStore(np.zeros(NUM_BLOCKS * FORMAT.block_bytes, np.uint8), FORMAT, 0, NUM_BLOCKS, convert)
        self.shared = self.groups = self.followers = None
        self.eos_ids = frozenset({EOS})
        self.fingerprint = "standin"
        self.vocab_size = VOCAB
        self.max_model_len = LONGEST
        self.num_blocks = NUM_BLOCKS
        self.overlaps = False


@dataclass(frozen=True, slots=True)
class Measured:
    """One cell of the table. `served`: what the router in the other process says; None where there was none."""

    batch: int
    step_s: float
    overlap: bool
    window: Window
    served: dict[str, Any] | None


async def measure(batch: int, step_s: float, steps: int, overlap: bool, serve: bool) -> Measured:
    """Run a worker until `steps` steps were measured. Raises `NotReady` where it does not come to that in a minute."""
    events = asyncio.get_running_loop()
    done: asyncio.Future[Window] = events.create_future()

    def tell(window: Window) -> None:
        events.call_soon_threadsafe(done.set_result, window)

    runner = StandinDevice(batch, step_s, SKIP, steps, tell)
    engine = EngineConfig(
        model="standin", block_size=FORMAT.block_size, max_batch_tokens=MAX_BATCH_TOKENS, max_running=batch,
        overlap="on" if overlap else "off",
    )  # fmt: skip
    config = WorkerConfig(name="standin", role=Role.COLOCATED, engine=engine, cluster_token=TOKEN)
    worker = Worker(config, StandinEngine(runner), RealClock())
    _watch(worker, runner.watch)
    await worker.start()
    stop = threading.Event()
    working = asyncio.create_task(asyncio.to_thread(_work, worker, runner.watch, stop))
    try:
        async with asking(worker, batch, *REQUEST) if serve else _posted(worker, batch) as asked:
            if asked:
                await asked.begun()
            ends: set[asyncio.Future[Any]] = {done, working}
            await asyncio.wait(ends, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise NotReady(f"batch {batch}: not measured within {TIMEOUT_S:.0f} s")
            return Measured(batch, step_s, overlap, done.result(), await asked.said() if asked else None)
    finally:
        stop.set()
        await working
        await worker.stop()


def _work(worker: Worker, watch: Watch, stop: threading.Event) -> None:
    """What the engine's thread does."""
    with no_kernels(watch):
        worker.loop.run(stop)


def _watch(worker: Worker, watch: Watch) -> None:
    """Have the loop's own calls counted as parts of a step."""
    calls = {
        "_plan": "planning", "_launch": "launch", "_collect": "collecting", "_tell": "telling",
        "_tell_changes": "telling",
    }  # fmt: skip
    for method, part in calls.items():
        setattr(worker.loop, method, watch.around(part, getattr(worker.loop, method)))


@asynccontextmanager
async def _posted(worker: Worker, batch: int) -> AsyncIterator[None]:
    """The requests of a router that is not there: nobody hears the answers."""
    worker.inbox.post(RouterJoined("nobody"))
    for number in range(batch):
        worker.inbox.post(FromRouter("nobody", Submit(number, 1, request(number, *REQUEST))))
    yield


@dataclass(frozen=True, slots=True)
class Asking:
    """A router's process that asks this worker for streams. Both methods raise `NotReady` where it has ended, and
    `TimeoutError` after a minute."""

    worker: Worker
    says: asyncio.StreamReader
    hears: asyncio.StreamWriter

    async def begun(self) -> None:
        """Until it has had the first token of every stream."""
        await self._line()

    async def said(self) -> dict[str, Any]:
        """What it saw, once all that the worker has told so far has come there, and the end of its streams."""
        self.hears.write(b"%d\n" % self.worker.loop.last_load.output_tokens)
        return dict(json.loads(await self._line()))

    async def _line(self) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            line = await self.says.readline()
        if not line:
            raise NotReady("the router's process has ended")
        return line


@asynccontextmanager
async def asking(
    worker: Worker, streams: int, prompt: int, output: int, vocab: int, temperature: float = 0.0
) -> AsyncIterator[Asking]:
    """The router's process, which knows the cluster as `TOKEN`."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton.bench.engine.streams"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None and child.stdout is not None
    setup = {
        "name": worker.ref.name, "address": worker.ref.address, "epoch": worker.ref.epoch, "token": TOKEN,
        "streams": streams, "prompt": prompt, "output": output, "vocab": vocab, "temperature": temperature,
    }  # fmt: skip
    child.stdin.write(to_json(setup) + b"\n")
    try:
        yield Asking(worker, child.stdout, child.stdin)
        child.stdin.close()
        async with asyncio.timeout(TIMEOUT_S):
            await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


PARTS = ("planning", "batch", "sampling", "launch", "collecting", "telling", "rest")

_LOOPS = {False: "plain", True: "overlapped"}


async def run(steps: int, note: Callable[[str], None]) -> list[Measured]:
    """All batch sizes: without a device's time, for nobody, and served."""
    torch.set_num_threads(1)  # there is nothing to compute
    found = []
    for (batch, step_s), overlap in itertools.product(STEP_S.items(), (False, True)):
        for seconds, serve in ((0.0, False), (step_s, False), (step_s, True)):
            note(f"batch {batch}, {_LOOPS[overlap]} loop, {'served to a router' if serve else 'for nobody'}")
            found.append(await measure(batch, seconds, steps, overlap, serve))
    return found


def tables(found: Sequence[Measured]) -> tuple[Table, Table]:
    """What a step costs, and its parts. Times in milliseconds a step."""
    names = [_name(one) for one in found]
    whole = Table("batch, loop", "device", "Python p50", "p99", "loop CPU", "RPC CPU", "idle", "gap p50", "p99")
    parts = Table("batch, loop", *PARTS, title="mean of its parts")
    for name, one in zip(names, found, strict=True):
        window, steps = one.window, one.window.steps
        gap = one.served["gap"] if one.served else {"p50": math.nan, "p99": math.nan}
        times = [
            one.step_s,
            window.python.p50,
            window.python.p99,
            window.loop_cpu_s / steps,
            window.other_cpu_s / steps,
        ]
        whole.add_row(name, *map(_ms, times), f"{window.idle_share:.1%}", _ms(gap["p50"]), _ms(gap["p99"]))
        parts.add_row(name, *(_ms(window.parts.get(part, 0.0) / steps) for part in PARTS))
    return whole, parts


def _name(one: Measured) -> str:
    how = ", served" if one.served else "" if one.step_s else ", steps of no time"
    return f"{one.batch} {_LOOPS[one.overlap]}{how}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def bars(found: Iterable[Measured]) -> dict[str, bool]:
    """What shall hold: the Python of a step at the largest batch, and a device that is hardly ever idle."""
    held = {}
    for one in found:
        name = f"batch {_name(one)}"
        python_s, idle = one.window.python.p50, one.window.idle_share
        if one.batch == max(STEP_S) and not one.served:
            held[f"{name}: {python_s * 1e3:.2f} ms of Python a step, {PYTHON_S * 1e3:.1f} at most"] = (
                python_s <= PYTHON_S
            )
        if one.batch > 1 and one.overlap and one.step_s:
            held[f"{name}: idle for {idle:.1%}, less than {IDLE_SHARE:.0%}"] = idle < IDLE_SHARE
    return held


def document(found: Iterable[Measured]) -> list[dict[str, Any]]:
    """For the result file: seconds a step."""
    return [
        {
            "batch": one.batch,
            "device_step_s": one.step_s,
            "loop": _LOOPS[one.overlap],
            "served": one.served,
            "python_s": asdict(one.window.python),
            "parts_s": {part: seconds / one.window.steps for part, seconds in sorted(one.window.parts.items())},
            "idle_share": one.window.idle_share,
            "loop_cpu_s": one.window.loop_cpu_s / one.window.steps,
            "other_cpu_s": one.window.other_cpu_s / one.window.steps,
        }
        for one in found
    ]
