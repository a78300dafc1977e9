"""The paged KV pool: where all keys and values of a worker live.

    layer 0  ┌ block 0: K [heads, block_size, dim] V [...] ┐┌ block 1 ┐ ... ┌ block N-1 ┐
    layer 1  └ ...

One block of one layer is one contiguous run of bytes, which is what a handover sends. Paging is vLLM's
(PagedAttention, SOSP 2023). Who may use which block is the block manager's business, not the pool's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..common.errors import HandoverFailed, InvalidRequest
from .model_config import ModelConfig

Allocator = Callable[[int], torch.Tensor]
"""Number of bytes → a contiguous uint8 tensor of that many, on the pool's device, aligned to 64 bytes. Handed in, so
that the pool can be shared memory or an exportable device allocation."""


def cpu_allocator(size: int) -> torch.Tensor:
    """Plain zeroed host memory; pages become real when they are first written."""
    return torch.zeros(size, dtype=torch.uint8)


def device_allocator(device: torch.device) -> Allocator:
    """Host memory for a CPU, torch's own caching allocator for anything else."""
    if device.type == "cpu":
        return cpu_allocator
    return lambda size: torch.zeros(size, dtype=torch.uint8, device=device)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of the pool without its memory."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, block_size: int, dtype: torch.dtype) -> KvLayout:
        return cls(config.num_layers, config.num_kv_heads, config.head_dim, block_size, dtype)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * self.block_bytes // self.block_size

    def blocks_in(self, memory: int) -> int:
        """Blocks that fit `memory` bytes, over all layers. Raises `InvalidRequest` where not even one does."""
        blocks = memory // (self.num_layers * self.block_bytes)
        if blocks < 1:
            raise InvalidRequest(f"kv_memory {memory} holds no block of {self.num_layers * self.block_bytes} bytes")
        return blocks


class KvPool:
    """`layers[i]`: [num_blocks, 2 (K, V), num_kv_heads, block_size, head_dim]."""

    def __init__(self, layout: KvLayout, num_blocks: int, allocator: Allocator) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        size = layout.num_layers * num_blocks * layout.block_bytes
        self._bytes = allocator(size).view(layout.num_layers, num_blocks, layout.block_bytes)
        shape = (num_blocks, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        self.layers = tuple(layer.view(layout.dtype).view(shape) for layer in self._bytes)

    @property
    def num_layers(self) -> int:
        return self.layout.num_layers

    @property
    def block_bytes(self) -> int:
        return self.layout.block_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layout.bytes_per_token

    def gather(self, layer: int, blocks: Sequence[int]) -> memoryview:
        """A copy of these blocks of one layer, one after the other. May be called from any thread."""
        rows = self._bytes[layer]
        if rows.device.type == "cpu":  # numpy copies in the calling thread; torch would start a team of its own
            return np.take(rows.numpy(), np.asarray(blocks, dtype=np.int64), axis=0).reshape(-1).data
        index = torch.tensor(blocks, dtype=torch.int64, device=rows.device)
        return rows.index_select(0, index).cpu().numpy().reshape(-1).data

    def scatter(self, layer: int, blocks: Sequence[int], data: bytes | bytearray | memoryview) -> None:
        """Write what `gather` read, into these blocks. Raises `HandoverFailed` where the length does not fit."""
        expected = len(blocks) * self.block_bytes
        size = memoryview(data).nbytes
        if size != expected:
            raise HandoverFailed(f"{size} bytes for {len(blocks)} blocks of {self.block_bytes}: not {expected}")
        rows = self._bytes[layer]
        source = np.frombuffer(data, dtype=np.uint8).reshape(len(blocks), self.block_bytes)
        if rows.device.type == "cpu":
            rows.numpy()[np.asarray(blocks, dtype=np.int64)] = source
        else:
            index = torch.tensor(blocks, dtype=torch.int64, device=rows.device)
            rows.index_copy_(0, index, torch.from_numpy(source.copy()).to(rows.device))

    def fill(self, blocks: Sequence[int], value: float) -> None:
        """Overwrite K and V of these blocks in every layer: tests poison free blocks with NaN."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self._bytes.device)
        for layer in self.layers:
            layer.index_fill_(0, index, value)
