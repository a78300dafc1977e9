"""From what was asked for to what the cluster shall be when it begins."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..common.config import GatewayConfig, split_threads
from .control.desired import Desired, Pool, add
from .settings import PoolConfig, ServeConfig


@dataclass(frozen=True, slots=True)
class Place:
    """What all processes of a cluster are told besides the configuration: which model, under which name, where the
    controller is, on which port gateways listen, and the secret that they share. `own_ports`: one of each gateway
    alone, where there are several."""

    model: Path
    model_name: str
    controller: str
    port: int
    cluster_token: str
    own_ports: tuple[int, ...] = ()


def desired_state(config: ServeConfig, place: Place) -> Desired:
    """Workers named `prefill-0`, `decode-0`, … after their pools, and gateways `gateway-0`, …"""
    desired = Desired(
        pools=tuple(_pool(config, pool, place) for pool in config.pools),
        gateways=tuple(_gateway(config, place, i) for i in range(config.gateways)),
        autoscale=config.autoscale,
    )
    members = [pool for asked, pool in zip(config.pools, desired.pools, strict=True) for _ in range(asked.count)]
    for pool, threads in zip(members, _shares(config) or [0] * len(members), strict=True):
        engine = replace(pool.worker.engine, threads=threads or pool.worker.engine.threads)
        desired = add(desired, replace(pool, worker=replace(pool.worker, engine=engine)))
    return desired


def _pool(config: ServeConfig, pool: PoolConfig, place: Place) -> Pool:
    shares = _shares(config)
    threads = shares[-1] if shares else max(1, int(pool.resources.cpus * pool.resources.ranks))
    engine = replace(pool.engine, model=str(place.model), threads=threads)
    worker = replace(
        config.worker,
        role=pool.role,
        engine=engine,
        handover=pool.handover,
        model_name=place.model_name,
        controller=place.controller,
        cluster_token=place.cluster_token,
    )
    return Pool(name=pool.name, worker=worker, resources=pool.resources, min=pool.min, max=pool.max)


def _shares(config: ServeConfig) -> list[int]:
    """Threads of each worker that there is from the beginning, of those that all may use together. Empty where workers
    are placed on nodes: there each has what it is given."""
    if config.launcher != "local" and not config.threads:
        return []
    return split_threads(config.threads or usable_cores(), sum(pool.count for pool in config.pools))


def _gateway(config: ServeConfig, place: Place, index: int) -> GatewayConfig:
    return replace(
        config.gateway,
        name=f"gateway-{index}",
        model=str(place.model),
        model_name=place.model_name,
        host=config.host,
        port=place.port,
        reuse_port=config.gateways > 1,
        own_port=place.own_ports[index] if place.own_ports else 0,
        api_keys=config.api_keys,
        controller=place.controller,
        cluster_token=place.cluster_token,
        router=config.router,
        block_size=config.pools[0].engine.block_size,
        max_model_len=config.engine.max_model_len,
    )


def usable_cores() -> int:
    """Cores that this process may run on, which a container or `taskset` can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
