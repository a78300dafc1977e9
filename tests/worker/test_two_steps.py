"""The overlapped loop says what the plain one says: whole workers without processes, whose device computes at once or
as late as can be, while requests end in every way, the pool is too small for them, and steps fail."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import Mock

import pytest

from baton.common.clock import ManualClock
from baton.common.config import HandoverConfig
from baton.common.errors import EngineBroken, EngineFailure
from baton.common.hashing import BlockHasher
from baton.common.messages import Cancel, Failed, Finished, Submit
from baton.common.types import Request, Role
from baton.engine.block_table import BlockTable
from baton.engine.loop import EngineLoop
from baton.engine.mailbox import FromRouter, Inbox, Mail, Outbox, Recast, RouterGone, RouterJoined
from baton.engine.plan import StepPlan
from baton.engine.role import Context, Limits
from baton.kvtransfer.inlet import RankInlet
from baton.worker.cast import Cast
from tests.poison import Poison
from tests.toy import BLOCK_SIZE, EOS, LAYERS, VOCAB, LateRunner, ToyPool, ToyRunner, endpoint, oracle, request

LONGEST = 60
NO_OUTLET: Any = Mock(failed=Mock(return_value=()))


class Bench:
    """A colocated worker. Blocks that nobody owns are poisoned, and the books are proved after each round."""

    def __init__(self, overlap: bool, late: bool, num_blocks: int = 64) -> None:
        self.clock, self.inbox, self.mail = ManualClock(1.0), Inbox(), list[Mail]()
        pool = ToyPool(num_blocks)
        self.runner = (LateRunner if late else ToyRunner)(pool)
        limits = Limits(
            vocab_size=VOCAB, eos_ids=frozenset({EOS}), max_model_len=LONGEST, max_batch_tokens=24, max_running=16,
            max_waiting=999,
        )  # fmt: skip
        self.table = BlockTable(num_blocks, BlockHasher(BLOCK_SIZE))
        context = Context(
            endpoint=endpoint("w"), table=self.table, outbox=Outbox(), limits=limits, handover=HandoverConfig()
        )
        self.cast = Cast(context, RankInlet(pool.store, self.clock, self.inbox.post), NO_OUTLET)
        roles = self.cast.play(Role.COLOCATED)
        self.loop = EngineLoop(context, roles, self.runner, self.inbox, self.clock, self.mail.append, overlap)
        self.poison = Poison(self.table.manager, pool.shared.memory.reshape(LAYERS, num_blocks, -1))
        self.inbox.post(RouterJoined("router"))

    def submit(self, ticket: int, what: Request, router: str = "router") -> None:
        self.inbox.post(FromRouter(router, Submit(ticket, 1, what)))

    def cancel(self, ticket: int) -> None:
        self.inbox.post(FromRouter("router", Cancel(ticket)))

    def round(self) -> bool:
        computed = self.loop.step()
        self.clock.advance(0.01)
        self.poison.check()
        report = self.loop.inspect()
        assert report.ok, report.problem
        return computed

    def rest(self) -> None:
        """Go round until nothing is to be done, and find all blocks back."""
        for _ in range(3000):
            if not self.round():
                break
        else:
            raise AssertionError("it does not come to rest")
        report = self.loop.inspect()
        assert report.sequences == report.pinned_blocks == 0

    def tokens(self, ticket: int) -> list[int]:
        found = [t for mail in self.mail for r in mail.reports.values() for t in r.tokens if t.ticket == ticket]
        positions = [t.position for t in found]
        assert positions == list(range(positions[0], positions[0] + len(found))) if found else True
        return [t.token for t in found]

    def heard(self, kind: type) -> dict[int, Any]:
        said = [s for mail in self.mail for r in mail.reports.values() for s in (*r.finished, *r.failed)]
        return {s.ticket: s for s in said if isinstance(s, kind)}


LOOPS = [(False, True), (True, False), (True, True)]
"""(overlap, late). The plain loop over a device that computes at once is what all other tests have."""


def expected(what: Request) -> list[int]:
    """All of the answer, with the stop token that ends it."""
    length = min(what.params.max_tokens, LONGEST - len(what.tokens))
    answer = oracle(what.tokens, length)
    ends = [i for i, token in enumerate(answer) if token in what.params.stop_token_ids]
    return answer[: ends[0] + 1] if ends else answer


def some_request(rng: random.Random, number: int) -> Request:
    prompt = [1, 2, 3, 4, 5, 6][: rng.choice([0, 6])] + [rng.randrange(900) for _ in range(rng.randrange(1, 30))]
    length = rng.choice([1, 2, 3, 9, 20, 99])
    stops = oracle(prompt, 12)[rng.randrange(12) :][:1] if rng.random() < 0.5 else []
    return request(str(number), prompt, length, stop_token_ids=tuple(stops))


@pytest.mark.parametrize(("overlap", "late"), LOOPS)
@pytest.mark.parametrize("num_blocks", [20, 90])
def test_all_say_what_the_oracle_says(num_blocks: int, overlap: bool, late: bool) -> None:
    preemptions = 0
    for seed in range(12):
        rng, bench = random.Random(seed), Bench(overlap, late, num_blocks)
        asked = {n: some_request(rng, n) for n in range(14)}
        cancelled = set(rng.sample(range(14), 3))
        for number, what in asked.items():
            bench.submit(number, what)
            for _ in range(rng.randrange(3)):
                bench.round()
            for gone in cancelled & {number - 2}:
                bench.cancel(gone)
        bench.rest()
        for number, what in asked.items():
            got, answer = bench.tokens(number), expected(what)
            assert got == (answer[: len(got)] if number in cancelled else answer), (seed, number)
        assert not bench.heard(Failed) and bench.heard(Finished).keys() | cancelled == asked.keys()
        preemptions += bench.loop.inspect().preemptions
    assert preemptions > 5 or num_blocks == 90
