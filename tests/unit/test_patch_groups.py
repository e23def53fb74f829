"""Groups of patches, against loops over patches; a rule in words, and values of tokens on patches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sinkstudy import sinks
from sinkstudy.model import groups
from sinkstudy.model.layout import ImageLayout
from sinkstudy.world import drawing


def test_groups_of_the_lab():
    scenes = drawing.render("test", 0, 3)
    norms = 1 + torch.rand(3, 144, generator=torch.Generator().manual_seed(0))
    norms[:, 5] = 9
    found = groups.of_patches(norms, sinks.rule("above_median", 3.0), scenes)
    assert tuple(found) == groups.NAMES
    for i in range(3):
        of = {name: set(mask[i].nonzero()[:, 0].tolist()) for name, mask in found.items()}
        assert of["sinks"] == {5}
        assert of["top 2 %"] == set(np.flatnonzero(norms[i] > np.percentile(norms[i], 98)))
        places = [(row, column) for row in range(12) for column in range(12)]
        assert of["calm"] == {j for j, at in enumerate(places) if scenes.calm[i][at]}
        assert of["things"] == {j for j, at in enumerate(places) if scenes.thing_share[i][at] > 0.5}
    assert list(groups.of_patches(norms, sinks.rule("absolute", 5.0))) == ["sinks", "top 2 %"]


def test_mean_of_a_group():
    values = torch.tensor([[1.0, 2.0, float("nan")], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    mean = groups.mean(values, mask)
    assert mean[0] == 1.5 and mean[1].isnan()


@pytest.mark.parametrize(("criterion", "threshold", "words"), [
    ("above_median", 3.0, "norm at least 3 times the picture's median"),
    ("absolute", 2.5, "norm at least 2.5"),
    ("percentile", 98.0, "norm above the picture's percentile 98"),
])
def test_a_rule_in_words(criterion, threshold, words):
    assert sinks.in_words(criterion, threshold) == words
    assert all(sinks.in_words(name, 2.0) for name in sinks.NORM_CRITERIA)


def test_values_of_tokens_on_patches():
    """Two patches a token; the last patch is read by none."""
    layout = SimpleNamespace(visual=torch.tensor([3, 4]), positions=torch.tensor([[3], [3], [4], [4], [-1]]))
    assert ImageLayout.lower(layout, torch.tensor([[1.0, 2.0], [5.0, 6.0]])).tolist() == [[1, 1, 2, 2, 0],
                                                                                         [5, 5, 6, 6, 0]]
    assert ImageLayout.lower(layout, torch.tensor([True, False])).tolist() == [True, True, False, False, False]
