"""What a row of each benchmark's files holds.

A question that lacks something, where a value is null or empty, is left out by its place and by why. A value of another
form is refused in one line, with file, row and column: then the file is another than it should be.

A row's fields are columns of the data set, by the names that its files give them; those without a default have to be
there. Nothing is converted but whole numbers of ids to text, lists that are written as text to lists, and the case of
yes and no.
"""

import ast
import io
import itertools
import json
import tokenize
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import pandas as pd
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError


def _not_blank(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("blank", "Input should not be blank")
    return value


def listed(value: Any) -> Any:
    """A list that a cell of a table holds as text, JSON or Python's. Text that is neither stays as it is.

    Texts with no comma between them, as NumPy prints them and as Python would join them, make no list.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        signs = [sign.type for sign in tokenize.generate_tokens(io.StringIO(value.strip()).readline)
                 if sign.type not in (tokenize.NL, tokenize.COMMENT)]
        joined = (tokenize.STRING, tokenize.STRING) in itertools.pairwise(signs)
        return value if joined else ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        return value


NotBlank = Annotated[str, AfterValidator(_not_blank)]
Key = Annotated[NotBlank, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
YesNo = Annotated[Literal["yes", "no"], BeforeValidator(lambda v: v.strip().lower() if isinstance(v, str) else v)]
Hint = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]  # null: there is none
Choices = Annotated[list[str], BeforeValidator(lambda value: [] if value is None else listed(value))]
Answers = Annotated[list[str], BeforeValidator(listed), Field(min_length=1)]


def letters(n: int) -> list[str]:
    """The letters of n options, A first."""
    return [chr(ord("A") + i) for i in range(n)]


class Row(BaseModel):
    """Columns that are not named are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Pope(Row):
    question_id: Key
    question: NotBlank
    answer: YesNo
    image_source: Key
    category: NotBlank


class Mme(Row):
    question_id: NotBlank
    question: NotBlank
    answer: YesNo
    category: NotBlank


class MmStar(Row):
    index: Key
    question: NotBlank
    answer: NotBlank
    category: NotBlank
    l2_category: NotBlank


class Types(Row):
    structural: NotBlank


class Gqa(Row):
    id: Key
    imageId: Key
    question: NotBlank
    answer: NotBlank
    types: Types


class ScienceQa(Row):
    question: NotBlank
    choices: Annotated[Choices, Field(min_length=2, max_length=26)]
    answer: int  # its place among the choices
    hint: Hint
    subject: NotBlank

    @model_validator(mode="after")
    def _among_choices(self) -> Self:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"column 'answer' holds {self.answer}, the place of none of {len(self.choices)} choices")
        return self


class TextVqa(Row):
    question_id: Key
    image_id: Key
    question: NotBlank
    answers: Answers

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if len(self.answers) < 4:
            raise ValueError(f"column 'answers' holds {len(self.answers)}, and an answer is right if 4 people gave it")
        return self


class Mmmu(Row):
    id: Key
    question: NotBlank
    options: Choices
    answer: NotBlank
    question_type: Literal["multiple-choice", "open"]

    @model_validator(mode="after")
    def _among_options(self) -> Self:
        if self.question_type == "multiple-choice" and self.answer not in letters(len(self.options)):
            raise ValueError(f"column 'answer' holds {self.answer!r}, no letter of its {len(self.options)} options")
        return self


class Metadata(Row):
    task: NotBlank
    skills: list[str]


class MathVista(Row):
    pid: Key
    question: NotBlank
    image: NotBlank
    choices: list[str] | None
    precision: float | None
    answer: NotBlank
    question_type: Literal["multi_choice", "free_form"]
    answer_type: Literal["text", "integer", "float", "list"]
    query: NotBlank
    metadata: Metadata

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.question_type == "multi_choice" and not self.choices:
            raise PydanticCustomError("lacks", "choices")
        if self.question_type == "multi_choice" and self.answer not in self.choices:
            raise ValueError(f"column 'answer' holds {self.answer!r}, none of its choices")
        if self.answer_type == "float" and self.precision is None:
            raise PydanticCustomError("lacks", "precision")
        if self.answer_type == "float" and not self.precision.is_integer():
            raise ValueError(f"column 'precision' holds {self.precision}, and the answer is rounded to so many places")
        return self


class Own(Row):
    """Questions of one's own. `answer` is the letter of an option, yes or no, or a short text."""

    question: NotBlank
    answer: Key
    id: Key
    image_id: Key
    category: Key = "all"
    hint: Hint = ""
    choices: Annotated[Choices, Field(max_length=26)] = []
    answers: Annotated[list[str], BeforeValidator(lambda value: [] if value is None else listed(value))] = []

    @model_validator(mode="after")
    def _answerable(self) -> Self:
        if self.choices and self.answer not in letters(len(self.choices)):
            raise ValueError(f"column 'answer' holds {self.answer!r}, no letter of its {len(self.choices)} choices")
        if not self.choices and self.answer.strip().lower() in ("yes", "no"):
            self.answer = self.answer.strip().lower()
        return self


def checked(raw: pd.DataFrame, row: type[Row], name: str) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """The rows as `row` has them, with `file` and `row`, their places; and those that lack something, {why: places}.

    Args:
        raw: objects as they stand in the files, None for nulls, with `file` and `row`. The table keeps its index.
        name: of the benchmark.

    Raises:
        ValueError: a row of another form; the first is named, and how many there are. Or no row is left.
    """
    good, index, bad, left_out = [], [], [], {}
    for i, record in zip(raw.index, raw.to_dict("records"), strict=True):
        try:
            good.append(row.model_validate(record).model_dump() | {"file": record["file"], "row": record["row"]})
            index.append(i)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            if odd := [problem for problem in problems if not _lacks(problem)]:
                bad.append(f"{_place(record)}: {_said(odd[0])}")
            else:
                left_out.setdefault(_lacks(problems[0]), []).append(_place(record))
    if bad:
        more = f" ({len(bad)} rows of {len(raw)} are like that)" if len(bad) > 1 else ""
        raise ValueError(f"{name}: {bad[0]}{more}")
    if not good:
        raise ValueError(f"{name}: no question can be asked: {counted(left_out)}")
    return pd.DataFrame(good, index=index), left_out


def counted(left_out: dict[str, list[str]]) -> str:
    """What was left out, in words: for each reason how many and the first of them."""
    some = {why: ", ".join(of[:5]) + " .." * (len(of) > 5) for why, of in left_out.items()}
    return "; ".join(f"{len(of)} with {why} ({some[why]})" for why, of in left_out.items())


def _lacks(problem: Mapping[str, Any]) -> str:
    """What a row lacks by an error of its check; empty if it is of another form."""
    if problem["type"] == "lacks":
        return f"no {problem['msg']}"
    value, column = problem["input"], list(problem["loc"])
    empty = value is None or value == [] or value != value or isinstance(value, str) and not value.strip()
    if not column or not empty:
        return ""
    inside = [part for part in column if isinstance(part, str)]
    return f"a null among its {'.'.join(inside)}" if len(inside) < len(column) else f"no {'.'.join(inside)}"


def _place(record: dict) -> str:
    ids = [record[key] for key in ("id", "question_id", "index", "pid") if isinstance(record.get(key), (str, int))]
    return f"row {record['row']} of {record['file']}" + (f" (id {str(ids[0])[:60]!r})" if ids else "")


def _said(error: Mapping[str, Any]) -> str:
    what = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # of several columns together
        return what
    value = repr(error["input"])
    column = "".join(f".{part}" for part in error["loc"]).removeprefix(".")
    return f"column {column!r} holds {value[:60]}{' ..' * (len(value) > 60)}; {what[0].lower()}{what[1:]}"
