"""What a device can do at most, measured in the same run as what is compared with it. On random data: zeros flatter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .timing import median_s


@dataclass(frozen=True, slots=True)
class Ceilings:
    """`copy`: bytes a second of a copy within the device's memory, read and written ones both counted. `product`: FLOPs
    a second of a large square product of matrices in `dtype`."""

    device: str
    dtype: str
    copy: float
    product: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of what is measured: bytes that are copied, and rows of the matrices."""

    copied: int = 2 << 30
    rows: int = 8192


TINY = Sizes(copied=1 << 20, rows=64)


def measure(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Ceilings:
    """About a second on a GPU, and twice `sizes.copied` of its memory."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Ceilings(name, str(dtype).removeprefix("torch."), _copy(device, sizes), _product(device, dtype, sizes))


def _copy(device: torch.device, sizes: Sizes) -> float:
    source = torch.randint(0, 256, (sizes.copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * sizes.copied / median_s(device, [lambda: target.copy_(source)], repeats=20)


def _product(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> float:
    left, right = (torch.randn(sizes.rows, sizes.rows, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * sizes.rows**3 / median_s(device, [lambda: torch.mm(left, right, out=out)], repeats=20)
