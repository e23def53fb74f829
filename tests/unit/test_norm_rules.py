"""Which patches the rules pick out, where these lie, and what attention they receive, on made-up norms."""

import numpy as np
import pandas as pd
import pytest
import torch

from sinkstudy.analyses import norms
from sinkstudy.book import chapter
from sinkstudy.world import drawing


@pytest.fixture
def seen() -> norms.Seen:
    """Two pictures of 12 x 12 patches in two layers; patches 5 and 40 of the first stand out behind the second."""
    generator = torch.Generator().manual_seed(0)
    of = 1 + 0.1 * torch.rand(2, 2, 144, generator=generator)
    of[0, 1, [5, 40]] = 6
    received = torch.ones(2, 2, 144)
    received[0, :, 5] = 9
    return norms.Seen(of, received, torch.ones(2, 144, dtype=torch.bool), 1)


@pytest.fixture
def masks(seen):
    return norms.by_rule(seen, criterion="above_median", threshold=3.0, tau=5.0)


def test_every_rule_judges_the_connectors_input(seen, masks):
    assert list(masks) == [norms.RUN_RULE, *norms.COMPARED_RULES]
    for rule in (norms.RUN_RULE, "absolute", "mean + 3 sd", "× median", "norm drop"):
        assert masks[rule].nonzero().tolist()[:2] == [[0, 5], [0, 40]], rule
    assert masks["attention"].nonzero().tolist() == [[0, 5]]
    assert masks["top 2 %"].sum(1).tolist() == [3, 3]
    assert seen.relative.quantile(0.5, dim=1).tolist() == pytest.approx([1, 1])
    layers = norms.by_layer(seen)
    assert layers.connector.tolist() == [False, True] and layers["max"].tolist()[1] == 6


def test_counts_and_the_pictures_that_have_some(masks):
    table = norms.counts(masks)
    of = table[table.rule == norms.RUN_RULE]
    assert of.value.tolist() == [2, 0]
    some = norms.with_some(table, ["rule"]).set_index("rule")
    assert some.loc[norms.RUN_RULE, "value"] == 0.5 and some.loc["top 2 %", "value"] == 1
    assert 0 < some.loc[norms.RUN_RULE, "low"] < 0.5 < some.loc[norms.RUN_RULE, "high"] < 1


def test_places_exclude_one_another_but_for_the_border():
    scenes = drawing.render("val", 0, 3)
    places = norms.places(scenes, 1, (12, 12), 3)
    assert (sum(places[kind].int() for kind in ("calm patches", "things", "part textures")) == 1).all()
    assert places["picture border"].sum(1).tolist() == [44] * 3
    assert list(norms.places(scenes, 1, (6, 6), 3)) == ["picture border"]
    tiled = norms.places(None, 2, (3, 4), 1)
    assert tiled["tile border"].int().tolist() == [[1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1] * 2]


def test_sinks_on_places_keep_the_pictures_without_any():
    mask = torch.tensor([[True, True, False], [False, False, False]])
    inside = torch.tensor([[True, False, True], [True, True, True]])
    table = norms.lie_on({"a": mask, "none": ~mask & mask}, {"here": inside})
    assert table[table.rule == "a"].image.tolist() == [0, 0, 1]
    assert table[table.rule == "a"].value.tolist()[:2] == [100, 0] and np.isnan(table.value[2])
    assert table[table.rule == "none"].value.isna().tolist() == [True, True]


def test_marks_against_a_known_answer():
    found = torch.tensor([[True, True, False, False], [False, False, False, False]])
    right = torch.tensor([[True, False, True, False], [True, False, False, False]])
    table = norms.against({"a": found}, right).pivot(index="image", columns="measure", values="value")
    assert table.loc[0].to_dict() == pytest.approx({"precision": 0.5, "recall": 0.5, "jaccard": 1 / 3})
    assert np.isnan(table.loc[1, "precision"]) and table.loc[1, "recall"] == 0


def test_attention_of_sinks_against_that_of_others(seen, masks):
    table = norms.attention(seen, {norms.RUN_RULE: masks[norms.RUN_RULE]})
    first = table[(table.image == 0) & (table.layer == 2)].iloc[0]
    assert (first.inside, first.outside) == (5, 1)  # 9 and 1, of two sinks
    assert table[table.image == 1].inside.isna().all()
    ratio = chapter.ratios(table, ["rule", "layer"])
    assert ratio.value.tolist() == [5, 5] and ratio.n.tolist() == [1, 1]


def test_rank_correlation_is_spearmans():
    up = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
    for values, expected in ((up, 1), (-up, -1)):
        found = norms.rank_correlation(norms.Seen(up[:, None], values[:, None], up > -1, 0))
        pd.testing.assert_frame_equal(found, pd.DataFrame({"image": [0], "value": [float(expected)]}))


def test_outlines_cover_their_patches():
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 2] = True
    assert norms.outlines(mask, (96, 96)) == [(47.5, 47.5, 24, 48)]
    assert norms.pixels(torch.zeros(3, 5, 7, dtype=torch.uint8)).shape == (5, 7, 3)
