"""The router's rules for requests that move while they run: whose word counts, and in which order."""

from __future__ import annotations

import pytest

from baton.common.messages import Cancel, Failed, Finished, HandedOver, Move, Share, Stayed
from baton.common.types import FinishReason, Role
from baton.router import moves
from tests.router.fakes import Driver, cancels, finish_of, load


class Moving:
    """A request with two tokens on decode worker `d`, which drains, and `e`, which is to take it."""

    def __init__(self) -> None:
        driver = self.driver = Driver()
        driver.up("p", Role.PREFILL)
        driver.up("d", Role.DECODE)
        self.state = driver.submit(max_tokens=8)
        self.ticket = self.state.attempt.ticket  # type: ignore[union-attr]
        driver.report("p", handed_over=(HandedOver(self.ticket),))
        driver.tokens("d", self.ticket, 3, 10, 11)
        driver.up("e", Role.DECODE)
        driver.core.set_draining((), {"d"})
        driver.tick()

    @property
    def moves(self) -> list[tuple[str, str]]:
        return [(name, m.target.name) for name, m in self.driver.sent if isinstance(m, Move)]


@pytest.fixture
def moving() -> Moving:
    return Moving()


def test_a_drain_asks_for_the_move_once(moving: Moving) -> None:
    assert moving.moves == [("d", "e")]
    moving.driver.wait(2.0)
    assert moving.moves == [("d", "e")]


def test_what_both_say_counts_once(moving: Moving) -> None:
    driver, ticket = moving.driver, moving.ticket
    driver.tokens("d", ticket, 5, 12)
    driver.tokens("e", ticket, 4, 11, 12, 13)  # from before it was asked to take it
    driver.report("d", handed_over=(HandedOver(ticket),))
    driver.tokens("e", ticket, 7, 14)
    assert moving.state.output == [10, 11, 12, 13, 14]
    assert moving.state.attempt.decoder == "e"  # type: ignore[union-attr]
    assert driver.core.snapshot().stats.moves == {"moved": 1}


def test_what_comes_early_waits_for_what_is_on_its_way(moving: Moving) -> None:
    driver, ticket = moving.driver, moving.ticket
    driver.tokens("e", ticket, 6, 13)  # 12 is still on its way from d
    driver.tokens("e", ticket, 7, 14)
    assert moving.state.output == [10, 11]
    driver.tokens("d", ticket, 5, 12)
    driver.report("d", handed_over=(HandedOver(ticket),))
    assert moving.state.output == [10, 11, 12, 13, 14]
    assert not driver.core.snapshot().stats.retries


def test_who_ends_early_is_placed_again(moving: Moving) -> None:
    driver, ticket = moving.driver, moving.ticket
    driver.tokens("e", ticket, 6, 13)
    driver.report("e", finished=(Finished(ticket, FinishReason.STOP),))
    assert moving.state.outcome is None and moving.state.attempt.ticket != ticket  # type: ignore[union-attr]
    assert ("d", Cancel(ticket)) in driver.sent


def test_it_may_end_at_its_new_place_before_the_old_one_says_so(moving: Moving) -> None:
    driver, ticket = moving.driver, moving.ticket
    driver.tokens("e", ticket, 5, 12)
    driver.report("e", finished=(Finished(ticket, FinishReason.STOP),))
    assert finish_of(moving.state).reason is FinishReason.STOP and moving.state.output == [10, 11, 12]
    driver.report("d", handed_over=(HandedOver(ticket),))


def test_who_stays_is_asked_again_later(moving: Moving) -> None:
    driver, ticket = moving.driver, moving.ticket
    driver.report("d", stayed=(Stayed(ticket, "pool_full", "no room"),))
    driver.tick()
    assert moving.moves == [("d", "e")]
    driver.wait(moves.TRY_AGAIN_S + 0.1)
    assert moving.moves == [("d", "e")] * 2


def test_a_target_that_is_gone_when_it_has_taken_it_is_a_lost_worker(moving: Moving) -> None:
    driver, ticket = moving.driver, moving.ticket
    driver.core.set_draining((), ())
    driver.lose("e")
    driver.report("d", handed_over=(HandedOver(ticket),))
    assert moving.state.attempt.ticket != ticket  # type: ignore[union-attr]
    assert driver.core.snapshot().stats.retries == {"worker_lost": 1}


def test_a_target_that_came_anew_has_not_kept_it(moving: Moving) -> None:
    """The session with it broke, and stands again: the same incarnation, which has dropped all that it had of us."""
    driver, ticket = moving.driver, moving.ticket
    driver.core.set_draining((), ())
    driver.up("e", Role.DECODE)
    driver.report("d", handed_over=(HandedOver(ticket),))
    assert moving.state.attempt.ticket != ticket  # type: ignore[union-attr]
    assert ("e", Cancel(ticket)) in driver.sent
    assert driver.core.snapshot().stats.retries == {"worker_lost": 1}


def test_the_source_dies_on_the_way_and_both_are_told_to_forget(moving: Moving) -> None:
    moving.driver.lose("d")
    assert ("e", Cancel(moving.ticket)) in moving.driver.sent
    assert moving.state.attempt is not None and moving.state.attempt.ticket != moving.ticket


def test_a_failure_at_the_new_place_is_a_failure(moving: Moving) -> None:
    driver, ticket = moving.driver, moving.ticket
    driver.report("e", failed=(Failed(ticket, "engine_failure", "oh"),))
    assert moving.state.outcome is None and list(moving.state.excluded) == ["e"]
    assert ("d", Cancel(ticket)) in driver.sent


def test_a_cancel_goes_to_both(moving: Moving) -> None:
    driver = moving.driver
    driver.core.cancel(moving.state, driver.now)
    driver.drain()
    assert {name for name, _ in cancels(driver.sent)} == {"d", "e"}


def test_nobody_moves_where_nobody_has_room() -> None:
    driver = Driver()
    driver.up("p", Role.PREFILL)
    driver.up("d", Role.DECODE)
    state = driver.submit(max_tokens=8)
    driver.report("p", handed_over=(HandedOver(state.attempt.ticket),))  # type: ignore[union-attr]
    driver.tokens("d", state.attempt.ticket, 3, 10)  # type: ignore[union-attr]
    driver.up("e", Role.DECODE, load(free_blocks=0))
    driver.core.set_draining((), {"d"})
    driver.wait(1.0)
    assert not [m for _, m in driver.sent if isinstance(m, Move)]


def test_nobody_moves_to_where_the_request_would_end_sooner() -> None:
    """A worker that holds less than the one it leaves would cut the answer short."""
    driver = Driver()
    driver.up("p", Role.PREFILL)
    driver.up("d", Role.DECODE)
    states = [driver.submit(max_tokens=n) for n in (50, 8)]
    for state in states:
        ticket = state.attempt.ticket  # type: ignore[union-attr]
        driver.report("p", handed_over=(HandedOver(ticket),))
        driver.tokens("d", ticket, 3, 10)
    driver.up("e", Role.DECODE, max_model_len=20)
    driver.core.set_draining((), {"d"})
    driver.wait(1.0)
    moved = [m.ticket for _, m in driver.sent if isinstance(m, Move)]
    assert moved == [states[1].attempt.ticket]  # type: ignore[union-attr]


def test_an_answer_is_shared_with_the_prefill_worker_of_its_prompt() -> None:
    driver = Driver(return_answers=True)
    driver.up("p", Role.PREFILL)
    driver.up("d", Role.DECODE)
    state = driver.submit(max_tokens=5)
    ticket = state.attempt.ticket  # type: ignore[union-attr]
    driver.report("p", handed_over=(HandedOver(ticket),))
    driver.tokens("d", ticket, 3, 10, 11, 12, 13, 14, finished=(Finished(ticket, FinishReason.LENGTH),))
    ((name, share),) = [(n, m) for n, m in driver.sent if isinstance(m, Share)]
    assert name == "d" and share.target.name == "p" and share.ticket != ticket
    assert share.request.tokens == (1, 2, 3, 10, 11, 12, 13, 14)
