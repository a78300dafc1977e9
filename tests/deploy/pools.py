"""A small cluster's desired state, for tests of the controller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from baton.common.config import EngineConfig, GatewayConfig, WorkerConfig
from baton.common.types import Role
from baton.deploy.control.desired import Desired, Pool, add
from baton.deploy.launch.launcher import Resources

ENGINE = EngineConfig(model="m", threads=1)


def pool(role: Role, controller: str = "127.0.0.1:1", **changes: object) -> Pool:
    name = str(role)
    worker = WorkerConfig(name="", role=role, engine=ENGINE, controller=controller, cluster_token="t")
    return replace(Pool(name=name, worker=worker, resources=Resources(pool=name)), **changes)  # type: ignore[arg-type]


def desired(
    counts: Mapping[Role, int] | None = None, gateways: int = 1, controller: str = "127.0.0.1:1", port: int = 8000
) -> Desired:
    """So many workers of each role, one of prefill and decode unless said otherwise."""
    counts = counts or {Role.PREFILL: 1, Role.DECODE: 1}
    door = GatewayConfig(model="m", model_name="n", controller=controller, cluster_token="t", port=port, drain_s=60.0)
    wanted = Desired(
        pools=tuple(pool(role, controller) for role in counts),
        gateways=tuple(replace(door, name=f"gateway-{i}") for i in range(gateways)),
    )
    for role, count in counts.items():
        for _ in range(count):
            wanted = add(wanted, wanted.pool(str(role)))
    return wanted
