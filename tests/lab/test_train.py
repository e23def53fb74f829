"""The whole training of a lab model in small: every stage, export, scores, and once more from the checkpoints."""

import json
from functools import partial

import pandas as pd
import pytest
import torch

from sinkstudy import cli
from sinkstudy.lab import emergence, language, score, train, training
from sinkstudy.lab.families import QWEN2VL, family
from sinkstudy.model import loading
from sinkstudy.paths import DATA, MODELS
from sinkstudy.world import benchmarks
from sinkstudy.world.drawing import render

SCENES, STEPS = 64, 5
NAME = "lab-qwen2vl"
STAGES = [f"{NAME}.tower", QWEN2VL.text, f"{NAME}.align", f"{NAME}.instruct"]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """`train` on few scenes, with few steps, writing to `tmp_path` only."""
    for name, folder in (("LAB_CACHE", "cache"), ("DATA", "data"), ("MODELS", "models")):
        monkeypatch.setattr(train, name, tmp_path / folder)
    monkeypatch.setattr(train, "TRAIN_SCENES", SCENES)
    for name in ("TOWER", "TEXT", "ALIGN", "INSTRUCT"):
        monkeypatch.setattr(train, name, getattr(train, name) | {"steps": STEPS, "batch": 2})
    for module in (training, language):
        monkeypatch.setattr(module, "compiled", lambda function: function)  # compiling takes longer than the rest
    monkeypatch.setattr(emergence, "IMAGES", 6)
    monkeypatch.setattr(score, "BENCHMARKS", {
        "POPE": lambda: benchmarks.pope(1), "MME": lambda: benchmarks.mme(1), "MMStar": lambda: benchmarks.mmstar(1)})
    monkeypatch.setattr(score, "question_prior", partial(score.question_prior, scenes=SCENES))
    train.corpus.cache_clear(), train.train_pictures.cache_clear()
    yield tmp_path
    train.corpus.cache_clear(), train.train_pictures.cache_clear()


def test_a_model_is_made_from_nothing(small, capsys):
    train.main([NAME])
    folder = small / "models" / NAME
    curve = pd.read_csv(folder / "training.csv")
    assert list(curve.stage.unique()) == STAGES
    assert (curve.groupby("stage").step.max() == STEPS - 1).all() and curve.loss.notna().all()
    assert set(pd.read_csv(small / "data" / "emergence" / f"{NAME}.csv").step) == {0, 1, 2, 4, STEPS}
    scores = pd.read_csv(folder / "scores.csv")
    assert set(scores.benchmark) == {"POPE", "MME", "MMStar", "all"} and scores.accuracy.between(0, 100).all()
    card = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    assert "A very small Qwen2-VL" in card and "second architecture" in card and QWEN2VL.parts in card

    # it is a Qwen2-VL, and generates
    loaded = loading.load(str(folder))
    assert family(loaded.model.config) is QWEN2VL
    vision = loaded.model.config.vision_config
    assert (vision.depth, vision.embed_dim, vision.num_heads, vision.patch_size) == (8, 128, 2, 8)
    inputs = loaded.inputs(list(render("test", 0, 2).images), ["is there a ball ?", "what is the light ?"])
    assert (inputs.input_ids == loaded.image_token_id).sum(1).tolist() == [36, 36]
    out = loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 2 and out.shape[1] > inputs.input_ids.shape[1]

    # finished stages are loaded and give the same model
    capsys.readouterr()
    model, log = train.train_model(NAME)
    said = capsys.readouterr().err
    assert all(f"{stage}: trained earlier" in said for stage in STAGES)
    pd.testing.assert_frame_equal(log.reset_index(drop=True), curve, check_dtype=False)
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(model.state_dict()[name].bfloat16().float(), weight), name
    # the last stage leaves the tower alone, and trains the merger that is a part of it
    moved = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not any("visual.blocks" in name or "patch_embed" in name for name in moved)
    assert {"model.visual.merger.mlp.0.weight", "model.language_model.layers.0.mlp.up_proj.weight"} < moved


def test_what_is_told_of_the_followed_towers_is_what_their_logs_and_configs_hold():
    """`data/emergence/towers.csv`, which chapter 02 shows: pictures by the last step, depth by the layers."""
    told = pd.read_csv(DATA / "emergence" / "towers.csv")
    pd.testing.assert_frame_equal(told, train.recipes())
    logs = {name: pd.read_csv(DATA / "emergence" / f"{name}.csv") for name in told.tower}
    assert set(logs) == {file.stem for file in (DATA / "emergence").glob("*.csv")} - {"towers"}
    for name, row in told.set_index("tower").iterrows():
        log = logs[name]
        assert (row.pictures, row.depth) == (64 * log.step.max(), log.layer.max())
        assert (log.attention_prefix == 0).all() == (row["beside patches"] == "none"), name
    for name in told.tower[told.tower.str.startswith("lab-")]:
        vision = json.loads((MODELS / name / "config.json").read_text())["vision_config"]
        assert {vision.get("embed_dim"), vision["hidden_size"]} & set(told.width)


def test_the_positive_controls_tower_is_made_before_the_model_behind_it(monkeypatch):
    made = []
    monkeypatch.setattr(train, "main", made.append)
    monkeypatch.setattr(cli, "with_malloc", lambda: None)
    cli.train(None)
    cli.train(["lab-llava-gist", "gist"])
    assert made[0].index("gist") < made[0].index("lab-llava-gist")
    assert sorted(made[0]) == sorted([*train.TOWER_OF, "gist", "emergence"]) and made[1] == ["gist", "lab-llava-gist"]


@pytest.mark.parametrize("name", train.TOWER_OF)
def test_committed_cards_are_what_a_training_would_write(name):
    folder = MODELS / name
    kind = family(loading.load(name).model.config)
    card = train.card(name, kind, pd.read_csv(folder / "scores.csv"), pd.read_csv(folder / "training.csv"))
    assert (folder / "README.md").read_text(encoding="utf-8") == card
