"""What the choice of a pair stands on: the fleet, the prefix index, and the hashes of a request's blocks."""

from __future__ import annotations

from collections.abc import Set

from ..common.config import RouterConfig
from ..common.errors import NotReady, PromptTooLong
from ..common.hashing import BlockHasher, cluster_key
from ..common.messages import Load
from ..common.types import Request
from .choose import Choice, Demand, choose
from .fleet import Fleet, Worker, has_pair
from .index import PrefixIndex
from .request import RequestState
from .retry import RETRY_AFTER_S
from .stats import Limits, WorkerSnapshot


class Placement:
    """Knows the workers and what they cache; picks, changes nothing in the books."""

    def __init__(self, config: RouterConfig, cluster_token: str) -> None:
        self.fleet = Fleet()
        self.index = PrefixIndex(config.max_index_blocks)
        self.limits: Limits | None = None
        """What the fleet can take, also while it is gone; None before the first worker."""
        self._key = cluster_key(cluster_token)
        self._place_timeout_s = config.place_timeout_s
        self._last_ready = float("-inf")
        self._turn = 0

    @property
    def ready(self) -> bool:
        """Whether a usable pair is there now."""
        return has_pair(self.fleet.usable())

    def look(self, now: float) -> None:
        """Remember when there last was a usable pair."""
        if self.ready:
            self._last_ready = now

    def joined(self, worker: Worker) -> None:
        """Enter a worker, and with it what the fleet can take."""
        self.fleet.enter(worker)
        workers = self.fleet.workers.values()
        longest = min(
            max((w.longest for w in workers if w.info.role.prefills), default=worker.longest),
            max((w.longest for w in workers if w.info.role.decodes), default=worker.longest),
        )
        self.limits = Limits(longest, worker.info.vocab_size, worker.info.model)

    def left(self, name: str) -> Worker | None:
        """Take a worker out, and what it cached; None if it is not there."""
        self.index.drop_worker(name)
        return self.fleet.workers.pop(name, None)

    def check(self, request: Request, now: float) -> None:
        """Raise `NotReady` if nobody could serve it for longer than a request may wait, `PromptTooLong` if nobody
        ever could."""
        self.look(now)
        if self.limits is None or now - self._last_ready > self._place_timeout_s:
            raise NotReady("no pair of workers is ready", retry_after_s=RETRY_AFTER_S)
        if len(request.tokens) + 1 > self.limits.max_model_len:
            raise PromptTooLong(
                f"the prompt has {len(request.tokens)} tokens, and prompt and output together may have "
                f"{self.limits.max_model_len}",
                param="prompt",
            )

    def pick(self, state: RequestState, now: float, avoid: Set[str] = frozenset()) -> Choice | None:
        """The best pair for the request as it is now, without the workers `avoid`; None where nobody has room."""
        state.excluded = {name: until for name, until in state.excluded.items() if until > now}
        workers = [w for w in self._generation(state) if w.name not in state.excluded and w.name not in avoid]
        if not workers:
            return None
        cached: dict[str, int] = {}
        for size in {w.info.block_size for w in workers}:
            blocks = self.index.match(state.chain(BlockHasher(size, self._key)))
            cached |= {w.name: blocks[w.name] * size for w in workers if w.info.block_size == size and w.name in blocks}
        demand = Demand(state.position, state.request.params.max_tokens - len(state.output))
        choice = choose(workers, demand, cached, self._turn)
        if choice is not None:
            self._turn += 1
            for worker in filter(None, (choice.prefill, choice.decode)):
                size = worker.info.block_size
                chain = state.chain(BlockHasher(size, self._key))
                self.index.touch(worker.name, chain[: cached.get(worker.name, 0) // size])
        return choice

    def _generation(self, state: RequestState) -> list[Worker]:
        """Usable workers of the weights that the request's output began with, while such a pair is there: an answer
        shall not change its model on the way. When they are all gone, to go on with others is better than to end."""
        usable = self.fleet.usable()
        own = [w for w in usable if w.info.fingerprint == state.fingerprint]
        return own if has_pair(own) else usable

    def snapshot(self) -> tuple[WorkerSnapshot, ...]:
        """All workers as they stand now."""
        return tuple(
            WorkerSnapshot(
                name=w.name,
                role=w.info.role,
                state=w.state,
                epoch=w.info.ref.epoch,
                load=w.load or Load(),
                queued_tokens=w.queued_tokens,
                batch=w.batch,
                index_blocks=self.index.blocks(w.name),
            )
            for w in self.fleet.workers.values()
        )
