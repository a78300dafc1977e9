"""The planner of pool sizes: what always holds, whatever is observed, and what it does in situations that are known."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest

from baton.deploy.control.observation import Observation, StepLine
from baton.deploy.control.planner import AutoscaleConfig, Decision, Memory, needs, plan

CONFIG = AutoscaleConfig(ttft_s=3.0, tpot_s=0.06, hold_down_s=60.0)
STEPS = ((8.0, 0.036), (16.0, 0.052))  # 20 ms and 2 ms for each request: 17 of them in 54 ms
LINE = StepLine().learn(STEPS)
GROWS = (
    *("uncached_tokens_per_s", "output_tokens_per_s", "uncached_len", "queue_p90_s", "oldest_wait_s"),
    *("backlog_tokens", "waiting", "batch"),
)


def seen(**change: object) -> Observation:
    """A fleet of 3 and 3 at about half of what it can do."""
    usual = Observation(
        now=100.0, seconds=10.0, prefill=3, decode=3, requests_per_s=2.0, prompt_tokens_per_s=1600.0,
        uncached_tokens_per_s=1600.0, output_tokens_per_s=450.0, uncached_len=800.0, queue_p90_s=0.2, oldest_wait_s=0.5,
        prefill_rate=1200.0, batch=24, running=30, steps=STEPS, kv_used=0.3,
    )  # fmt: skip
    return replace(usual, **change)  # type: ignore[arg-type]


def drawn(rng: random.Random) -> Observation:
    """Anything that could be observed, from nothing to far too much."""
    much = 10 ** rng.uniform(-2, 1.5)
    return seen(
        prefill=rng.randint(0, 6), decode=rng.randint(0, 6), seconds=rng.choice([0.0, 1.0, 10.0]),
        changing=rng.choice(["", "", "", "decode-1 loads"]), uncached_tokens_per_s=rng.uniform(0, 3000) * much,
        output_tokens_per_s=rng.uniform(0, 1000) * much, uncached_len=rng.choice([0.0, 30.0, 800.0, 20_000.0]),
        queue_p90_s=rng.expovariate(0.5), oldest_wait_s=rng.expovariate(0.3), waiting=rng.randint(0, 50),
        backlog_tokens=rng.choice([0.0, rng.uniform(0, 1e5)]), prefill_rate=rng.choice([0.0, 50.0, 1200.0]),
        batch=int(rng.uniform(0, 60) * much), steps=rng.choice([(), STEPS]), kv_used=rng.uniform(0, 1),
        ttft_attained=rng.uniform(0, 1), tpot_attained=rng.uniform(0, 1),
    )  # fmt: skip


def limits(rng: random.Random) -> AutoscaleConfig:
    return replace(
        CONFIG, confirm=rng.randint(1, 3), max_step=rng.randint(1, 3), hold_down_s=rng.choice([0.0, 4.0]),
        min_workers=rng.randint(0, 4), max_workers=rng.choice([0, 6, 12]), min_prefill=rng.randint(0, 2),
        min_decode=rng.randint(0, 2), max_prefill=rng.choice([0, 5]), max_decode=rng.choice([0, 5]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_limits_hold_and_every_decision_has_a_reason(seed: int):
    rng = random.Random(seed)
    config, memory, changed = limits(rng), Memory(), 0
    for round_ in range(80):
        now = replace(drawn(rng), now=2.0 * round_)
        decision, memory = plan(now, memory, config)
        assert ": " in decision.why and "\n" not in decision.why and len(decision.why) < 250
        more = (decision.prefill - now.prefill, decision.decode - now.decode)
        assert decision.changes == (more != (0, 0))
        if not decision.changes:
            continue
        changed += 1
        assert not now.changing and now.seconds and now.prefill_rate, "acted on nothing, or in the middle of a change"
        for count, was, least, most in (
            (decision.prefill, now.prefill, config.min_prefill, config.max_prefill),
            (decision.decode, now.decode, config.min_decode, config.max_decode),
        ):
            assert max(1, least) <= count <= (most or count), decision.why
            assert abs(count - was) <= config.max_step
        total, before = decision.prefill + decision.decode, now.prefill + now.decode
        if total > before:
            assert total <= config.max_workers
        if total < before:
            assert config.max_workers and total >= config.min_workers and before - total == 1
    assert changed


def test_more_load_never_needs_fewer_workers():
    rng = random.Random(1)
    for _ in range(3000):
        one = replace(drawn(rng), prefill_rate=1200.0, prefill=rng.randint(1, 6), decode=rng.randint(1, 6))
        name = rng.choice(GROWS)
        value = getattr(one, name)
        two = replace(one, **{name: type(value)(value * rng.uniform(1, 3) + rng.choice([0, 1]))})
        less, more = needs(one, LINE, CONFIG), needs(two, LINE, CONFIG)
        assert more.prefill >= less.prefill * (1 - 1e-9) and more.decode >= less.decode * (1 - 1e-9), name


def test_more_load_never_ends_with_fewer_workers():
    """Let it go on until nothing changes any more, under a load that stays."""
    config = replace(CONFIG, max_workers=40, hold_down_s=0.0)

    def settle(load: float) -> int:
        now, memory = seen(), Memory()
        for _ in range(200):
            now = replace(now, uncached_tokens_per_s=800 * load, output_tokens_per_s=300 * load, batch=int(16 * load))
            decision, memory = plan(now, memory, config)
            now = replace(now, prefill=decision.prefill, decode=decision.decode)
        assert not decision.changes
        return now.prefill + now.decode

    sizes = [settle(load) for load in (0.1, 0.5, 1, 2, 4, 8, 12)]
    assert sizes == sorted(sizes) and sizes[0] == 2 and sizes[-1] > 15


def test_a_quiet_fleet_stays_as_it_is_through_noise():
    rng, memory = random.Random(2), Memory()
    for _ in range(500):
        noisy = seen(
            uncached_tokens_per_s=1600 * rng.uniform(0.6, 1.4), output_tokens_per_s=450 * rng.uniform(0.6, 1.4),
            batch=int(24 * rng.uniform(0.6, 1.4)), backlog_tokens=rng.uniform(0, 800), queue_p90_s=rng.uniform(0, 1),
            oldest_wait_s=rng.uniform(0, 2.5),
        )  # fmt: skip
        decision, memory = plan(noisy, memory, CONFIG)
        assert not decision.changes, decision.why


def test_two_roles_that_have_it_equally_hard_do_not_swing():
    rng, memory, turns = random.Random(3), Memory(), 0
    now = seen(output_tokens_per_s=500.0)  # 3 and 3 are strained by 1.07, 4 and 2 by 1.03
    for _ in range(500):
        noisy = replace(now, uncached_tokens_per_s=3050 * rng.uniform(0.98, 1.02), batch=rng.randint(34, 36))
        decision, memory = plan(noisy, memory, CONFIG)
        turns += decision.changes
        now = replace(now, prefill=decision.prefill, decode=decision.decode)
    assert turns == 0


def settled(now: Observation, config: AutoscaleConfig = CONFIG, rounds: int = 8) -> tuple[list[Decision], Observation]:
    """The changes that are made under a load that stays, and how it is after them."""
    memory, made = Memory(), []
    for _ in range(rounds):
        decision, memory = plan(now, memory, config)
        now = replace(now, prefill=decision.prefill, decode=decision.decode, now=now.now + config.interval_s)
        made += [decision] if decision.changes else []
    return made, now


def test_long_prompts_turn_decode_workers_and_long_answers_turn_them_back():
    made, now = settled(seen(uncached_tokens_per_s=4500.0, output_tokens_per_s=100.0, batch=5))
    assert (now.prefill, now.decode) == (5, 1)
    assert made[0].why.startswith("turn 2 decode to prefill: prefill needs ")
    made, now = settled(seen(prefill=5, decode=1, uncached_tokens_per_s=300.0, uncached_len=40.0, batch=80))
    assert (now.prefill, now.decode) == (1, 5)
    assert made[0].why.startswith("turn 2 prefill to decode: decode needs 4.7 of 1 (80 requests, 17 a worker)")


def test_a_queue_counts_though_arrivals_look_harmless():
    """ai-dynamo/dynamo#10528: rates said that all was well while requests waited for minutes."""
    calm = seen(uncached_tokens_per_s=900.0, output_tokens_per_s=100.0, batch=5)
    assert not settled(calm)[0]
    queue = replace(calm, backlog_tokens=40_000.0, oldest_wait_s=11.0, queue_p90_s=6.0)
    made, now = settled(queue)
    assert now.prefill == 5 and "queue 11.0 s > 2.3 s" in made[0].why


def test_a_queue_counts_before_it_is_old():
    young = seen(uncached_tokens_per_s=900.0, output_tokens_per_s=100.0, batch=5, backlog_tokens=14_000.0)
    made, now = settled(young)
    assert now.prefill > 3 and "14000 prompt tokens queue" in made[0].why


def test_one_old_request_is_no_queue():
    assert not settled(seen(oldest_wait_s=60.0))[0]


def test_who_waits_for_kv_is_helped_by_decode_workers():
    made, now = settled(seen(kv_used=0.97, waiting=30, backlog_tokens=24_000.0, oldest_wait_s=20.0, queue_p90_s=9.0))
    assert now.decode > 3 and "KV 97% used, queue " in made[0].why


def test_one_bad_moment_changes_nothing_but_a_disaster_is_not_waited_out():
    memory = Memory()
    for batch in (24, 60, 24, 24, 60, 24):  # 60: strained, but not by much
        decision, memory = plan(seen(batch=batch), memory, CONFIG)
        assert not decision.changes
    decision, _ = plan(seen(batch=150), memory, CONFIG)
    assert decision.changes


def test_roles_are_turned_before_workers_are_started():
    config = replace(CONFIG, max_workers=10)
    heavy = seen(uncached_tokens_per_s=6000.0, output_tokens_per_s=100.0, batch=5)
    made, now = settled(heavy, config, rounds=12)
    kinds = [decision.why.split(" ")[0] for decision in made]
    assert kinds[0] == "turn" and "start" in kinds and kinds == sorted(kinds, reverse=True)
    assert (now.prefill, now.decode) == (6, 1)


def test_without_leave_to_start_workers_it_says_that_it_is_stuck():
    made, now = settled(seen(prefill=5, decode=1, uncached_tokens_per_s=9000.0, output_tokens_per_s=100.0, batch=5))
    assert not made and (now.prefill, now.decode) == (5, 1)
    decision, _ = plan(now, Memory(), CONFIG)
    assert "too little, but no better split is allowed" in decision.why


def test_too_many_workers_are_let_go_one_by_one_and_slowly():
    config = replace(CONFIG, max_workers=6)
    idle = seen(uncached_tokens_per_s=100.0, output_tokens_per_s=20.0, batch=1, kv_used=0.01)
    memory, when = Memory(), []
    for second in range(0, 400, 2):
        decision, memory = plan(replace(idle, now=float(second)), memory, config)
        if decision.changes:
            when.append(second)
            assert decision.why.startswith("let go 1 ")
            idle = replace(idle, prefill=decision.prefill, decode=decision.decode)
    assert when == [60, 122, 184, 246] and (idle.prefill, idle.decode) == (1, 1)


def test_nobody_is_let_go_while_requests_miss_their_slo():
    config = replace(CONFIG, max_workers=6, hold_down_s=0.0)
    idle = seen(uncached_tokens_per_s=100.0, output_tokens_per_s=20.0, batch=1)
    assert plan(idle, Memory(), config)[0].changes
    assert not plan(replace(idle, tpot_attained=0.5), Memory(), config)[0].changes


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"changing": "decode-3 loads"}, "decode-3 loads; nothing else until that is done"),
        ({"seconds": 0.0}, "nothing has been measured yet"),
        ({"prefill_rate": 0.0}, "nothing has been measured yet"),
        ({"prefill": 0}, "no pair of a prefill and a decode worker"),
    ],
)
def test_it_does_not_act_on_what_it_does_not_know(change: dict[str, object], why: str):
    decision, _ = plan(seen(backlog_tokens=1e6, oldest_wait_s=99.0, batch=500, **change), Memory(), CONFIG)
    assert not decision.changes and why in decision.why


def test_it_is_off_unless_asked_for():
    assert not AutoscaleConfig().enabled and {f.name for f in fields(AutoscaleConfig)} >= {"ttft_s", "tpot_s"}
