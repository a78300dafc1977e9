"""The handover on one GPU: `python -m baton.bench.gpu_kvtransfer --out FOLDER`.

What the packing kernels reach, as a share of a copy within the device's memory; what two processes reach over CUDA IPC
and over a socket; and what NCCL says to two ranks on one GPU, which is that it does not serve them. So NCCL between
two GPUs, and CUDA IPC over NVLink, stay unproven until there are two.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..common.config import HandoverConfig
from ..common.kv_format import KvFormat
from ..kernels import pack
from ..kvtransfer.layout import Cut
from ..kvtransfer.outlet import SHORTER
from .gpu_end import SOURCE, End, RemoteSource, fill, make_pool
from .record import write

LLAMA_8B = KvFormat(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
"""Llama-3.1-8B: 128 KiB a token, 64 KiB a block of one layer."""

PROGRAMS = (4, 8, 16, 32, 64, 132)
FRAMES = (2 << 20, 8 << 20, 32 << 20)
Sizes = Mapping[str, tuple[int, ...]]
"""Tokens of the handovers by each transport."""

TOKENS: Sizes = {"cuda-ipc": (1024, 4096, 32768), "shm": (1024,), "tcp": (4096,)}
ROUNDS = 5
NCCL_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Kernel:
    """Bytes a second that the kernel moves, scattered pieces to or from a buffer in a row. `share`: of a plain copy."""

    operation: str
    programs: int
    checked: bool
    gb_per_s: float
    share: float


@dataclass(frozen=True, slots=True)
class Handover:
    """From the first offer until all is here: medians of seconds. `share`: of a plain copy within the device."""

    transport: str
    tokens: int
    frame_bytes: int
    size: int
    seconds: float
    unchecked_seconds: float
    gb_per_s: float
    share: float


@dataclass(slots=True)
class Found:
    """`nccl`: what it says to two ranks on this device."""

    device: str
    memcpy_gb_per_s: float
    kernels: list[Kernel] = field(default_factory=list)
    handovers: list[Handover] = field(default_factory=list)
    nccl: str = ""

    def missing(self, transports: Sequence[str]) -> list[str]:
        """What was to be measured and was not."""
        carried = {handover.transport for handover in self.handovers if handover.gb_per_s > 0}
        operations = {kernel.operation for kernel in self.kernels if kernel.gb_per_s > 0}
        absent = [f"handovers by {name}" for name in transports if name not in carried]
        absent += [f"the kernel that {name}s" for name in ("pack", "unpack", "sum") if name not in operations]
        return absent if self.nccl else [*absent, "what NCCL says"]


def memcpy(device: str, size: int) -> float:
    """GB/s of a copy within the device's memory, bytes counted once."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return size / _best(device, lambda: target.copy_(source)) / 1e9


def kernels(device: str, size: int, limit: float, programs: Sequence[int] = PROGRAMS) -> list[Kernel]:
    """Over pieces of an 8B model's blocks: half a piece is 32 KiB, in no order."""
    half = LLAMA_8B.block_bytes // 2
    count = size // half // 2
    order = np.random.default_rng(0).permutation(2 * count).reshape(count, 2).astype(np.int64)
    scattered, row = order * half, np.arange(2 * count, dtype=np.int64).reshape(count, 2) * half
    pool = torch.zeros(2 * count * half, dtype=torch.uint8, device=device)
    fill(pool)
    buffer = torch.empty_like(pool)

    def seconds(operation: str, programs: int, checked: bool) -> float:
        calls: dict[str, Callable[[], object]] = {
            "pack": lambda: pack.copy(pool, scattered, buffer, row, half, checked=checked, programs=programs),
            "unpack": lambda: pack.copy(buffer, row, pool, scattered, half, checked=checked, programs=programs),
            "sum": lambda: pack.checksums(pool, scattered, half, programs=programs),
        }
        return _best(device, calls[operation])

    kinds = (("pack", True), ("pack", False), ("unpack", True), ("unpack", False), ("sum", True))
    found = []
    for number, (operation, checked) in itertools.product(programs, kinds):
        rate = pool.numel() / seconds(operation, number, checked) / 1e9
        found.append(Kernel(operation, number, checked, rate, rate / limit))
    return found


def _best(device: str, call: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS + 1):  # the first compiles
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class Pair:
    """A source in another process, a target in this one, a pool of `num_blocks` each."""

    def __init__(self, format: KvFormat, num_blocks: int, device: str) -> None:
        self.format = format
        self._pool = make_pool(format, num_blocks, device)
        self._source = RemoteSource(format, num_blocks, device)
        configs = {on: HandoverConfig(checksums=on, transport="process-group") for on in (True, False)}  # lets gloo in
        self._ends = {checked: End("target", self._pool, config) for checked, config in configs.items()}
        self._orders = [np.random.default_rng(seed).permutation(num_blocks).tolist() for seed in (1, 2)]
        self._number = 0

    @property
    def transports(self) -> tuple[str, ...]:
        """That carry between two processes on one device."""
        return tuple(name for name in TOKENS if name in self._ends[True].plane.door)

    def handover(self, transport: str, blocks: int, config: HandoverConfig) -> float:
        """Seconds of one of so many blocks. Raises `HandoverFailed` where it breaks."""
        self._number += 1
        theirs, ours = (tuple(order[:blocks]) for order in self._orders)
        end, key = self._ends[config.checksums], (SOURCE, 1, self._number)
        end.plane.inlet.open(key, 1, self.format, 0, ours)
        end.plane.inlet.expect(key, blocks)
        begin = time.perf_counter()
        self._source.ask("give", self._number, config, transport, end.endpoint, Cut(theirs, 0, blocks))
        end.wait_filled()
        seconds = time.perf_counter() - begin
        end.plane.inlet.close(key)
        self._source.ask("close", config, self._number)
        return seconds

    def nccl(self, patience_s: float = NCCL_PATIENCE_S) -> str:
        """See `Found.nccl`; empty if it serves them."""
        config = HandoverConfig(lease_s=patience_s)
        self._number += 1
        end, key = self._ends[True], (SOURCE, 1, self._number)
        end.plane.inlet.open(key, 1, self.format, 0, (0,))
        end.plane.inlet.expect(key, 1)
        self._source.ask("give", self._number, config, "process-group", end.endpoint, Cut((0,), 0, 1))
        said = str(self._source.ask("broken", config, patience_s))
        if not said and end.said.empty():
            said = f"nothing in {patience_s:.0f} s"
        while not end.said.empty():
            end.said.get()
        end.plane.inlet.close(key)
        self._source.ask("close", config, self._number)
        return said

    def arrived(self, blocks: int) -> bool:
        """Whether the target's blocks are the source's, by another way than checksums."""
        expected = torch.empty_like(self._pool.kv.flat)
        fill(expected)
        shape = (self.format.num_layers, -1, self.format.block_bytes)
        there, here = expected.view(shape), self._pool.kv.flat.view(shape)
        return all(
            torch.equal(here[:, b], there[:, a]) for a, b in zip(*(o[:blocks] for o in self._orders), strict=True)
        )

    def close(self) -> None:
        self._source.close()
        for end in self._ends.values():
            end.plane.stop()


def handovers(pair: Pair, tokens: Sizes, limit: float, rounds: int = ROUNDS) -> Iterator[Handover]:
    """All that the two can do. Raises `HandoverFailed` where one breaks, `AssertionError` where what came is not what
    was sent."""
    for transport in pair.transports:
        frames = [frame for frame in FRAMES if frame <= SHORTER.get(transport, frame)]
        for count, frame in itertools.product(tokens[transport], frames):
            yield _measure(pair, transport, count, frame, limit, rounds)
        assert pair.arrived(count // pair.format.block_size), f"{transport} brought something else"


def _measure(pair: Pair, transport: str, tokens: int, frame: int, limit: float, rounds: int) -> Handover:
    format = pair.format
    blocks = tokens // format.block_size

    def seconds(checked: bool) -> float:
        config = HandoverConfig(checksums=checked, frame_bytes=frame)
        times = [pair.handover(transport, blocks, config) for _ in range(rounds + 1)]
        return statistics.median(times[1:])  # the first opens a lane

    ours, size = seconds(True), blocks * format.num_layers * format.block_bytes
    rate = size / ours / 1e9
    return Handover(transport, tokens, frame, size, ours, seconds(False), rate, rate / limit)


def _steps(found: Found, size: int) -> Iterator[object]:
    """Measures one thing after the other; what each found, once it is in `found`."""
    found.kernels.extend(kernels("cuda", size, found.memcpy_gb_per_s))
    yield from found.kernels
    with closing(Pair(LLAMA_8B, max(itertools.chain(*TOKENS.values())) // LLAMA_8B.block_size, "cuda")) as pair:
        for handover in handovers(pair, TOKENS, found.memcpy_gb_per_s):
            found.handovers.append(handover)
            yield handover
        found.nccl = pair.nccl() or "it serves them"
    yield f"NCCL, of two ranks on this GPU: {found.nccl}"


def main() -> int:
    """0 where everything was measured."""
    parser = argparse.ArgumentParser(description="Measure the KV handover on one GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result file")
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of the kernels' pool")
    options = parser.parse_args()
    if not torch.cuda.is_available() or not pack.compiled():
        print("gpu_kvtransfer: no CUDA device, or no Triton that works on it: nothing was measured", file=sys.stderr)
        return 1
    found = Found(torch.cuda.get_device_name(), memcpy("cuda", options.size))
    for step in _steps(found, options.size):  # written after each, so that a run cut short leaves what it found
        print(step, flush=True)
        path = write("gpu_kvtransfer", "gpu_kvtransfer", asdict(found), {"torch": torch.__version__}, options.out)
    print(f"wrote {path.name}")
    missing = found.missing(("cuda-ipc", "tcp"))
    for what in missing:
        print(f"gpu_kvtransfer: not measured: {what}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
