"""One end of a handover by itself, its pool on any device; and a source of handovers as a process of its own:
`python -m baton.bench.gpu_end`.

The source is told what to do on its standard input, [name, argument ...] a line in JSON, and answers each line by one
JSON value: `Source`'s public methods are the commands, its constructor's arguments the first line. It ends where its
input does.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch

from ..common.clock import RealClock
from ..common.config import HandoverConfig
from ..common.errors import HandoverFailed, WorkerLost
from ..common.json_form import from_json, from_plain, to_json
from ..common.kv_format import KvFormat
from ..common.messages import Endpoint, Filled, Spoiled, TransportBroken
from ..common.types import WorkerRef
from ..engine.kv_pool import KvPool
from ..kvtransfer.layout import Cut
from ..kvtransfer.plane import Plane, this_host
from ..kvtransfer.process_group import ProcessGroups
from ..kvtransfer.transport import Offer
from ..worker.compute import PoolMemory, store_of

SOURCE = "source"
TIMEOUT_S = 60.0
"""For one handover, however large."""

_HOST, _TOKEN = "127.0.0.1", "bench"


@dataclass(frozen=True, slots=True)
class Pool:
    """`kv` and how peers see its memory."""

    kv: KvPool
    memory: PoolMemory


def make_pool(format: KvFormat, num_blocks: int, device: str) -> Pool:
    memory = PoolMemory()
    return Pool(KvPool(format, 0, num_blocks, memory.allocator(torch.device(device))), memory)


class End:
    """A pool's data plane. `said`: what an engine loop would be told."""

    def __init__(self, name: str, pool: Pool, config: HandoverConfig) -> None:
        self.said: queue.SimpleQueue[Filled | Spoiled | TransportBroken] = queue.SimpleQueue()
        ref = WorkerRef(name, "", 1)
        groups = ProcessGroups(pool.kv.flat.device, _HOST, config.lease_s)
        self.plane = Plane(
            ref, store_of(pool.kv, config.checksums), config, _TOKEN, _HOST, RealClock(), None, self.said.put,
            pool.memory.shared, "", groups,
        )  # fmt: skip
        self.endpoint = Endpoint(ref, "", pool.kv.format, this_host(), (self.plane.door,))

    def wait_filled(self) -> None:
        """Until a handover is here. Raises `HandoverFailed` where it is damaged or does not come."""
        try:
            said = self.said.get(timeout=TIMEOUT_S)
        except queue.Empty as error:
            raise HandoverFailed("the bytes did not come") from error
        if not isinstance(said, Filled):
            raise HandoverFailed(said.message)


def fill(flat: torch.Tensor) -> None:
    """Numbers that another process makes as well, on a device of the same kind."""
    generator = torch.Generator(flat.device).manual_seed(1)
    flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, device=flat.device, generator=generator))


class Source:
    """Hands over blocks of a pool that `fill` has filled."""

    def __init__(self, format: KvFormat, num_blocks: int, device: str) -> None:
        self._pool = make_pool(format, num_blocks, device)
        fill(self._pool.kv.flat)
        self._ends: dict[HandoverConfig, End] = {}

    def address(self) -> str:
        """Where peers find the pool; empty where they cannot."""
        shared = self._pool.memory.shared
        return "" if shared is None else shared.address(self._pool.kv.num_blocks)

    def give(self, handover_id: int, config: HandoverConfig, transport: str, target: Endpoint, part: Cut) -> None:
        """Offer these blocks, all layers at once."""
        if config not in self._ends:
            self._ends[config] = End(SOURCE, self._pool, config)
        outlet = self._ends[config].plane.outlet
        outlet.open(handover_id, 1, target, transport)
        outlet.offer(Offer(handover_id, 0, part))

    def broken(self, config: HandoverConfig, within_s: float) -> str:
        """What broke a transport of this end; empty if nothing did in so many seconds."""
        try:
            said = self._ends[config].said.get(timeout=within_s)
        except queue.Empty:
            return ""
        assert isinstance(said, TransportBroken), "a source only hears of that"
        return said.message

    def close(self, config: HandoverConfig, handover_id: int) -> None:
        self._ends[config].plane.outlet.close(handover_id)


_TYPES: dict[str, Any] = {
    "address": tuple[()],
    "give": tuple[int, HandoverConfig, str, Endpoint, Cut],
    "broken": tuple[HandoverConfig, float],
    "close": tuple[HandoverConfig, int],
}


class RemoteSource:
    """The source process. Raises `WorkerLost` where it ends."""

    def __init__(self, format: KvFormat, num_blocks: int, device: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
        )
        self._ask((format, num_blocks, device))

    def ask(self, name: str, *arguments: object) -> Any:
        return self._ask((name, *arguments))

    def _ask(self, line: object) -> Any:
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(to_json(line) + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerLost("the source has ended") from error
        answer = self._child.stdout.readline()
        if not answer:
            raise WorkerLost("the source has ended")
        return json.loads(answer)

    def close(self) -> None:
        self._child.kill()  # it has nothing to finish
        self._child.communicate(timeout=TIMEOUT_S)


def main() -> None:
    lines = sys.stdin.buffer
    source = Source(*from_json(lines.readline(), tuple[KvFormat, int, str]))
    _answer(None)
    for line in lines:
        name, *arguments = json.loads(line)
        _answer(getattr(source, name)(*from_plain(tuple(arguments), _TYPES[name])))


def _answer(value: object) -> None:
    sys.stdout.buffer.write(to_json(value) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
