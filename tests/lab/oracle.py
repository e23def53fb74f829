"""From a question's text and the facts to the answer, with nothing of the questions' own logic."""

import re

from sinkstudy.world import questions as q
from sinkstudy.world.drawing import CELLS, COLOURS

WORDS = "zero one two three four five six seven eight nine".split()


def only(items):
    """The single item; a question that leaves a choice is a bad question."""
    items = list(items)
    assert len(items) == 1, items
    return items[0]


def place(thing) -> tuple[int, int]:
    row, column = CELLS[thing.cell].split()
    return ("top", "middle", "bottom").index(row), ("left", "center", "right").index(column)


def stands(a, word: str, b) -> bool:
    (ay, ax), (by, bx) = place(a), place(b)
    return {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[word]


def looks(thing, size: str, mark: str) -> bool:
    return thing.size == size and thing.mark == (mark == "marked")


def region(f: q.Facts, fits, missing: str) -> str:
    found = [t for t in f.things if fits(t)]
    if not found:
        return f"there is no {missing}"
    t = only(found)
    mark = "with a mark " if t.mark else ""
    return f"a {t.size} {t.colour} {t.kind} {mark}at the {CELLS[t.cell]} on the {f.parts[t.under][0]} part"


def oracle(text: str, f: q.Facts):
    named = {t.kind: t for t in f.things}
    assert len(named) == len(f.things)
    things, parts = len(f.things), len(f.parts)
    answers = [
        (r"what is the scene \?", lambda: f.scene),
        (r"is this a (\w+) \?", lambda s: f.scene == s),
        (r"what is the light \?", lambda: f.light),
        (r"is the light (\w+) \?", lambda v: f.light == v),
        (r"what is the main texture \?", lambda: f.parts[0][0]),
        (r"is the main texture (\w+) \?", lambda v: f.parts[0][0] == v),
        (r"what is the main colour \?", lambda: f.parts[0][1]),
        (r"is the main colour (\w+) \?", lambda v: f.parts[0][1] == v),
        (r"how many things are there \?", lambda: WORDS[things]),
        (r"is the number of things (\w+) \?", lambda n: things == WORDS.index(n)),
        (r"how many parts are there \?", lambda: WORDS[parts]),
        (r"is the number of parts (\w+) \?", lambda n: parts == WORDS.index(n)),
        (r"how many things and parts are there together \?", lambda: WORDS[things + parts]),
        (r"do things and parts together make (\w+) \?", lambda n: things + parts == WORDS.index(n)),
        (r"is there a (\w+) \?", lambda k: k in named),
        (r"what colour is the (\w+) \?", lambda k: named[k].colour),
        (r"where is the (\w+) \?", lambda k: CELLS[named[k].cell]),
        (r"is the (\w+) at the (\w+ \w+) \?", lambda k, c: CELLS[named[k].cell] == c),
        (r"what size is the (\w+) \?", lambda k: named[k].size),
        (r"does the (\w+) have a mark \?", lambda k: named[k].mark),
        (r"which thing is (\w+) \?", lambda c: only(t.kind for t in f.things if t.colour == c)),
        (r"is the (\w+) thing a (\w+) \?", lambda c, k: only(t for t in f.things if t.colour == c).kind == k),
        (r"what is the thing at the (\w+ \w+) made of \?",
         lambda c: q.MADE_OF[only(t for t in f.things if CELLS[t.cell] == c).kind]),
        (r"is the thing at the (\w+ \w+) made of (\w+) \?",
         lambda c, m: q.MADE_OF[only(t for t in f.things if CELLS[t.cell] == c).kind] == m),
        (r"which thing is (left of|right of|above|below) the (\w+) \?",
         lambda w, k: only(t for t in f.things if stands(t, w, named[k])).kind),
        (r"is the (\w+) (left of|right of|above|below) the (\w+) \?", lambda a, w, b: stands(named[a], w, named[b])),
        (r"what texture is behind the (\w+) \?", lambda k: f.parts[named[k].under][0]),
        (r"is the (\w+) on the main part \?", lambda k: named[k].under == 0),
        (r"is the (\w+) on the (\w+) part \?", lambda k, t: f.parts[named[k].under][0] == t),
        (r"which thing is (small|large) and (marked|not marked) \?",
         lambda s, m: only(t for t in f.things if looks(t, s, m)).kind),
        (r"is the (\w+) (small|large) and (marked|not marked) \?",
         lambda k, s, m: only(t for t in f.things if looks(t, s, m)).kind == k),
        (r"are there more things than parts \?", lambda: things > parts),
        (r"are there more parts than things \?", lambda: parts > things),
        (r"what is at the (\w+ \w+) \?", lambda c: region(f, lambda t: CELLS[t.cell] == c, "thing")),
        (r"what is the (\w+) \?", lambda k: region(f, lambda t: t.kind == k, k)),
        (r"is the (\w+) (small|large) \?", lambda k, s: named[k].size == s),
        (r"is the (\w+) (\w+) \?", lambda k, c: COLOURS.index(named[k].colour) == COLOURS.index(c)),
    ]
    for pattern, answer in answers:
        match = re.fullmatch(pattern, text)
        if match:
            value = answer(*match.groups())
            return ("no", "yes")[value] if isinstance(value, bool) else value
    raise AssertionError(f"the oracle does not know {text!r}")
