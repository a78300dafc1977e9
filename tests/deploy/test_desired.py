"""Edits of what is desired: scaling, draining, rollouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.cluster import Phase, ProcessStatus, WorkerState, WorkerStatus
from baton.common.errors import BatonError, Conflict, InvalidRequest
from baton.common.types import Role
from baton.deploy.control import rollout
from baton.deploy.control.desired import Desired, Leaving, anew, drain, gone, load, save, scale
from baton.deploy.control.reconcile import World
from tests.deploy.pools import ENGINE, desired, pool

P, D, C = Role.PREFILL, Role.DECODE, Role.COLOCATED


def names(wanted: Desired, pool: str) -> list[str]:
    return [a.name for a in wanted.staying if a.pool == pool]


def leaving(wanted: Desired) -> dict[str, Leaving]:
    return {a.name: a.leaving for a in wanted.assignments if a.leaving}


def test_what_is_saved_is_loaded_again() -> None:
    wanted = rollout.begin(drain(desired({P: 2, D: 1}), "prefill-0", now=False), (pool(P), pool(D)))
    assert load(save(wanted)) == wanted
    with pytest.raises(InvalidRequest):
        load(b'{"pools": 3}')


# --- scale -----------------------------------------------------------------------------------------------------------


def test_workers_are_turned_first_and_then_started_or_let_go() -> None:
    held = {f"prefill-{i}": 0 for i in range(3)}
    wanted, steps = scale(desired({P: 3, D: 1}), {"prefill": 1, "decode": 2}, held)
    assert steps == ("turn prefill-2 to decode", "let prefill-1 go, its requests move")
    assert names(wanted, "decode") == ["prefill-2", "decode-0"]
    assert leaving(wanted) == {"prefill-1": Leaving.MOVE}
    wanted, steps = scale(desired({P: 2, D: 1}), {"prefill": 1, "decode": 4}, held={})
    assert steps == ("turn prefill-1 to decode", "start decode-1", "start decode-2")


def test_a_turned_worker_keeps_what_it_was_launched_with() -> None:
    before = desired({P: 2, D: 1})
    after, _ = scale(before, {"prefill": 1, "decode": 2}, held={})
    assert {a.name: a.worker for a in after.assignments} == {a.name: a.worker for a in before.assignments}


def test_a_turned_worker_is_the_first_to_be_turned_back() -> None:
    before = desired({P: 2, D: 1})
    turned, _ = scale(before, {"prefill": 1, "decode": 2}, held={})
    assert scale(turned, {"prefill": 2, "decode": 1}, held={"prefill-1": 0, "decode-0": 0})[0] == before


def test_workers_whose_pools_differ_in_more_than_the_role_are_not_turned() -> None:
    for other in (
        pool(D, worker=replace(pool(D).worker, engine=replace(ENGINE, kv_dtype="int8"))),
        pool(D, resources=replace(pool(D).resources, gpus=1.0)),
    ):
        before = replace(desired({P: 2, D: 1}), pools=(pool(P), other))
        _, steps = scale(before, {"prefill": 1, "decode": 2}, held={})
        assert steps == ("start decode-1", "let prefill-1 go, its requests move")


def test_who_is_not_ready_goes_first_then_who_holds_least_then_the_youngest() -> None:
    before = desired({P: 1, D: 4})
    for held, goes in (
        ({"decode-0": 0, "decode-1": 5, "decode-2": 5}, "decode-3"),
        ({"decode-0": 1, "decode-1": 0, "decode-2": 5, "decode-3": 7}, "decode-1"),
        ({"decode-0": 2, "decode-1": 2, "decode-2": 2, "decode-3": 3}, "decode-2"),
    ):
        assert list(leaving(scale(before, {"decode": 3}, held)[0])) == [goes]


def test_requests_move_only_where_another_worker_with_the_same_numbers_stays() -> None:
    other = pool(D, name="other", worker=replace(pool(D).worker, engine=replace(ENGINE, model="m2")))
    before = desired({P: 1, D: 1})
    before, _ = scale(replace(before, pools=(*before.pools, other)), {"other": 1}, held={})
    after, steps = scale(before, {"decode": 0}, held={})
    assert leaving(after) == {"decode-0": Leaving.FINISH}
    assert steps == ("let decode-0 go, when it is done",)


def test_a_name_is_the_smallest_free_number() -> None:
    wanted = gone(desired({P: 1, D: 3}), "decode-1")
    wanted, steps = scale(wanted, {"decode": 4}, held={})
    assert steps == ("start decode-1", "start decode-3")


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"decode": 0}, "no worker would decode"),
        ({"prefill": 0, "decode": 2}, "no worker would prefill"),
        ({"decode": 65}, "decode=65 is out of range: 0 to 64"),
        ({"decode": -1}, "decode=-1 is out of range"),
        ({"encode": 1}, "no pool 'encode'; there are prefill, decode"),
    ],
)
def test_what_cannot_be_is_refused(counts: dict[str, int], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        scale(desired({P: 1, D: 1}), counts, held={})
    assert set(str(caught.value.param).split(", ")) <= set(counts)


# --- drain -----------------------------------------------------------------------------------------------------------


def test_drain_lets_one_go_and_may_be_hurried() -> None:
    wanted = drain(desired({P: 1, D: 2}), "decode-0", now=False)
    assert leaving(wanted) == {"decode-0": Leaving.FINISH}
    assert leaving(drain(wanted, "decode-0", now=True)) == {"decode-0": Leaving.MOVE}
    for name, says in (("decode-1", "no worker would decode"), ("nobody", "no worker 'nobody'")):
        with pytest.raises(InvalidRequest, match=says):
            drain(wanted, name, now=False)


def test_draining_a_worker_that_was_turned_makes_the_pool_smaller_that_it_works_for() -> None:
    """Whichever holds least is turned: by its name nobody knows where a worker belongs."""
    held = {"prefill-0": 0, "decode-0": 0, "decode-1": 1, "decode-2": 1}
    wanted, steps = scale(desired({P: 1, D: 3}), {"prefill": 2, "decode": 2}, held)
    assert steps == ("turn decode-0 to prefill",)
    wanted = drain(wanted, "decode-0", now=True)
    assert (wanted.size("prefill"), wanted.size("decode")) == (1, 2)


def test_a_worker_that_would_not_be_turned_is_started_anew_as_its_pool_is() -> None:
    wanted, _ = scale(desired({P: 2, D: 1}), {"prefill": 1, "decode": 2}, held={})
    (turned,) = (a for a in anew(wanted, "prefill-1").assignments if a.name == "prefill-1")
    assert (turned.pool, turned.worker) == ("decode", replace(pool(D).worker, name="prefill-1"))


# --- rollout ---------------------------------------------------------------------------------------------------------


def changed(wanted: Desired) -> Desired:
    pools = (replace(p, worker=replace(p.worker, engine=replace(ENGINE, model="m2"))) for p in wanted.pools)
    return rollout.begin(wanted, tuple(pools))


def everybody(wanted: Desired) -> set[str]:
    return {a.name for a in wanted.assignments}


def settle(wanted: Desired) -> Desired:
    for name in leaving(wanted):
        wanted = gone(wanted, name)
    return wanted


def test_a_rollout_replaces_all_workers_and_never_has_more_than_one_beyond_a_pools_size() -> None:
    wanted, story = changed(desired({P: 1, D: 3})), []
    while wanted.rollout is not None:
        wanted = rollout.advance(wanted, everybody(wanted))
        story.append({r: sum(a.revision == r for a in wanted.staying) for r in (1, 2)})
        assert wanted.size("prefill") <= 2
        assert wanted.size("decode") <= 4
        wanted = settle(wanted)
    assert story[0] == {1: 4, 2: 2}, "new ones in both pools first"
    assert all(step[1] != 1 for step in story), "the last old ones go together"
    assert (wanted.size("prefill"), wanted.size("decode")) == (1, 3)
    assert {a.worker.engine.model for a in wanted.assignments} == {"m2"}


def test_a_rollout_waits_for_its_new_workers() -> None:
    wanted = rollout.advance(changed(desired()), everybody(desired()))
    new = everybody(wanted) - everybody(desired())
    assert len(new) == 2
    for ready in (set(), everybody(desired()), everybody(wanted) - {max(new)}):
        assert rollout.advance(wanted, ready) == wanted
        assert set(rollout.waits_for(wanted, ready)) == new - ready


def test_a_rollout_that_fails_returns_to_what_was() -> None:
    before = desired({P: 1, D: 2})
    wanted = rollout.abort(rollout.advance(changed(before), everybody(before)))
    assert rollout.abort(wanted) == wanted
    while wanted.rollout is not None:
        wanted = settle(rollout.advance(wanted, everybody(before)))
    assert wanted == before


def test_on_the_way_back_old_workers_that_were_about_to_leave_stay() -> None:
    before = desired({P: 1, D: 1})
    wanted = rollout.advance(changed(before), everybody(before))
    wanted = rollout.advance(wanted, everybody(wanted))
    assert set(leaving(wanted)) == everybody(before)
    wanted = rollout.abort(wanted)
    assert not leaving(wanted)
    assert settle(rollout.advance(wanted, everybody(before))).assignments == before.assignments


def test_on_the_way_back_a_new_worker_that_fails_is_replaced_by_an_old_one_at_once() -> None:
    before = desired({P: 1, D: 1})
    wanted = rollout.advance(changed(before), everybody(before))
    wanted = rollout.abort(settle(rollout.advance(wanted, everybody(wanted))))
    wanted = rollout.advance(wanted, {"prefill-1"})
    assert [(a.name, a.revision) for a in wanted.staying] == [("prefill-1", 2), ("decode-0", 1)]


def test_a_rollout_that_finds_no_way_back_may_be_replaced_by_another() -> None:
    wanted = rollout.abort(rollout.advance(changed(desired({P: 1, D: 2})), everybody(desired({P: 1, D: 2}))))
    wanted = rollout.advance(wanted.edit("decode-0", leaving=Leaving.FINISH), set())
    wanted = changed(wanted)
    assert wanted.revision == 3
    while wanted.rollout is not None:
        wanted = settle(rollout.advance(wanted, everybody(wanted)))
    assert (wanted.size("prefill"), wanted.size("decode")) == (1, 2), "the sizes of before the first"
    assert {a.revision for a in wanted.assignments} == {3}


def test_a_rollout_has_failed_when_nothing_moves_for_long_or_a_worker_is_given_up() -> None:
    wanted, patience = rollout.advance(changed(desired()), everybody(desired())), rollout.Patience()
    new = max(everybody(wanted) - everybody(desired()))

    def failure(now: float, progress: float = 0.0, phase: Phase = Phase.RUNNING) -> str:
        word = WorkerStatus(new, "prefill", WorkerState.LOADING, progress=progress)
        world = World(processes={new: ProcessStatus(new, phase)}, words={new: word})
        return patience.failure(wanted, world, everybody(desired()), now)

    limit = rollout.STALL_S + 1
    assert [failure(0.0), failure(limit - 2), failure(limit - 1, progress=0.5)] == ["", "", ""]
    assert failure(2 * limit - 3, progress=0.5) == ""
    assert failure(2 * limit, progress=0.5) == "no progress for 600 s"
    assert failure(2 * limit, 0.6, Phase.GIVEN_UP) == f"{new} cannot be kept running"


def test_one_thing_at_a_time() -> None:
    wanted = changed(desired({P: 1, D: 2}))
    with pytest.raises(Conflict):
        scale(wanted, {"decode": 3}, held={})
    with pytest.raises(Conflict):
        drain(wanted, "decode-0", now=False)
    with pytest.raises(Conflict):
        changed(wanted)


# --- any story -------------------------------------------------------------------------------------------------------

COUNTS = st.dictionaries(st.sampled_from(["prefill", "decode", "colocated"]), st.integers(0, 4))
EDITS = st.one_of(
    st.tuples(st.just("scale"), COUNTS),
    st.tuples(st.just("drain"), st.integers(0, 9)),
    st.tuples(st.just("gone"), st.integers(0, 9)),
    st.tuples(st.just("rollout"), st.none()),
    st.tuples(st.just("abort"), st.none()),
    st.tuples(st.just("advance"), st.integers(0, 2**12 - 1)),
)


def apply(wanted: Desired, what: str, value: object) -> Desired:
    all_names = [a.name for a in wanted.assignments]
    match what, value:
        case "scale", dict():
            return scale(wanted, value, held={})[0]
        case "drain", int():
            return drain(wanted, all_names[value % len(all_names)], now=bool(value % 2))
        case "gone", int():
            return gone(wanted, [*leaving(wanted), "nobody"][value % (1 + len(leaving(wanted)))])
        case "advance", int():
            return rollout.advance(wanted, {name for i, name in enumerate(all_names) if value >> i & 1})
        case "abort", _:
            return rollout.abort(wanted)
    return changed(wanted)


@settings(deadline=None)
@given(st.lists(EDITS, max_size=40))
def test_whatever_is_edited_a_pair_is_wanted_and_names_are_unique(story: list[tuple[str, object]]) -> None:
    wanted = desired({P: 1, D: 1, C: 1})
    for what, value in story:
        try:
            wanted = apply(wanted, what, value)
        except BatonError:
            continue
        roles = [wanted.role(a) for a in wanted.staying]
        assert any(role.prefills for role in roles)
        assert any(role.decodes for role in roles)
        assert len(everybody(wanted)) == len(wanted.assignments)
