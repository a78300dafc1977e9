"""Tensor parallelism: a worker of three processes gives the reference's tokens, and is one worker when one of them
dies. The demo model has 9 query heads and 3 KV heads."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import pytest

from tests.e2e.cluster import BRIEF, Answer, connected, running
from tests.e2e.reference import Judge
from tests.e2e.serving import eventually, gone
from tests.e2e.test_reference import EVERY_KIND, check

SMALL = ("--threads", "2", "--max-batch-tokens", "64", "--kv-memory", "128MiB")
FLAGS = ("--colocated", "1", "--tp", "3", "--threads", "1", "--max-batch-tokens", "64", "--kv-memory", "128MiB")


@pytest.mark.timeout(300)
async def test_three_ranks_serve_the_demo_model_also_while_one_of_them_dies(judge: Judge, tmp_path: Path) -> None:
    with running(tmp_path, *FLAGS) as serve:
        async with connected(serve) as cluster:
            check(judge, EVERY_KIND, await cluster.ask_all(EVERY_KIND, max_tokens=BRIEF), BRIEF)
            await cluster.quiet()
            before = serve.children()
            assert {"colocated-0", "colocated-0/1", "colocated-0/2"} <= before.keys()
            answer = Answer()
            async with aclosing(cluster.follow(EVERY_KIND[4], answer, max_tokens=BRIEF)) as events:
                async for _ in events:
                    if len(answer.tokens) == 5:
                        before["colocated-0/2"].kill()
            check(judge, [EVERY_KIND[4]], [answer], BRIEF)
            eventually(lambda: gone(before["colocated-0/1"]), "its neighbour has ended with it")
            assert serve.children()["colocated-0"].pid != before["colocated-0"].pid


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("prefill", "decode"), [(1, 3), (3, 1)])
async def test_ranks_that_do_not_match_hand_over(judge: Judge, tmp_path: Path, prefill: int, decode: int) -> None:
    """One rank's heads go to three, and three ranks' to one."""
    config = f"prefill_engine:\n  tp: {prefill}\ndecode_engine:\n  tp: {decode}\n"
    with running(tmp_path, *SMALL, config=config) as serve:
        async with connected(serve) as cluster:
            check(judge, EVERY_KIND, await cluster.ask_all(EVERY_KIND, max_tokens=BRIEF), BRIEF)
            await cluster.quiet()
            assert await cluster.metric("baton_handovers_total") > len(EVERY_KIND) / 2
