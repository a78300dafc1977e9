"""The overlapped loop says what the plain one says: whole workers without processes, whose device computes at once or
as late as can be, while requests end in every way, the pool is too small for them, and steps fail."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest

from baton.common.clock import ManualClock, RealClock
from baton.common.config import HandoverConfig
from baton.common.errors import EngineBroken, EngineFailure
from baton.common.hashing import BlockHasher
from baton.common.messages import Cancel, Failed, Finished, Submit
from baton.common.types import Request, Role
from baton.decode.role import DecodeRole
from baton.engine.block_table import BlockTable
from baton.engine.loop import EngineLoop
from baton.engine.mailbox import FromRouter, Inbox, Mail, Outbox, Recast, RouterGone, RouterJoined
from baton.engine.plan import Launched, OnLayer, Results, StepPlan
from baton.engine.role import Context, Limits
from baton.kvtransfer.inlet import RankInlet
from baton.worker.assembly import Worker
from baton.worker.cast import Cast
from tests.poison import Poison
from tests.toy import (
    BLOCK_SIZE,
    EOS,
    LAYERS,
    VOCAB,
    LateRunner,
    ToyEngine,
    ToyPool,
    ToyRunner,
    endpoint,
    logprob,
    oracle,
    request,
    worker_config,
)

LONGEST = 60
NO_OUTLET: Any = Mock(failed=Mock(return_value=()))


class Bench:
    """A colocated worker. Blocks that nobody owns are poisoned, and the books are proved after each round."""

    def __init__(self, overlap: bool, late: bool, num_blocks: int = 64, eos: int = EOS) -> None:
        self.clock, self.inbox, self.mail = ManualClock(1.0), Inbox(), list[Mail]()
        pool = ToyPool(num_blocks)
        self.runner = (LateRunner if late else ToyRunner)(pool)
        limits = Limits(
            vocab_size=VOCAB, eos_ids=frozenset({eos}), max_model_len=LONGEST, max_batch_tokens=24, max_running=16,
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

    @property
    def pinned(self) -> int:
        return self.table.manager.pinned

    def rest(self) -> None:
        """Go round until nothing is to be done, and find all blocks back."""
        for _ in range(3000):
            if not self.round():
                break
        else:
            raise AssertionError("it does not come to rest")
        report = self.loop.inspect()
        assert report.sequences == report.pinned_blocks == 0

    def tokens(self, ticket: int, asked: bool = False) -> list[int]:
        """Told in their order, with log-probabilities where they were asked for."""
        found = [t for mail in self.mail for r in mail.reports.values() for t in r.tokens if t.ticket == ticket]
        positions = [t.position for t in found]
        assert positions == list(range(positions[0], positions[0] + len(found))) if found else True
        assert all(t.logprob == (logprob(t.position, t.token) if asked else None) for t in found)
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
    return request(str(number), prompt, length, stop_token_ids=tuple(stops), logprobs=rng.choice([None, None, 0]))


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
            got, answer = bench.tokens(number, what.params.logprobs is not None), expected(what)
            assert got == (answer[: len(got)] if number in cancelled else answer), (seed, number)
        told = sum(len(report.tokens) for mail in bench.mail for report in mail.reports.values())
        assert bench.loop.load().output_tokens == told
        assert not bench.heard(Failed) and bench.heard(Finished).keys() | cancelled == asked.keys()
        preemptions += bench.loop.inspect().preemptions
    assert preemptions > 5 or num_blocks == 90


@pytest.mark.parametrize(("overlap", "late"), LOOPS)
def test_nobody_is_computed_past_his_end(overlap: bool, late: bool) -> None:
    """An end by length is known before it comes; an end by a stop token costs one row."""
    bench, rows = Bench(overlap, late), list[int]()
    bench.runner.before = lambda plan: rows.append(plan.tokens)
    stop = oracle([1, 2, 3], 9)[7]
    bench.submit(1, request("1", [1, 2, 3], 8))
    bench.rest()
    assert sum(rows) == 3 + 7 and bench.heard(Finished)[1].reason == "length"
    bench.submit(2, request("2", list(range(100, 157)), 99))
    bench.rest()
    assert sum(rows) == 3 + 7 + LONGEST - 1 and bench.heard(Finished)[2].reason == "length"
    rows.clear()
    bench.submit(3, request("3", [1, 2, 3], 99, stop_token_ids=(stop,)))
    bench.rest()
    assert sum(rows) == 3 + 7 + overlap and bench.heard(Finished)[3].reason == "stop"


@pytest.mark.parametrize(("overlap", "late"), LOOPS)
@pytest.mark.parametrize("last", [0, 1, 5])
def test_the_models_own_end_ends(last: int, overlap: bool, late: bool) -> None:
    """With a prompt's first token or later, unless it is to be ignored or comes too early."""
    answer = oracle([1, 2, 3], 9)
    bench = Bench(overlap, late, eos=answer[last])
    for ticket, params in enumerate([{}, {"ignore_eos": True}, {"min_tokens": last + 2}, {"min_tokens": last + 1}]):
        bench.submit(ticket, request(str(ticket), [1, 2, 3], 9, **params))
    bench.rest()
    assert [bench.tokens(ticket) for ticket in range(4)] == [answer[: last + 1], answer, answer, answer[: last + 1]]
    assert [bench.heard(Finished)[n].reason for n in range(4)] == ["stop", "length", "length", "stop"]


@pytest.mark.parametrize(("overlap", "late"), LOOPS)
def test_each_ends_by_his_own_deadline(overlap: bool, late: bool) -> None:
    """Whether those before him have ended or run out of time."""
    bench, seconds = Bench(overlap, late), {1: 9.0, 2: 4.0, 3: 6.0, 4: 2.0, 5: 8.0}
    for ticket, deadline in seconds.items():
        bench.submit(ticket, replace(request(str(ticket), [ticket] * 3, 2 if ticket == 4 else 50), deadline_s=deadline))
    begun, due = bench.clock.now(), [2, 3, 5, 1]
    while not bench.heard(Finished):
        bench.round()
    for count, ticket in enumerate(due):
        bench.clock.advance(begun + seconds[ticket] - 0.005 - bench.clock.now())
        bench.round()
        assert len(bench.heard(Failed)) == count, "nobody before his time"
        bench.round()
        assert list(bench.heard(Failed)) == due[: count + 1]
    assert bench.heard(Finished).keys() == {4}
    assert {said.code for said in bench.heard(Failed).values()} == {"deadline_exceeded"}


def test_a_step_is_launched_before_the_one_before_it_is_collected() -> None:
    bench, order = Bench(overlap=True, late=True), list[str]()
    launch = bench.runner.launch

    def launched(plan: StepPlan, on_layer: Any = None) -> Any:
        order.append("launch")
        return launch(plan, on_layer)

    bench.runner.launch = launched  # type: ignore[method-assign]
    bench.runner.before = lambda plan: order.append("collect")
    bench.submit(1, request("1", [5], 4))
    bench.rest()
    assert order == ["launch", "collect", "launch", "launch", "collect", "launch", "collect", "collect"]


@pytest.mark.parametrize(("overlap", "late"), LOOPS)
@pytest.mark.parametrize("end", ["cancel", "router", "deadline"])
def test_who_goes_while_computed_leaves_nothing_behind(end: str, overlap: bool, late: bool) -> None:
    for rounds in range(1, 6):
        bench, prompt = Bench(overlap, late), list(range(40))
        bench.inbox.post(RouterJoined("other"))
        bench.submit(1, replace(request("1", prompt, 9), deadline_s=5.0), router="other")
        bench.submit(2, request("2", prompt[5:25], 30))
        for _ in range(rounds):
            bench.round()
        if end == "cancel":
            bench.inbox.post(FromRouter("other", Cancel(1)))
        elif end == "router":
            bench.inbox.post(RouterGone("other"))
        else:
            bench.clock.advance(5.0)
        bench.rest()
        assert bench.tokens(2) == oracle(prompt[5:25], 30)
        assert len(bench.tokens(1)) < 9 and (end != "deadline" or bench.heard(Failed)[1].code == "deadline_exceeded")


@pytest.mark.parametrize(("overlap", "late"), LOOPS)
@pytest.mark.parametrize("how", ["recomputed", "asked for again"])
def test_who_begins_anew_while_computed_says_the_same(how: str, overlap: bool, late: bool) -> None:
    """What the steps under way draw for its first life is not taken for its second."""
    asked = {n: request(str(n), list(range(30 + n)), 12) for n in range(3)}
    for rounds in range(1, 9):
        bench = Bench(overlap, late)
        for ticket, what in asked.items():
            bench.submit(ticket, what)
        for _ in range(rounds):
            bench.round()
        if how == "recomputed":
            (planner,) = (role._planner for role in bench.loop.roles if isinstance(role, DecodeRole))
            for sequence in planner.running.copy():
                planner.recompute(sequence)
        else:
            bench.loop._tell()  # what the first life has drawn
            bench.mail.clear()
            for ticket, what in asked.items():
                bench.cancel(ticket)
                bench.submit(ticket, what)
        bench.rest()
        assert [bench.tokens(n) for n in asked] == [oracle(what.tokens, 12) for what in asked.values()]


class Faulty:
    """Fails the step of this number, when it is launched or when it is asked for. All that follows it on the device may
    do what it likes; here it computes."""

    def __init__(self, runner: ToyRunner, number: int, error: EngineFailure, at_launch: bool) -> None:
        self._runner = runner
        self._number = number
        self._error = error
        self._at_launch = at_launch

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        self._number -= 1
        if self._number == 0 and self._at_launch:
            raise self._error
        launched = self._runner.launch(plan, on_layer)
        return Failing(launched, self._error) if self._number == 0 else launched


@dataclass
class Failing:
    launched: Launched
    error: EngineFailure

    def results(self) -> Results:
        self.launched.results()
        raise self.error


@pytest.mark.parametrize(("overlap", "late"), LOOPS)
@pytest.mark.parametrize("at_launch", [False, True])
def test_a_step_that_fails_takes_its_requests_along_and_no_others(at_launch: bool, overlap: bool, late: bool) -> None:
    for number in range(1, 9):
        bench = Bench(overlap, late)
        bench.loop._runner = Faulty(bench.runner, number, EngineFailure("out of memory"), at_launch)
        asked = {n: request(str(n), list(range(n, n + 11)), 3 + n) for n in range(4)}
        for ticket, what in asked.items():
            bench.submit(ticket, what)
            bench.round()
        bench.rest()
        failed = bench.heard(Failed)
        assert failed and bench.heard(Finished).keys() == asked.keys() - failed.keys()
        for ticket, what in asked.items():
            got, answer = bench.tokens(ticket), oracle(what.tokens, what.params.max_tokens)
            assert got == answer[: len(got)] and (ticket in failed or got == answer)
        bench.submit(9, asked[0])
        bench.rest()
        assert bench.tokens(9) == oracle(asked[0].tokens, 3)


@pytest.mark.parametrize(("overlap", "late"), LOOPS)
@pytest.mark.parametrize("at_launch", [False, True])
def test_a_broken_engine_ends_the_loop_and_all_are_told(at_launch: bool, overlap: bool, late: bool) -> None:
    bench = Bench(overlap, late)
    bench.loop._runner = Faulty(bench.runner, 3, EngineBroken("a rank is gone"), at_launch)
    bench.submit(1, request("1", [1] * 30, 9))
    bench.round()
    bench.submit(2, request("2", [2] * 5, 9))
    with pytest.raises(EngineBroken, match="a rank is gone"):
        bench.rest()
    assert bench.heard(Failed).keys() == {1, 2}


def test_nobody_waits_for_what_a_broken_engine_still_does() -> None:
    """Each wait for a device that hangs takes a minute, in which no other worker takes this one's place."""
    bench, waits = Bench(overlap=True, late=True), list[int]()
    bench.loop._runner = Mock(launch=lambda plan, on_layer: Mock(results=partial(hang, waits)))
    bench.submit(1, request("1", [1] * 30, 9))
    with pytest.raises(EngineBroken):
        bench.rest()
    assert len(waits) == 1 and bench.heard(Failed)[1].code == "engine_broken"


def hang(waits: list[int]) -> None:
    waits.append(1)
    raise EngineBroken("the device hangs")


@pytest.mark.parametrize(("overlap", "late"), LOOPS)
def test_what_runs_already_is_heard_of_when_a_launch_fails(overlap: bool, late: bool) -> None:
    bench = Bench(overlap, late)
    bench.loop._runner = Faulty(bench.runner, 5, EngineFailure("out of memory"), at_launch=True)
    bench.submit(1, request("1", [1, 2, 3], 30))
    bench.rest()
    assert bench.tokens(1) == oracle([1, 2, 3], 4) and bench.heard(Failed)[1].code == "engine_failure"


def test_a_worker_does_not_turn_while_a_step_is_under_way() -> None:
    """Its only request has ended by a stop token; but the row too many still writes a block."""
    bench, held = Bench(overlap=True, late=True), list[int]()
    stop = oracle([1, 2, 3], 5)[4]
    bench.submit(1, request("1", [1, 2, 3], 30, stop_token_ids=(stop,)))
    bench.round()
    bench.inbox.post(Recast(lambda: bench.cast.play(Role.DECODE), 1e9, lambda _: held.append(bench.pinned)))
    while any(role.sequences() for role in bench.loop.roles):
        bench.round()
    assert bench.pinned > 0 and held == []
    bench.rest()
    assert held == [0]


@pytest.mark.parametrize(
    ("setting", "late", "two"),
    [("auto", True, True), ("auto", False, False), ("off", True, False), ("on", False, True)],
)
async def test_how_many_steps_a_worker_has_under_way(setting: str, late: bool, two: bool) -> None:
    config = worker_config("w", Role.COLOCATED)
    config = replace(config, engine=replace(config.engine, overlap=setting))
    worker, most = Worker(config, ToyEngine(late=late), RealClock()), 0
    worker.inbox.post(RouterJoined("router"))
    worker.inbox.post(FromRouter("router", Submit(1, 1, request("1", [1, 2, 3], 9))))
    collect = worker.loop._collect

    def collected() -> None:
        nonlocal most
        most = max(most, len(worker.loop._running))
        collect()

    worker.loop._collect = collected  # type: ignore[method-assign]
    while worker.loop.step():
        pass
    await worker.stop()
    assert most == 1 + two
