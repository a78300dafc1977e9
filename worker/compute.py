"""The compute side of one rank: the engine, and its pool as transports see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..common.config import WorkerConfig
from ..common.errors import InvalidRequest
from ..engine.follower import Followers
from ..engine.kv_pool import Allocator, device_allocator
from ..engine.plan import Runner
from ..engine.runner import Engine, build_engine
from ..engine.weights import Progress
from ..kvtransfer.convert import convert
from ..kvtransfer.host_store import HostStore
from ..kvtransfer.process_group import ProcessGroups
from ..kvtransfer.shm import SharedMemory, available
from ..kvtransfer.transport import Store


@dataclass(frozen=True, slots=True)
class Compute:
    """See `assembly.Computes`."""

    engine: Engine
    store: Store
    shared: SharedMemory | None
    groups: ProcessGroups | None

    @property
    def runner(self) -> Runner:
        return self.engine.runner

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.engine.eos_ids

    @property
    def fingerprint(self) -> str:
        return self.engine.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.engine.vocab_size

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    @property
    def num_blocks(self) -> int:
        return self.engine.num_blocks


def build(config: WorkerConfig, progress: Progress, followers: Followers | None = None) -> Compute:
    """Raises as `build_engine` does."""
    pools: list[SharedMemory] = []

    def allocator(device: torch.device) -> Allocator:
        if device.type != "cpu" or not available():
            return device_allocator(device)

        def shared(size: int) -> torch.Tensor:
            pools.append(SharedMemory(size))
            return torch.from_numpy(pools[-1].memory)

        return shared

    engine = build_engine(config.engine, progress, allocator, followers)
    pool = engine.pool
    if pool.memory is None:
        raise InvalidRequest("KV pools on an accelerator cannot be handed over yet", param="device")
    store = HostStore(pool.memory, pool.format, pool.rank, pool.num_blocks, convert, checked=config.handover.checksums)
    groups = ProcessGroups(torch.device("cpu"), config.host, config.handover.lease_s)
    return Compute(engine, store, pools[0] if pools else None, groups)
