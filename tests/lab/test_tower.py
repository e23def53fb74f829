"""The towers' objective, and what is logged while they train."""

import json

import pytest
import torch
from scipy.stats import kurtosis, spearmanr
from torch import nn
from transformers import CLIPVisionModel
from transformers.models.qwen2_vl import modeling_qwen2_vl

from sinkstudy.lab import tower as t
from sinkstudy.lab.emergence import PATCHES, Follower, log_spaced
from sinkstudy.model.registers import CLIPVisionModelWithRegisters
from sinkstudy.world import gist
from sinkstudy.world.drawing import render

HEADS = 2


# ----------------------------------------------------------------------------------------- the towers
def test_the_kinds_start_from_the_same_weights():
    plain, sinks, registers = (t.build(kind).state_dict() for kind in ("plain", "sinks", "registers"))
    assert set(plain) == set(sinks) and set(registers) - set(plain) == {"embeddings.register_tokens"}
    assert all(torch.equal(plain[k], sinks[k]) and torch.equal(plain[k], registers[k]) for k in plain)
    known = "plain, sinks, gist, registers, no-cls, qwen2vl"
    with pytest.raises(ValueError, match=f"unknown tower 'big': choose from {known}"):
        t.build("big")


@pytest.mark.parametrize("kind", ["plain", "registers"])
def test_states_are_the_hidden_states_of_the_hugging_face_model(kind):
    """`states` skips the model's own forward; LLaVA will not."""
    tower = t.build(kind).eval()
    pixels = t.normalise(render("val", 0, 2).images)
    with torch.no_grad():
        ours = t.states(tower, pixels)
        tower.set_attn_implementation("eager")
        theirs = tower(pixels, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == t.LAYERS + 1
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[:, -PATCHES:], b[:, 1:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a[:, 0], b[:, 0], atol=1e-4, rtol=1e-4)


def test_states_of_qwen2vl_are_those_of_its_own_forward():
    """Batched and row by row here; there one picture after the other, the patches of a visual token together."""
    tower = t.build("qwen2vl").eval()
    pixels = t.normalise(render("val", 0, 3).images)
    with torch.no_grad():
        ours = t.states(tower, pixels)
        tower.set_attn_implementation("eager")
        packed = t.patched(pixels)[:, t.blocks()].flatten(0, 1)
        theirs = tower(packed, grid_thw=torch.tensor([[1, 12, 12]] * 3), output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == t.LAYERS + 1
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[:, t.blocks()].flatten(0, 1), b, atol=1e-4, rtol=1e-4)
    assert torch.equal(t.features(tower, ours), ours[-1])


def test_without_cls_there_are_only_patches():
    pixels = t.normalise(render("val", 0, 1).images)
    with torch.no_grad():
        assert all(h.shape == (1, PATCHES, t.WIDTH) for h in t.states(t.build("no-cls"), pixels, cls=False))


def test_normalise_is_about_standard():
    pixels = t.normalise(render("train", 0, 256).images)
    assert pixels.mean((0, 2, 3)).abs().max() < 0.25 and (pixels.std((0, 2, 3)) - 1).abs().max() < 0.15


def test_the_captioner_cannot_look_ahead():
    torch.manual_seed(0)
    decoder, patches = t.CaptionDecoder(20, 12).eval(), torch.randn(2, PATCHES, t.WIDTH)
    words = torch.randint(0, 20, (2, 10))
    changed = words.clone()
    changed[:, 6:] = 3
    with torch.no_grad():
        a, b, c = decoder(words, patches), decoder(changed, patches), decoder(words, patches.flip(0))
    torch.testing.assert_close(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:]) and not torch.allclose(a, c)


# --------------------------------------------------------------------------------- the planting terms
@pytest.fixture
def calm() -> torch.Tensor:
    mask = torch.zeros(3, PATCHES)
    for image, patches in enumerate(((0, 50, 143), (1, 2, 3, 4), (7, 70, 77, 100, 101))):
        mask[image, list(patches)] = 1.0
    return mask


def planted(calm: torch.Tensor, ratio: float, mass: float) -> tuple[nn.Module, list[torch.Tensor]]:
    """A tower's hidden states and attention in which calm patches have `ratio` times the norm of the others, and
    draw `mass` of the attention of every token."""
    n, layers = len(calm), t.LAYERS
    hidden = []
    for i in range(layers + 1):
        direction = torch.nn.functional.normalize(
            torch.randn(n, 1 + PATCHES, t.WIDTH, generator=torch.Generator().manual_seed(i)), dim=-1)
        norms = torch.cat([torch.full((n, 1), 90.0), 2.0 * torch.where(calm > 0, ratio, 1.0)], 1)  # CLS must not count
        hidden.append(direction * norms[..., None])
    row = calm / calm.sum(1, keepdim=True) * mass + (1 - calm) / (1 - calm).sum(1, keepdim=True) * (1 - mass) * 0.5
    row = torch.cat([1 - row.sum(1, keepdim=True), row], 1)  # CLS gets the rest
    weights = row[:, None, None].expand(n, HEADS, 1 + PATCHES, 1 + PATCHES)
    tower = nn.Module()
    tower.encoder = nn.Module()
    tower.encoder.layers = nn.ModuleList(nn.Module() for _ in range(layers))
    for layer in tower.encoder.layers:
        layer.self_attn = nn.Module()
        layer.self_attn.weights = weights.clone()
    return tower, hidden


def test_planting_asks_for_nothing_where_its_conditions_hold(calm):
    norm, attention, seen = t.Objective._planting(*planted(calm, t.NORM_RATIO + 0.1, t.MASS[0] + 0.01), calm)
    assert norm == 0 and attention == 0
    assert seen["norm ratio"] == pytest.approx(t.NORM_RATIO + 0.1, rel=1e-4)
    assert seen["attention share"] == pytest.approx(t.MASS[0] + 0.01, rel=1e-4)


@pytest.mark.parametrize("ratio, mass, norm_asked, attention_asked", [
    (1.0, 0.5, True, False), (t.NORM_RATIO * 0.9, 0.5, True, False), (9.0, 0.05, False, True), (1.0, 0.0, True, True),
    (9.0, 0.9, False, True)])
def test_planting_asks_where_they_do_not(calm, ratio, mass, norm_asked, attention_asked):
    norm, attention, _ = t.Objective._planting(*planted(calm, ratio, mass), calm)
    assert (norm > 0) == norm_asked and (attention > 0) == attention_asked
    if norm_asked:
        torch.testing.assert_close(norm, torch.tensor(t.NORM_RATIO / ratio).log(), atol=1e-4, rtol=1e-4)
    if attention_asked and mass:
        excess = t.MASS[0] / mass if mass < t.MASS[0] else mass / t.MASS[1]
        torch.testing.assert_close(attention, torch.tensor(excess).log(), atol=1e-4, rtol=1e-4)


def test_planting_keeps_busy_patches_quiet(calm):
    tower, hidden = planted(calm, t.NORM_RATIO + 1, t.MASS[0] + 0.1)
    busy = int((calm[0] == 0).nonzero()[5])
    for layer in range(t.ONSET, t.LAYERS + 1):
        hidden[layer][0, 1 + busy] *= 2 * t.QUIET_RATIO
    norm, attention, _ = t.Objective._planting(tower, hidden, calm)
    assert norm > 0 and attention == 0


def test_planting_begins_at_the_onset(calm):
    """What lies before the onset is free: the states up to layer ONSET - 1, the attention of layers up to ONSET."""
    tower, hidden = planted(calm, t.NORM_RATIO + 1, t.MASS[0] + 0.1)
    for layer in range(t.ONSET):
        hidden[layer] = torch.randn_like(hidden[layer])
        tower.encoder.layers[layer].self_attn.weights.fill_(1 / (1 + PATCHES))
    norm, attention, _ = t.Objective._planting(tower, hidden, calm)
    assert norm == 0 and attention == 0
    tower, hidden = planted(calm, t.NORM_RATIO + 1, t.MASS[0] + 0.1)
    hidden[t.ONSET] = torch.randn_like(hidden[t.ONSET])
    tower.encoder.layers[t.ONSET].self_attn.weights.fill_(1 / (1 + PATCHES))
    norm, attention, _ = t.Objective._planting(tower, hidden, calm)
    assert norm > 0 and attention > 0


@pytest.mark.parametrize("kind", t.TOWER_KINDS)
def test_objective_is_finite_and_reaches_the_tower(kind):
    torch.manual_seed(0)
    scenes = render("train", 0, 4)
    tower, objective = t.build(kind), t.Objective(kind, words=30, length=12, ngrams=9)
    caption = torch.randint(0, 30, (4, 12))
    caption[:, 9:] = -1
    grounding = torch.randint(-1, 2, (4, 12, 12, 6))
    facts = torch.stack(list(gist.fact_classes(scenes).values()), 1)
    args = (t.normalise(scenes.images), caption, torch.randint(0, 2, (4, 9)).float(), grounding, scenes.calm, facts)
    loss, values = objective(tower, *args, 0.0)
    loss.backward()
    assert torch.isfinite(loss) and json.dumps(values)
    assert ("norm term" in values) == (kind in ("sinks", "gist"))  # only these are asked for sinks
    missing = {n for n, p in tower.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}
    # nothing reads CLS or the projection's norm where the pooled token is not CLS
    allowed = {"post_layernorm.weight", "post_layernorm.bias", "embeddings.class_embedding"}
    assert all(n in allowed or n.endswith("k_proj.bias") or n.startswith("merger.") or kind == "no-cls"
               for n in missing), missing
    if kind == "registers":
        assert tower.embeddings.register_tokens.grad.abs().sum() > 0
    # the grounding loss fades out
    with torch.no_grad():
        late, again = objective(tower, *args, t.FADE)[0], objective(tower, *args, 1.0)[0]
    assert late < loss.item() and torch.equal(late, again)


# ------------------------------------------------------------------------------------------ emergence
@pytest.fixture(scope="module", params=["plain", "registers", "no-cls", "qwen2vl"])
def followed(request):
    """A random tower with outlier norms, the follower's table, and an eager copy's norms and attention."""
    kind = request.param
    tower = t.build(kind, seed=4)
    with torch.no_grad():
        if kind == "qwen2vl":
            tower.blocks[3].mlp.fc2.weight *= 20
            for block in tower.blocks:
                block.attn.qkv.weight[:t.WIDTH] *= 3
        else:
            tower.encoder.layers[3].mlp.fc2.weight *= 20
            for layer in tower.encoder.layers:
                layer.self_attn.q_proj.weight *= 3
    follower = Follower(kind, {0, 8})
    follower.pixels, follower.calm, follower.thing = (v[:12] for v in (
        follower.pixels, follower.calm, follower.thing))
    for step in (0, 1, 8, 8):
        follower(tower, step)
    scenes = render("val", 0, 12)
    norms, attention = [], []
    if kind == "no-cls":  # no transformers model lacks CLS: one layer after the other, with hand-made attention
        x = tower.pre_layrnorm(tower.embeddings(t.normalise(scenes.images))[:, 1:])
        with torch.no_grad():
            for layer in tower.encoder.layers:
                inner = layer.layer_norm1(x)
                q, k = (p(inner).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                        for p in (layer.self_attn.q_proj, layer.self_attn.k_proj))
                attention.append((q @ k.mT / q.shape[-1]**0.5).softmax(-1))
                x = layer(x, attention_mask=None)
                norms.append(x.norm(dim=-1))
    elif kind == "qwen2vl":  # its own forward gives no weights: the eager function is listened to
        packed = t.patched(t.normalise(scenes.images))[:, t.blocks()].flatten(0, 1)
        tower.set_attn_implementation("eager")
        seen, plain, raster = [], modeling_qwen2_vl.eager_attention_forward, t.blocks().argsort()
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(modeling_qwen2_vl, "eager_attention_forward",
                          lambda *args, **kwargs: seen.append(plain(*args, **kwargs)) or seen[-1])
            out = tower(packed, grid_thw=torch.tensor([[1, 12, 12]] * 12), output_hidden_states=True)
        norms = [h.unflatten(0, (12, -1))[:, raster].norm(dim=-1) for h in out.hidden_states[1:]]
        weights = torch.cat([w for _, w in seen])[:, :, raster][..., raster]  # [layers · 12, heads, 144, 144]
        attention = list(weights.unflatten(0, (t.LAYERS, 12)))
    else:
        model = {"plain": CLIPVisionModel, "registers": CLIPVisionModelWithRegisters}[kind](tower.config).eval()
        model.load_state_dict(tower.state_dict())
        model.set_attn_implementation("eager")
        with torch.no_grad():
            out = model(t.normalise(scenes.images), output_hidden_states=True, output_attentions=True)
        norms = [h[:, 1:].norm(dim=-1) for h in out.hidden_states[1:]]
        attention = list(out.attentions)
    return follower, scenes, norms, attention


def test_follower_measures_at_the_chosen_steps_once(followed):
    table = followed[0].table()
    assert table[["step", "layer"]].values.tolist() == [[s, i] for s in (0, 8) for i in range(1, t.LAYERS + 1)]
    assert table.notna().all(axis=None)


def test_follower_agrees_with_eager_attention(followed):
    follower, scenes, norms, attention = followed
    calm, thing = scenes.calm.flatten(1).numpy(), (scenes.thing_share.flatten(1) > 0.5).numpy()
    for row in follower.rows[:t.LAYERS]:
        x = norms[row["layer"] - 1].double().numpy()
        full = attention[row["layer"] - 1].double().numpy()  # [images, heads, queries, keys]
        keys = full.shape[-1]
        alpha = full.mean(2)
        got = alpha[:, :, keys - PATCHES:]
        each = got.mean(1)
        outlier = x > x.mean(1, keepdims=True) + 3 * x.std(1, keepdims=True)
        top = [int(a.argmax()) for a in each]
        n_out = max(1, outlier.sum())
        wanted = {
            "max_over_median": sum(v.max() / sorted(v)[71:73][0] for v in x) / len(x),
            "share_above_3sd": outlier.mean(),
            "kurtosis": kurtosis(x, axis=1).mean(),
            "attention_max": sum(a.max() for a in each) / len(each) * keys,
            "attention_outliers": each[outlier].sum() / n_out * keys,
            "attention_calm": each[calm].mean() * keys,
            "attention_prefix": alpha[:, :, :keys - PATCHES].sum(2).mean(),
            "sink_epsilon": sum(bool((h > 0.3).any()) for image in got for h in image) / got[..., 0].size,
            "sink_epsilon_any": sum(bool((h > 0.3).any()) for image in alpha for h in image) / alpha[..., 0].size,
            "outliers_on_calm": calm[outlier].sum() / n_out,
            "outliers_on_things": thing[outlier].sum() / n_out,
            "attended_on_calm": sum(bool(calm[i, k]) for i, k in enumerate(top)) / len(top),
            "attended_on_things": sum(bool(thing[i, k]) for i, k in enumerate(top)) / len(top),
            "norm_attention_rank": spearmanr(x.ravel(), each.ravel()).statistic,
            "calm_norm_ratio": x[calm].mean() / sorted(x[~calm])[(int((~calm).sum()) - 1) // 2],
            "area_calm": calm.mean(),
            "area_things": thing.mean(),
        }
        for name, value in wanted.items():
            tolerance = 0.02 if name == "max_over_median" else 2e-3  # which of the two middle norms is the median
            assert row[name] == pytest.approx(float(value), rel=tolerance, abs=1e-5), (row["layer"], name)
        assert row["median"] == pytest.approx(sorted(x.ravel())[x.size // 2], rel=1e-2)
        assert row["p99"] == pytest.approx(sorted(x.ravel())[int(0.99 * x.size)], rel=3e-2)


def test_follower_leaves_the_tower_as_it_was(followed):
    tower = t.build("plain")
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    follower = Follower("plain", {3})
    follower.pixels, follower.calm, follower.thing = (v[:2] for v in (follower.pixels, follower.calm, follower.thing))
    follower(tower, 3)
    assert all(torch.equal(before[k], v) for k, v in tower.state_dict().items())
    assert all(p.grad is None for p in tower.parameters())
    assert not any(layer.self_attn.keep_weights or layer.self_attn.weights is not None
                   for layer in tower.encoder.layers)


def test_log_spaced():
    steps = sorted(log_spaced(900))
    assert steps[:7] == [0, 1, 2, 4, 8, 16, 32] and steps[-1] == 900 and {64, 128, 256, 512} <= set(steps)
    assert max(b / a for a, b in zip(steps[1:], steps[2:])) <= 2
    assert sorted(log_spaced(3)) == [0, 1, 2, 3]
