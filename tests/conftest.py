"""For all tests: those that start the real processes are marked `e2e`, and get more time; where there is no GPU, Triton
interprets its kernels; and several processes may share the tests (`make test` runs two)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models gain nothing from more, which would wait for each other
import torch

if not torch.cuda.is_available():  # before anything imports Triton, which looks at this once
    os.environ["TRITON_INTERPRET"] = "1"

HERE = Path(__file__).parent
WHOLE = ("e2e", "ray")
"""Rooms whose files share clusters: one process runs all of each. Of others it runs whole files."""
E2E_TIMEOUT_S = 400


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        room = item.path.relative_to(HERE).parts[0]
        item.add_marker(pytest.mark.xdist_group(room if room in WHOLE else f"{room}/{item.path.name}"))
        if room == "e2e":
            item.add_marker(pytest.mark.e2e)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(E2E_TIMEOUT_S))
