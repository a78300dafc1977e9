"""What no engine passes: times that follow from bytes, FLOPs and what the device was measured to do with them.

    decode step    weights once, and the KV of each running request once, at the rate of a copy (counting both ways);
                   or its FLOPs at the rate of a large matrix product, where that takes longer
    prefill        FLOPs of the matrices and of attention, at that rate

The roofline model (Williams et al., CACM 2009) of a step. Pure; in bytes, FLOPs and seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...common.kv_format import ITEM_BYTES
from ...engine.model_config import ModelConfig
from ..ceilings import Ceilings


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one model. `matrices`: parameters that each token is multiplied with, without the head. `head`: those that
    each drawn token is, besides. `attention`: FLOPs of one query over one key and its value, over all layers.
    `item`: bytes of a parameter. `kv`: bytes of one token's keys and values."""

    matrices: int
    head: int
    attention: int
    item: int
    kv: int

    @classmethod
    def of(cls, model: ModelConfig, dtype: str, kv_bytes_per_token: int) -> Costs:
        """`dtype`: a key of `ITEM_BYTES`."""
        inner = model.num_heads * model.head_dim
        layer = model.hidden_size * (model.qkv_size + inner + 3 * model.intermediate_size)
        return cls(
            matrices=model.num_layers * layer,
            head=model.hidden_size * model.vocab_size,
            attention=4 * inner * model.num_layers,
            item=ITEM_BYTES[dtype],
            kv=kv_bytes_per_token,
        )

    @property
    def weights(self) -> int:
        """Bytes that a step reads: all but the embedding table, of which it reads a row a token."""
        return (self.matrices + self.head) * self.item

    def prefill_flops(self, prompt: int) -> int:
        """Of a whole prompt. Causal: a token's query sees itself and what is before it."""
        return 2 * (self.matrices * prompt + self.head) + self.attention * prompt * (prompt + 1) // 2

    def decode_flops(self) -> int:
        """Of one token, its attention left out: that is bound by the bytes of its keys and values."""
        return 2 * (self.matrices + self.head)


def decode_step_s(costs: Costs, ceilings: Ceilings, batch: int, context: int) -> float:
    """The memory roofline of one decode step: weights and KV over the rate of a copy."""
    return (costs.weights + batch * context * costs.kv) / ceilings.copy


def prefill_s(costs: Costs, ceilings: Ceilings, prompt: int) -> float:
    """One prompt, at the full rate of a matrix product."""
    return costs.prefill_flops(prompt) / ceilings.product


@dataclass(frozen=True, slots=True)
class Limit:
    """`batch`: requests that decode together, as many as the KV pool holds."""

    tokens_per_s: float
    batch: int


def throughput(costs: Costs, ceilings: Ceilings, prompt: int, output: int, kv_tokens: int) -> Limit:
    """The most output tokens a second with such requests, in a closed loop at any concurrency.

    Requests begin and end one after the other, so on average each has answered half. A step of B decoded tokens comes
    with the prefill of B / output prompts.
    """
    context = prompt + output / 2
    batch = max(1, int(kv_tokens / context))
    read = (costs.weights + batch * context * costs.kv) / ceilings.copy
    decode = max(read, batch * costs.decode_flops() / ceilings.product)
    return Limit(batch / (decode + batch / output * prefill_s(costs, ceilings, prompt)), batch)
