"""Relevance maps of every architecture, against whole attention matrices and the definitions written out as loops."""

from math import dist, log2

import architectures
import noise
import numpy as np
import pytest
import torch

from sinkstudy.analyses import relevance
from sinkstudy.model import capture
from sinkstudy.model.layout import ImageLayout


def whole_attention(lvlm, picture) -> tuple[list[torch.Tensor], ImageLayout]:
    """Of each layer [heads, tokens, tokens] over all tiles and windows, 0 where nothing is seen; and the layout."""
    inputs = lvlm.inputs([picture], [""])
    with capture.attention_rows(lvlm, "vision", rows="all") as rows, torch.no_grad():
        lvlm.model(**inputs)
    layers = []
    for calls in rows.values():
        chunks = [tile for call in calls for tile in call]  # [heads, n, n] each
        layers.append(torch.stack([torch.block_diag(*(chunk[head] for chunk in chunks)) for head in range(2)]))
    return layers, lvlm.layout(inputs)[0]


def by_hand(weights: np.ndarray, own: int, where: list[tuple], cover: np.ndarray) -> dict[str, float]:
    """What one map says: `weights` of each patch, of those that the map can have; `where` (tile, row, column)."""
    share = weights / weights.sum()
    far = [dist(place[1:], where[own][1:]) for place in where]
    return {
        "spread": sum(s * d for s, d in zip(share, far)),
        "within": sum(s for s, d in zip(share, far) if d < 1.6),
        "effective_patches": 2 ** -sum(s * log2(s) for s in share if s > 0),
        "share_on": sum(s * c for s, c in zip(share, cover)),
    }


def test_shapes_of_all_maps(lvlm):
    pictures = noise.pictures([(64, 32)] * 3, seed=1)
    layers, layout = whole_attention(lvlm, pictures[1])
    n = len(layout.vision)
    rows, columns = layout.grid
    where = [(tile, y, x) for tile in range(layout.tiles) for y in range(rows) for x in range(columns)]
    cover = torch.rand(3, n, generator=torch.Generator().manual_seed(0))
    found = relevance.measure(lvlm, pictures, cover=cover, batch_size=2)
    assert found.norms.shape == (3, n)
    assert found.columns["spread"].shape == (3, lvlm.feature_layer + 1, 2, n)
    random = np.random.default_rng(0)
    for layer in range(lvlm.feature_layer + 1):
        patches = layers[layer][:, layout.vision[:, None], layout.vision[None]].double().numpy()  # [heads, n, n]
        for own, head in zip(random.choice(n, 5, replace=False), random.integers(0, 2, 5)):
            seen = patches[head, own] > 0  # the same tile and window; all of it, as weights of a softmax are positive
            here = int(seen[:own].sum())
            some = [place for place, is_seen in zip(where, seen) if is_seen]
            region = cover[1].numpy()[seen]
            for got, weights in ((found.columns, patches[head, :, own]), (found.rows, patches[head, own])):
                for name, value in by_hand(weights[seen], here, some, region).items():
                    assert got[name][1, layer, head, own].item() == pytest.approx(value, rel=1e-4, abs=1e-5)
            for name, value in by_hand(np.ones(seen.sum()), here, some, region).items():
                assert found.uniform[name][1, layer, 0, own].item() == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_maps_of_chosen_patches(lvlm):
    (picture,) = noise.pictures([(64, 32)], seed=1)
    layers, layout = whole_attention(lvlm, picture)
    chosen = [5, 0, len(layout.vision) - 1]
    for layer in (0, 1):
        maps = relevance.relevance_maps(lvlm, picture, chosen, layer)
        patches = layers[layer][:, layout.vision[:, None], layout.vision[None]]
        torch.testing.assert_close(maps, patches[:, :, chosen].transpose(1, 2), atol=1e-6, rtol=1e-4)


def test_norms_are_those_of_the_trace(tiny, images):
    trace = capture.trace(tiny, images, ["how many"] * 3)
    torch.testing.assert_close(relevance.measure(tiny, images).norms, trace.vision_norms[:, tiny.feature_layer])


@pytest.mark.parametrize("pictures, cover, message", [
    ([], None, "no images"),
    (noise.pictures([(32, 32)]) * 2, torch.zeros(2, 9), r"cover needs \[images, patches\], here \[2, 16\]"),
])
def test_bad_input(tiny, pictures, cover, message):
    with pytest.raises(ValueError, match=message):
        relevance.measure(tiny, pictures, cover=cover)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pictures_of_two_sizes(tmp_path, batch_size):
    lvlm = architectures.load(tmp_path, "qwen2_vl")
    with pytest.raises(ValueError, match="images need one size"):
        relevance.measure(lvlm, noise.pictures([(64, 32), (32, 64)]), batch_size=batch_size)
