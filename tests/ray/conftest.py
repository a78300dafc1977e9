"""One cluster of two Ray nodes for all tests that ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ray.nodes import Loopback, Nodes

RAY_TIMEOUT_S = 600
"""The first test that asks for the nodes waits until they are up."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "started" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(RAY_TIMEOUT_S))


@pytest.fixture(scope="session")
def loopback() -> Iterator[Loopback]:
    try:
        namespace = Loopback()
    except OSError as error:
        pytest.skip(f"no network namespace for Ray to be alone in: {error}")
    yield namespace
    namespace.close()


@pytest.fixture(scope="session")
def started(loopback: Loopback, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with loopback.entered():
        nodes = Nodes(tmp_path_factory.mktemp("ray"))
    yield nodes
    nodes.end()


@pytest.fixture
def nodes(loopback: Loopback, started: Nodes) -> Iterator[Nodes]:
    """Both nodes live, and the test is in their network."""
    with loopback.entered():
        started.whole()
        yield started
