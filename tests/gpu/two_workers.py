"""A prefill and a decode worker, each a process with the real engine, and requests through a real router."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from baton.common.cluster import Members, WorkerStatus
from baton.common.config import EngineConfig, HandoverConfig, RouterConfig, WorkerConfig
from baton.common.json_form import to_json
from baton.common.types import Request, Role, SamplingParams
from baton.router.service import Router

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0


class Child:
    """One worker's process."""

    def __init__(self, config: WorkerConfig) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.worker_process"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._ask = to_json(config).decode()

    def ask(self) -> Any:
        """Its answer to the next line."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(self._ask + "\n")
        self._process.stdin.flush()
        self._ask = ""
        answer = self._process.stdout.readline()
        assert answer, "the worker has ended"
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=TIMEOUT_S)


@contextlib.contextmanager
def children(*configs: WorkerConfig) -> Iterator[list[Child]]:
    """All started at once, all ended."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(Child(config))) for config in configs]


def hand_over(
    model: Path, device: str, transport: str, prompts: Sequence[Sequence[int]], count: int, **settings: Any
) -> tuple[list[list[int]], list[str]]:
    """What each prompt is answered, `count` tokens, and the transports that the prefill worker has used. `settings`: of
    both engines."""
    given = {"dtype": "float32", "kv_memory": 64 << 20, "max_batch_tokens": 64, "threads": 1} | settings
    configs = [
        WorkerConfig(
            name=role.value,
            role=role,
            engine=EngineConfig(model=str(model), device=device, **given),
            handover=HandoverConfig(transport=transport),
            cluster_token="secret",
        )
        for role in (Role.PREFILL, Role.DECODE)
    ]
    with children(*configs) as (prefill, decode):
        where = {"prefill": prefill.ask(), "decode": decode.ask()}
        members = Members(1, tuple(WorkerStatus(name, "", "ready", *place) for name, place in where.items()))
        answers = asyncio.run(_answers(members, prompts, count))
        return answers, prefill.ask()


async def _answers(members: Members, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    async def always() -> AsyncIterator[Members]:
        yield members

    router = Router("router", RouterConfig(), "secret")
    await router.start(always())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while router.ready()[0] != "ready":
                await asyncio.sleep(0.02)
            return await asyncio.gather(*(_answer(router, i, prompt, count) for i, prompt in enumerate(prompts)))
    finally:
        await router.close()


async def _answer(router: Router, number: int, prompt: Sequence[int], count: int) -> list[int]:
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    stream, tokens = router.submit(Request(str(number), tuple(prompt), len(prompt), params, deadline_s=TIMEOUT_S)), []
    while True:
        batch = await stream.next()
        tokens += [token.token for token in batch.tokens]
        if batch.finish is not None:
            return tokens
