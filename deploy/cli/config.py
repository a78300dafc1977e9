"""`baton config check`: what a configuration resolves to, before anything is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..settings import PoolConfig, ServeConfig, from_environment, from_yaml, resolve
from . import tables


def check(file: Annotated[Path, typer.Argument(metavar="FILE", help="A file for `baton serve --config`.")]) -> None:
    """Check a configuration file and show what it resolves to: pools, workers, and
    what they need of their nodes.

    Variables that are set now (BATON_PORT, BATON_POOLS__PREFILL__COUNT) count.
    What is wrong is named with line and field, and the exit code is 2. No model
    is looked for and nothing is started.

    Example: baton config check deploy/examples/laptop.yaml
    """
    config = resolve([*from_yaml(file), *from_environment(os.environ)])
    console = tables.console()
    console.print(f"{escape(str(file))} is right\n")
    console.print(_cluster(config), soft_wrap=True)
    console.print(_pools(config.pools))
    console.print(f"\n{totals(config)}", soft_wrap=True)


def _cluster(config: ServeConfig) -> str:
    facts = [f"model {config.model}", f"launcher {config.launcher}"]
    facts.append(f"{config.gateways} gateway{'s' if config.gateways > 1 else ''} at {config.host}:{config.port}")
    facts.append("API keys: " + (str(len(config.api_keys)) if config.api_keys else "none, anyone may ask"))
    if config.autoscale.enabled:
        facts.append(f"autoscale to TTFT {config.autoscale.ttft_s:g} s, {config.autoscale.tpot_s * 1e3:g} ms a token")
    return escape(f"cluster {config.name}: {', '.join(facts)}\n")


def _pools(pools: tuple[PoolConfig, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("pool", "role", "workers", "limits", "tp", "KV a rank", "dtype", "each worker needs", "placed"):
        table.add_column(column)
    for pool in pools:
        engine = pool.engine
        names = ", ".join(f"{pool.name}-{index}" for index in range(pool.count))
        dtype = engine.dtype if engine.kv_dtype == "auto" else f"{engine.dtype}, KV {engine.kv_dtype}"
        memory = tables.size(engine.kv_memory) if engine.kv_memory else "auto"
        facts = (names, f"{pool.min}–{pool.max}", str(engine.tp), memory, dtype)
        table.add_row(pool.name, pool.role, *map(escape, facts), escape(needs(pool)), pool.resources.placement)
    return table


def needs(pool: PoolConfig) -> str:
    """What one worker of this pool takes of the node that it is placed on, all its ranks together."""
    resources = pool.resources
    found = [f"{resources.cpus * resources.ranks:g} CPU"] if resources.cpus else []
    if resources.gpus:
        kind = f" {resources.accelerator_type}" if resources.accelerator_type else ""
        found.append(f"{resources.gpus * resources.ranks:g} GPU{kind}")
    found += [f"{amount * resources.ranks:g} {name}" for name, amount in resources.custom]
    return ", ".join(found) or "nothing"


def totals(config: ServeConfig) -> str:
    """What all workers take together."""
    ranks = [(pool.count * pool.resources.ranks, pool.resources) for pool in config.pools]
    cpus, gpus = sum(n * r.cpus for n, r in ranks), sum(n * r.gpus for n, r in ranks)
    workers = sum(pool.count for pool in config.pools)
    return f"in all {workers} workers, {sum(n for n, _ in ranks)} ranks, {cpus:g} CPU, {gpus:g} GPU"
