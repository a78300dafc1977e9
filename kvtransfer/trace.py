"""When each layer was computed and when its first byte left: the proof that transfer hides behind compute."""

from __future__ import annotations

from collections import OrderedDict

from ..common.clock import Clock

KEPT = 256
"""Handovers that are remembered."""


class TransferTrace:
    """The last handovers' layers: {handover id: {layer: time}}, for the first chunk of each."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.computed_at: OrderedDict[int, dict[int, float]] = OrderedDict()
        self.left_at: OrderedDict[int, dict[int, float]] = OrderedDict()

    def computed(self, handover_id: int, layers: range) -> None:
        self._record(self.computed_at, handover_id, layers)

    def left(self, handover_id: int, layers: range) -> None:
        self._record(self.left_at, handover_id, layers)

    def _record(self, log: OrderedDict[int, dict[int, float]], handover_id: int, layers: range) -> None:
        now, those = self._clock.now(), log.setdefault(handover_id, {})
        for layer in layers:
            those.setdefault(layer, now)
        if len(log) > KEPT:
            log.popitem(last=False)
