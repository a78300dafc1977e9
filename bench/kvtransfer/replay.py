"""A worker that computes nothing: `python -m baton.bench.kvtransfer.replay FINGERPRINT`, told the rest as all workers.

Its prompts' KV is whatever its pool has held from the start; all else of it is real: planners, block table, handovers.
So it keeps a decode worker's inlet busy and leaves the processor to it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from ...common import log
from ...common.child import die_with, read_line
from ...common.clock import RealClock
from ...common.cluster import WorkerState, WorkerStatus
from ...common.config import WorkerConfig
from ...common.json_form import from_json, from_plain
from ...common.kv_format import KvFormat
from ...deploy.launch.launcher import Envelope
from ...engine.model_config import ModelConfig
from ...engine.plan import Ended, Launched, OnLayer, StepPlan
from ...kvtransfer.host_store import HostStore
from ...kvtransfer.shm import SharedMemory
from ...protos.control import ControllerClient
from ...protos.rpc import Peer
from ...worker.assembly import Worker
from .end import TIMEOUT_S, make_pool, no_conversion

TOKEN_DRAWN = 7


@dataclass(frozen=True, slots=True)
class Idle:
    """Implements `engine.plan.Runner`: whatever is asked for is there already."""

    num_layers: int

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        if on_layer is not None:
            for layer in range(self.num_layers):
                on_layer(layer)
        return Ended([TOKEN_DRAWN if part.samples else None for part in plan.parts])


@dataclass(frozen=True, slots=True)
class Recording:
    """Implements `worker.assembly.Computes`."""

    store: HostStore
    shared: SharedMemory
    runner: Idle
    fingerprint: str
    vocab_size: int
    max_model_len: int
    num_blocks: int
    eos_ids: frozenset[int] = frozenset()
    groups: None = None
    followers: None = None
    overlaps: bool = False


def recording(config: WorkerConfig, fingerprint: str) -> Recording:
    """A pool that fits what the configuration says, full of KV of some kind."""
    model = ModelConfig.load(Path(config.engine.model))
    format = KvFormat(model.num_layers, model.num_kv_heads, model.head_dim, config.engine.block_size, "float32")
    num_blocks = format.blocks_in(config.engine.kv_memory)
    pool = make_pool(format, num_blocks, seed=1)
    store = HostStore(pool.memory, format, 0, num_blocks, no_conversion, config.handover.checksums)
    return Recording(
        store, pool, Idle(model.num_layers), fingerprint, model.vocab_size, model.max_position_embeddings, num_blocks
    )


async def run(config: WorkerConfig, fingerprint: str) -> None:
    """Be that worker until the parent ends it."""
    worker = Worker(config, recording(config, fingerprint), RealClock())
    await worker.start()
    threading.Thread(target=worker.loop.run, args=(threading.Event(),), daemon=True).start()
    ready = WorkerStatus(config.name, config.role.value, WorkerState.READY, worker.ref.address, worker.ref.epoch)
    await ControllerClient(Peer(config.controller, config.cluster_token)).report(ready, TIMEOUT_S)
    await asyncio.get_running_loop().create_future()


def main(fingerprint: str) -> None:
    envelope = from_json(read_line(), Envelope)
    log.setup(envelope.name)
    die_with(envelope.parent)
    asyncio.run(run(from_plain(envelope.config, WorkerConfig), fingerprint))


if __name__ == "__main__":
    main(sys.argv[1])
