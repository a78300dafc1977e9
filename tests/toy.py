"""A model that is a hash function: the next token is a hash of all KV that the block table shows, layer by layer.

Its KV of a token is the token and its position, written into a pool of plain bytes. If a block is lost, swapped,
stale, sent to the wrong place or read before it is there, the tokens differ from `oracle`, which knows no blocks.
No torch, so that whole workers, handovers and failures run in milliseconds.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from baton.common.config import EngineConfig, HandoverConfig, WorkerConfig
from baton.common.kv_format import KvFormat
from baton.common.messages import Endpoint
from baton.common.types import Request, Role, SamplingParams, WorkerRef
from baton.engine.plan import OnLayer, Sampled, Slice, StepPlan
from baton.kvtransfer.host_store import Bytes, HostStore
from baton.kvtransfer.shm import SharedMemory

if TYPE_CHECKING:
    from baton.kvtransfer.process_group import ProcessGroups

LAYERS = 3
BLOCK_SIZE = 4
ENTRY = 8
"""Bytes of KV of one token in one layer."""

VOCAB = 1000
EOS = 999


def _next(kv: bytes) -> int:
    return zlib.crc32(kv) % (VOCAB - 1)  # never EOS by chance


def _entry(token: int, position: int, layer: int) -> bytes:
    return (token + 1).to_bytes(4, "little") + (position * LAYERS + layer + 1).to_bytes(4, "little")


def oracle(prompt: Sequence[int], count: int) -> list[int]:
    """What follows `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(_next(b"".join(_entry(t, p, layer) for layer in range(LAYERS) for p, t in enumerate(tokens))))
    return tokens[len(prompt) :]


def kv_format(block_size: int) -> KvFormat:
    return KvFormat(num_layers=LAYERS, num_kv_heads=1, head_dim=ENTRY // 2, block_size=block_size, dtype="int8")


FORMAT = kv_format(BLOCK_SIZE)
"""As transports see it: K is the first half of an entry, V the second. (The toy's scales are never written.)"""


class ToyPool:
    """Blocks of bytes in shared memory: `bytes` [layers, blocks, 2, block_size, half an entry]."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        form = kv_format(block_size)
        self.block_size = block_size
        self.shared = SharedMemory(LAYERS * num_blocks * form.block_bytes)
        rows = self.shared.memory.reshape(LAYERS, num_blocks, 2, form.row_bytes)
        self.bytes = rows[..., : block_size * ENTRY // 2].reshape(LAYERS, num_blocks, 2, block_size, ENTRY // 2)
        self.store = HostStore(self.shared.memory, form, 0, num_blocks, _never)

    def write(self, layer: int, block: int, offset: int, entry: bytes) -> None:
        self.bytes[layer, block, :, offset] = np.frombuffer(entry, np.uint8).reshape(2, -1)

    def read(self, layer: int, blocks: Sequence[int]) -> bytes:
        """Entries of these blocks, one after the other."""
        return self.bytes[layer, list(blocks)].transpose(0, 2, 1, 3).tobytes()


def _never(*_: object) -> Bytes:
    raise AssertionError("all toys keep one type")


@dataclass
class ToyRunner:
    """Writes KV, calls `on_layer`, reads it back through the block table. `before` runs ahead of each step."""

    pool: ToyPool
    steps: list[StepPlan] = field(default_factory=list)
    before: object = None

    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> list[Sampled | None]:
        if callable(self.before):
            self.before(plan)
        self.steps.append(StepPlan(plan.budget, list(plan.slices)))
        for layer in range(LAYERS):
            for part in plan.slices:
                self._write(part, layer)
            if on_layer is not None:
                on_layer(layer)
        return [Sampled(self._sample(part)) if part.samples else None for part in plan.slices]

    def _write(self, part: Slice, layer: int) -> None:
        for position in range(part.start, part.end):
            block, offset = divmod(position, self.pool.block_size)
            entry = _entry(part.sequence.tokens[position], position, layer)
            self.pool.write(layer, part.sequence.blocks[block], offset, entry)

    def _sample(self, part: Slice) -> int:
        kv = b""
        blocks = part.sequence.blocks[: -(-part.end // self.pool.block_size)]
        for layer in range(LAYERS):
            kv += self.pool.read(layer, blocks)[: part.end * ENTRY]
        return _next(kv)


@dataclass
class ToyEngine:
    """What `worker.assembly.Worker` needs."""

    num_blocks: int = 64
    fingerprint: str = "toy"
    max_model_len: int = 200
    vocab_size: int = VOCAB
    eos_ids: frozenset[int] = frozenset({EOS})
    groups: ProcessGroups | None = None
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        self.pool = ToyPool(self.num_blocks, self.block_size)
        self.store, self.shared = self.pool.store, self.pool.shared
        self.followers = None
        self.runner = ToyRunner(self.pool)


def endpoint(name: str, address: str = "127.0.0.1:9", epoch: int = 1) -> Endpoint:
    """A peer on another machine that keeps the toy's KV."""
    return Endpoint(WorkerRef(name, address, epoch), "toy", FORMAT, "elsewhere", ({"tcp": address},))


def worker_config(name: str, role: Role, block_size: int = BLOCK_SIZE, **handover: object) -> WorkerConfig:
    return WorkerConfig(
        name=name,
        role=role,
        engine=EngineConfig(model="toy", block_size=block_size, max_batch_tokens=32, max_running=64),
        handover=HandoverConfig(**{"lease_s": 2.0, "headroom_tokens": 8, **handover}),  # type: ignore[arg-type]
        model_name="toy",
        cluster_token="secret",
        heartbeat_s=0.1,
        lease_s=2.0,
    )


def request(
    name: str, prompt: Sequence[int], max_tokens: int, prompt_len: int | None = None, **params: object
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, **params)  # type: ignore[arg-type]
    return Request(name, tuple(prompt), prompt_len or len(prompt), sampling, deadline_s=30.0)
