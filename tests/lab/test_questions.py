"""Questions and captions: an oracle that reads only their text finds the same answer in the facts."""

import random
import re
from collections import Counter

import pytest
from oracle import WORDS, oracle

from sinkstudy.world import questions as q
from sinkstudy.world.drawing import CELLS, COLOURS, KINDS, LIGHTS, SCENES, SIZES, TEXTURES, render

GLOBAL = {"scene", "light", "texture", "main colour", "things", "parts", "sum"}
LOCAL = {"existence", "colour", "place", "size", "mark", "which colour", "material"}
MIXED = {"relation", "behind", "on main", "both", "compare"}
ALWAYS_YES_NO = {"existence", "mark", "on main", "compare"}


@pytest.fixture(scope="module")
def facts() -> list[q.Facts]:
    return [f for split in ("val", "val simple") for f in q.facts(render(split, 0, 1024, pictures=False))]


@pytest.mark.parametrize("family", q.TYPES)
def test_the_answer_follows_from_the_text_and_the_facts(facts, family):
    rng, asked = random.Random(family), Counter()
    for f in facts:
        for yes in (None, True, False):
            made = q.ask(f, family, rng, yes)
            if made is None:
                continue
            assert made.family == family
            assert made.answer == oracle(made.text, f), (made, f)
            if yes is not None:  # the answer that was asked for
                assert made.answer == ("yes" if yes else "no") or family in {"existence", "compare"}, made
                assert made.answer == ("yes" if yes else "no"), made
            elif made.options:
                assert made.options.count(made.answer) == 1 and len(set(made.options)) == len(made.options)
                assert made.answer not in ("yes", "no")
            else:
                assert family in ALWAYS_YES_NO and made.answer in ("yes", "no")
            asked[yes] += 1
    # every form comes up often
    assert all(asked[yes] > len(facts) / 10 for yes in (None, True, False)), asked


@pytest.mark.parametrize("family", sorted(ALWAYS_YES_NO - {"mark", "on main", "compare"}))
def test_yes_and_no_are_balanced(facts, family):
    rng = random.Random(1)
    said = Counter(made.answer for f in facts if (made := q.ask(f, family, rng)))
    assert 0.43 < said["yes"] / said.total() < 0.57


def test_the_mixture_is_balanced_and_true(facts):
    rng = random.Random(2)
    said, letters, forms = Counter(), Counter(), Counter()
    for f in facts:
        for text, answer in sum(q.mixture(f, 9, 3, rng), []):
            if " options : " not in text:
                assert answer == oracle(text, f)
                said[answer] += answer in ("yes", "no")
                forms["yes/no" if answer in ("yes", "no") else "open"] += 1
                continue
            stem, listed = text.removesuffix(" . answer with the letter .").split(" options : ")
            options = dict(o.split(" ", 1) for o in listed.split(" , "))
            assert list(options) == list("ABCD") and len(set(options.values())) == 4
            assert options[answer] == oracle(stem, f)  # the letter names the true answer, and only it does
            letters[answer] += 1
            forms["letter"] += 1
    assert 0.45 < said["yes"] / (said["yes"] + said["no"]) < 0.55
    assert all(abs(letters[letter] / letters.total() - 0.25) < 0.03 for letter in "ABCD")
    assert min(forms.values()) > 0.15 * forms.total()


def test_four_options_need_four_answers(facts):
    few = q.ask(facts[0], "parts", random.Random(0))
    with pytest.raises(ValueError, match="'parts' has only 3 options; four are needed"):
        q.choice_form(few, random.Random(0))


def test_types():
    assert set(q.TYPES) == GLOBAL | LOCAL | MIXED
    for family, kind in q.TYPES.items():
        assert family in {"global": GLOBAL, "local": LOCAL, "mixed": MIXED}[kind]
        assert q.Question("", "", family).type == kind


def test_facts_come_in_the_documented_order():
    scenes = render("val", 0, 64, pictures=False)
    for i, f in enumerate(q.facts(scenes)):
        area = {TEXTURES[t]: a for t, a in zip(scenes.texture[i].tolist(), scenes.area[i].tolist()) if t >= 0}
        areas = [area[texture] for texture, _ in f.parts]
        assert areas == sorted(areas, reverse=True) and len(areas) == len(area)
        assert [t.cell for t in f.things] == sorted(t.cell for t in f.things)
        for t in f.things:
            slot = scenes.kind[i].tolist().index(KINDS.index(t.kind))
            assert t.colour == COLOURS[scenes.thing_colour[i, slot]] and t.size == SIZES[scenes.size[i, slot]]
            assert t.cell == scenes.cell[i, slot] and t.mark == scenes.mark[i, slot]
            assert f.parts[t.under][0] == TEXTURES[scenes.texture[i, scenes.under[i, slot]]]


# ----------------------------------------------------------------------------------------- captions
def parse(text: str) -> q.Facts:
    """A caption read back, as far as it goes (no cell's number, no part under a thing)."""
    head, ground, said = re.fullmatch(r"(.+?) : (.+) \. (\w+ things? : .+) \.", text).groups()
    told = re.fullmatch(r"a (\w+) (\w+)", head) or re.fullmatch(r"the light is (\w+) in the (\w+)", head)
    light, scene = told.groups()
    match = (re.fullmatch(r"(\w+) parts , the main one (\w+ \w+) , then (.+)", ground)
             or re.fullmatch(r"mostly (?P<main>\w+ \w+) , also (?P<rest>.+) , (?P<n>\w+) parts", ground)
             or re.fullmatch(r"(?P<n>one) part , (?P<main>\w+ \w+)(?P<rest>)", ground)
             or re.fullmatch(r"(?P<main>\w+ \w+) , (?P<n>one) part(?P<rest>)", ground))
    groups = match.groupdict()
    n, main, rest = (groups["n"], groups["main"], groups["rest"]) if groups else match.groups()
    parts = [tuple(p.split()) for p in (main, *filter(None, rest.split(" , ")))]
    assert len(parts) == WORDS.index(n)
    count, listed = re.fullmatch(r"(\w+) things? : (.+)", said).groups()
    things = []
    for one in listed.split(" , "):
        size, colour, kind, mark, where = re.fullmatch(r"a (\w+) (\w+) (\w+) (with a mark )?at the (.+)", one).groups()
        things.append(q.Thing(kind, colour, size, CELLS.index(where), bool(mark), -1))
    assert len(things) == WORDS.index(count)
    return q.Facts(scene, light, parts, False, things)


def test_a_caption_states_every_fact(facts):
    rng = random.Random(3)
    wordings = set()
    for f in facts:
        text = q.caption(f, rng)
        wordings.add((text.startswith("the light"), " mostly " in text))
        wanted = f._replace(has_main=False, things=[t._replace(under=-1) for t in f.things])
        assert parse(text) == wanted
    assert len(wordings) == 4


def test_vocabulary_is_sorted_and_holds_all_names():
    words = q.vocabulary()
    assert list(words) == sorted(set(words))
    for group in (SCENES, LIGHTS, TEXTURES, COLOURS, KINDS, SIZES, CELLS, WORDS, q.MATERIALS):
        assert {w for name in group for w in name.split()} <= set(words)


def test_every_kind_has_one_material():
    told = {tuple(re.fullmatch(r"a (\w+) is made of (\w+) \.", s).groups()) for s in q.fact_sentences()}
    assert told == set(q.MADE_OF.items()) and set(q.MADE_OF) == set(KINDS)
    assert set(Counter(q.MADE_OF.values()).values()) == {2}  # six materials, twice each: no favourite


def test_questions_about_questions():
    """The letter follows from the type of the question asked about; held-out wordings never occur; both letters do."""
    rng, letters = random.Random(0), Counter()
    for f in q.facts(render("train simple", 0, 64, pictures=False)) + q.facts(render("train", 0, 64, pictures=False)):
        text, letter = q.routing(f, rng)
        about, options = text.split(" options : ")
        a, b = options.removesuffix(" . answer with the letter .").removeprefix("A ").split(" , B ")
        whole, place = (a, b) if a in q.WHOLE else (b, a)
        assert whole in q.WHOLE and place in q.PLACE and (whole, place) not in q.HELD_OUT
        asks_of_whole = any(about.startswith(start) for start in (
            "what is the scene", "is this a", "what is the light", "is the light", "what is the main", "is the main",
            "how many", "is the number", "do things"))
        assert {"A": a, "B": b}[letter] == (whole if asks_of_whole else place)
        letters[letter] += 1
    assert min(letters.values()) > 40
