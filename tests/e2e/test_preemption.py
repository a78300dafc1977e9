"""A decode worker without room preempts requests and computes them again; nobody can tell from the tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.cluster import connected, running
from tests.e2e.prompts import ALL, Prompt
from tests.e2e.reference import Judge

pytestmark = pytest.mark.timeout(300)

FLAGS = ("--kv-memory", "36MiB", "--max-batch-tokens", "64")
"""48 blocks of 16 tokens, where 16 short requests want 96 and the longest prompt alone 38."""
CONFIG = "handover: {headroom_tokens: 0}"
"""Reservations hold the prompt alone, so every output grows into what is left."""


async def test_a_fifth_and_more_are_preempted(judge: Judge, tmp_path: Path) -> None:
    with running(tmp_path, *FLAGS, config=CONFIG) as serve:
        async with connected(serve) as cluster:
            # Short and long ones in turn, so that long handovers arrive while short requests outgrow the pool.
            prompts: list[Prompt] = [p for two in zip(ALL, reversed(ALL), strict=True) for p in two][: len(ALL)]
            answers = await cluster.ask_all(prompts)
            judge.check([(judge.encode(p), tuple(a.tokens)) for p, a in zip(prompts, answers, strict=True)])
            assert {len(answer.tokens) for answer in answers} == {64}
            found = re.findall(r"decode-0 info \[(\S+)\] preempted at \d+ tokens while (\d+) handovers", serve.output)
            preempted = {request for request, _ in found}
            assert len(preempted) >= 0.2 * len(prompts)
            assert any(int(handovers) > 0 for _, handovers in found)
            assert sum(r.preemptions for r in (await cluster.reports()).values()) >= len(found)
            await cluster.quiet()
