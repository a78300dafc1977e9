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
from baton.engine.plan import Ended, Launched, OnLayer, Sampled, Slice, StepPlan
from baton.kvtransfer.host_store import Bytes, HostStore
from baton.kvtransfer.shm import SharedMemory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from baton.engine.follower import Followers
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


def kv_format(block_size: int, heads: int = 1, tp: int = 1) -> KvFormat:
    return KvFormat(LAYERS, heads, ENTRY // 2 // heads, block_size, "int8", tp)


FORMAT = kv_format(BLOCK_SIZE)
"""As transports see it: K is the first half of an entry, V the second. (The toy's scales are never written.)"""


class ToyPool:
    """One rank's blocks of bytes in shared memory. `heads`: of all ranks, among which they share each half of an entry.

    bytes   [layers, blocks, 2, heads of this rank, block_size, bytes of a head]
    """

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE, heads: int = 1, tp: int = 1, rank: int = 0):
        self.format = form = kv_format(block_size, heads, tp)
        self.block_size = block_size
        self.shared = SharedMemory(LAYERS * num_blocks * form.block_bytes)
        self.lie_in(self.shared.memory)
        self.store = HostStore(self.shared.memory, form, rank, num_blocks, _never)
        self._heads = list(form.heads(rank))

    def lie_in(self, memory: NDArray[np.uint8]) -> None:
        """Have the blocks in this memory."""
        form = self.format
        rows = memory.reshape(LAYERS, -1, 2, form.heads_per_rank, form.row_bytes)
        elements = rows[..., : self.block_size * form.head_dim]
        self.bytes = elements.reshape(*elements.shape[:-1], self.block_size, form.head_dim)

    def write(self, layer: int, block: int, offset: int, entry: bytes) -> None:
        halves = np.frombuffer(entry, np.uint8).reshape(2, self.format.num_kv_heads, -1)
        self.bytes[layer, block, :, :, offset] = halves[:, self._heads]

    def read(self, blocks: Sequence[int], count: int) -> NDArray[np.uint8]:
        """This rank's share of the first `count` entries that these blocks hold: [layers, count, 2, heads, bytes]."""
        found = self.bytes[:, blocks[: -(-count // self.block_size)]].transpose(0, 1, 4, 2, 3, 5)
        return found.reshape(LAYERS, -1, *found.shape[3:])[:, :count]


def _never(*_: object) -> Bytes:
    raise AssertionError("all toys keep one type")


@dataclass
class ToyRunner:
    """Writes KV, calls `on_layer`, reads it back through the block table. `before` runs ahead of each step."""

    pool: ToyPool
    steps: list[StepPlan] = field(default_factory=list)
    before: object = None

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        if callable(self.before):
            self.before(plan)
        self.steps.append(StepPlan(plan.budget, list(plan.slices)))
        self.forward(plan.slices, on_layer)
        return Ended([Sampled(_next(self.kv(part).tobytes())) if part.samples else None for part in plan.slices])

    def forward(self, slices: Sequence[Slice], on_layer: OnLayer | None) -> None:
        for layer in range(LAYERS):
            for part in slices:
                self._write(part, layer)
            if on_layer is not None:
                on_layer(layer)

    def kv(self, part: Slice) -> NDArray[np.uint8]:
        """What the next token is a hash of; see `ToyPool.read`."""
        return self.pool.read(part.sequence.blocks, part.end)

    def _write(self, part: Slice, layer: int) -> None:
        for position in range(part.start, part.end):
            block, offset = divmod(position, self.pool.block_size)
            entry = _entry(part.sequence.tokens[position], position, layer)
            self.pool.write(layer, part.sequence.blocks[block], offset, entry)


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
    heads: int = 1
    followers: Followers | None = None
    """The other of two ranks; see `tests/worker/toy_ranks.py`."""

    def __post_init__(self) -> None:
        self.pool = ToyPool(self.num_blocks, self.block_size, self.heads, 1 if self.followers is None else 2)
        self.store, self.shared = self.pool.store, self.pool.shared
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
