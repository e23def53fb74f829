"""Training-free methods on a tiny random instance of every architecture: identities, invariants, independent ways."""

import copy
from dataclasses import replace

import architectures
import noise
import numpy as np
import pandas as pd
import pytest
import torch
from passes import decoder_arguments, logits, real

from sinkstudy.answers.evaluate import evaluate
from sinkstudy.effects import ablation, moving
from sinkstudy.model.capture import attention_rows
from sinkstudy.model.lvlm import LVLM
from sinkstudy.model.specs import SPECS

close = dict(atol=2e-5, rtol=1e-4)
SIZES = [(48, 32), (32, 64), (64, 64)]  # (width, height)
QUESTIONS = ["how many", "what is the texture", "what is the texture red blue yes no"]


def TWO(norms: torch.Tensor) -> torch.Tensor:  # noqa: N802
    """The two patches of highest norm."""
    return norms >= norms.topk(2).values[-1]


def two(norms, layout) -> torch.Tensor:
    """Those of a picture that are no padding; norms as the connector reads them, [patches of the batch]."""
    of = norms[layout.connector].masked_fill((layout.positions < 0).all(1), -1)
    return torch.zeros_like(of).scatter(0, of.topk(2).indices, 1).bool()


@pytest.fixture(scope="module")
def inputs(lvlm):
    return lvlm.inputs(noise.pictures(SIZES), QUESTIONS)


@pytest.fixture(scope="module")
def plain(lvlm, inputs):
    return logits(lvlm, inputs)


def keeper(lvlm):
    """A list that will hold the norms of the patches of the batch, and the `before` that puts them there."""
    norms = []

    def keep(patches, layer):
        if layer == lvlm.feature_layer:
            norms.append(patches.norm(dim=-1))
        return patches

    return norms, keep


@pytest.mark.parametrize("ids", ["travel", "renumber"])
def test_moving_nothing_or_all_changes_nothing(lvlm, inputs, plain, ids):
    for select in (lambda norms: norms < 0, lambda norms: norms >= 0):
        with moving.reordered(lvlm, inputs, select, ids=ids):
            if lvlm.spec.anyres and select(torch.ones(1)).all():
                continue  # newline tokens are never moved, so they would come last
            assert torch.equal(logits(lvlm, inputs), plain)


@pytest.mark.parametrize("to", ["front", "end"])
def test_order_and_ids(lvlm, inputs, to):
    """Each image's tokens: the two of highest norm first (or last), the rest in order; ids with them or not."""
    layouts = lvlm.layout(inputs)
    norms, keep = keeper(lvlm)
    with lvlm.editing(before=keep):
        before = decoder_arguments(lvlm, inputs)
    for ids in ("travel", "renumber"):
        with moving.reordered(lvlm, inputs, TWO, to, ids):
            after = decoder_arguments(lvlm, inputs)
        for layout in layouts:
            strongest = set(two(norms[0], layout).nonzero()[:, 0].tolist())
            tokens = {p for patch in strongest for p in layout.positions[patch].tolist() if p >= 0}
            visual = layout.visual.tolist()
            moved, rest = [p for p in visual if p in tokens], [p for p in visual if p not in tokens]
            come_from = moved + rest if to == "front" else rest + moved
            was, now = before["inputs_embeds"][layout.row], after["inputs_embeds"][layout.row]
            assert torch.equal(now[visual], was[come_from])
            others = [p for p in range(len(was)) if p not in visual]
            assert torch.equal(now[others], was[others])
            position_ids = before.get("position_ids")
            if position_ids is None:
                position_ids = torch.arange(len(was)).expand(len(layouts), -1)
            row = position_ids[..., layout.row if position_ids.shape[-2] > 1 else 0, :]
            if ids == "travel":
                moved_ids = after["position_ids"][..., layout.row, :]
                if len(row) == 4 and row.ndim == 2:  # Qwen: the first row only serves to make the mask
                    assert torch.equal(moved_ids[0], row[0])
                    moved_ids, row = moved_ids[1:], row[1:]
                assert torch.equal(moved_ids[..., visual], row[..., come_from])
                assert torch.equal(moved_ids[..., others], row[..., others])
            elif after.get("position_ids") is not None:
                assert torch.equal(after["position_ids"], before["position_ids"])


def test_renumbered_is_a_permutation_of_what_the_connector_puts_out(lvlm, inputs):
    """The other way to do it, where the connector's output goes to the placeholders one by one."""
    if lvlm.spec.anyres or lvlm.spec.deepstack:
        pytest.skip("newline tokens, or further connectors")
    layouts = lvlm.layout(inputs)
    norms, keep = keeper(lvlm)

    def permuted(tokens, layer):
        order = torch.arange(len(tokens))
        start = 0
        for layout in layouts:
            mask = layout.lift(two(norms[-1], layout), "any")
            in_order = start + torch.cat([mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]])
            # Qwen2.5-VL's connector reads windows; behind it tokens are put back in order
            at = window[start:start + len(mask)] if window is not None else torch.arange(start, start + len(mask))
            order[at] = window[in_order] if window is not None else in_order
            start += len(mask)
        return tokens[order]

    window = lvlm._window_order(inputs)
    with lvlm.editing(before=keep, after=permuted):
        other = logits(lvlm, inputs)
    with moving.reordered(lvlm, inputs, TWO, "front", "renumber"):
        torch.testing.assert_close(logits(lvlm, inputs)[real(inputs)], other[real(inputs)], **close)


def test_where_image_tokens_see_each_other_travelling_changes_nothing(lvlm, inputs, plain):
    """Order is then a matter of the ids alone."""
    with moving.reordered(lvlm, inputs, TWO, "front", "travel"):
        moved = logits(lvlm, inputs)
    text = real(inputs) & (inputs["input_ids"] != lvlm.image_token_id)
    same = torch.allclose(moved[text], plain[text], **close)
    assert same == lvlm.spec.prefix_mask or lvlm.model.config.model_type == "gemma3"


@pytest.mark.parametrize("method", [
    lambda lvlm, inputs: moving.reordered(lvlm, inputs, TWO),
    lambda lvlm, inputs: moving.reordered(lvlm, inputs, TWO, "end", "renumber"),
    lambda lvlm, inputs: moving.gated(lvlm, inputs, TWO, 2.0, 0.5),
], ids=["front", "end", "gated"])
@torch.no_grad()
def test_generate_is_the_same_with_and_without_cache(lvlm, inputs, method):
    """Later passes are left alone where there is a cache, and changed like the first where there is none."""
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True,
                    return_dict_in_generate=True, suppress_tokens=[lvlm.image_token_id])
    with method(lvlm, inputs):
        ways = [lvlm.model.generate(**inputs, **settings, use_cache=cache) for cache in (True, False)]
    assert torch.equal(ways[0].sequences, ways[1].sequences)
    for cached, anew in zip(ways[0].logits, ways[1].logits, strict=True):
        torch.testing.assert_close(cached, anew, **close)


def test_gate_of_one_is_the_identity_to_the_bit(lvlm, inputs, plain):
    with moving.gated(lvlm, inputs, TWO, 1.0):
        assert torch.equal(logits(lvlm, inputs), plain)


def test_gate_against_eager_attention(lvlm, inputs):
    """Scores of eager attention on the chosen keys are scaled, and no others, in the chosen layer only."""
    layouts, (norms, keep) = lvlm.layout(inputs), keeper(lvlm)

    def scores():
        """log of attention before softmax's normalisation of the last query: differences of two keys' logs."""
        with attention_rows(lvlm, "decoder") as rows:
            logits(lvlm, inputs)
        return [calls[0][:, :, 0].log() for calls in rows.values()]

    with lvlm.editing(before=keep):
        before = scores()
    with moving.gated(lvlm, inputs, TWO, 0.5, layers=[1]):
        after = scores()
    for layout in layouts:
        mask = layout.lift(two(norms[0], layout), "any")
        row, visual = layout.row, layout.visual
        other = visual[~mask][-1]
        was, now = ((s[1][row][:, visual] - s[1][row][:, other, None]) for s in (before, after))  # [heads, visual]
        seen = was.isfinite()
        assert torch.equal(seen, now.isfinite()) and seen[:, ~mask].any()
        torch.testing.assert_close(now[seen & ~mask], was[seen & ~mask], **close)
        assert not seen[:, mask].any() or not torch.allclose(now[seen & mask], was[seen & mask], atol=1e-3)


def test_a_layer_that_is_named_twice_is_gated_once(lvlm, inputs):
    said = []
    for layers in ([1], [1, 1 - len(lvlm.decoder_layers), 1]):
        with moving.gated(lvlm, inputs, TWO, 0.5, layers=layers):
            said.append(logits(lvlm, inputs))
    assert torch.equal(*said)
    with pytest.raises(IndexError), moving.gated(lvlm, inputs, TWO, 0.5, layers=[len(lvlm.decoder_layers)]):
        pass


def test_decoders_in_which_tokens_cannot_be_hidden_or_weighed(lvlm, inputs):
    """Layers without attention, and attention whose keys and values have one source, are refused by their names."""
    linear = replace(lvlm, spec=replace(lvlm.spec, decoder_attention="linear_attn"))
    masks = [torch.arange(len(layout.vision)) == 0 for layout in lvlm.layout(inputs)]
    for method, *how in ((moving.gated, TWO, 0.5), (ablation.hidden, masks)):
        with pytest.raises(ValueError, match=r"layer 0 of its decoder has no attention \(linear_attn\)"):
            with method(linear, inputs, *how):
                pass
    latent = replace(lvlm, spec=replace(lvlm.spec, decoder_attention="mlp"))
    with pytest.raises(ValueError, match="has no map that makes keys alone"), moving.gated(latent, inputs, TWO, 0.5):
        pass


def test_weights_of_one_change_nothing_and_others_scale_the_tokens(lvlm, inputs, plain):
    with moving.reweighted(lvlm, inputs, TWO):
        assert torch.equal(logits(lvlm, inputs), plain)
    if lvlm.spec.anyres:
        return  # tokens are mixed and padding is cut off behind the connector
    before = decoder_arguments(lvlm, inputs)["inputs_embeds"]
    with moving.reweighted(lvlm, inputs, TWO, 0.25, 3.0):
        after = decoder_arguments(lvlm, inputs)["inputs_embeds"]
    ratios = (after / before)[inputs["input_ids"] == lvlm.image_token_id]
    one = [0.25, 3.0]
    assert all(min(abs(r - w) for w in one) < 1e-3 for r in ratios.median(-1).values.tolist())
    counts = [int((torch.isclose(r, torch.tensor(0.25), atol=1e-3)).sum()) for r in
              (after / before).median(-1).values]
    layouts = lvlm.layout(inputs)
    assert all(1 <= count <= 2 for count in counts) and len(counts) == len(layouts)


def test_nothing_is_left_behind(lvlm, inputs, plain):
    with pytest.raises(KeyError), moving.reordered(lvlm, inputs, TWO):
        raise KeyError
    assert not lvlm.decoder._forward_pre_hooks and not lvlm.connector._forward_pre_hooks
    assert torch.equal(logits(lvlm, inputs), plain)


def test_masks_given_for_each_image_are_as_good_as_a_rule(lvlm, inputs):
    norms, keep = keeper(lvlm)
    with lvlm.editing(before=keep):
        logits(lvlm, inputs)
    masks = [two(norms[0], layout) for layout in lvlm.layout(inputs)]
    ways = (moving.reordered, lambda *args: moving.gated(*args, 0.5), lambda *args: moving.reweighted(*args, 2))
    for method in ways:
        with method(lvlm, inputs, TWO):
            judged = logits(lvlm, inputs)
        with method(lvlm, inputs, masks):
            assert torch.equal(logits(lvlm, inputs), judged)
    with pytest.raises(ValueError, match="patches"), moving.reordered(lvlm, inputs, [masks[0][:-1], *masks[1:]]):
        pass


# ------------------------------------------------------------------------------------------------- VAR
def test_moved_mass_by_hand():
    """Keys: a sink in the text, two visual tokens, a visual sink, a word. 40 % of what sinks have goes to the two."""
    sink = torch.tensor([True, False, False, True, False])
    visual = torch.tensor([False, True, True, True, False])
    weights = torch.tensor([[0.4, 0.1, 0.2, 0.2, 0.1], [0.0, 0.1, 0.1, 0.7, 0.1], [0.9, 0.04, 0.02, 0.02, 0.02]])
    moved = moving.moved_mass(weights, sink, visual, p=0.6, rho=0.5, least=0.2)
    expected = torch.tensor([0.24, 0.1 + 0.24 / 3, 0.2 + 0.48 / 3, 0.12, 0.1])
    torch.testing.assert_close(moved[0], expected)
    assert torch.equal(moved[1:], weights[1:])  # too much on sinks; too little on the image
    random = torch.rand(50, 4, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    torch.testing.assert_close(moving.moved_mass(random, sink, visual, 0.3, 1.0, 0.0).sum(-1), torch.ones(50, 4))
    assert torch.equal(moving.moved_mass(random, sink, visual, 1.0, 1.0, 0.0), random)


def deep(lvlm) -> LVLM:
    """VAR leaves the first two layers and the last alone; the tiny decoders have three."""
    layers = lvlm.model.get_submodule(lvlm.spec.decoder_layers)
    if len(layers) == 3:
        layers.append(copy.deepcopy(layers[2]))
        for module in layers[3].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = 3
        text = lvlm.model.config.get_text_config()
        text.num_hidden_layers = 4
        if getattr(text, "layer_types", None):
            text.layer_types = [*text.layer_types, text.layer_types[-1]]
    return lvlm


@pytest.fixture(scope="module")
def deeper(request, tmp_path_factory):
    return deep(architectures.load(tmp_path_factory.mktemp("deeper"), request.param))


SOME = ("llava", "llava-siglip-qwen2", "qwen2_vl", "internvl")


def tokens_of(lvlm):
    return lvlm.inputs(noise.pictures([(32, 32)] * 2, seed=1), QUESTIONS[:2])


@pytest.mark.parametrize("deeper", SOME, indirect=True)
def test_var_against_attention_computed_anew(deeper):
    """The third layer's attention in eager arithmetic of the test's own, with the rule applied to its weights."""
    lvlm, inputs = deeper, tokens_of(deeper)
    settings = dict(dimensions=list(range(32)), tau=2.2, p=0.25, rho=1.0, least=0.0)
    layer = lvlm.decoder_layers[2].get_submodule(lvlm.spec.decoder_attention)
    seen = {}

    def keep(module, args, kwargs, output):
        seen["hidden"], seen["output"] = kwargs["hidden_states"], output[0]

    def entering(module, args, kwargs):
        seen["residual"] = args[0] if args else kwargs["hidden_states"]

    def projected(module, args):
        seen["heads"] = args[0]

    with (
        layer.register_forward_hook(keep, with_kwargs=True),
        layer.o_proj.register_forward_pre_hook(projected),
        lvlm.decoder_layers[2].register_forward_pre_hook(entering, with_kwargs=True),
    ):
        with attention_rows(lvlm, "decoder", rows="all", layers=[2]) as rows:
            logits(lvlm, inputs)
        plain_heads, value = seen["heads"], layer.v_proj(seen["hidden"])
        with moving.redistributed(lvlm, inputs, **settings):
            logits(lvlm, inputs)
    weights = rows[2][0]  # [batch, heads, queries, keys]
    heads = weights.shape[1]
    value = value.unflatten(-1, (-1, 8)).transpose(1, 2)  # [batch, key heads, keys, head width]
    value = value.repeat_interleave(heads // value.shape[1], 1)
    x = seen["residual"]
    light = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).abs().amax(-1)  # [batch, keys]
    visual = inputs["input_ids"] == lvlm.image_token_id
    last = int(visual.nonzero()[:, 1].max())
    sink = (light >= settings["tau"]) & (torch.arange(light.shape[1]) <= last)
    assert (sink & visual).any() and not (sink & visual)[visual].all()
    expected = weights.clone()
    for b in range(len(weights)):
        for q in range(last + 1, weights.shape[2]):
            a = weights[b, :, q]  # [heads, keys]
            to = a * (visual[b] & ~sink[b])
            budget = 0.75 * (a * sink[b]).sum(-1, keepdim=True)
            if to.any():  # otherwise nobody is there to receive
                expected[b, :, q] = a - 0.75 * a * sink[b] + budget * to / to.sum(-1, keepdim=True)
    ours = (expected @ value).transpose(1, 2).flatten(2)
    here = inputs["attention_mask"].bool()
    torch.testing.assert_close(seen["heads"][here], ours[here], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(seen["heads"][:, -1], plain_heads[:, -1], atol=1e-3)
    assert torch.equal(seen["heads"][:, :last + 1], plain_heads[:, :last + 1])


@pytest.mark.parametrize("deeper", SOME, indirect=True)
@torch.no_grad()
def test_var_while_decoding(deeper):
    lvlm, inputs = deeper, tokens_of(deeper)
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True,
                    return_dict_in_generate=True, suppress_tokens=[lvlm.image_token_id])
    plain = logits(lvlm, inputs)
    with moving.redistributed(lvlm, inputs, list(range(32)), 2.2, 0.25, 1.0, 0.0):
        assert not torch.allclose(logits(lvlm, inputs)[:, -1], plain[:, -1], atol=1e-4)
        ways = [lvlm.model.generate(**inputs, **settings, use_cache=cache) for cache in (True, False)]
    for cached, anew in zip(ways[0].logits, ways[1].logits, strict=True):
        torch.testing.assert_close(cached, anew, **close)
    with moving.redistributed(lvlm, inputs, [0], 5.6):  # a threshold that nothing reaches
        assert torch.equal(logits(lvlm, inputs), plain)
    assert torch.equal(logits(lvlm, inputs), plain)
    assert not hasattr(lvlm.decoder_layers[2].get_submodule(lvlm.spec.decoder_attention), "_editors")


@pytest.mark.parametrize("kind", ["gemma3", "aya_vision"])
@torch.no_grad()
def test_var_where_a_sliding_window_has_forgotten_keys(kind, tmp_path, monkeypatch):
    """Its cache begins later than the sequence: sinks and visual tokens are still where they are."""
    monkeypatch.setitem(architectures.TEXT, "num_hidden_layers", 6)
    monkeypatch.setattr(architectures, "LAYER_TYPES", ["full_attention", *["sliding_attention"] * 4, "full_attention"])
    lvlm = architectures.load(tmp_path, kind)
    inputs = lvlm.inputs(noise.pictures([(64, 48)]), QUESTIONS[:1])
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True,
                    return_dict_in_generate=True, suppress_tokens=[lvlm.image_token_id])
    plain = logits(lvlm, inputs)
    with moving.redistributed(lvlm, inputs, list(range(0, 32, 2)), 1.6, 0.0, 1.0, 0.0):
        assert not torch.allclose(logits(lvlm, inputs)[:, -1], plain[:, -1], atol=0.1)
        cached, anew = (torch.cat(lvlm.model.generate(**inputs, **settings, use_cache=cache).logits)
                        for cache in (True, False))
    torch.testing.assert_close(cached, anew, **close)


# ------------------------------------------------------------------------------------------------- in evaluate
def test_interventions_answer_as_generate_does_under_the_same_context(tmp_path):
    lvlm = deep(architectures.load(tmp_path, "llava"))
    random = np.random.default_rng(2)
    images = {name: random.integers(0, 256, (3, 32, 32), dtype=np.uint8) for name in "ab"}
    masks = {name: torch.from_numpy(random.random(16) < 0.3) for name in images}
    table = pd.DataFrame([{"id": f"{name}{q}", "image_id": name, "question": q} for name in images for q in QUESTIONS])
    hows = [
        (moving.reordered, masks, {"to": "front"}),
        (moving.reordered, masks, {"to": "end", "ids": "renumber"}),
        (moving.reweighted, masks, {"chosen_by": 3.0, "others_by": 0.5}),
        (moving.gated, masks, {"chosen_by": 3.0, "layers": [0, 1]}),
        (moving.redistributed, None, {"dimensions": list(range(32)), "tau": 2.2, "p": 0.1, "rho": 1.0, "least": 0.0}),
    ]
    interventions = [moving.intervention(f"{i}", method, own, **how) for i, (method, own, how) in enumerate(hows)]
    said = evaluate(lvlm, table, interventions, images=images, candidates=["yes", "no"], max_new_tokens=3, cache=None)
    for i, (method, own, how) in enumerate(hows):
        of = said[said.intervention == f"{i}"]
        for row in of.itertuples():
            inputs = lvlm.inputs([images[row.image_id]], [row.question])
            with torch.no_grad(), method(lvlm, inputs, *([] if own is None else [[own[row.image_id]]]), **how):
                logp = lvlm.model(**inputs).logits[0, -1].log_softmax(-1)
            yes = lvlm.processor.tokenizer.convert_tokens_to_ids("yes")
            assert abs(logp[yes].item() - row.logp_yes) < 1e-4
    assert said.pivot(index="id", columns="intervention", values="logp_yes").std(axis=1).gt(1e-4).all()


def test_bad_choices(lvlm, inputs):
    with pytest.raises(ValueError, match="'front' or 'end'"), moving.reordered(lvlm, inputs, TWO, "back"):
        pass
    with pytest.raises(ValueError, match="shares"), moving.redistributed(lvlm, inputs, [0], 2.0, p=1.2):
        pass
    assert set(SPECS)
