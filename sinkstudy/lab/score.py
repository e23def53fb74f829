"""How good the lab models are at their world: the three lab benchmarks, with blind baselines."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch

from sinkstudy import stats
from sinkstudy.answers.evaluate import evaluate
from sinkstudy.benchmarks import right
from sinkstudy.model.lvlm import LVLM
from sinkstudy.world import benchmarks
from sinkstudy.world import questions as q
from sinkstudy.world.drawing import render

BENCHMARKS: dict[str, Callable[[], pd.DataFrame]] = {
    "POPE": partial(benchmarks.pope, split="test"), "MME": benchmarks.mme, "MMStar": benchmarks.mmstar}


def greedy_answers(lvlm: LVLM, images: torch.Tensor, questions: list[str], *, batch_size: int = 64) -> list[str]:
    """Greedy answers, one for each picture (uint8 [n, 3, height, width]) and question."""
    same = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]
    table = pd.DataFrame({"id": range(len(same)), "image_id": same, "question": questions, "image": list(images)})
    return evaluate(lvlm, table, max_new_tokens=4, batch_size=batch_size, cache=None).prediction.tolist()


def question_prior(table: pd.DataFrame, scenes: int = 4096) -> list[str]:
    """The best answer that knows no picture: for each question the one most frequent in training."""
    rng = random.Random(5)
    seen: dict[str, Counter] = defaultdict(Counter)
    by_family: dict[str, Counter] = defaultdict(Counter)
    for f in q.facts(render("train", 0, scenes, pictures=False)):
        for family in q.TYPES:
            asked = q.ask(f, family, rng, yes=rng.random() < 0.5)
            if asked is not None:
                seen[asked.text][asked.answer] += 1
                by_family[family][asked.answer] += 1
    out = []
    for row in table.itertuples():
        counts = seen.get(row.question) or by_family[row.family]
        out.append("A" if row.answer in tuple("ABCD") else counts.most_common(1)[0][0])
    return out


def correct(table: pd.DataFrame, benchmark: str, said: list[str]) -> pd.Series:
    """Which of the texts answer their row's question rightly, by the strict rule: bool, a row each."""
    return right(table.assign(prediction=said), benchmark, "strict").astype(bool)


def score(lvlm: LVLM) -> pd.DataFrame:
    """Every row of the three benchmarks with `right` (the model), `blind` (the model shown the mean picture) and
    `prior` (the most frequent training answer to the same question)."""
    out = []
    for name, make in BENCHMARKS.items():
        table = make()
        images, place = benchmarks.render_pictures(table)
        unseen = images.float().mean(0, keepdim=True).round().to(torch.uint8).expand(len(table), -1, -1, -1)
        questions = table.question.tolist()
        out.append(table.assign(
            benchmark=name,
            right=correct(table, name, greedy_answers(lvlm, images[place], questions)),
            blind=correct(table, name, greedy_answers(lvlm, unseen, questions)),
            prior=correct(table, name, question_prior(table))))
    return pd.concat(out, ignore_index=True)


def summary(scored: pd.DataFrame) -> pd.DataFrame:
    """Accuracy in % by benchmark and part, with 95 % intervals that draw whole images."""
    parts = [("POPE", c, (scored.benchmark == "POPE") & (scored.category == c))
             for c in ("random", "popular", "adversarial")]
    parts += [("MME", g, (scored.benchmark == "MME") & (scored.group == g)) for g in ("perception", "cognition")]
    parts += [("MMStar", "mean", scored.benchmark == "MMStar")]
    parts += [(b, c, (scored.benchmark == b) & (scored.category == c))
              for b in ("MME", "MMStar") for c in scored[scored.benchmark == b].category.unique()]
    parts += [("all", t, scored.type == t) for t in ("global", "local", "mixed")]
    rows = []
    for benchmark, part, mask in parts:
        for arm in ("right", "blind", "prior"):
            chosen = scored[mask]
            value = stats.mean_interval(100.0 * chosen[arm].to_numpy(float), clusters=chosen.scene.to_numpy(),
                                        method="percentile")
            rows.append({"benchmark": benchmark, "part": part, "arm": {"right": "model"}.get(arm, arm),
                         "accuracy": value.value, "low": value.low, "high": value.high, "images": value.n,
                         "questions": int(np.sum(mask))})
    return pd.DataFrame(rows)
