"""What may be set: the fields, their types, and the few rules that types do not tell.

A field has a path, by which files, variables and messages name it (`pools.long.engine.tp`), and a rule path, by which
its type and rules are known: that of its dataclass (`engine.tp`), wherever it stands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from ...common.config import TRANSPORTS, EngineConfig, GatewayConfig, HandoverConfig, RouterConfig, WorkerConfig
from ...common.kv_format import ITEM_BYTES
from ...common.types import Role
from ..control.planner import AutoscaleConfig
from ..launch.launcher import Resources

DEFAULT_MAX = 64
"""Workers of a pool, at most, where nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """Workers that are alike: how many, what they do, how they compute, and what they need of a node. `engine` lacks
    the model and `engine.threads` the share of one worker, both of which `cluster.py` fills in. A planner keeps the
    pool between `min` and `max` workers."""

    name: str
    role: Role
    count: int
    engine: EngineConfig
    handover: HandoverConfig = field(default_factory=HandoverConfig)
    resources: Resources = field(default_factory=Resources)
    min: int = 0
    max: int = DEFAULT_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """One cluster. The sections hold the values that all processes of a kind share; what differs between processes
    (names, ports, secrets) is filled in by `cluster.py`."""

    model: str = "demo"
    model_name: str = ""
    """Name that clients ask for; empty: derived from `model`."""
    prefill: int = 1
    decode: int = 1
    colocated: int = 0
    pools: tuple[PoolConfig, ...] = ()
    """All workers. `resolve` makes pools of the three counts above where the configuration names none."""
    name: str = "default"
    """Of the cluster, by which commands find it on this machine."""
    launcher: str = "local"
    gateways: int = 1
    """HTTP doors, which share the port."""
    admin_host: str = "127.0.0.1"
    admin_port: int = 0
    """Of the operators' API; 0: any free one."""
    admin_token: str = ""
    """What operators send; empty: a random one, which commands on this machine find by themselves."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    api_keys: tuple[str, ...] = ()
    threads: int = 0
    """CPU threads of all workers together; 0: one for each core."""
    log_dir: str = ""
    """Folder for one log file a process; empty: all logs go to standard error."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(model=""))
    prefill_engine: EngineConfig = field(default_factory=lambda: EngineConfig(model=""))
    """As `engine`, but for what is set here: the engine of prefill workers. A pool's own `engine` goes before it."""
    decode_engine: EngineConfig = field(default_factory=lambda: EngineConfig(model=""))
    """The same for decode workers."""
    handover: HandoverConfig = field(default_factory=HandoverConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    worker: WorkerConfig = field(
        default_factory=lambda: WorkerConfig(name="", role=Role.COLOCATED, engine=EngineConfig(model=""))
    )
    gateway: GatewayConfig = field(default_factory=lambda: GatewayConfig(model="", model_name=""))
    autoscale: AutoscaleConfig = field(default_factory=AutoscaleConfig)


@dataclass(frozen=True, slots=True)
class Setting:
    """One value and where it came from: `--port`, `BATON_PORT`, or `baton.yaml:3: port`."""

    path: str
    value: Any
    origin: str


SECTIONS: dict[str, tuple[type, frozenset[str]]] = {
    "engine": (EngineConfig, frozenset({"model", "threads"})),
    "handover": (HandoverConfig, frozenset()),
    "router": (RouterConfig, frozenset()),
    "worker": (
        WorkerConfig,
        frozenset({"name", "role", "engine", "handover", "model_name", "port", "controller", "cluster_token"}),
    ),
    "gateway": (
        GatewayConfig,
        frozenset(
            {
                *("model", "model_name", "name", "host", "port", "api_keys", "controller", "cluster_token"),
                *("router", "block_size", "max_model_len"),
            }
        ),
    ),
    "autoscale": (AutoscaleConfig, frozenset()),
    "pool": (PoolConfig, frozenset({"name", "engine", "handover", "resources"})),
    "resources": (Resources, frozenset({"pool", "ranks", "placement"})),
}
"""Section, its type, and the fields of it that are not a user's to set there."""

OVERLAYS = {Role.PREFILL: "prefill_engine", Role.DECODE: "decode_engine", Role.COLOCATED: "engine"}
"""The section that the engines of a role begin with."""

TOP_SECTIONS = ("engine", "prefill_engine", "decode_engine", "handover", "router", "worker", "gateway", "autoscale")
POOL_SECTIONS = ("engine", "handover", "resources")

NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
"""Of pools and clusters: they become names of processes and files, and part of variables."""


def rule_path(path: str) -> str:
    """The path under which `KNOWN` and the rules below know a field: `pools.long.engine.tp` is an `engine.tp`."""
    section, dot, name = path.rpartition(".")
    parts = section.split(".")
    if parts[0] == "pools":
        section = {2: "pool", 3: parts[-1]}.get(len(parts), section)
    elif section in OVERLAYS.values():
        section = "engine"
    return section + dot + name


def _known() -> dict[str, Any]:
    """Rule path of every field that may be set, with its type."""
    top = get_type_hints(ServeConfig).items()
    known = {name: kind for name, kind in top if name not in (*TOP_SECTIONS, "pools")}
    for section, (kind, managed) in SECTIONS.items():
        hints = get_type_hints(kind)
        known |= {f"{section}.{f.name}": hints[f.name] for f in fields(kind) if f.name not in managed}
    return known | {"pool.placement": str}


KNOWN = _known()

ZERO_ALLOWED = {
    *("prefill", "decode", "colocated", "port", "admin_port", "threads"),
    *("engine.max_model_len", "engine.kv_memory", "handover.headroom_tokens", "gateway.drain_s", "worker.drain_s"),
    *("pool.count", "pool.min", "resources.cpus", "resources.gpus"),
    *("autoscale.hold_down_s", "autoscale.gain", "autoscale.min_workers", "autoscale.max_workers"),
    *("autoscale.min_prefill", "autoscale.max_prefill", "autoscale.min_decode", "autoscale.max_decode"),
}
SHARES = {"engine.device_memory", "autoscale.attainment", "autoscale.shrink_below", "autoscale.gain"}
"""Parts of a whole: at most 1."""
CHOICES = {
    "launcher": ("local", "ray"),
    "pool.role": tuple(role.value for role in Role),
    "pool.placement": ("spread", "pack"),
    "handover.transport": ("auto", *TRANSPORTS),
    "engine.dtype": ("auto", "float32", "bfloat16", "float16"),
    "engine.kv_dtype": ("auto", *ITEM_BYTES),
    "engine.overlap": ("auto", "on", "off"),
}


def siblings(path: str) -> list[str]:
    """What may stand where `path` stands: fields and sections."""
    section = rule_path(path).rpartition(".")[0]
    names = [known.rpartition(".")[2] for known in KNOWN if known.rpartition(".")[0] == section]
    inner = {"": (*TOP_SECTIONS, "pools"), "pool": POOL_SECTIONS}.get(section, ())
    return sorted({*names, *inner})
