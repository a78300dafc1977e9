"""Import of GGUF files: one file in llama.cpp's format → a Hugging Face checkpoint folder.

Weights are dequantised, so the folder holds exactly the numbers that the quantised file stands for.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from ..common.errors import InvalidRequest
from .gguf_tokenizer import special_ids, tokenizer_config, write_tokenizer
from .model_config import Rope
from .rope import inverse_frequencies

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""GGUF's name of an architecture → Hugging Face's."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_LLAMA3 = [Rope(0.0, "llama3", factor, 8192, 1.0, 4.0) for factor in (8.0, 32.0)]
"""Llama 3.1's and 3.2's RoPE scalings. A GGUF keeps only the factors that follow from them."""


def import_gguf(source: Path, target: Path, dtype: str = "float32") -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    The folder appears whole or not at all; one that another process finished meanwhile is left as it is. Raises
    `InvalidRequest` where the file is not a GGUF, or holds what the engine does not support.
    """
    if dtype not in _DTYPES:
        raise InvalidRequest(f"dtype {dtype} is not one of {', '.join(_DTYPES)}", param="dtype")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidRequest(f"{target} exists already", param="target")
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{source} cannot be read as GGUF: {error}", param="model") from error
    facts = Facts(reader)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write_json(scratch / "config.json", _config(facts, dtype))
        write_tokenizer(facts.values, scratch / "tokenizer.json")
        _write_json(scratch / "tokenizer_config.json", tokenizer_config(facts.values))
        _write_json(scratch / "generation_config.json", special_ids(facts.values))
        save_file(dict(_tensors(facts, _DTYPES[dtype])), scratch / "model.safetensors", metadata={"format": "pt"})
        scratch.chmod(0o755)
        os.replace(scratch, target)
    except KeyError as error:
        raise InvalidRequest(f"{source} lacks {error}", param="model") from error
    except OSError:
        if not (target / "config.json").exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Facts:
    """A GGUF's metadata: `values` by full name, `facts["head_count"]` of its architecture, and its tensors."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self.values: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.values.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise InvalidRequest(f"GGUF architecture {self.architecture} is not supported; known are {known}")

    def __getitem__(self, name: str) -> Any:
        try:
            return self.values[f"{self.architecture}.{name}"]
        except KeyError:
            raise InvalidRequest(f"the GGUF lacks {self.architecture}.{name}", param="model") from None

    def get(self, name: str, default: Any) -> Any:
        return self.values.get(f"{self.architecture}.{name}", default)

    @property
    def head_dim(self) -> int:
        return int(self.get("attention.key_length", self["embedding_length"] // self["attention.head_count"]))


def _config(facts: Facts, dtype: str) -> dict[str, Any]:
    config = {
        "architectures": [ARCHITECTURES[facts.architecture]],
        "model_type": facts.architecture,
        "vocab_size": len(facts.values["tokenizer.ggml.tokens"]),
        "hidden_size": facts["embedding_length"],
        "intermediate_size": facts["feed_forward_length"],
        "num_hidden_layers": facts["block_count"],
        "num_attention_heads": facts["attention.head_count"],
        "num_key_value_heads": facts.get("attention.head_count_kv", facts["attention.head_count"]),
        "head_dim": facts.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _shortest(facts["attention.layer_norm_rms_epsilon"]),
        "max_position_embeddings": facts["context_length"],
        "rope_theta": _shortest(facts.get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
        "attention_bias": facts.architecture == "llama" and "blk.0.attn_q.bias" in facts.tensors,
        "torch_dtype": dtype,
    } | special_ids(facts.values)
    scaling = _rope_scaling(facts, config["rope_theta"])
    return config | ({"rope_scaling": scaling} if scaling else {})


def _shortest(value: float) -> float:
    """The decimal that was meant: a GGUF stores 1e-05 as the float32 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(facts: Facts, theta: float) -> dict[str, Any] | None:
    kind, factor = facts.get("rope.scaling.type", "none"), float(facts.get("rope.scaling.factor", 1.0))
    original = facts.get("rope.scaling.original_context_length", facts["context_length"])
    if "rope_freqs.weight" in facts.tensors:
        return _llama3_scaling(facts, theta)
    if kind == "linear" and factor != 1.0:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if kind not in ("none", "linear"):
        raise InvalidRequest(f"the GGUF's RoPE scaling {kind!r} is not supported", param="model")
    return None


def _llama3_scaling(facts: Facts, theta: float) -> dict[str, Any]:
    """Find which of Llama's scalings gives the factors that the file keeps for each frequency."""
    kept = torch.from_numpy(np.array(facts.tensors["rope_freqs.weight"].data, dtype=np.float32))
    plain = inverse_frequencies(Rope(theta), facts.head_dim)
    for rope in _LLAMA3:
        scaled = Rope(theta, rope.kind, rope.factor, rope.original_length, rope.low_freq_factor, rope.high_freq_factor)
        if torch.allclose(plain / inverse_frequencies(scaled, facts.head_dim), kept, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_length,
            }
    raise InvalidRequest("the GGUF's RoPE factors are none of Llama 3's known scalings", param="model")


def _tensors(facts: Facts, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face name and tensor, dequantised."""
    heads = {"attn_q": facts["attention.head_count"]}
    heads["attn_k"] = facts.get("attention.head_count_kv", heads["attn_q"])
    for name, tensor in facts.tensors.items():
        if name == "rope_freqs.weight":
            continue
        *block, kind, suffix = name.split(".")
        if kind not in _TENSORS:
            raise InvalidRequest(f"the GGUF's tensor {name} is not known", param="model")
        prefix = f"model.layers.{block[1]}." if block else ""
        value = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        if facts.architecture == "llama" and kind in heads:
            value = _unpermute(value, heads[kind])
        yield f"{prefix}{_TENSORS[kind]}.{suffix}", value.to(dtype).contiguous()


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp interleaves the two halves that RoPE rotates against each other; Hugging Face keeps them apart."""
    split = weight.view(heads, -1, 2, *weight.shape[1:])
    return split.transpose(1, 2).reshape(weight.shape)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
