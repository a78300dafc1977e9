"""What an operator sees of a cluster: the answer of the admin API's `/v1/status`, which `baton status` and `baton top`
show. JSON on the wire, these types on both ends."""

from __future__ import annotations

from dataclasses import dataclass

from ...common.messages import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRow:
    """A pool: how many workers it shall have, and how many of them are ready."""

    name: str
    role: str
    tp: int
    wanted: int
    ready: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """A worker. `state` is a `WorkerState`, or `waiting` (it died and starts again after a delay), `silent` (it has not
    reported for a while). `detail`: why it is as it is. Rates are measured by the controller."""

    name: str
    pool: str
    role: str
    state: str
    revision: int
    node: str = ""
    device: str = ""
    pid: int = 0
    age_s: float = 0.0
    restarts: int = 0
    progress: float = 0.0
    detail: str = ""
    load: Load | None = None
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0

    @property
    def kv_used(self) -> float:
        """Share of the KV pool in use by requests; what is only cached counts as free."""
        if self.load is None or not self.load.total_blocks:
            return 0.0
        return 1.0 - (self.load.free_blocks + self.load.cached_blocks) / self.load.total_blocks

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were found in the prefix cache."""
        return self.load.cached_tokens / self.load.prompt_tokens if self.load and self.load.prompt_tokens else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayRow:
    """A gateway; `state`: starting, serving, silent, waiting, failed."""

    name: str
    url: str
    state: str
    pid: int = 0
    running: int = 0
    waiting: int = 0
    restarts: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficRow:
    """The traffic of the last minute, over all gateways. Latencies in seconds; 0 where nothing was measured."""

    requests_per_s: float = 0.0
    failed_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    hit_rate: float = 0.0
    queue_p90_s: float = 0.0
    ttft_p50_s: float = 0.0
    ttft_p99_s: float = 0.0
    tpot_p50_s: float = 0.0
    tpot_p99_s: float = 0.0
    running: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, `ago_s` seconds ago. `level`: info, warning, error."""

    number: int
    ago_s: float
    level: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the planner of pool sizes decided, and why, in one line."""

    ago_s: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """Everything at one moment. `rollout`: how far a rolling restart is; empty: none is under way."""

    model: str
    launcher: str
    revision: int
    controller_age_s: float
    autoscale: bool
    rollout: str
    pools: tuple[PoolRow, ...]
    workers: tuple[WorkerRow, ...]
    gateways: tuple[GatewayRow, ...]
    traffic: TrafficRow
    events: tuple[Event, ...]
    why: tuple[Decision, ...]
