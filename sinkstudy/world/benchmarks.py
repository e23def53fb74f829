"""The lab's versions of eight benchmarks: same columns, same form of answers and same scores as the originals.

POPE, MME and MMStar have their originals' balance. GQA, ScienceQA, TextVQA, MMMU and MathVista, of which the paper's
tables are made, ask what the lab models know in the form of theirs.

Tables are built from the held-out test scenes, in order, so every machine builds the same ones. The columns are
those of `sinkstudy.benchmarks.load`, and its scorers take them: `id`, `image_id`, `question`, `answer`, `category` and
those that each benchmark has beyond. Instead of `image` there is `scene` (index in the split; `render_pictures` renders
it), and further `family`, `type` (global, local or mixed) and whether the scene is `simple`, known by construction.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch

from sinkstudy.wording import with_options
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
STRUCTURAL = {"query": ("colour", "which colour", "behind", "relation"), "verify": ("colour", "which colour")}  # GQA's
SUBJECTS = {"natural science": ("material",), "social science": ("scene",)}  # ScienceQA's
DISCIPLINES = {"art": ("main colour", "texture"), "geography": ("scene", "behind"), "materials": ("material",),
               "mathematics": ("things", "sum"), "logic": ("relation", "both")}  # for MMMU's
MATHEMATICS = {"numeric": ("things", "parts", "sum"), "numeric, with options": ("things", "sum"),
               "comparison": ("compare",)}  # for MathVista's tasks
# The first test scene of each; POPE, MME and MMStar begin at 0. No scene is asked about by two of these.
FIRST = {"GQA": 16 * CHUNK, "ScienceQA-IMG": 20 * CHUNK, "TextVQA": 24 * CHUNK, "MMMU": 28 * CHUNK,
         "MathVista": 32 * CHUNK}


def _scenes(split: str, start: int, n: int) -> list[q.Facts]:
    return [_chunk(split, i // CHUNK)[i % CHUNK] for i in range(start, start + n)]


@lru_cache(64)
def _chunk(split: str, chunk: int) -> list[q.Facts]:
    return q.facts(render(split, chunk * CHUNK, CHUNK, pictures=False))


def pope(images: int = 100, split: str = "test" + HIDDEN) -> pd.DataFrame:
    """POPE (Li et al. 2023): is there a … ? Six questions an image and category, three of them about absent kinds.

    Things are half hidden, unless `split` says otherwise: on whole ones the lab models are nearly always right.
    Absent kinds are drawn at random (`random`), are the most frequent ones (`popular`), or those that most often
    appear together with what is there (`adversarial`); frequencies are counted on training scenes.
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
                    rows.append(_row(q.Question(f"is there a {kind} ?", answer, "existence"), category, i))
    return _finished(rows, split)


def mme(images: int = 30, split: str = "test") -> pd.DataFrame:
    """MME (Fu et al. 2023): for each category and image one question whose answer is yes and one whose is no.

    Beyond: `group` (perception or cognition).
    """
    rng, rows, at = random.Random(12), [], 0
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
                    rows += [_row(asked, category, i, group=group) for asked in pair]
    return _finished(rows, split)


def mmstar(questions: int = 40, split: str = "test") -> pd.DataFrame:
    """MMStar (Chen et al. 2024): four options, six capabilities, `questions` of each; one question an image.

    The question has its options, the answer is a letter; beyond: `l2_category`.
    """
    rng, rows = random.Random(13), []
    for category, scene, asked in _one_a_scene(CAPABILITIES, questions, split, 0, rng):
        text, letter = q.choice_form(asked, rng)
        rows.append(_row(asked, category, scene, question=text, answer=letter, l2_category=asked.family))
    return _finished(rows, split)


def gqa() -> pd.DataFrame:
    """GQA (Hudson & Manning 2019): attributes of things and relations between them, answered in a word or two.

    Six questions about each of 60 images, whose things are half hidden: four open ones, and two whose answer is yes in
    every other scene that is tried. Categories are two of the original's five structural types.
    """
    rng, rows, at, split = random.Random(14), [], FIRST["GQA"], "test" + HIDDEN
    while len(rows) < 60 * sum(map(len, STRUCTURAL.values())):
        (f,), at = _scenes(split, at, 1), at + 1
        asked = [(category, q.ask(f, family, rng, yes=None if category == "query" else at % 2 == 0))
                 for category, families in STRUCTURAL.items() for family in families]
        if all(question for _, question in asked):
            rows += [_row(question, category, at - 1) for category, question in asked]
    return _finished(rows, split)


def scienceqa() -> pd.DataFrame:
    """ScienceQA with pictures (Lu et al. 2022): options, and knowledge that no picture shows; one question an image.

    The answer is a letter, the category a subject; beyond: `choices` and `hint` (none).
    """
    rng = random.Random(15)
    of = _one_a_scene(SUBJECTS, 60, "test", FIRST["ScienceQA-IMG"], rng)
    rows = [_row(asked, category, scene, hint="", **_with_choices(asked, rng)) for category, scene, asked in of]
    return _finished(rows, "test")


def textvqa() -> pd.DataFrame:
    """TextVQA (Singh et al. 2019): reading what stands on things, here marks; ten people agree on each answer.

    One question an image: which thing of this size has a mark, or has none? Whether a thing has one is not asked, for
    the lab models are right on it. Things are whole: of half hidden ones the mark may not be seen.

    Beyond: `answers`.
    """
    of = _one_a_scene({"all": ("both",)}, 96, "test", FIRST["TextVQA"], random.Random(16))
    rows = [_row(asked, category, scene, answers=[asked.answer] * 10) for category, scene, asked in of]
    return _finished(rows, "test")


def mmmu() -> pd.DataFrame:
    """MMMU (Yue et al. 2024): four options, several disciplines, 24 questions of each; one question an image.

    The answer is a letter; beyond: `choices`, `question_type`, `images` (empty: the one picture is that of `image_id`).
    """
    rng = random.Random(17)
    of = _one_a_scene(DISCIPLINES, 24, "test", FIRST["MMMU"], rng)
    rows = [_row(asked, category, scene, question_type="multiple-choice", images=[], **_with_choices(asked, rng))
            for category, scene, asked in of]
    return _finished(rows, "test")


def mathvista() -> pd.DataFrame:
    """MathVista (Lu et al. 2024): numbers said freely or chosen, and comparisons; one question an image.

    Comparisons are of things half hidden, on whole ones every lab model is right; half hidden things are counted no
    better than by chance, so numbers are of whole ones.

    The answer is digits, or the text of an option; beyond: `choices` (None: free form), `precision` (None),
    `question_type`, `answer_type`, `query` (what is asked), `skills`.
    """
    rng, rows, splits = random.Random(18), [], []
    for number, (category, families) in enumerate(MATHEMATICS.items()):
        of, start = "test" + HIDDEN * (category == "comparison"), FIRST["MathVista"] + number * CHUNK
        for _, scene, asked in _one_a_scene({category: families}, 48, of, start, rng):
            if category == "numeric":
                form = {"answer": str(q.NUMBERS.index(asked.answer)), "choices": None, "query": asked.text,
                        "question_type": "free_form", "answer_type": "integer"}
            else:
                choices = q.four_options(asked, rng) if asked.options else ["yes", "no"]
                query = with_options(asked.text, choices) if asked.options else asked.text
                form = {"choices": choices, "query": query, "question_type": "multi_choice", "answer_type": "text"}
            rows.append(_row(asked, category, scene, precision=None, skills=[category], **form))
            splits.append(of)
    return _finished(rows, splits)


def _one_a_scene(
    families: Mapping[str, Sequence[str]], n: int, split: str, start: int, rng: random.Random
) -> Iterator[tuple[str, int, q.Question]]:
    """(category, scene, question): n of each category, its families in turn, from scene `start` on."""
    at = start
    for category, of in families.items():
        kept = 0
        while kept < n:
            (f,), at = _scenes(split, at, 1), at + 1
            asked = q.ask(f, of[kept % len(of)], rng)
            if asked is not None:
                kept += 1
                yield category, at - 1, asked


def _row(asked: q.Question, category: str, scene: int, **more: Any) -> dict[str, Any]:
    """A row of a table; `more` columns, some in place of the question's own."""
    own = {"question": asked.text, "answer": asked.answer, "category": category}
    return own | more | {"scene": scene, "family": asked.family}


def _with_choices(asked: q.Question, rng: random.Random) -> dict[str, Any]:
    options = q.four_options(asked, rng)
    return {"choices": options, "answer": "ABCD"[options.index(asked.answer)]}


def _finished(rows: list[dict], split: str | Sequence[str]) -> pd.DataFrame:
    """The table of these rows; scenes are of one split, or each row's of its own."""
    table, splits = pd.DataFrame(rows), [split] * len(rows) if isinstance(split, str) else split
    table.insert(0, "id", [f"{i:06d}" for i in range(len(table))])
    table.insert(1, "image_id", [f"{of}-{scene:06d}" for of, scene in zip(splits, table.scene, strict=True)])
    return table.assign(type=table.family.map(q.TYPES), simple=[of.endswith(SIMPLE) for of in splits])


def render_pictures(table: pd.DataFrame) -> tuple[torch.Tensor, np.ndarray]:
    """The table's pictures, each once: uint8 [images, 3, 96, 96], and for each row the place of its own."""
    unique, place = np.unique(table.image_id.astype(str), return_inverse=True)
    chunks: dict[tuple[str, int], list[int]] = {}
    for split, _, scene in (name.rpartition("-") for name in unique):
        chunks.setdefault((split, int(scene) // CHUNK), []).append(int(scene) % CHUNK)
    drawn = [render(split, chunk * CHUNK, CHUNK).images[rows] for (split, chunk), rows in chunks.items()]
    return torch.cat(drawn), place
