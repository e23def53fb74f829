"""Captions of lab scenes, and questions about them whose answer and type follow from the facts.

Types, known by construction (the paper had to ask a language model for them):

- ``global``: the answer needs the picture as a whole (scene, light, main texture, how many);
- ``local``: the answer is in one small place (is a thing there, its colour, place, size, mark);
- ``mixed``: a thing must be found and set against other things or the whole.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import product
from typing import NamedTuple

from sinkstudy.wording import with_options
from sinkstudy.world.drawing import CELLS, COLOURS, KINDS, LIGHTS, SCENES, SIZES, TEXTURES, Scenes, render

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MATERIALS = ("gold", "silver", "wood", "stone", "glass", "iron")
# What each kind of thing is made of: a fact of the lab world that no picture shows and the text corpus teaches.
MADE_OF = {kind: MATERIALS[(5 * i + i // 6) % 6] for i, kind in enumerate(KINDS)}
MAIN_MARGIN = 1.25  # "the main part" is asked about only if it is this much larger than the next
TYPES = {
    "scene": "global", "light": "global", "texture": "global", "main colour": "global", "things": "global",
    "parts": "global", "sum": "global",
    "existence": "local", "colour": "local", "place": "local", "size": "local", "mark": "local",
    "which colour": "local", "material": "local",
    "relation": "mixed", "behind": "mixed", "on main": "mixed", "both": "mixed", "compare": "mixed",
}


class Thing(NamedTuple):
    kind: str
    colour: str
    size: str
    cell: int
    mark: bool
    under: int


class Facts(NamedTuple):
    """One scene in words. Parts come largest first; things in reading order (by cell)."""

    scene: str
    light: str
    parts: list[tuple[str, str]]  # (texture, colour)
    has_main: bool                # the first part is the largest by a clear margin
    things: list[Thing]           # `under` is an index into `parts`


class Question(NamedTuple):
    text: str
    answer: str
    family: str
    options: tuple[str, ...] = ()  # what a multiple-choice form chooses from (the answer among them)

    @property
    def type(self) -> str:
        return TYPES[self.family]


def facts(scenes: Scenes) -> list[Facts]:
    columns = [getattr(scenes, c).tolist() for c in (
        "scene", "light", "texture", "colour", "area", "kind", "thing_colour", "size", "cell", "mark", "under")]
    out = []
    for scene, light, texture, colour, area, kind, tint, size, cell, mark, under in zip(*columns, strict=True):
        order = sorted((i for i, t in enumerate(texture) if t >= 0), key=lambda i: -area[i])
        things = [Thing(KINDS[k], COLOURS[tint[i]], SIZES[size[i]], cell[i], mark[i], order.index(under[i]))
                  for i, k in enumerate(kind) if k >= 0]
        main = len(order) == 1 or area[order[0]] >= MAIN_MARGIN * area[order[1]]
        out.append(Facts(SCENES[scene], LIGHTS[light], [(TEXTURES[texture[i]], COLOURS[colour[i]]) for i in order],
                         main, sorted(things, key=lambda t: t.cell)))
    return out


def caption(f: Facts, rng: random.Random) -> str:
    """Every fact in one or two sentences; wording and order of the parts vary."""
    parts = [f"{t} {c}" for t, c in f.parts]
    things = [_described(t) for t in f.things]
    head = rng.choice((f"a {f.light} {f.scene}", f"the light is {f.light} in the {f.scene}"))
    ground = rng.choice((f"{NUMBERS[len(parts)]} parts , the main one {parts[0]} , then {' , '.join(parts[1:])}",
                         f"mostly {parts[0]} , also {' , '.join(parts[1:])} , {NUMBERS[len(parts)]} parts")
                        if len(parts) > 1 else (f"one part , {parts[0]}", f"{parts[0]} , one part"))
    return f"{head} : {ground} . {NUMBERS[len(things)]} thing{'s' * (len(things) > 1)} : {' , '.join(things)} ."


def _described(t: Thing) -> str:
    return f"a {t.size} {t.colour} {t.kind} {'with a mark ' if t.mark else ''}at the {CELLS[t.cell]}"


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def ask(f: Facts, family: str, rng: random.Random, yes: bool | None = None) -> Question | None:
    """A question of the family about the scene, or None where the scene admits none.

    Args:
        yes: None for an open question; True or False for a yes/no question with that answer. Existence, size
            comparison and relation are always yes/no or open as their nature is; see the code.
    """
    made = _MAKERS[family](f, rng, yes)
    if made is None:
        return None
    text, answer, *options = made
    return Question(text, answer, family, *options)


def _swap(truth: str, choices, yes: bool, rng: random.Random) -> str:
    return truth if yes else rng.choice([c for c in choices if c != truth])


def _attribute(open_text, closed_text, value, usual, of_simple=()):
    """A maker for "what is the …" (open) and "is the … X" (yes/no) about one attribute of the whole.

    `value`: the truth about a scene, None where there is none. `of_simple`: the choices where it is none of the usual
    ones, as in simple scenes.
    """

    def make(f, rng, yes):
        if (truth := value(f)) is None:
            return None
        choices = usual if truth in usual else of_simple
        if yes is None:
            return open_text, truth, choices
        return closed_text.format(_swap(truth, choices, yes, rng)), _yes(yes)

    return make


def _of_main(index):
    return lambda f: f.parts[0][index] if f.has_main else None


def _about_thing(open_text, closed_text, choices, value):
    def make(f, rng, yes):
        t = rng.choice(f.things)
        if yes is None:
            return open_text.format(t.kind), value(t), choices
        return closed_text.format(t.kind, _swap(value(t), choices, yes, rng)), _yes(yes)

    return make


def _existence(f, rng, yes):
    present = [t.kind for t in f.things]
    yes = rng.random() < 0.5 if yes is None else yes
    return f"is there a {rng.choice(present if yes else [k for k in KINDS if k not in present])} ?", _yes(yes)


def _mark(f, rng, yes):
    fitting = [t for t in f.things if yes is None or t.mark == yes]
    if not fitting:
        return None
    t = rng.choice(fitting)
    return f"does the {t.kind} have a mark ?", _yes(t.mark)


def _which_colour(f, rng, yes):
    tints = [t.colour for t in f.things]
    unique = [t for t in f.things if tints.count(t.colour) == 1]
    if not unique:
        return None
    t = rng.choice(unique)
    if yes is None:
        return f"which thing is {t.colour} ?", t.kind, KINDS
    return f"is the {t.colour} thing a {_swap(t.kind, KINDS, yes, rng)} ?", _yes(yes)


def _material(f, rng, yes):
    t = rng.choice(f.things)
    where = CELLS[t.cell]
    if yes is None:
        return f"what is the thing at the {where} made of ?", MADE_OF[t.kind], MATERIALS
    return f"is the thing at the {where} made of {_swap(MADE_OF[t.kind], MATERIALS, yes, rng)} ?", _yes(yes)


def _relation(f, rng, yes):
    pairs = [(a, b, word, other) for a in f.things for b in f.things if a is not b
             for word, other, ahead in (("left of", "right of", a.cell % 3 < b.cell % 3),
                                        ("above", "below", a.cell // 3 < b.cell // 3)) if ahead]
    if not pairs:
        return None
    a, b, word, other = rng.choice(pairs)
    if rng.random() < 0.5:
        a, b, word, other = b, a, other, word
    if yes is not None:
        return f"is the {a.kind} {word if yes else other} the {b.kind} ?", _yes(yes)
    column = word in ("left of", "right of")
    sign = 1 if word in ("left of", "above") else -1
    rank = (lambda t: sign * (t.cell % 3)) if column else (lambda t: sign * (t.cell // 3))
    fitting = [t for t in f.things if rank(t) < rank(b)]
    if len(fitting) > 1:
        return None
    return f"which thing is {word} the {b.kind} ?", a.kind, KINDS


def _behind(f, rng, yes):
    t = rng.choice(f.things)
    truth = f.parts[t.under][0]
    if yes is None:
        return f"what texture is behind the {t.kind} ?", truth, TEXTURES
    if len(f.parts) == 1 and not yes:
        return None
    return f"is the {t.kind} on the {_swap(truth, [p[0] for p in f.parts], yes, rng)} part ?", _yes(yes)


def _on_main(f, rng, yes):
    fitting = [t for t in f.things if yes is None or (t.under == 0) == yes]
    if not f.has_main or not fitting:
        return None
    t = rng.choice(fitting)
    return f"is the {t.kind} on the main part ?", _yes(t.under == 0)


def _both(f, rng, yes):
    looks = [(t.size, t.mark) for t in f.things]
    unique = [t for t in f.things if looks.count((t.size, t.mark)) == 1]
    if not unique or len(f.things) < 2:
        return None
    t = rng.choice(unique)
    what = f"{t.size} and {'marked' if t.mark else 'not marked'}"
    if yes is None:
        return f"which thing is {what} ?", t.kind, KINDS
    others = [o.kind for o in f.things if o is not t]
    return f"is the {t.kind if yes else rng.choice(others)} {what} ?", _yes(yes)


def _compare(f, rng, yes):
    if len(f.things) == len(f.parts):
        return None
    more = len(f.things) > len(f.parts)
    yes = rng.random() < 0.5 if yes is None else yes
    first, second = ("things", "parts") if more == yes else ("parts", "things")
    return f"are there more {first} than {second} ?", _yes(yes)


_MAKERS = {
    "scene": _attribute("what is the scene ?", "is this a {} ?", lambda f: f.scene, SCENES),
    "light": _attribute("what is the light ?", "is the light {} ?", lambda f: f.light, LIGHTS),
    "texture": _attribute("what is the main texture ?", "is the main texture {} ?", _of_main(0), TEXTURES),
    "main colour": _attribute("what is the main colour ?", "is the main colour {} ?", _of_main(1), COLOURS),
    "things": _attribute("how many things are there ?", "is the number of things {} ?",
                         lambda f: NUMBERS[len(f.things)], NUMBERS[1:5]),
    "parts": _attribute("how many parts are there ?", "is the number of parts {} ?",
                        lambda f: NUMBERS[len(f.parts)], NUMBERS[2:5], NUMBERS[1:5]),
    "sum": _attribute("how many things and parts are there together ?", "do things and parts together make {} ?",
                      lambda f: NUMBERS[len(f.things) + len(f.parts)], NUMBERS[3:9], NUMBERS[2:6]),
    "existence": _existence,
    "colour": _about_thing("what colour is the {} ?", "is the {} {} ?", COLOURS, lambda t: t.colour),
    "place": _about_thing("where is the {} ?", "is the {} at the {} ?", CELLS, lambda t: CELLS[t.cell]),
    "size": _about_thing("what size is the {} ?", "is the {} {} ?", SIZES, lambda t: t.size),
    "mark": _mark,
    "which colour": _which_colour,
    "material": _material,
    "relation": _relation,
    "behind": _behind,
    "on main": _on_main,
    "both": _both,
    "compare": _compare,
}
assert set(_MAKERS) == set(TYPES)


def choice_form(q: Question, rng: random.Random) -> tuple[str, str]:
    """The four-option form of an open question: (text, letter). Raises ValueError as `four_options`."""
    options = four_options(q, rng)
    return with_options(q.text, options), "ABCD"[options.index(q.answer)]


def four_options(q: Question, rng: random.Random) -> list[str]:
    """The answer of an open question among three others, in random order.

    Raises:
        ValueError: the question has fewer than four options to choose from.
    """
    wrong = [o for o in q.options if o != q.answer]
    if len(wrong) < 3:
        raise ValueError(f"{q.family!r} has only {len(wrong) + 1} options; four are needed")
    options = [q.answer, *rng.sample(wrong, 3)]
    rng.shuffle(options)
    return options


# Questions about questions: does the answer need the whole picture (global), or one place of it (local)?
WHOLE = ("the scene", "things and parts together", "parts together")
PLACE = ("one thing", "a thing", "one part")
HELD_OUT = (("the scene", "one thing"), ("parts together", "a thing"))  # pairs of wordings that no training has
_ROUTABLE = tuple(family for family, kind in TYPES.items() if kind != "mixed")


def routing_form(question: str, wording: tuple[str, str], swapped: bool) -> str:
    """The question with two options about it: what it needs is the whole (A), or a place (B); `swapped`: (B), (A)."""
    return with_options(question, wording[::-1] if swapped else wording)


def routing(f: Facts, rng: random.Random) -> tuple[str, str]:
    """A question about a global or local question on the scene, not in a wording of `HELD_OUT`: (text, letter)."""
    about = None
    while about is None:
        about = ask(f, rng.choice(_ROUTABLE), rng, yes=rng.random() < 0.5 if rng.random() < 0.6 else None)
    wording = rng.choice([pair for pair in product(WHOLE, PLACE) if pair not in HELD_OUT])
    swapped = rng.random() < 0.5
    return routing_form(about.text, wording, swapped), "AB"[(about.type == "local") != swapped]


def mixture(f: Facts, short: int, long: int, rng: random.Random) -> tuple[list, list]:
    """(question, answer) pairs for instruction tuning, all families: `short` yes/no and open ones, and `long`
    ones with four options."""
    plain: list[tuple[str, str]] = []
    while len(plain) < short:
        q = ask(f, rng.choice(_FAMILIES), rng, yes=rng.random() < 0.5 if rng.random() < 0.6 else None)
        if q is not None:
            plain.append((q.text, q.answer))
    choices: list[tuple[str, str]] = []
    while len(choices) < long:
        q = ask(f, rng.choice(_FAMILIES), rng)
        if q is not None and len(q.options) >= 4:
            choices.append(choice_form(q, rng))
    return plain, choices


def regions(f: Facts, n: int, rng: random.Random) -> list[tuple[str, str]]:
    """n questions that ask for a description of one thing, by its kind or its place, or of one that is not there.

    A whole phrase as answer teaches far more words about a spot than a yes or a colour does.
    """
    kinds, cells = {t.kind for t in f.things}, {t.cell for t in f.things}
    out = []
    for _ in range(n):
        t, there = rng.choice(f.things), rng.random() < 0.7
        phrase = f"{_described(t)} on the {f.parts[t.under][0]} part"
        if rng.random() < 0.5:
            kind = t.kind if there else rng.choice([k for k in KINDS if k not in kinds])
            out.append((f"what is the {kind} ?", phrase if there else f"there is no {kind}"))
        else:
            cell = t.cell if there else rng.choice([c for c in range(len(CELLS)) if c not in cells])
            out.append((f"what is at the {CELLS[cell]} ?", phrase if there else "there is no thing"))
    return out


_FAMILIES = (*TYPES, "existence", "existence")  # existence counts three times: POPE asks nothing else


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word that captions, questions and facts can hold, sorted."""
    rng = random.Random(0)
    words = set("user assistant A B C D options answer with the letter yes no made of thing things".split())
    for group in (SCENES, LIGHTS, TEXTURES, COLOURS, KINDS, SIZES, CELLS, NUMBERS, MATERIALS):
        words.update(w for item in group for w in item.split())
    for f in facts(render("train", 0, 512, pictures=False)):
        words.update(caption(f, rng).split())
        for pairs in (*mixture(f, 16, 4, rng), regions(f, 4, rng)):
            for text, answer in pairs:
                words.update(f"{text} {answer}".split())
    return tuple(sorted(words))


def fact_sentences() -> list[str]:
    """What the text corpus says about materials."""
    return [f"a {kind} is made of {material} ." for kind, material in MADE_OF.items()]
