"""Text from tokens: streamed or not it is the same, and it is exactly what the tokens spell."""

from __future__ import annotations

import asyncio

import pytest

from tests.e2e.cluster import OUTPUT, Cluster
from tests.e2e.prompts import CHAT, CODE, SHORT, UNICODE, Prompt
from tests.e2e.reference import Judge

pytestmark = pytest.mark.timeout(300)

SPELT: list[Prompt] = [*UNICODE, *CODE[:3], *CHAT[:3], SHORT[3]]


async def test_streamed_and_whole_are_the_same(pair: Cluster, judge: Judge) -> None:
    whole = await pair.ask_all(SPELT)
    streamed = await pair.ask_all(SPELT, stream=True)
    for one, other in zip(whole, streamed, strict=True):
        assert one.text == other.text == judge.decode(one.tokens)
        assert one.tokens == other.tokens
        assert one.finish_reason == other.finish_reason == "length"
        assert one.usage["total_tokens"] == other.usage["total_tokens"]
        assert len(other.pieces) >= OUTPUT, "one event a token"
    assert any(not one.text.isascii() for one in whole), "the prompts ask for unicode"
    cut = [p for other in streamed for p, token in zip(other.pieces, other.tokens, strict=False) if not p]
    assert cut, "some character is cut across tokens, so that a token has to wait for the next"


async def test_the_end_of_a_text_is_its_models(pair: Cluster, judge: Judge) -> None:
    """Without `ignore_eos` the answer ends where the reference chooses the end, and the end is not shown."""
    prompt = CHAT[0]
    for stream in (False, True):
        answer = await pair.ask(prompt, ignore_eos=False, stream=stream)
        assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "stop")
        judge.check([(judge.encode(prompt), (*answer.tokens, judge.tokenizer.eos_token_id))])


@pytest.mark.parametrize("prompt", [UNICODE[1], UNICODE[6], CODE[5], SHORT[3]], ids=["東京", "emoji", "code", "prose"])
async def test_stop_strings_cut_across_tokens(pair: Cluster, judge: Judge, prompt: Prompt) -> None:
    """Each stop string begins within one token and ends within another; nothing of it is ever shown."""
    full = await pair.ask(prompt)
    ends = [len(judge.decode(full.tokens[: i + 1])) for i in range(OUTPUT)]
    stops = {full.text[max(0, ends[i] - 2) : ends[i] + 2] for i in (5, 11, 23, 37)}
    asked = [(stop, stream) for stop in sorted(stops) for stream in (False, True)]
    asking = (pair.ask(prompt, stop=[stop, "that never comes"], stream=stream) for stop, stream in asked)
    for (stop, _), answer in zip(asked, await asyncio.gather(*asking), strict=True):
        assert answer.text == full.text[: full.text.index(stop)]
        assert answer.finish_reason == "stop"
        shown = tuple(answer.tokens)
        assert shown == tuple(full.tokens[: len(shown)])
        assert len(shown) < OUTPUT
