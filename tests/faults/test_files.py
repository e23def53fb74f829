"""Benchmark files with holes: what a question lacks leaves it out by name, another form is refused by name."""

import copy
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data import FILES, write

from sinkstudy import study
from sinkstudy.benchmarks import FAMILIES, SPECS, load, prompts
from sinkstudy.benchmarks.data import _HOLDS
from sinkstudy.benchmarks.prompts import TEMPLATES

NULLS = [(name, column) for name, spec in SPECS.items() for column in spec.columns]
MAY_BE_NULL = {(name, column) for name, column in NULLS if None in _HOLDS.get(column, ())}


def doubled(name: str) -> dict[str, list[dict]]:
    """The data set's files with enough rows that some may be left out; MME's pairs stay pairs."""
    return copy.deepcopy(FILES[name])


def texts(table: pd.DataFrame, name: str) -> list[str]:
    return [text for family in TEMPLATES[name] for text in prompts(table, name, family)]


def spoilt(name: str, column: str, value) -> dict[str, list[dict]]:
    """The last row of the first file, or for MME both questions about its picture, with another value."""
    files = doubled(name)
    rows = next(rows for rows in files.values() if column in rows[-1])
    for row in rows if name == "MME" else rows[-1:]:
        row[column] = value
    return files


@pytest.mark.parametrize("name, column", NULLS)
def test_a_null_is_never_text(tmp_path, capsys, name, column):
    folder = write(tmp_path, spoilt(name, column, None))
    whole = sum(len(rows) for rows in FILES[name].values() if "question" in rows[-1])
    if (name, column) in MAY_BE_NULL:
        table = load(name, path=folder)
        assert len(table) == whole and not table.attrs["left_out"]
    else:
        try:
            table = load(name, path=folder)
        except ValueError as problem:  # none is left, say
            assert "\n" not in str(problem) and name in str(problem)
            return
        (reason, rows), = table.attrs["left_out"].items()
        assert reason == f"no {column}" and whole - len(table) == len(rows)
        assert f"{len(rows)} with no {column} (row " in capsys.readouterr().err
    for text in [*texts(table, name), *table.id, *table.image_id, *table.answer]:
        assert "nan" not in text.lower().split() and "None" not in text


@pytest.mark.parametrize("name, column, value", [
    ("TextVQA", "answers", []), ("TextVQA", "answers", [None]), ("POPE", "question", ""), ("MMStar", "question", ""),
    ("GQA", "types", {"structural": None, "semantic": None, "detailed": None}),
    ("MathVista", "metadata", {"task": None, "skills": None}), ("MMStar", "answer", ""), ("GQA", "id", ""),
])
def test_what_is_empty_leaves_its_question_out(tmp_path, name, column, value):
    files = spoilt(name, column, value)
    try:
        table = load(name, path=write(tmp_path, files))
    except ValueError as problem:
        assert "no question can be asked: " in str(problem)
        return
    assert len(table.attrs["left_out"]) == 1


@pytest.mark.parametrize("name, column, value", [
    ("POPE", "question", 3), ("POPE", "answer", True), ("MMStar", "answer", 2), ("MME", "question", ["a"]),
    ("GQA", "types", "verify"), ("TextVQA", "answers", "stop"), ("ScienceQA-IMG", "answer", "B"),
    ("ScienceQA-IMG", "choices", "a, b"), ("MathVista", "query", 1.5), ("MMMU", "options", 4), ("MMStar", "index", 1.5),
])
def test_another_form_is_refused_with_row_and_column(tmp_path, name, column, value):
    files = doubled(name)
    for rows in files.values():
        for row in rows:
            if column in row:
                row[column] = value
    with pytest.raises(ValueError, match=rf"{name}: row 0 of .*: column '{column}' holds") as problem:
        load(name, path=write(tmp_path, files))
    assert "\n" not in str(problem.value)


def test_class_labels_are_read_as_their_names(tmp_path):
    """As the library datasets stores them: numbers, with the names in the file's own notes."""
    rows = copy.deepcopy(FILES["MMStar"]["mmstar.parquet"])
    for row in rows:
        row["answer"], row["category"] = "ABCD".index(row["answer"]), 1
    names = {"answer": list("ABCD"), "category": ["science", "math"]}
    features = {column: {"names": of, "_type": "ClassLabel"} for column, of in names.items()}
    table = pa.Table.from_pylist(rows)
    notes = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(notes), tmp_path / "mmstar.parquet")
    found = load("MMStar", path=tmp_path)
    assert found.answer.tolist() == list("ABCD") and set(found.category) == {"math"}


@pytest.mark.parametrize("family", ["llava", *sorted(set(FAMILIES.values()))])
def test_no_hint_is_no_context(tmp_path, family):
    files = doubled("ScienceQA-IMG")
    for row, hint in zip(next(iter(files.values())), (None, "A map."), strict=True):
        row["hint"] = hint
    asked = prompts(load("ScienceQA-IMG", path=write(tmp_path, files)), "ScienceQA-IMG", family)
    assert "nan" not in asked[0] and "Context" not in asked[0] and "Hint" not in asked[0] and "A map." in asked[1]


def test_a_question_about_two_pictures_is_not_asked_with_one(tmp_path, capsys):
    write(tmp_path / "MMMU", FILES["MMMU"])
    table, shown = study.benchmark("MMMU", str(tmp_path), False, 0)
    assert table.id.tolist() == ["validation_Math_2"] and list(shown) == ["validation_Math_2"]
    assert "1 of 2 questions show several pictures and are left out" in capsys.readouterr().err
    assert not any("<image 2>" in text for text in texts(table, "MMMU"))


def test_notes_of_other_libraries_do_no_harm(tmp_path):
    rows = FILES["MMStar"]["mmstar.parquet"]
    for notes in ({}, {b"huggingface": b"{"}, {b"huggingface": b"[]"}, {b"huggingface": b'{"info": {"features": 3}}'}):
        pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(notes), tmp_path / "mmstar.parquet")
        assert len(load("MMStar", path=tmp_path)) == len(rows) and np.isfinite(len(notes))
