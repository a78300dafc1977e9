"""The compute side of one rank: the engine, and its pool as transports see it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..common.clock import RealClock
from ..common.config import WorkerConfig
from ..common.errors import TransportFailed
from ..common.types import WorkerRef
from ..engine.follower import Followers
from ..engine.kv_pool import Allocator, KvPool, device_allocator
from ..engine.plan import Runner
from ..engine.runner import Engine, build_engine
from ..engine.weights import Progress
from ..kvtransfer.convert import convert
from ..kvtransfer.cuda_driver import CudaDriver
from ..kvtransfer.cuda_ipc import CudaMemory
from ..kvtransfer.device_store import DeviceStore
from ..kvtransfer.fetched import Shared
from ..kvtransfer.host_store import HostStore
from ..kvtransfer.plane import Event, Plane
from ..kvtransfer.process_group import ProcessGroups
from ..kvtransfer.shm import SharedMemory, available
from ..kvtransfer.transport import Store
from .ranks import RankConfig
from .spread import LATE_S

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Compute:
    """See `assembly.Computes`."""

    engine: Engine
    store: Store
    shared: Shared | None
    groups: ProcessGroups | None
    followers: Followers | None

    @property
    def runner(self) -> Runner:
        return self.engine.runner

    @property
    def overlaps(self) -> bool:
        return self.engine.pool.flat.device.type == "cuda" and self.followers is None

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
    def device(self) -> str:
        """For people."""
        device = self.engine.pool.flat.device
        return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type

    @property
    def num_blocks(self) -> int:
        return self.engine.num_blocks


@dataclass(slots=True)
class PoolMemory:
    """Makes the memory of a pool, and remembers it: where peers of this machine may see it, if that can be."""

    shared: Shared | None = None

    def allocator(self, device: torch.device) -> Allocator:
        """See `engine.rank.MakeAllocator`."""
        if device.type == "cuda":
            return lambda size: self._export(device, size)
        return self._share if device.type == "cpu" and available() else device_allocator(device)

    def _share(self, size: int) -> torch.Tensor:
        shared = self.shared = SharedMemory(size)
        return torch.from_numpy(shared.memory)

    def _export(self, device: torch.device, size: int) -> torch.Tensor:
        try:
            exported = self.shared = CudaMemory(CudaDriver(device), size)
        except TransportFailed as error:
            log.warning("the KV pool cannot be shared with other processes: %s", error)
            return device_allocator(device)(size)
        return exported.memory


def store_of(pool: KvPool, checked: bool) -> Store:
    """The pool as transports see it."""
    if pool.memory is None:
        return DeviceStore(pool.flat, pool.format, pool.rank, pool.num_blocks, checked)
    return HostStore(pool.memory, pool.format, pool.rank, pool.num_blocks, convert, checked)


def build(config: WorkerConfig, progress: Progress, followers: Followers | None = None) -> Compute:
    """Raises as `build_engine` does."""
    memory = PoolMemory()
    engine = build_engine(config.engine, progress, memory.allocator, followers)
    store = store_of(engine.pool, config.handover.checksums)
    groups = ProcessGroups(engine.pool.flat.device, config.host, config.handover.lease_s)
    return Compute(engine, store, memory.shared, groups, followers)


def following_plane(
    config: RankConfig, pool: KvPool, memory: PoolMemory, post: Callable[[Event], None],
    events: asyncio.AbstractEventLoop, grpc: str,
) -> Plane:  # fmt: skip
    """The plane of a rank that is not rank 0. `events`, `grpc`: see `rank_plane.MakePlane`."""
    worker, handover = config.worker, config.worker.handover
    return Plane(
        WorkerRef(worker.name, "", config.epoch), store_of(pool, handover.checksums), handover, worker.cluster_token,
        worker.host, RealClock(), events, post, memory.shared, grpc,
        ProcessGroups(pool.flat.device, worker.host, handover.lease_s), LATE_S,
    )  # fmt: skip
