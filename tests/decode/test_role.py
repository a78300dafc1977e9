"""A decode worker's policy in a loop of its own, step by step: no gRPC, no threads, a clock that is moved by hand."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from baton.common.clock import ManualClock
from baton.common.config import HandoverConfig
from baton.common.hashing import BlockHasher
from baton.common.messages import Abort, Commit, Move, Renew, Reserve, Reserved, Submit, TokenOut
from baton.common.types import Request, Role
from baton.engine.block_table import BlockTable
from baton.engine.loop import EngineLoop
from baton.engine.mailbox import FromRouter, FromSource, FromTarget, Inbox, Mail, Outbox, RouterJoined
from baton.engine.role import Context, Limits
from baton.kvtransfer.inlet import RankInlet
from baton.worker.cast import Cast
from tests.toy import BLOCK_SIZE, EOS, VOCAB, ToyPool, ToyRunner, endpoint, oracle, request

SOURCE, TARGET = endpoint("prefill-0"), endpoint("worker-0", epoch=2)
NO_OUTLET: Any = Mock(failed=Mock(return_value=()))


class Bench:
    """One worker without its process. `said`: all mail so far."""

    def __init__(self, role: Role, num_blocks: int, headroom_tokens: int = 64) -> None:
        self.clock, self.inbox, pool = ManualClock(), Inbox(), ToyPool(num_blocks)
        self.said: list[Mail] = []
        limits = Limits(
            vocab_size=VOCAB,
            eos_ids=frozenset({EOS}),
            max_model_len=150,
            max_batch_tokens=32,
            max_running=32,
            max_waiting=999,
        )
        context = Context(
            endpoint=TARGET, table=BlockTable(num_blocks, BlockHasher(BLOCK_SIZE)), outbox=Outbox(),
            limits=limits, handover=HandoverConfig(lease_s=2.0, headroom_tokens=headroom_tokens),
        )  # fmt: skip
        inlet = RankInlet(pool.store, self.clock, self.inbox.post)
        roles = Cast(context, inlet, NO_OUTLET).play(role)
        self.loop = EngineLoop(context, roles, ToyRunner(pool), self.inbox, self.clock, self.said.append)
        self.inbox.post(RouterJoined("router"))

    def submit(self, ticket: int, what: Request) -> None:
        self.inbox.post(FromRouter("router", Submit(ticket, 1, what)))

    def until(self, kind: type) -> list[Any]:
        """Go round until messages of this kind have been sent to a target: all of them."""
        while True:
            self.loop.step()
            if found := [m for mail in self.said for _, m in mail.to_targets if isinstance(m, kind)]:
                return found

    def tokens(self, ticket: int) -> list[TokenOut]:
        return [t for mail in self.said for r in mail.reports.values() for t in r.tokens if t.ticket == ticket]


def test_who_was_preempted_is_not_starved_by_those_who_come_later() -> None:
    """A colocated worker whose pool never has room for a long request while all the short ones are let in."""
    bench, prompt = Bench(Role.COLOCATED, num_blocks=40), list(range(120))
    for step in range(1, 400):
        if step % 2 == 0:
            bench.submit(step, request(str(step), [step] * 9, 30))
        if step == 5:
            bench.submit(0, request("long", prompt, 29))
        bench.loop.step()
        bench.clock.advance(0.01)
    assert [t.token for t in bench.tokens(0)] == oracle(prompt, 29)
    assert bench.loop.inspect().preemptions > 0


def test_a_reservation_ends_with_its_deadline_though_its_source_renews_for_ever() -> None:
    """A source whose loop hangs in a step is alive on the wire."""
    bench = Bench(Role.DECODE, num_blocks=40)
    what = request("r", range(30), 20)
    bench.inbox.post(FromSource(SOURCE, Reserve(1, 1, 1, "router", what, TARGET.ref)))
    bench.loop.step()
    assert bench.said[-1].to_sources == [(SOURCE.ref, Reserved(1, 0, "tcp"))]
    for _ in range(int(what.deadline_s) + 1):
        bench.inbox.post(FromSource(SOURCE, Renew((1,))))
        bench.clock.advance(1.0)
        bench.loop.step()
    ((_, last),) = bench.said[-1].to_sources
    assert isinstance(last, Abort)
    report = bench.loop.inspect()
    assert report.ok and report.pinned_blocks == report.reserved_blocks == report.handovers == 0


def test_extra_room_for_one_that_runs_already_is_no_reason_to_refuse_it() -> None:
    """One that was drawn for and is tried again through prefill needs no more room than others."""
    blocks = -(-(96 + 2) // BLOCK_SIZE)
    bench = Bench(Role.DECODE, blocks + 1, headroom_tokens=2)
    other, what = request("other", [7], 9), request("r", range(96), 40, prompt_len=90)
    bench.inbox.post(FromSource(SOURCE, Reserve(1, 1, 1, "router", other, TARGET.ref)))
    bench.inbox.post(FromSource(SOURCE, Reserve(2, 2, 1, "router", what, TARGET.ref)))
    bench.loop.step()
    assert bench.said[-1].to_sources == [(SOURCE.ref, Reserved(1, 0, "tcp")), (SOURCE.ref, Reserved(2, 0, "tcp"))]
    assert bench.loop.load().reserved_blocks == 1 + blocks


@pytest.mark.parametrize(("length", "headroom"), [(20, 2), (96, 6)])
def test_a_request_that_moves_runs_on_for_half_the_room_that_its_target_keeps(length: int, headroom: int) -> None:
    """Its bytes never arrive, as far as this source hears."""
    source, target = Bench(Role.COLOCATED, 60, headroom_tokens=2), Bench(Role.DECODE, 60, headroom_tokens=2)
    source.submit(1, request("r", range(length), 40))
    while not source.tokens(1):
        source.loop.step()
    source.inbox.post(FromRouter("router", Move(1, TARGET.ref)))
    asked: list[Reserve] = source.until(Reserve)
    target.inbox.post(FromSource(SOURCE, asked[0]))
    target.loop.step()
    assert target.loop.load().reserved_blocks == -(-(len(asked[0].request.tokens) + headroom) // BLOCK_SIZE)
    source.inbox.post(FromTarget(TARGET, Reserved(asked[0].handover_id, 0, "tcp")))
    commits: list[Commit] = source.until(Commit)
    assert headroom // 2 <= len(commits[0].tokens) <= headroom
