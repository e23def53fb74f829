"""Scores against values worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from sinkstudy.benchmarks import answered, check, observed, readings, right, score
from sinkstudy.book import chapter


def asked(rows: list[tuple], columns: list[str]) -> pd.DataFrame:
    """A table of questions from the columns that matter; the others are filled in."""
    table = pd.DataFrame(rows, columns=columns)
    filled = {"id": [str(i) for i in range(len(table))], "image_id": "i", "question": "?", "category": "all"}
    return table.assign(**{name: value for name, value in filled.items() if name not in table})


POPE = asked([
    ("random", "yes", "Yes"), ("random", "no", "There is no dog"), ("random", "yes", "maybe"), ("random", "no", "NO"),
    ("adversarial", "yes", ""), ("adversarial", "no", "No."), ("adversarial", "yes", "no"),
    ("adversarial", "no", "Yes, there is"),
], ["category", "answer", "prediction"])
MME = asked([
    ("perception", "existence", "a", "yes", "Yes."), ("perception", "existence", "a", "no", "No."),
    ("perception", "existence", "b", "yes", "Yes"), ("perception", "existence", "b", "no", "maybe"),
    ("perception", "count", "a", "yes", "No"), ("perception", "count", "a", "no", "yes"),
    ("cognition", "code_reasoning", "c", "yes", "yes"), ("cognition", "code_reasoning", "c", "no", "None of it"),
], ["group", "category", "image_id", "answer", "prediction"])
MMSTAR = asked([
    ("math", "A", "A"), ("math", "B", "because"), ("math", "C", "(C) red"), ("science & technology", "D", "A"),
], ["category", "answer", "prediction"]).assign(l2_category="x")


def numbers(table: pd.DataFrame, benchmark: str, rule: str = "official") -> pd.DataFrame:
    """What the chapter makes of the observations: a row a part, a column a measure."""
    of = observed(table, benchmark, rule)
    found = chapter.estimates(of, ["part", "measure", "most"], over="of", strata="stratum", method="percentile")
    return found.pivot_table(index="part", columns="measure", values="value", sort=False, dropna=False)


def test_pope():
    """official reads yes, no, yes, yes · yes, no, no, yes; strict yes, -, -, no · -, no, no, yes."""
    #                                     accuracy precision recall   F1   yes
    expected = {("official", "random"):      (75.0, 200 / 3, 100.0, 80.0, 75.0),
                ("official", "adversarial"): (50.0, 50.0, 50.0, 50.0, 50.0),
                ("official", "all"):         (62.5, 60.0, 75.0, 200 / 3, 62.5),
                ("strict", "random"):        (50.0, 100.0, 50.0, 200 / 3, 25.0),
                ("strict", "adversarial"):   (25.0, 0.0, 0.0, 0.0, 25.0),
                ("strict", "all"):           (37.5, 50.0, 25.0, 100 / 3, 25.0)}
    found = {rule: numbers(POPE, "POPE", rule) for rule in ("official", "strict")}
    assert [list(of.index) for of in found.values()] == [["random", "adversarial", "all"]] * 2
    for (rule, part), values in expected.items():
        of = found[rule].loc[part, ["accuracy", "precision", "recall", "F1", "yes"]]
        assert of.tolist() == pytest.approx(values), (rule, part)


def test_the_yes_ratio_is_that_of_the_predictions():
    """lmms-eval reports that of the annotations, a constant of the data set."""
    always = numbers(POPE.assign(prediction="Yes"), "POPE")
    assert (always.yes == 100).all() and (always.accuracy == 50).all()
    never = numbers(POPE.assign(prediction="No"), "POPE")
    assert (never.yes == 0).all() and never.precision.isna().all()
    assert (never.recall == 0).all() and (never.F1 == 0).all()


def test_a_model_that_evades():
    """What the page on harnesses says of it."""
    evading = POPE.assign(prediction="maybe")
    official, strict = (numbers(evading, "POPE", rule).loc["all"] for rule in ("official", "strict"))
    assert (official.accuracy, official.yes, strict.accuracy, strict.yes) == (50, 100, 0, 0)
    read = readings(evading.assign(first="yes"), "POPE").groupby("measure").value.mean()
    assert read.to_dict() == {"official": 50, "strict": 0, "first token": 50, "rules differ": 100, "no answer": 100,
                              "same as first token": 0}


def test_readings_without_first_tokens():
    """official reads yes, no, yes, yes · yes, no, no, yes; strict yes, -, -, no · -, no, no, yes."""
    read = readings(POPE, "POPE").groupby("measure").value.mean()
    assert (read["no answer"], read["rules differ"], read["official"], read["strict"]) == (37.5, 50, 62.5, 37.5)
    assert np.isnan(read["first token"]) and np.isnan(read["same as first token"])


def test_mme():
    #                             accuracy  acc+     score
    expected = {"perception":     (50.0, 100 / 3, 125.0),  # the score: each category alike
                "cognition":      (100.0, 100.0, 200.0),
                "existence":      (75.0, 50.0, 125.0),
                "count":          (0.0, 0.0, 0.0),
                "code_reasoning": (100.0, 100.0, 200.0)}
    found = numbers(MME, "MME")
    assert list(found.index) == list(expected)
    for part, values in expected.items():
        assert found.loc[part, ["accuracy", "acc+", "score"]].tolist() == pytest.approx(values), part
    strict = numbers(MME, "MME", "strict")
    assert strict.loc["cognition", ["accuracy", "acc+", "score"]].tolist() == [50, 0, 50]  # "None of it"


def test_a_group_of_mme_draws_pictures_within_its_categories():
    """Two categories without spread inside: the sum is sure, although pictures of the two differ by 200."""
    sure = MME[MME.category != "code_reasoning"].assign(image_id=list("aabbcc"))
    sure = sure.assign(prediction=np.where(sure.category == "existence", sure.answer, "maybe"))
    found = chapter.estimates(observed(sure, "MME"), ["part", "measure"], over="of", strata="stratum")
    assert chapter.one(found, part="perception", measure="score")[:3] == (200, 200, 200)
    assert chapter.one(found, part="perception", measure="accuracy").low < 200 / 3


def test_a_perfect_model_has_the_official_maxima():
    from sinkstudy.benchmarks.data import MME_GROUPS
    rows = [(group, category, "i", answer, answer.title())
            for group, members in MME_GROUPS.items() for category in members for answer in ("yes", "no")]
    of = observed(asked(rows, ["group", "category", "image_id", "answer", "prediction"]), "MME")
    totals = of[(of.level == "head") & (of.measure == "score")].groupby("part")
    assert totals.value.mean().to_dict() == totals.most.max().to_dict() == {"perception": 2000, "cognition": 800}


def test_mmstar():
    assert numbers(MMSTAR, "MMStar").accuracy.to_dict() == {"mean": 75, "math": 100, "science & technology": 0}
    strict = numbers(MMSTAR, "MMStar", "strict").accuracy
    assert strict.to_dict() == {"mean": 50, "math": pytest.approx(200 / 3), "science & technology": 0}


def test_scores_are_pure_and_keep_the_index():
    before = POPE.set_index(pd.Index(range(10, 18)))
    kept = before.copy()
    observed(before, "POPE"), readings(before, "POPE"), right(before, "POPE")
    pd.testing.assert_frame_equal(before, kept)
    assert right(before, "POPE", "strict").index.equals(before.index)
    assert answered(before, "POPE", "strict").tolist() == ["yes", None, None, "no", None, "no", "no", "yes"]
    shuffled = numbers(POPE.sample(frac=1, random_state=0), "POPE")
    pd.testing.assert_frame_equal(shuffled.loc[["random", "adversarial", "all"]], numbers(POPE, "POPE"))


# ------------------------------------------------------------------------------------------- the others
def test_gqa():
    table = asked([("cat", "Cat."), ("cat", "a cat"), ("yes", "Yes"), ("no", "")], ["answer", "prediction"])
    assert right(table, "GQA").tolist() == [1, 0, 1, 0]


def test_science_qa():
    table = asked([("B", "B"), ("B", "B. a cat"), ("B", "(B)"), ("A", "The answer is A."), ("A", "maybe")],
                  ["answer", "prediction"]).assign(choices=[["x", "a cat"]] * 5, hint="")
    assert right(table, "ScienceQA-IMG").tolist() == [1, 1, 0, 1, 0]


@pytest.mark.parametrize("people, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy(people, accuracy):
    """With n of ten people: n(n-1)/30 + (10-n)n/30 for n up to 3."""
    assert score.soft_accuracy("STOP", ["stop"] * people + ["go"] * (10 - people)) == pytest.approx(accuracy)


@pytest.mark.parametrize("text, form", [
    ("The Dog.", "dog"), ("two dogs", "2 dogs"), ("none", "0"), ("dont walk", "don't walk"), ("1,000", "1000"),
    ("3.5 m", "3.5 m"), ("t-shirt", "t shirt"), ("red - blue", "red blue"), ("it's", "it 's"), ("", ""),
    ("没有", "没有"), ("What?", "what"), ("an apple\na day", "apple day"),
])
def test_vqa_form(text, form):
    assert score.vqa_form(text) == form


def test_text_vqa():
    table = asked([("stop", "Stop."), ("stop", "it says stop"), ("stop", "go")], ["answer", "prediction"])
    table["answers"] = [["stop"] * 8 + ["go"] * 2] * 3
    assert right(table, "TextVQA").tolist() == pytest.approx([1, 0, 0.6])


def test_mmmu():
    table = asked([("B", "(B) because", ["x", "y"]), ("B", "because", ["x", "y"]), ("0.5", "It is .50 m", []),
                   ("1,200", "about 1200", []), ("cat", "Two cats", []), ("cat", "The cat.", [])],
                  ["answer", "prediction", "choices"]).assign(question_type="", images=None)
    assert right(table, "MMMU").tolist() == [1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("text, answer, kind, choices, precision, expected", [
    ("(B) 8/11", "8/11", "text", ["3/11", "8/11"], 0, 1), ("The answer is B.", "8/11", "text", ["3/11", "8/11"], 0, 1),
    ("8/11", "8/11", "text", ["3/11", "8/11"], 0, 1), ("A or B", "8/11", "text", ["3/11", "8/11"], 0, 0),
    ("maybe", "8/11", "text", ["3/11", "8/11"], 0, 0), ("Yes", "Yes", "text", ["Yes", "No"], 0, 1),
    ("there are 14 of 20, so 14", "14", "integer", [], 0, 1), ("14.0", "14", "integer", [], 0, 1),
    ("fourteen", "14", "integer", [], 0, 0), ("There are three.", "3", "integer", [], 0, 1),
    ("3, one more than two", "3", "integer", [], 0, 1), ("two or three", "2", "integer", [], 0, 0),
    ("$1.449", "1.45", "float", [], 2, 1), ("1.4", "1.45", "float", [], 2, 0),
    ("between [1, 2] and [2007, 2008]", "[2007, 2008]", "list", [], 0, 1), ("2007", "[2007, 2008]", "list", [], 0, 0),
    ("", "14", "integer", [], 0, 0), ("-3", "-3", "integer", [], 0, 1),
])
def test_math_vista(text, answer, kind, choices, precision, expected):
    table = asked([(answer, text)], ["answer", "prediction"]).assign(
        choices=[choices], precision=precision, answer_type=kind, query="?", skills=[[]],
        question_type="multi_choice" if choices else "free_form")
    assert right(table, "MathVista").tolist() == [expected]


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize("table, name, message", [
    (POPE.iloc[:0], "POPE", "POPE: the table is empty"),
    (POPE.drop(columns="answer"), "POPE", "POPE: the table has no column 'answer'; it has "),
    (POPE.drop(columns="prediction"), "POPE", "POPE: the table has no column 'prediction'; it has "),
    (MME.drop(columns="group"), "MME", "MME: the table has no column 'group'; it has "),
    (MME.iloc[:3], "MME", "MME asks two questions an image; 'b' in 'existence' has 1"),
    (pd.concat([MME, MME.iloc[:1].assign(id="x")]), "MME", "MME asks two questions an image; 'a' in 'existence' has 3"),
    (pd.concat([POPE, POPE.iloc[:1]]), "POPE", "POPE: the id '0' occurs twice"),
    (POPE.assign(answer="Yes"), "POPE", "POPE: the answer of '0' is 'Yes', not one of yes, no"),
    (MMSTAR.assign(answer="E"), "MMStar", "MMStar: the answer of '0' is 'E', not one of A, B, C, D"),
    (POPE, "POPES", "unknown benchmark 'POPES'; known are POPE, MME, MMStar, "),
    (POPE.assign(prediction=np.nan), "POPE", "POPE: a prediction is missing; an empty answer is the text ''"),
])
def test_a_bad_table_is_one_message(table, name, message):
    for scorer in (right, observed):
        with pytest.raises(ValueError) as raised:
            scorer(table, name)
        assert str(raised.value).startswith(message)


def test_an_unknown_rule_is_one_message():
    with pytest.raises(ValueError, match="^POPE has no rule 'lenient'; it has official, strict, lmms-eval, vlme"):
        observed(POPE, "POPE", "lenient")
    with pytest.raises(ValueError, match="^GQA has no rule 'strict'; it has only the official one$"):
        right(asked([("cat", "cat")], ["answer", "prediction"]), "GQA", "strict")


def test_a_table_without_predictions_passes_the_check():
    check(POPE.drop(columns="prediction"), "POPE")
