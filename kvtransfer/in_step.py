"""Pieces that the target fetches as the source sums them: how `shm` carries them where both ends can (`ledger.py`).

    source    header out     sums ½ MiB, sums ½ MiB, ...        next header
    target            header in     copies ½ MiB, copies ½ MiB, ...     credit

Neither holds a lock while it waits for the other. A source that has gone on to other things, because the handover ended
under its hands, may sum blocks that change; nobody counts on them, for its slot no longer vouches for them.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import numpy as np

from ..common import sockets
from ..common.errors import HandoverFailed, TransportFailed
from ..kernels.move import Flag
from .fetched import FetchGiver, FetchTaker, Peer, Shared
from .host_store import HostStore
from .layout import Route, routes
from .ledger import Ledger, OwnLedger, wait_for
from .link import Greeting, SocketLink
from .transport import Store
from .wire import FrameHeader


class StepGiver(FetchGiver):
    """See `transport.Giver`. `patience`: seconds that the target may stand still."""

    def __init__(
        self, link: SocketLink, store: HostStore, shared: Shared, route: Route, ledger: OwnLedger, patience: float
    ) -> None:
        super().__init__(link, store, shared, route)
        self._socket = link.socket
        self._pool = store
        self._ledger = ledger
        self._patience = patience

    def give(self, header: FrameHeader) -> None:
        self._link.send(header)
        self._ledger.begin(header.size // header.pieces)
        done = 0

        def sum_on() -> bool:
            nonlocal done
            before = done
            done = self._pool.lead(self._ledger, done, header.all_layers, self._blocks, self._route)
            return done > before

        while done < header.pieces:
            wait_for(sum_on, self._gone, self._patience)
        self._ledger.end(header.pieces)

    def _gone(self) -> bool:
        return sockets.hung_up(self._socket)


class StepTaker(FetchTaker):
    """See `transport.Taker`. `connection`: the lane's, `patience`: seconds that the source may stand still."""

    def __init__(
        self, peer: Peer, greeting: Greeting, store: HostStore, ledger: Ledger, connection: socket.socket,
        patience: float,
    ) -> None:  # fmt: skip
        """Raises `TransportFailed` where what this lane brings cannot be copied in step here."""
        super().__init__(peer, greeting.format)
        lane = (greeting.rank, store.rank)
        mine = [r for r in routes(greeting.format, store.format) if (r.source_rank, r.target_rank) == lane]
        if not all(map(store.keeps_step, mine)):
            raise TransportFailed("there is no compiled loop here that keeps step")
        self._pool = store
        self._ledger = ledger
        self._connection = connection
        self._patience = patience
        self._done = 0
        self._sums = np.zeros((2, 0), dtype=np.uint64)

    def fetch(self, header: FrameHeader) -> None:
        wait_for(lambda: self._ledger.summed(self._done), lambda: sockets.hung_up(self._connection), self._patience)

    def land(self, store: Store, header: FrameHeader, blocks: Sequence[int], route: Route, over: Flag) -> bool:
        if not self._pool.keeps_step(route):  # the reservation's route, which need not be what the greeting said
            raise HandoverFailed("pieces that cannot be copied in step")
        if self._done == 0:
            self._ledger.begin(header.size // header.pieces)
            self._sums = np.zeros((2, header.pieces), dtype=np.uint64)
        ours, theirs = self._sums
        peer = self._peer
        with self._vouched(header) as there:
            self._done = self._pool.follow(
                self._ledger, self._done, peer.memory, self._format, peer.num_blocks, header.all_layers, there,
                blocks, route, (ours, theirs), over,
            )  # fmt: skip
        header.confirm(ours[: self._done], theirs[: self._done])
        return self._done == header.pieces

    def leave(self, header: FrameHeader) -> None:
        self._ledger.leave(header.pieces)
        self._done = 0
