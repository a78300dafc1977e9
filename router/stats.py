"""What the router has counted, and how its workers stand: the numbers behind /metrics."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

from ..common.cluster import MAX_SAMPLES
from ..common.messages import Load
from ..common.types import Role


@dataclass(slots=True)
class Samples:
    """A growing number of values, in seconds, of which the last `MAX_SAMPLES` are kept."""

    count: int = 0
    _last: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))

    def add(self, seconds: float) -> None:
        self.count += 1
        self._last.append(seconds)

    def since(self, count: int) -> tuple[float, ...]:
        """Those that came after the first `count`, as far as they are kept."""
        new = min(self.count - count, len(self._last))
        return tuple(islice(self._last, len(self._last) - new, None))


@dataclass(slots=True)
class Stats:
    """Counters since the router's start.

    submitted    requests admitted, with `prompt_tokens` to prefill, `cached_tokens` of which a worker had in its cache
    decisions    placements by reason (cold, prefix, load)
    finished     requests by finish reason
    failed       requests by error code, refused at the door included
    retries      attempts given up, by error code
    losses       workers lost
    moves        running requests that were to move to another worker: moved or stayed
    queue_s      of each request whose prefill began: since its arrival
    ttft_s       of each request with a first token: since its arrival
    tpot_s       of each request that ended with two tokens or more: mean time between them
    """

    submitted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
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
    queue_s: Samples = field(default_factory=Samples)
    ttft_s: Samples = field(default_factory=Samples)
    tpot_s: Samples = field(default_factory=Samples)

    def arrived(self, prompt_tokens: int) -> None:
        """A request was admitted."""
        self.submitted += 1
        self.prompt_tokens += prompt_tokens

    def started(self, waited_s: float, cached_tokens: int) -> None:
        """A request's prefill began, for the first time."""
        self.queue_s.add(waited_s)
        self.cached_tokens += cached_tokens


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
    """The router at one moment.

    running    requests that a worker has
    waiting    requests that no worker has yet
    oldest     when the oldest request that has no token yet arrived, on the router's clock; None where all have
    members    workers of the cluster by (role, state), those included with which no session stands
    """

    workers: tuple[WorkerSnapshot, ...]
    running: int
    waiting: int
    index_entries: int
    stats: Stats
    oldest: float | None = None
    members: Mapping[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the fleet can take, from the workers' handshakes. `max_model_len`: prompt and output of one request."""

    max_model_len: int
    vocab_size: int
    model: str
