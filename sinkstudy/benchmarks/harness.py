"""Answers in the form of two evaluation harnesses' own result files, so that their tools read on where we stop.

- VLMEvalKit (Duan et al. 2024): its table of predictions, `<model>_<benchmark>.tsv`, the form that PRED_FORMAT=tsv has
  there (an xlsx would take a package that the study does without).
- lmms-eval (Zhang et al. 2025): `<task>_samples_<task>.jsonl`, a line a question, and `<task>_results.json`.

Forms as at the commits that `rules` names. Numbers in the results are by lmms-eval's rule under lmms-eval's names, and
by the official and, where there is one, the strict rule under ours: they differ, see the page *Why two harnesses
disagree*. A `doc_id` is a row's place in our table, which need not be the place in the harness's copy of the data.
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from sinkstudy.benchmarks import rules
from sinkstudy.benchmarks.rows import letters
from sinkstudy.benchmarks.score import answered, right
from sinkstudy.paths import atomic

TASKS = {  # of lmms-eval
    "POPE": "pope", "MME": "mme", "MMStar": "mmstar", "GQA": "gqa", "ScienceQA-IMG": "scienceqa_img",
    "TextVQA": "textvqa_val", "MMMU": "mmmu_val", "MathVista": "mathvista_testmini", "own": "own",
}


def write(table: pd.DataFrame, benchmark: str, prompts: list[str], model: str, folder: Path) -> list[Path]:
    """Write a model's answers to a benchmark for both harnesses.

    Args:
        table: the benchmark's, with `prediction`.
        prompts: what each row was asked, without the chat format.
        model: its name in the files; with an intervention's name if there was one.
        folder: gets `vlmevalkit/<model>/<model>_<benchmark>.tsv` and, in `lmms-eval/<model>`, samples and results.

    Returns:
        The three files.

    Raises:
        ValueError: as `score.right`.
    """
    task = TASKS[benchmark]
    place = folder / "lmms-eval" / model
    files = [folder / "vlmevalkit" / model / f"{model}_{benchmark}.tsv", place / f"{task}_samples_{task}.jsonl",
             place / f"{task}_results.json"]
    samples = _samples(table, benchmark, prompts)
    texts = ["".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples),
             json.dumps(_results(table, benchmark, task, model), ensure_ascii=False, indent=2) + "\n"]
    with atomic(files[0]) as temporary:
        of = predictions(table, benchmark)
        of.to_csv(temporary, sep="\t", index=False, encoding="utf-8", quoting=csv.QUOTE_ALL, lineterminator="\n")
    for file, text in zip(files[1:], texts, strict=True):
        with atomic(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return files


# ------------------------------------------------------------------------------------------------- VLMEvalKit
def predictions(table: pd.DataFrame, benchmark: str) -> pd.DataFrame:
    """The columns of VLMEvalKit's table: those of its data without the pictures, and `prediction`.

    `index` is our id, `image_path` our `image_id`; yes and no have a capital, and options are columns A, B, C ..
    """
    yes_no = benchmark in ("POPE", "MME")
    answer = table.answer.str.capitalize() if yes_no else table.answer
    question, options = table.question.tolist(), [row.get("choices") or [] for row in table.to_dict("records")]
    if benchmark == "MMStar":  # its question holds them
        parts = [_OPTIONS.match(text) for text in question]
        question = [found["question"] if found else text for found, text in zip(parts, question, strict=True)]
        options = [list(found.groups()[1:]) if found else list(rules.LETTERS) for found in parts]
    widest = letters(max(map(len, options)))
    columns = {letter: [of[i] if i < len(of) else "" for of in options] for i, letter in enumerate(widest)}
    more = {column: table[column] for column in ("l2_category", "hint") if column in table}
    return pd.DataFrame({"index": table.id, "question": question, **columns, "answer": answer,
                         "category": table.category, **more, "image_path": table.image_id,
                         "prediction": table.prediction})


_OPTIONS = re.compile(r"(?s)(?P<question>.*)\nOptions: A: (.*?), B: (.*?), C: (.*?), D: (.*?)\s*$")


# ------------------------------------------------------------------------------------------------- lmms-eval
def _samples(table: pd.DataFrame, benchmark: str, prompts: list[str]) -> list[dict]:
    """A record a question, with the metrics that lmms-eval's task has for each; of other tasks `official`, ours."""
    official = right(table, benchmark)
    score = right(table, benchmark, "lmms-eval") if benchmark in rules.RULES else official
    said = answered(table, benchmark, "lmms-eval") if benchmark in rules.RULES else table.prediction
    samples = []
    for i, (row, prompt) in enumerate(zip(table.to_dict("records"), prompts, strict=True)):
        one = {"question_id": row["id"], "score": float(score.iloc[i])}
        metrics: dict[str, Any] = {"official": float(official.iloc[i])}
        if benchmark == "POPE":
            one |= {"prediction": row["prediction"].lower().strip(), "ground_truth": row["answer"]}
            metrics = dict.fromkeys(_POPE, one)
        elif benchmark == "MME":
            one = {"question_id": row["image_id"], "category": row["category"], "score": one["score"]}
            metrics = {f"mme_{row['group']}_score": one}
        elif benchmark == "MMStar":
            one = {"question_id": row["id"], "l2_category": row["l2_category"], "score": one["score"]}
            metrics = {row["category"]: one, "average": one}
        of = json.dumps([row["id"], row["image_id"], row["question"], row["answer"]], ensure_ascii=False)
        samples.append({"doc_id": i, "target": row["answer"], "filtered_resps": row["prediction"],
                        "doc_hash": hashlib.sha256(of.encode()).hexdigest(), "input": prompt, "id": row["id"],
                        "answered": said.iloc[i], **metrics})
    return samples


_POPE = ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio")


def _results(table: pd.DataFrame, benchmark: str, task: str, model: str) -> dict:
    """The file of results: lmms-eval's metrics as it computes them, shares from 0 to 1, and beside them ours."""
    numbers: dict[str, float] = {}
    if benchmark in _METRICS:
        of = table.assign(said=answered(table, benchmark, "lmms-eval"), score=right(table, benchmark, "lmms-eval"))
        numbers = _METRICS[benchmark](of)
    names = [rule for rule in ("official", "strict") if rule == "official" or benchmark in rules.RULES]
    ours = {f"right_{rule}": float(right(table, benchmark, rule).mean()) for rule in names}
    n = {"original": len(table), "effective": len(table)}
    shown = {f"{key},none": value for key, value in (numbers | ours).items()}
    return {"results": {task: {"alias": task, **shown}}, "versions": {task: 0}, "n-shot": {task: 0},
            "higher_is_better": {task: dict.fromkeys([*numbers, *ours], True)}, "n-samples": {task: n},
            "model_name": model, "model_source": "sinkstudy"}


def _pope(of: pd.DataFrame) -> dict[str, float]:
    """Of the positives, those answered neither yes nor no do not count in the recall; the yes-ratio is of the data."""
    yes = of.answer == "yes"
    hits, false, missed = ((yes & (of.said == "yes")).sum(), (~yes & (of.said == "yes")).sum(),
                           (yes & (of.said == "no")).sum())
    precision, recall = _share(hits, hits + false), _share(hits, hits + missed)
    f1 = _share(2 * precision * recall, precision + recall)
    return dict(zip(_POPE, (float(of.score.mean()), precision, recall, f1, float(yes.mean())), strict=True))


def _mme(of: pd.DataFrame) -> dict[str, float]:
    pairs = of.groupby(["group", "category", "image_id"], sort=False).score.agg(["mean", "min"])
    tasks = 100 * (pairs["mean"] + pairs["min"]).groupby(["group", "category"], sort=False).mean()
    return {f"mme_{group}_score": float(total) for group, total in tasks.groupby("group", sort=False).sum().items()}


def _mmstar(of: pd.DataFrame) -> dict[str, float]:
    """Means over the subcategories of each capability and of all, each counting alike."""
    parts = {str(category): of[of.category == category] for category in of.category.unique()} | {"average": of}
    return {name: float(part.groupby("l2_category").score.mean().mean()) for name, part in parts.items()}


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


_METRICS: dict[str, Callable[[pd.DataFrame], dict[str, float]]] = {"POPE": _pope, "MME": _mme, "MMStar": _mmstar}
