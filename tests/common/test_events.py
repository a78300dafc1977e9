from __future__ import annotations

import asyncio
import sys

import pytest
import uvloop

from baton.common import events


async def running() -> type[asyncio.AbstractEventLoop]:
    return type(asyncio.get_running_loop())


def test_work_runs_on_uvloop_and_without_it_on_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert issubclass(events.run(running()), uvloop.Loop)
    monkeypatch.setitem(sys.modules, "uvloop", None)  # it is not installed
    assert not issubclass(events.run(running()), uvloop.Loop)
