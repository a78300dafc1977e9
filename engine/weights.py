"""Weights: from a checkpoint's safetensors, or made up (dummy), into the layout that the operations want.

Every rank reads its own part only (`shard.py`); without tensor parallelism there is a single rank, whose part is all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..common.errors import InvalidRequest
from ..kernels.ops import Ops
from .checkpoint import Checkpoint
from .model import LayerWeights, Weights
from .shard import Axis, Shard

Progress = Callable[[float], None]
"""Called with the share that is done, 0 to 1."""


class Part(NamedTuple):
    """Of the tensor with this Hugging Face name, which has the axes' sizes, the axes' parts."""

    name: str
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> list[int]:
        return [len(axis.part) for axis in self.axes]


TensorSource = Callable[[list[Part]], torch.Tensor]
"""These parts, one below the other."""

READERS = 8
"""Layers that are read at a time. More than a disk needs to be busy, and enough for copies to keep up with a
fast one."""


def load_weights(
    folder: Path, shard: Shard, ops: Ops, dtype: torch.dtype, device: torch.device, progress: Progress
) -> Weights:
    """Read a checkpoint: several layers at a time, far from each other, so that several files are read and copied to
    the device at once, each number straight to its place in the matrices that are fused. Beside the weights there are
    never more than these layers' tensors in memory.

    Raises `InvalidRequest` that names missing, unexpected or wrongly shaped tensors.
    """
    used: dict[str, int] = {}
    counting = threading.Lock()
    with Checkpoint(folder, device) as files:
        total = sum(tensor.size for tensor in files.tensors.values())

        def source(parts: list[Part]) -> torch.Tensor:
            for part in parts:
                _check(folder, files, part)
            shapes = [part.shape for part in parts]
            whole = torch.empty(sum(rows for rows, *_ in shapes), *shapes[0][1:], dtype=dtype, device=device)
            for part, into in zip(parts, whole.split_with_sizes([rows for rows, *_ in shapes]), strict=True):
                files.read(part.name, part.axes, into)
                with counting:
                    used[part.name] = files.tensors[part.name].size
                    progress(sum(used.values()) / total)
            return whole

        weights = assemble(shard, source, ops, READERS)
    # Old checkpoints carry RoPE's frequencies, and some a head although the embedding serves as head.
    harmless = {name for name in files.tensors if name.endswith("rotary_emb.inv_freq")} | {"lm_head.weight"}
    unexpected = sorted(files.tensors.keys() - used.keys() - harmless)
    if unexpected:
        raise InvalidRequest(f"{folder}: unexpected tensors: {', '.join(unexpected[:5])}", param="model")
    progress(1.0)
    return weights


def _check(folder: Path, files: Checkpoint, part: Part) -> None:
    if part.name not in files.tensors:
        raise InvalidRequest(f"{folder}: tensor {part.name} is missing", param="model")
    shape, wanted = list(files.tensors[part.name].shape), [axis.size for axis in part.axes]
    if shape != wanted:
        raise InvalidRequest(f"{folder}: tensor {part.name} is {shape}; config.json says {wanted}", param="model")


def dummy_weights(shard: Shard, ops: Ops, dtype: torch.dtype, device: torch.device, progress: Progress) -> Weights:
    """Random weights, the same for everyone, made on the device: to measure speed without a checkpoint."""
    generator = torch.Generator(device=device).manual_seed(0)

    def one(part: Part) -> torch.Tensor:
        whole = torch.empty([axis.size for axis in part.axes], dtype=dtype, device=device)
        if part.name.endswith("norm.weight"):
            return whole.fill_(1.0)
        index = tuple(slice(axis.part.start, axis.part.stop) for axis in part.axes)
        return whole.normal_(0.0, 0.02, generator=generator)[index]

    return assemble(shard, lambda parts: torch.cat([one(part) for part in parts]), ops, 1, progress)


def assemble(
    shard: Shard, source: TensorSource, ops: Ops, readers: int, progress: Progress = lambda share: None
) -> Weights:
    """Ask `source` for a rank's part of every tensor of the model, fused, and pack it. `readers` threads ask for a
    layer each at a time; one alone asks in order. `progress` counts what is there."""
    config = shard.config

    def table(name: str) -> torch.Tensor:
        rows = source([Part(name, (shard.vocabulary, shard.hidden))])
        missing = shard.vocabulary_rows - len(rows)
        return ops.pack(torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing else rows)

    apart = -(-config.num_layers // readers)
    order = sorted(range(config.num_layers), key=lambda index: (index % apart, index))
    with ThreadPoolExecutor(readers, "reader") as pool:
        embedding = pool.submit(table, "model.embed_tokens.weight")
        head = embedding if config.tied else pool.submit(table, "lm_head.weight")
        layers = {index: pool.submit(_layer, shard, source, ops, f"model.layers.{index}.") for index in order}
        final_gain = pool.submit(source, [Part("model.norm.weight", (shard.hidden,))])
        futures: set[Future[Any]] = {embedding, head, final_gain, *layers.values()}
        try:
            for count, done in enumerate(as_completed(futures), 1):
                done.result()
                progress(count / len(futures))
        finally:
            pool.shutdown(cancel_futures=True)
    read = tuple(layers[index].result() for index in range(config.num_layers))
    return Weights(embedding.result(), read, final_gain.result(), head.result())


def _layer(shard: Shard, source: TensorSource, ops: Ops, prefix: str) -> LayerWeights:
    config, hidden = shard.config, shard.hidden
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    qkv = {"q_proj": shard.queries, "k_proj": shard.keys, "v_proj": shard.keys}
    gate_up = {"gate_proj": shard.inner, "up_proj": shard.inner}

    def matrix(room: str, parts: dict[str, Axis], columns: Axis) -> torch.Tensor:
        return ops.pack(source([Part(f"{room}{name}.weight", (rows, columns)) for name, rows in parts.items()]))

    def bias(present: bool, room: str, parts: dict[str, Axis]) -> torch.Tensor | None:
        return source([Part(f"{room}{name}.bias", (rows,)) for name, rows in parts.items()]) if present else None

    def gain(name: str, features: Axis) -> torch.Tensor:
        return source([Part(f"{prefix}{name}.weight", (features,))])

    return LayerWeights(
        input_gain=gain("input_layernorm", hidden),
        qkv=matrix(attention, qkv, hidden),
        qkv_bias=bias(config.qkv_bias, attention, qkv),
        query_gain=gain("self_attn.q_norm", shard.head_dim) if config.qk_norm else None,
        key_gain=gain("self_attn.k_norm", shard.head_dim) if config.qk_norm else None,
        output=matrix(attention, {"o_proj": hidden}, shard.queries),
        output_bias=bias(config.o_bias, attention, {"o_proj": hidden}),
        inner_gain=gain("post_attention_layernorm", hidden),
        gate_up=matrix(mlp, gate_up, hidden),
        gate_up_bias=bias(config.mlp_bias, mlp, gate_up),
        down=matrix(mlp, {"down_proj": hidden}, shard.inner),
        down_bias=bias(config.mlp_bias, mlp, {"down_proj": hidden}),
    )
