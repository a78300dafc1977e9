"""How fast a transport carries KV, against what its medium can do at most, and what checksums cost.

Source and target are two processes with a whole pool each; blocks lie scattered in both. Every round measures the
limit, the transport, and the transport without checksums, one after the other, because a machine's bandwidth varies by
the minute while their ratios stay; and every other round in the reverse order, so that a bandwidth that falls or rises
meanwhile is for one side of a ratio as often as for the other. Times run from the first offer to the moment at which
the target has everything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...common.config import TRANSPORTS, HandoverConfig
from ...common.kv_format import KvFormat
from ...kvtransfer.layout import cut
from ...kvtransfer.outlet import SHORTER
from ...kvtransfer.transport import Offer
from . import raw
from .end import End, Events, layer_hash, make_pool, on_core, scattered
from .target import KEY_NAME, Remote

Note = Callable[[str], None]

AT_A_TIME = {"shm": 4}
"""Rounds for one of the others, where so many take less time than that one, and where what is told apart is less than
the time of one handover varies by."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One transport at one size. An entry for each round; seconds. `limit` and `beside`: as `Pair` has them."""

    transport: str
    medium: str
    tokens: int
    size: int
    handover: list[float]
    unchecked: list[float]
    limit: list[float]
    beside: dict[str, list[float]]

    @property
    def gb_per_s(self) -> float:
        return self.rate(self.handover)

    @property
    def limit_gb_per_s(self) -> float:
        return self.rate(self.limit)

    @property
    def share(self) -> float:
        """Of the limit: the median of the rounds' ratios."""
        return _ratio(self.limit, self.handover)

    @property
    def other_shares(self) -> dict[str, float]:
        """Of what the medium does in other ways."""
        return {way: _ratio(seconds, self.handover) for way, seconds in self.beside.items()}

    @property
    def checksums(self) -> float:
        """What they cost, as a share of a handover: below 0 where noise is more."""
        return 1 - _ratio(self.unchecked, self.handover)

    def rate(self, seconds: list[float]) -> float:
        """GB/s in the median round."""
        return self.size / statistics.median(seconds) / 1e9


def _ratio(some: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


class Pair:
    """A source in this process and a target in another, each with a pool of `num_blocks`, all of which cross."""

    def __init__(self, format: KvFormat, num_blocks: int, remote: Remote, events: Events) -> None:
        self._format = format
        self._num_blocks = num_blocks
        self.size = num_blocks * format.num_layers * format.block_bytes
        self._remote = remote
        self._pool = make_pool(format, self._num_blocks, seed=1)
        self._ends = {checked: End(KEY_NAME, format, self._pool, checked, events) for checked in (True, False)}
        self._targets = {checked: self._remote.endpoint(checked) for checked in (True, False)}
        self._cut = cut(scattered(self._num_blocks, seed=1), format.block_size, format.block_size, 0, self._num_blocks)
        self._senders: list[raw.Sender] = []
        self._group: raw.Group | None = None
        self._count = 0

    @property
    def transports(self) -> list[str]:
        """That both ends have."""
        return [
            name
            for name in TRANSPORTS
            if all(name in e.doors[0] for e in (self._ends[True].endpoint, self._targets[True]))
        ]

    def handover(self, transport: str, checked: bool) -> float:
        """Seconds of one. Raises `HandoverFailed` where it breaks."""
        self._count += 1
        outlet = self._ends[checked].plane.outlet
        self._remote.ask("open", checked, self._count, self._num_blocks)
        outlet.open(self._count, 1, self._targets[checked], transport)
        begin = time.monotonic()
        outlet.offer(Offer(self._count, 0, self._cut))
        done = float(self._remote.ask("filled", checked, self._count))
        outlet.close(self._count)
        return done - begin

    def same(self) -> bool:
        """Whether the target has what the source has. It has it no more afterwards."""
        return all(
            layer_hash(self._pool, self._format, self._cut.blocks, layer)
            == self._remote.ask("content", layer, self._num_blocks)
            for layer in range(self._format.num_layers)
        )

    def limit(self, medium: str) -> float:
        """Seconds of the same bytes over a bare medium: out of the source's pool into the target's, both from front to
        back, so that nothing has to be gathered or scattered."""
        match medium:
            case "memcpy":
                return float(self._remote.ask("memcpy", self._ends[True].plane.door["shm"], self.size))
            case "socket":
                return self._plain_stream(warm=False)
            case _:
                return self._bare_gloo(warm=False, under_way=1)

    def beside(self, medium: str) -> dict[str, Callable[[], float]]:
        """Each gives the seconds of as many bytes over a bare medium in another way. `warm`: from one small buffer into
        another, which stay in the caches, as no pool does. `tuned`: the limit again, by a socket like a lane's. `two`:
        the limit again, with two messages under way."""
        match medium:
            case "memcpy":
                return {}
            case "socket":
                return {
                    "warm": lambda: self._plain_stream(warm=True),
                    "tuned": lambda: self._plain_stream(warm=False, tuned=True),
                }
            case _:
                return {
                    "warm": lambda: self._bare_gloo(warm=True, under_way=1),
                    "two": lambda: self._bare_gloo(warm=False, under_way=2),
                }

    def _plain_stream(self, warm: bool, tuned: bool = False) -> float:
        if not self._senders:
            port = self._remote.ask("socket")
            for setting in (False, True):
                self._remote.tell("accept")
                self._senders.append(raw.Sender(port, setting))
                self._remote.answer()
        memory = raw.small(raw.CHUNK) if warm else self._pool.memory
        self._remote.tell("receive", int(tuned), self.size, warm)
        begin = time.monotonic()
        self._senders[tuned].send(memory, self.size)
        return float(self._remote.answer()) - begin

    def _bare_gloo(self, warm: bool, under_way: int) -> float:
        """In messages of the size of a frame."""
        message = min(SHORTER["process-group"], HandoverConfig().frame_bytes, self.size)
        if self._group is None:
            self._group = raw.Group(0, 0)
            self._remote.tell("group", self._group.port)
            self._group.join()
            self._remote.answer()
        memory = raw.small(message) if warm else self._pool.memory
        self._remote.tell("group_receive", self.size, message, warm, under_way)
        begin = time.monotonic()
        self._group.move(memory, self.size, message, under_way)
        return float(self._remote.answer()) - begin

    def close(self) -> None:
        self._group = None
        for end in self._ends.values():
            end.stop()
        self._remote.close()


@contextmanager
def pair(format: KvFormat, tokens: int) -> Iterator[Pair]:
    """Each of the two processes has a core of its own, where there are two."""
    num_blocks = tokens // format.block_size
    remote = Remote(format, num_blocks)  # while this process may use every core: the other inherits what it may
    with on_core(0):
        events = Events()
        both = Pair(format, num_blocks, remote, events)
        try:
            yield both
        finally:
            both.close()
            events.stop()


def measure(format: KvFormat, tokens: int, rounds: int, note: Note, only: Collection[str] = TRANSPORTS) -> list[Speed]:
    """Every transport that two processes here have, at one size."""
    with pair(format, tokens) as both:
        names = [name for name in both.transports if name in only]
        speeds = [Speed(name, raw.LIMITS[name], tokens, both.size, [], [], [], {}) for name in names]
        for speed in speeds:
            _round(both, speed, back=False)  # for warming up; its times are not kept
        for turn in range(rounds):
            for speed in speeds:
                note(f"{speed.transport}, {tokens} tokens, round {turn + 1} of {rounds}")
                for i in range(AT_A_TIME.get(speed.transport, 1)):
                    _add(speed, _round(both, speed, back=(turn + i) % 2 == 1))
        return speeds


def _round(both: Pair, speed: Speed, back: bool) -> dict[str, float]:
    """Seconds of each way, one after the other or, `back`, the other way round."""
    ways: dict[str, Callable[[], float]] = {
        "limit": lambda: both.limit(speed.medium),
        **both.beside(speed.medium),
        "handover": lambda: both.handover(speed.transport, True),
        "unchecked": lambda: both.handover(speed.transport, False),
    }
    return {name: ways[name]() for name in (reversed(ways) if back else ways)}


def _add(speed: Speed, seconds: dict[str, float]) -> None:
    speed.limit.append(seconds.pop("limit"))
    speed.handover.append(seconds.pop("handover"))
    speed.unchecked.append(seconds.pop("unchecked"))
    for way, took in seconds.items():
        speed.beside.setdefault(way, []).append(took)
