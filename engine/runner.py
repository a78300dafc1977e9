"""The runner: executes a plan on the model. One flat batch a step, built with a handful of array operations."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import platform
import time
from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.config import EngineConfig
from ..common.errors import EngineFailure, InvalidRequest
from ..common.fingerprint import fingerprint
from ..common.kv_format import KvFormat
from ..common.types import Request, SamplingParams
from ..kernels.converted import ConvertedKvOps
from ..kernels.ops import Rows
from ..kernels.quantised import TYPES
from ..kernels.select import select_ops
from .kv_pool import Allocator, KvPool, device_allocator, type_name
from .model import Model
from .model_config import ModelConfig
from .plan import OnLayer, Sampled, Slice, StepPlan
from .rope import rope_table
from .sampler import Sampler
from .sequence import Sequence
from .shard import shard
from .weights import Progress, dummy_weights, load_weights, weights_digest

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

log = logging.getLogger(__name__)


class TorchRunner:
    """Implements `plan.Runner` on a model and a pool. Not thread-safe: it belongs to the engine loop."""

    def __init__(
        self, model: Model, pool: KvPool, eos_ids: frozenset[int], device: torch.device, operations: str
    ) -> None:
        """`operations`: name of the implementation underneath, for logs and tests."""
        self.operations = operations
        self._model = model
        self._pool = pool
        self._sampler = Sampler(eos_ids)
        self._device = device

    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> list[Sampled | None]:
        """See `plan.Runner.run`. Raises `EngineFailure` where torch fails (out of memory, a broken device)."""
        order = sorted(range(len(plan.slices)), key=lambda i: plan.slices[i].count != 1)  # single rows first
        slices = [plan.slices[i] for i in order]
        sampling = [i for i, part in enumerate(slices) if part.samples]
        results: list[Sampled | None] = [None] * len(slices)
        try:
            with torch.inference_mode():
                tokens, rows = self._batch(slices)
                wanted = self._move(np.asarray([rows.row_starts[i + 1] - 1 for i in sampling], dtype=np.int64))
                logits = self._model.forward(tokens, rows, self._pool.kv, wanted, on_layer)
                sampled = self._sampler.sample(logits, [slices[i].sequence for i in sampling])
        except (RuntimeError, IndexError) as error:
            raise EngineFailure(f"step of {plan.tokens} tokens failed: {error}") from error
        for i, token in zip(sampling, sampled, strict=True):
            results[order[i]] = token
        return results

    def _batch(self, slices: Listing[Slice]) -> tuple[torch.Tensor, Rows]:
        """Tokens [T] of all slices and where they belong."""
        block_size = self._pool.format.block_size
        counts = np.asarray([part.count for part in slices])
        ends = np.asarray([part.end for part in slices])
        starts = np.zeros(len(slices) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        owner = np.repeat(np.arange(len(slices)), counts)
        positions = np.arange(starts[-1]) - starts[owner] + (ends - counts)[owner]
        held = [-(-part.end // block_size) for part in slices]
        tables = np.zeros((len(slices), max(held)), dtype=np.int32)
        for row, (part, blocks) in enumerate(zip(slices, held, strict=True)):
            tables[row, :blocks] = part.sequence.blocks[:blocks]
        slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
        tokens = itertools.chain.from_iterable(part.sequence.tokens[part.start : part.end] for part in slices)
        rows = Rows(
            positions=self._move(positions),
            slots=self._move(slots),
            starts=self._move(starts),
            lengths=self._move(ends.astype(np.int32)),
            tables=self._move(tables),
            singles=int((counts == 1).sum()),
            row_starts=tuple(starts.tolist()),
            row_lengths=tuple(ends.tolist()),
        )
        return self._move(np.fromiter(tokens, dtype=np.int64, count=int(starts[-1]))), rows

    def _move(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Engine:
    """What `build_engine` makes: all that a worker needs to know of the compute side."""

    runner: TorchRunner
    pool: KvPool
    format: KvFormat
    model_config: ModelConfig
    eos_ids: frozenset[int]
    fingerprint: str
    vocab_size: int
    max_model_len: int
    num_blocks: int


def build_engine(
    config: EngineConfig, progress: Progress, allocator: Callable[[torch.device], Allocator] = device_allocator
) -> Engine:
    """Load the model, make the pool and run one step of each kind, so that the first request finds all warm.

    Sets the process's number of torch threads. Raises `InvalidRequest` where the model or the memory does not fit.
    """
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    _keep_freed_memory()
    device, dtype = resolve(config)
    folder = Path(config.model)
    model_config = ModelConfig.load(folder)
    heads = (model_config.num_heads, model_config.num_kv_heads, model_config.head_dim)
    ops = select_ops(device, dtype, *heads, config.block_size)
    kv_dtype = type_name(dtype) if config.kv_dtype == "auto" else config.kv_dtype
    format = KvFormat(model_config.num_layers, *heads[1:], config.block_size, kv_dtype)
    if TYPES[kv_dtype] != dtype:
        ops = ConvertedKvOps(ops, TYPES[kv_dtype])
    begin = time.monotonic()
    if config.dummy_weights:
        weights, digest = dummy_weights(shard(model_config), ops, dtype, device, progress), "dummy"
    else:
        weights = load_weights(folder, shard(model_config), ops, dtype, device, progress)
        digest = weights_digest(folder)
    num_blocks = format.blocks_in(config.kv_memory)
    longest = min(config.max_model_len or model_config.max_position_embeddings, num_blocks * config.block_size)
    pool = KvPool(format, 0, num_blocks, allocator(device))
    rope = rope_table(model_config.rope, model_config.head_dim, longest, device)
    model = Model(model_config, weights, ops, rope)
    runner = TorchRunner(model, pool, model_config.eos_ids, device, ops.name)
    _warm_up(runner, min(longest, num_blocks * config.block_size), config)
    log.info(
        "model %s: %s on %s, operations %s, %d blocks of %d tokens, ready in %.1f s",
        *(folder.name, dtype, device.type, ops.name, num_blocks, config.block_size, time.monotonic() - begin),
    )
    return Engine(
        runner=runner,
        pool=pool,
        format=format,
        model_config=model_config,
        eos_ids=model_config.eos_ids,
        fingerprint=fingerprint({"weights": digest, "dtype": str(dtype), "numerics": ops.name}),
        vocab_size=model_config.vocab_size,
        max_model_len=longest,
        num_blocks=num_blocks,
    )


def resolve(config: EngineConfig) -> tuple[torch.device, torch.dtype]:
    """The device and type that `auto` means here: CUDA where there is one, float32 on CPU, bfloat16 elsewhere."""
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
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


def _warm_up(runner: TorchRunner, room: int, config: EngineConfig) -> None:
    """A prefill chunk and a decode of throw-away tokens in the first blocks, which belong to nobody yet."""
    count = max(1, min(config.max_batch_tokens, room - 1))
    blocks = list(range(-(-(count + 1) // config.block_size)))
    params = SamplingParams(max_tokens=1, temperature=0.0)
    request = Request("warm-up", (0,) * (count + 1), count + 1, params)
    sequence = Sequence(("", 0), request, 0, 0.0, 0.0, blocks=blocks)
    for start, end in ((0, count), (count, count + 1)):
        runner.run(StepPlan(count, [Slice(sequence, start, end - start)]))
