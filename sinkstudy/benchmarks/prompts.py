"""The text that is asked, per benchmark and model family. The chat format around it is the model's own.

The same weights score differently under different prompts, so the prompt is data, printed beside results and held
by a snapshot test. Families follow the harness that the family's published numbers come from:

- `llava`: lmms-eval's default, LLaVA's own wording (Liu et al. 2023; Zhang et al. 2025). MMStar's instruction ends
  without a full stop there, the others with one;
- `qwen2_vl`, `qwen3_vl`, `internvl`: the prompts that VLMEvalKit (Duan et al. 2024) holds for them;
- `lab`: the bare question, with options in the lab's own form; the lab models know no other words.

Three things are ours: MathVista's `query`, which has the options and its authors' instruction, is asked as it is in
every family; MME's own "Please answer yes or no." is never doubled; and questions of one's own are asked as those of
the benchmark that is like them, see `LIKE`.
"""

import pandas as pd

from sinkstudy.benchmarks.data import OWN, check, several_pictures
from sinkstudy.benchmarks.rows import letters
from sinkstudy.wording import with_options

_WORD = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
_SELECT = "\nPlease select the correct answer from the options above."
_SHORT = "\nPlease try to answer the question with short words or phrases if possible."
_SHORT_3 = "\nPlease answer concisely with short words or phrases when possible."
_YES_NO = " Please answer yes or no."  # MME's questions end with it

# fields: question · bare (without MME's own instruction) · options, "A. …" line by line · with_options, the lab's ·
# context, "" or its line
TEMPLATES = {
    "POPE": {"llava": "{question}" + _WORD, "qwen2_vl": "{question}" + _YES_NO, "qwen3_vl": "{question}" + _YES_NO,
             "internvl": "{question}", "lab": "{question}"},
    "MME": {"llava": "{bare}" + _WORD, "qwen2_vl": "{question}", "qwen3_vl": "{bare}" + _YES_NO,
            "internvl": "{question} Answer the question using a single word or phrase.", "lab": "{question}"},
    "MMStar": {"llava": "{question}" + _LETTER.rstrip("."), "qwen2_vl": "Question: {question}" + _SELECT,
               "qwen3_vl": "Question: {question}\nAnswer with the option letter only.",
               "internvl": "{question}" + _LETTER, "lab": "{question}"},
    "GQA": {"llava": "{question}" + _WORD, "qwen2_vl": "{question}" + _SHORT, "qwen3_vl": "{question}" + _SHORT_3,
            "internvl": "{question}" + _WORD, "lab": "{question}"},
    "TextVQA": {"llava": "{question}" + _WORD, "qwen2_vl": "{question}" + _SHORT, "qwen3_vl": "{question}" + _SHORT_3,
                "internvl": "{question}" + _WORD, "lab": "{question}"},
    "ScienceQA-IMG": {
        "llava": "{context}{question}\n{options}" + _LETTER,
        "qwen2_vl": "{context}Question: {question}\nOptions:\n{options}" + _SELECT,
        "qwen3_vl": "{context}Question: {question}\nOptions:\n{options}\nAnswer with the option letter only.",
        "internvl": "{context}{question}\n{options}" + _LETTER, "lab": "{with_options}"},
    "MMMU": {
        "llava": "{question}\n{options}\n" + _LETTER,
        "qwen2_vl": "Question: {question}\nOptions:\n{options}" + _SELECT,
        "qwen3_vl": "Question: {question}\nOptions:\n{options}" + _SELECT,
        "internvl": "{question}\n{options}" + _LETTER, "lab": "{with_options}"},
    "MathVista": dict.fromkeys(("llava", "qwen2_vl", "qwen3_vl", "internvl", "lab"), "{query}"),
}
OPEN = {  # MMMU's questions without options
    "llava": "{question}\n" + _WORD, "qwen2_vl": "Question: {question}", "qwen3_vl": "Question: {question}",
    "internvl": "{question}\nAnswer the question directly.", "lab": "{question}",
}
LIKE = {"options": "ScienceQA-IMG", "yes or no": "POPE", "open": "GQA"}  # whose prompts questions of one's own take
CONTEXT = {"llava": "Context: {}\n", "qwen2_vl": "Hint: {}\n", "qwen3_vl": "Hint: {}\n", "internvl": "{}\n", "lab": ""}
FAMILIES = {  # of a transformers model_type; every other takes `llava`
    "qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_vl", "qwen3_vl": "qwen3_vl", "internvl": "internvl",
}


def prompts(table: pd.DataFrame, benchmark: str, family: str = "llava") -> list[str]:
    """What each row asks, without the chat format.

    Args:
        table: a benchmark's table (`load`, or the lab's).
        family: a key of `TEMPLATES[benchmark]`; `FAMILIES` gives it for a `model_type`.

    Raises:
        ValueError: a table that `check` refuses, a question about several pictures, or a family without a prompt for
            this benchmark.
    """
    check(table, benchmark)
    if (several := several_pictures(table)).any():
        raise ValueError(f"{benchmark}: {several.sum()} of {len(table)} questions are about several pictures, such as "
                         f"{table.id[several].iloc[0]!r}, and one is shown; benchmarks.askable leaves them out")
    known = TEMPLATES[LIKE["open"] if benchmark == OWN else benchmark]
    if family not in known:
        raise ValueError(f"{benchmark} has no prompt for {family!r}; it has {', '.join(known)}")
    return [_prompt(row, TEMPLATES[LIKE[kind(row)]][family] if benchmark == OWN else known[family], family)
            for row in table.to_dict("records")]


def kind(row: dict) -> str:
    """What kind a question of one's own is, by its options and its answer: a key of `LIKE`."""
    return "options" if row["choices"] else "yes or no" if row["answer"] in ("yes", "no") else "open"


def _prompt(row: dict, template: str, family: str) -> str:
    question = row["question"].strip()
    choices = row.get("choices") or []
    if row.get("question_type") == "open":
        template = OPEN[family]
    return template.format(
        question=question, bare=question.removesuffix(_YES_NO), query=row.get("query", ""),
        options="\n".join(f"{letter}. {choice}" for letter, choice in zip(letters(len(choices)), choices, strict=True)),
        with_options=with_options(question, choices),
        context=CONTEXT[family].format(row["hint"]) if row.get("hint") else "")
