from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from baton.common.errors import InvalidRequest
from baton.engine.model_config import ModelConfig, Rope
from baton.engine.rope import inverse_frequencies, rope_table

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "eos_token_id": 7,
}


def load(folder: Path, **changes: Any) -> ModelConfig:
    """`changes` to LLAMA; None takes a key away."""
    raw = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.load(folder)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.5},
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
    ],
)
@pytest.mark.parametrize("modern", [False, True])
def test_rope_equals_transformers(tmp_path: Path, scaling: dict[str, Any], modern: bool) -> None:
    kind = scaling.get("rope_type") or scaling["type"]
    if modern:
        config = load(tmp_path, rope_parameters={**scaling, "rope_type": kind, "rope_theta": 500000.0})
    else:
        config = load(tmp_path, rope_scaling=scaling, rope_theta=500000.0)
    frequencies, attention = ROPE_INIT_FUNCTIONS[kind](AutoConfig.from_pretrained(tmp_path), torch.device("cpu"))
    assert torch.equal(inverse_frequencies(config.rope, config.head_dim), frequencies)
    assert config.rope.attention_factor == pytest.approx(attention)


def test_rope_table_holds_cosines_and_sines() -> None:
    table = rope_table(Rope(10000.0), 64, 50, torch.device("cpu"))
    angle = 49 * 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(table[49].double(), torch.stack((angle.cos(), angle.sin())), rtol=1e-4, atol=1e-5)


def test_defaults_where_config_json_is_silent(tmp_path: Path) -> None:
    config = load(tmp_path, num_key_value_heads=None)
    assert (config.head_dim, config.num_kv_heads, config.tied) == (64, 4, False)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False,) * 4
    assert config.rope == Rope(10000.0)
    assert config.qkv_size == 12 * 64


def test_end_tokens_of_both_files_count(tmp_path: Path) -> None:
    assert load(tmp_path).eos_ids == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert load(tmp_path).eos_ids == {7, 8, 9}
    assert load(tmp_path, eos_token_id=None).eos_ids == {8, 9}


def test_windows_are_where_each_family_has_them(tmp_path: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 1}
    mistral = ["MistralForCausalLM"]
    assert load(tmp_path, sliding_window=64).windows == (0, 0)
    assert load(tmp_path, **qwen).windows == (0, 0)
    assert load(tmp_path, **qwen, use_sliding_window=True).windows == (0, 64)
    assert load(tmp_path, **qwen, use_sliding_window=True, layer_types=["sliding_attention"] * 2).windows == (64, 64)
    assert load(tmp_path, architectures=mistral).windows == (4096, 4096)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"architectures": mistral, "sliding_window": None}))
    assert ModelConfig.load(tmp_path).windows == (0, 0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "none named"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        load(tmp_path, **changes)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="does not exist"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidRequest, match="not JSON"):
        ModelConfig.load(tmp_path)
