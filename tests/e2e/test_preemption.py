"""A decode worker without room preempts requests and computes them again; nobody can tell from the tokens."""

from __future__ import annotations

import re

import pytest

from tests.e2e.cluster import OUTPUT, Cluster
from tests.e2e.prompts import ALL, Prompt
from tests.e2e.reference import Judge

LINE = r"decode-0 info \[(\S+)\] preempted at \d+ tokens while (\d+) handovers"

pytestmark = pytest.mark.timeout(300)


async def test_a_fifth_and_more_are_preempted(tight: Cluster, judge: Judge) -> None:
    # Short and long ones in turn, so that long handovers arrive while short requests outgrow the pool.
    prompts: list[Prompt] = [p for two in zip(ALL, reversed(ALL), strict=True) for p in two][: len(ALL)]
    before = len(tight.serve.output)
    answers = await tight.ask_all(prompts)
    assert {len(answer.tokens) for answer in answers} == {OUTPUT}
    judge.check([(judge.encode(p), tuple(a.tokens)) for p, a in zip(prompts, answers, strict=True)])
    found = re.findall(LINE, tight.serve.output[before:])
    preempted, meanwhile = {request for request, _ in found}, sum(int(handovers) > 0 for _, handovers in found)
    print(f"preempted: {len(preempted)} of {len(prompts)}; {meanwhile} times while a handover came")
    assert len(preempted) >= 0.2 * len(prompts)
    assert meanwhile > 0
    assert (await tight.reports())["decode-0"].preemptions >= len(found)
