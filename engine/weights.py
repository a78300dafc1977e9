"""Weights: from a checkpoint's safetensors, or made up (dummy), into the layout that the operations want.

Every rank reads its own part only (`shard.py`); without tensor parallelism there is a single rank, whose part is all.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..common.errors import InvalidRequest
from ..kernels.ops import Ops
from .model import LayerWeights, Weights
from .shard import Axis, Shard

Progress = Callable[[float], None]
"""Called with the share that is done, 0 to 1."""

TensorSource = Callable[..., torch.Tensor]
"""`source(name, *axes)`: of the tensor with this Hugging Face name, which has the axes' sizes, the axes' parts."""

READERS = 8
"""Layers that are read at a time. More than a disk needs to be busy, and enough for page faults and copies through the
driver's own buffers to keep up with a fast one."""

_SAMPLES, _SAMPLE_BYTES = 64, 4096


def load_weights(
    folder: Path, shard: Shard, ops: Ops, dtype: torch.dtype, device: torch.device, progress: Progress
) -> Weights:
    """Read model.safetensors, or the shards that model.safetensors.index.json lists: several layers at a time, far from
    each other, so that several files are read, converted and copied to the device at once. Beside the weights there
    are never more than these layers' tensors in memory.

    Raises `InvalidRequest` that names missing, unexpected or wrongly shaped tensors.
    """
    stored = _stored(folder)
    total, done, counting = sum(each.size for each in stored.values()), 0, threading.Lock()
    used: set[str] = set()
    handles = threading.local()

    def opened(path: Path) -> Any:
        """This thread's own handle of a file: they cannot be shared."""
        mine = handles.__dict__
        if str(path) not in mine:
            mine[str(path)] = safe_open(path, framework="pt")
        return mine[str(path)]

    def source(name: str, *axes: Axis) -> torch.Tensor:
        nonlocal done
        if name not in stored:
            raise InvalidRequest(f"{folder}: tensor {name} is missing", param="model")
        found = opened(stored[name].path).get_slice(name)
        shape = [axis.size for axis in axes]
        if found.get_shape() != shape:
            raise InvalidRequest(
                f"{folder}: tensor {name} is {found.get_shape()}; config.json says {shape}", param="model"
            )
        tensor: torch.Tensor = found[_index(axes)].to(device=device, dtype=dtype)
        with counting:
            used.add(name)
            done += stored[name].size
            progress(done / total)
        return tensor

    weights = assemble(shard, source, ops, READERS)
    # Old checkpoints carry RoPE's frequencies, and some a head although the embedding serves as head.
    harmless = {name for name in stored if name.endswith("rotary_emb.inv_freq")} | {"lm_head.weight"}
    unexpected = sorted(stored.keys() - used - harmless)
    if unexpected:
        raise InvalidRequest(f"{folder}: unexpected tensors: {', '.join(unexpected[:5])}", param="model")
    progress(1.0)
    return weights


def dummy_weights(shard: Shard, ops: Ops, dtype: torch.dtype, device: torch.device, progress: Progress) -> Weights:
    """Random weights, the same for everyone, made on the device: to measure speed without a checkpoint."""
    generator = torch.Generator(device=device).manual_seed(0)

    def source(name: str, *axes: Axis) -> torch.Tensor:
        whole = torch.empty([axis.size for axis in axes], dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            return whole.fill_(1.0)
        return whole.normal_(0.0, 0.02, generator=generator)[_index(axes)]

    return assemble(shard, source, ops, 1, progress)


def assemble(
    shard: Shard, source: TensorSource, ops: Ops, readers: int, progress: Progress = lambda share: None
) -> Weights:
    """Ask `source` for a rank's part of every tensor of the model, and fuse and pack them. `readers` threads ask for a
    layer each at a time; one alone asks in order. `progress` counts layers."""
    config = shard.config

    def table(name: str) -> torch.Tensor:
        rows = source(name, shard.vocabulary, shard.hidden)
        missing = shard.vocabulary_rows - len(rows)
        return ops.pack(torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing else rows)

    embedding = table("model.embed_tokens.weight")
    head = embedding if config.tied else table("lm_head.weight")
    apart = -(-config.num_layers // readers)
    order = sorted(range(config.num_layers), key=lambda index: (index % apart, index))
    layers: dict[int, LayerWeights] = {}
    with ThreadPoolExecutor(readers, "reader") as pool:
        futures = {pool.submit(_layer, shard, source, ops, f"model.layers.{index}."): index for index in order}
        try:
            for done in as_completed(futures):
                layers[futures[done]] = done.result()
                progress(len(layers) / config.num_layers)
        finally:
            pool.shutdown(cancel_futures=True)
    final_gain = source("model.norm.weight", shard.hidden)
    return Weights(embedding, tuple(layers[index] for index in range(config.num_layers)), final_gain, head)


def _layer(shard: Shard, source: TensorSource, ops: Ops, prefix: str) -> LayerWeights:
    config, hidden = shard.config, shard.hidden
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    qkv = {"q_proj": shard.queries, "k_proj": shard.keys, "v_proj": shard.keys}
    gate_up = {"gate_proj": shard.inner, "up_proj": shard.inner}

    def matrix(room: str, parts: dict[str, Axis], columns: Axis) -> torch.Tensor:
        return ops.pack(torch.cat([source(f"{room}{name}.weight", rows, columns) for name, rows in parts.items()]))

    def bias(present: bool, room: str, parts: dict[str, Axis]) -> torch.Tensor | None:
        return torch.cat([source(f"{room}{name}.bias", rows) for name, rows in parts.items()]) if present else None

    return LayerWeights(
        input_gain=source(prefix + "input_layernorm.weight", hidden),
        qkv=matrix(attention, qkv, hidden),
        qkv_bias=bias(config.qkv_bias, attention, qkv),
        query_gain=source(attention + "q_norm.weight", shard.head_dim) if config.qk_norm else None,
        key_gain=source(attention + "k_norm.weight", shard.head_dim) if config.qk_norm else None,
        output=matrix(attention, {"o_proj": hidden}, shard.queries),
        output_bias=bias(config.o_bias, attention, {"o_proj": hidden}),
        inner_gain=source(prefix + "post_attention_layernorm.weight", hidden),
        gate_up=matrix(mlp, gate_up, hidden),
        gate_up_bias=bias(config.mlp_bias, mlp, gate_up),
        down=matrix(mlp, {"down_proj": hidden}, shard.inner),
        down_bias=bias(config.mlp_bias, mlp, {"down_proj": hidden}),
    )


def _index(axes: tuple[Axis, ...]) -> tuple[slice, ...]:
    return tuple(slice(axis.part.start, axis.part.stop) for axis in axes)


def weights_digest(folder: Path) -> str:
    """Cheap name of a checkpoint's content: config.json whole, and of each safetensors file the header, the size
    and bytes sampled at even distances. Tells checkpoints apart; does not prove that no byte was changed."""
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for path in sorted({each.path for each in _stored(folder).values()}):
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(size.to_bytes(8, "little") + file.read(header))
            for i in range(_SAMPLES):
                file.seek(8 + header + max(0, size - 8 - header - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor is, and how many elements it has."""

    path: Path
    size: int


def _stored(folder: Path) -> dict[str, _Stored]:
    """All tensors of a checkpoint by name. Raises `InvalidRequest` where a file is missing or broken."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        shards = {folder / file for file in json.loads(index.read_text())["weight_map"].values()}
    elif single.exists():
        shards = {single}
    else:
        raise InvalidRequest(f"{folder} has neither {single.name} nor {index.name}", param="model")
    found: dict[str, _Stored] = {}
    for path in sorted(shards):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 -- it is not a dictionary
                    found[name] = _Stored(path, math.prod(file.get_slice(name).get_shape()))
        except (OSError, SafetensorError) as error:
            raise InvalidRequest(f"{path} cannot be read: {error}", param="model") from error
    return found
