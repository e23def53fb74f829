"""Chapter 10 on public files: pictures are read from them, and what a tower cannot do is left out."""

from pathlib import Path

import pandas as pd
import pytest

from tests.benchmarks.test_data import FILES, write
from tests.model import architectures, chapters


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_public_files(tmp_path: Path, name: str):
    write(tmp_path / "data" / "POPE", FILES["POPE"])
    architectures.write(tmp_path / "tiny", name)
    given = {"controls": [], "data_dir": str(tmp_path / "data"), "doses": [1], "limit": 1, "max_new_tokens": 2}
    tables = chapters.execute("10-training-free", tmp_path, model=tmp_path / "tiny", **given)
    assert "not run: MME, MMStar" in chapters.printed(tmp_path)
    effects = pd.read_csv(tables / "effects.csv")
    done = set(effects[effects.n > 0].method)
    assert {"front", "random-front", "others-only", "keep-top-k", "keys"} <= done
    assert ("test-time-registers" in done) == (name == "llava")
    assert ("this tower takes no added token" in chapters.printed(tmp_path)) == (name != "llava")
    cell = ["method", "way", "benchmark", "measure"]
    value = effects.fillna({"way": ""}).set_index(cell).value
    compared = pd.read_csv(tables / "against_random.csv").fillna({"way": ""})
    assert compared.method.nunique() == (7 if name == "llava" else 6)
    for row in compared.itertuples():
        control = value[f"random-{row.method}", row.way, row.benchmark, row.measure]
        assert row.value == pytest.approx(value[row.method, row.way, row.benchmark, row.measure] - control, abs=1e-3)
