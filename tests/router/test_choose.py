"""The choice of a pair: each term of the cost, and what it does under simulated load."""

from __future__ import annotations

from collections import Counter

import pytest

from baton.common.types import Role
from baton.router.choose import Choice, Demand, choose
from baton.router.fleet import Worker
from tests.router.fakes import KV_BYTES, load, worker

PROMPT = Demand(100, 10)


def names(choice: Choice | None) -> tuple[str, str | None]:
    assert choice is not None
    return choice.prefill.name, choice.decode.name if choice.decode else None


def pair(*extra: Worker) -> list[Worker]:
    return [worker("p", Role.PREFILL), worker("d", Role.DECODE), *extra]


def test_colocated_worker_serves_alone_and_roles_serve_in_pairs() -> None:
    assert names(choose([worker("c")], PROMPT, {}, 0)) == ("c", None)
    assert names(choose(pair(), PROMPT, {}, 0)) == ("p", "d")
    assert choose(pair()[:1], PROMPT, {}, 0) is None
    assert choose(pair()[1:], PROMPT, {}, 0) is None
    assert choose([], PROMPT, {}, 0) is None


def test_fingerprints_of_a_pair_are_equal() -> None:
    other = worker("q", Role.PREFILL, fingerprint="g")
    assert choose([other, worker("d", Role.DECODE)], PROMPT, {}, 0) is None
    for turn in range(4):
        assert names(choose(pair(other), PROMPT, {"q": 100}, turn)) == ("p", "d")


def test_equal_costs_take_turns() -> None:
    workers = [worker(name, Role.PREFILL) for name in "pqr"] + [worker("d", Role.DECODE), worker("e", Role.DECODE)]
    chosen = Counter(names(choose(workers, PROMPT, {}, turn)) for turn in range(12))
    assert {p for p, _ in chosen} == {"p", "q", "r"}
    assert set(chosen.values()) == {2}


def test_cached_prefix_wins_until_its_queue_costs_more_than_it_saves() -> None:
    cached, idle = worker("cached", Role.PREFILL), worker("idle", Role.PREFILL)
    workers = [cached, idle, worker("d", Role.DECODE)]
    cached.own_tokens = 70
    assert names(choose(workers, PROMPT, {"cached": 80}, 0)) == ("cached", "d")
    cached.own_tokens = 90
    choice = choose(workers, PROMPT, {"cached": 80}, 0)
    assert names(choice) == ("idle", "d")
    assert choice is not None and (choice.reason, choice.cached, choice.uncached) == ("load", 0, 100)


def test_a_queue_that_only_the_worker_knows_of_counts_as_well() -> None:
    workers = [worker("busy", load_=load(queued_prefill_tokens=500)), worker("free")]
    assert {names(choose(workers, PROMPT, {}, turn))[0] for turn in range(2)} == {"free"}


def test_decode_worker_that_caches_the_prefix_saves_the_transfer() -> None:
    far = load(handover_bytes=1000 * KV_BYTES, handover_exposed_seconds=10.0)
    workers = pair(worker("e", Role.DECODE, far))
    for turn in range(2):
        assert names(choose(workers, PROMPT, {"e": 80}, turn)) == ("p", "e")


def test_decode_load_moves_requests_away() -> None:
    workers = pair(worker("e", Role.DECODE))
    workers[1].own_batch = 8
    for turn in range(2):
        assert names(choose(workers, PROMPT, {}, turn)) == ("p", "e")


def test_decode_worker_short_of_room_comes_last_and_a_full_one_is_out() -> None:
    prompt_only = load(free_blocks=25)  # 100 tokens in blocks of 4, and nothing for the output
    workers = pair(worker("e", Role.DECODE))
    workers[1].load = prompt_only
    assert names(choose(workers, PROMPT, {}, 0)) == names(choose(workers, PROMPT, {}, 1)) == ("p", "e")
    workers[2].load = load(free_blocks=24)
    assert names(choose(workers, PROMPT, {}, 0)) == names(choose(workers, PROMPT, {}, 1)) == ("p", "d")
    workers[1].own_blocks = 1
    assert choose(workers, PROMPT, {}, 0) is None
    assert names(choose(workers, PROMPT, {"d": 8}, 0)) == ("p", "d")


def test_cached_blocks_of_a_worker_are_room() -> None:
    workers = pair()
    workers[1].load = load(free_blocks=1, cached_blocks=999)
    assert names(choose(workers, PROMPT, {}, 0)) == ("p", "d")


@pytest.mark.parametrize("limit", [{"max_model_len": 100}, {"total_blocks": 25}])
def test_worker_that_can_never_hold_the_request_is_out(limit: dict[str, int]) -> None:
    assert choose([worker("c", **limit)], PROMPT, {}, 0) is None
    assert choose([worker("c", **limit)], Demand(99, 10), {}, 0) is not None


def test_a_worker_that_measured_nothing_is_taken_for_an_average_one() -> None:
    fast = load(prefill_tokens_per_s=50_000.0)
    fresh = worker("fresh", load_=load(prefill_tokens_per_s=0.0))
    busy = worker("busy", load_=fast)
    busy.own_tokens = 1000
    assert names(choose([fresh, busy], PROMPT, {}, 0)) == ("fresh", None)


def _serve(workers: list[Worker], requests: list[dict[str, int]], done_after: int) -> list[str]:
    """Place requests one after the other, each with what the workers cache of it; each prefill is done
    `done_after` placements later. Returns the prefill workers chosen."""
    chosen: list[str] = []
    charges: list[tuple[Worker, int]] = []
    for turn, cached in enumerate(requests):
        choice = choose(workers, PROMPT, cached, turn)
        assert choice is not None
        choice.prefill.own_tokens += choice.uncached
        charges.append((choice.prefill, choice.uncached))
        if len(charges) > done_after:
            done, tokens = charges.pop(0)
            done.own_tokens -= tokens
        chosen.append(choice.prefill.name)
    return chosen


def test_a_system_prompt_shared_by_all_spreads_under_load() -> None:
    """All prompts share their first 48 of 100 tokens, which at first only `a` caches."""
    workers = [*(worker(name, Role.PREFILL) for name in "abcd"), worker("z", Role.DECODE)]
    cached: dict[str, int] = {"a": 48}
    chosen = Counter(_serve(workers, [cached] * 60, done_after=12))
    assert set(chosen) == set("abcd")
    assert max(chosen.values()) <= 30
    everywhere = dict.fromkeys("abcd", 48)
    chosen = Counter(_serve(workers, [everywhere] * 60, done_after=12))
    assert min(chosen.values()) >= 60 // 4 // 2
    assert max(chosen.values()) <= 60 // 2


def test_sessions_stick_to_their_worker_and_imbalance_does_not_end_all_affinity() -> None:
    """Four sessions, each cached on its own worker. One worker is overloaded: its session moves, the others stay."""
    workers = [*(worker(name, Role.PREFILL) for name in "abcd"), worker("z", Role.DECODE)]
    sessions: list[dict[str, int]] = [{name: 80} for name in "abcd"] * 10
    assert _serve(workers, sessions, done_after=3) == list("abcd") * 10
    for w in workers:
        w.own_tokens = 2000 if w.name == "a" else 0
    moved = _serve(workers, sessions, done_after=3)
    assert "a" not in moved
    kept = sum(home == name for home, name in zip("abcd" * 10, moved, strict=True))
    assert kept >= 20  # of 30


def test_an_idle_worker_is_not_as_slow_as_it_was_when_it_was_full() -> None:
    """What it measured last is the step of sixteen; alone, a request would decode as fast there as anywhere."""
    idle = worker("idle", load_=load(decode_step_s=0.015, decode_batch=16.0))
    busy = worker("busy", load_=load(decode_step_s=0.011, decode_batch=4.0, running=4))
    assert names(choose([busy, idle], PROMPT, {}, 0)) == ("idle", None)


def test_what_hides_behind_compute_is_no_cost_of_a_transfer() -> None:
    """Handovers that wait seconds for their prompts to be computed, and expose milliseconds, keep nobody at the
    decode worker that has the prefix."""
    moved = load(handover_bytes=1_000_000, handover_seconds=100.0, handover_exposed_seconds=0.1)
    source = worker("p", Role.PREFILL, load_=moved)
    holder = worker("holder", Role.DECODE, load_=load(running=4))
    other = worker("other", Role.DECODE)
    assert names(choose([source, holder, other], PROMPT, {"holder": 96}, 0)) == ("p", "other")
    # Nor is the wait of each commit for the end of a decode step.
    waited = load(handovers=100, handover_bytes=100_000_000, handover_exposed_seconds=2.1, decode_step_s=0.02)
    source = worker("p", Role.PREFILL, load_=waited)
    assert names(choose([source, holder, other], PROMPT, {"holder": 96}, 0)) == ("p", "other")
