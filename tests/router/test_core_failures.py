"""What becomes of a request when workers fail or refuse it, one rule at a time."""

from __future__ import annotations

import itertools

import pytest

from baton.common.errors import (
    EngineFailure,
    HandoverFailed,
    InvalidRequest,
    Overloaded,
    PoisonRequest,
    PoolFull,
)
from baton.common.messages import (
    Failed,
    Finished,
    HandedOver,
)
from baton.common.types import Role
from tests.router.fakes import LENGTH, STOP, Driver, cancels, finish_of, load, tokens_of

# --- losses ---


def test_a_lost_decode_worker_is_replaced_and_the_stream_goes_on(two_pairs: Driver) -> None:
    state = two_pairs.submit((1, 2, 3), max_tokens=4)
    _, first = two_pairs.submitted()
    assert first.decode is not None
    lost = first.decode.name
    two_pairs.tokens(lost, first.ticket, 3, 10, 11)
    two_pairs.now += 5
    two_pairs.lose(lost)
    _, second = two_pairs.submitted()
    assert second.decode is not None and second.decode.name != lost
    assert second.ticket != first.ticket and second.attempt == 2
    assert second.request.tokens == (1, 2, 3, 10, 11) and second.request.prompt_len == 3
    assert second.request.deadline_s == 595.0
    two_pairs.tokens(lost, first.ticket, 5, 66)
    two_pairs.tokens(second.decode.name, second.ticket, 5, 12, 13, finished=(Finished(second.ticket, LENGTH),))
    assert tokens_of(state) == [10, 11, 12, 13]
    assert finish_of(state).usage.completion_tokens == 4
    two_pairs.assert_empty()


def test_losing_one_of_a_pair_before_the_handover_cancels_at_the_other(two_pairs: Driver) -> None:
    two_pairs.submit()
    source, first = two_pairs.submitted()
    assert first.decode is not None
    two_pairs.lose(first.decode.name)
    assert cancels(two_pairs.sent) == [(source, first.ticket)]
    two_pairs.sent = [m for m in two_pairs.sent if not cancels([m])]
    source, second = two_pairs.submitted()
    assert second.decode is not None
    two_pairs.lose(source)
    assert cancels(two_pairs.sent) == [(second.decode.name, second.ticket)]


@pytest.mark.parametrize("word", ["handed over", "first token"])
def test_a_prefill_worker_lost_after_the_handover_does_not_matter(pair: Driver, word: str) -> None:
    state = pair.submit(max_tokens=2)
    _, submit = pair.submitted()
    if word == "handed over":
        pair.report("p", handed_over=(HandedOver(submit.ticket),))
    else:
        pair.tokens("d", submit.ticket, 3, 10)
    pair.report("p", failed=(Failed(submit.ticket, "handover_failed", "late"),))
    pair.lose("p")
    assert pair.take() == []
    pair.tokens(
        "d",
        submit.ticket,
        state.position,
        *range(10 + len(state.output), 12),
        finished=(Finished(submit.ticket, LENGTH),),
    )
    assert tokens_of(state) == [10, 11]
    pair.assert_empty()


def test_a_request_that_loses_several_workers_is_poison() -> None:
    driver = Driver(max_losses=3)
    for i in range(4):
        driver.up(f"w{i}")
    state = driver.submit()
    for _ in range(3):
        assert state.outcome is None
        name, _ = driver.submitted()
        driver.lose(name)
    assert isinstance(state.outcome, PoisonRequest)
    assert len(driver.core.snapshot().workers) == 1
    driver.assert_empty()


def test_a_request_that_breaks_engines_is_poison_too() -> None:
    driver = Driver(max_losses=2)
    driver.up("a")
    driver.up("b")
    state = driver.submit()
    blamed = []
    for _ in range(2):
        name, submit = driver.submitted()
        blamed.append(name)
        driver.report(name, failed=(Failed(submit.ticket, EngineFailure.code, "nan"),))
    assert sorted(blamed) == ["a", "b"]
    assert isinstance(state.outcome, PoisonRequest)


def test_a_silent_worker_is_lost_after_its_lease() -> None:
    driver = Driver(lease_s=2.0)
    driver.up("a")
    state = driver.submit()
    driver.wait(1.9, silent=True)
    assert driver.disconnected == []
    driver.wait(0.2, silent=True)
    assert driver.disconnected == ["a"]
    assert state.attempt is None and state.losses == 1 and driver.core.snapshot().waiting == 1


def test_a_router_that_slept_itself_does_not_take_its_workers_for_silent() -> None:
    driver = Driver(lease_s=2.0)
    driver.up("a")
    driver.now += 60
    driver.tick()
    driver.wait(1.9, silent=True)
    assert driver.core.stats.losses == 0
    driver.wait(0.2, silent=True)
    assert driver.core.stats.losses == 1


def test_a_hung_loop_loses_its_requests_and_takes_none_until_it_moves() -> None:
    driver = Driver(stall_s=10.0)
    driver.up("a")
    driver.submit()
    _, first = driver.submitted()
    driver.report("a", load=load(loop_age_s=10.5))
    assert cancels(driver.take()) == [("a", first.ticket)]
    driver.report("a", load=load(loop_age_s=11.0))
    assert driver.core.stats.losses == 1 and not driver.core.ready
    driver.wait(1.5)
    assert driver.take() == []
    driver.report("a", load=load())
    _, second = driver.submitted()
    assert second.attempt == 2


def test_a_worker_that_comes_back_is_used_again_and_its_old_words_are_not() -> None:
    driver = Driver()
    driver.up("a")
    state = driver.submit(max_tokens=2)
    _, first = driver.submitted()
    driver.lose("a")
    driver.up("a", epoch=2)
    driver.wait(1.2)
    _, second = driver.submitted()
    driver.tokens("a", first.ticket, 3, 66, finished=(Finished(first.ticket, STOP),))
    driver.tokens("a", second.ticket, 3, 10, 11, finished=(Finished(second.ticket, LENGTH),))
    assert tokens_of(state) == [10, 11]
    driver.assert_empty()


def test_a_new_session_of_a_worker_ends_what_the_old_one_held() -> None:
    driver = Driver()
    driver.up("a")
    driver.submit()
    driver.submitted()
    driver.up("a", epoch=2)
    assert driver.core.snapshot().waiting == 1 and driver.core.stats.losses == 1


def test_a_completed_budget_whose_end_was_lost_finishes_by_length(pair: Driver) -> None:
    state = pair.submit(max_tokens=2)
    _, submit = pair.submitted()
    pair.tokens("d", submit.ticket, 3, 10, 11)
    pair.lose("d")
    assert finish_of(state).reason is LENGTH
    pair.assert_empty()


def test_a_full_context_whose_end_was_lost_finishes_by_length() -> None:
    driver = Driver()
    driver.up("a", max_model_len=5)
    driver.up("b", max_model_len=5)
    state = driver.submit((1, 2, 3), max_tokens=50)
    name, submit = driver.submitted()
    driver.tokens(name, submit.ticket, 3, 10, 11)
    driver.lose(name)
    assert finish_of(state).reason is LENGTH


# --- refusals ---


def test_a_refused_request_goes_to_another_pair_at_once(two_pairs: Driver) -> None:
    two_pairs.submit()
    source, first = two_pairs.submitted()
    assert first.decode is not None
    two_pairs.report(source, failed=(Failed(first.ticket, PoolFull.code, "no blocks"),))
    sent = two_pairs.take()
    assert cancels(sent) == [(first.decode.name, first.ticket)]
    ((_, second),) = [m for m in sent if not cancels([m])]
    assert second.decode.name != first.decode.name  # type: ignore[attr-defined]


def test_refusals_are_bounded_by_time_and_back_off_grows(pair: Driver) -> None:
    state = pair.submit()
    times = []
    while state.outcome is None:
        pair.wait(0.05)
        for _, submit in [m for m in pair.take() if not cancels([m])]:
            times.append(pair.now)
            pair.report("p", failed=(Failed(submit.ticket, PoolFull.code, "full"),))  # type: ignore[attr-defined]
    assert isinstance(state.outcome, Overloaded) and state.outcome.retry_after_s
    assert 29.0 < times[-1] - times[0] < 31.5
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps[-1] > 0.9 and gaps[0] < 0.2
    pair.assert_empty()


def test_other_failures_end_with_their_own_error_when_attempts_run_out() -> None:
    driver = Driver(max_attempts=2)
    driver.up("p", Role.PREFILL)
    driver.up("d", Role.DECODE)
    state = driver.submit()
    for _ in range(2):
        driver.wait(1.1)
        ((_, submit),) = [m for m in driver.take() if not cancels([m])]
        driver.report("p", failed=(Failed(submit.ticket, HandoverFailed.code, "checksum"),))  # type: ignore[attr-defined]
    assert isinstance(state.outcome, HandoverFailed)


def test_a_failure_that_no_other_worker_can_help_ends_the_request(pair: Driver) -> None:
    state = pair.submit()
    _, submit = pair.submitted()
    pair.report("p", failed=(Failed(submit.ticket, InvalidRequest.code, "bad"),))
    assert isinstance(state.outcome, InvalidRequest)
    assert cancels(pair.take()) == [("d", submit.ticket)]
    pair.assert_empty()
