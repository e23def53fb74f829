"""Maps that are looked at, of every architecture: the right head, patch and tile, and how much attention they hold."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from sinkstudy.analyses import relevance


def test_examples(lvlm):
    pixels = np.random.default_rng(1).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    picture, layer = Image.fromarray(pixels), lvlm.feature_layer
    layout = lvlm.layout(lvlm.inputs([picture], [""]))[0]
    rows, columns = layout.grid
    tile = rows * columns
    patches = [1, layout.tiles * tile - 1]
    spread = torch.tensor([[0.0, 2.0], [0.0, 1.0]]).repeat(1, layout.tiles * tile)  # the second head spreads least
    found = relevance.examples(lvlm, picture, patches, spread)
    maps = relevance.relevance_maps(lvlm, picture, patches, layer)  # [heads, chosen, patches]
    for i, (patch, of) in enumerate(zip(patches, found, strict=True)):
        assert [example.head for example in of] == [2, 1]
        for example in of:
            whole = maps[example.head - 1, i].unflatten(0, (layout.tiles, tile))[patch // tile]
            torch.testing.assert_close(example.map.flatten(), whole)
            assert example.patch == patch % tile
            assert example.times == pytest.approx((tile + lvlm.n_prefix) * whole.mean().item(), rel=1e-5)

    axes = Figure().subplots(1, 6)
    relevance.draw_examples(axes, pixels, found, ["red", "blue"])
    assert [ax.get_title() != "" for ax in axes] == [False, True, True, True, True, False]
    assert [ax.get_visible() for ax in axes] == [True] * 5 + [False]
    assert axes[3].patches[0].get_xy() == (found[1][0].patch % columns - 0.5, found[1][0].patch // columns - 0.5)
