"""What a free text answers: the extraction rules of the benchmarks, of two evaluation harnesses, and a strict one.

Each rule maps one text to `yes`/`no` or to a letter `A`–`D`, and to None where it finds no answer (which counts as
wrong). `RULES` names them per benchmark: `official` is the rule of the benchmark's authors, `strict` is ours,
`lmms-eval` and `vlmevalkit` are those of the harnesses, so that a published number can be met with the rule behind
it. They are facts of public code, written anew here; the oddities are the originals' own and are kept. The page
*Why two harnesses disagree* sets them side by side.

Sources: POPE (Li et al. 2023), repository AoiDragon/POPE, `evaluate.py` at f3ec604 · MME (Fu et al. 2023), its
evaluation tool · MMStar (Chen et al. 2024), repository MMStar-Benchmark/MMStar, `eval/vlmeval/evaluate/mmstar.py`
at 79e6d1c · lmms-eval (Zhang et al. 2025) at 75571cf · VLMEvalKit (Duan et al. 2024) at e8e78f0.
"""

import re
from collections.abc import Callable, Sequence

LETTERS = "ABCD"
_PHRASES = (  # of lmms-eval; in English, Korean, Chinese, Japanese
    *(f"{the}{what} is" for the in ("", "the ") for what in (
        "answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")),
    "my answer is", "my choice is", "i choose", "i select", "i pick",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)


# ------------------------------------------------------------------------------------------------ yes or no
def pope_official(text: str) -> str:
    """POPE: `no` if the text before the first full stop has the word No, not or no (commas left out), else `yes`.

    Words are split at single spaces and compared with their case, so "NO", "Not" and "No\\nThere" are `yes`; so is
    every text that answers nothing, the empty one included. No answer is None.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_official(text: str) -> str | None:
    """MME: `yes`, or else `no`, if these letters stand anywhere in the first four characters, in any case."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def yes_no_strict(text: str) -> str | None:
    """Ours: the first word, without the marks `.,!` around it, in any case, if it is yes or no."""
    first = text.strip().lower().split(maxsplit=1)[:1]
    word = first[0].strip(".,!") if first else ""
    return word if word in ("yes", "no") else None


def pope_lmms_eval(text: str) -> str | None:
    """lmms-eval on POPE (`tasks/pope/utils.py`): the whole text is yes or no; a full stop already spoils it."""
    text = text.lower().strip()
    return text if text in ("yes", "no") else None


def mme_lmms_eval(text: str) -> str | None:
    """lmms-eval on MME (`tasks/mme/utils.py`): MME's rule after leaving out spaces around and full stops; y and n."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or mme_official(text)


def yes_no_vlmevalkit(text: str) -> str | None:
    """VLMEvalKit on yes/no benchmarks (`dataset/utils/yorn.py`): the one of the words yes and no that occurs.

    Where both or neither occur it asks a language model if one is set up; here that is None.
    """
    said = {"yes", "no"} & set(without_punctuation(text.lower(), period=r"(?<!\d)\.(?!\d)").split())
    return said.pop() if len(said) == 1 else None


def without_punctuation(text: str, *, period: str) -> str:
    """The VQA evaluation's treatment of punctuation (Antol et al. 2015), which several harnesses share.

    A mark that stands next to a space anywhere in the text is dropped everywhere, any other becomes a space; with a
    comma between digits all are dropped. Full stops that match the pattern `period` are dropped.
    """
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if beside_space or re.search(r"\d,\d", text) else " ")
    return re.sub(period, "", out)


# -------------------------------------------------------------------------------------------------- letters
def mmstar_official(text: str) -> str | None:
    """MMStar: the first character in any case, or the one after "(", "option " or "the answer is ".

    A word will do: "Because" is B and "the answer is a dog" is A.
    """
    text = text.lower().strip().replace("\n", " ")
    for lead in ("(", "option ", "the answer is ", ""):
        if text.startswith(lead):
            found = text[len(lead):][:1].upper()
            return found if found and found in LETTERS else None
    return None


def letter_strict(text: str, letters: Sequence[str] = LETTERS) -> str | None:
    """Ours: the first word, without the marks `().,:` around it, if it is one of the capital letters, A–D."""
    first = text.strip().split(maxsplit=1)[:1]
    word = first[0].strip("().,:") if first else ""  # upper case only: "a" is a word
    return word if word and word in tuple(letters) else None


def letter_lmms_eval(text: str) -> str | None:
    """lmms-eval on multiple choice (`_task_utils/mcq_extract.py`): the best of nine places, capitals only.

    In this order: alone at the start; alone at the end; anywhere after a phrase such as "answer is"; as (A), A., A:,
    A), before a space; anywhere at all. Within one place the last occurrence wins.
    """
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = text.strip()
    if alone := re.match(r"([A-D])(?![^\W\d_])", text) or re.search(r"(?<![^\W\d_])([A-D])$", text):
        return alone[1]
    padded = f" {text} "
    after = []  # (place, letter): the first occurrence of each letter after each phrase
    for phrase in _PHRASES:
        start = padded.lower().find(phrase)
        after += [(padded.find(c, start + len(phrase)), c) for c in LETTERS if start >= 0]
    ranked = [after, *([(padded.rfind(form.format(c)), c) for c in LETTERS]
                       for form in ("({})", "{}.", "{}:", "{})", "{} ", "{}"))]
    return _last(ranked)


def _last(ways: list[list[tuple[int, str]]]) -> str | None:
    """The letter that stands last, in the first of the ways in which one stands: (place, letter), -1 for nowhere."""
    for places in ways:
        place, found = max(places, default=(-1, ""), key=lambda p: p[0])
        if place >= 0:
            return found
    return None


def letter_vlmevalkit(text: str) -> str | None:
    """VLMEvalKit on multiple choice (`utils/matching_util.py`): the only capital A–D that is a word, if near the end.

    "Near the end" is one of the last four words. Otherwise the letter right after "answer is", in any case. The
    original then looks for the text of one option and may ask a language model; here that is None.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    found = [c for c in LETTERS if c in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    phrase = re.search(r"(?i)answer\s+is\s+\**([ABCD])", text)
    return phrase[1].upper() if phrase else None


def letter_science_qa(text: str) -> str | None:
    """ScienceQA as LLaVA scores it (haotian-liu/LLaVA, `llava/eval/eval_science_qa.py`): three exact forms.

    The letter A–E alone, at the start and followed by ". ", or right after "The answer is ".
    """
    text = text.replace("\n", ". ")
    if text.strip() in tuple("ABCDE"):
        return text.strip()
    found = re.match(r"([A-E])\. ", text) or re.search(r"The answer is ([A-E])", text)
    return found[1] if found else None


def letter_mmmu(text: str, options: list[str]) -> str | None:
    """MMMU (Yue et al. 2024) (`eval/eval_utils.py` at 44b45b5): the last (A), else the last A between spaces, else,
    in a text of more than five words, the option whose text occurs last.

    The original draws a letter at random where nothing is found; here that is None, so that two runs agree.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = [chr(ord("A") + i) for i in range(len(options))]
    ways = [[(text.rfind(form.format(c)), c) for c in letters] for form in ("({})", " {} ")]
    if len(text.split()) > 5:
        ways.append([(text.lower().rfind(o.lower()), c) for o, c in zip(options, letters, strict=True)])
    return _last(ways)


Rule = Callable[[str], str | None]
RULES: dict[str, dict[str, Rule]] = {
    "POPE": {"official": pope_official, "strict": yes_no_strict, "lmms-eval": pope_lmms_eval,
             "vlmevalkit": yes_no_vlmevalkit},
    "MME": {"official": mme_official, "strict": yes_no_strict, "lmms-eval": mme_lmms_eval,
            "vlmevalkit": yes_no_vlmevalkit},
    "MMStar": {"official": mmstar_official, "strict": letter_strict, "lmms-eval": letter_lmms_eval,
               "vlmevalkit": letter_vlmevalkit},
}
