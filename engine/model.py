"""The model: a decoder-only transformer of the Llama family over a flat batch of rows.

Rows of several sequences lie one after the other, decodes and prefill chunks alike; only attention looks at which row
belongs where. Nothing is padded. Shapes: T rows, C hidden size, H query heads, G key heads, D head size, F inner size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..kernels.ops import Heads, Ops, Rows
from .model_config import ModelConfig

OnLayer = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Matrices are as `Ops.pack` made them: qkv [(H + 2 G) D, C], output [C, H D], gate_up [2 F, C], down [C, F]."""

    input_gain: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    query_gain: torch.Tensor | None
    key_gain: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    inner_gain: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """`embedding` [V, C] and `head` [V, C], packed; the same tensor where the model ties them."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_gain: torch.Tensor
    head: torch.Tensor


class Model:
    """Weights with the computation over them. Has no state: K and V live in the pool that is handed in."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, rope: torch.Tensor) -> None:
        """`rope`: [longest sequence, 2, D / 2] cos and sin (`rope.rope_table`)."""
        self._config = config
        self._weights = weights
        self._ops = ops
        self._rope = rope
        self._heads = [
            Heads(
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                window,
                layer.query_gain,
                layer.key_gain,
                config.rms_eps,
            )
            for layer, window in zip(weights.layers, config.windows, strict=True)
        ]

    def forward(
        self,
        tokens: torch.Tensor,
        rows: Rows,
        kv: Sequence[torch.Tensor],
        wanted: torch.Tensor,
        on_layer: OnLayer | None = None,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [len(wanted), V] in float32 of the `wanted` rows (int64 indices) of `tokens` [T] int64, written to
        `into` where that is given.

        Stores K and V of all rows into `kv`, one tensor [blocks, 2, G, block_size, D] a layer, and calls
        `on_layer(i)` as soon as layer i's are stored, so that they can leave while later layers compute.
        """
        config, ops = self._config, self._ops
        hidden = ops.rows(self._weights.embedding, tokens)
        change = torch.zeros_like(hidden)
        for index, layer in enumerate(self._weights.layers):
            hidden, change = self._layer(hidden, change, layer, self._heads[index], rows, kv[index], index, on_layer)
        normed, _ = ops.add_norm(hidden[wanted], change[wanted], self._weights.final_gain, config.rms_eps)
        logits = ops.linear(normed, self._weights.head, config.vocab_size)
        return logits.float() if into is None else into.copy_(logits)

    def _layer(
        self,
        hidden: torch.Tensor,
        change: torch.Tensor,
        layer: LayerWeights,
        heads: Heads,
        rows: Rows,
        kv: torch.Tensor,
        index: int,
        on_layer: OnLayer | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [T, C] and what the layer before has yet to add to it [T, C] → the same two for the next one: each
        addition is done with the norm that follows it."""
        config, ops = self._config, self._ops
        normed, hidden = ops.add_norm(hidden, change, layer.input_gain, config.rms_eps)
        qkv = ops.linear(normed, layer.qkv, config.qkv_size, layer.qkv_bias)  # [T, (H + 2 G) D]
        ops.rotate_and_store(qkv, heads, self._rope, rows, kv)
        if on_layer is not None:
            on_layer(index)
        seen = ops.attention(qkv, heads, rows, kv)  # [T, H D]
        change = ops.linear(seen, layer.output, config.hidden_size, layer.output_bias)
        normed, hidden = ops.add_norm(hidden, change, layer.inner_gain, config.rms_eps)
        inner = ops.linear(normed, layer.gate_up, 2 * config.intermediate_size, layer.gate_up_bias)  # [T, 2 F]
        return hidden, ops.linear(ops.silu_mul(inner), layer.down, config.hidden_size, layer.down_bias)
