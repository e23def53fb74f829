"""The extraction rules against answers read by hand, and the page that sets them side by side."""

from pathlib import Path

import pytest
from golden import CHOICE, CHOICE_ANSWERS, YES_NO, YES_NO_ANSWERS, table

from sinkstudy.benchmarks import RULES, rules

PAGE = Path(__file__).resolve().parents[2] / "book/harnesses.md"


@pytest.mark.parametrize("names, answers", [(YES_NO, YES_NO_ANSWERS), (CHOICE, CHOICE_ANSWERS)])
def test_golden_answers(names, answers):
    for column, name in enumerate(names):
        benchmark, rule = name.split()
        found = {text: RULES[benchmark][rule](text) for text in answers}
        assert found == {text: expected[column] for text, expected in answers.items()}, name


def test_mme_and_pope_share_the_strict_rule_and_that_of_vlmevalkit():
    """So the golden table shows each once."""
    for rule in ("strict", "vlmevalkit"):
        assert RULES["MME"][rule] is RULES["POPE"][rule]
    shown = {name for names in (YES_NO, CHOICE) for name in names} | {"MME strict", "MME vlmevalkit"}
    assert shown == {f"{benchmark} {rule}" for benchmark, known in RULES.items() for rule in known}


def test_the_page_shows_the_golden_tables():
    page = PAGE.read_text()
    for names, answers in ((YES_NO, YES_NO_ANSWERS), (CHOICE, CHOICE_ANSWERS)):
        assert table(names, answers) in page, f"{PAGE.name} should have\n\n{table(names, answers)}"


def test_no_rule_fails_on_odd_texts():
    for text in ("", " ", ".", ",", "(", "()", "option ", "the answer is ", "\n", "\x00", "😀", "a" * 10_000):
        for known in RULES.values():
            for rule in known.values():
                assert rule(text) in (None, "yes", "no", *"ABCD")


# --- the rest of the lab's own rule, which the strict one was ---
@pytest.mark.parametrize("text, answer", [
    ("yes", "yes"), ("no", "no"), (" Yes, there is a ball.", "yes"), ("yes ball", "yes"), ("   ", None),
    ("maybe yes", None), ("nothing", None), ("yesterday no", None), ("no .", "no"),
])
def test_yes_no_strict(text, answer):
    assert rules.yes_no_strict(text) == answer


@pytest.mark.parametrize("text, answer", [
    ("A: the red one", "A"), (" C ", "C"), ("E", None), ("ball", None), ("a ball", None), ("AB", None), ("(", None),
])
def test_letter_strict(text, answer):
    assert rules.letter_strict(text) == answer


@pytest.mark.parametrize("text, answer", [
    ("Yes,there is", "yes"),            # a comma between letters becomes a space
    ("Yes,there is, look", None),       # beside a space anywhere, it is dropped everywhere: "yesthere"
    ("yes.", "yes"), ("It is 3.5. Yes", "yes"),
])
def test_vlmevalkit_punctuation(text, answer):
    assert rules.yes_no_vlmevalkit(text) == answer


@pytest.mark.parametrize("text, answer", [
    ("the choices were (A), (B); I take (C)", "C"),      # the last of the best form
    ("A. red B. blue", "A"),                             # alone at the start comes first
    ("is it B. or C. that fits", "C"), ("ABBA", "A"),    # the last capital, where nothing else is found
    ("D is wrong, so my answer is B", "D"), ("Is it B", "B"),
])
def test_letter_lmms_eval(text, answer):
    assert rules.letter_lmms_eval(text) == answer


@pytest.mark.parametrize("text, answer", [
    ("C", "C"), (" C ", "C"), ("C. a cat", "C"), ("The answer is C.", "C"), ("Well. The answer is C", "C"),
    ("B\na cat", "B"), ("(C)", None), ("C: a cat", None), ("c", None), ("the answer is C", None), ("", None),
    ("E", "E"), ("F", None),
])
def test_letter_science_qa(text, answer):
    assert rules.letter_science_qa(text) == answer


@pytest.mark.parametrize("text, answer", [
    ("B", "B"), ("(B)", "B"), ("B.", "B"), ("either (A) or (C)", "C"), ("not A but B", "B"), ("(A) or B", "A"),
    ("the picture shows what is called a red fox here", "A"), ("red fox", None),   # five words are too few
    ("here we can see the red fox and the blue whale", "B"), ("answer:B", None), ("", None), ("BAD idea", None),
    ("D", None),
])
def test_letter_mmmu(text, answer):
    assert rules.letter_mmmu(text, ["red fox", "blue whale", "cat"]) == answer
