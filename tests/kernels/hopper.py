"""Where kernels run in tests, and what Triton makes of them for a Hopper GPU, of which it needs none for that."""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Of the tensors that a kernel is tested with. On a CPU Triton interprets it (`tests/conftest.py`)."""

_COMPILER = """
import importlib, json, subprocess, sys, tempfile
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, compile

for request in sys.stdin:
    module, kernel, signature, constants, aligned, options = json.loads(request)
    kernel = getattr(importlib.import_module(f"baton.kernels.{module}"), kernel)
    names = kernel.arg_names
    source = ASTSource(
        kernel, {name: "constexpr" if name in constants else signature[name] for name in names}, constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile() as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = f"{nvidia.__file__.rpartition('/')[0]}/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    print(json.dumps([built.asm["ptx"], usage, built.metadata.shared]), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Compiled:
    """`ptx`; registers of a thread; bytes of a thread that did not fit into them; bytes of shared memory."""

    ptx: str
    registers: int
    spilled: int
    shared: int

    def accesses(self, kind: str) -> list[int]:
        """Bytes that each load ("ld"), store ("st") or asynchronous copy ("cp.async") of global memory takes."""
        if kind == "cp.async":
            return [
                int(size, 0)
                for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", self.ptx)
            ]
        found = re.findall(rf"\b{kind}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+) ", self.ptx)
        return [int(vector or 1) * int(bits) // 8 for vector, bits in found]


def compile_for_hopper(
    module: str, kernel: str, signature: Mapping[str, str], constants: Mapping[str, Any],
    aligned: Collection[str] = (), **options: int,
) -> Compiled:  # fmt: skip
    """Compile `kernel` of `baton.kernels.<module>` in another process.

    `signature` are the types of its parameters ("*bf16", "i32"), `constants` the values of those that are
    `tl.constexpr`, `aligned` the parameters whose values are multiples of 16, as all pointers are; `options` are
    num_warps and num_stages.
    """
    aligned = {*aligned, *(name for name, kind in signature.items() if kind.startswith("*"))}
    request = json.dumps([module, kernel, dict(signature), dict(constants), sorted(aligned), options])
    process = _compiler()
    assert process.stdin and process.stdout
    process.stdin.write(request + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()  # pytest's timeout bounds it
    if not answer:
        _compiler.cache_clear()
        raise AssertionError(f"{module}.{kernel} cannot be compiled: standard error says why")
    ptx, usage, shared = json.loads(answer)
    numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    return Compiled(ptx, numbers["REG"], numbers["STACK"] + numbers["LOCAL"], shared)


@functools.cache
def _compiler() -> subprocess.Popen[str]:
    """One process for all kernels, which does not interpret. It ends when this one does, with its standard input."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-c", _COMPILER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.communicate)  # closes its standard input and waits
    return process
