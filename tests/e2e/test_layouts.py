"""Two workers that keep their KV differently still hand over: other block sizes, another type, sockets in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.cluster import BRIEF, connected, running
from tests.e2e.prompts import user
from tests.e2e.reference import Judge
from tests.e2e.test_reference import EVERY_KIND, check

FLAGS = ("--max-batch-tokens", "64", "--kv-memory", "128MiB")


@pytest.mark.timeout(300)
async def test_block_sizes_need_not_match(judge: Judge, tmp_path: Path) -> None:
    """Neither is a multiple of the other; `tests/worker/test_block_sizes.py` has the other cases."""
    config = "prefill_engine: {block_size: 32}\ndecode_engine: {block_size: 48}"
    with running(tmp_path, *FLAGS, config=config) as serve:
        async with connected(serve) as cluster:
            check(judge, EVERY_KIND, await cluster.ask_all(EVERY_KIND, max_tokens=BRIEF), BRIEF)
            assert await cluster.metric("baton_handovers_total") > len(EVERY_KIND) / 2
            await cluster.quiet()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3"])
async def test_the_sender_quantises(tmp_path: Path, kind: str) -> None:
    """What eight bits keep of it is enough for a fact; and less than half of the bytes travel."""
    with running(tmp_path, *FLAGS, config=f"decode_engine: {{kv_dtype: {kind}}}") as serve:
        async with connected(serve) as cluster:
            answer = await cluster.ask(user("What is the capital of France?"))
            assert "Paris" in answer.text
            await cluster.quiet()
            count = await cluster.metric("baton_handovers_total")
            tokens = await cluster.metric("baton_worker_prompt_tokens_total")
            sent = await cluster.metric("baton_handover_bytes_total")
            assert count == 1 and 0 < sent < (tokens + 16) * 46080 / 3
