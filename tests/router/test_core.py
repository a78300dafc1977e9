"""Each rule of a request's life, one by one."""

from __future__ import annotations

import pytest

from baton.common.errors import (
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    Overloaded,
    PromptTooLong,
    WorkerLost,
)
from baton.common.hashing import BlockHasher, cluster_key
from baton.common.messages import (
    Cancel,
    Failed,
    Finished,
    HandedOver,
    KvEvents,
    Resync,
    Started,
    TokenOut,
    Tokens,
)
from baton.common.types import Role, Timeline, Usage
from baton.router import request as request_module
from tests.router.fakes import CANCELLED, LENGTH, STOP, Driver, cancels, finish_of, load, request, tokens_of

# --- the good way ---


def test_a_request_goes_to_a_pair_and_its_tokens_come_back(pair: Driver) -> None:
    state = pair.submit((1, 2, 3), max_tokens=3)
    name, submit = pair.submitted()
    assert name == "p" and submit.decode is not None and submit.decode.name == "d"
    assert submit.request.tokens == (1, 2, 3) and submit.attempt == 1
    pair.now += 1
    pair.report("p", started=(Started(submit.ticket, 2),))
    pair.now += 1
    pair.tokens("d", submit.ticket, 3, 10)
    pair.report("p", handed_over=(HandedOver(submit.ticket),))
    pair.now += 1
    pair.tokens("d", submit.ticket, 4, 11, 12, finished=(Finished(submit.ticket, LENGTH),))
    batch = state.take()
    assert [token.token for token in batch.tokens] == [10, 11, 12]
    assert batch.finish is not None
    assert batch.finish.reason is LENGTH
    assert batch.finish.usage == Usage(3, 2, 3)
    assert batch.finish.timeline == Timeline(0.0, 1.0, 2.0, 2.0, 3.0)
    assert pair.take() == []
    pair.assert_empty()


def test_news_names_each_request_once_for_each_drain(pair: Driver) -> None:
    states = [pair.submit() for _ in range(3)]
    tickets = [submit.ticket for _, submit in pair.submits()]
    assert len(set(tickets)) == 3
    pair.news.clear()
    pair.report("d", tokens=Tokens.of(TokenOut(t, 3 + i, 7) for i in range(2) for t in tickets))
    assert pair.news == states


def test_an_end_at_the_first_token_needs_no_decode_worker(pair: Driver) -> None:
    state = pair.submit(max_tokens=1)
    _, submit = pair.submitted()
    pair.tokens("p", submit.ticket, 3, 9, finished=(Finished(submit.ticket, STOP),))
    assert finish_of(state).reason is STOP and tokens_of(state) == [9]
    pair.assert_empty()


def test_the_worker_that_caches_the_prefix_gets_the_request() -> None:
    driver = Driver()
    for name in ("a", "b", "c"):
        driver.up(name)
    prompt = range(40)
    hashes = BlockHasher(4, cluster_key("")).chain(list(prompt), "")
    driver.report("b", kv=(KvEvents(1, tuple(hashes[:8])),))
    for _ in range(3):
        state = driver.submit(tuple(prompt))
        name, _ = driver.submitted()
        assert name == "b"
        driver.core.cancel(state, driver.now)
        driver.drain()
        driver.take()
    assert driver.core.stats.decisions == {"prefix": 3}
    assert driver.core.stats.prefix_hit_tokens == 96


def test_a_missed_kv_event_asks_for_a_resync(pair: Driver) -> None:
    pair.report("p", kv=(KvEvents(4),))
    assert pair.take() == [("p", Resync())]


# --- exactly once ---


def test_duplicates_and_stale_tickets_change_nothing(pair: Driver) -> None:
    state = pair.submit(max_tokens=3)
    _, submit = pair.submitted()
    pair.tokens("d", submit.ticket, 3, 10, 11)
    pair.tokens("d", submit.ticket, 3, 10, 11)
    pair.tokens("d", submit.ticket + 1, 5, 99)
    pair.report(
        "d", failed=(Failed(submit.ticket + 1, "pool_full", ""),), finished=(Finished(submit.ticket + 1, STOP),)
    )
    assert tokens_of(state) == [10, 11] and state.outcome is None
    pair.tokens("d", submit.ticket, 5, 12, finished=(Finished(submit.ticket, LENGTH),))
    pair.report("d", finished=(Finished(submit.ticket, STOP),))
    assert finish_of(state).reason is LENGTH and tokens_of(state) == [10, 11, 12]


def test_a_gap_starts_a_new_attempt(two_pairs: Driver) -> None:
    state = two_pairs.submit(max_tokens=5)
    _, first = two_pairs.submitted()
    assert first.decode is not None
    decode = first.decode.name
    two_pairs.tokens(decode, first.ticket, 3, 10)
    two_pairs.tokens(decode, first.ticket, 5, 12, 13)
    ((_, second),) = [(n, m) for n, m in two_pairs.take() if not cancels([(n, m)])]
    assert tokens_of(state) == [10]
    assert second.request.tokens == (1, 2, 3, 10)  # type: ignore[attr-defined]


# --- waiting ---


def test_a_request_waits_for_a_worker_and_goes_when_one_comes(pair: Driver) -> None:
    pair.lose("d")
    state = pair.submit()
    assert pair.take() == [] and state.outcome is None
    pair.wait(3.0)
    pair.up("e", Role.DECODE)
    _, submit = pair.submitted()
    assert submit.decode is not None and submit.decode.name == "e"


def test_waiting_for_a_worker_ends_not_ready_and_for_room_overloaded() -> None:
    driver = Driver(place_timeout_s=2.0)
    driver.up("p", Role.PREFILL)
    driver.up("d", Role.DECODE, load(free_blocks=0))
    driver.tick()
    full = driver.submit()
    driver.wait(2.5)
    assert isinstance(full.outcome, Overloaded) and full.outcome.retry_after_s
    driver.lose("d")
    gone = driver.submit()
    driver.wait(2.5)
    assert isinstance(gone.outcome, NotReady) and gone.outcome.retry_after_s
    driver.assert_empty()


def test_room_that_a_report_shows_is_used_at_once_and_first_come_is_first() -> None:
    driver = Driver()
    driver.up("p", Role.PREFILL)
    driver.up("d", Role.DECODE, load(free_blocks=0))
    for name in ("first", "second"):
        driver.submit(name=name)
    driver.report("d", load=load(free_blocks=1))
    _, submit = driver.submitted()
    assert submit.request.request_id == "first"
    assert driver.core.snapshot().waiting == 1


def test_deadlines_end_requests_in_flight_and_waiting(pair: Driver) -> None:
    running = pair.submit(deadline_s=2.0)
    _, submit = pair.submitted()
    pair.wait(1.0)
    assert running.outcome is None
    pair.wait(1.1)
    assert isinstance(running.outcome, DeadlineExceeded)
    assert sorted(cancels(pair.take())) == [("d", submit.ticket), ("p", submit.ticket)]
    pair.lose("d")
    waiting = pair.submit(deadline_s=1.0)
    pair.wait(1.1)
    assert isinstance(waiting.outcome, DeadlineExceeded)
    pair.assert_empty()


def test_draining_workers_take_nothing_new_and_finish_what_they_have(pair: Driver) -> None:
    state = pair.submit(max_tokens=1)
    _, submit = pair.submitted()
    pair.core.set_draining(["d"])
    pair.submit()
    assert pair.take() == [] and not pair.core.ready
    pair.tokens("d", submit.ticket, 3, 10, finished=(Finished(submit.ticket, LENGTH),))
    assert finish_of(state).reason is LENGTH
    pair.core.set_draining([])
    pair.wait(0.3)
    assert len(pair.submits()) == 1


# --- at the door, and away from it ---


def test_admission_is_bounded() -> None:
    driver = Driver(max_requests=2)
    driver.up("a")
    first = driver.submit()
    driver.submit()
    with pytest.raises(Overloaded) as refused:
        driver.submit()
    assert refused.value.retry_after_s
    driver.core.cancel(first, driver.now)
    driver.submit()


def test_nobody_there_is_not_ready_at_the_door() -> None:
    driver = Driver(place_timeout_s=5.0)
    with pytest.raises(NotReady):
        driver.submit()
    driver.up("a")
    driver.tick()
    driver.lose("a")
    driver.submit()  # may come back soon
    driver.wait(6.0)
    with pytest.raises(NotReady):
        driver.submit()
    assert driver.core.stats.failed == {"not_ready": 3}


@pytest.mark.parametrize("limit", [{"max_model_len": 8}, {"total_blocks": 2}])
def test_a_prompt_that_no_worker_can_hold_is_refused_with_both_lengths(limit: dict[str, int]) -> None:
    driver = Driver()
    driver.up("a", **limit)
    with pytest.raises(PromptTooLong, match=r"8 tokens.* 8$"):
        driver.submit(range(8))
    driver.submit(range(7))
    assert driver.core.limits is not None and driver.core.limits.max_model_len == 8


def test_both_of_a_pair_have_to_hold_the_prompt() -> None:
    driver = Driver()
    driver.up("p", Role.PREFILL, max_model_len=100)
    driver.up("d", Role.DECODE, max_model_len=10)
    with pytest.raises(PromptTooLong):
        driver.submit(range(50))


def test_cancel_frees_both_workers_at_once_and_twice_is_no_more(pair: Driver) -> None:
    state = pair.submit()
    _, submit = pair.submitted()
    for _ in range(2):
        pair.core.cancel(state, pair.now)
        pair.drain()
    assert sorted(cancels(pair.take())) == [("d", submit.ticket), ("p", submit.ticket)]
    assert finish_of(state).reason is CANCELLED
    pair.tokens("d", submit.ticket, 3, 66)
    assert tokens_of(state) == []
    pair.assert_empty()


def test_cancel_after_the_handover_tells_the_decode_worker_only(pair: Driver) -> None:
    state = pair.submit()
    _, submit = pair.submitted()
    pair.tokens("d", submit.ticket, 3, 10)
    pair.core.cancel(state, pair.now)
    pair.drain()
    assert cancels(pair.take()) == [("d", submit.ticket)]


def test_a_worker_that_works_on_a_void_ticket_is_told_again(pair: Driver) -> None:
    state = pair.submit()
    _, submit = pair.submitted()
    pair.core.cancel(state, pair.now)
    pair.drain()
    pair.take()
    pair.tokens("d", submit.ticket, 3, 66, 67)
    assert pair.take() == [("d", Cancel(submit.ticket))]


def test_cancel_of_a_waiting_request(pair: Driver) -> None:
    pair.lose("p")
    state = pair.submit()
    pair.core.cancel(state, pair.now)
    assert finish_of(state).reason is CANCELLED
    pair.assert_empty()


def test_unread_tokens_are_bounded(pair: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.router.core.MAX_BACKLOG", 5)
    assert request_module.MAX_BACKLOG > 4096
    state = pair.submit(max_tokens=100)
    _, submit = pair.submitted()
    for i in range(6):
        assert state.outcome is None
        pair.tokens("d", submit.ticket, 3 + i, i)
    assert isinstance(state.outcome, Overloaded)
    assert cancels(pair.take()) == [("d", submit.ticket)]
    pair.assert_empty()


def test_closing_fails_all_that_is_not_done(pair: Driver) -> None:
    state = pair.submit()
    pair.core.close()
    assert isinstance(state.outcome, NotReady)
    pair.assert_empty()


def test_tokens_come_before_the_error_that_ended_them(pair: Driver) -> None:
    state = pair.submit(max_tokens=9)
    _, submit = pair.submitted()
    pair.tokens("d", submit.ticket, 3, 10, failed=(Failed(submit.ticket, "invalid_value", "no"),))
    assert [token.token for token in state.take().tokens] == [10]
    with pytest.raises(InvalidRequest):
        state.take()


def test_snapshot_shows_workers_and_requests(two_pairs: Driver) -> None:
    two_pairs.submit(range(9))
    name, submit = two_pairs.submitted()
    assert submit.decode is not None
    snapshot = two_pairs.core.snapshot()
    assert (snapshot.running, snapshot.waiting, len(snapshot.workers)) == (1, 0, 4)
    by_name = {w.name: w for w in snapshot.workers}
    assert by_name[name].queued_tokens == 9 and by_name[submit.decode.name].batch == 1
    assert {w.state for w in snapshot.workers} == {"ready"}


def test_errors_of_workers_keep_their_type_and_name_the_worker(pair: Driver) -> None:
    state = pair.submit()
    _, submit = pair.submitted()
    pair.report("p", failed=(Failed(submit.ticket, "no_such_code", "odd"),))
    assert type(state.outcome) is BatonError and "worker p: odd" in str(state.outcome)
    assert not isinstance(state.outcome, WorkerLost)
    assert request().request_id == "r"
