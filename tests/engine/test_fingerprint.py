"""The pieces that say what a notebook depends on."""

from pathlib import Path

import pytest

from sinkstudy import paths
from sinkstudy.book import engine


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(engine, "ROOT", tmp_path)
    for name in ("__init__", "a", "b", "c", "lab/__init__", "lab/world", "lab/paint"):
        path = tmp_path / "sinkstudy" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "sinkstudy/a.py").write_text("def f():\n    from .lab import world\n    return world\n")
    (tmp_path / "sinkstudy/lab/world.py").write_text("import os\nfrom . import paint\nfrom ..c import x\n")
    return tmp_path


@pytest.mark.parametrize(
    "code, found",
    [
        ("import torch, sinkstudyx", []),
        ("import sinkstudy.b as b", ["__init__", "b"]),
        ("from sinkstudy import b, something", ["__init__", "b"]),
        ("from sinkstudy.b import function", ["__init__", "b"]),
        ("%matplotlib inline\n!ls\nimport sinkstudy.c", ["__init__", "c"]),
        ("from sinkstudy import a", ["__init__", "a", "c", "lab/__init__", "lab/paint", "lab/world"]),
    ],
)
def test_modules(package: Path, monkeypatch: pytest.MonkeyPatch, code: str, found: list[str]):
    cells = [{"cell_type": "code", "source": code, "metadata": {}}]
    monkeypatch.setattr(engine, "cells", lambda notebook: cells)
    names = [str(path.relative_to(package / "sinkstudy").with_suffix("")) for path in engine.modules("any")]
    assert sorted(names) == sorted(found)


def test_slug():
    assert paths.slug("lab-llava") == "lab-llava"
    assert paths.slug("llava-hf/llava-1.5-7b-hf") == "llava-hf--llava-1.5-7b-hf"
    assert paths.slug("/somewhere/my model") == "my-model"


def test_atomic_file_and_folder(tmp_path: Path):
    with paths.atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "whole"
    with pytest.raises(RuntimeError), paths.atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "whole"
    for text in ("one", "two"):
        with paths.atomic(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "folder"]
