"""A fair trial of DIYSink, its rivals and their controls on the lab models: `sinkstudy lab diysink`.

Every arm goes through the lab's own stages as the lab model behind it did: a decoder that knows the language from text
alone; a new connector, or two, that learns to feed it by captions while it is frozen, 120 steps for each connector;
then 1,300 steps of questions for connectors and decoder: 1,420 steps with one connector, 1,540 with two. Tower,
text-pretrained decoder, pictures, questions, their order and the number of steps of a stage and connector are the same
in all arms of a seed. A quarter of the scenes are simple ones, and one question in 26 is about a question
(`world.questions.routing`), so that a model can be asked where to look.

The soft router is trained on each finished pair of connectors. Gates and adapters are trained on the untouched lab
model, with questions from the same pictures. What is kept stands in `data/methods/<model>/<arm>-<seed>`.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sinkstudy.lab import language, training
from sinkstudy.lab import tower as tower_module
from sinkstudy.lab.corpus import Codec, Corpus, training_pictures
from sinkstudy.lab.families import family
from sinkstudy.lab.train import LAB_CACHE
from sinkstudy.model import loading
from sinkstudy.paths import ALIGNMENT, TRAINED, atomic
from sinkstudy.trained import alignment, loop
from sinkstudy.trained.connectors import DIYSink, OneConnector, Show, matched_width
from sinkstudy.trained.conversations import Collate, Sample
from sinkstudy.trained.gates import Gates, LoRA, n_parameters
from sinkstudy.trained.routers import ReW, balanced
from sinkstudy.world import questions as q
from sinkstudy.world.drawing import render

DENSE, SIMPLE = 24_576, 8_192  # scenes, of which 1,300 steps of 24 see 31,200, each once
SEEDS = (0, 1, 2, 3, 4)
TEXT = loop.Settings(steps=400, batch_size=24, lr=3e-3, weight_decay=0.05, seed=10)
ALIGN = loop.Settings(steps=120, batch_size=32, lr=3e-3, weight_decay=0.05)  # of each connector
TUNE = loop.Settings(steps=1300, batch_size=24, lr=3e-3, weight_decay=0.05)
ROUTER = loop.Settings(steps=60, batch_size=20, lr=1e-2)  # the paper's: 120 samples ten times
RIVALS = loop.Settings(steps=120, batch_size=32, lr=3e-3)
# Models with arms, and what a sink is there; lab-llava has none by norm, so its largest norms stand for them. Those of
# lab-qwen2vl lie on things.
BASES: dict[str, dict[str, Any]] = {
    "lab-llava-gist": {"criterion": "above_median", "threshold": 3.0},
    "lab-qwen2vl": {"criterion": "above_median", "threshold": 3.0},
    "lab-llava": {"criterion": "percentile", "threshold": 98.0},
}
CONNECTOR_ARMS = ("one", "two", "matched", "others", "sinks", "normed", "random", "kept")
RIVAL_ARMS = ("rew", "gates", "adapters")
ALL_ARMS = (*CONNECTOR_ARMS, *RIVAL_ARMS)
FOLLOWED = (0, 5, 10, 20, 40, 80, 120)  # steps of `ALIGN` at which `follow_alignment` keeps the connector


class Stage(language.ImageStage):
    """Captions or questions for a model with one or two connectors, as `DIYSink.around` computes it."""

    def __init__(self, method: OneConnector, corpus: Corpus, pictures, target: str):
        super().__init__(method.lvlm.model, corpus, pictures, target)
        self.method = method
        lvlm = method.lvlm
        self.layout = lvlm.layout(lvlm.inputs([torch.from_numpy(pictures[0].copy())], [""]))[0]

    def visual(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        visual, _ = super().visual(patches)
        method = self.method
        if not isinstance(method, DIYSink):
            return method.norm(visual), None
        norms = patches.float().norm(dim=-1).cpu()
        of_sinks = torch.stack([self.layout.lift(method.chosen(of, self.layout), "any") for of in norms])
        of_sinks = of_sinks.to(visual.device)
        sink = self.family.mlp(method.sink)(self.family.read(method.sink, patches))
        visual = torch.where(of_sinks[..., None], sink, visual)
        if method.settings["front"]:
            order = (~of_sinks).long().argsort(dim=1, stable=True)
            visual = visual.gather(1, order[..., None].expand_as(visual))
            of_sinks = of_sinks.gather(1, order)
        if method.show == "both":
            return visual, None
        return visual, of_sinks if method.show == "others" else ~of_sinks


class _Training(nn.Module):
    """A stage as `loop.fit` trains it: pictures and a step -> loss; `module` has the parameters."""

    def __init__(self, loss: Callable[..., tuple[torch.Tensor, dict]], module: nn.Module, n: int):
        super().__init__()
        self.loss, self.module, self.n = loss, module, n

    def forward(self, rows: torch.Tensor, step: int) -> torch.Tensor:
        return self.loss(rows, seed=self.n + step)[0]


def fit_stage(loss: Callable[..., tuple[torch.Tensor, dict]], module: nn.Module, n: int, folder: Path,
              settings: loop.Settings, muon: float | None, about: dict | None = None,
              watch: Callable[[int], None] | None = None) -> pd.DataFrame:
    """Train what of a module asks for gradients by `loss(rows, seed=…)` on the scenes 0 … n - 1; see `loop.fit`.

    `muon`: learning rate of weight matrices under Muon; None: AdamW for all.
    """
    return loop.fit(
        _Training(loss, module, n), range(n), folder, settings,
        lambda rows, places: {"rows": torch.tensor(rows), "step": places[0] // settings.batch_size},
        optimizers=lambda named: training.optimizers(named, settings.lr, settings.weight_decay, muon), about=about,
        watch=watch)


class Workshop:
    """A lab model and what all its arms share: corpus, pictures, the decoder that has read text alone."""

    def __init__(self, base: str):
        self.lvlm, self.rule = loading.load(base), BASES[base]
        self.lvlm.model.set_attn_implementation("lab_matmul")
        self.corpus = Corpus(DENSE, simple=SIMPLE)
        split = [training_pictures(LAB_CACHE, DENSE), training_pictures(LAB_CACHE, SIMPLE, "train simple")]
        self.pictures = np.concatenate(split)  # [scenes, 3, 96, 96] uint8, as in the corpus
        self.connector = copy.deepcopy(self.lvlm.connector)
        self.decoder = self._text_pretrained()
        tower = self.lvlm.vision
        some = tower_module.normalise(torch.from_numpy(self.pictures[:128].copy()))
        with torch.no_grad():
            self.patches = tower_module.features(tower, tower_module.states(tower, some))

    def _text_pretrained(self) -> dict[str, torch.Tensor]:
        """Weights of the family's decoder after `TEXT`; trained once, then read."""
        kind = family(self.lvlm.model.config)
        decoder = language.build_decoder(len(Codec(kind.special).words), kind)
        run = training.compiled(decoder.model.forward)
        fit_stage(lambda rows, seed: language.text_loss(decoder, run, self.corpus, rows, seed), decoder, DENSE + SIMPLE,
                  LAB_CACHE / f"trial.{kind.text}", TEXT, muon=TEXT.lr)
        return decoder.model.state_dict()

    def method(self, arm: str, seed: int) -> OneConnector:
        """An arm before its training: the tower as it was, the decoder knowing text alone, connectors new."""
        self.lvlm.model.set_submodule(self.lvlm.spec.connector, copy.deepcopy(self.connector))
        self.lvlm.decoder.load_state_dict(self.decoder)
        one: dict[str, dict[str, Any]] = {
            "one": {}, "matched": {"width": matched_width(self.connector)}, "normed": {"normed": True}}
        two: dict[str, dict[str, Any]] = {
            "two": {}, "kept": {"front": False}, "random": {"split": "random"}, "sinks": {"show": "sinks"},
            "others": {"show": "others"}}
        method = (OneConnector(self.lvlm, seed=seed, **one[arm]) if arm in one
                  else DIYSink(self.lvlm, seed=seed, **two[arm], **self.rule))
        torch.manual_seed(seed)
        for connector in connectors(method):
            language.start_connector(self.lvlm.model, connector, self.patches)
        return method

    def fit(self, method: OneConnector, name: str, target: str, settings: loop.Settings,
            trained: list[nn.Module], watch: Callable[[int], None] | None = None) -> pd.DataFrame:
        """One stage: captions ("caption") or questions ("questions")."""
        method.requires_grad_(False)
        for part in trained:
            part.requires_grad_(True)
        stage, about = Stage(method, self.corpus, self.pictures, target), {"method": method.kind, **method.settings}
        log = fit_stage(stage.loss, method, DENSE + SIMPLE, LAB_CACHE / name, settings, muon=settings.lr, about=about,
                        watch=watch)
        return log.assign(stage=name.rsplit(".", 1)[1])

    def train(self, arm: str, seed: int) -> None:
        """Both stages of an arm, and its weights to `data/methods`."""
        folder = TRAINED / self.lvlm.name / f"{arm}-{seed}"
        method, logs = self.method(arm, seed), []
        name = f"{self.lvlm.name}.{arm}-{seed}"
        align, tune = (replace(settings, seed=seed) for settings in (ALIGN, TUNE))
        parts: dict[Show, nn.Module] = {"both": self.lvlm.connector}
        if isinstance(method, DIYSink):
            parts = {"sinks": method.sink, "others": self.lvlm.connector}
        shown = method.show
        of = {show: connector for show, connector in parts.items() if shown in (show, "both")}
        for show, connector in of.items():
            method.show = show
            logs.append(self.fit(method, f"{name}.align-{show}", "caption", align, [connector, method.norm]))
        method.show = shown
        logs.append(self.fit(method, f"{name}.tune", "questions", tune,
                             [*of.values(), method.norm, self.lvlm.decoder]))
        method.save(folder, eight_bits=True, steps={"align, each connector": align.steps, "tune": tune.steps})
        with atomic(folder / "training.csv") as file:
            pd.concat(logs).to_csv(file, index=False, float_format="%.5g")


def follow_alignment(base: str) -> None:
    """The alignment stage of arm "one" once more, its connector kept at the steps `FOLLOWED`; see `trained.alignment`.

    Kept in eight bits: `data/alignment/<base>/weights.safetensors`, `training.csv` and `stage.json` beside it, and the
    decoder that stays frozen, the same for all bases of a family, in `data/alignment/decoder`. A finished one is
    not repeated.
    """
    folder = ALIGNMENT / base
    if folder.exists():
        print(f"{base}: finished earlier", flush=True)
        return
    started, shop = time.monotonic(), Workshop(base)
    method, name = shop.method("one", 0), f"{base}.one-0.alignment"

    def at(step: int) -> Path:
        return LAB_CACHE / name / f"step-{step}.safetensors"

    def watch(step: int) -> None:
        if step in FOLLOWED:
            with atomic(at(step)) as file:  # so that a resumed training has those before its checkpoint
                save_file(shop.lvlm.connector.state_dict(), file)

    log = shop.fit(method, name, "caption", ALIGN, [shop.lvlm.connector], watch)
    alignment.write(folder, {step: load_file(at(step)) for step in FOLLOWED}, shop.decoder, log, base=base, arm="one",
                    trained="connector", target="caption", settings=asdict(ALIGN), end_loss=log.loss.iloc[-1])
    print(f"{base}: end loss {log.loss.iloc[-1]:.3f}, {time.monotonic() - started:.0f} s", flush=True)


def connectors(method: OneConnector) -> list[nn.Module]:
    return [method.lvlm.connector, *([method.sink] if isinstance(method, DIYSink) else [])]


def rival_samples(pictures, n: int, seed: int) -> pd.DataFrame:
    """Questions about the first n training pictures, one each, every family as often: `type` and `sample`.

    A quarter of those that have options is asked with them.
    """
    rng, rows = random.Random(seed), []
    for i, facts in enumerate(q.facts(render("train", 0, n, pictures=False))):
        families = (q.ask(facts, family, rng) for family in rng.sample(list(q.TYPES), len(q.TYPES)))
        one = next(found for found in families if found is not None)
        text, answer = one.text, one.answer
        if len(one.options) >= 4 and rng.random() < 0.25:
            text, answer = q.choice_form(one, rng)
        picture = torch.from_numpy(pictures[i].copy())
        rows.append({"type": one.type, "sample": Sample(str(i), picture, ((text, answer),))})
    return pd.DataFrame(rows)


def train_rival(base: str, arm: str, seed: int, pictures) -> None:
    """Soft routing ("rew"), "gates", or "adapters" with as many parameters, to `data/methods`."""
    folder, settings = TRAINED / base / f"{arm}-{seed}", replace(ROUTER if arm == "rew" else RIVALS, seed=seed)
    lvlm = loading.load(base)
    if arm == "rew":
        method = ReW(lvlm, diysink=TRAINED / base / f"two-{seed}", seed=seed)
    elif arm == "gates":
        method = Gates(lvlm, normalised=True, seed=seed)
    else:
        method = LoRA(lvlm, parameters=n_parameters(Gates(loading.load(base))), seed=seed)
    method.train_only()
    samples = rival_samples(pictures, settings.steps * settings.batch_size, seed)
    if arm == "rew":
        samples = balanced(samples, 120, seed)
    log = loop.fit(method, samples["sample"].tolist(), LAB_CACHE / f"{base}.{folder.name}", settings, Collate(lvlm),
                   about={"method": method.kind, **method.settings})
    method.save(folder, steps=settings.steps, parameters=n_parameters(method))
    with atomic(folder / "training.csv") as file:
        log.to_csv(file, index=False, float_format="%.5g")


def main(bases: Sequence[str], arms: Sequence[str] = ALL_ARMS, seeds: Sequence[int] = SEEDS) -> None:
    """The arms of each seed on the lab models `bases`; what is finished is passed over."""
    training.threads()
    for base in bases:
        shop = Workshop(base)
        for seed, arm in product(seeds, arms):
            if (TRAINED / base / f"{arm}-{seed}" / "training.csv").exists():  # what is written last
                print(f"{arm}-{seed}: finished earlier", flush=True)
                continue
            started = time.monotonic()
            if arm in RIVAL_ARMS:
                train_rival(base, arm, seed, shop.pictures)
            else:
                shop.train(arm, seed)
            print(f"{arm}-{seed}: trained in {time.monotonic() - started:.0f} s", flush=True)
