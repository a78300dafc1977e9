from __future__ import annotations

import pytest

from baton.gateway.ids import answer_id, choice_id, meant_by, request_id


@pytest.mark.parametrize("given", ["", "mine", "a/b:c"])
@pytest.mark.parametrize("kind", ["chatcmpl", "cmpl"])
def test_a_request_is_found_by_its_id_and_by_its_answers(given: str, kind: str) -> None:
    name = request_id(given)
    assert name == given or (not given and name.startswith("req-"))
    assert answer_id(kind, name).startswith(f"{kind}-")
    for choices in (1, 2):
        for index in range(choices):
            known = choice_id(name, index, choices)
            for said in (name, answer_id(kind, name)):
                if index == 0:
                    assert known in meant_by(said)
                assert known in meant_by(known) and known in meant_by(choice_id(said, index, choices))


def test_nothing_means_nothing() -> None:
    assert meant_by("") == ("",)
    assert request_id("") != request_id("")


@pytest.mark.parametrize("given", ["x" * 129, "a b", "ü", "a\n"])
def test_what_would_garble_a_log_gets_a_name_of_ours(given: str) -> None:
    assert request_id(given).startswith("req-")
