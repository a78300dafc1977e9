from __future__ import annotations

from baton.common.fingerprint import fingerprint


def test_same_facts_in_any_order_give_the_same_name() -> None:
    assert fingerprint({"dtype": "float32", "block": 16}) == fingerprint({"block": 16, "dtype": "float32"})


def test_a_changed_added_or_missing_fact_gives_another_name() -> None:
    facts = {"dtype": "float32", "block": 16}
    others = [facts | {"block": 32}, facts | {"more": None}, {"block": 16}, facts | {"block": "16"}]
    assert len({fingerprint(each) for each in (facts, *others)}) == 5


def test_is_the_same_in_every_process() -> None:
    assert fingerprint({"dtype": "float32", "block": 16}) == "fdcb3e3440f9407a"
