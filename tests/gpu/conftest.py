"""Tests that need an accelerator. Where there is none they are not collected: no run reports them as skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def streams_as_they_were() -> Iterator[None]:
    """An engine leaves its stream to the thread that builds it; the next test begins on the default one."""
    with torch.cuda.stream(torch.cuda.default_stream()):
        yield
        torch.cuda.synchronize()
