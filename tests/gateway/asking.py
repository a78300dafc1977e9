"""What tests of the whole application ask, and how they read the answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
PLAIN = {"model": "tiny", "prompt": "Hi"}


def events(response: httpx.Response) -> list[Any]:
    """The data of all events; [DONE] as None."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [None if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def chat_text(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks if chunk for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def wait_for(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)
