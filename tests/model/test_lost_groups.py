"""Groups taken away from a tiny model: each way is the one that it says, and losses are those of `ablation`."""

import architectures
import noise
import pandas as pd
import pytest
import torch
from PIL import Image

from sinkstudy.effects import ablation, groups
from sinkstudy.model.lvlm import LVLM

WAYS = ["only", "without", "knockout", "mean", "zero", "noise", "shuffle", "mean at the input"]


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def lvlm(request, tmp_path_factory) -> LVLM:
    return architectures.load(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def images() -> dict[str, Image.Image]:
    return dict(zip("abc", noise.pictures([(32, 32)] * 3)))


@pytest.fixture(scope="module")
def read(lvlm, images) -> dict[str, ablation.Tokens]:
    return {site: ablation.read_tokens(lvlm, images, site) for site in ("input", "output")}


@pytest.fixture(scope="module")
def found(lvlm, read) -> groups.Groups:
    return groups.choose(read["input"], lvlm.feature_layer, "percentile", 70.0, doses=[1])


def asked() -> pd.DataFrame:
    return pd.DataFrame([{"id": f"{n}-{i}", "image_id": n, "question": text, "answer": "yes", "type": "generic"}
                         for n in "abc" for i, text in enumerate(("how many", "what is the texture"))])


def test_losses_are_differences_to_the_untouched_model(lvlm, images, found, read):
    of = groups.cuts(found, ["sinks"], WAYS) + groups.doses(found)
    how = {"images": images, "cache": None, "max_new_tokens": 2}
    rows = groups.lost(lvlm, asked(), found, of, read, **how)
    assert len(rows) == 6 * len(of)
    own = rows[rows.which == "itself"].set_index(["what", "id"])
    masks = found.masks["sinks", "itself"]
    made = {"only": ablation.hide("x", masks, others=True), "without": ablation.hide("x", masks),
            "knockout": ablation.hide("x", masks, visible_to="visual"),
            "mean": ablation.replace("x", read["output"], masks),
            "zero": ablation.replace("x", read["output"], masks, "zero"),
            "mean at the input": ablation.replace("x", read["input"], masks)}
    for way, intervention in made.items():
        effect = ablation.effects(ablation.scored(lvlm, asked(), [intervention], **how)).set_index("id")
        assert (own.loc[way].logp == effect.logp.reindex(own.loc[way].index)).all(), way
    assert set(rows[rows.what == "mean"].which) == {"itself", "random", "next in norm"}
    assert len(rows[(rows.what == "mean") & (rows.which == "random")]) == 12  # two draws
    everything = rows[rows.which == "all"]
    assert (everything.tokens == everything.image_id.map(lambda i: len(found.patches[i].highest))).all()


def test_a_picture_without_such_tokens_says_nothing(lvlm, images, found, read):
    masks = dict(found.masks["sinks", "itself"])
    masks["b"] = torch.zeros_like(masks["b"])
    some = groups.Groups(found.patches, {("sinks", "itself"): masks})
    rows = groups.lost(lvlm, asked(), some, [("without", "sinks", "itself")], read, images=images, cache=None)
    assert set(rows.image_id) == {"a", "c"}


def test_without_answers_the_models_own_has_to_stay(lvlm, images):
    images = {str(number): image for number, image in enumerate(images.values())}
    rows = groups.draw_questions(lvlm, images, None, "what is the texture", max_new_tokens=2, cache=None)
    said = ablation.scored(lvlm, rows, [], images=images, max_new_tokens=2, cache=None)
    assert (rows.answer != "").all() and (said.right == 100).all()
