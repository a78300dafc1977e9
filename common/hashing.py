"""Chained block hashes: the name of a KV block's content.

A block's hash covers its tokens and, through its parent's hash, all tokens before it, so equal hash means equal
prefix (vLLM's automatic prefix caching; the chain is Merkle–Damgård). The chain is keyed with a secret of the cluster
and begins with the tenant's name, so that a tenant can neither reuse nor probe what another left in a cache.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

HASH_BYTES = 16

BlockHash = bytes
"""16 bytes."""


def cluster_key(token: str) -> bytes:
    """The key of all hashers of a cluster, from its shared secret: router and workers name blocks alike, others can
    not compute the names."""
    return hashlib.blake2b(token.encode(), digest_size=32, person=b"baton-cluster").digest()


class BlockHasher:
    """Hashes full blocks of `block_size` tokens under `key` (at most 64 bytes)."""

    def __init__(self, block_size: int, key: bytes = b"") -> None:
        self.block_size = block_size
        self._key = key
        self._block = hashlib.blake2b(key=key, digest_size=HASH_BYTES, person=b"baton-block")
        """Copied for each block: so the key is mixed in once."""

    def root(self, tenant: str) -> BlockHash:
        """Where a tenant's chains begin."""
        return hashlib.blake2b(tenant.encode(), key=self._key, digest_size=HASH_BYTES, person=b"baton-tenant").digest()

    def child(self, parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
        """Hash of the block that holds `tokens` and follows `parent`."""
        block = self._block.copy()
        block.update(parent + array("I", tokens).tobytes())
        return block.digest()

    def chain(self, tokens: Sequence[int], tenant: str) -> list[BlockHash]:
        """Hashes of all full blocks of `tokens`; a last partial block has none."""
        hashes: list[BlockHash] = []
        parent = self.root(tenant)
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            parent = self.child(parent, tokens[start : start + self.block_size])
            hashes.append(parent)
        return hashes
