"""What `states` and `words` take from a model, against the model's own passes."""

import architectures
import noise
import passes
import pytest
import torch
from PIL import Image

from sinkstudy.analyses import probing


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return noise.pictures([(64, 64)] * 3)


@torch.no_grad()
def passed(lvlm, pictures) -> tuple:
    """Inputs, arguments of the decoder and its outputs in the ordinary pass of all pictures."""
    inputs = lvlm.inputs(pictures, [""] * len(pictures))
    return inputs, passes.decoder_arguments(lvlm, inputs), lvlm.model(**inputs, output_hidden_states=True)


@torch.no_grad()
def blocked(lvlm, arguments, sees_first: bool) -> torch.Tensor:
    """Logits of one pass over the whole prompt in which each token sees itself and, if so, the first token."""
    embeddings = arguments["inputs_embeds"]
    mask = torch.eye(embeddings.shape[1], dtype=torch.bool)
    if sees_first:
        mask[:, 0] = True
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    added = added.expand(len(embeddings), 1, -1, -1)
    hidden = lvlm.decoder(inputs_embeds=embeddings, attention_mask=added, position_ids=arguments.get("position_ids"))
    return lvlm.model.get_output_embeddings()(hidden.last_hidden_state)


@pytest.mark.parametrize("name", ["llava", "llava-siglip-qwen2", "llava_next", "qwen2_vl", "qwen2_5_vl", "gemma3",
                                  "paligemma"])
def test_alone_is_the_pass_with_all_other_attention_blocked(tmp_path, pictures, name):
    lvlm = architectures.load(tmp_path, name)
    inputs, arguments, out = passed(lvlm, pictures)
    found = probing.words(lvlm, pictures, batch_size=2)
    visual = [layout.visual for layout in lvlm.layout(inputs)]
    for logits, key in ((blocked(lvlm, arguments, False), "alone"), (blocked(lvlm, arguments, True), "behind_first")):
        for i, words in enumerate(found):
            assert torch.equal(getattr(words, key), logits[i, visual[i]].argmax(-1))
    assert any(not torch.equal(words.alone, words.behind_first) for words in found)
    for i, words in enumerate(found):
        assert len(words.lens) == len(lvlm.decoder_layers)
        assert torch.equal(words.lens[-1], out.logits[i, visual[i]].argmax(-1))


def test_no_token_is_alone_where_features_are_stacked(tmp_path, pictures):
    with pytest.raises(ValueError, match="no visual token stands alone"):
        probing.words(architectures.load(tmp_path, "qwen3_vl"), pictures)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_states_are_those_of_the_patches(tmp_path, pictures, name):
    lvlm = architectures.load(tmp_path, name)
    inputs, arguments, out = passed(lvlm, pictures)
    layouts = lvlm.layout(inputs)
    asked = []

    def every_patch(index, layout, norms):
        asked.append(index)
        n = len(norms)
        return torch.cat([torch.eye(n), torch.full((1, n), 1 / n), torch.full((1, n), float("nan"))])

    n = len(layouts[0].vision)
    found = probing.states(lvlm, pictures, every_patch, followed=n + 1, batch_size=2)
    assert asked == [0, 1, 2]
    order = [("tower", k) for k in range(lvlm.feature_layer + 1)] + [("connector", 0)]
    assert list(found.stages) == [*order, *(("decoder", k) for k in range(len(lvlm.decoder_layers)))]
    entry = found.stages["tower", lvlm.feature_layer]
    assert entry.shape[1] == n + 2 and entry[:, -1].isnan().all() and not entry[:, :-1].isnan().any()
    torch.testing.assert_close(entry[:, n], entry[:, :n].mean(1))
    torch.testing.assert_close(torch.stack(found.norms), entry[:, :n].norm(dim=-1))
    for i, layout in enumerate(layouts):
        at = layout.positions[:, 0]
        for stage, hidden in (("connector", 0), arguments["inputs_embeds"]), (("decoder", 0), out.hidden_states[1]):
            torch.testing.assert_close(found.stages[stage][i, :n], hidden[i, at])
            assert found.stages[stage].shape[1] == n + 1
    # what the tower holds of a patch is what its visual token is made of
    size = lvlm.merge**2
    block = entry[0, layouts[0].connector.argsort()][: n // size * size]  # in the connector's order, first picture
    with torch.no_grad():
        made = lvlm.connector(block) if lvlm.spec.packed else lvlm.connector(block[None])[0]
    expected = torch.empty(n // size, made.shape[-1])
    expected[(layouts[0].connector // size)] = found.stages["connector", 0][0, :n]
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


def test_prefix_tokens_are_kept(tiny, images):  # the fixture: a tower with CLS, and one with registers
    found = probing.states(tiny, images, lambda index, layout, norms: torch.eye(len(norms))[:1], followed=1)
    expected = []
    hooks = [m.register_forward_hook(lambda m, a, out: expected.append(out)) for m in tiny.vision.encoder.layers]
    with torch.no_grad():
        tiny.vision(pixel_values=tiny.inputs(images, [""] * 3).pixel_values)
    for hook in hooks:
        hook.remove()
    assert set(found.prefix) == set(range(tiny.feature_layer + 1))
    for layer, kept in found.prefix.items():
        torch.testing.assert_close(kept, expected[layer][:, : tiny.n_prefix])
