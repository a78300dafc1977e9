"""What Triton makes of the attention kernels for a Hopper GPU, of which it needs none for that: as they are launched
for the shapes of Llama-3.1-8B, in blocks of 16."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.kernels.hopper import Compiled

pytest.importorskip("triton")

BLOCK_SHARED = 227 << 10
"""Bytes of shared memory that one program can have; a multiprocessor has 1 KiB more, and each program takes one."""

LAUNCH = """
import json, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

def instead(kernel, grid):
    return lambda *arguments, **options: launched.append((kernel, kernel.warmup(*arguments, grid=grid, **options)))

def report(kernel, built):
    with tempfile.NamedTemporaryFile() as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = f"{nvidia.__file__.rpartition('/')[0]}/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return kernel.__name__, built.asm["ptx"], usage, built.metadata.shared

launched = []
triton.runtime.driver.set_active(Driver())
triton.runtime.JITFunction.__getitem__ = instead

from baton.kernels import attention
from baton.kernels.ops import Heads, Rows

def rows(sequences, each):
    ends, blocks = torch.arange(sequences + 1, dtype=torch.int32), torch.zeros(64 * sequences, dtype=torch.int32)
    lengths = torch.full((sequences,), 1024, dtype=torch.int32)
    singles = sequences if each == 1 else 0
    return Rows(
        ends, ends, ends * each, lengths, blocks, ends * 64, singles,
        tuple(range(0, sequences * each + 1, each)), (1024,) * sequences,
    )

types = {"bfloat16": torch.bfloat16, "int8": torch.int8, "float8_e4m3": torch.float8_e4m3fn}
heads, query = Heads(32, 8, 128), torch.zeros(64, 32, 128, dtype=torch.bfloat16)
found = []
for call, dtype in json.loads(sys.argv[1]):
    launched.clear()
    dtype = types[dtype]
    kv = torch.zeros(1, 2, 8, 16, 128, dtype=dtype)
    if dtype != torch.bfloat16:
        kv = torch.zeros(1, 2, 8, 16 * 132, dtype=torch.uint8)
    if call == "verify":
        trees = torch.zeros(8, 8, dtype=torch.int64)
        attention.verify(query.view(8, 8, 32, 128), heads, rows(8, 8), kv, dtype, trees=trees)
    else:
        own = rows(4, 16) if call == "prefill" else rows(64, 1)
        attention.attend(query, heads, own, kv, dtype, deterministic=call == "deterministic")
    found.append([report(*each) for each in launched])
print(json.dumps(found))
"""


CALLS = [
    *(("decode", dtype) for dtype in ("bfloat16", "int8", "float8_e4m3")),
    ("verify", "bfloat16"), ("prefill", "bfloat16"), ("prefill", "int8"), ("deterministic", "bfloat16"),
]  # fmt: skip

Kernels = dict[tuple[str, str], dict[str, Compiled]]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """What each call launches, by the kernels' names, compiled in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, json.dumps(CALLS)], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: Kernels = {}
    for call, launched in zip(CALLS, json.loads(done.stdout), strict=True):
        found[call] = {}
        for name, ptx, usage, shared in launched:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
            found[call][name] = Compiled(ptx, numbers["REG"], numbers["STACK"] + numbers["LOCAL"], shared)
    return found


@pytest.mark.parametrize("call", [call for call in CALLS if call[0] in ("decode", "verify")], ids="-".join)
def test_running_requests(kernels: Kernels, call: tuple[str, str]) -> None:
    """Two programs fit a multiprocessor; tiles are copied sixteen bytes at a time, while others are computed with."""
    split, merge = kernels[call]["split"], kernels[call]["merge"]
    assert split.spilled == merge.spilled == 0
    assert 2 * (split.shared + 1024) <= BLOCK_SHARED + 1024
    assert 2 * 128 * split.registers <= 65536
    copies = split.accesses("cp.async")
    tile = 2 * 64 * 128 * (2 if call[1] == "bfloat16" else 1)  # bytes of keys and values
    assert copies.count(16) >= 3 * tile // 128 // 16  # two tiles before the loop, one in it, by 128 threads
    if call[1] == "bfloat16":
        assert set(copies) == {16}
    assert 16 in merge.accesses("ld")


@pytest.mark.parametrize("call", [call for call in CALLS if call[0] in ("prefill", "deterministic")], ids="-".join)
def test_prompts(kernels: Kernels, call: tuple[str, str]) -> None:
    """Products are the matrix unit's own asynchronous ones."""
    prefill = kernels[call]["prefill"]
    assert prefill.spilled == 0
    assert prefill.shared <= BLOCK_SHARED
    assert "wgmma.mma_async" in prefill.ptx
    if call[1] == "bfloat16":
        assert set(prefill.accesses("cp.async")) == {16}


@pytest.mark.parametrize("call", [call for call in CALLS if call[0] in ("prefill", "deterministic")], ids="-".join)
def test_a_row_keeps_its_bits_where_it_sees_nothing(kernels: Kernels, call: tuple[str, str]) -> None:
    """It shrinks by exp2 of a difference that is 0, multiplied later: no fused multiply-add of two products."""
    ptx = kernels[call]["prefill"].ptx
    exponents = set(re.findall(r"ex2\.approx\S*\s+%r\d+, (%r\d+)", ptx))
    differences = set(re.findall(r"sub\.f32\s+(%r\d+),", ptx))
    scaled = re.findall(r"mul\.f32\s+(%r\d+), (%r\d+), (%r\d+);", ptx)
    assert [out for out, *factors in scaled if out in exponents and differences.intersection(factors)]
