"""Whatever part of a tensor is read, in whatever pieces: it is that part."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from baton.common.errors import InvalidRequest
from baton.engine import checkpoint
from baton.engine.checkpoint import Checkpoint
from baton.engine.shard import Axis

CPU = torch.device("cpu")
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def file_of(folder: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@st.composite
def axes(draw: st.DrawFn) -> list[Axis]:
    found = []
    for _ in range(draw(st.integers(1, 2))):
        size = draw(st.integers(1, 20))
        start = draw(st.integers(0, size - 1))
        found.append(Axis(size, range(start, draw(st.integers(start + 1, size)))))
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(axes(), st.sampled_from(TYPES), st.sampled_from(TYPES), st.integers(1, 200))
def test_any_part_in_any_pieces_of_any_type(
    tmp_path: Path, parts: list[Axis], kept: torch.dtype, wanted: torch.dtype, piece: int
) -> None:
    tensor = torch.randn([axis.size for axis in parts]).to(kept)
    file_of(tmp_path, before=torch.ones(3), it=tensor, zafter=torch.ones(3))
    into = torch.full([len(axis.part) for axis in parts], torch.nan, dtype=wanted)
    with pytest.MonkeyPatch.context() as patch, Checkpoint(tmp_path, CPU) as files:
        patch.setattr(checkpoint, "PIECE", piece)
        files.read("it", parts, into)
    assert torch.equal(into, tensor[tuple(slice(a.part.start, a.part.stop) for a in parts)].to(wanted))


def test_threads_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PIECE", 64)
    tensors = {str(n): torch.full((100, 3), float(n)) for n in range(20)}
    with Checkpoint(file_of(tmp_path, **tensors), CPU) as files, ThreadPoolExecutor(8) as pool:
        found = {name: torch.empty(100, 3) for name in tensors}
        whole = [Axis(100, range(100)), Axis(3, range(3))]
        list(pool.map(lambda name: files.read(name, whole, found[name]), tensors))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_file_that_gives_little_at_a_time_is_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(checkpoint.os, "preadv", lambda fd, views, at: real(fd, [views[0][:7]], at))
    tensor, into = torch.randn(50), torch.empty(50)
    with Checkpoint(file_of(tmp_path, it=tensor), CPU) as files:
        files.read("it", [Axis(50, range(50))], into)
    assert torch.equal(into, tensor)


def test_a_file_that_is_cut_meanwhile_is_an_error(tmp_path: Path) -> None:
    with Checkpoint(file_of(tmp_path, it=torch.randn(50)), CPU) as files:
        os.truncate(tmp_path / "model.safetensors", 120)
        with pytest.raises(InvalidRequest, match="has become shorter"):
            files.read("it", [Axis(50, range(50))], torch.empty(50))


def test_types_that_no_weight_has_are_refused(tmp_path: Path) -> None:
    file_of(tmp_path, it=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(InvalidRequest, match="it is of type I32"):
        Checkpoint(tmp_path, CPU)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"neither model\.safetensors nor"):
        Checkpoint(tmp_path, CPU)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"it": 3}}'])
def test_an_index_that_is_none_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InvalidRequest, match=r"index\.json is no index of shards"):
        Checkpoint(tmp_path, CPU)
