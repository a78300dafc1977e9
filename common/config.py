"""One frozen configuration for each kind of process, resolved before anything is built.

The launcher writes a process's configuration as one JSON line to its standard input (`json_form.py`). Memory is in
bytes, time in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .types import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a worker computes. What changes a number goes into the fingerprint; how it keeps KV, into its `KvFormat`."""

    model: str
    """Folder with config.json, safetensors and tokenizer.json."""
    dtype: str = "auto"
    """auto: float32 on CPU, bfloat16 on CUDA."""
    kv_dtype: str = "auto"
    """auto: as `dtype`; otherwise a key of `kv_format.ITEM_BYTES`."""
    device: str = "auto"
    block_size: int = 16
    kv_memory: int = 0
    """Bytes of the KV pool, of each rank. 0: 1 GiB on a CPU; on a GPU all that is free once weights, the largest step
    and graphs have what they need. Held from the start, on a CPU where the system has huge pages."""
    device_memory: float = 1.0
    """Share of a GPU's memory that this worker may use, all told. Workers that share a GPU share its memory: less than
    0.5 each where there are two. Counts where `kv_memory` is 0."""
    tp: int = 1
    """Ranks that share the model by tensor parallelism, each a process: query heads and inner size must divide."""
    max_model_len: int = 0
    """0: what the model's config.json says, bounded by what the KV pool holds."""
    max_batch_tokens: int = 512
    """Tokens that one step computes at most: the prefill chunk."""
    max_running: int = 256
    """Sequences that decode together at most, or whose prompts are computed together."""
    overlap: str = "auto"
    """Whether a step is planned and launched while another computes (`engine/loop.py`): on, off, or auto, which is on
    where the device is not the processor, and a worker has one rank."""
    graphs: bool = True
    """On a GPU, a decode step is recorded once for each size of batch and then started as one (`engine/graphs.py`)."""
    deterministic: bool = False
    """A request gets the same bits alone and in any batch, however its prompt is cut and whoever continues it, at the
    price of speed. A CPU's compiled operations are so in any case."""
    threads: int = 0
    """CPU threads of this worker, all ranks together; 0: all cores."""
    dummy_weights: bool = False


TRANSPORTS = ("cuda-ipc", "shm", "process-group", "tcp", "grpc")
"""How KV can travel, the best way first (`kvtransfer/transport.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverConfig:
    """Limits of the KV handover."""

    lease_s: float = 5.0
    """A handover that is neither renewed nor fed for this long is aborted by its target."""
    max_sending: int = 16
    """Handovers that one decode worker takes in at a time, and that one prefill worker opens to it."""
    headroom_tokens: int = 64
    """Room for output that a reservation includes beside the prompt; for a long request that moves while it runs, more
    (`decode/moves.py`). Alike on all workers."""
    transport: str = "auto"
    """How KV travels to this worker: auto (the best that both ends have), cuda-ipc, shm, process-group, tcp or grpc.
    One that a pair cannot use, or that fails, gives way to the next. Between CPUs a process group is only had, and
    only let in, by who asks for it."""
    checksums: bool = True
    """Every piece is hashed at both ends; what does not match is recomputed."""
    frame_bytes: int = 256 << 20
    """Payload of one data frame at most: large, because each costs some 100 µs of Python at either end beside its
    bytes. By shared memory alone, where the two ends work on one frame together; by others 2 to 32 MiB are the most
    (`kvtransfer/outlet.py`)."""
    window_frames: int = 3
    """Credits: at most so many frames are in flight from one source's rank to one target's, or as many bytes in up to
    16 shorter ones; by tcp, whose frames are short, so many times 8 MiB. Enough that neither end waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    name: str
    role: Role
    engine: EngineConfig
    handover: HandoverConfig = field(default_factory=HandoverConfig)
    model_name: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    """For control messages and gRPC. KV over sockets comes in at any ports that are free, another for each rank, so a
    firewall between workers has to let them reach all of each other's."""
    controller: str = ""
    """host:port of the controller; empty: alone (tests)."""
    cluster_token: str = ""
    """Shared secret of all processes of this cluster; also keys the block hashes."""
    max_waiting: int = 1024
    drain_s: float = 60.0
    """How long a worker that is told to stop may take for its requests to move elsewhere or to end."""
    lease_s: float = 5.0
    """Silence after which a router or peer is taken for gone."""
    heartbeat_s: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How requests are placed, bounded and tried again."""

    lease_s: float = 5.0
    """Silence after which a worker is taken out and its requests go elsewhere."""
    heartbeat_s: float = 0.5
    stall_s: float = 60.0
    """An engine loop that has not gone round for this long is taken for hung, though its process answers."""
    max_requests: int = 1024
    """Requests that are admitted and not finished; more get `Overloaded`."""
    max_attempts: int = 12
    """Attempts of one request, refusals included, before it fails."""
    max_losses: int = 3
    """Workers lost while they held a request, before it fails as `PoisonRequest`."""
    place_timeout_s: float = 30.0
    """How long a request may wait for a worker to appear or to have room."""
    return_answers: bool = False
    """Hand the KV of each answer back to the prefill worker of its prompt, where a next turn will find it."""
    max_index_blocks: int = 4_000_000
    """Bound of the prefix index, in (hash, worker) entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    model: str
    """Folder of the model: config.json, tokenizer.json, chat template."""
    model_name: str
    name: str = "gateway"
    """Of this process, among the cluster's."""
    host: str = "127.0.0.1"
    port: int = 8000
    reuse_port: bool = False
    """Share the port with other gateways of this machine; the kernel spreads connections over them (SO_REUSEPORT)."""
    own_port: int = 0
    """A second port, of this gateway alone: for probes, and for Prometheus, which on a shared port meets any of them.
    0: none."""
    api_keys: tuple[str, ...] = ()
    controller: str = ""
    cluster_token: str = ""
    router: RouterConfig = field(default_factory=RouterConfig)
    block_size: int = 16
    max_model_len: int = 0
    request_timeout_s: float = 600.0
    max_body_bytes: int = 8 << 20
    max_stream_backlog: int = 4096
    """Tokens that a client may leave unread before its request is aborted."""
    drain_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """What the controller is told. What the cluster shall be, it loads from its parent."""

    parent: str
    """host:port of the parent, which owns the processes and keeps the desired state."""
    host: str = "127.0.0.1"
    port: int = 0
    """Where workers and gateways report."""
    cluster_token: str = ""
    admin_host: str = "127.0.0.1"
    admin_port: int = 0
    admin_token: str = ""
    """What operators must send."""
    model_name: str = ""
    launcher: str = "local"
    """Both for people, who see them in the status."""
    round_s: float = 1.0
    """It looks at everything this often, and at each change."""
    silence_s: float = 60.0
    """A worker that has not reported for this long is killed and started again. Routers have left a frozen one long
    before, and take it back when it wakes: so this is long."""


def split_threads(total: int, users: int) -> list[int]:
    """Shares of `total` threads, even up to one, each at least 1.

    Two processes that both use all cores slow each other down by an order of magnitude: their threads wait for each
    other in spin loops.
    """
    return [max(1, total // users + (index < total % users)) for index in range(users)]
