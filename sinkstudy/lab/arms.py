"""DIYSink, its rivals and their controls on the lab models, trained from nothing: `sinkstudy lab diysink`.

Every arm of DIYSink starts from a finished lab model whose connector is thrown away, and goes through the paper's two
stages: captions behind a frozen decoder, then questions with connectors and decoder. All arms see the same pictures and
questions in the same order and take the same number of steps; those with two connectors divide the steps of the first
stage between them. The soft router is trained on each finished pair of connectors. Gates and adapters are trained on
the untouched lab model, with the same questions. What is kept stands in `data/methods/<model>/<arm>-<seed>`.
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from sinkstudy.lab import language, training
from sinkstudy.lab import tower as tower_module
from sinkstudy.lab.corpus import Corpus, training_pictures
from sinkstudy.lab.train import CACHE
from sinkstudy.model import loading
from sinkstudy.paths import TRAINED, atomic
from sinkstudy.trained import loop
from sinkstudy.trained.connectors import DIYSink, OneConnector, Show, matched_width
from sinkstudy.trained.conversations import Collate, Sample
from sinkstudy.trained.gates import Gates, LoRA, n_parameters
from sinkstudy.trained.routers import ReW, balanced
from sinkstudy.world import questions as q
from sinkstudy.world.drawing import render

SCENES = 16_384
SEEDS = (0, 1, 2)
ALIGN = loop.Settings(steps=80, batch_size=32, lr=2e-3, weight_decay=0.05)
TUNE = loop.Settings(steps=240, batch_size=24, lr=2e-3, weight_decay=0.05)
ROUTER = loop.Settings(steps=60, batch_size=20, lr=1e-2)  # the paper's: 120 samples ten times
RIVALS = loop.Settings(steps=120, batch_size=32, lr=3e-3)
BASES = ("lab-llava-sinks", "lab-qwen2vl")
ARMS = ("one", "matched", "two", "random", "kept")


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
            return visual, None
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
    """A stage as `loop.fit` trains it: pictures and a step -> loss."""

    def __init__(self, stage: language.ImageStage, module: nn.Module):
        super().__init__()
        self.stage, self.module = stage, module

    def forward(self, rows: torch.Tensor, step: int) -> torch.Tensor:
        return self.stage.loss(rows, seed=SCENES + step)[0]


def fit(stage: language.ImageStage, module: nn.Module, folder: Path, settings: loop.Settings, muon: float | None,
        about: dict | None = None) -> pd.DataFrame:
    """Train what of a module asks for gradients by a stage, on the first `SCENES` pictures; see `loop.fit`.

    `muon`: learning rate of weight matrices under Muon; None: AdamW for all.
    """
    return loop.fit(
        _Training(stage, module), range(SCENES), folder, settings,
        lambda rows, places: {"rows": torch.tensor(rows), "step": places[0] // settings.batch_size},
        optimizers=lambda named: training.optimizers(named, settings.lr, settings.weight_decay, muon), about=about)


class Workshop:
    """A lab model and what all its arms share: corpus, pictures, the compiled decoder."""

    def __init__(self, base: str):
        self.lvlm = loading.load(base)
        self.lvlm.model.set_attn_implementation("lab_matmul")
        self.corpus, self.pictures = Corpus(SCENES), training_pictures(CACHE, SCENES)
        self.connector = copy.deepcopy(self.lvlm.connector)
        self.decoder = copy.deepcopy(self.lvlm.decoder.state_dict())
        tower = self.lvlm.vision
        some = tower_module.normalise(torch.from_numpy(self.pictures[:128].copy()))
        with torch.no_grad():
            self.patches = tower_module.features(tower, tower_module.states(tower, some))

    def method(self, arm: str, seed: int) -> OneConnector:
        """An arm before its training: tower and decoder as they were, connectors new.

        Raises:
            ValueError: an unknown arm.
        """
        self.lvlm.model.set_submodule(self.lvlm.spec.connector, copy.deepcopy(self.connector))
        self.lvlm.decoder.load_state_dict(self.decoder)
        match arm:
            case "one":
                method = OneConnector(self.lvlm, seed=seed)
            case "matched":
                method = OneConnector(self.lvlm, width=matched_width(self.connector), seed=seed)
            case "two" | "kept":
                method = DIYSink(self.lvlm, front=arm == "two", seed=seed)
            case "random":
                method = DIYSink(self.lvlm, split="random", seed=seed)
            case _:
                raise ValueError(f"unknown arm {arm!r}: {', '.join(ARMS)}")
        torch.manual_seed(seed)
        for connector in connectors(method):
            language.start_connector(self.lvlm.model, connector, self.patches)
        return method

    def fit(self, method: OneConnector, name: str, target: str, settings: loop.Settings,
            trained: list[nn.Module]) -> pd.DataFrame:
        """One stage: captions ("caption") or questions ("questions")."""
        method.requires_grad_(False)
        for part in trained:
            part.requires_grad_(True)
        stage, about = Stage(method, self.corpus, self.pictures, target), {"method": method.kind, **method.settings}
        log = fit(stage, method, CACHE / name, settings, muon=settings.lr, about=about)
        return log.assign(stage=name.rsplit(".", 1)[1])

    def train(self, arm: str, seed: int) -> None:
        """Both stages of an arm, and its weights to `data/methods`; a finished one is not repeated."""
        folder = TRAINED / self.lvlm.name / f"{arm}-{seed}"
        if folder.exists():
            print(f"{folder.name}: finished earlier", flush=True)
            return
        started = time.monotonic()
        method, logs = self.method(arm, seed), []
        name = f"{self.lvlm.name}.{arm}-{seed}"
        align, tune = (replace(settings, seed=seed) for settings in (ALIGN, TUNE))
        if isinstance(method, DIYSink):
            half = replace(align, steps=align.steps // 2)
            of: dict[Show, nn.Module] = {"sinks": method.sink, "others": self.lvlm.connector}
            for show, connector in of.items():
                method.show = show
                logs.append(self.fit(method, f"{name}.{show}", "caption", half, [connector]))
            method.show = "both"
        else:
            logs.append(self.fit(method, f"{name}.align", "caption", align, [self.lvlm.connector]))
        logs.append(self.fit(method, f"{name}.tune", "questions", tune, [*connectors(method), self.lvlm.decoder]))
        method.save(folder, eight_bits=True, steps={"align": align.steps, "tune": tune.steps})
        with atomic(folder / "training.csv") as file:
            pd.concat(logs).to_csv(file, index=False, float_format="%.5g")
        print(f"{folder.name}: trained in {time.monotonic() - started:.0f} s", flush=True)


def connectors(method: OneConnector) -> list[nn.Module]:
    return [method.lvlm.connector, *([method.sink] if isinstance(method, DIYSink) else [])]


def asked(pictures, n: int, seed: int) -> pd.DataFrame:
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
    """Soft routing ("rew"), "gates", or "adapters" with as many parameters; a finished one is not repeated.

    Raises:
        ValueError: an unknown arm.
    """
    folder, settings = TRAINED / base / f"{arm}-{seed}", replace(ROUTER if arm == "rew" else RIVALS, seed=seed)
    if folder.exists():
        print(f"{folder.name}: finished earlier", flush=True)
        return
    started, lvlm = time.monotonic(), loading.load(base)
    match arm:
        case "rew":
            method = ReW(lvlm, diysink=TRAINED / base / f"two-{seed}", seed=seed)
        case "gates":
            method = Gates(lvlm, normalised=True, seed=seed)
        case "adapters":
            method = LoRA(lvlm, parameters=n_parameters(Gates(loading.load(base))), seed=seed)
        case _:
            raise ValueError(f"unknown arm {arm!r}: rew, gates or adapters")
    method.requires_grad_(False)
    for parameter in method.changed().values():
        parameter.requires_grad_(True)
    samples = asked(pictures, settings.steps * settings.batch_size, seed)
    if arm == "rew":
        samples = balanced(samples, 120, seed)
    log = loop.fit(method, samples["sample"].tolist(), CACHE / f"{base}.{folder.name}", settings, Collate(lvlm),
                     about={"method": method.kind, **method.settings})
    method.save(folder, steps=settings.steps, parameters=n_parameters(method))
    with atomic(folder / "training.csv") as file:
        log.to_csv(file, index=False, float_format="%.5g")
    print(f"{folder.name}: trained in {time.monotonic() - started:.0f} s", flush=True)


def main(bases: list[str]) -> None:
    """All arms and seeds on the lab models `bases`."""
    training.threads()
    for base in bases:
        shop = Workshop(base)
        for seed in SEEDS:
            for arm in ARMS:
                shop.train(arm, seed)
            for arm in ("rew", "gates", "adapters"):
                train_rival(base, arm, seed, shop.pictures)
