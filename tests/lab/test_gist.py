"""The gates on the committed tower with sinks by construction, on fewer scenes than `sinkstudy lab gates` takes."""

import re

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from sinkstudy.lab import control, train
from sinkstudy.model import loading
from sinkstudy.paths import DATA, MODELS, POSITIVE_CONTROL
from sinkstudy.world import gist
from sinkstudy.world.drawing import render


def test_the_committed_tower_holds_the_gist_in_its_sinks_and_nowhere_else():
    table = control.committed_gates(fit=512, judge=384).set_index("gate")
    assert list(table.index) == list(control.BOUNDS)
    # a difference of two equal things is as often above 0 as below on few scenes: the command has enough of them
    noisy = "gist of the mean of ordinary patches, minus that of a local tower"
    assert table.holds.drop(noisy).all(), table.to_string()
    assert table.value[noisy] < 0.05


def test_facts_of_the_gist_are_those_of_the_scene():
    scenes = render("val", 0, 64)
    facts = gist.fact_classes(scenes)
    assert set(facts) == {*gist.CLASSES, *gist.KINDS_THERE}
    for name, k in gist.CLASSES.items():
        assert facts[name].min() >= 0 and facts[name].max() < k
    for i in range(64):
        tints = [c for c in scenes.thing_colour[i].tolist() if c >= 0]
        assert facts["things"][i] == len(tints) - 1
        assert facts["colours"][i] == len(set(tints)) - 1
        assert facts["twins"][i] == (len(set(tints)) < len(tints))
        areas = sorted(((a, t) for a, t in zip(scenes.area[i].tolist(), scenes.texture[i].tolist()) if t >= 0))
        one, other = sorted(t for _, t in areas[-2:])
        assert facts["pair"][i] == sum(7 - k for k in range(one)) + other - one - 1


def test_a_probe_reads_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (600,), generator=generator)
    vectors = torch.randn(600, 16, generator=generator)
    seen = vectors.clone()
    seen[torch.arange(600), labels] += 5.0
    fit, judge = slice(0, 300), slice(300, 600)
    assert control.probe(seen[fit], labels[fit], seen[judge], labels[judge])[0] > 0.9
    assert abs(control.probe(vectors[fit], labels[fit], vectors[judge], labels[judge])[0]) < 0.15
    shuffled = control.probe(seen[fit], labels[fit], seen[judge], labels[judge], shuffled=True)[0]
    assert shuffled == pytest.approx(0, abs=0.25)


def test_what_is_taken_away_is_counted():
    """Groups are made of their families, and the difference is that of the two changes."""
    found = control.use(loading.load("lab-llava"), n=24).set_index("of")
    families = control.QUESTION_FAMILIES
    assert set(found.index) == {*families, *(f for of in families.values() for f in of)}
    scores = [found.questions[f] for f in control.QUESTION_FAMILIES["gist"]]
    assert found.questions["gist"] == sum(scores) and found.questions["local"] <= 24 * 5
    weighted = sum(found.untouched[f] * found.questions[f] for f in control.QUESTION_FAMILIES["gist"]) / sum(scores)
    assert found.untouched["gist"] == pytest.approx(weighted) and found.untouched["gist"] > 80
    assert (found.without - found.random - found.by_sinks).abs().max() < 1e-9
    assert (found.low <= found.by_sinks).all() and (found.by_sinks <= found.high).all()


def test_the_language_model_behind_it_uses_them():
    """On fewer pictures than the command takes; and what the command wrote last is what the page shows."""
    table, answers = control.uses(n=48)
    assert table.holds.all(), answers.to_string()
    written = pd.read_csv(DATA / "controls" / "gates.csv").set_index("gate")
    assert list(written.index) == [*control.BOUNDS, *control.USE_BOUNDS] and written.holds.all()
    for gate, (side, bound) in (control.BOUNDS | control.USE_BOUNDS).items():
        assert (written.side[gate], written.bound[gate]) == (side, bound)
    shown = pd.read_csv(DATA / "controls" / "answers.csv").set_index(["model", "of"])
    assert list(shown.index) == list(answers.set_index(["model", "of"]).index)
    fewer = answers.set_index(["model", "of"])
    for model in ("lab-llava", POSITIVE_CONTROL):
        assert fewer.by_sinks[model, "gist"] == pytest.approx(shown.by_sinks[model, "gist"], abs=12)


def test_the_folder_of_the_control_is_whole():
    files = {path.name for path in (MODELS / POSITIVE_CONTROL).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "training.csv", "scores.csv"} <= files
    for file in (MODELS / POSITIVE_CONTROL).glob("*.json"):
        assert not re.search(r'"/(?!\S*\s)|/home/|/tmp/', file.read_text(encoding="utf-8")), file
    curve = pd.read_csv(MODELS / POSITIVE_CONTROL / "training.csv")
    assert list(curve.stage.unique()) == ["gist.tower", "text", "lab-llava-gist.align", "lab-llava-gist.instruct"]
    model = loading.load(POSITIVE_CONTROL)
    tower = load_file(train.TOWERS / "gist" / "model.safetensors")
    own = {name.removeprefix("vision_tower."): p for name, p in model.vision.state_dict().items()}
    assert tower.keys() == own.keys() and all(torch.equal(own[name], p.float()) for name, p in tower.items())
