"""How much of a device's memory the KV pool gets: what is really free once all else has what it needs."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..common.config import EngineConfig
from ..common.errors import InvalidRequest
from .batch import Batch
from .graphs import CudaCapture, Graphs, ladder
from .rehearsal import largest

if TYPE_CHECKING:
    from .rank import Rank

CPU_KV_MEMORY = 1 << 30
"""Of a worker on a CPU that is not told how much, which may hold it from the start: a laptop has other things to do."""

_CONTEXT = 512 << 20
"""What a process's context, its kernels and libraries take of a GPU; torch does not count it."""
_SLACK = 0.01
"""The share of a device's memory that is given to nobody: torch hands memory out in pieces that do not always fit, and
staging buffers of transports come and go."""
_KEPT, _SAMPLING = 2, 4
"""Arrays [rows, vocabulary] of four bytes: those that the sampler keeps, its kernels' tables; and those that it takes
at most beside the logits, a copy for log-probabilities, these and what they are sorted into."""
_GRAPH = 64 << 20
"""What the driver keeps of one graph, at most. Where more memory has gone, another process has taken it meanwhile."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes of a device with the weights loaded and no pool.

    total    of the device
    free     that nobody has, neither this process nor another
    held     that this process has already
    step     more, at the peak of the largest step
    graphs   more, for all graphs
    """

    total: int
    free: int
    held: int
    step: int
    graphs: int


def kv_memory(demand: Demand, share: float) -> int:
    """Bytes for the pool of a process that may use `share` of its device. Raises `InvalidRequest` where nothing is
    left, with what takes it."""
    mine = int(share * demand.total) - demand.held
    left = min(mine, demand.free) - demand.step - demand.graphs - int(_SLACK * demand.total)
    if left <= 0:
        raise InvalidRequest(
            f"no memory is left for KV: of {_gb(demand.total)} this worker may use {share:.0%} and holds "
            f"{_gb(demand.held)} with its weights, {_gb(demand.free)} are free, its largest step takes "
            f"{_gb(demand.step)} and its graphs {_gb(demand.graphs)}; lower max_batch_tokens or max_running, or raise "
            f"device_memory",
            param="device_memory",
        )
    return left


def demand(rank: Rank, config: EngineConfig) -> Demand:
    """Measure on a CUDA device, over a pool of a few blocks. All ranks of a worker must do it together."""
    torch.cuda.synchronize(rank.device)
    held = _released(rank.device)
    torch.cuda.reset_peak_memory_stats(rank.device)
    plan = largest(config, rank.longest, rank.pool.num_blocks)
    shape = len(plan), rank.model_config.vocab_size
    beside = [torch.empty(shape, dtype=torch.float32, device=rank.device) for _ in range(_KEPT)]
    logits = rank.forward(Batch.of(plan, config.block_size, {}, pinned=True))
    beside += [torch.empty_like(logits) for _ in range(_SAMPLING)]
    torch.cuda.synchronize(rank.device)
    step = torch.cuda.max_memory_reserved(rank.device) - held
    del logits, beside
    _released(rank.device)
    graphs = _graphs(rank, config) if rank.graphed else 0
    free, total = torch.cuda.mem_get_info(rank.device)
    return Demand(total, free, held + _CONTEXT, step, graphs)


def _graphs(rank: Rank, config: EngineConfig) -> int:
    """What all graphs will take, from recording the two largest: the first takes the memory that all share. Two workers
    that start on one device both measure, so what torch holds is asked of torch, and only the rest of the device."""
    sizes = ladder(min(config.max_running, config.max_batch_tokens))
    drawn = torch.zeros(config.max_batch_tokens, dtype=torch.int64, device=rank.device)

    def taken(some: list[int]) -> int:
        held, (before, _) = _released(rank.device), torch.cuda.mem_get_info(rank.device)
        graphs = Graphs(rank, some, drawn, CudaCapture(), lambda share: None)
        ours = _released(rank.device) - held
        after, _ = torch.cuda.mem_get_info(rank.device)
        del graphs
        _released(rank.device)
        return ours + min(max(before - after - ours, 0), len(some) * _GRAPH)

    first = taken(sizes[-1:])
    both = taken(sizes[-2:])
    return first + max(0, both - first) * (len(sizes) - 1)


def _released(device: torch.device) -> int:
    """Give back what torch holds in reserve; the bytes that it still holds."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
