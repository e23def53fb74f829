"""The lab's POPE, MME and MMStar: same columns, same balance and same scores as the benchmarks they stand for.

Tables are built from the held-out test scenes, in order, so every machine builds the same ones. The columns are
those of `sinkstudy.benchmarks.load`, and its scorers take them. Instead of `image` there is `scene` (index in the
split; `pictures` renders it), and further `family`, `type` (global, local or mixed) and whether the scene is `simple`,
known by construction.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import lru_cache

import numpy as np
import pandas as pd
import torch

from sinkstudy.world import questions as q
from sinkstudy.world.drawing import CHUNK, HIDDEN, KINDS, SIMPLE, render

PERCEPTION = {"existence": "existence", "count": "things", "position": "place", "color": "colour", "scene": "scene",
              "light": "light", "texture": "texture", "size": "size", "mark": "mark"}
COGNITION = {"commonsense_reasoning": "material", "numerical_calculation": "sum", "logical_comparison": "both"}
CAPABILITIES = {  # MMStar's six; families whose open question has at least four options
    "coarse perception": ("scene", "light", "texture", "main colour"),
    "fine-grained perception": ("colour", "place"),
    "instance reasoning": ("which colour", "behind"),
    "logical reasoning": ("both", "relation"),
    "science & technology": ("material",),
    "math": ("things", "sum"),
}


def _scenes(split: str, start: int, n: int) -> list[q.Facts]:
    return [_chunk(split, i // CHUNK)[i % CHUNK] for i in range(start, start + n)]


@lru_cache(64)
def _chunk(split: str, chunk: int) -> list[q.Facts]:
    return q.facts(render(split, chunk * CHUNK, CHUNK, pictures=False))


def pope(images: int = 100, split: str = "test" + HIDDEN) -> pd.DataFrame:
    """POPE (Li et al. 2023): is there a … ? Six questions an image and category, three of them about absent kinds.

    Things are half hidden, unless `split` says otherwise: on whole ones every lab model is right, and none can lose.
    Absent kinds are drawn at random (`random`), are the most frequent ones (`popular`), or those that most often
    appear together with what is there (`adversarial`); frequencies are counted on training scenes.

    Returns:
        id, image_id, question, answer, category, scene, family, type: 18 rows an image.
    """
    train = [{t.kind for t in f.things} for f in _scenes("train", 0, 4096)]
    often = Counter(k for kinds in train for k in kinds)
    together = Counter((a, b) for kinds in train for a in kinds for b in kinds if a != b)
    rng, rows = random.Random(11), []
    pool = [(i, f) for i, f in enumerate(_scenes(split, 0, 4 * images + 256)) if len(f.things) >= 3][:images]
    for i, f in pool:
        present = [t.kind for t in f.things]
        absent = [k for k in KINDS if k not in present]
        negatives = {
            "random": rng.sample(absent, 3),
            "popular": sorted(absent, key=lambda k: -often[k])[:3],
            "adversarial": sorted(absent, key=lambda k: -sum(together[k, p] for p in present))[:3],
        }
        asked = rng.sample(present, 3)
        for category, missing in negatives.items():
            for yes, no in zip(asked, missing, strict=True):
                for kind, answer in ((yes, "yes"), (no, "no")):
                    rows.append({"question": f"is there a {kind} ?", "answer": answer, "category": category,
                                 "scene": i, "family": "existence"})
    return _finished(rows, split)


def mme(images: int = 30, split: str = "test") -> pd.DataFrame:
    """MME (Fu et al. 2023): for each category and image one question whose answer is yes and one whose is no.

    Returns:
        id, image_id, question, answer, category, group (perception or cognition), scene, family, type.
    """
    rng, rows = random.Random(12), []
    at = 0
    for group, categories in (("perception", PERCEPTION), ("cognition", COGNITION)):
        for category, family in categories.items():
            kept = 0
            while kept < images:
                start, at = at, at + 64
                for i, f in enumerate(_scenes(split, start, 64), start):
                    pair = [q.ask(f, family, rng, yes=yes) for yes in (True, False)]
                    if None in pair or kept == images:
                        continue
                    kept += 1
                    rows += [{"question": p.text, "answer": p.answer, "category": category, "group": group,
                              "scene": i, "family": family} for p in pair]
    return _finished(rows, split)


def mmstar(questions: int = 40, split: str = "test") -> pd.DataFrame:
    """MMStar (Chen et al. 2024): four options, six capabilities, `questions` of each; one question an image.

    Returns:
        id, image_id, question (with its options), answer (a letter), category, l2_category, scene, family, type.
    """
    rng, rows = random.Random(13), []
    at = 0
    for category, families in CAPABILITIES.items():
        kept = 0
        while kept < questions:
            (f,), at = _scenes(split, at, 1), at + 1
            family = families[kept % len(families)]
            asked = q.ask(f, family, rng)
            if asked is None:
                continue
            kept += 1
            text, letter = q.choice_form(asked, rng)
            rows.append({"question": text, "answer": letter, "category": category, "l2_category": family,
                         "scene": at - 1, "family": family})
    return _finished(rows, split)


def _finished(rows: list[dict], split: str) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    table.insert(0, "id", [f"{i:06d}" for i in range(len(table))])
    table.insert(1, "image_id", [f"{split}-{scene:06d}" for scene in table.scene])
    return table.assign(type=table.family.map(q.TYPES), simple=split.endswith(SIMPLE))


def pictures(table: pd.DataFrame) -> tuple[torch.Tensor, np.ndarray]:
    """The table's pictures, each once: uint8 [images, 3, 96, 96], and for each row the place of its own."""
    unique, place = np.unique(table.image_id.astype(str), return_inverse=True)
    chunks: dict[tuple[str, int], list[int]] = {}
    for split, _, scene in (name.rpartition("-") for name in unique):
        chunks.setdefault((split, int(scene) // CHUNK), []).append(int(scene) % CHUNK)
    drawn = [render(split, chunk * CHUNK, CHUNK).images[rows] for (split, chunk), rows in chunks.items()]
    return torch.cat(drawn), place
