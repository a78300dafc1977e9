"""What makes a worker a prefill or a decode worker: a policy on the one loop. Here is what all policies share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ..common.config import HandoverConfig
from ..common.errors import BatonError
from ..common.messages import Endpoint, TokenOut
from ..common.types import WorkerRef
from .block_table import BlockTable
from .mailbox import InboxItem, Outbox
from .plan import Results, StepPlan
from .sequence import Sequence
from .stats import Stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the model and the configuration allow."""

    vocab_size: int
    eos_ids: frozenset[int]
    max_model_len: int
    max_batch_tokens: int
    max_running: int
    max_waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the roles of one worker share."""

    endpoint: Endpoint
    """This worker, as it tells the others of a handover."""
    table: BlockTable
    outbox: Outbox
    limits: Limits
    handover: HandoverConfig
    stats: Stats = field(default_factory=Stats)
    handover_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def ref(self) -> WorkerRef:
        return self.endpoint.ref


class Host(Protocol):
    """Who goes on with a request whose KV has come from another worker."""

    def admit(self, sequence: Sequence) -> None:
        """Give it blocks. Raises the `BatonError` with which the source is refused."""
        ...

    def take(self, sequence: Sequence, tokens: tuple[TokenOut, ...]) -> None:
        """It is ours now. `tokens`, the last of the sequence's, are new, and the router is to be told of them."""
        ...


class LocalBatch(Protocol):
    """The decoding half of a colocated worker, as its prefilling half sees it."""

    @property
    def headroom(self) -> int:
        """Blocks that must stay available for those that run already."""
        ...

    @property
    def places(self) -> int:
        """Sequences that may still join the batch."""
        ...

    def join(self, sequence: Sequence) -> None:
        """Take a sequence whose first token is known."""
        ...


class Role(Protocol):
    """A policy. The loop calls, in each round: `receive` for each item, `tick`, `plan`, `on_layer` while the step is
    launched, and, when it or the one before has ended, `computed` with those that this role planned and that have not
    been dropped since, or `failed` for each of them, which drops it."""

    def receive(self, item: InboxItem, now: float) -> None: ...

    def tick(self, now: float) -> None: ...

    def plan(self, plan: StepPlan, now: float) -> None: ...

    def on_layer(self, layer: int) -> None: ...

    def computed(self, sequences: list[Sequence], results: Results, now: float) -> None: ...

    def failed(self, sequence: Sequence, error: BatonError) -> None: ...

    def sequences(self) -> Iterable[Sequence]:
        """All that this role holds."""
        ...

    @property
    def waiting(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that wait to be computed."""
        ...

    @property
    def handovers(self) -> int: ...

    @property
    def reserved_blocks(self) -> int: ...


class Computeless:
    """Base of policies that plan nothing."""

    def tick(self, now: float) -> None:
        """Nothing is due."""

    def plan(self, plan: StepPlan, now: float) -> None:
        """Adds nothing."""

    def on_layer(self, layer: int) -> None:
        """Nothing leaves layer by layer."""

    def computed(self, sequences: list[Sequence], results: Results, now: float) -> None:
        raise AssertionError("nothing was planned")

    def failed(self, sequence: Sequence, error: BatonError) -> None:
        raise AssertionError("nothing was planned")

    def sequences(self) -> Iterable[Sequence]:
        return ()

    @property
    def waiting(self) -> int:
        return 0

    @property
    def running(self) -> int:
        return 0

    @property
    def queued_tokens(self) -> int:
        return 0

    @property
    def handovers(self) -> int:
        return 0

    @property
    def reserved_blocks(self) -> int:
        return 0
