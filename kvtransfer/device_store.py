"""A KV pool in the memory of an accelerator: packing, unpacking and fetching pieces without getting in its way.

Whatever a transport asks for runs on a stream of the asking thread's own, in kernels that occupy few multiprocessors
(`kernels/pack.py`), and has been done when the call returns. What the engine computes is not waited for on the device,
where it would hold the lane's lock, but before, by `mark`: an event in the engine's stream.

    pool ── kernel ──▶ device buffer ── one copy ──▶ pinned host memory      tcp, grpc
    pool ── kernel ──▶ device buffer                                         process-group over NCCL
    peer's pool ── kernel ──▶ pool                                           cuda-ipc
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..common.errors import TransportFailed
from ..common.kv_format import SCALE_BYTES, KvFormat
from ..kernels import pack
from ..kernels.convert import convert_rows
from ..kernels.move import Places
from .layout import Cut, Route, as_kept, in_payload, in_pool, piece_bytes, tokens_of
from .transport import Mark
from .wire import Checksums

Buffer = memoryview | torch.Tensor
"""Bytes: the host's, or a uint8 tensor on the pool's device."""

PATIENCE_S = 60.0
"""How long the device may take to get to a mark. A step that takes longer hangs, and its worker with it."""

_LOOK_EVERY_S = 1e-4
_FIRST_IN_TURN = -1
"""A stream's priority: few programs that many wait for go before many that nobody yet waits for."""


class DeviceStore:
    """See `transport.Store`. `memory`: the pool of one rank, flat, layer after layer, on a CUDA device (or, in tests,
    on a CPU); `checked`: take checksums (0 otherwise); `programs`: multiprocessors that a kernel may occupy.

    Raises `TransportFailed` where the device does."""

    def __init__(
        self, memory: torch.Tensor, format: KvFormat, rank: int, num_blocks: int, checked: bool = True,
        programs: int = pack.PROGRAMS,
    ) -> None:  # fmt: skip
        self.format = format
        self.rank = rank
        self.num_blocks = num_blocks
        self.memory = memory
        self.checked = checked
        self._programs = programs
        self._streams = threading.local()
        self._warm_up()

    def mark(self) -> Mark:
        if self.memory.device.type == "cpu":
            return lambda: None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.memory.device))
        return lambda: _wait(event)

    def buffer(self, size: int) -> memoryview:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.memory.device.type == "cuda").numpy().data

    def pack(self, layers: range, part: Cut, route: Route, target: KvFormat, out: Buffer) -> Checksums:
        piece, pieces = piece_bytes(target, route), len(layers) * part.count
        into = in_payload(pieces, piece)
        with self._aside():
            here = out if isinstance(out, torch.Tensor) else self._on_device(pieces * piece)
            if as_kept(self.format, target):
                at = self._at(layers, part.blocks, route.source_head, route.heads)
                sums = self._copy(self.memory, at, here, into, piece // 2)
            else:
                for rows, layer in zip(here.view(len(layers), -1), layers, strict=True):
                    rows.copy_(self._recut(layer, part, route, target).reshape(-1))
                sums = self._sums(here, into, piece // 2)
            if isinstance(out, memoryview):
                torch.frombuffer(out, dtype=torch.uint8).copy_(here, non_blocking=True)
            return self._done(sums)

    def unpack(self, layers: range, blocks: Sequence[int], route: Route, data: Buffer) -> Checksums:
        half = piece_bytes(self.format, route) // 2
        at = self._at(layers, blocks, route.target_head, route.heads)
        with self._aside():
            here = data if isinstance(data, torch.Tensor) else self._to_device(data)
            return self._done(self._copy(here, in_payload(at.pieces, 2 * half), self.memory, at, half))

    def checksums(self, layers: range, blocks: Sequence[int], route: Route) -> Checksums:
        at = self._at(layers, blocks, route.source_head, route.heads)
        with self._aside():
            return self._done(self._sums(self.memory, at, piece_bytes(self.format, route) // 2))

    def fetch(
        self, peer: torch.Tensor, peer_format: KvFormat, peer_blocks: int, layers: range, theirs: Sequence[int],
        blocks: Sequence[int], route: Route,
    ) -> Checksums:  # fmt: skip
        source = in_pool(peer_format, peer_blocks, layers, theirs, route.source_head, route.heads)
        at = self._at(layers, blocks, route.target_head, route.heads)
        with self._aside():
            return self._done(self._copy(peer, source, self.memory, at, piece_bytes(self.format, route) // 2))

    # --- all of these within `_aside` ---

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream that the caller has chosen, or else on one of this thread's own: never on the engine's."""
        device = self.memory.device
        try:
            if device.type == "cpu":
                yield
                return
            stream = torch.cuda.current_stream(device)
            if stream == torch.cuda.default_stream(device):
                if not hasattr(self._streams, "own"):
                    self._streams.own = torch.cuda.Stream(device, _FIRST_IN_TURN)  # type: ignore[no-untyped-call]
                stream = self._streams.own
            with torch.cuda.stream(stream):
                yield
        except RuntimeError as error:  # out of memory, or broken for good
            raise TransportFailed(f"the device failed: {error}") from error

    def _copy(
        self, source: torch.Tensor, source_at: Places, target: torch.Tensor, target_at: Places, size: int
    ) -> torch.Tensor:
        return pack.copy(
            *(source, source_at.offsets(), target, target_at.offsets(), size),
            checked=self.checked, programs=self._programs,
        )  # fmt: skip

    def _sums(self, memory: torch.Tensor, at: Places, size: int) -> torch.Tensor:
        if not self.checked:
            return torch.zeros(at.pieces, dtype=torch.int64, device=memory.device)
        return pack.checksums(memory, at.offsets(), size, programs=self._programs)

    def _done(self, sums: torch.Tensor) -> Checksums:
        """The sums, for which all that was asked for before has been waited for."""
        return sums.cpu().numpy().view(np.uint64)

    def _on_device(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.memory.device)

    def _to_device(self, data: memoryview) -> torch.Tensor:
        """What gRPC brings is read-only, which torch takes amiss, and copied first."""
        if data.readonly:
            return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.memory.device)
        return torch.frombuffer(data, dtype=torch.uint8).to(self.memory.device, non_blocking=True)

    def _at(self, layers: range, blocks: Sequence[int], head: int, heads: int) -> Places:
        return in_pool(self.format, self.num_blocks, layers, blocks, head, heads)

    def _recut(self, layer: int, part: Cut, route: Route, target: KvFormat) -> torch.Tensor:
        """Rows of the target's length and type: [pieces × 2 × heads, bytes of a row]."""
        own = self.format
        pool = self.memory.view(own.num_layers, self.num_blocks, 2, own.heads_per_rank, own.row_bytes)[layer]
        elements = own.block_size * own.token_bytes
        columns = [self._tokens(pool[..., :elements], own.token_bytes, part, route, target)]
        if own.quantised:
            columns.append(self._tokens(pool[..., elements:], SCALE_BYTES, part, route, target))
        rows = torch.cat(columns, dim=1)
        return convert_rows(rows, own.dtype, target.dtype, target.block_size, own.head_dim)

    def _tokens(self, rows: torch.Tensor, width: int, part: Cut, route: Route, target: KvFormat) -> torch.Tensor:
        """What each token of the target's blocks has in `rows`, `width` bytes: [pieces × 2 × heads, tokens × width]."""
        places = tokens_of(part, self.format.block_size, target.block_size)
        block, slot = (torch.from_numpy(index).to(rows.device) for index in places)
        heads = slice(route.source_head, route.source_head + route.heads)
        split = rows.view(*rows.shape[:3], self.format.block_size, width)
        tokens = split[block, :, heads, slot]  # [tokens, 2, heads, width]
        shaped = tokens.view(part.count, target.block_size, 2, route.heads, width).permute(0, 2, 3, 1, 4)
        return shaped.reshape(part.count * 2 * route.heads, target.block_size * width)

    def _warm_up(self) -> None:
        """Have all kernels compiled before a handover waits for them. What is unpacked is what was packed."""
        self.mark()()  # the pool is as its maker wants it
        route = Route(self.rank, self.rank, 0, 0, self.format.heads_per_rank)
        data = self.buffer(piece_bytes(self.format, route))
        first = range(1)
        self.pack(first, Cut((0,), 0, 1), route, self.format, data)
        self.unpack(first, (0,), route, data)
        self.checksums(first, (0,), route)


def _wait(event: torch.cuda.Event) -> None:
    """Torch waits without an end, so it is asked again and again."""
    give_up = time.monotonic() + PATIENCE_S
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > give_up:
            raise TransportFailed(f"the device has not come to a mark in {PATIENCE_S:.0f} s")
        time.sleep(_LOOK_EVERY_S)
