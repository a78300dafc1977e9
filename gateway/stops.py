"""Stop strings in a stream of text."""

from __future__ import annotations


class StopMatcher:
    """Lets text through up to the first stop string, however the text is cut into pieces.

    Of several stop strings the one that is complete first wins, and of those the longest. Text that may turn out to
    be the beginning of a stop string is held back until it is known.
    """

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """What of the text held back and `text` may be shown. `matched` says whether that was the last of it."""
        text = self._held + text
        found = [(text.find(stop), len(stop)) for stop in self._stops]
        ends = [(start + length, start) for start, length in found if start >= 0]
        if ends:
            self.matched = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The text still held back, when no more will come."""
        text, self._held = self._held, ""
        return text

    def _possible_start(self, text: str) -> int:
        """Where the earliest end of `text` begins that a stop string begins with; its length if there is none."""
        first = len(text)
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1), first)
            while at >= 0 and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1, first)
            if at >= 0:
                first = at
        return first
