"""Scores of a benchmark: pure functions over its table with a column `prediction`, the model's texts.

`right` says for each row how right it is and is what intervals are computed from; `pope`, `mme` and `mmstar` give
the numbers that these benchmarks report, for several extraction rules side by side (`rules.RULES`). Everything is in
per cent but MME's score, which has the official scale: acc + acc+ of a task, 0–200, summed over tasks.

Questions about one image are not independent, so an interval draws images:
`stats.mean_interval(right(table, "POPE"), clusters=table.image_id)`. F1 is a ratio, 2 · hits / (said yes + is yes), and
goes with `stats.ratio_interval`.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from sinkstudy.benchmarks import rules
from sinkstudy.benchmarks.data import OWN, check
from sinkstudy.benchmarks.prompts import kind
from sinkstudy.benchmarks.rows import letters


def answered(table: pd.DataFrame, benchmark: str, rule: str = "official") -> pd.Series:
    """What each prediction answers by a rule: yes/no or a letter, None where the rule finds nothing.

    Args:
        table: POPE, MME or MMStar with `prediction`.
        benchmark: its name.
        rule: a key of `rules.RULES[benchmark]`.

    Raises:
        ValueError: a table that `check` refuses, a prediction that is no text, an unknown rule.
    """
    _check_predicted(table, benchmark)
    known = rules.RULES.get(benchmark, {})
    if rule not in known:
        raise ValueError(f"{benchmark} has no rule {rule!r}; it has {', '.join(known) or 'only the official one'}")
    return pd.Series([known[rule](said) for said in table.prediction], index=table.index, dtype=object)


def _check_predicted(table: pd.DataFrame, benchmark: str) -> None:
    check(table, benchmark, ["prediction"])
    odd = [(name, said) for name, said in zip(table.id, table.prediction, strict=True) if not isinstance(said, str)]
    if odd:
        raise ValueError(f"{benchmark}: a prediction is missing; an empty answer is the text '' ({odd[0][0]!r} has "
                         f"{odd[0][1]!r})")


def right(table: pd.DataFrame, benchmark: str, rule: str = "official") -> pd.Series:
    """How right each prediction is, 0–1: float, a row each, with the table's index.

    POPE, MME and MMStar by a rule of `rules.RULES`. The others have one rule, `official`, which needs no language
    model:

    - GQA (Hudson & Manning 2019): the answer in lower case without a final full stop is the annotated one.
    - ScienceQA-IMG (Lu et al. 2022): `rules.letter_science_qa`.
    - TextVQA (Singh et al. 2019): `soft_accuracy` against ten people's answers; the only one between 0 and 1.
    - MMMU (Yue et al. 2024): `rules.letter_mmmu`; open questions `same_answer`.
    - MathVista (Lu et al. 2024): `math_vista`, where the original asks GPT-4 for the extraction: our numbers
      are not comparable with published ones.
    - Questions of one's own: our strict rules, `rules.letter_strict` where there are options (as many letters as
      these), `rules.yes_no_strict` where the answer is yes or no; else the answer or one of `answers`, in `vqa_form`.

    Raises:
        ValueError: as `answered`.
    """
    if benchmark in rules.RULES:
        return (answered(table, benchmark, rule) == table.answer).astype(float)
    _check_predicted(table, benchmark)
    if rule != "official":
        raise ValueError(f"{benchmark} has no rule {rule!r}; it has only the official one")
    score = {
        "GQA": lambda r: r["prediction"].strip().removesuffix(".").lower() == r["answer"],
        "ScienceQA-IMG": lambda r: rules.letter_science_qa(r["prediction"]) == r["answer"],
        "TextVQA": lambda r: soft_accuracy(r["prediction"], r["answers"]),
        "MMMU": lambda r: (rules.letter_mmmu(r["prediction"], r["choices"]) == r["answer"] if r["choices"]
                           else same_answer(r["prediction"], r["answer"])),
        "MathVista": lambda r: math_vista(r) == r["answer"],
        OWN: own,
    }[benchmark]
    return pd.Series([float(score(row)) for row in table.to_dict("records")], index=table.index)


def pope(table: pd.DataFrame, which: Sequence[str] = ("official", "strict")) -> pd.DataFrame:
    """POPE's scores (Li et al. 2023), by several rules side by side; "yes" is the positive class.

    Returns:
        A row for each rule and category, and for `all`: `rule`, `category`, then in % `accuracy`, `precision` (NaN
        if nothing is answered yes), `recall`, `f1`, `yes_ratio` (of the *predictions*: answers yes, of all
        questions), `unanswered` (texts in which the rule finds no answer; they are wrong, and a missed yes), and
        `questions`.

    Raises:
        ValueError: as `answered`.
    """
    rows = []
    for rule in which:
        said, truth = answered(table, "POPE", rule), table.answer
        for category, mask in _parts(table):
            yes, positive = (said == "yes")[mask], (truth == "yes")[mask]
            hits = (yes & positive).sum()
            rows.append({
                "rule": rule, "category": category, "accuracy": 100 * (said == truth)[mask].mean(),
                "precision": _percent(hits, yes.sum()), "recall": _percent(hits, positive.sum()),
                "f1": _percent(2 * hits, yes.sum() + positive.sum()), "yes_ratio": 100 * yes.mean(),
                "unanswered": 100 * said[mask].isna().mean(), "questions": int(mask.sum())})
    return pd.DataFrame(rows)


def mme(table: pd.DataFrame, which: Sequence[str] = ("official", "strict")) -> pd.DataFrame:
    """MME's scores (Fu et al. 2023), by several rules side by side.

    Returns:
        A row for each rule and category, and for each group with category `total`: `rule`, `group` (perception,
        cognition), `category`, `acc` (% of questions), `acc_plus` (% of images with both questions right), `score`
        (their sum, 0–200; for a group the sum over its categories, at most 2000 and 800 for all of MME), `images`.
        The group's acc and acc_plus are means over its categories.

    Raises:
        ValueError: as `answered`; so an image without exactly two questions.
    """
    rows = []
    for rule in which:
        scored = table.assign(right=right(table, "MME", rule))
        images = scored.groupby(["group", "category", "image_id"], sort=False).right.agg(["mean", "min"])
        of = 100 * images.groupby(["group", "category"], sort=False).mean()
        of["images"] = images.groupby(["group", "category"], sort=False).size()
        of = of.rename(columns={"mean": "acc", "min": "acc_plus"}).reset_index()
        of.insert(4, "score", of.acc + of.acc_plus)
        for group, members in of.groupby("group", sort=False):
            total = {"group": group, "category": "total", "acc": members.acc.mean(),
                     "acc_plus": members.acc_plus.mean(), "score": members.score.sum(),
                     "images": members.images.sum()}
            rows += [{"rule": rule, **row} for row in [*members.to_dict("records"), total]]
    return pd.DataFrame(rows)


def mmstar(table: pd.DataFrame, which: Sequence[str] = ("official", "strict")) -> pd.DataFrame:
    """MMStar's scores (Chen et al. 2024), by several rules side by side.

    Returns:
        A row for each rule and capability, and for the `mean` over all questions (all of MMStar has 250 questions a
        capability, so it is the mean over capabilities too): `rule`, `category`, in % `accuracy` and `unanswered`,
        and `questions`.

    Raises:
        ValueError: as `answered`.
    """
    rows = []
    for rule in which:
        said = answered(table, "MMStar", rule)
        rows += [{"rule": rule, "category": category, "accuracy": 100 * (said == table.answer)[mask].mean(),
                  "unanswered": 100 * said[mask].isna().mean(), "questions": int(mask.sum())}
                 for category, mask in _parts(table, everything="mean")]
    return pd.DataFrame(rows)


def _parts(table: pd.DataFrame, everything: str = "all") -> list[tuple[str, pd.Series]]:
    each = [(c, table.category == c) for c in table.category.unique()]
    return [*each, (everything, pd.Series(True, index=table.index))]


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else np.nan


# ------------------------------------------------------------------------------------------- open answers
_NUMBERS = {"none": "0"} | {
    word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_APOSTROPHE = {word.replace("'", ""): word for word in """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't o'clock oughtn't shan't should've shouldn't somebody'll
    somebody's someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're
    they've wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
    who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've""".split()}


def vqa_form(text: str) -> str:
    """The form in which the VQA evaluation (Antol et al. 2015) compares answers.

    Lower case; commas, question marks and most punctuation gone; number words as digits; no articles; apostrophes
    put back ("dont" is "don't"; the rare double ones, "couldnt've", are left as they are).
    """
    text = " ".join(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").split())
    words = (_NUMBERS.get(w, w) for w in rules.without_punctuation(text, period=r"\.(?!\d)").split())
    return " ".join(_APOSTROPHE.get(w, w) for w in words if w not in ("a", "an", "the"))


def soft_accuracy(text: str, answers: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015): min(1, n/3) where n people gave the answer, 0–1.

    Averaged over leaving out one of the ten people at a time, so 1, 2, 3 and 4 people give 0.3, 0.6, 0.9 and 1.
    """
    said = vqa_form(text)
    same = np.array([vqa_form(a) == said for a in answers])
    return float(np.minimum(1, (same.sum() - same) / 3).mean())


def same_answer(text: str, answer: str) -> bool:
    """MMMU's open questions, simplified: the number is among the text's numbers, or the answer's words are in it.

    Numbers are compared after rounding to two places and without thousands' commas. The original looks only at what
    follows words such as "is" and "therefore"; this rule looks at the whole text and so is the more lenient one.
    """
    value = _number(answer)
    if value is not None:
        return any(round(n, 2) == round(value, 2) for n in _numbers(text))
    return re.search(rf"(?<!\w){re.escape(answer.strip().lower())}(?!\w)", text.lower()) is not None


def math_vista(row: dict) -> str | None:
    """What a text answers to a MathVista question, in the form of its annotated answer; None if nothing.

    Multiple choice: the text of the option that is quoted whole, whose letter stands in brackets, or whose letter is
    the only capital option letter in the text. Numbers: the last one, rounded to the question's precision. Lists:
    the last bracketed one. The original has GPT-4 extract the answer, and takes the option most similar to the
    extraction, so that no answer is ever missing (Lu et al. 2024).
    """
    text = row["prediction"].strip()
    if row["question_type"] == "multi_choice":
        if text in row["choices"]:
            return text
        options = {chr(ord("A") + i): choice for i, choice in enumerate(row["choices"])}
        letters = re.findall(r"\(([A-Z])\)", text) or re.findall(r"(?<!\w)([A-Z])(?!\w)", text)
        letters = {letter for letter in letters if letter in options}
        return options[letters.pop()] if len(letters) == 1 else None
    if row["answer_type"] == "list":
        lists = re.findall(r"\[[^\[\]]*\]", text)
        return lists[-1] if lists else None
    numbers = _numbers(text)
    if not numbers:
        return None
    return str(int(numbers[-1])) if row["answer_type"] == "integer" else str(round(numbers[-1], int(row["precision"])))


def own(row: dict) -> bool:
    """Whether a text answers a question of one's own rightly, by the rule for its kind, see `right`."""
    said = row["prediction"]
    if kind(row) == "options":
        return rules.letter_strict(said, letters(len(row["choices"]))) == row["answer"]
    if kind(row) == "yes or no":
        return rules.yes_no_strict(said) == row["answer"]
    return vqa_form(said) in {vqa_form(answer) for answer in (row["answer"], *row["answers"])}


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _numbers(text: str) -> list[float]:
    found = re.findall(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d+)?(?!\w)", text)
    return [n for n in map(_number, found) if n is not None]
