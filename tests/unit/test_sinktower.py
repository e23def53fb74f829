"""The tower with sinks by construction: who can know what, whatever the weights."""

import pytest
import torch
from transformers import AutoModel

from sinkstudy.model.sinktower import CLIPVisionModelWithSinks, CLIPVisionWithSinksConfig

SIDE, WINDOW = 6, 3  # patches; so there are four windows
SINKS = (4, 20, 33)  # places of flat patches: windows 2, 1 (row 3, column 2 is window 3), 4
SHAPE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=SIDE * 4,
             patch_size=4, window=WINDOW, sink_layer=1, initializer_factor=3.0)


@pytest.fixture(scope="module")
def tower() -> CLIPVisionModelWithSinks:
    torch.manual_seed(0)
    return CLIPVisionModelWithSinks(CLIPVisionWithSinksConfig(**SHAPE)).eval()


def picture(seed: int, flat=SINKS) -> torch.Tensor:
    """One picture, noise but for the flat patches: [1, 3, 24, 24]."""
    pixels = torch.randn(1, 3, SIDE * 4, SIDE * 4, generator=torch.Generator().manual_seed(seed))
    for place in flat:
        at(pixels, place)[:] = 0.5
    return pixels


def at(pixels: torch.Tensor, place: int) -> torch.Tensor:
    y, x = divmod(place, SIDE)
    return pixels[..., 4 * y:4 * y + 4, 4 * x:4 * x + 4]


def window(place: int) -> tuple[int, int]:
    return place // SIDE // WINDOW, place % SIDE // WINDOW


@torch.no_grad()
def hidden(tower, pixels) -> torch.Tensor:
    """After each layer: [layers, patches, width]."""
    return torch.stack(tower(pixels, output_hidden_states=True).hidden_states[1:])[:, 0, 1:]


def test_flat_patches_are_the_sinks(tower):
    assert tower.sinks(picture(1))[0].nonzero()[:, 0].tolist() == sorted(SINKS)
    nearly = picture(1)
    at(nearly, SINKS[0])[:, 1, 2, 2] += 0.01
    assert tower.sinks(nearly)[0].nonzero()[:, 0].tolist() == sorted(SINKS[1:])


@pytest.mark.parametrize("changed", [0, 5, 17, 35])
def test_an_ordinary_patch_knows_its_window_and_a_sink_the_picture(tower, changed):
    before, other = picture(1), picture(1)
    at(other, changed)[:] = at(picture(2), changed)
    moved = (hidden(tower, before) - hidden(tower, other)).abs().amax(-1)  # [layers, patches]
    for place in range(SIDE**2):
        own = window(place) == window(changed)
        if place in SINKS:
            assert (moved[1:, place] > 1e-4).all(), place
        elif own:
            assert (moved[:, place] > 1e-4).all(), place
        else:
            assert (moved[:, place] == 0).all(), place


def test_what_a_sink_holds_reaches_nobody(tower):
    """Sinks whose states are anything at all, from the first layer with sinks on: all other tokens stay, to the bit."""
    def other(module, args):
        x = args[0].clone()
        x[:, [1 + place for place in SINKS]] = torch.randn(len(SINKS), 16, generator=torch.Generator().manual_seed(5))
        return (x, *args[1:])

    before = hidden(tower, picture(1))
    with tower.encoder.layers[1].register_forward_pre_hook(other):
        after = hidden(tower, picture(1))
    ordinary = [place for place in range(SIDE**2) if place not in SINKS]
    assert torch.equal(before[:, ordinary], after[:, ordinary])
    assert (before[1:, list(SINKS)] != after[1:, list(SINKS)]).any(-1).all()


def test_attention_is_drawn_by_sinks_and_stays_in_the_window(tower):
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tower(picture(1), output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    with torch.no_grad():
        fast = tower(picture(1)).last_hidden_state
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(tower(picture(1)).last_hidden_state, fast, atol=1e-5, rtol=1e-5)
    for layer, of in enumerate(weights):
        patches = of[0, :, 1:, 1:].amin(0)  # [who, whom]
        for who in range(SIDE**2):
            for whom in range(SIDE**2):
                with_sinks = layer >= SHAPE["sink_layer"] and (who in SINKS or whom in SINKS)
                assert (patches[who, whom] > 0) == (window(who) == window(whom) or with_sinks)
        seen_by_cls = of[0, :, 0].amin(0) > 0
        sees_cls = (of[0, :, 1:, 0].amax(0) > 0).nonzero()[:, 0].tolist()
        assert seen_by_cls.all() and sees_cls == (sorted(SINKS) if layer >= SHAPE["sink_layer"] else [])


def test_it_is_saved_and_loaded_as_any_tower(tower, tmp_path):
    tower.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is CLIPVisionModelWithSinks
    assert torch.equal(hidden(loaded, picture(3)), hidden(AutoModel.from_pretrained(tmp_path).eval(), picture(3)))
    torch.testing.assert_close(hidden(loaded, picture(3)), hidden(tower, picture(3)), atol=1e-5, rtol=1e-5)


def test_windows_divide_the_picture():
    with pytest.raises(ValueError, match="6 patches on a side are no multiple of the window's 4"):
        CLIPVisionModelWithSinks(CLIPVisionWithSinksConfig(**SHAPE | {"window": 4}))


@torch.no_grad()
def test_an_added_token_sees_the_picture_and_tells_nothing_of_it(tower):
    def add(module, args, kwargs):
        return (torch.cat([args[0], torch.zeros_like(args[0][:, :1])], 1), *args[1:]), kwargs

    with tower.encoder.layers[0].register_forward_pre_hook(add, with_kwargs=True):
        before, other = picture(1), picture(1)
        at(other, 17)[:] = at(picture(2), 17)  # an ordinary patch
        moved = (hidden(tower, before) - hidden(tower, other)).abs().amax(-1)  # [layers, patches + 1]
    assert moved.shape[1] == SIDE**2 + 1
    assert (moved[1:, -1] > 1e-4).all(), "it sees every patch"
    elsewhere = [place for place in range(SIDE**2) if place not in SINKS and window(place) != window(17)]
    assert moved[:, elsewhere].max() == 0, "no patch is told by it"
