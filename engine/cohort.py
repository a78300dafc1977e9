"""Sequences that decode together, and in columns what is asked of them at every token.

A step of 256 requests that asked each of them for its ticket, its limit and its stop tokens would touch a thousand
objects, which after its wait for the device come from memory one by one. None of that changes while a request lives.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass
from operator import ge

from ..common.types import FinishReason
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Readers:
    """Those of a cohort whose tokens one router is told: their tickets, and for each of the cohort whether it is one of
    them."""

    tickets: list[int]
    rows: list[bool]


@dataclass(frozen=True, slots=True)
class Cohort:
    """Made once for all the steps of the same sequences.

    tokens   of each sequence, its own list
    last     the last position at which each may have a token
    ends     tokens that end one of them, whichever that is
    routers  by name, in the order of the first sequence of each
    """

    sequences: Listing[Sequence]
    tokens: list[list[int]]
    last: list[int]
    ends: frozenset[int]
    routers: dict[str, Readers]

    @classmethod
    def of(cls, sequences: Listing[Sequence]) -> Cohort:
        keys = [sequence.key for sequence in sequences]
        routers = {}
        for name in dict.fromkeys([router for router, _ in keys]):  # in their order: a simulation is to be repeatable
            rows = [router == name for router, _ in keys]
            routers[name] = Readers([ticket for router, ticket in keys if router == name], rows)
        return cls(
            sequences=sequences,
            tokens=[sequence.tokens for sequence in sequences],
            last=[sequence.limit - 1 for sequence in sequences],
            ends=frozenset().union(*{sequence.ends for sequence in sequences}),
            routers=routers,
        )

    def accept(self, tokens: list[int]) -> tuple[list[int], list[tuple[Sequence, FinishReason]]]:
        """Append to each sequence its token. Returns the tokens' positions, and who ends with his."""
        positions = list(map(len, self.tokens))
        for known, token in zip(self.tokens, tokens, strict=True):
            known.append(token)
        if self.ends.isdisjoint(tokens) and not any(map(ge, positions, self.last)):
            return positions, []
        ended = [(sequence, sequence.ended) for sequence in self.sequences]
        return positions, [(sequence, reason) for sequence, reason in ended if reason is not None]
