"""Running clusters for end-to-end tests: `start` makes one with any flags, `demo` is one that tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import Serve

Start = Callable[..., Serve]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start("--decode", "2", env={...})` starts `baton serve` and returns at once. All are ended after the test."""
    begun: list[Serve] = []

    def begin(*flags: str, env: dict[str, str] | None = None) -> Serve:
        begun.append(Serve.start(tmp_path / f"serve-{len(begun)}.log", *flags, env=env))
        return begun[-1]

    yield begin
    for serve in begun:
        serve.stop()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """One prefill and one decode worker of the demo model, ready. Leave it as you found it."""
    serve = Serve.start(tmp_path_factory.mktemp("demo") / "serve.log")
    try:
        yield serve.wait_ready()
    finally:
        serve.stop()
