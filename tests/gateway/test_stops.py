from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.gateway.stops import StopMatcher

TEXT = st.text(alphabet="abc\n東", max_size=40)
STOPS = st.lists(st.text(alphabet="abc\n東", min_size=1, max_size=5), min_size=1, max_size=4)


def oracle(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first; of several that are complete together, the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(tuple(stops))
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.matched:
            return shown, True
    return shown + matcher.flush(), False


@given(TEXT, STOPS, st.lists(st.integers(0, 40), max_size=10))
@settings(max_examples=1000)
def test_any_cut_of_a_text_shows_what_the_oracle_shows(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges)]
    shown, matched = run(pieces, stops)
    assert shown == oracle(text, stops)
    assert matched == any(stop in text for stop in stops)


@given(TEXT, STOPS)
def test_what_is_shown_early_is_never_taken_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(tuple(stops))
    shown = ""
    for char in text:
        shown += matcher.push(char)
        assert oracle(text, stops).startswith(shown)
        if matcher.matched:
            break


def test_nothing_is_held_back_that_cannot_become_a_stop_string() -> None:
    matcher = StopMatcher(("END", "###"))
    assert matcher.push("text E") == "text "
    assert matcher.push("x#") == "Ex"
    assert matcher.push("#a") == "##a"
    assert matcher.push("EN") == ""
    assert matcher.flush() == "EN"
