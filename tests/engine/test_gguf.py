"""Import of GGUF files: tiny ones written here, and the demo model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from baton.common.errors import InvalidRequest
from baton.deploy import models
from baton.engine.gguf import import_gguf
from baton.engine.model_config import ModelConfig
from baton.engine.rope import inverse_frequencies

from ..tiny import CHAT_TEMPLATE, SPECIAL, make_checkpoint
from .test_model import LLAMA3, advance, prompts, sequence, start

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head in llama.cpp's order: 0, D/2, 1, D/2 + 1, ..."""
    dim = len(weight) // heads
    order = [h * dim + i // 2 + (i % 2) * (dim // 2) for h in range(heads) for i in range(dim)]
    return weight[order]


def write_gguf(checkpoint: Path, path: Path, arch: str, **values: Any) -> None:
    """The checkpoint as llama.cpp would keep it, in float32. `values` override or add metadata."""
    config = ModelConfig.load(checkpoint)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_freq_base(config.rope.theta)
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"unused{i}" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model(values.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(values.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        stem, suffix = name.rsplit(".", 1)
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        if arch == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = interleaved(tensor, config.num_heads if "q_proj" in stem else config.num_kv_heads)
        writer.add_tensor(f"{prefix}{NAMES[stem]}.{suffix}", tensor.numpy())
    if "factors" in values:
        writer.add_tensor("rope_freqs.weight", values["factors"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [("llama", {}), ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}), ("qwen2", {}), ("qwen3", {})],
)
def test_a_tiny_model_comes_back_as_it_was(tmp_path: Path, arch: str, overrides: dict[str, Any]) -> None:
    source = make_checkpoint(tmp_path / "source", arch, **overrides)
    write_gguf(source, tmp_path / "tiny.gguf", arch)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "target")
    assert ModelConfig.load(tmp_path / "target") == ModelConfig.load(source)
    expected, found = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "target"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    text = "<|im_start|>Digits 1234, ünïcödé and\n\n  spaces<|im_end|>"
    tokenizers = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (source, tmp_path / "target")]
    assert tokenizers[1].encode(text).ids == tokenizers[0].encode(text).ids
    config = json.loads((tmp_path / "target" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE
    assert config["eos_token"] == SPECIAL[2]
    results = []
    for folder in (source, tmp_path / "target"):
        owner, engine = sequence(prompts(20)[0], 1), start(folder)
        advance(engine, [(owner, 20)])
        results.append(owner.tokens)
    assert results[0] == results[1]


def test_bfloat16_halves_the_folder(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    write_gguf(source, tmp_path / "tiny.gguf", "llama")
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "target", "bfloat16")
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    scaling = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    source = make_checkpoint(tmp_path / "source", "llama", rope_parameters=scaling, max_position_embeddings=131072)
    rope = ModelConfig.load(source).rope
    exact = 500000.0 ** -(np.arange(0, 16, 2) / 16)
    factors = (exact / inverse_frequencies(rope, 16).double().numpy()).astype(np.float32)
    write_gguf(source, tmp_path / "tiny.gguf", "llama", factors=factors)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "target")
    assert ModelConfig.load(tmp_path / "target").rope == rope
    write_gguf(source, tmp_path / "odd.gguf", "llama", factors=factors * 1.1)
    with pytest.raises(InvalidRequest, match="RoPE factors"):
        import_gguf(tmp_path / "odd.gguf", tmp_path / "odd")


def test_what_is_not_supported_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    write_gguf(source, tmp_path / "gemma.gguf", "gemma3")
    write_gguf(source, tmp_path / "pre.gguf", "llama", pre="tekken")
    write_gguf(source, tmp_path / "spm.gguf", "llama", tokenizer="llama")
    (tmp_path / "text.gguf").write_text("not a model at all, but long enough to have a header")
    before = set(tmp_path.iterdir())
    for file, why in (("gemma", "gemma3"), ("pre", "tekken"), ("spm", "byte-level"), ("text", "cannot be read")):
        with pytest.raises(InvalidRequest, match=why):
            import_gguf(tmp_path / f"{file}.gguf", tmp_path / "target")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "target")
    with pytest.raises(InvalidRequest, match="dtype"):
        import_gguf(tmp_path / "pre.gguf", tmp_path / "target", "int3")
    with pytest.raises(InvalidRequest, match="exists already"):
        import_gguf(tmp_path / "pre.gguf", source)
    assert set(tmp_path.iterdir()) == before


def test_the_demo_model_knows_the_capital_of_france() -> None:
    folder = models.prepare(models.find("demo"), lambda job: import_gguf(Path(job.source), Path(job.target), job.dtype))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(tokenizer.encode("2024").ids) == 4  # digits stand alone
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    prompt = tokenizer.encode(
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ).ids
    engine = start(folder, kv_memory=64 << 20, max_batch_tokens=16)
    owner = sequence(prompt, 1)
    while owner.tokens[-1] not in engine.eos_ids or len(owner.tokens) == len(prompt):
        advance(engine, [(owner, min(owner.missing, 16))])
    assert tokenizer.decode(owner.tokens[len(prompt) :]) == "The capital of France is Paris."
