"""Scores of a benchmark: pure functions over its table with a column `prediction`, the model's texts.

`right` says for each row how right it is; `observed` makes of it what a benchmark reports, as observations of which
intervals are computed. Everything is in per cent but MME's score, which has the official scale: acc + acc+ of a task,
0–200, summed over tasks.

Questions about one image are not independent, so an interval draws images:
`stats.mean_interval(right(table, "POPE"), clusters=table.image_id)`.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from sinkstudy.benchmarks import rules
from sinkstudy.benchmarks.data import OWN, check
from sinkstudy.benchmarks.prompts import kind
from sinkstudy.benchmarks.rows import letters, listed


def answered(table: pd.DataFrame, benchmark: str, rule: str = "official") -> pd.Series:
    """What each prediction answers by a rule: yes/no or a letter, None where the rule finds nothing.

    Args:
        table: POPE, MME or MMStar with `prediction`.
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

    - GQA (Hudson & Manning 2019): the answer without a final full stop is the annotated one, in any case.
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
        "GQA": lambda r: r["prediction"].strip().removesuffix(".").lower() == r["answer"].strip().lower(),
        "ScienceQA-IMG": lambda r: rules.letter_science_qa(r["prediction"]) == r["answer"],
        "TextVQA": lambda r: soft_accuracy(r["prediction"], r["answers"]),
        "MMMU": lambda r: (rules.letter_mmmu(r["prediction"], r["choices"]) == r["answer"] if r["choices"]
                           else same_answer(r["prediction"], r["answer"])),
        "MathVista": lambda r: math_vista(r) == r["answer"],
        OWN: own,
    }[benchmark]
    return pd.Series([float(score(row)) for row in table.to_dict("records")], index=table.index)


def observed(table: pd.DataFrame, benchmark: str, rule: str = "official") -> pd.DataFrame:
    """What a benchmark with `prediction` reports; a number of a part is the sum of `value` over the sum of `of`.

    POPE (Li et al. 2023) has, in %, `accuracy`, `precision`, `recall` and `F1`, with "yes" as the positive class, and
    `yes`, how often that is the *answer*. MME (Fu et al. 2023) has by picture `accuracy`, `acc+` (both questions right)
    and `score`, their sum, which is 0–200 in a category; a group's is the sum over its categories, so each counts alike
    there, and pictures are to be drawn within each. Every other benchmark has `accuracy`.

    Returns:
        A row a question (of MME a picture) and measure, for each part: `level` ("head" for what papers report,
        "category" for what lies below), `part`, `measure`, `most` (the largest number possible), `id`, `image_id`,
        `stratum` (of pictures that are drawn together), `value`, `of`.

    Raises:
        ValueError: as `right`.
    """
    of, measures = table.assign(accuracy=100 * right(table, benchmark, rule), one=1.0), {"accuracy": "one"}
    if benchmark == "POPE":
        yes, true = ((said == "yes").astype(float) for said in (answered(table, benchmark, rule), table.answer))
        of = of.assign(**{"precision": 100 * yes * true, "recall": 100 * yes * true, "F1": 200 * yes * true,
                          "yes": 100 * yes, "said": yes, "true": true, "either": yes + true})
        measures |= {"precision": "said", "recall": "true", "F1": "either", "yes": "one"}
    elif benchmark == "MME":
        pairs = of.groupby(["group", "category", "image_id"], sort=False).accuracy
        of = pairs.agg(**{"accuracy": "mean", "acc+": "min"}).reset_index()
        of = of.assign(score=of["accuracy"] + of["acc+"], id=of.category + "/" + of.image_id, one=1.0)
        measures |= {"acc+": "one", "score": "one"}
    rows = []
    for level, part, rows_of in _parts(of, benchmark):
        for measure, below in measures.items():
            total = level == "head" and measure == "score"
            number = rows_of.category.nunique() if total else 1
            most = number * (200 if measure == "score" else 100)
            rows.append(pd.DataFrame({
                "level": level, "part": part, "measure": measure, "most": most, "id": rows_of.id,
                "image_id": rows_of.id if total else rows_of.image_id,  # a name that categories share is two pictures
                "stratum": pd.factorize(rows_of.category)[0] if total else 0,
                "value": number * rows_of[measure], "of": rows_of[below]}))
    return pd.concat(rows, ignore_index=True)


def _parts(of: pd.DataFrame, benchmark: str) -> list[tuple[str, str, pd.DataFrame]]:
    """(level, name, rows) of each part of a benchmark."""
    below = "head" if benchmark == "POPE" else "category"
    categories = [(below, name, rows) for name, rows in of.groupby("category", sort=False)]
    if benchmark == "POPE":
        return [*categories, ("head", "all", of)]
    if benchmark == "MME":
        return [*(("head", name, rows) for name, rows in of.groupby("group", sort=False)), *categories]
    return [("head", "mean", of), *categories]


def readings(table: pd.DataFrame, benchmark: str) -> pd.DataFrame:
    """How much depends on the way in which an answer is read, each in % of the questions.

    Args:
        table: POPE, MME or MMStar with `prediction` and, where first tokens tell the answers apart, `first`.

    Returns:
        A row a question and measure, `image_id`, `measure` and `value`: right by the `official` rule, by the `strict`
        one and by the `first token`; whether the `rules differ`, the strict one finds `no answer`, and it reads the
        `same as first token` (NaN without `first`).

    Raises:
        ValueError: as `answered`.
    """
    official, strict = (answered(table, benchmark, rule) for rule in ("official", "strict"))
    wide = pd.DataFrame({
        "official": official == table.answer, "strict": strict == table.answer, "first token": np.nan,
        "rules differ": official.fillna("") != strict.fillna(""), "no answer": strict.isna(),
        "same as first token": np.nan})
    if "first" in table:
        wide["first token"], wide["same as first token"] = table["first"] == table.answer, table["first"] == strict
    return (100 * wide.astype(float)).assign(image_id=table.image_id).melt("image_id", var_name="measure")


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

    An answer that is a list, as "['24/7', '3.429']" in three questions, is given by any of its parts. Numbers are
    compared after rounding to two places and without thousands' commas. The original looks only at what follows words
    such as "is" and "therefore"; this rule looks at the whole text and so is the more lenient one.
    """
    if isinstance(several := listed(answer), list):
        return any(same_answer(text, str(one)) for one in several)
    value = _number(answer)
    if value is not None:
        return any(round(n, 2) == round(value, 2) for n in _numbers(text))
    return re.search(rf"(?<!\w){re.escape(answer.strip().lower())}(?!\w)", text.lower()) is not None


def math_vista(row: dict) -> str | None:
    """What a text answers to a MathVista question, in the form of its annotated answer; None if nothing.

    Multiple choice: the text of the option that is quoted whole, whose letter stands in brackets, or whose letter is
    the only capital option letter in the text. Numbers: the last one in digits or, where there is none, the last
    word for one up to ten, rounded to the question's precision. Lists: the last bracketed one. The original has GPT-4
    extract the answer, and takes the option most similar to the extraction, so that no answer is ever missing (Lu et
    al. 2024).
    """
    text = row["prediction"].strip()
    if row["question_type"] == "multi_choice":
        if text in row["choices"]:
            return text
        options = dict(zip(letters(26), row["choices"], strict=False))
        found = re.findall(r"\(([A-Z])\)", text) or re.findall(r"(?<!\w)([A-Z])(?!\w)", text)
        said = options.keys() & found
        return options[said.pop()] if len(said) == 1 else None
    if row["answer_type"] == "list":
        lists = re.findall(r"\[[^\[\]]*\]", text)
        return lists[-1] if lists else None
    numbers = _numbers(text) or _numbers(vqa_form(text))
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
    return _open_form(said) in map(_open_form, (row["answer"], *row["answers"]))


def _open_form(text: str) -> str:
    """`vqa_form`; of a text of which it leaves nothing, as of "A" and "?", more, else no answer would be as right."""
    return vqa_form(text) or text.lower().strip(" .,!?") or text.strip()


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _numbers(text: str) -> list[float]:
    found = re.findall(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d+)?(?!\w)", text)
    return [n for n in map(_number, found) if n is not None]
