from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.messages import TokenOut
from baton.common.types import FinishReason, SamplingParams, Timeline, Usage
from baton.gateway.choice import Choice
from baton.gateway.tokenizer import Tokenizer
from baton.router.request import Batch, Finish

from .conftest import byte_level_tokenizer
from .test_stops import oracle

TOKENIZER = Tokenizer(byte_level_tokenizer(), vocab_size=512, max_tokens=4096)
EOS = 2
ORDINARY = [token for token in range(3, TOKENIZER._tokenizer.get_vocab_size()) if TOKENIZER.token_bytes(token)]
FINISH = Finish(FinishReason.LENGTH, Usage(3, 0, 7), Timeline())


def run(tokens: list[int], cuts: list[int], stops: list[str]) -> tuple[Choice, str]:
    """The choice after all tokens, in batches that end at `cuts`, and its text."""
    choice = Choice(0, (1, 2, 3), SamplingParams(100), tuple(stops), frozenset([EOS]), TOKENIZER.detokenizer())
    outs = [TokenOut(1, 3 + i, token) for i, token in enumerate(tokens)]
    edges = [0, *sorted(min(cut, len(outs)) for cut in cuts), len(outs)]
    text = ""
    for number, (start, end) in enumerate(pairwise(edges)):
        finish = FINISH if number == len(edges) - 2 else None
        text += "".join(part for _, part in choice.feed(Batch(outs[start:end], finish)))
        if choice.finish_reason is not None:
            break
    return choice, text + choice.end


@given(
    tokens=st.one_of(
        st.lists(st.sampled_from(ORDINARY), max_size=40),
        st.text(alphabet="ab 東😀", max_size=20).map(lambda text: list(TOKENIZER._encode(text, False))),
    ),
    stops=st.lists(st.text(alphabet="ab 東😀e�", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
@settings(max_examples=500)
def test_any_batches_of_any_tokens_give_the_oracles_text(tokens: list[int], stops: list[str], cuts: list[int]) -> None:
    whole = TOKENIZER._tokenizer.decode(tokens)
    for batches in ([], cuts, list(range(40))):
        choice, text = run(tokens, batches, stops)
        assert text == oracle(whole, stops)
        stopped = any(stop in whole for stop in stops)
        assert choice.finish_reason == (FinishReason.STOP if stopped else FinishReason.LENGTH)


def test_tokens_after_a_stop_string_are_not_counted() -> None:
    a, b = TOKENIZER._encode("ab", False)
    choice, text = run([a, b, a, a], [], ["b"])
    assert text == "a"
    assert choice.completion_tokens == 2


def test_eos_is_text_only_where_it_does_not_end() -> None:
    params = SamplingParams(100, ignore_eos=True, stop_token_ids=(50,))
    choice = Choice(0, (1,), params, (), frozenset([60]), TOKENIZER.detokenizer())
    shown = choice.feed(Batch([TokenOut(1, 1, 60), TokenOut(1, 2, 50)], FINISH))
    assert [out.token for out, _ in shown] == [60]
    assert choice.completion_tokens == 2
