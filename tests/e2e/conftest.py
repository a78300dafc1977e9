"""Running clusters for end-to-end tests: `start` makes one with any flags, `demo` is one that tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from baton.deploy import models
from tests.e2e.cluster import Cluster, connected, running
from tests.e2e.reference import CLOSE, Judge
from tests.e2e.serving import Serve

KEY = "of-the-pair"
JUDGE = pytest.StashKey[Judge]()

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
        assert serve.stop() == 0


@pytest.fixture(scope="session")
def pair_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """One prefill and one decode worker that compute prompts in small chunks, behind an API key of the environment."""
    flags = ("--max-batch-tokens", "64", "--kv-memory", "256MiB")
    with running(tmp_path_factory.mktemp("pair"), *flags, env={"BATON_API_KEY": KEY}) as serve:
        yield serve


@pytest.fixture
async def pair(pair_serve: Serve) -> AsyncIterator[Cluster]:
    """A client of that pair. When the test is over, nothing of it may be left on the workers."""
    async with connected(pair_serve, KEY) as cluster:
        yield cluster
        await cluster.quiet()


@pytest.fixture(scope="session")
def tight_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A pair with 41 blocks of 16 tokens each, where 16 short requests want 96 and the longest prompt alone 38.
    Reservations hold the prompt alone, so every output grows into what is left; a long prompt may wait for its room."""
    flags = ("--kv-memory", "29MiB", "--max-batch-tokens", "64")
    config = "handover: {headroom_tokens: 0}\nrouter: {place_timeout_s: 80}"
    with running(tmp_path_factory.mktemp("tight"), *flags, config=config) as serve:
        yield serve


@pytest.fixture
async def tight(tight_serve: Serve) -> AsyncIterator[Cluster]:
    """A client of that pair, as above."""
    async with connected(tight_serve) as cluster:
        yield cluster
        await cluster.quiet()


@pytest.fixture(scope="session")
def judge(request: pytest.FixtureRequest) -> Judge:
    """The reference, on the weights that `baton serve demo` serves."""
    source = models.find("demo")
    assert source.gguf is not None
    folder = models.cached_folder(source.gguf)
    assert folder.is_dir(), "a cluster comes first: it converts the demo model"
    request.config.stash[JUDGE] = Judge.load(folder)
    return request.config.stash[JUDGE]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how often the reference was asked, and what was forgiven."""
    if judge := config.stash.get(JUDGE, None):
        terminalreporter.write_line(
            f"transformers agrees with {judge.judged} outputs of {judge.tokens} tokens; "
            f"{judge.forgiven} tokens differ where its best logits are closer than {CLOSE:g}"
        )
