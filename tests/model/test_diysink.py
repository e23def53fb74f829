"""Two connectors on a tiny instance of every architecture, against the model's own parts put together by hand."""

import copy
from contextlib import nullcontext

import noise
import pytest
import torch
from passes import logits

from sinkstudy import sinks
from sinkstudy.answers.evaluate import Prefixes
from sinkstudy.effects import moving
from sinkstudy.model import capture, loading
from sinkstudy.trained import loop
from sinkstudy.trained.connectors import DIYSink, OneConnector, linear_pair, matched_width, set_width

close = dict(atol=3e-5, rtol=1e-4)
SIZES = [(48, 32), (32, 64), (64, 64)]  # (width, height)
QUESTIONS = ["how many", "what is the texture", "what is the texture red blue yes no"]
RULE = dict(criterion="percentile", threshold=94.0)  # one patch of sixteen, at least


def made(folder: str, **how) -> DIYSink:
    method = DIYSink(loading.load(folder), **RULE, **how)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # both connectors far from nothing and from each other
        for connector in (method.lvlm.connector, method.sink):
            for p in connector.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return method


def asked(lvlm) -> Prefixes:
    return Prefixes(lvlm.inputs(noise.pictures(SIZES), QUESTIONS), list("abc"), QUESTIONS)


@torch.no_grad()
def by_hand(method: DIYSink, inputs: Prefixes, weights=(1.0, 1.0)) -> torch.Tensor:
    """Two passes, one for each connector; the decoder then gets what the first has for sinks, and the second's rest."""
    lvlm, norms, seen = method.lvlm, [], []

    def keep_norms(patches, layer):
        if layer == lvlm.feature_layer:
            norms.append(capture.token_norms(patches))
        return patches

    def keep(tokens, layer):
        if layer == lvlm.feature_layer:
            seen.append(tokens.clone())
        return tokens

    own = lvlm.connector
    for connector in (method.sink, own):
        lvlm.model.set_submodule(lvlm.spec.connector, connector)
        with lvlm.editing(before=keep_norms, after=keep):
            logits(lvlm, inputs)
    of_sinks, both = [], seen[1] * weights[1]
    for layout in lvlm.layout(inputs):
        read, mask = (layout.positions >= 0).any(1), torch.zeros(len(layout.vision), dtype=torch.bool)
        mask[read] = sinks.percentile(norms[0][layout.connector][read], RULE["threshold"])
        at = layout.output[mask]
        both[at] = seen[0][at] * weights[0]
        of_sinks.append(mask)
    put = lambda tokens, layer: both if layer == lvlm.feature_layer else tokens  # noqa: E731
    front = method.settings["front"]
    order = moving.reordered(lvlm, inputs, of_sinks, ids="renumber") if front else nullcontext()
    with lvlm.editing(after=put), order:
        return logits(lvlm, inputs)


@pytest.mark.parametrize("front", [True, False], ids=["front", "kept"])
def test_every_block_comes_from_its_own_connector(folder, front):
    method = made(folder, front=front)
    inputs = asked(method.lvlm)
    real = inputs["attention_mask"].bool()
    with method.around(inputs):
        out = logits(method.lvlm, inputs)
    torch.testing.assert_close(out[real], by_hand(method, inputs)[real], **close)
    assert not torch.allclose(out[real], logits(method.lvlm, inputs)[real], **close)  # and the two differ
    weights = torch.tensor([[0.4, 1.7]] * 3)
    with method.around(inputs, weights):
        weighed = logits(method.lvlm, inputs)
    torch.testing.assert_close(weighed[real], by_hand(method, inputs, (0.4, 1.7))[real], **close)


def test_equal_connectors_are_sinks_to_the_front(folder):
    """With the model's own connector in both places only the order is new, to the bit; afterwards no trace is left."""
    lvlm = loading.load(folder)
    untouched = copy.deepcopy(lvlm.connector.state_dict())
    method = DIYSink(lvlm, **RULE)
    lvlm.connector.load_state_dict(untouched)
    method.sink.load_state_dict(untouched)
    inputs = asked(lvlm)
    plain = logits(lvlm, inputs)
    with method.around(inputs):
        out = logits(lvlm, inputs)
    with moving.reordered(lvlm, inputs, lambda norms: sinks.percentile(norms, RULE["threshold"]), ids="renumber"):
        assert torch.equal(logits(lvlm, inputs), out)
    assert torch.equal(logits(lvlm, inputs), plain)


@pytest.mark.parametrize("front", [True, False], ids=["front", "kept"])
@pytest.mark.parametrize("show", ["sinks", "others"])
def test_what_is_not_shown_does_not_matter(folder, show, front):
    """The connector of the block that is left out may put out anything."""
    method = made(folder, front=front)
    if method.lvlm.spec.anyres and show == "sinks":
        pytest.skip("a visual token may read patches of both blocks there")
    inputs, lvlm = asked(method.lvlm), method.lvlm
    method.show = show
    with method.around(inputs):
        out = logits(lvlm, inputs)
    read = inputs["attention_mask"].bool() & (inputs["input_ids"] != lvlm.image_token_id)
    blind = method.sink if show == "others" else lvlm.connector
    with torch.no_grad():
        for p in blind.parameters():
            p.mul_(-2).add_(0.5)
    with method.around(inputs):
        changed = logits(lvlm, inputs)
    torch.testing.assert_close(changed[read], out[read], **close)
    method.show = "both"
    with method.around(inputs):
        assert not torch.allclose(logits(lvlm, inputs)[read], out[read], **close)


def test_generation_with_a_cache(folder):
    method = made(folder)
    picture_tokens = [method.lvlm.image_token_id]  # said by a random model, they would be taken for a picture
    how = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, suppress_tokens=picture_tokens)
    inputs = asked(method.lvlm)
    method.show = "others"
    with method.around(inputs):
        ways = [method.lvlm.model.generate(**inputs, **how, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*ways)


def test_one_block_alone_is_the_sequence_without_the_other(tiny, images, questions):
    """A LLaVA's decoder gets the sinks' tokens only, with the position ids that they have in front of the others."""
    method = made(tiny.name)
    lvlm = method.lvlm
    inputs = Prefixes(lvlm.inputs(images[:1], questions[:1]), ["a"], questions[:1])
    (layout,) = lvlm.layout(inputs)
    features = []
    with lvlm.connector.register_forward_pre_hook(lambda module, args: features.append(args[0][0])):
        logits(lvlm, inputs)
    chosen = features[0][sinks.percentile(features[0].norm(dim=-1), RULE["threshold"])]
    start, end, n = int(layout.visual[0]), int(layout.visual[-1]) + 1, inputs["input_ids"].shape[1]
    ids = torch.cat([torch.arange(start + len(chosen)), torch.arange(end, n)])
    with torch.no_grad():
        words = lvlm.model.get_input_embeddings()(inputs["input_ids"][0])
        embeds = torch.cat([words[:start], method.sink(chosen), words[end:]])[None]
        alone = lvlm.model(inputs_embeds=embeds, position_ids=ids[None]).logits
    method.show = "sinks"
    with method.around(inputs):
        torch.testing.assert_close(logits(lvlm, inputs)[:, end:], alone[:, start + len(chosen) :], **close)


def test_random_split(folder):
    """As many visual tokens as the sinks, drawn anew for another picture, the same for the same one."""
    lvlm = loading.load(folder)
    by_sinks = DIYSink(lvlm, **RULE)
    by_chance = DIYSink(lvlm, **RULE, split="random")
    (layout, *_) = lvlm.layout(asked(lvlm))
    n = len(layout.connector)
    norms = [torch.rand(n, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    drawn = [by_chance.chosen(of, layout) for of in norms]
    assert all(torch.equal(by_chance.chosen(of * 1.0001, layout), mask) for of, mask in zip(norms, drawn, strict=True))
    for of, mask in zip(norms, drawn, strict=True):
        of_sinks = layout.lift(by_sinks.chosen(of, layout), "any").sum()
        if lvlm.spec.anyres:  # tokens share patches there
            assert layout.lift(mask, "any").sum() >= of_sinks
        else:
            assert layout.lift(mask, "any").sum() == of_sinks
    assert len({tuple(mask.tolist()) for mask in drawn}) > 1


def test_matched_width(folder):
    lvlm = loading.load(folder)
    try:
        linear_pair(lvlm.connector)
    except ValueError as error:
        assert "two linear layers" in str(error)
        return
    wanted = 2 * sum(p.numel() for p in lvlm.connector.parameters())
    width = matched_width(lvlm.connector)
    one_more = copy.deepcopy(lvlm.connector)
    set_width(lvlm.connector, width)
    set_width(one_more, width + 1)
    assert sum(p.numel() for p in lvlm.connector.parameters()) <= wanted < sum(p.numel() for p in one_more.parameters())
    method = OneConnector(lvlm, width=width)
    inputs = asked(lvlm)
    with method.around(inputs):
        assert logits(lvlm, inputs).isfinite().all()


def test_what_was_trained_comes_back(tiny, images, questions, tmp_path):
    method = made(tiny.name)
    with torch.no_grad():
        for p in method.changed().values():  # as it is kept
            p.copy_(p.bfloat16())
    inputs = Prefixes(method.lvlm.inputs(images, questions), list("abc"), questions)
    method.save(tmp_path / "one", note="a test")
    other = DIYSink.open(loading.load(tiny.name), tmp_path / "one")
    with method.around(inputs):
        wanted = logits(method.lvlm, inputs)
    with other.around(inputs):
        assert torch.equal(logits(other.lvlm, inputs), wanted)
    with pytest.raises(ValueError, match="does not hold"):
        OneConnector(loading.load(tiny.name)).read(tmp_path / "one")


def near(matrix: torch.Tensor) -> torch.Tensor:
    """How far eight bits may be off, for each row: half a step, and the rounding of the step."""
    largest = matrix.flatten(1).abs().amax(1)
    return largest / 127 / 2 * 1.01 + largest / 512


def test_eight_bits():
    """Rows of very different sizes, zeros among them."""
    matrix = torch.randn(40, 3, 5) * torch.logspace(-6, 3, 40)[:, None, None]
    matrix[7] = 0
    whole, scale = loop.rounded(matrix)
    assert whole.dtype == torch.int8 and whole.shape == matrix.shape and scale.shape == (40,)
    error = (whole * scale.float()[:, None, None] - matrix).abs().amax((1, 2))
    assert (error <= near(matrix)).all() and (error > 0).sum() == 39


def test_kept_in_eight_bits(tiny, tmp_path):
    """Half the space; every matrix within half a step, what is no matrix as bfloat16 has it."""
    method = made(tiny.name)
    method.save(tmp_path / "eight", eight_bits=True)
    method.save(tmp_path / "sixteen")
    eight, sixteen = ((tmp_path / name / "weights.safetensors").stat().st_size for name in ("eight", "sixteen"))
    assert eight < 0.75 * sixteen  # tiny matrices have few columns for a scale
    found = DIYSink.open(loading.load(tiny.name), tmp_path / "eight").changed()
    for name, own in method.changed().items():
        if own.ndim > 1:
            error = (found[name] - own).detach().flatten(1).abs().amax(1)
            assert (error <= near(own)).all() and error.max() > 0, name
        else:
            assert torch.equal(found[name], own.bfloat16().float()), name


@pytest.mark.parametrize(("how", "message"), [
    (dict(criterion="guess"), "unknown criterion"), (dict(split="half"), "'sinks' or 'random'")])
def test_bad_settings(tiny, how, message):
    with pytest.raises(ValueError, match=message):
        DIYSink(tiny, **how)


def test_refuses_gradient_checkpointing(tiny, images, questions):
    method = DIYSink(loading.load(tiny.name), **RULE)
    inputs = Prefixes(method.lvlm.inputs(images, questions), list("abc"), questions)
    method.lvlm.decoder.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="activation_checkpointing_disable"):
        method(inputs, inputs["input_ids"])
    with torch.no_grad(), method.around(inputs):
        assert logits(method.lvlm, inputs).isfinite().all()
