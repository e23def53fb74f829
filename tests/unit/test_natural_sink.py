"""The rule for a natural sink, which was fixed before looking: norm, attention and low information together."""

import pandas as pd
import pytest

from sinkstudy.analyses import norms

SINK = {"max_over_median": 3.0, "attention_outliers": 5.0, "outliers_on_calm": 0.31, "area_calm": 0.1,
        "outliers_on_things": 0.49}


@pytest.mark.parametrize("changed, lacking", [
    ({}, []),
    ({"max_over_median": 2.99}, ["norm"]),
    ({"attention_outliers": 4.99}, ["attention"]),
    ({"outliers_on_calm": 0.3}, ["low information"]),
    ({"area_calm": 0.11}, ["low information"]),
    ({"outliers_on_things": 0.5}, ["low information"]),
    ({"max_over_median": 1.0, "outliers_on_things": 0.9}, ["norm", "low information"]),
])
def test_every_condition_is_needed(changed, lacking):
    rows = pd.DataFrame([SINK | changed], index=["tower"])
    held = norms.natural_sink(rows).loc["tower"]
    assert [name for name in ("norm", "attention", "low information") if not held[name]] == lacking
    assert held.sink == (not lacking)
