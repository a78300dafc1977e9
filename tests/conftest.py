"""For all tests: those that start the real processes are marked `e2e`, and get more time; where there is no GPU, Triton
interprets its kernels; and several processes may share the tests (`make test` runs two)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models gain nothing from more, which would wait for each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # where there are more, who waits leaves the core to others
import torch

if not torch.cuda.is_available():  # before anything imports Triton, which looks at this once
    os.environ["TRITON_INTERPRET"] = "1"

E2E = Path(__file__).parent / "e2e"
E2E_TIMEOUT_S = 400


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """An engine sets the number of torch's threads of its process. No later test computes with what one left behind:
    two threads on cores that are busy wait for each other at every operation, which takes ten times as long."""
    yield
    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import settings

        settings.register_profile("patient", deadline=None)  # an example may wait while others compute
        settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if E2E in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(E2E_TIMEOUT_S))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.shares import Shares  # where tests run in one process, nothing of this is needed

    return Shares(config, log)
