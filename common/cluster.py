"""What the processes of a cluster say of themselves: workers and gateways to the controller, the controller to
gateways, and the parent, which owns all processes, to the controller. `protos/cluster.py` puts it on the wire.

    worker ──WorkerStatus──▶ controller ◀──Traffic, TraceAnswer── gateway
                              │      └──Members, TraceQuestion──▶
                              └──Launch, End──▶ parent ──Processes──▶ (back)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from .messages import Load


class WorkerState(enum.StrEnum):
    """How far a worker is.

    draining    takes nothing new; what runs there ends there
    leaving     takes nothing new; what runs there moves to other workers
    failed      given up, after too many deaths
    """

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    LEAVING = "leaving"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's report to the controller, each second and at each change. `load` is None until it is ready."""

    name: str
    role: str
    state: WorkerState
    address: str = ""
    epoch: int = 0
    progress: float = 0.0
    detail: str = ""
    pid: int = 0
    device: str = ""
    load: Load | None = None


@dataclass(frozen=True, slots=True)
class Members:
    """All workers that the controller knows, without their loads; `version` grows with each change."""

    version: int
    workers: tuple[WorkerStatus, ...] = field(default=())


# --- gateway ↔ controller -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GatewayHello:
    """The first message on a gateway's stream: who it is and where clients reach it."""

    name: str
    url: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one gateway saw in the last `seconds`. Lists of latencies hold at most `MAX_SAMPLES` values, in seconds, one
    a request that reached the stage in this window.

    arrived, prompt_tokens      requests admitted, and the tokens of their prompts
    started, cached_tokens      requests whose prefill began, and what of them was found in a cache
    finished, output_tokens     requests that ended well; tokens that came, of all requests
    failed                      requests that ended with an error, refusals at the door included
    queue_s                     from arrival to the start of prefill
    ttft_s                      from arrival to the first token
    tpot_s                      mean time between the tokens of a request that has ended
    waiting, running            requests without and with a worker, now
    oldest_wait_s               age of the oldest request that has no token yet, now: queues show here first
    """

    seconds: float
    arrived: int = 0
    prompt_tokens: int = 0
    started: int = 0
    cached_tokens: int = 0
    finished: int = 0
    output_tokens: int = 0
    failed: int = 0
    queue_s: tuple[float, ...] = ()
    ttft_s: tuple[float, ...] = ()
    tpot_s: tuple[float, ...] = ()
    waiting: int = 0
    running: int = 0
    oldest_wait_s: float = 0.0


MAX_SAMPLES = 256


@dataclass(frozen=True, slots=True)
class Span:
    """One stage of a request, in seconds since it arrived. `end` None: it goes on. `worker`: empty where it is with no
    worker. `what`: waiting, queued, prefill, handover, decode, failed."""

    what: str
    worker: str
    begin: float
    end: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """One request from end to end, as its router saw it. `outcome`: empty while it runs, a finish reason, or an error's
    code. `ago_s`: seconds since it arrived."""

    request_id: str
    gateway: str
    ago_s: float
    outcome: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class TraceQuestion:
    """Controller → gateway: what do you know of this request? An empty id asks for the slowest of the recent ones."""

    question: int
    request_id: str


@dataclass(frozen=True, slots=True)
class TraceAnswer:
    """Gateway → controller; `trace` None: nothing (any more)."""

    question: int
    trace: Trace | None


FromGateway = GatewayHello | Traffic | TraceAnswer
FromController = Members | TraceQuestion

# --- controller ↔ parent --------------------------------------------------------------------------------------------


class Phase(enum.StrEnum):
    """How a process that the parent keeps running stands."""

    STARTING = "starting"
    """Asked for; on Ray this may last, while resources are missing."""
    RUNNING = "running"
    WAITING = "waiting"
    """It died, and starts again after a delay."""
    GIVEN_UP = "given_up"
    """It died too often, or cannot start; it is not started again until it is launched anew."""
    ENDING = "ending"


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """One process. `config` is the hash of what it was launched with (`Launch.digest`): tells whether it is the one
    that is wanted. `why`: what ended it last. `age_s`: since its last start."""

    name: str
    phase: Phase
    config: str = ""
    pid: int = 0
    node: str = ""
    restarts: int = 0
    why: str = ""
    last_lines: tuple[str, ...] = ()
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Processes:
    """All processes of the parent, with a version that grows with each change."""

    version: int
    processes: tuple[ProcessStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """Keep this process running. `kind` and `config` as in the line that a child reads (`deploy/launch`); `resources`
    is the JSON of a `Resources`. Launching a name that runs already with the same digest does nothing."""

    name: str
    kind: str
    config: bytes
    threads: int
    resources: bytes
    digest: str


@dataclass(frozen=True, slots=True)
class End:
    """End this process for good: SIGTERM, and SIGKILL after `within_s`. No error if it is not there."""

    name: str
    within_s: float


@dataclass(frozen=True, slots=True)
class LogQuestion:
    """The lines of a process's log from number `after` on, `limit` at most; negative: the last `-after` lines."""

    name: str
    after: int
    limit: int


@dataclass(frozen=True, slots=True)
class LogLines:
    """`next`: what to ask for next. Lines older than the parent keeps are skipped."""

    next: int
    lines: tuple[str, ...]
