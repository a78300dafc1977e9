"""The block tables of a step's sequences, one after the other. No torch here."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Listing

_WIDTH = 4
"""Bytes of a block's number."""


class Tables:
    """Joins tables, and keeps what it has joined: from one step to the next it hardly changes, while the sequences' own
    arrays lie all over the memory.

    It rests on one promise: an array of blocks is only ever added to. A sequence that gives its blocks up gets another
    array (`BlockTable.drop`). So of the same arrays, what was joined before still holds, and only what has been added
    since has to be put in.
    """

    def __init__(self) -> None:
        self._held: Listing[array[int]] = []
        self._sizes: list[int] = []
        self._joined = b""

    def join(self, held: Listing[array[int]]) -> tuple[list[int], bytes]:
        """How many blocks each of these holds, and all of them as int32."""
        sizes = list(map(len, held))
        if held != self._held:
            self._joined = b"".join(held)
        elif sizes != self._sizes:
            self._joined = b"".join(self._grown(held, sizes))
        self._held, self._sizes = held, sizes
        return sizes, self._joined

    def _grown(self, held: Listing[array[int]], sizes: list[int]) -> list[memoryview | array[int]]:
        """What was joined before, cut where blocks have been added, and these in between."""
        before = memoryview(self._joined)
        pieces: list[memoryview | array[int]] = []
        begin = end = 0
        for blocks, size, had in zip(held, sizes, self._sizes, strict=True):
            end += had * _WIDTH
            if size != had:
                pieces += [before[begin:end], blocks[had:]]
                begin = end
        return [*pieces, before[begin:]]
