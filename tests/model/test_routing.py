"""Training-free methods on a tiny random instance of every architecture: identities, invariants, independent ways."""

import architectures
import numpy as np
import pytest
import torch
from PIL import Image

from sinkstudy import models, routing
from sinkstudy.capture import attention_rows
from sinkstudy.models import SPECS

close = dict(atol=2e-5, rtol=1e-4)
SIZES = [(48, 32), (32, 64), (64, 64)]  # (width, height)
QUESTIONS = ["how many", "what is the texture", "what is the texture red blue yes no"]
TWO = routing.top(2)


@pytest.fixture(scope="module", params=architectures.ARCHITECTURES)
def lvlm(request, tmp_path_factory) -> models.LVLM:
    folder = tmp_path_factory.mktemp(request.param)
    architectures.write(folder, request.param)
    return models.load(str(folder))


@pytest.fixture(scope="module")
def inputs(lvlm):
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in SIZES]
    return lvlm.inputs(pictures, QUESTIONS)


@pytest.fixture(scope="module")
def plain(lvlm, inputs):
    return logits(lvlm, inputs)


@torch.no_grad()
def logits(lvlm, inputs) -> torch.Tensor:
    return lvlm.model(**inputs).logits


@torch.no_grad()
def watched(lvlm, inputs) -> dict:
    """What the decoder is called with, and what the whole model says."""
    seen = {}

    def keep(module, args, kwargs):
        seen.update(kwargs)

    hook = lvlm.decoder.register_forward_pre_hook(keep, with_kwargs=True)
    seen["logits"] = lvlm.model(**inputs).logits
    hook.remove()
    return seen


def keeper(lvlm):
    """A list that will hold the norms of the patches of the batch, and the `before` that puts them there."""
    norms = []

    def keep(patches, layer):
        if layer == lvlm.feature_layer:
            norms.append(patches.norm(dim=-1))
        return patches

    return norms, keep


def real(inputs) -> torch.Tensor:
    """Tokens that are no padding: what padding says is nobody's business."""
    return inputs["attention_mask"].bool()


@pytest.mark.parametrize("ids", ["travel", "renumber"])
def test_moving_nothing_or_all_changes_nothing(lvlm, inputs, plain, ids):
    for select in (lambda norms: norms < 0, lambda norms: norms >= 0):
        with routing.reordered(lvlm, inputs, select, ids=ids):
            if lvlm.spec.anyres and select(torch.ones(1)).all():
                continue  # newline tokens are never moved, so they would come last
            assert torch.equal(logits(lvlm, inputs), plain)


@pytest.mark.parametrize("to", ["front", "end"])
def test_order_and_ids(lvlm, inputs, to):
    """Each image's tokens: the two of highest norm first (or last), the rest in order; ids with them or not."""
    layouts = lvlm.layout(inputs)
    norms, keep = keeper(lvlm)
    with lvlm.editing(before=keep):
        before = watched(lvlm, inputs)
    for ids in ("travel", "renumber"):
        with routing.reordered(lvlm, inputs, TWO, to, ids):
            after = watched(lvlm, inputs)
        for layout in layouts:
            strongest = set(norms[0][layout.connector].topk(2).indices.tolist())
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
            mask = layout.lift(TWO(norms[-1][layout.connector]), "any")
            in_order = start + torch.cat([mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]])
            # Qwen2.5-VL's connector reads windows; behind it tokens are put back in order
            at = window[start:start + len(mask)] if window is not None else torch.arange(start, start + len(mask))
            order[at] = window[in_order] if window is not None else in_order
            start += len(mask)
        return tokens[order]

    window = lvlm._window_order(inputs)
    with lvlm.editing(before=keep, after=permuted):
        other = logits(lvlm, inputs)
    with routing.reordered(lvlm, inputs, TWO, "front", "renumber"):
        torch.testing.assert_close(logits(lvlm, inputs)[real(inputs)], other[real(inputs)], **close)


def test_where_image_tokens_see_each_other_travelling_changes_nothing(lvlm, inputs, plain):
    """Order is then a matter of the ids alone."""
    with routing.reordered(lvlm, inputs, TWO, "front", "travel"):
        moved = logits(lvlm, inputs)
    text = real(inputs) & (inputs["input_ids"] != lvlm.image_token_id)
    same = torch.allclose(moved[text], plain[text], **close)
    assert same == lvlm.spec.prefix_mask or lvlm.model.config.model_type == "gemma3"


@pytest.mark.parametrize("method", [
    lambda lvlm, inputs: routing.reordered(lvlm, inputs, TWO),
    lambda lvlm, inputs: routing.reordered(lvlm, inputs, TWO, "end", "renumber"),
    lambda lvlm, inputs: routing.gated(lvlm, inputs, TWO, 2.0, 0.5),
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
    with routing.gated(lvlm, inputs, TWO, 1.0):
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
    with routing.gated(lvlm, inputs, TWO, 0.5, layers=[1]):
        after = scores()
    for layout in layouts:
        mask = layout.lift(TWO(norms[0][layout.connector]), "any")
        row, visual = layout.row, layout.visual
        other = visual[~mask][-1]
        was, now = ((s[1][row][:, visual] - s[1][row][:, other, None]) for s in (before, after))  # [heads, visual]
        seen = was.isfinite()
        assert torch.equal(seen, now.isfinite()) and seen[:, ~mask].any()
        torch.testing.assert_close(now[seen & ~mask], was[seen & ~mask], **close)
        assert not seen[:, mask].any() or not torch.allclose(now[seen & mask], was[seen & mask], atol=1e-3)


def test_weights_of_one_change_nothing_and_others_scale_the_tokens(lvlm, inputs, plain):
    with routing.reweighted(lvlm, inputs, TWO):
        assert torch.equal(logits(lvlm, inputs), plain)
    if lvlm.spec.anyres:
        return  # tokens are mixed and padding is cut off behind the connector
    before = watched(lvlm, inputs)["inputs_embeds"]
    with routing.reweighted(lvlm, inputs, TWO, 0.25, 3.0):
        after = watched(lvlm, inputs)["inputs_embeds"]
    ratios = (after / before)[inputs["input_ids"] == lvlm.image_token_id]
    one = [0.25, 3.0]
    assert all(min(abs(r - w) for w in one) < 1e-3 for r in ratios.median(-1).values.tolist())
    counts = [int((torch.isclose(r, torch.tensor(0.25), atol=1e-3)).sum()) for r in
              (after / before).median(-1).values]
    layouts = lvlm.layout(inputs)
    assert all(1 <= count <= 2 for count in counts) and len(counts) == len(layouts)


def test_nothing_is_left_behind(lvlm, inputs, plain):
    with pytest.raises(KeyError), routing.reordered(lvlm, inputs, TWO):
        raise KeyError
    assert not lvlm.decoder._forward_pre_hooks and not lvlm.connector._forward_pre_hooks
    assert torch.equal(logits(lvlm, inputs), plain)


def test_random_others():
    norms = torch.tensor([5.0, 1, 4, 2, 3, 0.5, 0.7, 0.2])
    drawn = [routing.at_random(TWO, seed)(norms) for seed in range(300)]
    assert all(mask.sum() == 2 and not mask[[0, 2]].any() for mask in drawn)
    shares = torch.stack(drawn).float().mean(0)[[1, 3, 4, 5, 6, 7]]
    assert (shares - 1 / 3).abs().max() < 4 * (2 / 9 / 300) ** 0.5
    assert torch.equal(routing.at_random(TWO, 1)(norms), routing.at_random(TWO, 1)(norms * 1.0001))
    other = routing.at_random(TWO, 1)(norms.flip(0))
    assert not torch.equal(other.flip(0), drawn[1]) or not torch.equal(other, drawn[1])


def test_bad_choices(lvlm, inputs):
    with pytest.raises(ValueError, match="'front' or 'end'"), routing.reordered(lvlm, inputs, TWO, "back"):
        pass
    assert set(SPECS)
