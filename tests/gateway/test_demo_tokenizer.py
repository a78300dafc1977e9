"""The tokenizer of the demo model, as the import of its GGUF writes it: a real vocabulary of 49,152."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.deploy import models
from baton.engine.gguf_tokenizer import tokenizer_config, write_tokenizer
from baton.gateway.chat import ChatTemplate
from baton.gateway.tokenizer import ByteDetokenizer, Tokenizer

VOCAB = 49152


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    fields = gguf.GGUFReader(models.find("demo").gguf).fields
    values = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    write_tokenizer(values, path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(values)))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder, VOCAB, 8192)


@pytest.fixture(scope="module")
def reference(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_the_table_is_what_the_tokenizer_decodes_for_every_id(
    tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    detokenizer = tokenizer.detokenizer()
    assert isinstance(detokenizer, ByteDetokenizer)
    expected = reference.decode_batch([[token] for token in range(VOCAB)])
    streamed = []
    for token in range(VOCAB):
        text = detokenizer.push(token) + detokenizer.flush()
        detokenizer = tokenizer.detokenizer()
        streamed.append(text)
    assert streamed == expected


@given(tokens=st.lists(st.integers(0, VOCAB - 1), max_size=80))
@settings(max_examples=200)
def test_any_tokens_stream_to_the_text_of_all_of_them(
    tokenizer: Tokenizer, reference: tokenizers.Tokenizer, tokens: list[int]
) -> None:
    detokenizer = tokenizer.detokenizer()
    text = "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
    assert text == reference.decode(tokens)


async def test_the_chat_template_and_its_special_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    template = ChatTemplate.load(folder)
    assert template is not None
    text = template.render([{"role": "user", "content": "What is the capital of France?"}])
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    tokens = await tokenizer.encode(text, special=False)
    assert tokens[0] == 1  # <|im_start|>, once: the template writes all special tokens
    assert tokens.count(2) == text.count("<|im_end|>")
    assert tokenizer.decode(tokens) == text
