"""The box at the head of each chapter: one form, two numbers at most, words that follow from the intervals."""

import json
import re

import pandas as pd
import pytest

from sinkstudy.book import chapter, report
from sinkstudy.paths import NOTEBOOKS
from sinkstudy.stats import NOTHING, Interval

FORM = re.compile(r":::\{admonition\} In short\n:class: answer\n\*\*Question\.\*\* [^*]+\?\n\n"
                  r"\*\*Answer\.\*\* \{glue:text\}`answer`\n\n\*\*How sure\.\*\* \{glue:text\}`sure`\n:::")

ROWS = pd.DataFrame({"model": ["a", "b", "c", "d"], "value": [2.0, 3.0, -1.0, float("nan")],
                     "low": [-1.0, 2.0, -2.0, float("nan")], "high": [4.0, 4.0, -0.5, float("nan")], "n": [9, 9, 9, 0]})


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_chapter_opens_with_the_same_box_and_answers_once(path):
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    first_section = next(i for i, source in enumerate(sources) if re.search(r"^## ", source, re.M))
    boxes = [i for i, source in enumerate(sources) if "class: answer" in source]
    assert len(boxes) == 1 and boxes[0] < first_section
    assert FORM.fullmatch(sources[boxes[0]])
    assert sum(source.count("chapter.answer(") for source in sources) == 1


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_text_stands_between_the_box_and_the_first_figure(path):
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    (box,) = [i for i, text in enumerate(texts) if "class: answer" in text]
    assert texts[box + 1].startswith("```{glue:figure} ")


@pytest.fixture
def glued(monkeypatch):
    told = {}
    monkeypatch.setattr(report, "glue", lambda name, text: told.__setitem__(name, text))
    return told


def test_the_answer_is_rounded_and_the_line_below_has_its_intervals(glued):
    numbers = [chapter.Number(Interval(8.5714, 7.9, 9.234, 128), "times", ".1f"),
               chapter.Number(Interval(-43.6, -51.2, -36.7, 128), "points", "+.0f")]
    chapter.answer(f"It draws {numbers[0]},\n  and loses {numbers[1]}.", numbers, "128 pictures", ["a", "b", "a"],
                   "But.")
    assert glued == {
        "answer": "It draws 8.6 times, and loses −44 points.",
        "sure": "95 % intervals 7.9 to 9.2 times and −51 to −37 points, 128 pictures; a, b; one training of each "
                "model. But."}


def test_a_share_is_told_in_per_cent():
    share = chapter.Number(Interval(0.905, 0.9031, 0.9062, 96), fmt=".1%")
    assert (str(share), share.interval()) == ("90.5 %", "90.3 % to 90.6 %")


def test_an_answer_without_numbers_and_a_number_without_interval_say_so(glued):
    chapter.answer("None.", [], "9 scenes", ["a"], trained="one training")
    assert glued["sure"] == "No interval, 9 scenes; a; one training."
    chapter.answer("Some.", [chapter.Number(Interval(0.5, float("nan"), float("nan"), 9))], "9 scenes", ["a"])
    assert glued["sure"] == "No interval, 9 scenes; a; one training of each model."


@pytest.mark.parametrize("numbers", [[Interval(1, 0, 2, 9)] * 3, [NOTHING]], ids=["three", "no value"])
def test_a_box_refuses_more_than_two_numbers_or_none_in_place_of_one(glued, numbers):
    with pytest.raises(ValueError, match="at most two numbers, each with a value"):
        chapter.answer("Much.", [chapter.Number(number) for number in numbers], "9 pictures", ["a"])
    assert not glued


def test_models_stand_on_the_side_of_their_whole_interval():
    assert chapter.sides(ROWS, "more", "less") == "not clearly different in a; more in b; less in c"
    assert chapter.sides(ROWS, "more", "less", reference=1.5) == "not clearly different in a; more in b; less in c"
    assert chapter.sides(ROWS[:1], "more", "less", reference=-3) == "more in a"


def test_the_box_cites_the_model_of_the_run_or_the_first_that_has_an_estimate():
    assert chapter.leading(ROWS, "b") == "b" and chapter.leading(ROWS, "d") == "a"
    assert chapter.leading(ROWS[3:], "d") is None
