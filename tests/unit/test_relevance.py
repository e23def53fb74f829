"""The shape of maps against closed forms: even maps, single patches, Gaussian bumps, half planes; planted heads."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from sinkstudy.analyses.relevance import distances, effective_patches, share_on, specialisation, spread, within

SIDE = 41
PLACES = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
DISTANCE = distances(PLACES)
CENTRE, CORNER = (SIDE * SIDE) // 2, 0


def bump(sd: float) -> torch.Tensor:
    """A Gaussian around the centre, [1, patches]."""
    weights = (-DISTANCE[CENTRE] ** 2 / (2 * sd**2)).exp()
    return (weights / weights.sum())[None]


def test_distances_are_those_of_scipy():
    places = torch.tensor([[0, 0], [3, 4], [7, 1]])
    np.testing.assert_allclose(distances(places), cdist(places, places), atol=1e-6)


def test_an_even_map_is_as_wide_as_the_square():
    """Mean distance in a unit square from its centre (√2 + ln(1 + √2)) / 6, from a corner twice that."""
    from_centre = SIDE * (np.sqrt(2) + np.log(1 + np.sqrt(2))) / 6
    even = torch.full((SIDE * SIDE, SIDE * SIDE), 1 / SIDE**2)
    wide = spread(even, DISTANCE)
    assert wide[CENTRE].item() == pytest.approx(from_centre, rel=0.002)
    assert wide[CORNER].item() == pytest.approx(2 * from_centre, rel=0.03)  # a corner patch lies half a patch inside
    assert wide.argmin() == CENTRE
    torch.testing.assert_close(effective_patches(even), torch.full((SIDE**2,), float(SIDE**2)), rtol=1e-4, atol=0)
    near = within(even, DISTANCE) * SIDE**2
    assert [near[i].item() for i in (CENTRE, CORNER, SIDE // 2)] == pytest.approx([9, 4, 6], rel=1e-4)


@pytest.mark.parametrize(("shift", "far", "near"), [((0, 0), 0.0, 1.0), ((1, -1), 2**0.5, 1.0), ((0, 2), 2.0, 0.0),
                                                    ((3, 4), 5.0, 0.0)])
def test_a_map_on_one_patch(shift, far, near):
    one = torch.zeros(1, SIDE * SIDE)
    one[0, CENTRE + SIDE * shift[0] + shift[1]] = 1
    assert spread(one, DISTANCE[[CENTRE]]).item() == pytest.approx(far, abs=1e-6)
    assert within(one, DISTANCE[[CENTRE]]).item() == near
    assert effective_patches(one).item() == 1


@pytest.mark.parametrize("sd", [2.0, 3.0, 4.0])
def test_a_gaussian_bump(sd):
    """The mean of Rayleigh's distribution, sd √(π/2), and the entropy of a plane Gaussian, 2 π e sd² patches."""
    assert spread(bump(sd), DISTANCE[[CENTRE]]).item() == pytest.approx(sd * np.sqrt(np.pi / 2), rel=0.01)
    assert effective_patches(bump(sd)).item() == pytest.approx(2 * np.pi * np.e * sd**2, rel=0.01)


def test_a_half_plane():
    left = (PLACES[:, 1] < 20).float()
    even = left / left.sum()
    assert share_on(even[None], left).item() == pytest.approx(1)
    assert share_on(even[None], 1 - left).item() == pytest.approx(0)
    assert share_on(even[None], (PLACES[:, 0] < 10).float()).item() == pytest.approx(10 / SIDE)
    assert share_on(even[None], torch.full((SIDE**2,), 0.25)).item() == pytest.approx(0.25)
    assert effective_patches(even[None]).item() == pytest.approx(20 * SIDE, rel=1e-4)


def test_specialisation_of_planted_heads():
    """Two heads a layer at 0.5 ± d differ by d; images count by their patches, and one without any not at all."""
    d = np.array([0.1, 0.3])  # of the two layers
    counts = np.array([1, 4, 0, 2])
    shares = 0.5 + np.stack([d, -d], -1)  # [layers, heads]
    assert specialisation(shares * counts[:, None, None], counts) == pytest.approx(0.2)
    values = np.array([[[[0.0, 1.0]]], [[[1.0, 0.0]]]]).squeeze(1)  # one patch in each of two images, one layer
    assert specialisation(values * np.array([3, 1])[:, None, None], np.array([3, 1])) == pytest.approx(0.25)
    drawn = np.stack([values, values[[0, 0]]])  # leading axes are free
    assert specialisation(drawn, np.ones((2, 2))) == pytest.approx([0.0, 0.5])
