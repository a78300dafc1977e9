"""What each rank of a worker computes with: its shard of the model over its own KV pool. A worker without tensor
parallelism has one rank, which holds everything."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..common.config import EngineConfig, split_threads
from ..common.errors import InvalidRequest
from ..common.kv_format import KvFormat
from ..kernels.ops import Heads
from ..kernels.quantised import TYPES
from ..kernels.select import select_ops
from .batch import NOT_DRAWN, Batch, Inputs
from .group import RankGroup
from .kv_pool import Allocator, KvPool, device_allocator, type_name
from .memory import CPU_KV_MEMORY, demand, kv_memory
from .model import Model
from .model_config import ModelConfig
from .parallel import ParallelOps
from .plan import OnLayer
from .rope import rope_table
from .shard import shard
from .weights import Progress, dummy_weights, load_weights

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_FEW_BLOCKS = 8
"""A pool to measure steps with."""

MakeAllocator = Callable[[torch.device], Allocator]


@dataclass(frozen=True, slots=True)
class Rank:
    """`operations`: name of the implementation underneath. `longest`: tokens of the longest sequence. `graphed`: decode
    steps shall be recorded (`graphs.py`)."""

    model: Model
    pool: KvPool
    device: torch.device
    dtype: torch.dtype
    model_config: ModelConfig
    operations: str
    longest: int
    graphed: bool

    def forward(self, batch: Batch, drawn: torch.Tensor | None = None, on_layer: OnLayer | None = None) -> torch.Tensor:
        """Logits [wanted rows, vocabulary] float32, on rank 0; elsewhere they are of no use. All ranks must be given
        the same batches in the same order. `drawn`: what the step before left there. See `Model.forward`."""
        with torch.inference_mode():
            return self.compute(batch.on(self.device), drawn if batch.pending else None, on_layer)

    def compute(
        self, inputs: Inputs, drawn: torch.Tensor | None = None, on_layer: OnLayer | None = None,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """See `forward`; of inputs that are on the device. With `TritonOps` nothing in it waits for the device."""
        tokens = inputs.tokens
        if drawn is not None:
            tokens = torch.where(inputs.drawn == NOT_DRAWN, tokens, drawn[inputs.drawn])
        return self.model.forward(tokens, inputs.rows, self.pool.kv, inputs.wanted, on_layer, into)


def load_rank(
    config: EngineConfig,
    progress: Progress,
    make_allocator: MakeAllocator = device_allocator,
    group: RankGroup | None = None,
) -> Rank:
    """Load this rank's shard and make its pool. `group`: its membership where the worker has several ranks.

    Sets the process's number of torch threads, and on CUDA the stream of the thread that calls. Raises `InvalidRequest`
    where the model or the memory does not fit, or does not divide.
    """
    number, tp = (group.rank, group.size) if group else (0, 1)
    torch.set_num_threads(split_threads(config.threads or os.cpu_count() or 1, tp)[number])
    _keep_freed_memory()
    device, dtype = resolve(config, number)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(stream)  # graphs cannot be recorded on the default one
    folder = Path(config.model)
    whole = ModelConfig.load(folder)
    heads = (whole.num_heads, whole.num_kv_heads, whole.head_dim)
    kv_dtype = type_name(dtype) if config.kv_dtype == "auto" else config.kv_dtype
    format = KvFormat(whole.num_layers, *heads[1:], config.block_size, kv_dtype, tp)
    try:
        ops = select_ops(device, dtype, TYPES[kv_dtype], Heads(*heads), config.block_size, config.deterministic)
    except ValueError as error:
        raise InvalidRequest(str(error), param="deterministic") from error
    part = shard(whole, tp, number)
    if config.dummy_weights:
        weights = dummy_weights(part, ops, dtype, device, progress)
    else:
        weights = load_weights(folder, part, ops, dtype, device, progress)
    if device.type == "cuda":  # threads have copied on a stream that is not ours, and left memory that is its own
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    if group is not None:
        ops = ParallelOps(ops, group, part, weights, config.deterministic)
    longest = config.max_model_len or whole.max_position_embeddings
    model = Model(part.config, weights, ops, rope_table(whole.rope, whole.head_dim, longest, device))
    few = KvPool(format, number, _FEW_BLOCKS, device_allocator(device))
    # Triton's operations read nothing back from the device, others do.
    graphed = config.graphs and group is None and ops.name.startswith("triton")
    rank = Rank(model, few, device, dtype, whole, ops.name, longest, graphed)
    num_blocks = format.blocks_in(_kv_memory(config, rank, group))
    pool = KvPool(format, number, num_blocks, make_allocator(device))
    return replace(rank, pool=pool, longest=min(longest, num_blocks * config.block_size))


def _kv_memory(config: EngineConfig, rank: Rank, group: RankGroup | None) -> int:
    """Bytes of the pool: alike on all ranks, so that they have the same blocks."""
    if config.kv_memory or rank.device.type == "cpu":
        return config.kv_memory or CPU_KV_MEMORY
    found = kv_memory(demand(rank, config), config.device_memory)
    return found if group is None else group.least(found, rank.device)


def resolve(config: EngineConfig, rank: int = 0) -> tuple[torch.device, torch.dtype]:
    """The device and type that `auto` means here: CUDA where there is one, float32 on CPU, bfloat16 elsewhere. Each
    rank has a CUDA device of its own."""
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name, rank) if name == "cuda" and config.tp > 1 else torch.device(name)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    kinds["auto"] = torch.float32 if device.type == "cpu" else torch.bfloat16
    if config.dtype not in kinds:
        raise InvalidRequest(f"dtype {config.dtype} is not one of {', '.join(kinds)}", param="dtype")
    return device, kinds[config.dtype]


def _keep_freed_memory() -> None:
    """Have glibc keep up to 256 MB of freed memory. By default it returns an activation of a few megabytes to the
    system as soon as it is freed, and a prefill spends a tenth of its time on faulting such pages in again."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc accepts
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)
