"""The tokenizer that a GGUF carries, as a Hugging Face tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ..common.errors import InvalidRequest

_CONTROL, _USER_DEFINED = 3, 4
"""Token types of GGUF that are matched in the text before it is split."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id"}
_ROLES["pad_token"] = "padding_token_id"


def write_tokenizer(values: Mapping[str, Any], path: Path) -> None:
    """Byte-level BPE from a GGUF's vocabulary and merges. Raises `InvalidRequest` for any other kind of tokenizer."""
    if values.get("tokenizer.ggml.model") != "gpt2":
        raise InvalidRequest(
            f"the GGUF's tokenizer {values.get('tokenizer.ggml.model')} is not supported; only byte-level BPE is"
        )
    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(str(values.get("tokenizer.ggml.pre", "gpt-2")))
    tokenizer.decoder = decoders.ByteLevel()
    if values.get("tokenizer.ggml.add_bos_token") and "tokenizer.ggml.bos_token_id" in values:
        bos = values["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    kinds = values["tokenizer.ggml.token_type"]
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL) for token, kind in added])
    tokenizer.save(str(path))


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging. llama.cpp stores only a name for it; these are the cuts that the names mean."""
    if name in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    patterns = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2}
    if name not in patterns:
        raise InvalidRequest(f"the GGUF's pre-tokenizer {name} is not supported", param="model")
    split = pre_tokenizers.Split(Regex(patterns[name]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokenizer_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens by role, and the chat template."""
    tokens = values["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(values.get("tokenizer.ggml.add_bos_token", False)),
        "clean_up_tokenization_spaces": False,
    }
    for role, name in _ROLES.items():
        if (index := values.get(f"tokenizer.ggml.{name}")) is not None:
            config[role] = tokens[index]
    if "tokenizer.chat_template" in values:
        config["chat_template"] = values["tokenizer.chat_template"]
    return config


def special_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of the beginning, end and padding tokens, as config.json and generation_config.json name them."""
    found: dict[str, Any] = {}
    names = (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id"))
    for ours, theirs in names:
        if (index := values.get(f"tokenizer.ggml.{theirs}")) is not None:
            found[ours] = int(index)
    ends = [values.get(f"tokenizer.ggml.{name}") for name in ("eos_token_id", "eot_token_id")]
    ids = sorted({int(index) for index in ends if index is not None})
    if ids:
        found["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    return found
