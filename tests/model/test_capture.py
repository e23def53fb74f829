"""Capture against an eager reference: norms, rows, padding, batches, decoding. Nothing stays behind."""

import pytest
import torch

from sinkstudy import sinks
from sinkstudy.model import loading
from sinkstudy.model.capture import (
    _Attention,
    attention_received,
    attention_rows,
    hidden_states,
    trace,
    until_end,
)

close = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture
def inputs(tiny, images, questions):
    return tiny.inputs(images, questions)  # three lengths: padded


@pytest.fixture
def reference(eager, inputs):
    """Everything the eager model returns: `vision` and `decoder`, each with hidden_states and attentions."""
    with torch.no_grad():
        vision = eager.model.vision_tower(inputs.pixel_values, output_hidden_states=True, output_attentions=True)
        decoder = eager(**inputs, output_hidden_states=True, output_attentions=True)
    return {"vision": vision, "decoder": decoder}


def run(lvlm, inputs):
    with torch.no_grad():
        return lvlm.model(**inputs)


def test_decoder_norms(tiny, inputs, reference):
    with hidden_states(tiny, "decoder") as norms:
        run(tiny, inputs)
    expected = reference["decoder"].hidden_states  # the last one is after the final norm
    real = inputs.attention_mask.bool()
    for layer in (0, 1):
        torch.testing.assert_close(norms[layer][0][real], expected[layer + 1].norm(dim=-1)[real], **close)
    final_norm = tiny.decoder.norm
    with hidden_states(tiny, "decoder", lambda hidden, layer: final_norm(hidden), layers=[-1]) as last:
        run(tiny, inputs)
    assert list(last) == [2]
    torch.testing.assert_close(last[2][0][real], expected[-1][real], **close)


def test_vision_norms(tiny, inputs, reference):
    with hidden_states(tiny, "vision") as norms:
        run(tiny, inputs)
    expected = reference["vision"].hidden_states  # without registers, with CLS
    for layer in range(3):
        assert norms[layer][0].shape == (3, tiny.n_prefix + 16)
        torch.testing.assert_close(
            norms[layer][0][:, tiny.n_prefix :], expected[layer + 1][:, 1:].norm(dim=-1), **close
        )


def test_all_rows(tiny, inputs, reference):
    real = inputs.attention_mask.bool()
    with (
        attention_rows(tiny, "vision", rows="all") as vision,
        attention_rows(tiny, "decoder", rows="all") as decoder,
    ):
        output = run(tiny, inputs)
    assert torch.equal(output.logits, run(tiny, inputs).logits)  # being watched changes nothing, to the bit
    expected = reference["decoder"].logits[real]  # eager adds in another order: float32's error grows with the size
    torch.testing.assert_close(output.logits[real], expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
    for layer in range(3):
        torch.testing.assert_close(vision[layer][0], reference["vision"].attentions[layer], **close)
        expected = reference["decoder"].attentions[layer].transpose(1, 2)[real]  # [real queries, heads, keys]
        torch.testing.assert_close(decoder[layer][0].transpose(1, 2)[real], expected, **close)
        assert (decoder[layer][0].transpose(1, 2)[~real] == 0).all()


def test_the_test_has_something_to_see(reference, inputs):
    """Attention of the tiny models is far from uniform, so that a wrong head order or mask would show."""
    last = reference["decoder"].attentions[1][:, :, -1]  # [batch, heads, keys]
    assert last.max() > 0.2
    assert (last[:, 0] - last[:, 1]).abs().max() > 0.05
    assert not inputs.attention_mask.all()


def test_chosen_rows_and_layers(tiny, inputs, reference):
    with attention_rows(tiny, "decoder", rows=[-1, -3], layers=[2]) as rows:
        run(tiny, inputs)
    assert list(rows) == [2] and rows[2][0].shape[:3] == (3, 4, 2)
    torch.testing.assert_close(rows[2][0], reference["decoder"].attentions[2][:, :, [-1, -3]], **close)


def test_unpadded_batch(tiny, eager, images):
    """Without padding SDPA gets no mask at all and is causal by itself."""
    inputs = tiny.inputs(images, ["how many"] * 3)
    assert inputs.attention_mask.all()
    with attention_rows(tiny, "decoder", rows="all") as rows, attention_received(tiny, "decoder") as received:
        run(tiny, inputs)
    with torch.no_grad():
        expected = eager(**inputs, output_attentions=True).attentions
    n = inputs.input_ids.shape[1]
    for layer in range(3):
        torch.testing.assert_close(rows[layer][0], expected[layer], **close)
        mean = expected[layer].sum(2) / torch.arange(n, 0, -1)  # n - k queries see key k
        torch.testing.assert_close(received[layer][0], mean, **close)


@pytest.mark.parametrize("block", [3, 256])
def test_received(tiny, inputs, reference, block):
    patches = slice(tiny.n_prefix, None)
    with (
        attention_received(tiny, "vision", block=block) as vision,
        attention_received(tiny, "vision", queries=patches, block=block) as from_patches,
        attention_received(tiny, "decoder", block=block) as decoder,
    ):
        run(tiny, inputs)
    for layer in range(3):
        whole = reference["vision"].attentions[layer]
        torch.testing.assert_close(vision[layer][0], whole.mean(2), **close)
        torch.testing.assert_close(from_patches[layer][0], whole[:, :, patches].mean(2), **close)
        for row in range(3):  # each row of the batch as if it stood alone, without its padding
            start = int((inputs.attention_mask[row] == 0).sum())
            a = reference["decoder"].attentions[layer][row, :, start:, start:]  # [heads, n, n]
            expected = a.sum(1) / torch.arange(a.shape[-1], 0, -1)
            torch.testing.assert_close(decoder[layer][0][row, :, start:], expected, **close)
            assert decoder[layer][0][row, :, :start].isnan().all()


def test_padding_does_not_matter(tiny, images, questions):
    together = trace(tiny, images, questions)
    for i in range(3):
        alone = trace(tiny, images[i : i + 1], questions[i : i + 1])
        for name in ("vision_norms", "vision_received", "projected_norms", "decoder_norms", "last_attention"):
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name)[0], atol=1e-4, rtol=1e-4)


def test_generate(tiny, eager, inputs):
    """Rows while decoding with a cache equal the rows of one eager pass over the finished sequence."""
    answer = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, suppress_tokens=[4])
    plain = tiny.model.generate(**inputs, **answer)
    with attention_rows(tiny, "decoder") as rows, hidden_states(tiny, "decoder") as norms:
        sequences = tiny.model.generate(**inputs, **answer)
    assert torch.equal(sequences, plain)
    n = inputs.input_ids.shape[1]
    mask = torch.cat([inputs.attention_mask, torch.ones(3, 4, dtype=torch.long)], dim=1)
    with torch.no_grad():
        whole = eager(
            input_ids=sequences[:, :-1],
            attention_mask=mask,
            pixel_values=inputs.pixel_values,
            output_attentions=True,
            output_hidden_states=True,
        )
    for layer in range(3):
        assert len(rows[layer]) == 5  # the prompt, then four tokens
        for step, weights in enumerate(rows[layer]):
            assert weights.shape == (3, 4, 1, n + step)
            expected = whole.attentions[layer][:, :, n - 1 + step, : n + step]
            torch.testing.assert_close(weights[:, :, 0], expected, **close)
    for step in range(1, 5):
        expected = whole.hidden_states[1][:, n - 1 + step].norm(dim=-1)
        torch.testing.assert_close(norms[0][step][:, 0], expected, **close)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_mask_kinds_agree(mask):
    """A bool mask, a float mask and no mask with the causal flag mean the same."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    masks = {
        "none": None,
        "bool": seen,
        "float": torch.zeros(1, 1, 6, 6).masked_fill(~seen, torch.finfo().min),
    }
    rows = torch.tensor([0, 3, 5])
    weights = _Attention(q, k, masks[mask], causal=mask == "none", scaling=0.3).weights(rows)
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) * 0.3
    expected = scores.masked_fill(~seen, float("-inf")).softmax(-1)[:, :, rows]
    torch.testing.assert_close(weights, expected, **close)


def test_one_query_sees_every_key_without_mask():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 5, 8)
    attention = _Attention(q, k, None, causal=False, scaling=1.0)
    torch.testing.assert_close(attention.weights(torch.tensor([0])), (q @ k.transpose(-1, -2)).softmax(-1))


def test_logits_do_not_change(tiny, inputs):
    plain = run(tiny, inputs).logits
    with (
        hidden_states(tiny, "decoder"),
        attention_rows(tiny, "decoder", rows="all"),
        attention_received(tiny, "decoder"),
        attention_received(tiny, "vision"),
    ):
        watched = run(tiny, inputs).logits
    assert torch.equal(watched, plain)


def footprint(lvlm):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lvlm.model.modules())
    attention = [
        c._attn_implementation
        for c in (lvlm.model.config, lvlm.model.config.vision_config, lvlm.model.config.text_config)
    ]
    watched = [name for name, module in lvlm.model.named_modules() if hasattr(module, "_watchers")]
    return hooks, attention, watched


def test_nothing_stays_behind(tiny, inputs, images, questions):
    run(tiny, inputs)
    before = footprint(tiny)
    assert before[1] == ["sdpa"] * 3
    with hidden_states(tiny, "vision"), attention_rows(tiny, "vision"), attention_received(tiny, "vision"):
        run(tiny, inputs)
        assert footprint(tiny) != before
    assert footprint(tiny) == before

    def fail(weights, layer):
        raise RuntimeError("from the reduction")

    with pytest.raises(RuntimeError, match="from the reduction"):
        with hidden_states(tiny, "decoder", fail), attention_rows(tiny, "decoder", fail):
            run(tiny, inputs)
    assert footprint(tiny) == before
    with pytest.raises(IndexError):
        with attention_rows(tiny, "decoder", rows=10_000):
            run(tiny, inputs)
    with pytest.raises(IndexError):
        with hidden_states(tiny, "decoder", layers=[99]):
            pass
    with pytest.raises(ValueError, match="'vision' or 'decoder'"):
        with attention_rows(tiny, "text"):
            pass
    trace(tiny, images, questions, max_new_tokens=2)
    assert footprint(tiny) == before


def test_restores_eager(tiny, inputs):
    tiny.decoder.set_attn_implementation("eager")
    try:
        with attention_rows(tiny, "decoder") as rows:
            run(tiny, inputs)
        assert tiny.decoder.config._attn_implementation == "eager"
        assert rows[0][0].shape[:3] == (3, 4, 1)
    finally:
        tiny.decoder.set_attn_implementation("sdpa")


def test_trace(tiny, images, questions, inputs, reference):
    vision_passes = []
    with tiny.vision.register_forward_hook(lambda module, args, out: vision_passes.append(len(args[0]))):
        seen = trace(tiny, images, questions, max_new_tokens=4, batch_size=2)
    assert vision_passes == [2, 1]
    assert seen.vision_norms.shape == (3, 3, 16)
    assert seen.vision_received.shape == (3, 3, 2, 16)
    assert seen.projected_norms.shape == (3, 16)
    assert seen.decoder_norms.shape == (3, 3, 16)
    assert seen.last_attention.shape == seen.output_attention.shape == (3, 3, 4, 16)
    assert len(seen.answers) == 3 and all(isinstance(answer, str) for answer in seen.answers)

    visual = tiny.visual_positions(inputs.input_ids)
    for i in range(3):
        for layer in range(3):
            expected = reference["decoder"].attentions[layer][i, :, -1, visual[i]]
            torch.testing.assert_close(seen.last_attention[i, layer], expected, **close)
        for layer in range(2):
            expected = reference["decoder"].hidden_states[layer + 1][i, visual[i]].norm(dim=-1)
            torch.testing.assert_close(seen.decoder_norms[i, layer], expected, **close)
        expected = reference["decoder"].hidden_states[0][i, visual[i]].norm(dim=-1)  # what enters the decoder
        torch.testing.assert_close(seen.projected_norms[i], expected, **close)

    assert trace(tiny, images, questions).output_attention is None


def test_trace_stops_at_the_end_token(tiny, images, monkeypatch):
    """The mean over an answer's queries leaves out what follows its end token."""
    generate = type(tiny.model).generate
    first = trace(tiny, images, ["how many"] * 3, max_new_tokens=1)
    torch.testing.assert_close(first.output_attention, first.last_attention)

    def with_end(model, **kwargs):
        out = generate(model, **kwargs)
        out.sequences[0, -4] = 2  # </s> as the first token of the first answer
        return out

    monkeypatch.setattr(type(tiny.model), "generate", with_end)
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [2])
    seen = trace(tiny, images, ["how many"] * 3, max_new_tokens=4)
    torch.testing.assert_close(seen.output_attention[0], seen.last_attention[0])
    assert (seen.output_attention[1] - seen.last_attention[1]).abs().max() > 1e-4


def test_until_end():
    tokens = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 9, 2, 0], [7, 3, 2, 2]])
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert until_end(tokens, [2, 3]).tolist() == expected
    assert until_end(tokens, []).tolist() == [[1] * 4] * 4
    assert until_end(tokens, [9]).tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0], [1] * 4]


def test_hidden_dimensions_of_a_group(tiny, images, questions):
    """How the study finds sink dimensions: a group's mean |RMSNorm(x)| at each decoder layer, by hook."""
    seen = trace(tiny, images, questions)
    group = sinks.NORM_CRITERIA["percentile"](seen.vision_norms[:, tiny.feature_layer], 80)  # [images, patches]
    inputs = tiny.inputs(images, questions)
    visual = tiny.visual_positions(inputs.input_ids)

    def profile(hidden, layer):
        patches = hidden.gather(1, visual[..., None].expand(-1, -1, hidden.shape[-1]))
        return sinks.dimension_profile(patches, group)

    with hidden_states(tiny, "decoder", profile) as profiles:
        run(tiny, inputs)
    assert all(calls[0].shape == (32,) and torch.isfinite(calls[0]).all() for calls in profiles.values())


def test_bfloat16(tiny, images, questions):
    half = loading.load(tiny.name, dtype="bfloat16")
    seen = trace(half, images, questions, max_new_tokens=2)
    assert all(
        getattr(seen, name).dtype == torch.float32
        for name in ("vision_norms", "vision_received", "decoder_norms", "last_attention", "output_attention")
    )
    torch.testing.assert_close(  # 8 bits of mantissa
        seen.vision_norms, trace(tiny, images, questions).vision_norms, atol=0.1, rtol=0.05
    )


def test_trace_needs_one_question_per_image(tiny, images):
    with pytest.raises(ValueError, match="3 images and 1 questions"):
        trace(tiny, images, ["how many"])
    with pytest.raises(ValueError, match="3 images and 4 questions"):  # the fourth is not passed over
        next(tiny.batches(images, 2, ["how many"] * 4))
    with pytest.raises(ValueError, match="no images"):
        trace(tiny, [], [])


def test_lab_model_against_eager(lab):
    """The real thing, once: both sides of a lab model, a padded batch of two."""
    pixels = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = lab.inputs(list(pixels), ["how many ?", "what is the dominant texture of the scene ?"])
    with attention_received(lab, "vision") as received, attention_rows(lab, "decoder") as rows:
        logits = run(lab, inputs).logits[:, -1]
    try:
        lab.model.set_attn_implementation("eager")
        with torch.no_grad():
            vision = lab.vision(inputs.pixel_values, output_attentions=True).attentions
            decoder = lab.model(**inputs, output_attentions=True)
    finally:
        lab.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits, decoder.logits[:, -1], atol=1e-3, rtol=1e-4)
    for layer in received:
        torch.testing.assert_close(received[layer][0], vision[layer].mean(2), **close)
    for layer in rows:
        torch.testing.assert_close(rows[layer][0], decoder.attentions[layer][:, :, -1:], **close)
