"""What every architecture must keep, on a tiny random instance of it: a padded batch of pictures of three sizes."""

import json
from types import SimpleNamespace

import noise
import numpy as np
import pytest
import torch
import transformers
from architectures import MEASURED, write
from passes import decoder_arguments, logits
from PIL import Image
from transformers import CONFIG_MAPPING, LlamaConfig

from sinkstudy.model import loading, measure
from sinkstudy.model.capture import (
    attention_received,
    attention_rows,
    hidden_states,
    norms_at_connector,
    trace,
    trace_tower,
)
from sinkstudy.model.specs import SPECS, tile_grid

close = dict(atol=1e-5, rtol=1e-4)
SIZES = [(48, 32), (32, 64), (64, 64)]  # (width, height), which the Qwen processors leave as they are
QUESTIONS = ["how many", "what is the texture", "what is the texture red blue yes no"]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return noise.pictures(SIZES)


@pytest.fixture(scope="module")
def inputs(lvlm, pictures):
    inputs = lvlm.inputs(pictures, QUESTIONS)
    assert not inputs["attention_mask"][0, 0] and inputs["attention_mask"][:, -1].all()  # padded on the left
    return inputs


@pytest.fixture(scope="module")
def layouts(lvlm, inputs):
    return lvlm.layout(inputs)


@pytest.fixture(scope="module")
def plain(lvlm, inputs):
    """Logits of an untouched model."""
    return logits(lvlm, inputs)


def decoder_input(lvlm, inputs) -> torch.Tensor:
    """What enters the decoder: [batch, tokens, width]."""
    return decoder_arguments(lvlm, inputs)["inputs_embeds"]


def vision_modules(lvlm) -> list[torch.nn.Module]:
    """Layers of the tower, found by the names of their classes and not by the spec."""
    ends = ("EncoderLayer", "VisionBlock", "VisionLayer")
    return [m for m in lvlm.vision.modules() if type(m).__name__.endswith(ends)]


def test_capture_changes_nothing(lvlm, inputs, plain):
    with (
        hidden_states(lvlm, "vision"),
        hidden_states(lvlm, "decoder"),
        attention_rows(lvlm, "vision"),
        attention_rows(lvlm, "decoder"),
        attention_received(lvlm, "vision"),
        attention_received(lvlm, "decoder"),
    ):
        assert torch.equal(logits(lvlm, inputs), plain)
    assert torch.equal(logits(lvlm, inputs), plain)


def test_vision_norms(lvlm, inputs, layouts):
    modules = vision_modules(lvlm)
    assert len(modules) == len(lvlm.vision_layers) == 3
    expected = []
    hooks = [m.register_forward_hook(lambda m, args, out: expected.append(out)) for m in modules]
    with hidden_states(lvlm, "vision") as norms:
        logits(lvlm, inputs)
    for hook in hooks:
        hook.remove()
    for layer in range(3):
        torch.testing.assert_close(norms[layer][0], expected[layer].norm(dim=-1), **close)
    n_patches = sum(len(layout.vision) for layout in layouts)
    n_tiles = sum(layout.tiles for layout in layouts)
    if lvlm.spec.packed:
        assert norms[0][0].shape == (n_patches,)
    else:
        rows, columns = lvlm.grid
        assert norms[0][0].shape == (n_tiles, lvlm.n_prefix + rows * columns)


def qwen_reference(layer, args, kwargs) -> torch.Tensor:
    """Attention of one Qwen tower layer in plain steps: [heads, patches, patches], 0 between its chunks."""
    x, cu_seqlens, (cos, sin) = args[0], kwargs["cu_seqlens"], kwargs["position_embeddings"]
    n, heads = len(x), layer.num_heads
    q, k, _ = layer.qkv(x).view(n, 3, heads, -1).unbind(1)  # [patches, heads, head width]

    def rotated(y):
        first, second = y.chunk(2, dim=-1)
        return y * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    scores = torch.einsum("qhd,khd->hqk", rotated(q), rotated(k)) / q.shape[-1] ** 0.5
    chunk = torch.bucketize(torch.arange(n), cu_seqlens[1:-1], right=True)
    return scores.masked_fill(chunk[:, None] != chunk, float("-inf")).softmax(-1)


def test_vision_attention(lvlm, inputs):
    expected = []
    modules = [layer.get_submodule(lvlm.spec.vision_attention) for layer in vision_modules(lvlm)]
    if lvlm.spec.packed:
        see = lambda m, args, kwargs, out: expected.append(qwen_reference(m, args, kwargs))  # noqa: E731
    else:
        see = lambda m, args, kwargs, out: expected.append(out[1])  # noqa: E731
        lvlm.vision.set_attn_implementation("eager")
    hooks = [m.register_forward_hook(see, with_kwargs=True) for m in modules]
    try:
        logits(lvlm, inputs)
    finally:
        lvlm.vision.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()
    with attention_rows(lvlm, "vision", rows="all") as rows, attention_received(lvlm, "vision") as received:
        logits(lvlm, inputs)
    for layer in range(3):
        if lvlm.spec.packed:  # one result for each chunk: an image or a window
            whole = torch.block_diag(*[torch.ones(r.shape[-2:]) for r in rows[layer]])
            assert torch.equal(whole > 0, expected[layer][0] > 0)
            start = 0
            for weights in rows[layer]:
                part = slice(start, start := start + weights.shape[-1])
                torch.testing.assert_close(weights[0], expected[layer][:, part, part], **close)
                torch.testing.assert_close(received[layer][0][0, :, part], weights[0].mean(1), **close)
        else:
            torch.testing.assert_close(rows[layer][0], expected[layer], **close)
            torch.testing.assert_close(received[layer][0], expected[layer].mean(2), **close)
        assert expected[layer].max() > 2 * expected[layer].mean()  # a wrong order would show


def test_windows(lvlm, inputs):
    """How many chunks a layer of a packed tower has."""
    with attention_rows(lvlm, "vision") as rows:
        logits(lvlm, inputs)
    chunks = [len(rows[layer]) for layer in range(3)]
    if lvlm.spec.order == "windows":  # windows of 4 x 4 patches, layer 1 sees whole images
        assert chunks == [2 + 2 + 4, 3, 2 + 2 + 4]
    else:
        assert chunks == ([3] * 3 if lvlm.spec.packed else [1] * 3)


@pytest.mark.parametrize("padded", [True, False])
def test_decoder_attention(lvlm, pictures, inputs, padded):
    if not padded:  # then SDPA may get no mask at all
        inputs = lvlm.inputs(pictures[2:], QUESTIONS[2:])
    lvlm.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            expected = lvlm.model(**inputs, output_attentions=True).attentions
    finally:
        lvlm.model.set_attn_implementation("sdpa")
    with attention_rows(lvlm, "decoder", rows="all") as rows, attention_received(lvlm, "decoder") as received:
        logits(lvlm, inputs)
    real = inputs["attention_mask"].bool()
    for layer in range(3):
        weights = rows[layer][0]
        torch.testing.assert_close(weights.transpose(1, 2)[real], expected[layer].transpose(1, 2)[real], **close)
        torch.testing.assert_close(weights[:, :, -1].sum(-1), torch.ones(weights.shape[:2]))
        for row in range(len(real)):
            a = expected[layer][row][:, real[row]][..., real[row]]  # [heads, n, n] without padding
            mean = a.sum(1) / (a[0] > 0).sum(0)
            torch.testing.assert_close(received[layer][0][row][:, real[row]], mean, **close)


def test_layout(lvlm, inputs, layouts):
    """Shapes, and each index once."""
    assert [layout.row for layout in layouts] == [0, 1, 2]
    for name in ("vision", "connector"):
        places = torch.cat([getattr(layout, name) for layout in layouts])
        assert len(places.unique()) == len(places)
    for layout in layouts:
        n = layout.tiles * layout.grid[0] * layout.grid[1]
        assert len(layout.vision) == len(layout.connector) == len(layout.output) == len(layout.positions) == n
        assert (inputs["input_ids"][layout.row, layout.visual] == lvlm.image_token_id).all()
        assert (inputs["input_ids"][layout.row] == lvlm.image_token_id).sum() == len(layout.visual)


def test_pixels_to_patches(lvlm, pictures, inputs, layouts):
    """Paint one square of a picture or tile and see which token of the tower's first layer changes."""
    seen, tile_before = [], 0
    with lvlm.vision_layers[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).flatten(0, -2)),
        with_kwargs=True,
    ):
        decoder_input(lvlm, inputs)
        for layout, picture in zip(layouts, pictures):
            rows, columns = layout.grid
            for tile in {0, layout.tiles - 1}:
                for row, column in [(0, 1), (rows - 1, 0), (rows // 2, columns - 1)]:
                    top, left = slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
                    if lvlm.spec.packed:
                        painted = np.array(picture)
                        painted[top, left] = 255 - painted[top, left]
                        others = list(pictures)
                        others[layout.row] = Image.fromarray(painted)
                        changed = lvlm.inputs(others, QUESTIONS)
                    else:
                        pixels = inputs["pixel_values"].clone()
                        by_tile = pixels[layout.row] if pixels.ndim == 5 else pixels[tile_before:]
                        by_tile[tile, :, top, left] *= -1
                        changed = {**inputs, "pixel_values": pixels}
                    decoder_input(lvlm, changed)
                    moved = (seen[-1] - seen[0]).abs().amax(-1).nonzero()[:, 0].tolist()
                    assert moved == [layout.vision[tile * rows * columns + row * columns + column]]
            tile_before += layout.tiles


def test_tower_to_connector(lvlm, inputs, layouts):
    """What the connector reads for a patch is what the feature layer put out for it, but for a final norm."""
    seen = {}

    def keep(features, layer):
        seen[layer] = features
        return features

    with lvlm.editing(before=keep), hidden_states(lvlm, "vision", lambda hidden, layer: hidden.flatten(0, -2)) as out:
        logits(lvlm, inputs)
    assert max(seen) == lvlm.feature_layer and list(seen) == list(lvlm.connectors)
    norm = getattr(lvlm.vision, "post_layernorm", None)  # on the way only where the last layer is read
    for layer in seen:
        read = lvlm.feature_layers if layer == lvlm.feature_layer else [layer]
        hidden = torch.cat([out[one][0] for one in read], -1)  # mostly one
        if lvlm.model.config.model_type in ("paligemma", "gemma3", "idefics3", "smolvlm"):
            hidden = norm(hidden)
        elif lvlm.model.config.model_type == "internvl":
            hidden = lvlm.vision.layernorm(hidden)
        for layout in layouts:
            torch.testing.assert_close(seen[layer][layout.connector], hidden[layout.vision], **close)


def groups(layouts) -> list[list[torch.Tensor]]:
    """Sets of patches, a mask for each image: single ones, and by the bits of their numbers, which tells all apart."""
    random = torch.Generator().manual_seed(0)
    chosen = []
    for image, layout in enumerate(layouts):
        for patch in torch.randperm(len(layout.vision), generator=random)[:2]:
            masks = [torch.zeros(len(other.vision), dtype=torch.bool) for other in layouts]
            masks[image][patch] = True
            chosen.append(masks)
    for bit in range(8):
        has = [torch.arange(len(layout.vision)) + 37 * image >> bit & 1 == 1 for image, layout in enumerate(layouts)]
        chosen += [has, [~mask for mask in has]]
    return chosen


def test_patch_positions(lvlm, inputs, layouts):
    """Change patches at the connector's input: exactly the positions of the layout change in the decoder's input."""
    before = decoder_input(lvlm, inputs)
    shape = sum(len(layout.vision) for layout in layouts), 16 * len(lvlm.feature_layers)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for masks in groups(layouts):
        touched = torch.cat([layout.connector[mask] for layout, mask in zip(layouts, masks)])

        def shift(features, layer):
            if layer != lvlm.feature_layer:
                return features
            features = features.clone()
            features[touched] += noise[touched]
            return features

        with lvlm.editing(before=shift):
            after = decoder_input(lvlm, inputs)
        for layout, mask in zip(layouts, masks):
            moved = (after[layout.row] != before[layout.row]).any(-1).nonzero()[:, 0]
            expected = layout.positions[mask].unique()
            assert moved.tolist() == expected[expected >= 0].tolist()
            lifted = layout.lift(mask, "any")
            assert moved.tolist() == layout.visual[lifted].tolist()


def test_connector_output(lvlm, inputs, layouts):
    """Change one token of the connector's output: the positions of the patches that made it change."""
    before = decoder_input(lvlm, inputs)
    layout = layouts[1]
    for token in layout.output.unique()[[0, 2, -1]]:

        def shift(tokens, layer):
            tokens = tokens.clone()
            tokens[token] += 1.0
            return tokens

        with lvlm.editing(after=shift):
            moved = (decoder_input(lvlm, inputs) != before).any(-1)
        expected = layout.positions[layout.output == token].unique()
        assert moved[layout.row].nonzero()[:, 0].tolist() == expected[expected >= 0].tolist()
        assert not moved[0].any() and not moved[2].any()


def test_injecting_the_same(lvlm, inputs, plain):
    with lvlm.editing(before=lambda x, layer: x.clone(), after=lambda x, layer: x.clone()):
        assert torch.equal(logits(lvlm, inputs), plain)
    with lvlm.editing(before=lambda x, layer: x + torch.randn_like(x)):
        assert not torch.allclose(logits(lvlm, inputs), plain)
    assert torch.equal(logits(lvlm, inputs), plain)


def test_bfloat16(lvlm, pictures):
    """Neither capture nor unchanged features may change how bfloat16 rounds."""
    half = loading.load(lvlm.name, dtype="bfloat16")
    inputs = half.inputs(pictures, QUESTIONS)
    expected = logits(half, inputs)
    with (
        half.editing(before=lambda x, layer: x, after=lambda x, layer: x),
        attention_rows(half, "vision"),
        attention_rows(half, "decoder"),
    ):
        assert torch.equal(logits(half, inputs), expected)


def test_generate(lvlm, inputs):
    answer = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, suppress_tokens=[4, 5])
    expected = lvlm.model.generate(**inputs, **answer)
    with (
        hidden_states(lvlm, "vision") as vision,
        hidden_states(lvlm, "decoder") as decoder,
        attention_rows(lvlm, "decoder") as rows,
    ):
        sequences = lvlm.model.generate(**inputs, **answer)
    assert torch.equal(sequences, expected)
    n = inputs["input_ids"].shape[1]
    for layer in range(3):
        assert len(vision[layer]) == 1  # the tower sees the images once
        assert [norms.shape[1] for norms in decoder[layer]] == [n, 1, 1, 1]
        for weights in rows[layer]:
            torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 1))


def test_trace(lvlm, pictures):
    """One pass for images of one size, whatever the architecture; the numbers are those of the single captures."""
    same = [pictures[2], pictures[2].rotate(90), pictures[2].rotate(180)]
    seen = trace(lvlm, same, QUESTIONS, max_new_tokens=2, batch_size=2)
    inputs = lvlm.inputs(same[2:], QUESTIONS[2:])
    (layout,) = lvlm.layout(inputs)
    with (
        hidden_states(lvlm, "vision") as norms,
        attention_received(lvlm, "vision") as received,
        hidden_states(lvlm, "decoder") as decoder_norms,
        attention_rows(lvlm, "decoder") as rows,
    ):
        logits(lvlm, inputs)
    with attention_rows(lvlm, "decoder") as steps:
        lvlm.model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    n, visual = len(layout.vision), layout.visual
    assert seen.vision_norms.shape == (3, 3, n) and seen.vision_received.shape == (3, 3, 2, n)
    loose = dict(atol=1e-4, rtol=1e-3)  # a batch of one against a part of the three
    entering = decoder_input(lvlm, inputs)[0, visual].norm(dim=-1)
    torch.testing.assert_close(seen.projected_norms[2], entering, **loose)
    for layer in range(3):
        flat = norms[layer][0].flatten()[layout.vision]
        torch.testing.assert_close(seen.vision_norms[2, layer], flat, **loose)
        by_head = received[layer][0].transpose(1, 2).flatten(0, 1)[layout.vision].T
        torch.testing.assert_close(seen.vision_received[2, layer], by_head, **loose)
        torch.testing.assert_close(seen.decoder_norms[2, layer], decoder_norms[layer][0][0, visual], **loose)
        torch.testing.assert_close(seen.last_attention[2, layer], rows[layer][0][0, :, 0, visual], **loose)
        if len(steps[layer]) == 2:
            second = steps[layer][1][0, :, 0]  # [heads, keys]; a sliding window may have lost the first keys
            lost = inputs["input_ids"].shape[1] + 1 - second.shape[-1]
            second = torch.nn.functional.pad(second, (lost, 0))[:, visual]
            mean = (rows[layer][0][0, :, 0, visual] + second) / 2
            torch.testing.assert_close(seen.output_attention[2, layer], mean, **loose)
    assert len(seen.answers) == len(seen.layouts) == 3
    if len({len(layout.vision) for layout in lvlm.layout(lvlm.inputs(pictures, QUESTIONS))}) > 1:
        with pytest.raises(ValueError, match="images of one size"):
            trace(lvlm, pictures, QUESTIONS, batch_size=1)


def test_trace_of_the_tower_alone(lvlm, pictures):
    """As the whole pass shows it; uniform attention is 1 over each image, tile or window."""
    several = [pictures[2]] * 3
    whole = trace(lvlm, several, QUESTIONS)
    decoder = []
    with lvlm.decoder.register_forward_hook(lambda module, args, out: decoder.append(1)):
        norms, received, _ = trace_tower(lvlm, several, batch_size=2)
    assert not decoder
    torch.testing.assert_close(norms, whole.vision_norms, **close)
    assert received.shape == whole.vision_received.shape
    keys = received / whole.vision_received  # that each patch competes with
    if lvlm.spec.packed:  # 64 patches of an image, 16 of a window of Qwen2.5-VL, which layer 1 has not
        expected = torch.tensor([16, 64, 16] if lvlm.spec.order == "windows" else [64] * 3).float()
        torch.testing.assert_close(keys, expected[:, None, None].expand_as(keys), **close)
        torch.testing.assert_close(received.mean(-1), torch.ones(received.shape[:-1]), **close)
    else:  # of a tile, CLS and registers too
        n = lvlm.n_prefix + lvlm.grid[0] * lvlm.grid[1]
        torch.testing.assert_close(keys, torch.full_like(keys, n), **close)
    with pytest.raises(ValueError, match="no images"):
        trace_tower(lvlm, [])
    if lvlm.spec.packed:
        with pytest.raises(ValueError, match="images of one size"):
            trace_tower(lvlm, pictures)


def test_lift(lvlm, layouts):
    for layout in layouts:
        values = torch.rand(len(layout.vision))
        mean, largest = layout.lift(values, "mean"), layout.lift(values, "max")
        for index, position in enumerate(layout.visual):
            own = values[(layout.positions == position).any(-1)]
            if len(own) == 0:  # a newline token
                assert mean[index].isnan() and largest[index].isnan() and lvlm.spec.anyres
            else:
                torch.testing.assert_close(mean[index], own.mean())
                assert largest[index] == own.max()
        with pytest.raises(ValueError, match="'any', 'mean' or 'max'"):
            layout.lift(values, "median")
        with pytest.raises(ValueError, match="patches, got values"):
            layout.lift(values[:-1], "mean")


def test_vision_neurons(lvlm, inputs):
    """The map behind the neurons reads all of them, behind the nonlinearity, of every token of the tower."""
    seen, hidden, layer = [], [], lvlm.vision_layers[1]
    with (
        layer.get_submodule(lvlm.spec.vision_neurons).register_forward_pre_hook(lambda m, args: seen.append(args[0])),
        layer.register_forward_hook(lambda m, args, out: hidden.append(out)),
    ):
        logits(lvlm, inputs)
    assert seen[0].shape == (*hidden[0].shape[:-1], 32)  # twice the width, see `architectures`
    if not hasattr(layer.mlp, "gate_proj"):  # both forms of gelu stay above -0.17; quick gelu, of CLIP, too
        assert seen[0].min() > -0.3 and seen[0].max() > 1


def test_grid(lvlm, layouts):
    if lvlm.spec.packed:
        assert [(layout.grid, layout.tiles) for layout in layouts] == [((4, 6), 1), ((8, 4), 1), ((8, 8), 1)]
        with pytest.raises(ValueError, match="differs from image to image"):
            lvlm.grid
    else:
        assert all(layout.grid == lvlm.grid for layout in layouts)


def test_measured(lvlm, inputs, layouts):
    """What gradients in a narrow copy of the model show is what its `Spec` says and what its layout computes."""
    found = measure.spec(lvlm.model.config, inputs)
    for name in (
        *("model_class", "vision", "vision_layers", "vision_attention", "vision_neurons"),
        *("connector", "decoder", "decoder_layers", "decoder_attention", "packed", "deepstack"),
    ):
        assert getattr(found, name) == getattr(lvlm.spec, name), name
    assert (found.merge, found.prefix, found.mixes) == (lvlm.merge, lvlm.n_prefix, False)
    copy = measure.twin(lvlm.model.config)
    for own, other in zip(layouts, measure.layouts(copy, copy.like(inputs)), strict=True):
        assert (own.row, own.grid, own.tiles) == (other.row, other.grid, other.tiles)
        for name in ("visual", "vision", "connector", "output", "positions"):
            assert torch.equal(getattr(own, name), getattr(other, name)), name


@pytest.mark.parametrize("kind", MEASURED)
def test_without_a_spec(kind, pictures, tmp_path):
    """A model folder of an architecture without a `Spec` is loaded, its parts found, and patches followed."""
    write(tmp_path, kind)
    lvlm = loading.load(str(tmp_path))
    assert lvlm.spec.measured and kind not in SPECS
    inputs = lvlm.inputs(pictures, QUESTIONS)
    before, layouts = logits(lvlm, inputs), lvlm.layout(inputs)
    last = layouts[2]
    with lvlm.editing(before=lambda read, layer: read), norms_at_connector(lvlm, layouts) as read:
        assert torch.equal(logits(lvlm, inputs), before)
    with torch.no_grad():
        states = lvlm.vision(inputs["pixel_values"], output_hidden_states=True).hidden_states
    side_by_side = torch.cat([states[layer][:, 1:] for layer in lvlm.model.config.vision_feature_layer], -1)
    torch.testing.assert_close(torch.stack(read), side_by_side.norm(dim=-1))
    assert (lvlm.n_prefix, lvlm.merge, last.grid) == (1, 1, (4, 4))
    same = [pictures[2], pictures[2].rotate(90)]
    seen = trace(lvlm, same, QUESTIONS[:2], max_new_tokens=2)
    assert seen.vision_norms.shape == (2, 3, len(last.vision)) and seen.vision_norms.isfinite().all()
    assert seen.decoder_norms.shape == (2, 3, len(last.visual)) and len(seen.answers) == 2
    alone = lvlm.inputs(same[:1], QUESTIONS[:1])
    (layout,) = lvlm.layout(alone)
    plain = decoder_input(lvlm, alone)
    patch = len(layout.vision) // 2

    def shift(module, args, output):
        hidden = output.clone()
        hidden.view(-1, hidden.shape[-1])[layout.vision[patch]] += torch.linspace(-1, 1, hidden.shape[-1])
        return hidden

    with lvlm.vision_layers[lvlm.feature_layer].register_forward_hook(shift, prepend=True):
        moved = (decoder_input(lvlm, alone)[0] != plain[0]).any(-1).nonzero()[:, 0]
    assert moved.tolist() == layout.positions[patch].tolist()
    assert torch.equal(logits(lvlm, inputs), before)


def test_layout_needs_the_image(lvlm, inputs):
    without = {**inputs, "input_ids": torch.ones_like(inputs["input_ids"])}
    with pytest.raises(ValueError, match="row 0 has 0 visual tokens"):
        lvlm.layout(without)


SIGLIP = dict(model_type="siglip_vision_model", patch_size=14)
FULL_SIZE = {  # grid of a tile, side of a visual token in patches, and visual tokens of a tile, of public models
    "llava": (dict(), (24, 24), 1, 576),  # LLaVA-1.5
    "llava_next": (dict(), (24, 24), 1, 576),
    "llava_onevision": (dict(), (27, 27), 1, 729),
    "internvl": (dict(), (32, 32), 2, 256),  # InternVL 3
    "aya_vision": (dict(vision_config={**SIGLIP, "image_size": 364}), (26, 26), 2, 169),
    "paligemma": (dict(vision_config={**SIGLIP, "image_size": 448}), (32, 32), 1, 1024),
    "gemma3": (dict(vision_config=dict(image_size=896, patch_size=14)), (64, 64), 4, 256),
    "idefics3": (dict(vision_config=dict(image_size=364, patch_size=14), scale_factor=2), (26, 26), 2, 169),
    "smolvlm": (dict(vision_config=dict(image_size=512, patch_size=16), scale_factor=4), (32, 32), 4, 64),
}


@pytest.mark.parametrize("kind", FULL_SIZE)
def test_full_size(kind):
    changes, grid, merge, tokens = FULL_SIZE[kind]
    config = CONFIG_MAPPING[kind](**changes)
    loading._check_layout(kind, config)
    assert tile_grid(config) == grid
    assert SPECS[kind].merge(config) == merge
    assert grid[0] * grid[1] // merge**2 == tokens


def test_smolvlm_prompt():
    """The processor of Idefics3, which stands in for that of SmolVLM, writes out an image in the same words."""
    image = dict(rows=[[2, 0]], cols=[[3, 0]])
    for index in (0, 1):
        texts = []
        for kind in ("Idefics3Processor", "SmolVLMProcessor"):
            processor = SimpleNamespace(
                fake_image_token="<fake>", image_token="<image>", image_seq_len=2,
                global_image_tag="<global-img>", global_image_token="<global-img>",
            )
            texts.append(getattr(transformers, kind).replace_image_token(processor, image, index))
        assert texts[0] == texts[1]


def test_capped_attention():
    config = CONFIG_MAPPING["paligemma"](text_config=dict(model_type="gemma2"))
    with pytest.raises(ValueError, match="caps its attention logits"):
        loading._check_layout("paligemma2", config)


def test_unknown_tower():
    config = CONFIG_MAPPING["llava"](vision_config=dict(model_type="pixtral"))
    with pytest.raises(ValueError, match="'pixtral' is not known.*book/architectures.md"):
        loading._check_layout("pixtral", config)


def test_text_only_and_unknown_models(tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "text")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text(json.dumps({"model_type": "molmo"}))
    for name, kind in [("text", "llama"), ("new", "molmo")]:
        with pytest.raises(ValueError) as error:
            loading.load(str(tmp_path / name))
        message = str(error.value)
        assert f"'{kind}' is not known" in message and "book/architectures.md" in message
        assert all(known in message for known in SPECS)
        assert len(message.splitlines()) == 1


def test_logit_lens_of_the_last_layer_is_what_the_model_says(lvlm, inputs, plain):
    with hidden_states(lvlm, "decoder", lambda hidden, layer: hidden) as hidden, torch.no_grad():
        lvlm.model(**inputs)
        last = lvlm.unembed(hidden[len(lvlm.decoder_layers) - 1][0])
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(last[seen].argmax(-1), plain[seen].argmax(-1))  # some models scale their logits


def test_pixels_of_patches_are_in_the_order_of_the_layout(lvlm):
    """A picture that brightens from patch to patch, row by row, does so in each of its tiles."""
    y, x = torch.meshgrid(torch.arange(64) // 8, torch.arange(64) // 8, indexing="ij")
    bright = (28 * y + 3 * x).to(torch.uint8).expand(3, -1, -1)
    inputs = lvlm.inputs([bright, bright.flip(1, 2)], QUESTIONS[:2])
    for i, (layout, pixels) in enumerate(zip(lvlm.layout(inputs), lvlm.patch_pixels(inputs), strict=True)):
        assert pixels.shape[0] == len(layout.vision)
        steps = pixels.mean(1).view(layout.tiles, -1).diff(dim=1)
        assert (steps > 0).all() if i == 0 else (steps < 0).all()
