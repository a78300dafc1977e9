"""Pools with the same made-up KV, in an array and in a tensor."""

from __future__ import annotations

import numpy as np
import torch

from baton.common.kv_format import KvFormat
from baton.kvtransfer.convert import convert
from baton.kvtransfer.device_store import DeviceStore
from baton.kvtransfer.host_store import Bytes, HostStore
from baton.kvtransfer.layout import Route

FORMAT = KvFormat(num_layers=2, num_kv_heads=4, head_dim=16, block_size=16, dtype="float32")
WHOLE = Route(0, 0, 0, 0, 4)


def values(format: KvFormat, num_blocks: int, seed: int = 0) -> Bytes:
    """A pool full of ordinary numbers, in whatever type it keeps."""
    size = format.num_layers * num_blocks * format.block_bytes
    numbers = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    last = 2 if format.dtype in ("bfloat16", "float16") else 4
    numbers[last - 1 :: last] = numbers[last - 1 :: last] & 0x80 | 0x3F  # signs and exponents: between -2 and 2
    return numbers


def same_pools(format: KvFormat, num_blocks: int, device: str = "cpu") -> tuple[HostStore, DeviceStore]:
    host = values(format, num_blocks)
    memory = torch.from_numpy(host.copy()).to(device)
    return HostStore(host, format, 0, num_blocks, convert), DeviceStore(memory, format, 0, num_blocks)
