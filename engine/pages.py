"""Memory here from which a device fetches by itself."""

from __future__ import annotations

import torch


class Pages:
    """Two pages of `size` bytes, used by turns: two steps are under way at most, so when a page's turn comes again,
    the step that fetched from it has ended."""

    def __init__(self, size: int, pinned: bool) -> None:
        """`pinned`: there is a device, and not the processor itself."""
        self._page, self._other = (torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2))
        self._bytes, self._others = self._page.numpy().data, self._other.numpy().data

    def write(self, data: memoryview) -> torch.Tensor:
        """The page whose turn it is, with these bytes. It is a plain copy of memory, and no operation on arrays."""
        self._page, self._other, self._bytes, self._others = self._other, self._page, self._others, self._bytes
        self._bytes[:] = data
        return self._page
