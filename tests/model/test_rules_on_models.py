"""Rules compared on a tiny model: what is read, masked and set is what a plain computation gives."""

import architectures
import noise
import pandas as pd
import pytest
import torch
from PIL import Image

from sinkstudy.analyses import attribution
from sinkstudy.answers.evaluate import NONE
from sinkstudy.book import criteria
from sinkstudy.effects import neurons
from sinkstudy.model.lvlm import LVLM

QUESTIONS = ["how many", "what is the texture", "what is the texture red blue yes no"]
close = dict(atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return noise.pictures([(32, 32)] * 3)


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "internvl"])
def lvlm(request, tmp_path_factory) -> LVLM:
    return architectures.load(tmp_path_factory.mktemp(request.param), request.param)


def test_attribution_is_that_of_the_models_own_first_token(lvlm, pictures):
    """Against autograd through the whole model, with the tokens of all pictures as leaves behind the connector."""
    kept = []

    def keep(hidden, layer):
        if layer != lvlm.feature_layer:
            return hidden
        kept.append(hidden.detach().requires_grad_())
        return kept[-1]

    inputs = lvlm.inputs(pictures, QUESTIONS)
    with torch.enable_grad(), lvlm.editing(after=keep):
        lvlm.model(**inputs, logits_to_keep=1).logits[:, -1].float().log_softmax(-1).amax(-1).sum().backward()
    product = (kept[0].detach() * kept[0].grad).sum(-1).abs()
    expected = torch.stack([product[layout.output] for layout in lvlm.layout(inputs)])
    f = attribution.first_of_answer(lvlm, pictures, QUESTIONS, batch_size=2)
    found = criteria.per_patch(f.layouts, attribution.gradient_x_activation(f).abs())
    torch.testing.assert_close(found, expected, **close)


def test_norms_under_interventions(lvlm, pictures):
    """Untouched, silenced and with dimensions set; batches do not matter."""
    images = {str(i): picture for i, picture in enumerate(pictures)}
    tokens = criteria.entering(lvlm, images, batch_size=2)
    mask = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.4
    all_of = {layer: torch.arange(4) for layer in range(2)}
    values = torch.linspace(-3, 3, tokens.shape[-1])
    high, nowhere = {layer: torch.full((4,), 9.0) for layer in all_of}, criteria.by_id(mask & False)
    ways = [NONE, neurons.silence("silent", all_of), neurons.fire("fire", all_of, high, nowhere),
            neurons.set_dimensions("set", [5, 2], values, criteria.by_id(mask))]
    norms = neurons.norms_under(lvlm, images, ways, batch_size=2)
    torch.testing.assert_close(norms["none"], tokens.norm(dim=-1), **close)
    torch.testing.assert_close(norms["fire"], norms["none"])
    assert not torch.allclose(norms["silent"], norms["none"])
    expected = criteria.with_dimensions_set(tokens, mask, [5, 2], values)
    torch.testing.assert_close(norms["set"], expected, **close)
    by_hand = tokens.clone()
    for dimension in (5, 2):
        by_hand[..., dimension] = torch.where(mask, values[dimension], by_hand[..., dimension])
    torch.testing.assert_close(expected, by_hand.norm(dim=-1), **close)


def test_phi_of_a_visual_token_is_that_of_its_state(lvlm, pictures):
    lit = [[1, 3] for _ in lvlm.decoder_layers]
    layouts, phi = criteria.decoder_phi(lvlm, pictures, QUESTIONS, lit, draws=2, batch_size=2)
    one = lvlm.inputs(pictures[:1], QUESTIONS[:1])
    with torch.no_grad():
        states = lvlm.model(**one, output_hidden_states=True).hidden_states
    hidden = states[2][0, lvlm.layout(one)[0].visual]  # behind the second layer
    share = hidden / hidden.norm(dim=-1, keepdim=True)
    assert phi.shape == (3, 3, len(layouts[0].visual)) and (phi <= 1).all()
    assert (phi[0, 0] >= share[:, [1, 3]].abs().amax(-1) - 1e-4).all()


def test_unknown_answers_give_rows_without_value(lvlm):
    asked = pd.DataFrame({"id": ["0-0"], "image_id": ["0"], "question": ["how many"], "answer": [None]})
    said = criteria.answer_changes(lvlm, asked, [neurons.silence("silent", {})])
    assert said[["intervention", "measure"]].values.tolist() == [["silent", "accuracy"], ["silent", "logp"]]
    assert said.value.isna().all()
