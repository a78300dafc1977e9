"""What the router has counted, and how its workers stand: the numbers behind /metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..common.messages import Load
from ..common.types import Role


@dataclass(slots=True)
class Stats:
    """Counters since the router's start.

    decisions    placements by reason (cold, prefix, load)
    finished     requests by finish reason
    failed       requests by error code, refused at the door included
    retries      attempts given up, by error code
    losses       workers lost
    moves        running requests that were to move to another worker: moved or stayed
    """

    submitted: int = 0
    decisions: Counter[str] = field(default_factory=Counter)
    prefix_hit_tokens: int = 0
    routed_tokens: int = 0
    output_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)
    losses: int = 0
    resyncs: int = 0
    moves: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """One worker at one moment. `queued_tokens` and `batch` include what this router has sent and not heard of yet."""

    name: str
    role: Role
    state: str
    epoch: int
    load: Load
    queued_tokens: int
    batch: int
    index_blocks: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The router at one moment. `running`: requests that a worker has; `waiting`: requests that no worker has yet."""

    workers: tuple[WorkerSnapshot, ...]
    running: int
    waiting: int
    index_entries: int
    stats: Stats


@dataclass(frozen=True, slots=True)
class Limits:
    """What the fleet can take, from the workers' handshakes. `max_model_len`: prompt and output of one request."""

    max_model_len: int
    vocab_size: int
    model: str
