"""Places workers on the nodes of a Ray cluster: an actor in a placement group for each, whose child the worker is.

Ray holds resources, starts actors and tells of their end; nothing else passes through it. All actors and groups belong
to this process, the driver of a Ray job: when the job ends, however it ends, Ray ends them and they end the workers.

Ray is imported here and in `ray_process`, and these only where a cluster is to run on Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it is imported

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...common.clock import Clock, RealClock
from ...common.config import WorkerConfig
from ...common.errors import BatonError
from ...common.json_form import to_json
from .launcher import Spec
from .ray_actor import WorkerHost
from .ray_placement import Node, Place, choose, complaint, needs, survey
from .ray_process import RayProcess, first_line, own_line, within

KNOCK_S = 5.0
CALL_S = 30.0
"""How long one question to Ray's control plane may take."""
PLACE_S = 20.0
"""How long a start waits for room. Its supervisor counts a start that fails as a death: so few of them fit into its
window that a worker without room is never taken for one that crashes."""
BEGIN_S = 180.0
"""How long an actor may take to begin: on a new node Ray fetches the code first."""
_ENVIRONMENT = {"RAY_worker_niceness": "0"}
"""Beside what the job says. Ray gives the processes of actors, and so their children, a low priority."""
LOOK_S = 0.1
SUSPECT_S = 60.0
"""How long a node where an actor was lost comes last: Ray notices only after a while that a node is dead."""

T = TypeVar("T")


def make(log: Callable[[str, str], None], address: str = "") -> RayLauncher:
    """Join the Ray cluster at `address` (host:port) as a driver; empty: the one whose job this is, that RAY_ADDRESS
    names, or that runs on this machine. Blocks for seconds: call it before the event loop runs. Raises `BatonError` if
    there is none."""
    address = address or os.environ.get("RAY_ADDRESS", "") or "auto"
    try:
        if address != "auto":
            _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise BatonError(f"cannot join a Ray cluster at {address!r}: {first_line(error)}") from error
    return RayLauncher(log, host=get_node_ip_address())


def _knock(address: str) -> None:
    """Raises `OSError` or `ValueError` where nothing listens, which Ray would find out after two minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise ValueError("it is not host:port")
    socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


class RayThread:
    """Ray's blocking calls, one after the other on a thread of their own: the event loop never waits for Ray, and what
    gives back comes after what took, though nobody waits for that any more."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "ray")

    async def __call__(self, call: Callable[..., T], *args: Any) -> T:
        """Raises `OSError` where Ray fails, or does not answer within `CALL_S`."""
        try:
            return await within(CALL_S, asyncio.get_running_loop().run_in_executor(self._pool, call, *args))
        except TimeoutError as error:
            raise OSError(f"Ray has not answered for {CALL_S:g} s") from error
        except (RayError, ValueError) as error:
            raise OSError(f"Ray: {first_line(error)}") from error


@dataclass(slots=True)
class Room:
    """What one worker holds of the cluster: a placement group, which is no longer there than its worker. All methods
    are for Ray's thread."""

    name: str
    place: Place
    group: PlacementGroup | None = None

    def take(self) -> None:
        """Ask for it on the node of `place`; anywhere, where that has no room or none is named. An autoscaler of the
        cluster sees what is asked for and not there."""
        self.group = placement_group(
            [dict(self.place.needs)],
            strategy="STRICT_PACK",
            name=self.name,
            _soft_target_node_id=self.place.node or None,
        )

    def node(self) -> str:
        """The id of the node where it is; empty while it is nowhere yet."""
        row = placement_group_table(self.group)
        return str(row["bundles_to_node_id"][0]) if row["state"] == "CREATED" else ""

    def enter(self, command: tuple[str, ...]) -> Any:
        """Start the actor in it, which then has all of it. It never restarts by itself: the supervisor places anew."""
        needs = dict(self.place.needs)
        return (
            ray.remote(WorkerHost)
            .options(
                num_cpus=needs.pop("CPU", 0),
                num_gpus=needs.pop("GPU", 0),
                resources=needs,
                max_restarts=0,
                runtime_env={"env_vars": _ENVIRONMENT},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=0),
            )
            .remote(list(command))
        )

    def give_back(self) -> None:
        """Ray ends the actor in it."""
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None


def _look() -> tuple[list[Mapping[str, Any]], Mapping[str, Mapping[str, float]]]:
    return ray.nodes(), available_resources_per_node()


class RayLauncher:
    """Starts workers on the nodes of the cluster that this process has joined: see `make`.

    host      how other nodes reach this machine: what workers are to reach must listen there
    command   starts a worker; empty: each node's own Python with this package
    """

    def __init__(
        self,
        log: Callable[[str, str], None],
        host: str,
        command: tuple[str, ...] = (),
        place_s: float = PLACE_S,
        clock: Clock | None = None,
    ) -> None:
        self.host = host
        self._log = log
        self._command = command
        self._place_s = place_s
        self._clock = clock or RealClock()
        self._ray = RayThread()
        self._rooms: dict[str, Room] = {}
        self._suspects: dict[str, float] = {}

    async def start(self, spec: Spec) -> RayProcess:
        """Place a worker and start it there. Raises `OSError` where no node has had room for `place_s`, saying what
        each lacks, and where its actor does not begin."""
        config = spec.config
        assert isinstance(config, WorkerConfig), "only workers are placed"
        room = Room(spec.name, Place(spec.resources.pool, "", needs(spec.resources)))
        try:
            node = await self._place(room, spec.resources.placement)
            actor = await self._ray(room.enter, self._command)
            pid = await self._begun(actor, node, spec, to_json(replace(config, host=node.address)))
        except BaseException:  # also when nobody waits any more
            await self._give_back(room)
            raise
        process = RayProcess(
            spec.name,
            pid,
            node.name,
            actor,
            self._log,
            lost=partial(self._suspect, node),
            give_back=partial(self._give_back, room),
        )
        process.follow()
        return process

    async def _place(self, room: Room, placement: str) -> Node:
        """Take room on the node that suits best, or else on the first that has some."""
        table, free = await self._ray(_look)
        places = [other.place for other in self._rooms.values()]
        nodes = survey(table, free, places)
        avoid = {node for node, until in self._suspects.items() if self._clock.now() < until}
        node = choose(nodes, room.place, placement, places, avoid)
        self._rooms[room.name] = room  # before anything is awaited: the next choice counts it
        if node is not None:
            room.place = replace(room.place, node=node.id)
        why = complaint(nodes, room.place.needs)
        if node is None:
            self._log(room.name, own_line(room.name, f"waits for resources: {why}"))
        await self._ray(room.take)
        deadline = self._clock.now() + self._place_s
        while not (found := await self._ray(room.node)):
            if self._clock.now() > deadline:
                raise OSError(why)
            await asyncio.sleep(LOOK_S)
        room.place = replace(room.place, node=found)
        table, free = await self._ray(_look)
        for node in survey(table, free, ()):
            if node.id == found:
                return node
        raise OSError(f"its node died at once: {found}")

    async def _begun(self, actor: Any, node: Node, spec: Spec, config: bytes) -> int:
        """The process id of the actor's child."""
        try:
            return int(await within(BEGIN_S, actor.begin.remote(spec.name, config, spec.threads)))
        except TimeoutError as error:
            raise OSError(f"its Ray actor on {node.name} has not begun for {BEGIN_S:g} s") from error
        except RayError as error:
            self._suspect(node)
            raise OSError(f"its Ray actor on {node.name} did not begin: {first_line(error)}") from error

    def _suspect(self, node: Node) -> None:
        self._suspects[node.id] = self._clock.now() + SUSPECT_S

    async def _give_back(self, room: Room) -> None:
        if self._rooms.get(room.name) is room:
            del self._rooms[room.name]
        try:
            await self._ray(room.give_back)
        except OSError as error:
            self._log(room.name, own_line(room.name, f"its placement group is not given back: {error}"))
