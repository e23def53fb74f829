"""The exact text that is asked, held by a file: a changed prompt is a changed experiment.

After a change that is meant: `python tests/benchmarks/test_prompts.py` writes prompts.txt anew.
"""

from pathlib import Path

import pandas as pd
import pytest
from transformers import CONFIG_MAPPING

from sinkstudy.benchmarks import FAMILIES, SOURCES, prompts
from sinkstudy.benchmarks.prompts import TEMPLATES

SNAPSHOT = Path(__file__).with_name("prompts.txt")
COMMON = {"id": "1", "image_id": "1", "category": "x", "image": None}
ROWS = {  # a typical row of each; MMMU has two kinds
    "POPE": [{"question": "Is there a snowboard in the image?", "answer": "yes"}],
    "MME": [{"question": "Is this a photo of a beach? Please answer yes or no.", "answer": a, "group": "perception"}
            for a in ("yes", "no")],
    "MMStar": [{"question": "Which is it?\nOptions: A: red, B: blue, C: green, D: grey", "answer": "B",
                "l2_category": "recognition"}],
    "GQA": [{"question": "Is it overcast?", "answer": "no"}],
    "TextVQA": [{"question": "what is the brand of this camera?", "answer": "dakota", "answers": ["dakota"] * 10}],
    "ScienceQA-IMG": [{"question": "Which of these states is farthest north?", "choices": ["West Virginia", "Arizona"],
                       "answer": "A", "hint": hint} for hint in ("", "The map shows four states.")],
    "MMMU": [{"question": "What does <image 1> show?", "choices": ["a fugue", "a canon"], "answer": "A",
              "question_type": "multiple-choice", "images": []},
             {"question": "How long is <image 1>?", "choices": [], "answer": "4",
              "question_type": "open", "images": []}],
    "MathVista": [{"question": "Which number is missing?", "choices": None, "answer": "14", "precision": None,
                   "question_type": "free_form", "answer_type": "integer", "skills": [],
                   "query": "Hint: Please answer the question requiring an integer answer and provide the final value, "
                            "e.g., 1, 2, 3, at the end.\nQuestion: Which number is missing?"}],
}


OWN = [{"question": "Which?", "choices": ["a cat", "a dog"], "answer": "B", "hint": "One barks.", "answers": []},
       {"question": "Is it a dog?", "choices": [], "answer": "yes", "hint": "", "answers": []},
       {"question": "What is it?", "choices": [], "answer": "a dog", "hint": "", "answers": []}]


def table(benchmark: str) -> pd.DataFrame:
    return pd.DataFrame([{**COMMON, **row, "id": str(i)} for i, row in enumerate(ROWS[benchmark])])


def written() -> str:
    """Every prompt under a heading with benchmark, family and row."""
    return "".join(f"=== {benchmark} · {family} · {i}\n{text}\n"
                   for benchmark in ROWS for family in TEMPLATES[benchmark]
                   for i, text in enumerate(dict.fromkeys(prompts(table(benchmark), benchmark, family))))


def test_prompts_are_those_on_file():
    assert written() == SNAPSHOT.read_text()


def test_every_benchmark_has_prompts():
    assert list(ROWS) and set(ROWS) == set(SOURCES) - {"own"} == set(TEMPLATES)
    for benchmark, families in TEMPLATES.items():
        assert "llava" in families and families.keys() <= {"llava", "lab", *FAMILIES.values()}, benchmark


def test_families_are_known_architectures():
    assert set(FAMILIES) <= set(CONFIG_MAPPING)


@pytest.mark.parametrize("family", TEMPLATES["GQA"])
def test_questions_of_ones_own_are_asked_as_those_like_them(family):
    own = pd.DataFrame([{**COMMON, **row, "id": str(i)} for i, row in enumerate(OWN)])
    like = ["ScienceQA-IMG", "POPE", "GQA"]
    assert prompts(own, "own", family) == [
        prompts(own.iloc[[i]], benchmark, family)[0] for i, benchmark in enumerate(like)]


def test_lab_models_are_asked_the_bare_question():
    from sinkstudy.world import benchmarks
    asked = benchmarks.mmstar(1)
    assert prompts(asked, "MMStar", "lab") == asked.question.tolist()


def test_errors_are_one_message():
    with pytest.raises(ValueError, match="^GQA has no prompt for 'other'; it has llava, "):
        prompts(table("GQA"), "GQA", "other")
    with pytest.raises(ValueError, match="^POPE: the table is empty$"):
        prompts(table("POPE").iloc[:0], "POPE")


if __name__ == "__main__":
    SNAPSHOT.write_text(written())
