"""What a rollout is asked to change: the pools as they shall be. It is checked at the door, before anything starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...common.errors import InvalidRequest
from .. import models
from ..settings import Setting, checked
from .desired import Desired, Pool

SECTIONS = ("engine", "handover", "worker")


def revise(desired: Desired, model: str | None, changes: Mapping[str, Any]) -> tuple[Pool, ...]:
    """The pools with other weights, other options, or as they are.

    model     a checkpoint folder; its tokenizer must be the one that gateways use
    changes   `engine.max_running`, `handover.lease_s`, `worker.drain_s` of all pools, or `POOL.engine.…` of one

    Raises `InvalidRequest` for what cannot be.
    """
    pools = {pool.name: pool for pool in desired.pools}
    if model is not None:
        folder = _folder(model)
        for pool in desired.pools:
            _same_tokenizer(folder, Path(pool.worker.engine.model))
            pools[pool.name] = _with(pool, "engine", "model", str(folder))
    for path, value in changes.items():
        for pool in _meant(desired, path):
            section, name = path.removeprefix(f"{pool.name}.").split(".")
            setting = Setting(f"{section}.{name}", value, path)
            pools[pool.name] = _with(pools[pool.name], section, name, checked(setting))
    return tuple(pools.values())


def _meant(desired: Desired, path: str) -> tuple[Pool, ...]:
    """The pools that this option is for."""
    found = re.fullmatch(rf"(?:([\w-]+)\.)?({'|'.join(SECTIONS)})\.(\w+)", path)
    if found is None:
        raise InvalidRequest(f"{path}: options of workers begin with {', '.join(SECTIONS)}, or with a pool", param=path)
    return desired.pools if found[1] is None else (desired.pool(found[1]),)


def _with(pool: Pool, section: str, name: str, value: object) -> Pool:
    changed: dict[str, Any] = {name: value}
    if section == "worker":
        return replace(pool, worker=replace(pool.worker, **changed))
    if section == "handover":
        return replace(pool, worker=replace(pool.worker, handover=replace(pool.worker.handover, **changed)))
    engine = replace(pool.worker.engine, **changed)
    resources = replace(pool.resources, ranks=engine.tp)
    return replace(pool, worker=replace(pool.worker, engine=engine), resources=resources)


def _folder(model: str) -> Path:
    folder = models.find(model).folder
    if folder is None:
        raise InvalidRequest(f"{model} is no checkpoint folder: make one with `baton model import`", param="model")
    return folder


def _same_tokenizer(new: Path, old: Path) -> None:
    try:
        same = (new / "tokenizer.json").read_bytes() == (old / "tokenizer.json").read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot compare tokenizers: {error.filename}: {error.strerror}", param="model") from error
    if not same:
        raise InvalidRequest(f"{new} has another tokenizer than {old}: that takes a new cluster", param="model")
