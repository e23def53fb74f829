"""Norm and content of the calm patches set apart: closed forms, and what the committed cells rest on."""

import pandas as pd
import pytest
import torch

from sinkstudy.answers.study import pictures
from sinkstudy.lab import control, norms
from sinkstudy.model import capture, loading
from sinkstudy.paths import DATA


def test_a_group_gets_the_norm_and_keeps_its_direction():
    patches = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, [1, 4]] = mask[1, 7] = True
    new = norms.resized(patches, mask, 3.0)
    assert torch.equal(new[~mask], patches[~mask])
    for before, after, own in zip(patches, new, mask, strict=True):
        median = before[~own].norm(dim=1).sort().values[(int((~own).sum()) - 1) // 2]
        assert torch.allclose(after[own].norm(dim=1), 3 * median.expand(int(own.sum())))
        assert torch.allclose(after[own] / after[own].norm(dim=1, keepdim=True),
                              before[own] / before[own].norm(dim=1, keepdim=True), atol=1e-6)


@torch.no_grad()
def test_inside_the_context_the_connector_reads_the_new_norms():
    lvlm, (shown, scenes) = loading.load("lab-llava"), pictures("", 2)
    masks, read = list(scenes.calm.flatten(1)), []
    inputs = lvlm.inputs(shown, ["", ""])
    with lvlm.connector.linear_1.register_forward_pre_hook(lambda module, args: read.append(args[0])):
        plain = lvlm.model(**inputs).logits
        with norms.lengthened(lvlm, inputs, masks, norms.LONG):
            lvlm.model(**inputs)
        after = lvlm.model(**inputs).logits
    assert torch.equal(plain, after), "outside, the model is as it was"
    before, inside = read[0].norm(dim=-1), read[1].norm(dim=-1)  # [pictures, patches]
    for own, old, new in zip(masks, before, inside, strict=True):
        assert torch.allclose(new[~own], old[~own])
        assert torch.allclose(new[own], norms.LONG * old[~own].median().expand(int(own.sum())), rtol=1e-4)


def test_attention_is_that_of_a_trace():
    lvlm, (shown, scenes) = loading.load("lab-llava-gist"), pictures("", 4)
    calm = {str(i): mask for i, mask in enumerate(scenes.calm.flatten(1))}
    table = control.questions_by_family(scenes, 0)
    table = table[table.about == "gist"]
    found = norms.attention_on_calm(lvlm, table, dict(zip(calm, shown, strict=True)), calm, None, batch_size=4)
    first = table.drop_duplicates("image_id")
    seen = capture.trace(lvlm, shown, list(first.question), 4).output_attention.mean((1, 2))  # [pictures, patches]
    on_calm = sum(row[mask].mean() for row, mask in zip(seen, calm.values(), strict=True))
    elsewhere = sum(row[~mask].mean() for row, mask in zip(seen, calm.values(), strict=True))
    assert found.value == pytest.approx((on_calm / elsewhere).item(), rel=1e-4)


def test_the_committed_cells_are_two_by_two():
    cells = pd.read_csv(DATA / "controls" / "norms.csv")
    as_it_is = cells[cells.connector == "as it is"]
    assert set(zip(as_it_is.model, as_it_is.norm, strict=True)) == set(norms.NORM_CELLS)
    trained = cells[cells.connector == "trained on"]
    assert set(zip(trained.model, trained.norm, strict=True)) == {
        cell for cell in norms.NORM_CELLS if norms.AS_TRAINED[cell[0]] != cell[1]}
    assert set(cells.about) == {"gist", "local"} and cells.lost.between(cells.low, cells.high).all()
    curves = pd.read_csv(DATA / "controls" / "norms-training.csv")
    assert curves.groupby(["model", "norm"]).step.max().eq(norms.RETUNE.steps).all()


def test_a_cell_of_the_committed_table_is_measured_again():
    """A few pictures: within the interval of the whole, widened for their number."""
    cells = pd.read_csv(DATA / "controls" / "norms.csv").set_index(["model", "norm", "connector", "about"])
    again = norms.cell(loading.load("lab-llava-gist"), "median", pictures("", 32)[1]).set_index("about")
    whole = cells.loc[("lab-llava-gist", "median", "as it is", "gist")]
    assert again.lost["gist"] == pytest.approx(whole.lost, abs=15) and again.lost["gist"] < -10
    assert again.attention["gist"] == pytest.approx(whole.attention, rel=0.3)
