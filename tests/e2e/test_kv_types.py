"""The demo model with its KV in fewer bits. One engine in this process: what travels is for other tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from baton.deploy import models
from baton.engine.gguf import import_gguf
from tests.engine.test_model import advance, sequence, start

ANSWERS = {"What is the capital of France?": "The capital of France is Paris.", "What is 2 + 3?": "2 + 3 = 5"}


@pytest.fixture(scope="module")
def folder() -> Path:
    """The converted demo model, in the user's cache."""
    return models.prepare(models.find("demo"), lambda job: import_gguf(Path(job.source), Path(job.target), job.dtype))


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "float8_e4m3"])
def test_short_answers_are_those_of_float_kv(folder: Path, kv_dtype: str) -> None:
    engine = start(folder, kv_dtype=kv_dtype, kv_memory=64 << 20)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for question, answer in ANSWERS.items():
        chat = [{"role": "user", "content": question}]
        owner = sequence(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"], 1)
        while tokenizer.eos_token_id not in owner.tokens[owner.prompt_len :] and owner.output_len < 20:
            advance(engine, [(owner, owner.missing)])
        assert tokenizer.decode(owner.tokens[owner.prompt_len :], skip_special_tokens=True) == answer
