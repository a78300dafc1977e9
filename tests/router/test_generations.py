"""Workers of different weights side by side, as in a rolling restart, and workers that are on their way out."""

from __future__ import annotations

from baton.common.errors import WrongRole
from baton.common.messages import Failed
from baton.common.types import Role
from tests.router.fakes import Driver


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
