"""Models: found by what they are, converted once, and never seen half done."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from baton.common.errors import BatonError
from baton.deploy import models
from baton.deploy.models import ImportJob


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF rest")
    return file


def convert(job: ImportJob) -> None:
    Path(job.target).mkdir()
    (Path(job.target) / "config.json").write_text(job.dtype)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    source = models.find(str(tmp_path))
    assert source.name == tmp_path.name
    assert models.prepare(source, convert=lambda job: pytest.fail("nothing to convert")) == tmp_path


def test_the_demo_is_the_installed_gguf() -> None:
    source = models.find("demo")
    assert source.name == "demo"
    assert source.gguf is not None
    assert source.gguf.name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_gguf_is_converted_once_and_again_when_it_changed(gguf: Path, home: Path) -> None:
    jobs: list[ImportJob] = []

    def count(job: ImportJob) -> None:
        jobs.append(job)
        convert(job)

    source = models.find(str(gguf))
    folder = models.prepare(source, count)
    assert models.prepare(source, count) == folder
    assert len(jobs) == 1
    assert folder.is_relative_to(home)
    assert (folder / "config.json").read_text() == "float32"
    gguf.write_bytes(b"GGUF other rest")
    assert models.prepare(models.find(str(gguf)), count) != folder
    assert len(jobs) == 2


def test_a_conversion_that_failed_leaves_nothing_that_looks_done(gguf: Path) -> None:
    def fail(job: ImportJob) -> None:
        convert(job)
        raise BatonError("out of luck")

    source = models.find(str(gguf))
    with pytest.raises(BatonError, match="out of luck"):
        models.prepare(source, fail)
    assert not models.cached_folder(gguf).exists()
    assert (models.prepare(source, convert) / "config.json").is_file()


def test_two_at_once_convert_once(gguf: Path) -> None:
    begun, go_on, jobs = threading.Event(), threading.Event(), []

    def slow(job: ImportJob) -> None:
        jobs.append(job)
        begun.set()
        assert go_on.wait(10)
        convert(job)

    source = models.find(str(gguf))
    folders: list[Path] = []
    both = [threading.Thread(target=lambda: folders.append(models.prepare(source, slow))) for _ in range(2)]
    for thread in both:
        thread.start()
    assert begun.wait(10)
    go_on.set()
    for thread in both:
        thread.join(10)
    assert len(jobs) == 1
    assert folders == [models.cached_folder(gguf)] * 2


def test_waiting_for_another_conversion_has_an_end(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LOCK_TIMEOUT_S", 0.0)
    source = models.find(str(gguf))

    def meet(job: ImportJob) -> None:
        with pytest.raises(BatonError, match="another process has held"):
            models.prepare(source, convert)
        convert(job)

    assert models.prepare(source, meet).is_dir()


def test_a_place_that_cannot_be_written_is_one_error(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BatonError, match="cannot write"):
        models.import_model(gguf, tmp_path / "file" / "below", "float32", convert)
