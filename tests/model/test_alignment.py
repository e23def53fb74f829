"""Which dimensions visual tokens light: planted ones are found; a model as it was at a step of its alignment."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from sinkstudy import sinks
from sinkstudy.analyses import propagation
from sinkstudy.trained import alignment
from sinkstudy.trained.loop import rounded


@pytest.fixture
def masks(images) -> tuple[torch.Tensor, torch.Tensor]:
    some = torch.zeros(len(images), 16, dtype=torch.bool)
    some[:, 3], some[1, 7] = True, True
    return some, ~some


def test_light_is_what_the_eager_model_shows(tiny, eager, images, questions):
    light = propagation.light(tiny, images, questions, batch_size=2)
    for of, picture, question in zip(light, images, questions, strict=True):
        inputs = tiny.inputs([picture], [question])
        with torch.no_grad():
            states = torch.cat(eager(**inputs, output_hidden_states=True).hidden_states[1:3])
        visual = tiny.visual_positions(inputs.input_ids)[0]
        torch.testing.assert_close(of[:2], sinks.rms_normalised(states[:, visual]).abs(), atol=1e-5, rtol=1e-4)


def test_planted_dimension_is_found(tiny, images, questions, masks):
    """A large value in dimension 5 of chosen tokens, at the connector's output: the residual stream keeps it."""
    chosen, others = masks
    at = iter(chosen.split(2))

    def plant(module, args, tokens):
        mask = next(at).reshape(tokens.shape[:-1])
        return tokens + 400 * mask[..., None] * torch.nn.functional.one_hot(torch.tensor(5), tokens.shape[-1])

    before = propagation.light(tiny, images, questions, batch_size=2)
    with tiny.connector.register_forward_hook(plant):
        after = propagation.light(tiny, images, questions, batch_size=2)
    found = propagation.excess(after, chosen, others)
    assert found.argmax(-1).tolist() == [5] * len(found)
    assert (found[:, 5] > 5 * propagation.excess(before, chosen, others)[:, 5].abs()).all()
    five = torch.full((len(found), 1), 5)
    lit = propagation.lit_in(after, five).transpose(1, 2)  # [images, visual tokens, layers]
    assert lit[chosen].min() > lit[others].max()


def test_excess_and_phi_by_hand():
    light = torch.zeros(2, 1, 3, 4)  # [images, layers, visual tokens, width]
    light[0, 0, 0], light[1, 0, 0] = torch.tensor([5.0, 1, 0, 0]), torch.tensor([7.0, 2, 0, 0])
    light[:, 0, 1:] = torch.tensor([1.0, 4, 0, 0])
    mask = torch.tensor([[True, False, False]] * 2)
    assert propagation.excess(light, mask, ~mask).tolist() == [[5.0, -2.5, 0, 0]]
    assert propagation.lit_in(light, torch.tensor([[1, 2]])).tolist() == [[[1, 4, 4]], [[2, 4, 4]]]


def test_over_steps_of_planted_dimensions():
    """At step 0 the group lights dimension 1, at step 9 dimension 6, at both ten times the noise of all tokens."""
    noise = torch.rand(8, 2, 12, 10, generator=torch.Generator().manual_seed(0))  # [images, layers, tokens, width]
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[:6, 4] = True  # two pictures have none
    masks = {"sinks": mask, "others": ~mask, "random": mask.roll(1, 1)}
    groups = propagation.TokenGroups(torch.ones(8, 12), masks, None)
    lights = {step: noise + 10 * mask[:, None, :, None] * torch.eye(10)[at] for step, at in ((0, 1), (9, 6))}
    phi, profiles = propagation.over_steps(lights, groups, k=1)
    assert profiles.lit.tolist() == ["1", "1", "6", "6"]
    cosine = profiles.set_index(["step", "layer"]).cosine
    assert cosine[9, 1] == pytest.approx(1, abs=1e-5) and abs(cosine[0, 1]) < 0.2
    assert set(phi.image) == {1, 3, 5}  # not those on which dimensions were found
    mean = phi.groupby(["dimensions", "group", "step"]).inside.mean()
    assert mean["last step", "sinks", 9] > 10 > 1 > mean["last step", "sinks", 0]
    assert min(mean["same step", "sinks", 0], mean["same step", "sinks", 9]) > 10
    assert mean["last step", "random"].max() < 1 and phi.outside.max() < 1


def test_model_at_a_step(tiny, tmp_path):
    lvlm = replace(tiny, name="narrow")
    own = {name: tensor.clone() for name, tensor in tiny.connector.state_dict().items()}
    decoder = {name: 2 * tensor for name, tensor in tiny.decoder.state_dict().items()}
    connectors = {step: {name: tensor + step for name, tensor in own.items()} for step in (0, 10)}
    alignment.write(tmp_path / "narrow", connectors, decoder, pd.DataFrame({"step": [1], "loss": [2.0]}))
    assert alignment.steps("narrow", tmp_path) == [0, 10] and alignment.steps("other", tmp_path) == []
    with alignment.at(lvlm, 10, tmp_path):
        for now, then in ((tiny.connector, connectors[10]), (tiny.decoder, decoder)):
            for name, tensor in now.state_dict().items():
                half = rounded(then[name])[1].max().float() / 2 if tensor.ndim > 1 else 0
                assert (tensor - then[name]).abs().max() <= half + then[name].abs().max() / 256
    assert all(torch.equal(tensor, own[name]) for name, tensor in tiny.connector.state_dict().items())
    with pytest.raises(ValueError, match="keeps no connector of narrow at step 5"), alignment.at(lvlm, 5, tmp_path):
        pass


def test_weights_of_another_model(tiny, tmp_path):
    lvlm, before = replace(tiny, name="narrow"), tiny.connector.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    foreign = {0: {"weight": torch.ones(2, 2)}}
    alignment.write(tmp_path / "narrow", foreign, tiny.decoder.state_dict(), pd.DataFrame({"step": [1]}))
    with pytest.raises(ValueError, match="does not hold weights of narrow"), alignment.at(lvlm, 0, tmp_path):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.connector.state_dict().items())
