"""Workers of different weights side by side, as in a rolling restart, and workers that are on their way out."""

from __future__ import annotations

from baton.common.errors import WrongRole
from baton.common.messages import Failed, Started, Submit
from baton.common.types import Role
from tests.router.fakes import Driver, cancels


def test_an_answer_goes_on_with_the_weights_that_it_began_with(two_pairs: Driver) -> None:
    driver = two_pairs
    driver.up("p-new", Role.PREFILL, fingerprint="g")
    driver.up("d-new", Role.DECODE, fingerprint="g")
    driver.core.set_draining(["p", "d", "q", "e"])
    state = driver.submit(max_tokens=8)
    assert driver.submitted()[0] == "p-new"
    driver.tokens("d-new", state.attempt.ticket, 3, 5)  # type: ignore[union-attr]
    driver.core.set_draining([])
    driver.up("d-other", Role.DECODE, fingerprint="g")
    driver.lose("d-new")
    name, submit = driver.submitted()
    assert (name, submit.decode and submit.decode.name) == ("p-new", "d-other")
    driver.lose("p-new")  # no pair of its weights is left: better with others than not at all
    assert driver.take()[-1][0] in ("p", "q")


def test_a_pair_is_never_made_of_two_generations(pair: Driver) -> None:
    pair.up("p-new", Role.PREFILL, fingerprint="g")
    pair.core.set_draining(["p"])
    pair.submit()
    assert pair.take() == [] and not pair.core.ready


def test_what_leaves_in_order_is_no_loss(two_pairs: Driver) -> None:
    two_pairs.core.set_draining(["d"], ["e"])
    two_pairs.lose("d")
    two_pairs.lose("e")
    assert two_pairs.core.stats.losses == 0
    two_pairs.lose("p")
    assert two_pairs.core.stats.losses == 1


def test_a_mark_holds_when_the_worker_comes_anew(pair: Driver) -> None:
    pair.core.set_draining([], ["d"])
    pair.lose("d")
    pair.up("d", Role.DECODE, epoch=2)
    assert [w.state for w in pair.core.snapshot().workers if w.name == "d"] == ["leaving"]


def test_who_does_not_prefill_any_more_is_kept_away_from_and_not_his_partner(two_pairs: Driver) -> None:
    state = two_pairs.submit()
    name, submit = two_pairs.submitted()
    partner = submit.decode and submit.decode.name
    two_pairs.report(name, failed=(Failed(submit.ticket, WrongRole.code, "it decodes"),))
    assert set(state.excluded) == {name} and partner not in state.excluded
    assert two_pairs.take()[-1][0] != name


def test_what_waits_for_a_worker_that_leaves_goes_elsewhere_at_once_and_bears_no_blame(two_pairs: Driver) -> None:
    state = two_pairs.submit()
    name, submit = two_pairs.submitted()
    assert submit.decode is not None
    two_pairs.core.set_draining([], [submit.decode.name])
    two_pairs.tick()
    *cancelled, (anew, again) = two_pairs.take()
    assert sorted(cancels(cancelled)) == sorted([(name, submit.ticket), (submit.decode.name, submit.ticket)])
    assert isinstance(again, Submit) and again.decode and again.decode.name != submit.decode.name
    assert two_pairs.core.stats.retries == {} and state.losses == 0
    two_pairs.report(anew, started=(Started(again.ticket, 0),))
    two_pairs.core.set_draining([], [again.decode.name])
    two_pairs.tick()
    assert two_pairs.take() == [], "what is being computed is finished"
    two_pairs.lose(again.decode.name)
    assert state.losses == 0, "it was told to leave"


def test_what_waits_stays_where_nobody_else_would_take_it(pair: Driver) -> None:
    pair.submit()
    pair.submitted()
    pair.core.set_draining([], ["d"])
    pair.tick()
    assert pair.take() == []
