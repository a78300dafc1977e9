"""Files mapped where huge pages fit."""

from __future__ import annotations

import gc
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from baton.kvtransfer import mapping
from baton.kvtransfer.mapping import HUGE, in_huge_pages, mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files and huge pages are Linux's")


@pytest.fixture
def file() -> Iterator[int]:
    """Of three huge pages and a bit."""
    made = os.memfd_create("test-mapping")
    os.ftruncate(made, 3 * HUGE + 4096)
    yield made
    os.close(made)


def regions() -> dict[int, str]:
    """This process's mappings of the file, by where they begin: what the system says of each."""
    found = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(encoding="utf-8"))
    return {int(text.partition("-")[0], 16): text for text in found if "test-mapping" in text}


def has_huge_pages() -> bool:
    """As the system says, whatever our code makes of it."""
    release = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return release >= (6, 1) and setting.exists() and "[deny]" not in setting.read_text(encoding="utf-8")


def in_huge(text: str) -> int:
    """Bytes that are mapped by huge pages."""
    found = re.search(r"ShmemPmdMapped: +(\d+) kB", text)
    assert found is not None
    return int(found[1]) << 10


def test_two_mappings_see_one_file_from_where_huge_pages_fit(file: int) -> None:
    ours, theirs = mapped(file, 3 * HUGE + 4096, writable=True), mapped(file, HUGE + 1, writable=False)
    assert (ours.size, theirs.size) == (3 * HUGE + 4096, HUGE + 1)
    assert ours.ctypes.data % HUGE == theirs.ctypes.data % HUGE == 0
    ours[[0, HUGE]] = 7, 9
    assert (theirs[0], theirs[HUGE]) == (7, 9)
    assert os.pread(file, 1, HUGE) == b"\x09"
    assert ours.flags.writeable and not theirs.flags.writeable
    assert "r--s" in regions()[theirs.ctypes.data], "not only numpy keeps to reading"


def test_the_mapping_goes_with_its_last_reader(file: int) -> None:
    part = mapped(file, HUGE, writable=False)[5:9]
    gc.collect()
    assert len(regions()) == 1 and not part.any()
    del part
    gc.collect()
    assert not regions()


def test_huge_pages_are_zeroed_and_kept_by_all_who_map_them(file: int) -> None:
    if not has_huge_pages():
        pytest.skip("this system has none")
    ours = mapped(file, 3 * HUGE + 4096, writable=True)
    assert in_huge_pages(ours)
    assert in_huge(regions()[ours.ctypes.data]) == 3 * HUGE
    assert not ours.any()
    theirs = mapped(file, 3 * HUGE, writable=False)
    assert not theirs.any()  # looks at every page
    assert in_huge(regions()[theirs.ctypes.data]) == 3 * HUGE


def test_without_huge_pages_all_is_as_it_was_but_for_a_line_in_the_log(
    file: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mapping, "_MADV_COLLAPSE", 12345)  # no such advice: as on a Linux before 6.1
    ours = mapped(file, 3 * HUGE, writable=True)
    with caplog.at_level("INFO"):
        assert not in_huge_pages(ours)
    assert "stay in small pages: Invalid argument" in caplog.text
    ours[:] = 1
    assert os.pread(file, 1, 3 * HUGE - 1) == b"\x01"


def test_what_is_smaller_than_a_huge_page_needs_none(file: int) -> None:
    assert in_huge_pages(mapped(file, HUGE - 1, writable=True))


def test_a_file_that_cannot_be_mapped_so_is_refused(file: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 4096)
    opened = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(PermissionError):
            mapped(opened, 4096, writable=True)
        with pytest.raises(OSError, match="Bad file descriptor"):
            mapped(-1, 4096, writable=False)
    finally:
        os.close(opened)
    assert isinstance(mapped(file, 1, writable=False), np.ndarray)
