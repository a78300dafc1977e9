"""How a worker keeps its KV cache: what two workers must know of each other before one hands blocks to the other.

    block of one layer on one rank   = [2 (K, V), heads of that rank, row]
    row (K or V of one head)         = block_size × head_dim elements, and where they are quantised, behind them
                                       block_size float32 scales, one for each token

A row is the unit of every transfer: whole, or cut between tokens where block sizes differ. With tensor parallelism a
rank keeps an equal share of the KV heads; where there are fewer heads than ranks, neighbours keep copies of one.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidRequest

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3": 1}
"""KV types, and bytes of one element."""

QUANTISED = frozenset({"int8", "float8_e4m3"})
"""Types whose elements mean nothing without a scale: the value is element × scale of its token and head."""

SCALE_BYTES = 4

MAX_COUNT = 1 << 16
MAX_RANKS = 1024
"""No model comes near. Formats arrive from peers, and what is computed with them must not run away."""


@dataclass(frozen=True, slots=True)
class KvFormat:
    """Raises `InvalidRequest` where ranks and heads do not divide, the type is not known, or a count is out of bounds.

    num_kv_heads   of the model, over all ranks
    dtype          a key of `ITEM_BYTES`
    tp             ranks that share one replica of the model
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    tp: int = 1

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_kv_heads, self.head_dim, self.block_size, self.tp) < 1:
            raise InvalidRequest("a KV format is made of counts of 1 or more")
        if max(self.num_layers, self.num_kv_heads, self.head_dim, self.block_size) > MAX_COUNT or self.tp > MAX_RANKS:
            raise InvalidRequest(f"a KV format has counts of at most {MAX_COUNT}, and {MAX_RANKS} ranks")
        if self.dtype not in ITEM_BYTES:
            raise InvalidRequest(f"KV type {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}", param="kv_dtype")
        if self.num_kv_heads % self.tp and self.tp % self.num_kv_heads:
            raise InvalidRequest(f"{self.num_kv_heads} KV heads do not divide among {self.tp} ranks", param="tp")

    @property
    def quantised(self) -> bool:
        return self.dtype in QUANTISED

    @property
    def heads_per_rank(self) -> int:
        return max(1, self.num_kv_heads // self.tp)

    def heads(self, rank: int) -> range:
        """The model's KV heads that a rank keeps."""
        first = rank * self.num_kv_heads // self.tp
        return range(first, first + self.heads_per_rank)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's elements in a row, without its scale."""
        return self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.block_size * (self.token_bytes + (SCALE_BYTES if self.quantised else 0))

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer on one rank."""
        return 2 * self.heads_per_rank * self.row_bytes

    @property
    def bytes_per_token(self) -> int:
        """Over all layers and heads of the model, each head counted once."""
        return self.num_layers * 2 * self.num_kv_heads * self.row_bytes // self.block_size

    def blocks_in(self, memory: int) -> int:
        """Blocks that fit `memory` bytes on one rank, over all layers. Raises `InvalidRequest` where not one does."""
        size = self.num_layers * self.block_bytes
        if memory < size:
            raise InvalidRequest(f"kv_memory {memory} holds no block of {size} bytes", param="kv_memory")
        return memory // size
