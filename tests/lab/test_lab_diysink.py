"""The lab's own training of DIYSink computes what the method computes; what is shipped is what the recipe says."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from sinkstudy import sinks
from sinkstudy.answers import study
from sinkstudy.answers.evaluate import NONE, Intervention, Prefixes
from sinkstudy.effects import moving
from sinkstudy.lab import arms, language
from sinkstudy.lab.corpus import Corpus
from sinkstudy.model import loading
from sinkstudy.paths import ALIGNMENT, TRAINED
from sinkstudy.trained import alignment, loop
from sinkstudy.trained.connectors import DIYSink, OneConnector
from sinkstudy.trained.gates import Gates, LoRA
from sinkstudy.trained.kinds import load_method
from sinkstudy.trained.routers import ReW
from sinkstudy.world.drawing import render

SCENES = 8
RULES = {**arms.BASES, "lab-qwen2vl": {}}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(SCENES, simple=4)


@pytest.fixture(scope="module")
def pictures():
    return np.concatenate([render("train", 0, SCENES).images, render("train simple", 0, 4).images])


@pytest.mark.parametrize("show", ["both", "sinks", "others"])
@pytest.mark.parametrize("front", [True, False], ids=["front", "kept"])
@pytest.mark.parametrize("base", RULES)
def test_packed_stage_is_the_method(base, front, show, corpus, pictures, monkeypatch):
    """Captions: a loss over many pictures at once, and the method's own forward pass over each."""
    monkeypatch.setattr(language, "autocast", nullcontext)
    monkeypatch.setattr(language, "compiled", lambda function: function)
    method = DIYSink(loading.load(base), **RULES[base], front=front)
    lvlm = method.lvlm
    stage = arms.Stage(method, corpus, pictures, "caption")
    lvlm.model.set_attn_implementation("lab_matmul")
    method.show = show
    rows = torch.arange(6, 10)  # dense scenes and simple ones
    with torch.no_grad():
        packed, _ = stage.loss(rows, seed=0)
        losses, words = [], []
        lvlm.model.set_attn_implementation("sdpa")
        for row in rows.tolist():
            caption = corpus.caption[row][1:]
            caption = caption[caption >= 0]
            asked = lvlm.inputs([torch.from_numpy(pictures[row])], [""])
            before = asked["input_ids"][0]
            said = corpus.codec.encode("assistant :")
            before = before[: len(before) - len(said)]  # the chat format without its empty question
            ids = torch.cat([before, torch.tensor(said), caption])[None]
            labels = torch.cat([torch.full((len(before) + len(said),), -100), caption])[None]
            more = {k: v for k, v in asked.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
            if "mm_token_type_ids" in asked:
                more["mm_token_type_ids"] = (ids == lvlm.image_token_id).int()
            inputs = Prefixes({"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}, ["a"], [""])
            losses.append(method(inputs, labels).item() * len(caption))
            words.append(len(caption))
    assert packed.item() == pytest.approx(sum(losses) / sum(words), rel=1e-4)


def test_arms_differ_only_in_what_they_should(corpus, pictures, monkeypatch):
    """Same start of the decoder; two connectors have as many parameters as the wide one, within one neuron."""
    monkeypatch.setattr(arms, "Corpus", lambda n, simple: corpus)
    monkeypatch.setattr(arms, "training_pictures", lambda folder, n, split="train": pictures[:4])
    text = language.build_decoder(len(corpus.codec.words)).model.state_dict()
    monkeypatch.setattr(arms.Workshop, "_text_pretrained", lambda self: text)
    shop = arms.Workshop("lab-llava-gist")
    sizes, decoders = {}, []
    for arm in arms.CONNECTOR_ARMS:
        method = shop.method(arm, seed=1)
        sizes[arm] = sum(p.numel() for p in method.changed().values())
        decoders.append({k: v.clone() for k, v in method.lvlm.decoder.state_dict().items()})
        with torch.no_grad():  # what one arm learns must not reach the next
            for p in method.changed().values():
                p.add_(1.0)
    assert all(torch.equal(text[k], of[k]) for of in decoders for k in text)
    pairs = {sizes[arm] for arm in ("two", "random", "kept", "sinks", "others")}
    assert sizes["one"] < sizes["matched"] <= sizes["two"] and pairs == {sizes["two"]}
    first = next(iter(shop.connector.parameters()))
    assert sizes["two"] - sizes["matched"] < 2 * first.shape[-1] + 2


@pytest.mark.parametrize("base", ["lab-llava", "lab-qwen2vl"])
def test_every_trained_method_runs(base, tmp_path):
    """Also where the default rule finds no sinks: at its start, each answers as what it starts from."""
    rule = {"criterion": "percentile", "threshold": 98.0}
    table, shown = study.benchmark("MMStar", "", False, 1)

    def said(lvlm, how):
        answers = study.answers(lvlm, "MMStar", table, shown, [how], public=False, cache=None, max_new_tokens=4)
        return torch.tensor(answers["logp"])

    def with_own_connector(method):  # in both places, if there are two
        own = loading.load(base).connector.state_dict()
        for connector in arms.connectors(method):
            connector.load_state_dict(own)
        return method

    moved = Intervention("it", lambda lvlm, inputs: moving.reordered(lvlm, inputs, sinks.rule(**rule), ids="renumber"))
    plain, front = said(loading.load(base), NONE), said(loading.load(base), moved)
    pair = with_own_connector(DIYSink(loading.load(base), **rule))
    pair.save(tmp_path / "pair")
    kept = load_method(tmp_path / "pair")
    starts = [
        (Gates(loading.load(base), normalised=True, **rule), plain),
        (LoRA(loading.load(base), parameters=2000), plain),
        (with_own_connector(OneConnector(loading.load(base))), plain),
        (with_own_connector(DIYSink(loading.load(base), **rule, front=False)), plain),
        (pair, front),
        (ReW(loading.load(base), diysink=tmp_path / "pair"), said(kept.lvlm, kept.intervention("it"))),
    ]
    assert len(plain) >= 6 and not torch.allclose(plain, front, atol=1e-3)
    for method, expected in starts:
        torch.testing.assert_close(said(method.lvlm, method.intervention("it")), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("folder", sorted(TRAINED.glob("*/*-*")), ids=lambda of: f"{of.parent.name}/{of.name}")
def test_shipped_methods(folder):
    """Each loads, on the model it names, with the seed that its folder names, and was trained to the end."""
    method = load_method(folder)
    known = loop.Method.described(folder)
    assert method.lvlm.name == folder.parent.name == known["base"]
    assert known["settings"]["seed"] == int(folder.name.rsplit("-", 1)[1])
    assert all(p.isfinite().all() for p in method.changed().values())


def test_normalised_tokens_begin_as_long_as_words(corpus, pictures, monkeypatch):
    """And are the same in the packed stage and in the method's own pass."""
    monkeypatch.setattr(language, "autocast", nullcontext)
    monkeypatch.setattr(language, "compiled", lambda function: function)
    method = OneConnector(loading.load("lab-llava-gist"), normed=True)
    lvlm, words = method.lvlm, method.model.get_input_embeddings().weight.norm(dim=-1).median()
    shown = [torch.from_numpy(picture) for picture in pictures[:2]]
    inputs = Prefixes(lvlm.inputs(shown, ["", ""]), ["a", "b"], ["", ""])
    with torch.no_grad():
        with method.around(inputs):
            tokens = lvlm.connector(torch.randn(3, 5, lvlm.vision_width))
        torch.testing.assert_close(tokens.norm(dim=-1), words.expand(3, 5), rtol=1e-3, atol=0)
        method.norm.bias.add_(1.0)
        stage = arms.Stage(method, corpus, pictures, "caption")
        patches = torch.randn(2, 144, lvlm.vision_width)
        with method.around(inputs):
            expected = lvlm.connector(patches)
        torch.testing.assert_close(stage.visual(patches)[0], expected)


@pytest.mark.parametrize("base", ["lab-llava-gist", "lab-llava"])
def test_connectors_of_the_alignment_stage(base, corpus, pictures, monkeypatch):
    """At the steps that are followed, with the decoder that they feed: captions become readable from the pictures."""
    monkeypatch.setattr(language, "autocast", nullcontext)
    monkeypatch.setattr(language, "compiled", lambda function: function)
    assert alignment.steps(base) == sorted(arms.FOLLOWED)
    log = pd.read_csv(ALIGNMENT / base / "training.csv")
    assert log.step.iloc[-1] == arms.ALIGN.steps == max(arms.FOLLOWED)
    about = json.loads((ALIGNMENT / base / "stage.json").read_text())
    assert about["base"] == base and about["end_loss"] == pytest.approx(log.loss.iloc[-1], rel=1e-4)
    lvlm, losses = loading.load(base), []
    lvlm.model.set_attn_implementation("lab_matmul")
    stage = arms.Stage(OneConnector(lvlm), corpus, pictures, "caption")
    for step in arms.FOLLOWED:
        with alignment.at(lvlm, step), torch.no_grad():
            losses.append(stage.loss(torch.arange(SCENES), seed=0)[0].item())
    assert losses[0] == pytest.approx(log.loss.iloc[0], rel=0.2) and losses[-1] == pytest.approx(
        log.loss.iloc[-1], rel=0.3)
    assert losses[0] > losses[3] > losses[-1]


def test_alignment_is_followed(corpus, pictures, monkeypatch, tmp_path):
    """A short stage: its connector as it starts and as it ends; once more, nothing is trained."""
    monkeypatch.setattr(language, "compiled", lambda function: function)
    monkeypatch.setattr(arms, "DENSE", SCENES)
    monkeypatch.setattr(arms, "SIMPLE", 4)
    monkeypatch.setattr(arms, "LAB_CACHE", tmp_path / "cache")
    monkeypatch.setattr(arms, "ALIGNMENT", tmp_path / "alignment")
    monkeypatch.setattr(arms, "ALIGN", replace(arms.ALIGN, steps=3, batch_size=2))
    monkeypatch.setattr(arms, "FOLLOWED", (0, 2, 3))
    monkeypatch.setattr(arms, "training_pictures",
                        lambda folder, n, split="train": pictures[SCENES:] if "simple" in split else pictures[:SCENES])
    text = language.build_decoder(len(corpus.codec.words)).model.state_dict()
    monkeypatch.setattr(arms.Workshop, "_text_pretrained", lambda self: text)
    started, ended = [], []

    def fit(self, method, *rest):
        started.append({k: v.clone() for k, v in self.lvlm.connector.state_dict().items()})
        log = whole(self, method, *rest)
        ended.append(self.lvlm.connector.state_dict())
        return log

    whole = arms.Workshop.fit
    monkeypatch.setattr(arms.Workshop, "fit", fit)
    arms.follow_alignment("lab-llava-gist")
    kept = loop.kept(tmp_path / "alignment" / "lab-llava-gist")
    for step, of in ((0, started[0]), (3, ended[0])):
        for name, tensor in of.items():
            near = 0.02 * float(tensor.abs().max())
            torch.testing.assert_close(kept[f"{step}.{name}"].float(), tensor, atol=near, rtol=0)
    assert not torch.allclose(kept["2.linear_1.weight"], kept["3.linear_1.weight"], rtol=1e-3, atol=1e-4)
    decoder = loop.kept(tmp_path / "alignment" / "decoder")
    assert decoder.keys() == text.keys()
    arms.follow_alignment("lab-llava-gist")
    assert len(started) == 1


def test_an_arm_is_finished_once_its_curve_is_there(tmp_path, monkeypatch):
    """A kill between the weights and the curve leaves a folder that no chapter can read."""
    asked = []

    class Shop:
        def __init__(self, base):
            self.pictures = None

        def train(self, arm, seed):
            asked.append((arm, seed))

    monkeypatch.setattr(arms, "Workshop", Shop)
    monkeypatch.setattr(arms, "TRAINED", tmp_path)
    monkeypatch.setattr(arms.training, "threads", lambda: None)
    for seed in (0, 1):
        (tmp_path / "lab-llava" / f"one-{seed}").mkdir(parents=True)
    (tmp_path / "lab-llava" / "one-1" / "training.csv").write_text("step,loss\n")
    arms.main(["lab-llava"], ["one"], [0, 1, 2])
    assert asked == [("one", 0), ("one", 2)]
