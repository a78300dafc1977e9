"""A model that is a hash function: the next token is a hash of all KV that the block table shows, layer by layer.

Its KV of a token is the token and its position, written into a pool of plain bytes. If a block is lost, swapped,
stale, sent to the wrong place or read before it is there, the tokens differ from `oracle`, which knows no blocks.
No torch, so that whole workers, handovers and failures run in milliseconds.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from baton.common.config import EngineConfig, HandoverConfig, WorkerConfig
from baton.common.errors import TransportFailed
from baton.common.kv_format import KvFormat
from baton.common.messages import Endpoint
from baton.common.types import Request, Role, SamplingParams, TokenLogprob, WorkerRef
from baton.engine.plan import Launched, OnLayer, Results, Slice, StepPlan
from baton.kvtransfer.host_store import Bytes, HostStore
from baton.kvtransfer.shm import SharedMemory
from baton.kvtransfer.transport import Mark

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from baton.engine.follower import Followers
    from baton.kvtransfer.process_group import ProcessGroups

LAYERS = 3
BLOCK_SIZE = 4
ENTRY = 56
"""Bytes of KV of one token in one layer: so many that with blocks of BLOCK_SIZE shared memory can be copied in step."""

TIMEOUT_S = 5.0
VOCAB = 1000
EOS = 999


def _next(kv: bytes) -> int:
    return zlib.crc32(kv) % (VOCAB - 1)  # never EOS by chance


def _entry(token: int, position: int, layer: int) -> bytes:
    return ((token + 1).to_bytes(4, "little") + (position * LAYERS + layer + 1).to_bytes(4, "little")) * (ENTRY // 8)


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


@dataclass(frozen=True)
class Told:
    """What a launch tells the device of a slice: copies, for the host goes on. Where the last token is pending,
    `tokens` lacks it."""

    owner: object
    tokens: list[int]
    blocks: list[int]
    start: int
    end: int
    samples: bool
    asked: bool = False
    """For log-probabilities."""

    @classmethod
    def of(cls, part: Slice) -> Told:
        owner = part.sequence
        known, asked = owner.tokens[part.start : part.end], owner.params.logprobs is not None
        return cls(owner, known, list(owner.blocks), part.start, part.end, part.samples, asked)


def logprob(position: int, token: int) -> TokenLogprob:
    """What the toy says of a token where it is asked: nothing else has the same."""
    return TokenLogprob(-float(position * VOCAB + token))


@dataclass(frozen=True)
class _Now:
    """A step of a device that computes at once."""

    found: Results

    def results(self) -> Results:
        return self.found


@dataclass
class ToyRunner:
    """Writes KV, calls `on_layer`, reads it back through the block table. `before` runs ahead of each step."""

    pool: ToyPool
    before: object = None
    _drawn: dict[object, int] = field(default_factory=dict)
    """By the step before."""

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        return _Now(self.compute(plan, [Told.of(part) for part in plan.parts], on_layer))

    def compute(self, plan: StepPlan, parts: Sequence[Told], on_layer: OnLayer | None) -> Results:
        if callable(self.before):
            self.before(plan)
        for part in parts:
            if len(part.tokens) < part.end - part.start:
                part.tokens.append(self._drawn[part.owner])
        self.forward(parts, on_layer)
        self._drawn = {part.owner: _next(self.kv(part).tobytes()) for part in parts if part.samples}
        tokens = [self._drawn[part.owner] if part.samples else None for part in parts]
        drawn = [
            (row, part.end, token) for row, (part, token) in enumerate(zip(parts, tokens, strict=True)) if part.asked
        ]
        return Results(tokens, {row: logprob(end, token) for row, end, token in drawn if token is not None})

    def forward(self, parts: Sequence[Told], on_layer: OnLayer | None) -> None:
        for layer in range(LAYERS):
            for part in parts:
                self._write(part, layer)
            if on_layer is not None:
                on_layer(layer)

    def kv(self, part: Told) -> NDArray[np.uint8]:
        """What the next token is a hash of; see `ToyPool.read`."""
        return self.pool.read(part.blocks, part.end)

    def _write(self, part: Told, layer: int) -> None:
        for position, token in enumerate(part.tokens, part.start):
            block, offset = divmod(position, self.pool.block_size)
            self.pool.write(layer, part.blocks[block], offset, _entry(token, position, layer))


class LateRunner(ToyRunner):
    """Of a device that is as late as can be: a step that has been launched computes when its results are asked for.
    Who reads too early, or reuses a block that is still to be written, gets wrong tokens."""

    def __init__(self, pool: ToyPool) -> None:
        super().__init__(pool)
        self._last = threading.Event()
        self._last.set()
        pool.store.mark = self._mark  # type: ignore[method-assign]

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        step = _Late(self, plan, [Told.of(part) for part in plan.parts], self._last)
        self._last = step.ended
        for layer in range(LAYERS):
            if on_layer is not None:
                on_layer(layer)
        return step

    def _mark(self) -> Mark:
        return partial(_wait, self._last)


def _wait(ended: threading.Event) -> None:
    if not ended.wait(TIMEOUT_S):
        raise TransportFailed("the device is not there in time")


@dataclass
class _Late:
    runner: LateRunner
    plan: StepPlan
    parts: list[Told]
    before: threading.Event
    ended: threading.Event = field(default_factory=threading.Event)

    def results(self) -> Results:
        assert self.before.is_set(), "steps are collected in their order"
        try:
            return self.runner.compute(self.plan, self.parts, None)
        finally:
            self.ended.set()


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
    late: bool = False
    """Its device is as late as can be, and its worker's loop has two steps under way."""

    def __post_init__(self) -> None:
        self.pool = ToyPool(self.num_blocks, self.block_size, self.heads, 1 if self.followers is None else 2)
        self.store, self.shared = self.pool.store, self.pool.shared
        self.runner = LateRunner(self.pool) if self.late else ToyRunner(self.pool)

    @property
    def overlaps(self) -> bool:
        return self.late


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
