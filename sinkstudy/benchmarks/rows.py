"""What a row of each benchmark's files holds. What does not hold it is refused in one line: file, row, column.

A row's fields are columns of the data set, by the names that its files give them; those without a default have to be
there. Nothing is converted but whole numbers of ids to text, lists that are written as text to lists, and the case of
yes and no.
"""

import ast
from typing import Annotated, Any, Literal, Self

import pandas as pd
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError


def _not_blank(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("blank", "Input should not be blank")
    return value


def _listed(value: Any) -> Any:
    """A list that a cell of a table holds as text."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


Text = Annotated[str, AfterValidator(_not_blank)]
Key = Annotated[Text, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
YesNo = Annotated[Literal["yes", "no"], BeforeValidator(lambda v: v.strip().lower() if isinstance(v, str) else v)]
Hint = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]  # null: there is none
Choices = Annotated[list[str], BeforeValidator(lambda value: [] if value is None else _listed(value))]
Answers = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]


def letters(n: int) -> list[str]:
    """The letters of n options, A first."""
    return [chr(ord("A") + i) for i in range(n)]


class Row(BaseModel):
    """Columns that are not named are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Pope(Row):
    question_id: Key
    question: Text
    answer: YesNo
    image_source: Key
    category: Text


class Mme(Row):
    question_id: Text
    question: Text
    answer: YesNo
    category: Text


class MmStar(Row):
    index: Key
    question: Text
    answer: Text
    category: Text
    l2_category: Text


class Types(Row):
    structural: Text


class Gqa(Row):
    id: Key
    imageId: Key
    question: Text
    answer: Text
    types: Types


class ScienceQa(Row):
    question: Text
    choices: Annotated[Choices, Field(min_length=2, max_length=26)]
    answer: Annotated[int, BeforeValidator(lambda v: ord(v) - ord("A") if isinstance(v, str) and len(v) == 1 else v)]
    hint: Hint
    subject: Text

    @model_validator(mode="after")
    def _among_choices(self) -> Self:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"column 'answer': option {self.answer} of {len(self.choices)} choices")
        return self


class TextVqa(Row):
    question_id: Key
    image_id: Key
    question: Text
    answers: Answers


class Mmmu(Row):
    id: Key
    question: Text
    options: Choices
    answer: Text
    question_type: Literal["multiple-choice", "open"]

    @model_validator(mode="after")
    def _among_options(self) -> Self:
        if self.question_type == "multiple-choice" and self.answer not in letters(len(self.options)):
            raise ValueError(f"column 'answer': {self.answer!r} is none of its {len(self.options)} options' letters")
        return self


class Metadata(Row):
    task: Text
    skills: list[str]


class MathVista(Row):
    pid: Key
    question: Text
    image: Text
    choices: list[str] | None
    precision: float | None
    answer: Text
    question_type: Literal["multi_choice", "free_form"]
    answer_type: Literal["text", "integer", "float", "list"]
    query: Text
    metadata: Metadata

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.question_type == "multi_choice" and not self.choices:
            raise ValueError("column 'choices': null or empty, and it is a question of multiple choice")
        if self.answer_type == "float" and (self.precision is None or not self.precision.is_integer()):
            raise ValueError(f"column 'precision': {self.precision}, and the answer is rounded to so many places")
        return self


class Own(Row):
    """Questions of one's own. `answer` is the letter of an option, yes or no, or a short text."""

    question: Text
    answer: Key
    id: Key
    image_id: Key
    category: Key = "all"
    hint: Hint = ""
    choices: Annotated[Choices, Field(max_length=26)] = []
    answers: Annotated[list[str], BeforeValidator(lambda value: [] if value is None else _listed(value))] = []

    @model_validator(mode="after")
    def _answerable(self) -> Self:
        if self.choices and self.answer not in letters(len(self.choices)):
            raise ValueError(f"column 'answer': {self.answer!r} is none of its {len(self.choices)} choices' letters")
        if not self.choices and self.answer.strip().lower() in ("yes", "no"):
            self.answer = self.answer.strip().lower()
        return self


def checked(raw: pd.DataFrame, row: type[Row], name: str) -> pd.DataFrame:
    """The rows as `row` has them, with `file` and `row`, each row's place.

    Args:
        raw: objects as they stand in the files, None for nulls, with `file` and `row`.
        name: of the benchmark.

    Raises:
        ValueError: a row is not so; the first is named, and how many there are.
    """
    good, bad = [], []
    for record in raw.to_dict("records"):
        try:
            good.append(row.model_validate(record).model_dump() | {"file": record["file"], "row": record["row"]})
        except ValidationError as error:
            bad.append((record, error.errors(include_url=False)[0]))
    if bad:
        more = f" ({len(bad)} rows of {len(raw)} are like that)" if len(bad) > 1 else ""
        raise ValueError(f"{name}: {_said(*bad[0])}{more}")
    return pd.DataFrame(good, index=raw.index)


def _said(record: dict, error: dict) -> str:
    ids = [record[key] for key in ("id", "question_id", "index", "pid") if isinstance(record.get(key), (str, int))]
    place = f"{record['file']}, row {record['row']}" + (f" (id {str(ids[0])[:60]!r})" if ids else "") + ", "
    what = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # of several columns together
        return place + what
    value = repr(error["input"])
    column = "".join(f".{part}" for part in error["loc"]).removeprefix(".")
    return f"{place}column {column!r}: {what[0].lower()}{what[1:]}, not {value[:60]}{'…' * (len(value) > 60)}"
