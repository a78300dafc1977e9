"""The operations in compiled C (`native.c`): float32 on a CPU.

The library's OpenMP symbols are left open and found in torch's own runtime, so that both share one team of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
from pathlib import Path

import torch

from .build import load
from .ops import Heads, Rows

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("native.c")

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "panel_width": (),
    "linear": (_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _INT),
    "add_norm": (_POINTER, _POINTER, _POINTER, _FLOAT, _LONG, _LONG, _POINTER, _INT),
    "silu_mul": (_POINTER, _LONG, _LONG, _POINTER, _INT),
    "rotate_and_store": (
        *(_POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _POINTER, _FLOAT),
        *(_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _INT),
    ),
    "attention": (
        *(_POINTER, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _POINTER),
        *(_LONG, _LONG, _LONG, _LONG, _LONG, _INT),
    ),
}


class NativeOps:
    """See `ops.Ops`. A row's numbers do not depend on the rest of the batch; tensors must be contiguous float32.

    `name` holds a digest of what this build computes from fixed numbers: another order of operations in the source, a
    processor without fused multiply-add or another compiler's rounding give another name.
    """

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._library = library
        self._threads = threads
        self._panel: int = library.panel_width()
        self.name = f"native-{self._probe()}"

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """[N, K] → panels [N / P, K, P], the last one filled up with zeros."""
        count, depth = weight.shape
        panels = -(-count // self._panel)
        packed = weight.new_zeros(panels, depth, self._panel)
        whole = count // self._panel
        packed[:whole].copy_(weight[: whole * self._panel].view(whole, self._panel, depth).transpose(1, 2))
        if whole < panels:
            packed[whole, :, : count - whole * self._panel].copy_(weight[whole * self._panel :].T)
        return packed

    def rows(self, packed: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return packed[indices // self._panel, :, indices % self._panel].contiguous()

    def linear(
        self, x: torch.Tensor, packed: torch.Tensor, features: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows, depth = x.shape
        out = x.new_empty(rows, features)
        self._library.linear(
            *(x.data_ptr(), rows, depth, packed.data_ptr(), features, _address(bias), out.data_ptr(), self._threads)
        )
        return out

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, depth = x.shape
        out = x.new_empty(rows, depth)
        self._library.add_norm(
            *(x.data_ptr(), residual.data_ptr(), gain.data_ptr(), eps, rows, depth, out.data_ptr(), self._threads)
        )
        return out, x

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, width = gate_up.shape
        out = gate_up.new_empty(rows, width // 2)
        self._library.silu_mul(gate_up.data_ptr(), rows, width // 2, out.data_ptr(), self._threads)
        return out

    def rotate_and_store(
        self, qkv: torch.Tensor, heads: Heads, table: torch.Tensor, rows: Rows, kv: torch.Tensor
    ) -> None:
        self._library.rotate_and_store(
            *(qkv.data_ptr(), len(qkv), heads.queries, heads.keys, heads.dim),
            *(_address(heads.query_gain), _address(heads.key_gain)),
            *(heads.eps, table.data_ptr(), rows.positions.data_ptr(), rows.slots.data_ptr()),
            *(kv.data_ptr(), kv.shape[3], self._threads),
        )

    def attention(self, qkv: torch.Tensor, heads: Heads, rows: Rows, kv: torch.Tensor) -> torch.Tensor:
        out = qkv.new_empty(len(qkv), heads.queries * heads.dim)
        self._library.attention(
            *(qkv.data_ptr(), kv.data_ptr(), out.data_ptr(), len(rows.row_lengths)),
            *(rows.starts.data_ptr(), rows.lengths.data_ptr(), rows.table_starts.data_ptr(), rows.tables.data_ptr()),
            *(heads.queries, heads.keys, heads.dim, kv.shape[3], heads.window, self._threads),
        )
        return out

    def _probe(self) -> str:
        """Run every operation once on numbers that are exact in float32; 8 hex digits of the result's digest."""

        def numbers(*shape: int) -> torch.Tensor:
            return ((torch.arange(math.prod(shape)) * 7919 % 1009 - 504) / 512.0).view(shape)

        tokens, heads = 40, Heads(queries=2, keys=1, dim=16)
        steps = torch.arange(tokens)
        starts, lengths, tables, ends = (
            torch.tensor(values, dtype=torch.int32) for values in ([0, tokens], [tokens], [0, 1, 2], [0, 3])
        )
        rows = Rows(steps, steps, starts, lengths, tables, ends, 0, (0, tokens), (tokens,))
        x, kv = numbers(tokens, 600), torch.zeros(3, 2, 1, 16, 16)
        normed, total = self.add_norm(x, x.flip(1), numbers(600), 1e-5)
        qkv = self.linear(normed + total, self.pack(numbers(64, 600)), 64)
        self.rotate_and_store(qkv, heads, numbers(tokens, 2, 8), rows, kv)
        out = self.silu_mul(self.attention(qkv, heads, rows, kv))
        return hashlib.blake2b(out.numpy().tobytes(), digest_size=4).hexdigest()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def supports(queries: int, keys: int, head_dim: int, block_size: int) -> bool:
    """Whether native.c's attention can take this shape."""
    return head_dim % 16 == 0 and head_dim <= 256 and block_size % 16 == 0 and queries // keys <= 64


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled library; None, with a line in the log, where it cannot be had."""
    try:
        runtime = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)
        if runtime is not None:
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        library = load(_SOURCE, "-fopenmp")
    except OSError as error:
        log.warning("compiled CPU operations are not available, torch's are used: %s", error)
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = _INT if name == "panel_width" else None
    return library
