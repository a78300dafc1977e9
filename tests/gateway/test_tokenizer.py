from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from baton.common.errors import InvalidRequest, PromptTooLong
from baton.gateway.tokenizer import ByteDetokenizer, Detokenizer, Tokenizer, WindowDetokenizer

from .conftest import byte_level_tokenizer

BYTE_LEVEL = Tokenizer(byte_level_tokenizer(), vocab_size=512, max_tokens=4096)


def sentencepiece_tokenizer() -> tokenizers.Tokenizer:
    """As Llama 2 has it: U+2581 for spaces, one token for each byte of what is not in the vocabulary."""
    pieces = [
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "\u2581Hello",
        "Hello",
        "\u2581world",
    ]
    pieces += ["!", "a", "b", "\u2581\u2581", "é", "\u2581x", "<unk>"]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


SENTENCEPIECE = Tokenizer(sentencepiece_tokenizer(), vocab_size=300, max_tokens=4096)


def stream(detokenizer: Detokenizer, tokens: list[int]) -> str:
    return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()


def test_each_kind_of_tokenizer_gets_its_detokenizer() -> None:
    assert isinstance(BYTE_LEVEL.detokenizer(), ByteDetokenizer)
    assert isinstance(SENTENCEPIECE.detokenizer(), WindowDetokenizer)


def test_the_table_is_what_the_tokenizer_decodes_for_every_id() -> None:
    reference = byte_level_tokenizer()
    for token in range(reference.get_vocab_size(with_added_tokens=True)):
        assert stream(BYTE_LEVEL.detokenizer(), [token]) == reference.decode([token]), token


def test_ids_beyond_the_tokenizer_give_no_text() -> None:
    assert stream(BYTE_LEVEL.detokenizer(), [511]) == ""


@given(st.lists(st.integers(0, BYTE_LEVEL._tokenizer.get_vocab_size() - 1), max_size=60))
@settings(max_examples=300)
def test_any_tokens_stream_to_the_text_of_all_of_them(tokens: list[int]) -> None:
    assert stream(BYTE_LEVEL.detokenizer(), tokens) == BYTE_LEVEL._tokenizer.decode(tokens)


@given(st.text(max_size=60))
def test_any_text_comes_back_through_the_stream(text: str) -> None:
    assert stream(BYTE_LEVEL.detokenizer(), list(BYTE_LEVEL._encode(text, False))) == text


@given(st.text(alphabet="Hello wrdab!é東 \u2581😀x", max_size=40))
@settings(max_examples=300)
def test_sentencepiece_text_streams_to_the_text_of_all_tokens(text: str) -> None:
    tokens = list(SENTENCEPIECE._encode(text, False))
    assert stream(SENTENCEPIECE.detokenizer(), tokens) == SENTENCEPIECE._tokenizer.decode(tokens)


@given(st.lists(st.sampled_from([0, 1, *range(258, SENTENCEPIECE._tokenizer.get_vocab_size())]), max_size=30))
@settings(max_examples=300)
def test_any_sentencepiece_tokens_stream_to_the_text_of_all_of_them(tokens: list[int]) -> None:
    assert stream(SENTENCEPIECE.detokenizer(), tokens) == SENTENCEPIECE._tokenizer.decode(tokens)


def test_a_character_is_given_when_its_last_byte_is_there() -> None:
    tokens = BYTE_LEVEL._encode("東", False)
    assert len(tokens) > 1
    detokenizer = BYTE_LEVEL.detokenizer()
    assert [detokenizer.push(token) for token in tokens] == [""] * (len(tokens) - 1) + ["東"]


def test_a_character_that_stays_incomplete_becomes_the_replacement_character() -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        first = tokenizer._encode("東", False)[0]
        assert stream(tokenizer.detokenizer(), [first]) == "�"


def test_bytes_that_never_become_a_character_are_not_held_for_ever() -> None:
    stray = 2 + 0x80
    detokenizer = SENTENCEPIECE.detokenizer()
    given = [detokenizer.push(stray) for _ in range(100)]
    assert set("".join(given)) == {"�"}
    assert len(detokenizer._window) < 20  # type: ignore[attr-defined]


def test_decode_is_the_inverse_of_encode_with_special_tokens() -> None:
    text = "<|start|>user\nHello 東京<|end|>"
    assert BYTE_LEVEL.decode(BYTE_LEVEL._encode(text, False)) == text


def test_token_bytes_spell_special_tokens_and_parts_of_characters() -> None:
    assert BYTE_LEVEL.token_bytes(0) == b"<|bos|>"
    assert b"".join(map(BYTE_LEVEL.token_bytes, BYTE_LEVEL._encode("東 a", False))) == "東 a".encode()
    assert SENTENCEPIECE.token_bytes(2 + 0xE6) == b"\xe6"
    assert SENTENCEPIECE.token_bytes(SENTENCEPIECE._tokenizer.token_to_id("\u2581Hello")) == b" Hello"


async def test_long_text_is_tokenised_like_short_text() -> None:
    text = "Hello world, " * 1000
    tokens = await BYTE_LEVEL.encode(text, special=True)
    assert tokens[0] == 0
    assert BYTE_LEVEL.decode(tokens[1:]) == text
    assert await BYTE_LEVEL.encode("Hello", special=True) == (0, *await BYTE_LEVEL.encode("Hello", special=False))


async def test_text_that_cannot_fit_is_refused_untokenised() -> None:
    with pytest.raises(PromptTooLong, match="1000000 characters"):
        await BYTE_LEVEL.encode("x" * 1_000_000, special=True)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path, 512, 4096)


def test_streams_do_not_share_state() -> None:
    tokens = BYTE_LEVEL._encode("東京", False)
    one, other = BYTE_LEVEL.detokenizer(), BYTE_LEVEL.detokenizer()
    texts = {"one": "", "other": ""}
    for token in tokens:
        texts["one"] += one.push(token)
        texts["other"] += other.push(random.Random(0).choice(BYTE_LEVEL._encode("a", False)))
    assert texts["one"] + one.flush() == "東京"
    assert texts["other"] == "a" * len(tokens)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path, 512, 4096)
