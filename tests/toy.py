"""A model that is a hash function: the next token is a hash of all KV that the block table shows, layer by layer.

Its KV of a token is the token and its position, written into a pool of plain bytes. If a block is lost, swapped,
stale, sent to the wrong place or read before it is there, the tokens differ from `oracle`, which knows no blocks.
No torch, so that whole workers, handovers and failures run in milliseconds.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from baton.common.config import EngineConfig, HandoverConfig, WorkerConfig
from baton.common.errors import HandoverFailed
from baton.common.types import Request, Role, SamplingParams
from baton.engine.plan import OnLayer, Sampled, Slice, StepPlan

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


class ToyPool:
    """A `BlockStore` of bytes."""

    def __init__(self, num_blocks: int) -> None:
        self.num_layers = LAYERS
        self.num_blocks = num_blocks
        self.block_bytes = BLOCK_SIZE * ENTRY
        self.bytes = np.zeros((LAYERS, num_blocks, self.block_bytes), dtype=np.uint8)

    def gather(self, layer: int, blocks: Sequence[int]) -> memoryview:
        return self.bytes[layer, list(blocks)].reshape(-1).data

    def scatter(self, layer: int, blocks: Sequence[int], data: bytes | memoryview) -> None:
        if len(data) != len(blocks) * self.block_bytes:
            raise HandoverFailed("wrong length")
        self.bytes[layer, list(blocks)] = np.frombuffer(data, np.uint8).reshape(len(blocks), -1)


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
            block, offset = divmod(position, BLOCK_SIZE)
            entry = _entry(part.sequence.tokens[position], position, layer)
            row = self.pool.bytes[layer, part.sequence.blocks[block]]
            row[offset * ENTRY : (offset + 1) * ENTRY] = np.frombuffer(entry, np.uint8)

    def _sample(self, part: Slice) -> int:
        kv = b""
        blocks = part.sequence.blocks[: -(-part.end // BLOCK_SIZE)]
        for layer in range(LAYERS):
            kv += bytes(self.pool.gather(layer, blocks))[: part.end * ENTRY]
        return _next(kv)


@dataclass
class ToyEngine:
    """What `worker.assembly.Worker` needs."""

    num_blocks: int = 64
    fingerprint: str = "toy"
    max_model_len: int = 200
    vocab_size: int = VOCAB
    eos_ids: frozenset[int] = frozenset({EOS})

    def __post_init__(self) -> None:
        self.pool = ToyPool(self.num_blocks)
        self.runner = ToyRunner(self.pool)


def worker_config(name: str, role: Role, **handover: object) -> WorkerConfig:
    return WorkerConfig(
        name=name,
        role=role,
        engine=EngineConfig(model="toy", block_size=BLOCK_SIZE, max_batch_tokens=32, max_running=64),
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
