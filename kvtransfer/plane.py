"""One rank's data plane: its store, its inlet and outlet, and the transports between them and other ranks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.clock import Clock
from ..common.config import HandoverConfig
from ..common.errors import TransportFailed, WorkerLost
from ..common.messages import Endpoint, Filled, Spoiled, TransportBroken
from ..common.sockets import Listener
from ..common.types import WorkerRef
from ..protos.rpc import Stream
from . import grpc_link
from .fetched import FetchGiver, FetchTaker, Shared, check_fetchable
from .grpc_link import GrpcLink
from .host_store import HostStore
from .in_step import StepGiver, StepTaker
from .inlet import RankInlet
from .inline import InlineGiver, InlineTaker
from .layout import Route
from .ledger import OwnLedger, open_ledger
from .link import Greeting, LaneServer, MakeTaker, SocketLink
from .outlet import LaneOutlet
from .transport import Giver, Store

if TYPE_CHECKING:  # a plane without process groups needs no torch
    from .process_group import ProcessGroups

log = logging.getLogger(__name__)

Event = Filled | Spoiled | TransportBroken


class Plane:
    """What moves KV in and out of one rank of worker `ref`. `post` gets what the engine loop has to know, from any
    thread. `shared`: the pool's memory, where peers can see it. `grpc`: where gRPC lanes reach this rank, if anywhere.
    `loop`: the process's event loop, which gRPC runs on, if there is one. `groups`: what makes process groups, if
    anything does. `late_s`: see `RankInlet`. Raises `TransportFailed` where nothing can listen at `host`."""

    def __init__(
        self, ref: WorkerRef, store: Store, config: HandoverConfig, token: str, host: str, clock: Clock,
        loop: asyncio.AbstractEventLoop | None, post: Callable[[Event], None], shared: Shared | None, grpc: str,
        groups: ProcessGroups | None = None, late_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.store = store
        self.inlet = RankInlet(store, clock, post, late_s)
        self.outlet = LaneOutlet(store, config, clock, self._giver, post)
        self._ref = ref
        self._config = config
        self._token = token
        self._loop = loop
        self._shared = shared
        self._groups = groups
        takers: dict[str, MakeTaker] = {"tcp": lambda _, connection: InlineTaker(connection, store)}
        if shared is not None:
            takers[shared.transport] = lambda greeting, connection: self._fetch_taker(shared, greeting, connection)
        if groups is not None and (groups.is_nccl or config.transport == "process-group"):
            takers["process-group"] = groups.taker  # gloo ends the process of who gets more than was announced
        self._server = LaneServer(ref, store.rank, self.inlet, takers, config.lease_s)
        try:
            self._listener = Listener(host, 0, token, self._server.serve, "lane")
        except OSError as error:
            raise TransportFailed(f"no lanes can come in at {host}: {error}") from error
        self.door: Mapping[str, str] = self._addresses(grpc)

    async def serve_grpc(self, stream: Stream[bytes, bytes]) -> None:
        """The target's end of a lane over gRPC."""
        await grpc_link.serve(stream, self._server, self._config.lease_s)

    def stop(self) -> None:
        """Hang up on everybody."""
        self.outlet.stop()
        self._listener.close()

    def _addresses(self, grpc: str) -> dict[str, str]:
        addresses = {"tcp": self._listener.address}
        if self._shared is not None:
            addresses[self._shared.transport] = self._shared.address(self.store.num_blocks)
        if self._groups is not None:
            addresses["process-group"] = self._groups.door
        if grpc:
            addresses["grpc"] = grpc
        return addresses

    def _giver(self, transport: str, target: Endpoint, route: Route) -> Giver:
        """See `outlet.MakeGiver`."""
        door = target.doors[route.target_rank]
        if transport not in self.door or transport not in door or "tcp" not in door:
            raise TransportFailed(f"there is no {transport} between {self._ref.name} and {target.ref.name}")
        greeting = Greeting(
            self._ref.name, self._ref.epoch, self.store.rank, target.ref.epoch, route.target_rank, transport,
            self.door[transport], self.store.format,
        )  # fmt: skip
        patience = self._config.lease_s
        if self._shared is not None and transport == self._shared.transport:
            return self._fetch_giver(self._shared, greeting, door["tcp"], route)
        if transport == "grpc" and self._loop is not None:
            link = GrpcLink(door["grpc"], self._token, greeting, patience, self._loop)
            return InlineGiver(link, self.store, route, target.format)
        lane = SocketLink(door["tcp"], self._token, greeting, patience)
        if transport == "process-group" and self._groups is not None:
            return self._groups.giver(lane, self.store, route, target.format)
        return InlineGiver(lane, self.store, route, target.format)

    def _fetch_giver(self, shared: Shared, greeting: Greeting, address: str, route: Route) -> FetchGiver:
        store = self.store
        if isinstance(store, HostStore) and store.checked and store.keeps_step(route):
            try:
                return self._step_giver(store, shared, greeting, address, route)
            except TransportFailed as error:  # it may still fetch what is summed beforehand
                log.info("%s is not copied in step: %s", greeting.transport, error.message)
        return FetchGiver(SocketLink(address, self._token, greeting, self._config.lease_s), store, shared, route)

    def _step_giver(
        self, store: HostStore, shared: Shared, greeting: Greeting, address: str, route: Route
    ) -> StepGiver:
        try:
            own = OwnLedger()
        except OSError as error:  # for now, as where there are no more sockets
            raise WorkerLost(f"no room for what a lane to {address} shares: {error}") from error
        patience = self._config.lease_s
        with contextlib.closing(own) as ledger:
            greeting = replace(greeting, ledger=ledger.address)
            link = SocketLink(address, self._token, greeting, patience)  # the target has opened it when this returns
            return StepGiver(link, store, shared, route, ledger, patience)

    def _fetch_taker(self, shared: Shared, greeting: Greeting, connection: socket.socket) -> FetchTaker:
        """See `link.MakeTaker`."""
        store, source = self.store, greeting.format
        check_fetchable(source, store.format)
        peer = shared.peer(greeting.door, source)
        if not greeting.ledger:
            return FetchTaker(peer, source)
        if not isinstance(store, HostStore):
            raise TransportFailed("nobody keeps step here")
        return StepTaker(peer, greeting, store, open_ledger(greeting.ledger), connection, self._config.lease_s)


def this_host() -> str:
    """Names the machine, its boot, and the namespace of processes that we see: who has the same one can find each
    other's memory."""
    if sys.platform != "linux":
        return f"{socket.gethostname()}/{os.getpid()}"  # nobody to share with
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"
