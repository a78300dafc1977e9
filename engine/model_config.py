"""What a checkpoint's config.json says, reduced to what the engine computes with. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import InvalidRequest

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Names as Hugging Face writes them. SmolLM2 and Llama 2/3.x call themselves LlamaForCausalLM."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base frequency, and the scaling that stretches it to longer contexts.

    `kind` is default, linear, llama3 or yarn; fields that a kind does not use are left at their defaults.
    `attention_factor` multiplies cos and sin (yarn).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only model of the Llama family. Sizes are counts of elements.

    windows       for each layer the sliding window in tokens, 0 where attention sees everything
    qkv_bias, o_bias, mlp_bias   which projections add a bias
    qk_norm       queries and keys are RMS-normalised per head before RoPE (Qwen3)
    tied          the output head is the embedding table
    eos_ids       tokens that end a generation
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope: Rope
    max_position_embeddings: int
    windows: tuple[int, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    eos_ids: frozenset[int]

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read config.json (and generation_config.json for the end tokens) of a Hugging Face checkpoint folder.

        Raises `InvalidRequest` naming the architecture or the setting that is not supported.
        """
        raw = _read_json(folder / "config.json")
        architecture = (raw.get("architectures") or ["(none named)"])[0]
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise InvalidRequest(f"architecture {architecture} is not supported; known are {known}", param="model")
        if raw.get("hidden_act", "silu") != "silu":
            raise InvalidRequest(f"activation {raw['hidden_act']} is not supported; only silu is", param="model")
        try:
            return cls._from(raw, architecture, _eos_ids(folder, raw))
        except KeyError as error:
            raise InvalidRequest(f"{folder / 'config.json'} lacks {error}", param="model") from error

    @classmethod
    def _from(cls, raw: Mapping[str, Any], architecture: str, eos_ids: frozenset[int]) -> ModelConfig:
        heads = int(raw["num_attention_heads"])
        bias = architecture != "MistralForCausalLM" and bool(raw.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            rms_eps=float(raw["rms_norm_eps"]),
            rope=_rope(raw),
            max_position_embeddings=int(raw["max_position_embeddings"]),
            windows=_windows(raw, architecture),
            qkv_bias=bias or architecture == "Qwen2ForCausalLM",
            o_bias=bias,
            mlp_bias=architecture == "LlamaForCausalLM" and bool(raw.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            tied=bool(raw.get("tie_word_embeddings", False)),
            eos_ids=eos_ids,
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise InvalidRequest(f"{path} does not exist: not a Hugging Face checkpoint folder", param="model") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}", param="model") from error
    return found


def _eos_ids(folder: Path, raw: Mapping[str, Any]) -> frozenset[int]:
    """Both files may name one id or a list; chat models often name their end-of-turn token in only one of them."""
    sources = [raw]
    if (folder / "generation_config.json").exists():
        sources.append(_read_json(folder / "generation_config.json"))
    ids: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)


def _windows(raw: Mapping[str, Any], architecture: str) -> tuple[int, ...]:
    """Mistral slides in every layer; Qwen only where asked, and from `max_window_layers` upwards; Llama never."""
    layers = int(raw["num_hidden_layers"])
    if architecture == "MistralForCausalLM":
        return (int(raw.get("sliding_window", 4096) or 0),) * layers  # transformers slides where nothing is said
    if architecture == "LlamaForCausalLM" or not raw.get("use_sliding_window", False):
        return (0,) * layers
    window = int(raw.get("sliding_window") or 0)
    first = int(raw.get("max_window_layers", 28))
    kinds = raw.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _rope(raw: Mapping[str, Any]) -> Rope:
    """transformers 5 writes `rope_parameters`; before, there were `rope_theta` and `rope_scaling`."""
    given = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    theta = float(given.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = str(given.get("rope_type") or given.get("type") or "default")
    if float(given.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise InvalidRequest("partial rotary embeddings are not supported", param="model")
    trained = int(given.get("original_max_position_embeddings") or raw["max_position_embeddings"])
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, float(given["factor"]))
    if kind == "llama3":
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        return Rope(theta, kind, float(given["factor"]), trained, low, high)
    if kind == "yarn":
        return _yarn(given, theta, trained, int(raw["max_position_embeddings"]))
    raise InvalidRequest(
        f"RoPE scaling {kind!r} is not supported (it depends on the length of the sequence or needs tables); "
        "known are default, linear, llama3 and yarn",
        param="model",
    )


def _yarn(given: Mapping[str, Any], theta: float, trained: int, max_length: int) -> Rope:
    """YaRN (arXiv 2309.00071): the attention factor follows from the scaling unless it is given."""
    factor = float(given.get("factor") or max_length / trained)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    scale, scale_all = given.get("mscale"), given.get("mscale_all_dim")
    if given.get("attention_factor") is not None:
        attention = float(given["attention_factor"])
    elif scale and scale_all:
        attention = magnitude(float(scale)) / magnitude(float(scale_all))
    else:
        attention = magnitude(1.0)
    return Rope(
        theta,
        "yarn",
        factor,
        trained,
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        attention_factor=attention,
    )
