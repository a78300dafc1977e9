from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from baton.common import log


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_one_line_a_fact(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("decode-1")
    logging.getLogger("anything").info("took %d blocks", 3, extra={"request_id": "req-7"})
    logging.getLogger("anything").warning("slow")
    logging.getLogger("anything").debug("not shown")
    first, second = capsys.readouterr().err.splitlines()
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} "
    assert re.fullmatch(when + r"decode-1 info \[req-7\] took 3 blocks", first)
    assert re.fullmatch(when + "decode-1 warning slow", second)


def test_a_second_setup_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("one")
    log.setup("two")
    logging.getLogger("x").info("once")
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["two"]
