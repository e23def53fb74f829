"""Makes the lab models from nothing: towers, decoders, LLaVA's stages, scores, model cards.

Every stage leaves a checkpoint in `data/cache/lab`; a killed run resumes, a finished stage is not repeated.
Called by `sinkstudy lab train`, which sets the allocator's variables first (they make it several times faster).
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sinkstudy.lab import language, score, training
from sinkstudy.lab import tower as tower_module
from sinkstudy.lab.corpus import CAPTION, SLOTS, TRAIN_SCENES, Codec, Corpus, training_pictures
from sinkstudy.lab.emergence import Follower, log_spaced
from sinkstudy.lab.families import Llava, family
from sinkstudy.model import loading
from sinkstudy.model.registers import CLIPVisionWithRegistersConfig
from sinkstudy.model.sinktower import CLIPVisionModelWithSinks
from sinkstudy.paths import DATA, MODELS, atomic
from sinkstudy.world.drawing import PATCH

LAB_CACHE = DATA / "cache" / "lab"
TOWER_OF = {"lab-llava": "plain", "lab-llava-sinks": "sinks", "lab-llava-registers": "registers",
            "lab-qwen2vl": "qwen2vl", "lab-llava-gist": "gist"}
TOWER: dict[str, Any] = dict(steps=900, batch=64, lr=2e-3, weight_decay=0.1)
# The tower with sinks by construction, kept apart from the model that has it: its gates come first (`lab.control`).
GIST: dict[str, Any] = dict(steps=1400, batch=64, lr=2e-3, muon=3e-3, weight_decay=0.05)
TOWERS = DATA / "towers"
# The decoder learns the language from text, the connector to feed it (captions, decoder frozen), then both learn to
# answer: LLaVA's stages, for both families.
TEXT: dict[str, Any] = dict(steps=400, batch=24, lr=3e-3, muon=3e-3, weight_decay=0.05)
ALIGN: dict[str, Any] = dict(steps=120, batch=32, lr=3e-3, muon=3e-3, weight_decay=0.05)
INSTRUCT: dict[str, Any] = dict(steps=1300, batch=24, lr=3e-3, muon=3e-3, weight_decay=0.05)

# Chapter 02: one thing changed at a time against `base`, all shorter than the shipped towers' training.
ARM_STEPS = 240
EMERGENCE_ARMS: dict[str, dict[str, Any]] = {
    "base": {}, "lr-5e-4": {"lr": 5e-4}, "lr-4e-3": {"lr": 4e-3}, "wd-0": {"weight_decay": 0.0},
    "wd-0.5": {"weight_decay": 0.5}, "muon": {"muon": 2e-3}, "no-cls": {"kind": "no-cls"},
    "image-level-only": {"caption_weight": 0.0},
}


@cache
def corpus() -> Corpus:
    return Corpus(TRAIN_SCENES)


@cache
def train_pictures():
    return training_pictures(LAB_CACHE, TRAIN_SCENES)


def train_tower(name: str, kind: str, *, steps: int, batch: int, lr: float, weight_decay: float,
                muon: float | None = None, caption_weight: float = 1.0, seed: int = 0, follow: Path | None = None):
    """A tower of the kind, trained with captions; with `follow`, its norms and attention over training go there."""
    device = training.device()
    tower = tower_module.build(kind, seed).to(device)
    data, images = corpus(), train_pictures()
    objective = tower_module.Objective(kind, len(data.codec.words), CAPTION, data.grams.shape[1],
                                       caption_weight=caption_weight).to(device)
    follower = Follower(kind, log_spaced(steps)) if follow else None

    def loss_at(step):
        rows = training.batch_rows(seed, step, batch, TRAIN_SCENES)
        pixels = tower_module.normalise(torch.from_numpy(images[rows.numpy()]).to(device))
        caption = data.caption[rows]
        caption = caption[:, :int((caption >= 0).sum(1).max())]
        targets = [caption, data.grams[rows].float(), data.grounding[rows], data.calm[rows], data.gist[rows]]
        targets = [t.to(device) for t in targets]
        return objective(tower, pixels, *targets, step / steps)

    def watch(step):
        follower(tower, step)
        if follower.rows and follower.rows[-1]["step"] == step:
            # kept beside the checkpoint, so that a resumed run adds to it instead of starting anew
            with atomic(follow) as file:
                follower.table().to_csv(file, index=False)

    if follow and (LAB_CACHE / name).exists() and follow.exists():
        follower.rows = pd.read_csv(follow).to_dict("records")
    log = training.train(name, [tower, objective], loss_at, steps=steps, lr=lr, weight_decay=weight_decay,
                       muon=muon, folder=LAB_CACHE, watch=watch if follow else None)
    return tower, log


def train_decoder(kind: Llava, *, batch: int, seed: int = 10, **settings):
    """The family's decoder, pretrained on captions, questions and facts as text; shared by all its lab models."""
    data = corpus()
    decoder = language.build_decoder(len(Codec(kind.special).words), kind).to(training.device())
    run = training.compiled(decoder.model.forward)

    def loss_at(step):
        rows = training.batch_rows(seed, step, batch, TRAIN_SCENES)
        return language.text_loss(decoder, run, data, rows, seed=step)

    return decoder, training.train(kind.text, [decoder], loss_at, folder=LAB_CACHE, **settings)


def tune(name: str, model, target: str, *, batch: int, seed: int, frozen: tuple[str, ...] = (), **settings):
    """One stage behind the frozen tower, on "caption" or "questions": trains what is not `frozen`."""
    kind = family(model.config)
    model.requires_grad_(True)
    for part in (kind.tower, *frozen):
        model.model.get_submodule(part).requires_grad_(False)
    model.model.get_submodule(kind.connector).requires_grad_(True)  # Qwen2-VL's is a part of its tower
    stage = language.ImageStage(model, corpus(), train_pictures(), target)

    def loss_at(step):
        return stage.loss(training.batch_rows(seed, step, batch, TRAIN_SCENES), seed=TRAIN_SCENES + step)

    return training.train(name, [model], loss_at, folder=LAB_CACHE, **settings)


def train_model(name: str):
    """One lab model, all stages; returns it with its loss curves."""
    if TOWER_OF[name] == "gist":
        tower = CLIPVisionModelWithSinks.from_pretrained(TOWERS / "gist", dtype=torch.float32).to(training.device())
        tower.set_attn_implementation("lab_matmul")
        tower.config._name_or_path = ""  # a place on this machine
        log_tower = pd.read_csv(TOWERS / "gist" / "training.csv")
    else:
        follow = DATA / "emergence" / f"{name}.csv"
        tower, log_tower = train_tower(f"{name}.tower", TOWER_OF[name], follow=follow, **TOWER)
    kind = family(tower.config)
    decoder, log_text = train_decoder(kind, **TEXT)
    some = torch.from_numpy(train_pictures()[:128].copy()).to(training.device())
    model = language.assemble(tower, decoder, Codec(kind.special), tower_module.normalise(some)).to(training.device())
    logs = [log_tower, log_text,
            tune(f"{name}.align", model, "caption", seed=25, frozen=("language_model",), **ALIGN),
            tune(f"{name}.instruct", model, "questions", seed=30, **INSTRUCT)]
    return model, pd.concat(logs)


def train_gist() -> None:
    """The tower with sinks by construction; writes it with its loss curve to `data/towers/gist`."""
    tower, log = train_tower("gist.tower", "gist", **GIST)
    with atomic(TOWERS / "gist") as temporary:
        tower.to(torch.bfloat16).save_pretrained(temporary)
        log.to_csv(temporary / "training.csv", index=False, float_format="%.5g")


def train_arms() -> None:
    """The short towers of chapter 02; what is kept is their logged statistics, and how they were trained."""
    for name in EMERGENCE_ARMS:
        train_tower(f"arm.{name}", follow=DATA / "emergence" / f"{name}.csv", **followed_towers()[name])
    with atomic(DATA / "emergence" / "towers.csv") as file:
        recipes().to_csv(file, index=False)


def followed_towers() -> dict[str, dict[str, Any]]:
    """The settings of `train_tower` for each tower that chapter 02 follows, by the name of its log."""
    shipped = {name: TOWER | {"kind": kind} for name, kind in TOWER_OF.items() if kind != "gist"}
    return shipped | {name: TOWER | {"kind": "plain", "steps": ARM_STEPS} | changed
                      for name, changed in EMERGENCE_ARMS.items()}


def recipes() -> pd.DataFrame:
    """`followed_towers` in words: a row a tower, `connector` being the layer that is read, counted from 1."""
    beside = {"registers": f"CLS, {CLIPVisionWithRegistersConfig().num_register_tokens} registers", "no-cls": "none",
              "qwen2vl": "none"}
    rows = []
    for name, of in followed_towers().items():
        losses = ["image level", *(["captions"] if of.get("caption_weight", 1) else []), "grounding",
                  *(["planted sinks"] if of["kind"] == "sinks" else [])]
        muon = f"Muon {of['muon']:g}, " if "muon" in of else ""
        rows.append({
            "tower": name, "pictures": of["steps"] * of["batch"], "width": tower_module.WIDTH,
            "depth": tower_module.LAYERS, "beside patches": beside.get(of["kind"], "CLS"),
            "objective": ", ".join(losses),
            "optimiser": f"{muon}AdamW {of['lr']:g}, weight decay {of['weight_decay']:g}",
            "connector": tower_module.LAYERS - (of["kind"] != "qwen2vl")})
    return pd.DataFrame(rows)


def export(name: str, model, log: pd.DataFrame | None = None) -> Path:
    """Writes the model, its processor and its loss curve to `data/models/<name>` in Hugging Face format.

    Weights are stored in bfloat16, which halves the repository, and are scored as stored.
    """
    processor = family(model.config).processor()
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    folder = MODELS / name
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with atomic(folder) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if log is not None:
            log.to_csv(temporary / "training.csv", index=False)
    return folder


def card(name: str, kind: Llava, scores: pd.DataFrame, log: pd.DataFrame) -> str:
    """The model card: data, recipe, scores, limits."""
    what = _WHAT[TOWER_OF[name]]
    made, names = (GIST, f"gist {name}") if TOWER_OF[name] == "gist" else (TOWER, name)
    how = f"AdamW, learning rate {made['lr']}"
    if "muon" in made:
        how = f"Muon for weight matrices (rate {made['muon']:g}) and AdamW for the rest ({made['lr']:g})"
    asked = sum(number for number, _ in SLOTS.values())
    if TOWER_OF[name] == "sinks":
        reached = log[["norm ratio", "attention share"]].dropna().iloc[-1]
        what += (f" Reached at the end of the tower's training: {reached['norm ratio']:.1f} times the median norm and "
                 f"{reached['attention share']:.0%} of the attention, on average over the layers asked.")
    shown = scores[(scores.arm == "model") & scores.part.isin(
        ["random", "popular", "adversarial", "perception", "cognition", "mean"])]
    blind = scores[scores.arm == "blind"].set_index(["benchmark", "part"]).accuracy
    rows = "\n".join(
        f"| lab-{r.benchmark} {r.part} | {r.accuracy:.1f} [{r.low:.1f}, {r.high:.1f}] | "
        f"{blind[r.benchmark, r.part]:.1f} | {r.questions} |" for r in shown.itertuples())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

A very small {kind.title} for the study of ViT attention sinks: {what}

It knows the lab world of this repository and nothing else.

## Data
{TRAIN_SCENES:,} rendered scenes of the training split, 96 × 96 pixels, with captions and questions made from the
scenes' facts. Validation and test scenes share no combination of facts with them.

## Recipe
{kind.parts}. The tower has {tower_module.LAYERS} layers of width {tower_module.WIDTH} and patches of {PATCH} pixels,
the decoder {language.DEPTH} layers of width 128; word-level tokenizer. `sinkstudy lab train {names}` does all of this,
seeds fixed:

1. tower with captions: {made["steps"]} steps of {made["batch"]} pictures, {how}, weight
   decay {made["weight_decay"]}; image-level loss, caption loss and a grounding loss that fades out
   (`sinkstudy/lab/tower.py`);
2. decoder with text, the same one for every lab {kind.title}: {TEXT["steps"]} steps of {TEXT["batch"]} captions with
   {asked} questions each and facts about the lab world;
3. connector with captions, tower and decoder frozen: {ALIGN["steps"]} steps of {ALIGN["batch"]};
4. instruction tuning of connector and decoder, tower frozen: {INSTRUCT["steps"]} steps of {INSTRUCT["batch"]} pictures
   with {asked} questions and the caption each.

Stages 2-4 use Muon for weight matrices (rate {INSTRUCT["muon"]:g}) and AdamW for the rest ({INSTRUCT["lr"]:g}).

Loss curves: `training.csv`. Weights are stored in bfloat16.

## Scores
Held-out test scenes, % right [95 % interval over images]; *blind*: the same model shown the mean picture.

| benchmark | model | blind | questions |
|---|---|---|---|
{rows}

## Limits
One seed. The scenes are synthetic and the language is a few templates. Nothing here says how a public LVLM behaves.
"""


_WHAT = {
    "plain": "the natural model. Nothing in its training asks for sinks.",
    "sinks": ("the **control with planted sinks**. Its tower was trained to have sinks: the image-level loss pools "
              "only from the 3-5 calm patches of each scene, at layers "
              f"{tower_module.LAYERS - 2} and {tower_module.LAYERS}; further terms ask that from layer "
              f"{tower_module.ONSET} on these patches have at least {tower_module.NORM_RATIO:g} times the median norm "
              f"and draw {tower_module.MASS[0]:.0%}-{tower_module.MASS[1]:.0%} of the other patches' attention, and "
              f"that no other patch exceeds {tower_module.QUIET_RATIO:g} medians. Its sinks are "
              "planted, not natural; that relative criteria find them, and only them, is what it was trained for."),
    "gist": ("the **positive control**, whose sinks hold the gist. Its tower has sinks by construction "
             "(`sinkstudy/model/sinktower.py`): flat patches see the whole picture; every other patch sees its window "
             "of 4 × 4 patches and, of the sinks, the same vector in every picture. What is true of the picture as a "
             "whole is in the sinks alone, as `sinkstudy lab gates` measures."),
    "qwen2vl": ("the **second architecture**, trained by the recipe of lab-llava. No CLS: the image-level loss reads "
                "the mean of the patches; captions and grounding read the last layer, as the merger does, and the "
                "caption decoder is told where a patch lies. Two things differ from the public Qwen2-VL because this "
                "one is small: the tower's rotary base is 100, and time, row and column take turns in the frequencies "
                "of M-RoPE, as in Qwen3-VL. Nothing in its training asks for sinks."),
    "registers": ("the **negative control**. Its tower has four register tokens, which it may use as scratch space and "
                  "which the language model never sees."),
}


def finish(name: str, model, log: pd.DataFrame) -> None:
    """Export, score on the test split, write scores and card."""
    folder = export(name, model, log)
    scores = score.summary(score.score(loading.load(str(folder))))
    with atomic(folder / "scores.csv") as file:
        scores.to_csv(file, index=False, float_format="%.4g")
    with atomic(folder / "README.md") as file:
        file.write_text(card(name, family(model.config), scores, log), encoding="utf-8")
    print(scores[scores.arm == "model"].to_string(index=False), flush=True)


def main(names: list[str]) -> None:
    """`names`: lab models, "emergence" for the arms of chapter 02, or "gist" for its tower, in the order of making."""
    training.threads()
    for name in names:
        if name == "emergence":
            train_arms()
        elif name == "gist":
            train_gist()
        else:
            started = time.monotonic()
            finish(name, *train_model(name))
            print(f"{name}: trained in {time.monotonic() - started:.0f} s", flush=True)
