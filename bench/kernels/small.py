"""The operations between the matrix products, all bound by bytes: norms, SiLU, rotation with the KV write, packing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from ...kernels import pack, row_kernels
from ...kernels.move import Offsets
from ...kernels.reference import TorchOps
from ..timing import sets_beyond_cache
from .cases import Case, relative_error
from .shapes import BLOCK, Shape, pool, random, rows

EPS = 1e-5


def cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Each operation at each number of rows, and packing."""
    for count in shape.rows:
        yield add_norm(shape, device, count)
        yield silu_mul(shape, device, count)
        yield rotate_and_store(shape, device, count)
    yield from packing(shape, device)


def add_norm(shape: Shape, device: torch.device, count: int) -> Case:
    """RMSNorm with residual: two rows read, two written. Each call adds to the sum of the one before."""
    size = 4 * count * shape.hidden * shape.dtype.itemsize
    gain = random(shape.hidden, like=shape.dtype, device=device)

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = (random(count, shape.hidden, like=shape.dtype, device=device) for _ in range(2))
        return x, residual

    def error() -> float:
        x, residual = inputs()
        expected = TorchOps().add_norm(_wide(x), _wide(residual), _wide(gain), EPS)
        _poison(2 * count * shape.hidden, shape, device)
        found = row_kernels.add_norm(x, residual, gain, EPS), x
        return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))

    calls = [partial(row_kernels.add_norm, *inputs(), gain, EPS) for _ in range(sets_beyond_cache(device, size))]
    return Case("add and norm", f"{count} rows", size, 0, calls, error)


def silu_mul(shape: Shape, device: torch.device, count: int) -> Case:
    """Two halves of a row read, one written."""
    size = 3 * count * shape.inner * shape.dtype.itemsize

    def inputs() -> torch.Tensor:
        return random(count, 2 * shape.inner, like=shape.dtype, device=device)

    def error() -> float:
        x = inputs()
        _poison(count * shape.inner, shape, device)
        found = row_kernels.silu_mul(x)
        return relative_error(found, TorchOps().silu_mul(x.float()))

    calls = [partial(row_kernels.silu_mul, inputs()) for _ in range(sets_beyond_cache(device, size))]
    return Case("SiLU and multiply", f"{count} rows", size, 0, calls, error)


def rotate_and_store(shape: Shape, device: torch.device, count: int) -> Case:
    """Queries turned in place, keys turned and values copied into the pool: each read once and written once."""
    heads, length = shape.heads, 64
    width = (heads.queries + 2 * heads.keys) * heads.dim
    size = 2 * count * width * shape.dtype.itemsize
    angles = torch.rand(length, heads.dim // 2, device=device) * 6
    table = torch.stack((angles.cos(), angles.sin()), dim=1)

    def error() -> float:
        kv = pool(shape, count * length, device)
        own = rows([1] * count, [length] * count, kv)
        qkv, kv = random(count, width, like=shape.dtype, device=device), torch.full_like(kv, float("nan"))
        expected, expected_kv = _wide(qkv), _wide(kv)
        TorchOps().rotate_and_store(expected, heads, table, own, expected_kv)
        row_kernels.rotate_and_store(qkv, heads, table, own, kv, shape.dtype)
        block, offset = own.slots // BLOCK, own.slots % BLOCK
        queries = relative_error(qkv[:, : heads.queries * heads.dim], expected[:, : heads.queries * heads.dim])
        return max(queries, relative_error(kv[block, :, :, offset], expected_kv[block, :, :, offset]))

    calls: list[Callable[[], object]] = []
    for _ in range(sets_beyond_cache(device, size)):
        kv = pool(shape, count * length, device)
        own = rows([1] * count, [length] * count, kv)
        qkv = random(count, width, like=shape.dtype, device=device)
        calls.append(partial(row_kernels.rotate_and_store, qkv, heads, table, own, kv, shape.dtype))
    return Case("rotate and store", f"{count} rows", size, 0, calls, error)


def packing(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Pieces of a pool in no order to and from a buffer in a row, with checksums: read once, written once. With as many
    programs as `pack.PROGRAMS`, which leave the rest of the device to the engine."""
    half = BLOCK * shape.token_bytes // 2
    count = shape.packed // half
    order = np.random.default_rng().permutation(count).astype(np.int64).reshape(-1, 2)
    scattered, row = order * half, np.arange(count, dtype=np.int64).reshape(-1, 2) * half
    source = torch.randint(0, 256, (count * half,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def error(here: Offsets, there: Offsets) -> float:
        target.fill_(85)
        pack.copy(source, here, target, there, half)
        pieces = source.view(-1, half)[torch.from_numpy(here.ravel() // half).to(device)]
        found = target.view(-1, half)[torch.from_numpy(there.ravel() // half).to(device)]
        return 0.0 if torch.equal(found, pieces) else float("nan")

    for name, here, there in (("pack", scattered, row), ("unpack", row, scattered)):
        call = partial(pack.copy, source, here, target, there, half)
        yield Case(name, f"{count * half >> 20} MiB", 2 * count * half, 0, [call], partial(error, here, there))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """A copy in float32, which may be overwritten."""
    return x.to(torch.float32, copy=True)


def _poison(elements: int, shape: Shape, device: torch.device) -> None:
    """The allocator hands the memory that was freed last to whoever asks next: what a kernel leaves out then shows."""
    torch.full((elements,), float("nan"), dtype=shape.dtype, device=device)
