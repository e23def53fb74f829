"""Replacing, removing and hiding visual tokens do what they say and nothing else, for several architectures."""

import architectures
import noise
import numpy as np
import pandas as pd
import passes
import pytest
import torch
from PIL import Image

from sinkstudy.answers.evaluate import NONE, evaluate
from sinkstudy.effects import ablation
from sinkstudy.model import capture
from sinkstudy.model.identity import Identity
from sinkstudy.model.lvlm import LVLM

STEPS = 3
TEXTS = ["how many", "what is the texture red blue yes no", "what is the texture"]
# plain, two tiles, blocks of patches, windows, further connectors, sliding windows, a prefix that sees itself
DROPPING = ["llava", "llava-siglip-qwen2", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl"]
SHARING = ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"]


@pytest.fixture(scope="module")
def images() -> dict[str, Image.Image]:
    return dict(zip("abc", noise.pictures([(32, 32)] * 3)))


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Two questions of different length about each image."""
    asked = [(name, i) for name in "abc" for i in (0, 1)]
    return pd.DataFrame(
        [{"id": f"{n}-{i}", "image_id": n, "question": TEXTS[i], "answer": ("yes", "no")[i]} for n, i in asked]
    )


@pytest.fixture(scope="module", params=SHARING)
def lvlm(request, tmp_path_factory) -> LVLM:
    return architectures.load(tmp_path_factory.mktemp(request.param), request.param)


def groups(lvlm, images, k=3, seed=0) -> dict[str, torch.Tensor]:
    """k random patches of each image."""
    random = torch.Generator().manual_seed(seed)
    masks = {}
    for name, image in images.items():
        n = len(lvlm.layout(lvlm.inputs([image], [""]))[0].vision)
        masks[name] = torch.zeros(n, dtype=torch.bool)
        masks[name][torch.randperm(n, generator=random)[:k]] = True
    return masks


def entering(lvlm, inputs) -> torch.Tensor:
    """What the decoder reads, [batch, tokens, width]."""
    seen = []
    with lvlm.decoder_layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    ):
        passes.logits(lvlm, inputs)
    return seen[0]


# ------------------------------------------------------------------------------------------------- replacement
def test_the_decoder_reads_the_replacement_there_and_nothing_else_elsewhere(lvlm, images):
    inputs = lvlm.inputs(list(images.values()), TEXTS)  # of different length: padded
    layouts, masks = lvlm.layout(inputs), groups(lvlm, images)
    tokens = ablation.read_tokens(lvlm, images)
    before = entering(lvlm, inputs)
    new = ablation.values(tokens, masks, "noise")
    with ablation.replaced(lvlm, inputs, list(masks.values()), list(new.values())):
        after = entering(lvlm, inputs)
    for layout, (name, mask) in zip(layouts, masks.items()):
        inside = torch.zeros(before.shape[1], dtype=torch.bool)
        inside[layout.visual] = layout.lift(mask, "any")
        assert torch.equal(after[layout.row, ~inside], before[layout.row, ~inside])
        assert (after[layout.row, inside] != before[layout.row, inside]).all()
        if lvlm.spec.order == "rows" and not lvlm.spec.anyres and lvlm.merge == 1:
            assert torch.equal(after[layout.row, inside], new[name][lvlm.feature_layer])
    assert torch.equal(entering(lvlm, inputs), before)  # no trace


@pytest.mark.parametrize("site", ["input", "output"])
def test_a_token_in_its_own_place_changes_no_bit(lvlm, images, site):
    masks = groups(lvlm, images)
    tokens = ablation.read_tokens(lvlm, images, site)
    own = [tokens.group(name, mask) for name, mask in masks.items()]
    inputs = lvlm.inputs(list(images.values()), [""] * 3)
    with ablation.replaced(lvlm, inputs, list(masks.values()), own, site):
        after = entering(lvlm, inputs)
    assert torch.equal(after, entering(lvlm, inputs))


def test_replacing_every_patch_by_those_of_another_picture_shows_that_picture(lvlm, images):
    """Order and place of every token are right: the decoder reads what it reads of the other picture."""
    a, b = list(images.values())[:2]
    inputs, other = lvlm.inputs([a], [""]), lvlm.inputs([b], [""])
    everything = torch.ones_like(groups(lvlm, {"a": a})["a"])
    for site in ("input", "output"):
        new = ablation.read_tokens(lvlm, {"b": b}, site).group("b", everything)
        with ablation.replaced(lvlm, inputs, [everything], [new], site):
            found = entering(lvlm, inputs)
        torch.testing.assert_close(found, entering(lvlm, other), atol=1e-6, rtol=1e-5)


def test_replacements_are_what_they_are_called(llava, images):
    masks = groups(llava, images) | {"c": groups(llava, images, k=2)["c"]}
    tokens = ablation.read_tokens(llava, images)
    layer = llava.feature_layer
    every = torch.cat([tokens.of[name][layer] for name in images])
    group = torch.cat([tokens.group(name, mask)[layer] for name, mask in masks.items()])

    def made(kind, seed=0):
        return [own[layer] for own in ablation.values(tokens, masks, kind, seed).values()]

    assert [len(x) for x in made("mean")] == [3, 3, 2]
    for x in made("mean"):
        torch.testing.assert_close(x, every.mean(0).expand_as(x))
    assert not torch.cat(made("zero")).any()
    shuffled = torch.cat(made("shuffle"))
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, group.tolist()))  # the same multiset
    for x, own in zip(made("shuffle"), group.split([3, 3, 2])):
        assert not (x[:, None] == own).all(-1).any()  # none in its own picture
    assert not torch.equal(shuffled, torch.cat(made("shuffle", seed=1)))
    # many draws of noise have the group's mean and standard deviation, in every dimension
    draws = torch.cat([torch.cat(made("noise", seed)) for seed in range(1000)])
    sd = group.std(0, correction=0)
    assert ((draws.mean(0) - group.mean(0)).abs() < 5 * sd / len(draws) ** 0.5).all()
    torch.testing.assert_close(draws.std(0), sd, rtol=0.05, atol=0)


def test_shuffle_moves_everything_whatever_the_sizes():
    for sizes in ([1, 1], [4, 1, 1, 2], [0, 3, 0, 2, 1], [5, 5, 5]):
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        for seed in range(20):
            order = ablation._derangement(sizes, torch.Generator().manual_seed(seed))
            assert sorted(order.tolist()) == list(range(sum(sizes)))
            assert (owner[order] != owner).all()
    with pytest.raises(ValueError, match="more than half"):
        ablation._derangement([3, 1, 1], torch.Generator())


# ------------------------------------------------------------------------------------------------- removal
def last_logits(lvlm, inputs) -> torch.Tensor:
    return passes.logits(lvlm, inputs)[:, -1]


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("name", DROPPING)
def test_removal_is_the_sequence_without_the_tokens(name, others, images, tmp_path):
    lvlm = architectures.load(tmp_path, name)
    image = images["a"]
    inputs = lvlm.inputs([image], [TEXTS[1]])
    (layout,), mask = lvlm.layout(inputs), groups(lvlm, {"a": image})["a"]
    with ablation.hidden(lvlm, inputs, [mask], others=others):
        found = last_logits(lvlm, inputs)
    given = passes.decoder_arguments(lvlm, inputs)
    places = torch.arange(inputs.input_ids.shape[1])
    with_patch = layout.positions[layout.positions >= 0].unique()
    of_group = layout.positions[mask][layout.positions[mask] >= 0].unique()
    dropped = with_patch[~torch.isin(with_patch, of_group)] if others else of_group
    stays = ~torch.isin(places, dropped)
    assert 0 < len(dropped) < stays.sum() + len(dropped)
    ids = given["position_ids"] if given.get("position_ids") is not None else places[None]
    with torch.no_grad():
        hidden = lvlm.decoder(inputs_embeds=given["inputs_embeds"][:, stays], position_ids=ids[..., stays])
        expected = lvlm.model.lm_head(hidden.last_hidden_state)[:, -1]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, last_logits(lvlm, inputs), atol=1e-3)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("visible_to", ["nobody", "visual"])
def test_hiding_is_eager_attention_with_that_mask(name, visible_to, images, tmp_path):
    lvlm = architectures.load(tmp_path, name)
    inputs = lvlm.inputs(list(images.values()), TEXTS)
    masks = list(groups(lvlm, images).values())
    with ablation.hidden(lvlm, inputs, masks, visible_to=visible_to):
        found = last_logits(lvlm, inputs)
    given = passes.decoder_arguments(lvlm, inputs)
    n = inputs.input_ids.shape[1]
    seen = torch.ones(n, n).tril().bool() & inputs.attention_mask.bool()[:, None]  # [batch, queries, keys]
    for layout, mask in zip(lvlm.layout(inputs), masks):
        for j in layout.visual[layout.lift(mask, "any")].tolist():
            for i in range(j + 1, n):
                if visible_to == "nobody" or i not in layout.visual.tolist():
                    seen[layout.row, i, j] = False
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    ids = given["position_ids"] if given.get("position_ids") is not None else torch.arange(n)[None]
    lvlm.model.set_attn_implementation("eager")
    with torch.no_grad():
        hidden = lvlm.decoder(inputs_embeds=given["inputs_embeds"], attention_mask=added, position_ids=ids)
        expected = lvlm.model.lm_head(hidden.last_hidden_state)[:, -1]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    with ablation.hidden(lvlm, inputs, masks, visible_to=visible_to):  # masks that are added, not bool
        torch.testing.assert_close(last_logits(lvlm, inputs), expected, atol=2e-5, rtol=1e-4)


def test_hiding_only_reaches_the_answer_through_attention(lvlm, images):
    """Attention, as it is captured, is zero on the hidden tokens and as before in what comes before them."""
    inputs = lvlm.inputs(list(images.values()), TEXTS)
    masks = groups(lvlm, images)
    for visible_to in ("nobody", "visual"):
        with (
            ablation.hidden(lvlm, inputs, list(masks.values()), visible_to=visible_to),
            capture.attention_rows(lvlm, "decoder", rows="all") as rows,
        ):
            last_logits(lvlm, inputs)
        for layout, mask in zip(lvlm.layout(inputs), masks.values()):
            gone = layout.visual[layout.lift(mask, "any")]
            text = torch.arange(int(layout.visual[-1]) + 1, inputs.input_ids.shape[1])
            for (weights,) in rows.values():
                own = weights[layout.row]  # [heads, queries, keys]
                assert not own[:, text][:, :, gone].any()
                among = own[:, layout.visual][:, :, gone] * (layout.visual[:, None] != gone)
                assert among.any() == (visible_to == "visual")
    assert not any(layer.get_submodule(lvlm.spec.decoder_attention)._forward_pre_hooks for layer in lvlm.decoder_layers)


@pytest.mark.parametrize("visible_to", ["nobody", "visual"])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_hidden_tokens_stay_hidden_while_the_answer_is_written(name, visible_to, images, tmp_path):
    """With kept keys as without: also where a sliding window has forgotten the first ones (Gemma 3)."""
    lvlm = architectures.load(tmp_path, name)
    inputs = lvlm.inputs([images["a"]], [TEXTS[0]])
    masks = [groups(lvlm, {"a": images["a"]})["a"]]
    how = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with ablation.hidden(lvlm, inputs, masks, visible_to=visible_to), torch.no_grad():
        kept, again = (lvlm.model.generate(**inputs, **how, use_cache=cache) for cache in (True, False))
    torch.testing.assert_close(torch.stack(kept.logits), torch.stack(again.logits), atol=3e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- with evaluate
@pytest.mark.filterwarnings("ignore:.*share no prefix")
@pytest.mark.parametrize("name", [*SHARING, "paligemma", "aya_vision", "idefics3"])
def test_answers_are_those_of_one_generate_each(name, images, table, tmp_path):
    """Several images in a batch, prefixes shared, keys kept from one pass to the next."""
    lvlm = architectures.load(tmp_path, name)
    masks = groups(lvlm, images)
    tokens = {site: ablation.read_tokens(lvlm, images, site) for site in ("input", "output")}
    new = {site: ablation.values(tokens[site], masks, "shuffle") for site in tokens}
    contexts = {
        "input": lambda lvlm, inputs, image: ablation.replaced(
            lvlm, inputs, [masks[image]], [new["input"][image]], "input"
        ),
        "output": lambda lvlm, inputs, image: ablation.replaced(lvlm, inputs, [masks[image]], [new["output"][image]]),
        "removed": lambda lvlm, inputs, image: ablation.hidden(lvlm, inputs, [masks[image]]),
        "alone": lambda lvlm, inputs, image: ablation.hidden(lvlm, inputs, [masks[image]], others=True),
        "knocked out": lambda lvlm, inputs, image: ablation.hidden(lvlm, inputs, [masks[image]], visible_to="visual"),
    }
    ways = [
        ablation.replace("input", tokens["input"], masks, "shuffle"),
        ablation.replace("output", tokens["output"], masks, "shuffle"),
        ablation.hide("removed", masks),
        ablation.hide("alone", masks, others=True),
        ablation.hide("knocked out", masks, visible_to="visual"),
    ]
    how = {"images": images, "candidates": ("yes", "no"), "max_new_tokens": STEPS, "cache": None, "batch_size": 8}
    found = evaluate(lvlm, table, [NONE, *ways], **how)
    words = lvlm.processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    untouched = found[found.intervention == "none"][["logp_yes", "logp_no"]].to_numpy()
    for name, context in contexts.items():
        rows = found[found.intervention == name]
        for row in rows.itertuples():
            inputs = lvlm.inputs([images[row.image_id]], [row.question])
            with context(lvlm, inputs, row.image_id), torch.no_grad():
                out = lvlm.model.generate(
                    **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
                )
            said = lvlm.processor.decode(out.sequences[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            assert row.prediction == said.strip(), name
            logp = out.logits[0][0].log_softmax(-1)[words]
            np.testing.assert_allclose([row.logp_yes, row.logp_no], logp, atol=3e-5, err_msg=name)
        assert not np.allclose(rows[["logp_yes", "logp_no"]], untouched, atol=1e-3), name


def test_scores_and_effects_are_differences_to_the_untouched_model(llava, images, table):
    masks = groups(llava, images)
    ways = [ablation.hide("removed", masks)]
    how = {"images": images, "max_new_tokens": STEPS, "cache": None}
    said = ablation.scored(llava, table, ways, **how)
    plain = evaluate(llava, table, [NONE, *ways], candidates=("yes", "no"), **how)
    expected = np.where(plain.answer == "yes", plain.logp_yes, plain.logp_no)
    np.testing.assert_allclose(said.logp, expected, atol=1e-6)
    assert (said.right == 100 * (plain.prediction == plain.answer)).all()
    found = ablation.effects(said.sample(frac=1, random_state=0))
    assert sorted(found.id) == sorted(table.id)
    for row in found.itertuples():
        of = said[said.id == row.id].set_index("intervention").logp
        assert row.logp == pytest.approx(of["removed"] - of["none"])
    with pytest.raises(ValueError, match="not asked under 'none'"):
        ablation.effects(said[(said.intervention != "none") | (said.id != "a-0")])


def test_an_answer_whose_words_the_tokenizer_lacks_has_no_probability(llava, images, table):
    how = {"images": images, "max_new_tokens": STEPS, "cache": None}
    strange = table.answer.where(table.id != "a-0", "four")  # the tiny vocabulary has no such word
    with pytest.warns(UserWarning, match="first tokens do not tell the candidates 'four' apart: .* are NaN"):
        said = ablation.scored(llava, table.assign(answer=strange), [], **how).set_index("id")
    plain = ablation.scored(llava, table, [], **how).set_index("id")
    assert np.isnan(said.logp["a-0"]) and said.right["a-0"] == 0
    assert (said.logp.drop("a-0") == plain.logp.drop("a-0")).all()


def test_interventions_differ_in_the_cache_where_they_differ(llava, images):
    masks, tokens = groups(llava, images), ablation.read_tokens(llava, images)
    made = [
        ablation.hide("x", masks),
        ablation.hide("x", groups(llava, images, seed=1)),
        ablation.hide("x", masks, others=True),
        ablation.hide("x", masks, visible_to="visual"),
        ablation.replace("x", tokens, masks),
        ablation.replace("x", tokens, masks, "zero"),
        ablation.replace("x", tokens, masks, "noise"),
        ablation.replace("x", tokens, masks, "noise", seed=1),
    ]
    known = [Identity()(how) for how in made]
    assert len(set(known)) == len(made)
    assert Identity()(ablation.hide("x", groups(llava, images))) == known[0]


# ------------------------------------------------------------------------------------------------- bad input
def test_bad_input_is_named(llava, images, table):
    masks, tokens = groups(llava, images), ablation.read_tokens(llava, images)
    inputs = llava.inputs([images["a"]], [""])
    with pytest.raises(ValueError, match="unknown replacement 'median'; known: mean"):
        ablation.values(tokens, masks, "median")
    with pytest.raises(ValueError, match="1 images were not read, such as 'd'"):
        ablation.values(tokens, {"d": masks["a"]}, "mean")
    with pytest.raises(ValueError, match="a site is"):
        ablation.read_tokens(llava, images, "middle")
    with pytest.raises(ValueError, match="no images"):
        ablation.read_tokens(llava, {})
    with pytest.raises(ValueError, match=r"a group is bool \[16\] here, not torch.bool \[4\]"):
        ablation.values(tokens, {"a": torch.ones(4, dtype=torch.bool)}, "mean")
    with pytest.raises(ValueError, match="visible to"):
        with ablation.hidden(llava, inputs, [masks["a"]], visible_to="text"):
            pass
    with pytest.raises(ValueError, match="3 tokens, there are values for 16"):
        with ablation.replaced(llava, inputs, [masks["a"]], [tokens.of["a"]]):
            pass
    with pytest.raises(ValueError, match="image 'c' has no group"):
        evaluate(llava, table, [ablation.hide("x", {k: masks[k] for k in "ab"})], images=images, cache=None)
    with pytest.raises(ValueError, match="right answer"):
        ablation.scored(llava, table.assign(answer=None), [], images=images)
