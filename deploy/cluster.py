"""From what was asked for to one configuration for each process."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..common.config import GatewayConfig, WorkerConfig, split_threads
from ..common.types import Role
from .settings import ServeConfig


def worker_configs(config: ServeConfig, model: Path, model_name: str) -> list[WorkerConfig]:
    """One for each worker, named `prefill-0`, `decode-0`, … The address of the controller and the cluster's secret
    are still empty: the controller fills them in."""
    counts = {Role.PREFILL: config.prefill, Role.DECODE: config.decode, Role.COLOCATED: config.colocated}
    engines = {Role.PREFILL: config.prefill_engine, Role.DECODE: config.decode_engine, Role.COLOCATED: config.engine}
    members = [(role, index) for role, count in counts.items() for index in range(count)]
    threads = split_threads(config.threads or usable_cores(), len(members))
    return [
        replace(
            config.worker,
            name=f"{role}-{index}",
            role=role,
            engine=replace(engines[role], model=str(model), threads=share),
            handover=config.handover,
            model_name=model_name,
        )
        for (role, index), share in zip(members, threads, strict=True)
    ]


def gateway_config(config: ServeConfig, model: Path, model_name: str) -> GatewayConfig:
    """The one gateway of this machine; controller and secret are still empty."""
    return replace(
        config.gateway,
        model=str(model),
        model_name=model_name,
        host=config.host,
        port=config.port,
        api_keys=config.api_keys,
        router=config.router,
        block_size=config.engine.block_size,
        max_model_len=config.engine.max_model_len,
    )


def usable_cores() -> int:
    """Cores that this process may run on, which a container or `taskset` can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
