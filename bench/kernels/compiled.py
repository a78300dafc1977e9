"""What each configuration of attention takes of a Hopper multiprocessor, found without one: compiled, never run.

Triton compiles for a device that it is told of. Registers and shared memory say how many programs of a kernel fit a
multiprocessor at a time, and bytes that did not fit into registers ("spilled") go through memory: so a configuration
can be ruled out before there is a device to measure it on.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia

from ...kernels import attention
from ...kernels.attention import Config
from .shapes import LLAMA_8B, Shape, pool, random, rows
from .sweep import PREFILLS, SPLITS

REGISTERS = 65536
"""Of one multiprocessor, each of four bytes."""
SHARED = 228 << 10
SHARED_EACH = 1 << 10
"""What each program takes of the shared memory beside its own."""

Launched = list[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Compiled:
    """`registers` of a thread; bytes of one that did not fit into them; bytes of `shared` memory of a program.
    `programs`: that fit a multiprocessor together."""

    kernel: str
    config: str
    registers: int
    spilled: int
    shared: int
    programs: int


class Hopper:
    """As much of Triton's driver as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launches() -> Iterator[Launched]:
    """What is launched meanwhile is compiled and kept, by its kernel's name. The driver stays: this process runs no
    kernels."""
    kept: Launched = []

    def instead(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: kept.append((kernel.__name__, kernel.warmup(*args, grid=grid, **options)))

    launch = triton.runtime.JITFunction.__getitem__
    triton.runtime.driver.set_active(Hopper())
    triton.runtime.JITFunction.__getitem__ = instead
    try:
        yield kept
    finally:
        triton.runtime.JITFunction.__getitem__ = launch


def configurations(shape: Shape = LLAMA_8B) -> Iterator[Compiled]:
    """All that `sweep.py` tries, whether it fits or not. A few seconds of a processor each."""
    kv = pool(shape, 64 * 2, torch.device("cpu"))
    heads, own, prompt = shape.heads, rows([1] * 2, [64] * 2, kv), rows([64], [64], kv)
    query = random(64, heads.queries, heads.dim, like=shape.dtype, device=torch.device("cpu"))
    for config in SPLITS:
        with launches() as kept:
            attention.decode(query[:2], heads, own, kv, shape.dtype, config=config)
        yield _report("split", config, kept)
    for config in PREFILLS:
        with launches() as kept:
            attention.prefill(query, heads, prompt, kv, shape.dtype, out=torch.empty_like(query), config=config)
        yield _report("prefill", config, kept)


def _report(kernel: str, config: Config, kept: Launched) -> Compiled:
    (built,) = (built for name, built in kept if name == kernel)
    usage = _usage(built.asm["cubin"])
    threads, shared = 32 * config.warps, int(built.metadata.shared)
    fits = min(REGISTERS // (threads * usage["REG"]), SHARED // (shared + SHARED_EACH))
    return Compiled(kernel, str(config), usage["REG"], usage["STACK"] + usage["LOCAL"], shared, fits)


def _usage(binary: bytes) -> dict[str, int]:
    """What the toolkit's own tool says of it, which comes with Triton."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True, timeout=60)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", said.stdout)}
