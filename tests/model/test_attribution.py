"""Attributions against closed forms, planted answers, brute force and Captum's own route for pictures."""

from functools import cache
from itertools import permutations
from types import SimpleNamespace

import architectures
import noise
import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, ImageMaskInput, LLMAttribution
from PIL import Image

from sinkstudy.analyses import attribution

TEXTS = ["how many", "what is the texture red blue", "what is the texture"]
ANSWERS = ["red", "blue texture yes", "no"]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return noise.pictures([(32, 32)] * 3)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A function from an architecture's name to its model, loaded once."""
    return cache(lambda name: architectures.load(tmp_path_factory.mktemp(name), name))


@torch.no_grad()
def one_by_one(lvlm, picture, question, answer) -> float:
    """log p(answer) token by token, each in a pass of its own over the picture: the definition."""
    inputs = lvlm.inputs([picture], [question])
    total = 0.0
    for token in lvlm.processor.tokenizer.encode(answer, add_special_tokens=False):
        total += lvlm.model(**inputs).logits[0, -1].log_softmax(-1)[token].item()
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                further = {"input_ids": token, "attention_mask": 1}.get(name, 0)
                inputs[name] = torch.cat([inputs[name], torch.tensor([[further]], dtype=inputs[name].dtype)], dim=1)
    return total


@pytest.mark.parametrize("name", list(architectures.ARCHITECTURES))
def test_log_prob_is_that_of_the_model(name, loaded, pictures):
    lvlm = loaded(name)
    answers = ["red", "blue", "no"] if name == "paligemma" else ANSWERS
    f = attribution.answer_log_prob(lvlm, pictures, TEXTS, answers, batch_size=2)
    expected = [one_by_one(lvlm, *row) for row in zip(pictures, TEXTS, answers)]
    np.testing.assert_allclose(f.values(batch_size=2), expected, atol=2e-4)
    np.testing.assert_allclose(f.take([2, 0]).values(), [expected[2], expected[0]], atol=2e-4)
    # and each row reads the tokens that it is given, not its own
    swapped = f(f.tokens[[1, 0]], torch.tensor([0, 0]))
    assert swapped[1] == pytest.approx(expected[0], abs=2e-4) and abs(swapped[0] - swapped[1]) > 1e-3


def test_an_answer_of_several_tokens_is_refused_where_the_prompt_sees_itself(loaded, pictures):
    with pytest.raises(ValueError, match="must be one token"):
        attribution.answer_log_prob(loaded("paligemma"), pictures, TEXTS, ANSWERS)


def test_bad_rows_are_named(loaded, pictures):
    with pytest.raises(ValueError, match="got 3, 2, 3"):
        attribution.answer_log_prob(loaded("llava"), pictures, TEXTS[:2], ANSWERS)
    large = [Image.new("RGB", (64, 64)), *pictures[1:]]
    with pytest.raises(ValueError, match="one size"):
        attribution.answer_log_prob(loaded("qwen2_vl"), large, TEXTS, ANSWERS)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_integrated_gradients_and_shapley_values_are_complete(name, loaded, pictures):
    f = attribution.answer_log_prob(loaded(name), pictures, TEXTS, ANSWERS)
    baseline = f.tokens.mean((0, 1))
    change = f.values() - f.values(baseline.expand_as(f.tokens))
    assert change.abs().min() > 0.01
    found, delta = attribution.integrated_gradients(f, baseline, steps=200, batch_size=100)
    torch.testing.assert_close(found.sum(1), change, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(delta, found.sum(1) - change, atol=1e-4, rtol=0)
    groups = torch.arange(f.tokens.shape[1]).expand(3, -1) % 3
    values = attribution.shapley(f, baseline, groups, samples=2)
    torch.testing.assert_close(values.sum(1), change, atol=1e-4, rtol=1e-4)


def test_gradient_x_activation_is_the_slope_along_a_token(loaded, pictures):
    f = attribution.answer_log_prob(loaded("llava"), pictures, TEXTS, ANSWERS)
    found = attribution.gradient_x_activation(f, batch_size=2)
    step = 1e-2
    for token in (0, 7, 15):
        longer, shorter = f.tokens.clone(), f.tokens.clone()
        longer[:, token] *= 1 + step
        shorter[:, token] *= 1 - step
        slope = (f.values(longer) - f.values(shorter)) / (2 * step)
        torch.testing.assert_close(found[:, token], slope, atol=5e-3, rtol=2e-2)


# --- closed forms, on functions that stand in for a model ---


def toy(function, tokens) -> attribution.AnswerLogProb:
    """Attributions of function(tokens [m, n, width], rows) in the place of a model's log p."""

    class Toy(attribution.AnswerLogProb):
        def __call__(self, tokens, rows):
            return function(tokens, rows)

    return Toy(None, tokens, [], {}, torch.empty(0), SimpleNamespace(), [])


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0))


def test_a_linear_function_is_attributed_in_closed_form(tokens):
    weights = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(1))  # of each row its own
    f = toy(lambda x, rows: (x * weights[rows]).sum((1, 2)), tokens)
    baseline = torch.randn(4, generator=torch.Generator().manual_seed(2))
    expected = ((tokens - baseline) * weights).sum(-1)
    found, delta = attribution.integrated_gradients(f, baseline, steps=3, batch_size=7)
    torch.testing.assert_close(found, expected)
    assert delta.abs().max() < 1e-4
    torch.testing.assert_close(attribution.gradient_x_activation(f, batch_size=2), (tokens * weights).sum(-1))
    groups = torch.tensor([[0, 0, 1, 1, 2, 3]]).expand(5, -1)
    by_group = torch.zeros(5, 4).index_add(1, groups[0], expected)
    torch.testing.assert_close(attribution.group_ablation(f, baseline, groups, batch_size=2), by_group)
    torch.testing.assert_close(attribution.shapley(f, baseline, groups, samples=3, batch_size=2), by_group)


def test_integrated_gradients_of_a_square_halve_what_the_gradient_says(tokens):
    f = toy(lambda x, rows: x.square().sum((1, 2)), tokens)
    found, _ = attribution.integrated_gradients(f, torch.zeros(4), steps=4)
    torch.testing.assert_close(found, tokens.square().sum(-1))
    torch.testing.assert_close(attribution.gradient_x_activation(f), 2 * tokens.square().sum(-1))


def test_shapley_values_of_a_game_with_interaction_are_those_of_all_orders(tokens):
    """Groups that help only together share what they bring; one that is absent in a row gets nothing."""
    groups = torch.tensor([[0, 1, 2, 2, 1, 0]] * 4 + [[0, 1, 1, 1, 1, 0]])
    present = lambda x: (x.abs().sum(-1) > 0).float()  # noqa: E731

    def game(x, rows):
        here = torch.stack([(present(x) * (groups[rows] == g)).amax(1) for g in range(3)], dim=1)
        return 2 * here[:, 0] * here[:, 1] + 3 * here[:, 2]

    found = attribution.shapley(toy(game, tokens), torch.zeros(4), groups, samples=400)
    for row, there in ((0, (0, 1, 2)), (4, (0, 1))):
        expected = torch.zeros(3)
        orders = list(permutations(there))
        for order in orders:
            for i, g in enumerate(order):
                value = lambda some: 2 * (0 in some and 1 in some) + 3 * (2 in some)  # noqa: E731
                expected[g] += (value(order[: i + 1]) - value(order[:i])) / len(orders)
        torch.testing.assert_close(found[row], expected, atol=0.15, rtol=0)
        assert (found[row][expected == 0] == 0).all()
    repeated = attribution.shapley(toy(game, tokens), torch.zeros(4), groups, samples=2, seed=3)
    assert torch.equal(repeated, attribution.shapley(toy(game, tokens), torch.zeros(4), groups, samples=2, seed=3))


def test_deletion_and_insertion_replace_the_tokens_of_highest_score(tokens):
    f = toy(lambda x, rows: x[..., 0].sum(1), tokens)
    scores = tokens[..., 0]
    ordered = scores.sort(dim=1, descending=True).values
    found = attribution.perturbed(f, scores, torch.zeros(4), [0, 1, 4, 6], batch_size=2)
    torch.testing.assert_close(found, torch.stack([ordered[:, k:].sum(1) for k in (0, 1, 4, 6)], dim=1))
    found = attribution.perturbed(f, scores, torch.zeros(4), [0, 1, 4, 6], keep=True)
    torch.testing.assert_close(found, torch.stack([ordered[:, :k].sum(1) for k in (0, 1, 4, 6)], dim=1))


# --- planted: a model that needs one token ---


def test_the_one_token_that_the_decoder_can_see_gets_everything(loaded, pictures):
    """Later tokens are kept from all visual tokens but the sixth."""
    lvlm = loaded("llava")
    f = attribution.answer_log_prob(lvlm, pictures, ["how many"] * 3, ["red", "blue", "no"])
    visual = f.layouts[0].visual
    hidden = torch.cat([visual[:5], visual[6:]])

    def blind(module, args, kwargs):
        n = args[0].shape[1]
        seen = torch.ones(n, n).tril().bool()
        seen[visual[-1] + 1 :, hidden] = False
        seen[visual[5], hidden] = False  # nor does the sixth gather what the others hold
        return args, {**kwargs, "attention_mask": seen[None, None]}

    hooks = [layer.register_forward_pre_hook(blind, with_kwargs=True) for layer in lvlm.decoder_layers]
    try:
        baseline = f.tokens.mean((0, 1))
        integrated, _ = attribution.integrated_gradients(f, baseline, steps=8)
        ablated = attribution.group_ablation(f, baseline, torch.arange(16).expand(3, -1))
        curve = attribution.perturbed(f, integrated.abs(), baseline, [0, 1, 16])
    finally:
        for hook in hooks:
            hook.remove()
    for found in (integrated, ablated):
        others = torch.arange(16) != 5
        assert (found[:, 5].abs() > 1e-3).all() and found[:, others].abs().max() < 1e-5
    torch.testing.assert_close(curve[:, 1], curve[:, 2])  # one token taken is all taken


# --- pixels ---


def test_occlusion_is_that_of_captum(loaded, pictures):
    """Captum's own route for pictures takes one at a time; the colour is the picture's mean."""
    lvlm = loaded("llava")
    areas = torch.zeros(4, 32, 32, dtype=torch.bool)
    for i, (y, x) in enumerate([(0, 0), (0, 16), (16, 0), (16, 16)]):
        areas[i, y : y + 16, x : x + 16] = True
    found = attribution.occlusion(lvlm, pictures, TEXTS, ANSWERS, areas, batch_size=2)
    for row in range(3):
        colour = np.asarray(pictures[row]).reshape(-1, 3).mean(0).round().astype(int)
        masked = ImageMaskInput(
            pictures[row],
            mask=areas.int().argmax(0),
            baseline=tuple(colour.tolist()),
            processor_fn=lambda picture: dict(lvlm.inputs([picture], [TEXTS[row]])),
        )
        method = LLMAttribution(FeatureAblation(lvlm.model), lvlm.processor.tokenizer)
        target = torch.tensor(lvlm.processor.tokenizer.encode(ANSWERS[row], add_special_tokens=False))
        result = method.attribute(masked, target=target, forward_in_tokens=False)
        torch.testing.assert_close(found[row], result.seq_attr, atol=2e-4, rtol=1e-3)
