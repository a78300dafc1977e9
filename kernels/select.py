"""Which implementation of the operations a worker uses."""

from __future__ import annotations

import logging
import subprocess

import torch

from .converted import ConvertedKvOps
from .native import NativeOps, load_library, supports
from .ops import Heads, Ops
from .reference import TorchOps

log = logging.getLogger(__name__)


def select_ops(
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    heads: Heads,
    block_size: int,
    deterministic: bool = False,
) -> Ops:
    """By rule, not by measurement, so that all workers of one kind compute the same numbers: on a GPU our kernels, on
    a CPU compiled C for float32, each where it can be had and takes the shape of the heads; torch otherwise.

    `kv_dtype` is the type of the pool, one of `quantised.TYPES`. `deterministic` asks for operations whose rows have
    the same bits in every batch; compiled C is so in any case. Raises `ValueError` where there are none.
    """
    if (
        device.type == "cuda"
        and (ops := _triton(device, dtype, kv_dtype, heads, block_size, deterministic)) is not None
    ):
        return ops
    base: Ops | None = None
    if device.type == "cpu" and dtype == torch.float32 and supports(heads.queries, heads.keys, heads.dim, block_size):
        base = _native()
    if base is None:
        if deterministic:
            raise ValueError(f"no deterministic operations for {dtype} on {device.type} with heads of {heads.dim}")
        base = TorchOps()
    return base if kv_dtype == dtype else ConvertedKvOps(base, kv_dtype)


def _native() -> Ops | None:
    library = load_library()
    return None if library is None else NativeOps(library, torch.get_num_threads())


def _triton(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, heads: Heads, block_size: int, deterministic: bool
) -> Ops | None:
    """None, with a line in the log, where Triton is missing, cannot compile, or its kernels do not take the heads or
    do not fit the device."""
    try:
        from triton import TritonError

        from . import attention
        from .triton_ops import TritonOps
    except (ImportError, OSError) as error:
        log.warning("Triton is not available, torch is used: %s", error)
        return None
    if not attention.supports(heads, dtype, kv_dtype):
        log.warning("the Triton kernels do not take heads of %d, torch is used", heads.dim)
        return None
    ops = TritonOps(kv_dtype, deterministic)
    try:
        ops.rehearse(device, dtype, heads, block_size)
    except (TritonError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        # A multiprocessor with less shared memory, no C compiler or one that fails, a device that Triton does not know.
        log.warning("the Triton kernels cannot be used here, torch is: %s", error)
        return None
    return ops
