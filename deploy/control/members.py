"""Who is in the cluster: the table that workers report into and gateways watch. It is the controller's gRPC face."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ...common.cluster import FromController, FromGateway, Members, WorkerStatus
from ...common.errors import StaleEpoch
from ...protos.rpc import Stream


class MemberTable:
    """One row for each worker whose process lives or was given up. Implements `protos.control.ControllerService`.

    A row belongs to one process: what another one says under the same name (a late word of a dead incarnation) is
    refused. `version` grows with each change; a watcher that is slow skips versions and misses nothing.
    """

    def __init__(self) -> None:
        self._rows: dict[str, WorkerStatus] = {}
        self._version = 0
        self._changed = asyncio.Event()

    @property
    def members(self) -> Members:
        return Members(self._version, tuple(self._rows.values()))

    def put(self, status: WorkerStatus) -> None:
        """Begin or replace a row."""
        if self._rows.get(status.name) != status:
            self._rows[status.name] = status
            self._announce()

    def remove(self, name: str) -> None:
        """The process is gone; no error if it has no row."""
        if self._rows.pop(name, None) is not None:
            self._announce()

    async def report(self, status: WorkerStatus) -> None:
        """A worker's word on itself. Raises `StaleEpoch` if the row is not, or no longer, this process's."""
        row = self._rows.get(status.name)
        if row is None or row.pid != status.pid:
            raise StaleEpoch(f"{status.name} with process id {status.pid} is not a worker of this controller")
        self.put(status)

    async def attend(self, stream: Stream[FromGateway, FromController]) -> None:
        """A gateway's stream, for as long as it lives."""
        await stream.read()
        async for members in self.watch():
            await stream.write(members)

    async def watch(self) -> AsyncIterator[Members]:
        """What is known, then again after each change, for ever."""
        seen = -1
        while True:
            if self._version == seen:
                await self._changed.wait()
            members = self.members
            seen = members.version
            yield members

    def _announce(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()
