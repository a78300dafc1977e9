"""All settings together: laid over the defaults, and checked for what makes sense only together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ...common.errors import InvalidRequest
from ...common.types import Role
from ..launch.launcher import Resources
from .schema import DEFAULT_MAX, OVERLAYS, TOP_SECTIONS, PoolConfig, ServeConfig, Setting
from .values import checked

SHORT_FORM = tuple(role.value for role in Role)
"""The fields `prefill`, `decode` and `colocated`, each the count of a pool of that name."""


def resolve(settings: Iterable[Setting]) -> ServeConfig:
    """Raises `InvalidRequest` in one line that begins with the origin of the wrong value."""
    given = _Given.of(settings)
    top = {path: value for path, value in given.values.items() if "." not in path}
    if top.get("colocated"):  # asked for instead of the default pair, not beside it
        top = {"prefill": 0, "decode": 0} | top
    default = ServeConfig()
    sections: dict[str, Any] = {name: given.section(name) for name in TOP_SECTIONS}
    for overlay in ("prefill_engine", "decode_engine"):
        sections[overlay] = sections["engine"] | sections[overlay]
    config = replace(default, **top, **{name: replace(getattr(default, name), **v) for name, v in sections.items()})
    config = replace(config, pools=_pools(given, config))
    _check_autoscale(given, config)
    return config


@dataclass(frozen=True, slots=True)
class _Given:
    """What was set: path → checked value, and path → origin. Of a path that was set twice, the last."""

    values: Mapping[str, Any]
    origins: Mapping[str, str]

    @classmethod
    def of(cls, settings: Iterable[Setting]) -> _Given:
        last = {setting.path: setting for setting in settings}
        return cls({path: checked(s) for path, s in last.items()}, {path: s.origin for path, s in last.items()})

    def section(self, prefix: str) -> dict[str, Any]:
        """The fields directly under `prefix`."""
        found = ((path.rpartition("."), value) for path, value in self.values.items())
        return {name: value for (section, _, name), value in found if section == prefix}

    def refuse(self, why: str, *paths: str) -> NoReturn:
        """Raises `InvalidRequest` with the origin of the first of `paths` that was set, or the last by its name."""
        where = next((self.origins[path] for path in paths if path in self.origins), paths[-1] if paths else "")
        raise InvalidRequest(f"{where}: {why}" if where else why, param=paths[0] if paths else None)


def _pools(given: _Given, config: ServeConfig) -> tuple[PoolConfig, ...]:
    names = list(dict.fromkeys(path.split(".")[1] for path in given.values if path.startswith("pools.")))
    if not names:
        return _short_form(config)
    for short in SHORT_FORM:
        if short in given.values:
            given.refuse("with pools, the count is a pool's: pools.NAME.count", short)
    pools = tuple(_pool(given, config, name) for name in names)
    lacks = _missing({pool.role for pool in pools if pool.count})
    if lacks:
        given.refuse(f"no worker would {lacks}: give a pool the role {lacks} or colocated, and a count of 1 or more")
    for pool in pools[1:]:
        _check_alike(given, pools[0], pool)
    return pools


def _short_form(config: ServeConfig) -> tuple[PoolConfig, ...]:
    """The pools that the counts `prefill`, `decode` and `colocated` stand for."""
    counts = {Role.PREFILL: config.prefill, Role.DECODE: config.decode, Role.COLOCATED: config.colocated}
    lacks = _missing({role for role, count in counts.items() if count})
    if lacks:
        raise InvalidRequest(f"no worker would {lacks}: set {lacks} or colocated to 1 or more")
    return tuple(
        PoolConfig(
            name=role.value,
            role=role,
            count=count,
            engine=getattr(config, OVERLAYS[role]),
            handover=config.handover,
            resources=Resources(pool=role.value, ranks=getattr(config, OVERLAYS[role]).tp),
            max=max(count, DEFAULT_MAX),
        )
        for role, count in counts.items()
        if count
    )


def _missing(roles: Set[Role]) -> str:
    """The phase that nobody would do; empty: none."""
    if not any(role.prefills for role in roles):
        return "prefill"
    return "" if any(role.decodes for role in roles) else "decode"


def _pool(given: _Given, config: ServeConfig, name: str) -> PoolConfig:
    at = f"pools.{name}"
    own = given.section(at)
    if "role" not in own:
        first = next(path for path in given.origins if path.startswith(f"{at}."))
        given.refuse(f"pool {name!r} has no role: prefill, decode or colocated", first)
    placement = {"placement": own.pop("placement")} if "placement" in own else {}
    engine = replace(getattr(config, OVERLAYS[own["role"]]), **given.section(f"{at}.engine"))
    pool = PoolConfig(
        name=name,
        engine=engine,
        handover=replace(config.handover, **given.section(f"{at}.handover")),
        resources=Resources(pool=name, ranks=engine.tp, **placement, **given.section(f"{at}.resources")),
        **({"count": 1} | own),
    )
    _check_size(given, pool)
    _check_gpus(given, pool)
    return pool


def _check_size(given: _Given, pool: PoolConfig) -> None:
    at = f"pools.{pool.name}"
    if pool.min > pool.max:
        given.refuse(f"min {pool.min} is above max {pool.max}", f"{at}.min", f"{at}.max")
    if not pool.min <= pool.count <= pool.max:
        why = f"{pool.count} is out of range: this pool has {pool.min} to {pool.max} workers (min, max)"
        given.refuse(why, f"{at}.count", f"{at}.min", f"{at}.max")


def _check_gpus(given: _Given, pool: PoolConfig) -> None:
    """Each rank computes on one GPU, or on a part of one that it shares with ranks of other workers."""
    gpus, tp, device = pool.resources.gpus, pool.engine.tp, pool.engine.device
    path, at = f"pools.{pool.name}.resources.gpus", f"pools.{pool.name}.engine.device"
    if gpus > 1:
        given.refuse(f"{gpus:g} is for each rank (there are {tp}, by engine.tp), and a rank uses one GPU at most", path)
    if 0 < gpus < 1 and tp > 1:
        given.refuse(f"{gpus:g} of a GPU for each of {tp} ranks: ranks of one worker need a GPU each", path)
    if gpus and device == "cpu":
        given.refuse("GPUs are asked for, but engine.device is cpu", path, at)


def _check_alike(given: _Given, one: PoolConfig, other: PoolConfig) -> None:
    """What goes into the fingerprint must be equal: requests are handed over between all pools."""
    for name in ("dtype", "dummy_weights"):
        mine, theirs = getattr(other.engine, name), getattr(one.engine, name)
        if mine != theirs:
            why = f"{mine} here and {theirs} in pool {one.name}: workers that compute differently never hand over"
            given.refuse(why, *(f"pools.{pool.name}.engine.{name}" for pool in (other, one)))
    devices = {one.engine.device, other.engine.device}
    if one.engine.dtype == "auto" and len(devices) > 1 and "auto" not in devices:
        why = f"pools {one.name} and {other.name} use {' and '.join(sorted(devices))}, where dtype auto differs: set it"
        given.refuse(why, *(f"pools.{pool.name}.engine.device" for pool in (other, one)))


def _check_autoscale(given: _Given, config: ServeConfig) -> None:
    scale = config.autoscale
    limits = {
        "workers": (scale.min_workers, scale.max_workers),
        "prefill": (scale.min_prefill, scale.max_prefill),
        "decode": (scale.min_decode, scale.max_decode),
    }
    for what, (least, most) in limits.items():
        if most and least > most:
            why = f"min_{what} {least} is above max_{what} {most}"
            given.refuse(why, f"autoscale.min_{what}", f"autoscale.max_{what}")
