from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from baton.bench.engine import loading
from baton.engine.model_config import ModelConfig
from baton.engine.shard import shard
from baton.engine.weights import load_weights
from baton.kernels.reference import TorchOps
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "qwen3")


def test_what_is_made_is_a_checkpoint_in_so_many_files(model: Path, tmp_path: Path) -> None:
    size = loading.make(model, tmp_path, 3)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    assert 0 < sum(file.stat().st_size for file in files) - size < 0.2 * size  # their headers
    config = ModelConfig.load(tmp_path)
    weights = load_weights(tmp_path, shard(config), TorchOps(), torch.bfloat16, torch.device("cpu"), lambda _: None)
    assert len(weights.layers) == config.num_layers
    assert len(set(weights.head.view(torch.int16).flatten().tolist())) > 1000  # no file of zeros


def test_both_are_measured_and_written_down(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", model, "--folder", tmp_path, "--shards", 2, "--rounds", 2, "--out", tmp_path / "out"]
    assert loading.main([str(argument) for argument in arguments]) == 0
    assert capsys.readouterr().out.count("times as long") == 2
    found = json.loads((tmp_path / "out" / "loading.json").read_text())
    assert all(min(one.values()) > 0 for one in found["results"])
    assert found["parameters"]["bytes"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_model_of_an_unknown_kind_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Other"]}))
    assert loading.main(["--model", str(tmp_path)]) == 1
    assert "baton bench loading: " in capsys.readouterr().err


@pytest.mark.parametrize("keep", [True, False])
def test_all_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    (tmp_path / "a").write_bytes(bytes(10_000))
    (tmp_path / "b").write_bytes(bytes(100))
    monkeypatch.setattr(loading, "PIECE", 1024)
    seen: list[int] = []
    real = loading.os.preadv
    monkeypatch.setattr(loading.os, "preadv", lambda *arguments: seen.append(real(*arguments)) or seen[-1])
    loading.read([tmp_path / "a", tmp_path / "b"], 3, keep)
    assert sum(seen) == 10_100
