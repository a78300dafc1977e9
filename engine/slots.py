"""Which row of the table of counts (`kernels/sampling.py`) belongs to which sequence. No torch here."""

from __future__ import annotations

from .sequence import SequenceKey


class Slots:
    """Rows of a table of what sequences have said, for those with penalties; the least recently used gives way.

    Nobody gives a slot back, and none has to: a sequence that ends is not seen again. A slot is known to be right by
    its length: each draw adds one token to it, so one whose sequence comes back at another length (its last draw was
    thrown away, or another worker had it meanwhile) begins anew.
    """

    def __init__(self) -> None:
        self.count = 0
        self._taken: dict[SequenceKey, tuple[int, int]] = {}  # slot, and the length it is right for; oldest use first

    def make_room(self, count: int) -> None:
        """Have at least `count` slots. A step of n sequences needs 2 n of them: then those of the step before, whose
        tokens only the device knows, keep theirs."""
        self.count = max(self.count, count)

    def take(self, key: SequenceKey, length: int) -> tuple[int, bool]:
        """The slot of a sequence that draws its token at position `length`, and whether it is right, or has yet to be
        filled with the tokens before."""
        held = self._taken.pop(key, None)
        if held is not None:
            slot = held[0]
        elif len(self._taken) < self.count:
            slot = len(self._taken)
        else:
            slot, _ = self._taken.pop(next(iter(self._taken)))
        self._taken[key] = slot, length + 1
        return slot, held is not None and held[1] == length
