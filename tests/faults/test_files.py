"""Benchmark files as they really are: what lacks something is left out by name, another form is refused by name; POPE's
JSON lines, MME's folders, tables, questions of one's own; and files for other harnesses."""

import base64
import copy
import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sinkstudy import benchmarks, progress
from sinkstudy.answers import study
from sinkstudy.benchmarks import load, prompts, right
from sinkstudy.benchmarks.data import several_pictures
from sinkstudy.benchmarks.prompts import TEMPLATES
from sinkstudy.book import engine
from sinkstudy.effects import methods
from tests.benchmarks.test_data import FILES, image, shade, write

NAMES = list(FILES)
TABLE = {name: next(file for file in files if "images" not in file) for name, files in FILES.items()}
OWN = {"id": "1", "question": "Is it?", "answer": "yes", "image": "1.png"}


def with_row(name: str, **changes) -> dict[str, list[dict]]:
    """The files of a benchmark with its second row, or its only one, changed."""
    rows = [dict(row) for row in FILES[name][TABLE[name]]]
    rows[min(1, len(rows) - 1)] |= changes
    return FILES[name] | {TABLE[name]: rows}


def refused(*words: str, name: str, path: Path) -> None:
    """One line, a ValueError, that has all the words."""
    with pytest.raises(ValueError) as raised:
        load(name, path=path)
    said = str(raised.value)
    assert said.startswith(f"{name}: ") and "\n" not in said and len(said) < 600, said
    assert [word for word in words if word not in said] == [], said


def picture(file: Path, value: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 2), (value, 0, 0)).save(file)
    return file


def coded(value: int, size: tuple[int, int] = (4, 2)) -> str:
    return base64.b64encode(image(value, size)["bytes"]).decode()


def lines(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tabbed(file: Path, rows: list[dict], **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, dtype=object).to_csv(file, sep="\t" if file.suffix == ".tsv" else ",", index=False, **options)
    return file


# ------------------------------------------------------------------------------- a null is no text and no number
MAY_BE_NULL = {("ScienceQA-IMG", "hint"), ("MMMU", "options"), ("MathVista", "choices"), ("MathVista", "precision")}
NULLS = [(name, column) for name, spec in benchmarks.SOURCES.items() for column in spec.columns if column != "image_id"]
NULLS += [("TextVQA", "image_id")]


def spoilt(name: str, column: str, value) -> dict[str, list[dict]]:
    """The last row of the questions, or for MME both questions about a picture, with another value."""
    files = copy.deepcopy(FILES[name])
    for row in files[TABLE[name]][-2 if name == "MME" else -1 :]:
        row[column] = value
    return files


def texts(table: pd.DataFrame, name: str) -> list[str]:
    table = table[~several_pictures(table)]
    if table.empty:
        return []
    return [text for family in TEMPLATES["GQA" if name == "own" else name] for text in prompts(table, name, family)]


def lacking(why: str, name: str, folder: Path, capsys) -> pd.DataFrame | None:
    """What is left of a benchmark: what lacks something is left out, by its place, and counted on stderr."""
    whole = sum(len(rows) for file, rows in FILES[name].items() if "images" not in file)
    try:
        table = load(name, path=folder)
    except ValueError as problem:  # none is left
        assert "\n" not in str(problem)
        assert re.match(f"{name}: no question can be asked: \\d with {re.escape(why)} \\(row ", str(problem)), problem
        return None
    [(reason, rows)] = table.attrs["left_out"].items()
    assert reason == why and len(rows) == whole - len(table) > 0
    assert all(str(folder) in row for row in rows)
    assert f"{name}: left out: {len(rows)} with {why} (row " in capsys.readouterr().err
    return table


@pytest.mark.parametrize("name, column", NULLS)
def test_a_null_is_never_text(tmp_path, capsys, name, column):
    folder = write(tmp_path, spoilt(name, column, None))
    if (name, column) in MAY_BE_NULL:
        table = load(name, path=folder)
        assert not table.attrs["left_out"]
    else:
        table = lacking(f"no {column}", name, folder, capsys)
    if table is not None:
        for text in [*texts(table, name), *table.id, *table.image_id, *table.answer]:
            assert "nan" not in text.lower().split() and "None" not in text


@pytest.mark.parametrize("name, changes, why", [
    ("GQA", {"types": {"structural": None, "semantic": "rel", "detailed": "x"}}, "no types.structural"),
    ("MathVista", {"metadata": {"task": None, "skills": []}}, "no metadata.task"),
    ("MathVista", {"metadata": {"task": "x", "skills": None}}, "no metadata.skills"),
    ("MathVista", {"question_type": "multi_choice", "choices": None}, "no choices"),
    ("MathVista", {"question_type": "multi_choice", "choices": []}, "no choices"),
    ("MathVista", {"answer_type": "float", "precision": None}, "no precision"),
    ("TextVQA", {"answers": []}, "no answers"),
    ("TextVQA", {"answers": [None, "stop", "go", "go"]}, "a null among its answers"),
    ("ScienceQA-IMG", {"choices": []}, "no choices"),
    ("ScienceQA-IMG", {"choices": None}, "no choices"),
    ("ScienceQA-IMG", {"choices": ["a", None]}, "a null among its choices"),
    ("POPE", {"answer": ""}, "no answer"),
    ("POPE", {"question": "  "}, "no question"),
    ("MMStar", {"question": ""}, "no question"),
    ("MMStar", {"answer": "\n"}, "no answer"),
    ("GQA", {"id": ""}, "no id"),
    ("own", {"answer": " "}, "no answer"),
])
def test_what_is_empty_leaves_its_question_out(tmp_path, capsys, name, changes, why):
    lacking(why, name, write(tmp_path, with_row(name, **changes)), capsys)


@pytest.mark.parametrize("name, changes, words", [
    ("MathVista", {"answer_type": "float", "precision": 1.5}, ["'precision'", "1.5"]),
    ("MathVista", {"answer_type": "words"}, ["'answer_type'", "'words'"]),
    ("MathVista", {"question_type": "multi_choice", "choices": ["3", "4"], "answer": "5"}, ["'answer'", "'5'"]),
    ("ScienceQA-IMG", {"answer": 2}, ["'answer'", "holds 2", "2 choices"]),
    ("ScienceQA-IMG", {"answer": -1}, ["'answer'", "holds -1"]),
    ("MMMU", {"options": "[]", "question_type": "multiple-choice", "answer": "A"}, ["'answer'", "'A'", "0 options"]),
    ("MMMU", {"options": "['a', 'b'", "answer": "A"}, ["'options'", "['a', 'b'"]),
    ("MMMU", {"question_type": "essay"}, ["'question_type'", "'essay'"]),
    ("TextVQA", {"answers": ["stop"]}, ["'answers'", "holds 1"]),
    ("POPE", {"answer": "perhaps"}, ["'answer'", "'perhaps'"]),
    ("MME", {"answer": "maybe"}, ["'answer'", "'maybe'"]),
])
def test_a_value_that_its_column_cannot_have(tmp_path, name, changes, words):
    refused(*words, "row ", str(tmp_path), name=name, path=write(tmp_path, with_row(name, **changes)))


@pytest.mark.parametrize("name, column, value", [
    ("POPE", "question", 3), ("POPE", "answer", True), ("MMStar", "answer", 2), ("MME", "question", ["a"]),
    ("GQA", "types", "verify"), ("TextVQA", "answers", "stop"), ("ScienceQA-IMG", "answer", "B"),
    ("ScienceQA-IMG", "choices", "a, b"), ("MathVista", "query", 1.5), ("MMMU", "options", 4), ("MMStar", "index", 1.5),
])
def test_another_form_is_refused_with_row_and_column(tmp_path, name, column, value):
    files = copy.deepcopy(FILES[name])
    for rows in files.values():
        for row in rows:
            if column in row:
                row[column] = value
    with pytest.raises(ValueError, match=rf"{name}: row 0 of .*: column '{column}' holds") as problem:
        load(name, path=write(tmp_path, files))
    assert "\n" not in str(problem.value)


def test_a_null_query_is_not_asked_as_nan(tmp_path):
    rows = [dict(row, query=None) for row in FILES["MathVista"][TABLE["MathVista"]]]
    refused("2 with no query", name="MathVista", path=write(tmp_path, {"data/testmini-0.parquet": rows}))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "internvl"])
def test_a_null_hint_is_no_hint(tmp_path, family):
    rows = [dict(row, hint=hint) for row, hint in zip(FILES["ScienceQA-IMG"][TABLE["ScienceQA-IMG"]], (None, "Look."))]
    asked = prompts(load("ScienceQA-IMG", path=write(tmp_path, {"a.parquet": rows})), "ScienceQA-IMG", family)
    assert not any(word in asked[0] for word in ("nan", "None", "Context", "Hint")) and "Look." in asked[1]


def test_a_null_among_numbers_makes_none_of_them_a_fraction(tmp_path):
    """pandas would read 0, 1, null as 0.0, 1.0, nan."""
    rows = [dict(row, index=i if i < 3 else None) for i, row in enumerate(FILES["MMStar"]["mmstar.parquet"])]
    assert load("MMStar", path=write(tmp_path, {"mmstar.parquet": rows})).id.tolist() == ["0", "1", "2"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("GQA", "MME")])
@pytest.mark.parametrize("null", [None, {"bytes": None, "path": "gone.jpg"}])
def test_a_null_picture_is_left_out_by_name(tmp_path, capsys, name, null):
    column = {"MMMU": "image_1", "MathVista": "decoded_image"}.get(name, "image")
    changed = with_row(name, **{column: null})
    table = load(name, path=write(tmp_path, changed))
    everything = sum(len(rows) for rows in FILES[name].values())
    lost = [name for names in table.attrs["left_out"].values() for name in names]
    assert len(table) == everything - 1 and len(lost) == 1 and lost[0] not in set(table.id)
    assert all(shown.open().size == (4, 2) for shown in table.image)
    assert f"{name}: left out: 1 with no picture ({lost[0]})" in capsys.readouterr().err


def test_all_pictures_null(tmp_path):
    rows = [dict(row, image=None) for row in FILES["MMStar"]["mmstar.parquet"]]
    folder = write(tmp_path, {"mmstar.parquet": rows})
    refused("no question can be asked: 4 with no picture (0, 1, 2, 3)", name="MMStar", path=folder)


def test_a_column_of_pictures_that_holds_numbers(tmp_path):
    rows = [dict(row, image=i) for i, row in enumerate(FILES["MMStar"]["mmstar.parquet"])]
    refused("'image'", "int64", name="MMStar", path=write(tmp_path, {"mmstar.parquet": rows}))


# ------------------------------------------------------------------------------------------- data sets in parts
PARTS = {  # what lies there, and what is said
    "the second is missing": (["00000-of-00002"], "00000-of-00002"),
    "the first is missing": (["00001-of-00002"], "00001-of-00002"),
    "cut anew": (["00000-of-00001", "00000-of-00002", "00001-of-00002"], "00000-of-00001, 00000-of-00002"),
    "one twice": (["00000-of-00002", "00001-of-00002", "00001-of-00002-0f3a"], "00001-of-00002, 00001-of-00002"),
}


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("folder", ["ScienceQA-IMG", "."])
def test_a_data_set_of_which_a_part_is_missing(tmp_path, case, folder):
    """As an interrupted copy leaves it. Its questions have no ids by which they could be missed."""
    there, said = PARTS[case]
    (rows,) = FILES["ScienceQA-IMG"].values()
    write(tmp_path, {f"{folder}/test-{part}.parquet": rows for part in there})
    refused("each of its parts once", said, name="ScienceQA-IMG", path=tmp_path)


def test_pictures_of_which_a_part_is_missing(tmp_path):
    files = {file.replace("images/testdev-00000-of-00001", "images/testdev-00000-of-00002"): rows
             for file, rows in FILES["GQA"].items()}
    refused("each of its parts once", name="GQA", path=write(tmp_path, files))


def test_all_parts_and_one_by_its_name(tmp_path):
    (rows,) = FILES["MMStar"].values()
    write(tmp_path, {f"mmstar-{i:05}-of-00002-0f{i}.parquet": [rows[2 * i], rows[2 * i + 1]] for i in range(2)})
    assert load("MMStar", path=tmp_path).id.tolist() == ["0", "1", "2", "3"]
    assert load("MMStar", path=tmp_path / "mmstar-00001-of-00002-0f1.parquet").id.tolist() == ["2", "3"]


def test_a_download_that_was_interrupted(tmp_path, monkeypatch):
    """Without network the hub's cache gives what there is of a snapshot."""
    folder = write(tmp_path, {file: rows for file, rows in FILES["POPE"].items() if "popular" not in file})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(ValueError, match=r"^POPE: .* has no Full/popular-\*\.parquet: let it be downloaded again"):
        load("POPE")


# ------------------------------------------------------------------------------------------- lists as text
AS_TEXT = {
    "Python's": "['a \"b\"', 'c, d']", "JSON": '["a \\"b\\"", "c, d"]', "on two lines": "['a \"b\"',\n 'c, d']",
    "blanks around": " ['a \"b\"', 'c, d'] ",
}


@pytest.mark.parametrize("text", AS_TEXT.values(), ids=AS_TEXT)
def test_a_list_as_text(tmp_path, text):
    table = load("own", path=listed(tmp_path, choices=text, answer="B"))
    assert table.choices.tolist() == [['a "b"', "c, d"]]


def listed(folder: Path, **columns) -> Path:
    picture(folder / "1.png")
    tabbed(folder / "questions.csv", [OWN | columns])
    return folder


@pytest.mark.parametrize("text, found", [('["caf\\u00e9 \\ud83d\\ude00", "b"]', "café 😀"), ('["1\\/2", "b"]', "1/2")])
def test_signs_that_json_writes_otherwise(tmp_path, text, found):
    assert load("own", path=listed(tmp_path, choices=text, answer="A")).choices[0][0] == found


@pytest.mark.parametrize("name, column", [("own", "choices"), ("own", "answers"), ("MMMU", "options")])
@pytest.mark.parametrize("text", ["['a cat' 'a dog']", "['a cat'\n 'a dog']", '["a cat" \'a dog\', "c"]', "['a']['b']"])
def test_a_list_without_commas_is_none(tmp_path, name, column, text):
    """NumPy prints arrays so, and so does pandas into a CSV; Python would join the texts to one."""
    if name == "own":
        folder = listed(tmp_path, **{column: text}, answer="A")
    else:
        folder = write(tmp_path, with_row(name, **{column: text, "question_type": "multiple-choice", "answer": "A"}))
    refused(f"'{column}'", "row ", name=name, path=folder)


def test_peoples_answers_without_commas(tmp_path):
    row = {"index": 1, "question": "What?", "answer": "['stop' 'stop' 'go']", "category": "x", "image": coded(1)}
    refused("'answers'", "row 0", name="TextVQA", path=tabbed(tmp_path / "TextVQA.tsv", [row]))


# ------------------------------------------------------------------------------------------- labels as numbers
def labelled(folder: Path, name: str, column: str, values: list[int | None], feature: object) -> Path:
    """A benchmark's file with a column of labels as numbers, and what the library datasets writes of them."""
    rows = [dict(row) for row in FILES[name][TABLE[name]]]
    table = pa.Table.from_pylist(rows)
    place = table.column_names.index(column)
    table = table.set_column(place, column, pa.array(values, pa.int64()))
    features = {"info": {"features": {column: feature}}} if feature else {}
    file = folder / "a.parquet"
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), file)
    return file


CLASS = {"names": ["no", "yes"], "_type": "ClassLabel"}


def test_integer_labels_have_names(tmp_path):
    assert load("POPE", path=labelled(tmp_path, "POPE", "answer", [1, 0, 1, 0], CLASS)).answer.tolist() == [
        "yes", "no", "yes", "no"]
    feature = {"names": ["red", "math"], "_type": "ClassLabel"}
    assert set(load("MMStar", path=labelled(tmp_path, "MMStar", "category", [1] * 4, feature)).category) == {"math"}


@pytest.mark.parametrize("values, feature, words", [
    ([1, 0, 1, 0], None, ["'answer'", "row 0", "holds 1"]),  # numbers without names are no answers
    ([1, 0, 2, 0], CLASS, ["'answer'", "label 2"]),
    ([1, 0, 1, 0], {"_type": "Value", "dtype": "int64"}, ["'answer'", "holds 1"]),
])
def test_labels_without_names(tmp_path, values, feature, words):
    refused(*words, name="POPE", path=labelled(tmp_path, "POPE", "answer", values, feature))


@pytest.mark.parametrize("value", [None, -1])  # -1: not labelled
def test_without_a_label_there_is_no_answer(tmp_path, value):
    table = load("POPE", path=labelled(tmp_path, "POPE", "answer", [1, 0, value, 0], CLASS))
    assert len(table) == 3 and list(table.attrs["left_out"]) == ["no answer"]


def test_notes_of_other_libraries_do_no_harm(tmp_path):
    rows = FILES["MMStar"]["mmstar.parquet"]
    for notes in ({}, {b"huggingface": b"{"}, {b"huggingface": b"[]"}, {b"huggingface": b'{"info": {"features": 3}}'}):
        pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(notes), tmp_path / "mmstar.parquet")
        assert len(load("MMStar", path=tmp_path)) == len(rows)


def test_labels_within_structs_and_lists(tmp_path):
    of = FILES["GQA"]
    table = pa.Table.from_pylist([dict(row, types={"structural": 1}) for row in of[TABLE["GQA"]]])
    kinds = {"structural": {"names": ["query", "verify"], "_type": "ClassLabel"}}
    write(tmp_path, of)
    meta = {"huggingface": json.dumps({"info": {"features": {"types": kinds}}})}
    pq.write_table(table.replace_schema_metadata(meta), tmp_path / TABLE["GQA"])
    assert set(load("GQA", path=tmp_path).category) == {"verify"}


# ------------------------------------------------------------------------------------- questions of two pictures
def asked_of(folder: Path, name: str, capsys) -> tuple[list[str], str]:
    """The ids that a chapter would ask, and what it says on stderr."""
    table, shown = study.benchmark(name, str(folder), False, 0)
    assert list(shown) == table.image_id.tolist()
    assert not any("<image 2>" in text for text in texts(table, name))
    return table.id.tolist(), capsys.readouterr().err


def test_a_question_about_two_pictures_is_not_asked_with_the_first(tmp_path, capsys):
    write(tmp_path / "MMMU", FILES["MMMU"])
    ids, said = asked_of(tmp_path, "MMMU", capsys)
    assert ids == ["validation_Math_2"]
    assert "MMMU: left out, since a prompt here has one: 1 with several pictures (validation_Art_Theory_1)" in said
    with pytest.raises(ValueError, match="validation_Art_Theory_1"):
        prompts(load("MMMU", path=tmp_path / "MMMU"), "MMMU")


@pytest.mark.parametrize("changes", [
    {"question": "How long is it?", "image_2": image(2)},  # not named, and there
    {"question": "How long is <image 2>?", "image_1": None, "image_2": image(2)},
    {"question": "How long is <image 3>?", "image_3": image(2)},
    {"question": "Which is <image 1>?", "options": "['<image 2>', '<image 3>']", "answer": "A",
     "question_type": "multiple-choice", "image_2": image(2), "image_3": image(3)},
])
def test_other_questions_about_other_pictures(tmp_path, capsys, changes):
    more = dict(FILES["MMMU"][TABLE["MMMU"]][1], id="validation_Math_9")
    files = with_row("MMMU", **changes)
    files[TABLE["MMMU"]] += [more]
    ids, said = asked_of(write(tmp_path / "MMMU", files).parent, "MMMU", capsys)
    assert ids == ["validation_Math_9"] and "validation_Math_2" in said


# ---------------------------------------------------------------------------------------- POPE as it is published
def pope_row(i: int, label: str = "yes", **changes) -> dict:
    return {"question_id": i, "image": f"COCO_val2014_{i // 2:012}.jpg", "image_id": i // 2,
            "text": f"Is there a dog {i} in the image?", "label": label} | changes


def pope_folder(root: Path, jsons: str = "coco", pictures: str = "val2014", n: int = 4) -> Path:
    for category in ("random", "popular", "adversarial"):
        lines(root / jsons / f"coco_pope_{category}.json", [pope_row(i, ("yes", "no")[i % 2]) for i in range(n)])
    for i in range((n + 1) // 2):
        picture(root / pictures / f"COCO_val2014_{i:012}.jpg", 40 * i)
    return root


@pytest.mark.parametrize("jsons, pictures", [
    ("coco", "val2014"), (".", "."), ("output/coco", "val2014"), (".", "images"), ("coco", "coco/val2014"),
])
def test_pope_as_its_authors_publish_it(tmp_path, jsons, pictures):
    table = load("POPE", path=pope_folder(tmp_path, jsons, pictures))
    assert table.category.value_counts().to_dict() == {"random": 4, "popular": 4, "adversarial": 4}
    assert table.id.is_unique and set(table.id) >= {"random-0", "adversarial-3"}
    assert table.image_id.unique().tolist() == [f"COCO_val2014_{i:012}" for i in range(2)]
    assert table.answer.tolist() == ["yes", "no"] * 6 and table.question[1] == "Is there a dog 1 in the image?"
    assert [p.open().size for p in table.image] == [(4, 2)] * 12
    assert len(table.attrs["sha256"]) == 3


def test_pope_is_the_same_from_json_lines_and_from_parquet(tmp_path):
    rows = {f"Full/{s}-0.parquet": [
        {"question_id": str(i), "question": f"Is there a dog {i} in the image?", "answer": ("yes", "no")[i % 2],
         "category": s, "image_source": f"COCO_val2014_{i // 2:012}", "image": image(i // 2)} for i in range(4)]
        for s in ("random", "popular", "adversarial")}
    one, other = load("POPE", path=write(tmp_path / "a", rows)), load("POPE", path=pope_folder(tmp_path / "b"))
    columns = ["id", "image_id", "question", "answer", "category"]
    pd.testing.assert_frame_equal(*(t[columns].sort_values("id", ignore_index=True) for t in (one, other)))


def test_pope_of_today_and_of_then(tmp_path, capsys):
    root = pope_folder(tmp_path / "POPE")
    rows = [pope_row(i, image=f"COCO_val2014_{i % 2:012}.jpg") for i in range(2910)]
    lines(root / "coco/coco_pope_random.json", rows)
    table, shown = study.benchmark("POPE", str(tmp_path), False, 0)
    assert (table.category == "random").sum() == 2910 and len(shown) == 2
    assert "2910" in capsys.readouterr().err


def test_pope_one_file_and_one_split(tmp_path):
    root = pope_folder(tmp_path)
    assert set(load("POPE", path=root, split="popular").category) == {"popular"}
    lines(tmp_path / "one/my_pope_random.jsonl", [pope_row(0)])
    picture(tmp_path / "one/COCO_val2014_000000000000.jpg")
    assert load("POPE", path=tmp_path / "one/my_pope_random.jsonl").id.tolist() == ["random-0"]


def test_llavas_questions_beside_are_none_of_popes_files(tmp_path):
    root = pope_folder(tmp_path)
    lines(root / "llava_pope_test.jsonl", [{"question_id": 0, "image": "x.jpg", "text": "?", "category": "random"}])
    assert len(load("POPE", path=root)) == 12


@pytest.mark.parametrize("changes, words", [
    ({"image": "../secret.jpg"}, ["leads out"]),
    ({"image": "a/../../secret.jpg"}, ["leads out"]),
    ({"image": "/etc/passwd"}, ["leads out"]),
    ({"image": "COCO_val2014_000000000099.jpg"}, ["1 of 3 pictures", "COCO_val2014_000000000099.jpg"]),
    ({"image": 7}, ["'image'", "'7'"]),
    ({"label": "maybe"}, ["'answer'", "'maybe'"]),
    ({"label": True}, ["'answer'", "True"]),
    ({"question_id": 1.5}, ["'question_id'", "1.5"]),
])
def test_odd_lines_of_pope(tmp_path, changes, words):
    root = pope_folder(tmp_path / "POPE")
    picture(tmp_path / "secret.jpg")
    file = lines(root / "coco/coco_pope_popular.json", [pope_row(0), pope_row(1), pope_row(2, **changes), pope_row(3)])
    words = [*words, *([] if "1 of 3" in words[0] else [str(file), "row 2"])]
    refused(*words, name="POPE", path=root)


@pytest.mark.parametrize("column, why", [("label", "answer"), ("text", "question"), ("question_id", "question_id")])
def test_a_line_of_pope_that_lacks_something(tmp_path, column, why):
    root = pope_folder(tmp_path)
    lines(root / "coco/coco_pope_popular.json", [pope_row(0), pope_row(1, **{column: None}), pope_row(2)])
    table = load("POPE", path=root)
    assert (table.category == "popular").sum() == 2
    assert [(why, len(of)) for why, of in table.attrs["left_out"].items()] == [(f"no {why}", 1)]


def test_a_link_out_of_the_folder_of_pictures(tmp_path):
    root = pope_folder(tmp_path / "POPE")
    target = root / "val2014/COCO_val2014_000000000001.jpg"
    target.unlink()
    target.symlink_to(picture(tmp_path / "elsewhere.jpg"))
    refused("link", "leads out", name="POPE", path=root)


def test_the_folder_of_pictures_may_be_a_link(tmp_path):
    root = pope_folder(tmp_path / "POPE")
    (root / "val2014").rename(tmp_path / "coco2014")
    (root / "val2014").symlink_to(tmp_path / "coco2014")
    assert len(load("POPE", path=root)) == 12


def test_no_pictures_two_places_of_pictures_and_a_damaged_one(tmp_path):
    root = pope_folder(tmp_path / "a")
    for file in (root / "val2014").iterdir():
        file.unlink()
    refused("COCO_val2014_000000000000.jpg", "neither", name="POPE", path=root)
    root = pope_folder(tmp_path / "b")
    picture(root / "copy/COCO_val2014_000000000000.jpg")
    refused("copy", "val2014", name="POPE", path=root)
    root = pope_folder(tmp_path / "c")
    file = root / "val2014/COCO_val2014_000000000001.jpg"
    file.write_bytes(file.read_bytes()[:100])
    refused("COCO_val2014_000000000001.jpg", name="POPE", path=root)


def test_two_files_of_a_category_and_two_forms(tmp_path):
    root = pope_folder(tmp_path / "a")
    lines(root / "gqa/gqa_pope_random.json", [pope_row(0)])
    refused("coco_pope_random.json", "gqa_pope_random.json", name="POPE", path=root)
    root = pope_folder(tmp_path / "b")
    write(root, FILES["POPE"])
    refused("parquet", "JSON lines", name="POPE", path=root)


@pytest.mark.parametrize("text, words", [
    ("", ["empty"]), ("\n\n", ["empty"]), ('{"question_id": 1', ["line 1"]), ("[1, 2]", ["row 0"]),
    ('{"a": 1}\nnot json\n', ["line 2"]), ('"text"', ["row 0"]), ("[" * 50_000, ["recursion"]),
    ('{"question_id": 1, "image": "a.jpg", "label": "yes"}', ["'text'", "missing"]),
])
def test_a_file_that_is_none_of_popes(tmp_path, text, words):
    root = pope_folder(tmp_path)
    (root / "coco/coco_pope_random.json").write_text(text)
    refused(*words, "coco_pope_random.json", name="POPE", path=root)


def test_a_file_that_is_no_text(tmp_path):
    root = pope_folder(tmp_path)
    (root / "coco/coco_pope_random.json").write_bytes(b"\xff\xfe\x00{")
    refused("coco_pope_random.json", name="POPE", path=root)


def test_pictures_of_one_name_in_two_folders(tmp_path):
    """Each question shows its own; a name that stands for two is refused."""
    rows = [pope_row(i, image=name) for i, name in enumerate(["a/1.jpg", "b/1.jpg", "./a/1.jpg"])]
    file = lines(tmp_path / "coco_pope_random.json", rows)
    picture(tmp_path / "a/1.jpg", 0), picture(tmp_path / "b/1.jpg", 200)
    assert load("POPE", path=file).image_id.tolist() == ["a/1", "b/1", "a/1"]
    file = lines(tmp_path / "two/coco_pope_random.json", [pope_row(0, image="1.jpg"), pope_row(1, image="1.png")])
    picture(tmp_path / "two/1.jpg", 0), picture(tmp_path / "two/1.png", 200)
    refused("'1' names 2 different pictures", name="POPE", path=file)


def test_a_name_of_a_picture_that_stands_for_two(tmp_path):
    rows = [{"question_id": i, "image_id": "7", "question": "What?", "answers": ["stop"] * 10, "image": f"{i}.png"}
            for i in range(2)]
    picture(tmp_path / "0.png", 0), picture(tmp_path / "1.png", 200)
    refused("'7' names 2 different pictures", name="TextVQA", path=lines(tmp_path / "questions.jsonl", rows))


# ---------------------------------------------------------------------------------------- MME as it is published
def mme_folder(root: Path, split: dict[str, bool], suffix: str = ".jpg") -> Path:
    """Two pictures of each category; in folders of texts and of pictures, or side by side."""
    for category, apart in split.items():
        folder = root / category
        for i in range(2):
            picture(folder / ("images" if apart else "") / f"000{i}{suffix}", 40 * i)
            text = folder / ("questions_answers_YN" if apart else "") / f"000{i}.txt"
            text.parent.mkdir(exist_ok=True)
            text.write_text("Is it a cat? Please answer yes or no.\tYes\nIs it a dog? Please answer yes or no.\tNo\n\n")
    return root


@pytest.mark.parametrize("below", [".", "MME_Benchmark", "MME_Benchmark_release_version/MME_Benchmark"])
def test_mme_as_its_authors_publish_it(tmp_path, below):
    mme_folder(tmp_path / below, {"artwork": True, "OCR": False, "code_reasoning": False})
    table = load("MME", path=tmp_path)
    assert table.group.value_counts().to_dict() == {"perception": 8, "cognition": 4}
    assert "code_reasoning/code_reasoning/0001.jpg#1" in set(table.id) and "artwork/0000.jpg" in set(table.image_id)
    assert table.answer.tolist() == ["yes", "no"] * 6
    assert table.question[0] == "Is it a cat? Please answer yes or no."
    assert all(p.open().size == (4, 2) for p in table.image)
    assert [line for line in benchmarks.remarks(table) if "3 of 14 categories" in line]


@pytest.mark.parametrize("break_it, words", [
    (lambda f: (f / "0001.txt").write_text("Is it a cat?\tYes\n"), ["'OCR/0001.jpg'", "has 1"]),
    (lambda f: (f / "0001.txt").write_text("Is it a cat? Yes\nIs it?\tNo\n"), ["0001.txt", "line 1"]),
    (lambda f: (f / "0001.txt").write_text("Is it a cat?\tperhaps\nIs it?\tNo\n"), ["0001.txt", "'perhaps'"]),
    (lambda f: (f / "0001.txt").write_text("\tYes\nIs it?\tNo\n"), ["'OCR/0001.jpg'", "has 1"]),
    (lambda f: (f / "0001.txt").write_bytes(b"\xff\xfe\tYes\n"), ["0001.txt"]),
    (lambda f: (f / "0001.jpg").unlink(), ["0001.txt", "no pictures"]),
    (lambda f: picture(f / "0001.png"), ["0001.txt", "2 pictures"]),
    (lambda f: picture(f / "0002.jpg"), ["0002.jpg", "no text"]),
    (lambda f: (f / "0001.jpg").write_bytes(b"no picture"), ["0001.jpg"]),
])
def test_odd_folders_of_mme(tmp_path, break_it, words):
    break_it(mme_folder(tmp_path, {"OCR": False, "count": False}) / "OCR")
    with pytest.raises(ValueError) as raised:
        load("MME", path=tmp_path)
    assert "\n" not in str(raised.value) and all(word in str(raised.value) for word in words), raised.value


def test_a_category_twice(tmp_path):
    mme_folder(tmp_path / "a", {"OCR": False})
    mme_folder(tmp_path / "b", {"OCR": False})
    refused("a/OCR", "b/OCR", name="MME", path=tmp_path)


# ---------------------------------------------------------------------------------- tables as VLMEvalKit has them
def star(i: int, **changes) -> dict:
    return {"index": i, "question": f"Which, {i}?", "image": coded(i), "A": "a cat", "B": "a dog", "C": "3", "D": "no",
            "answer": "ABCD"[i], "category": "math", "l2_category": "geometry"} | changes


@pytest.mark.parametrize("options", [{}, {"quoting": csv.QUOTE_ALL}, {"lineterminator": "\r\n"}])
def test_mmstar_with_pictures_as_text(tmp_path, options):
    rows = [star(0), star(1, image="0"), star(2, question='Say "it"\nin two\tlines?'), star(3)]
    table = load("MMStar", path=tabbed(tmp_path / "MMStar.tsv", rows, **options))
    assert [shade(p) for p in table.image] == [0, 0, 2, 3]  # row 1 shows the picture of row 0
    assert table.image_id.tolist() == ["0", "0", "2", "3"] and table.id.tolist() == list("0123")
    assert table.question[0] == "Which, 0?\nOptions: A: a cat, B: a dog, C: 3, D: no"
    assert table.question[2].startswith('Say "it"\nin two\tlines?')


def test_pictures_of_a_table_stay_in_its_file(tmp_path):
    """Only opening one reads it."""
    big = coded(5, (300, 300))
    table = load("MMStar", path=tabbed(tmp_path / "MMStar.tsv", [star(i, image=big) for i in range(4)]))
    assert not any(big in repr(value) for value in vars(table.image[0]).values())
    (tmp_path / "MMStar.tsv").unlink()
    with pytest.raises((ValueError, OSError)):
        table.image[0].open()


def test_popes_table_has_a_question_once(tmp_path):
    rows = [{"index": i, "image": coded(0), "question": f"Is there a dog {i}?", "answer": ("Yes", "No")[i % 2],
             "category": ("random", "adversarial,popular,random")[i % 2]} for i in range(2)]
    table = load("POPE", path=tabbed(tmp_path / "POPE.tsv", rows))
    assert sorted(table.id) == ["adversarial-1", "popular-1", "random-0", "random-1"]
    assert set(table.image_id) == {"0"} and table.answer.tolist() == ["yes", "no", "no", "no"]


def test_mmes_table_pairs_questions_by_their_picture(tmp_path):
    rows = [{"index": i, "image": coded(i // 2), "question": "Is it?", "answer": ("Yes", "No")[i % 2],
             "category": "OCR"} for i in range(4)]
    table = load("MME", path=tabbed(tmp_path / "MME.tsv", rows))
    assert table.image_id.nunique() == 2 and table.id.is_unique


@pytest.mark.parametrize("name, row, answer", [
    ("ScienceQA-IMG", {"index": 1, "question": "Which?", "hint": None, "A": "a", "B": "b", "C": None, "answer": "B",
                       "category": "biology"}, "B"),
    ("TextVQA", {"index": 1, "question": "What?", "answer": "['stop', 'stop', 'go', 'go', 'stop']", "category": "x"},
     "stop"),
    ("own", {"index": 1, "question": "Which?", "hint": "Look.", "A": "nan", "B": "None", "answer": "B",
             "category": "x", "l2-category": "y"}, "B"),
])
def test_other_tables(tmp_path, name, row, answer):
    table = load(name, path=tabbed(tmp_path / f"{name}.tsv", [row | {"image": coded(1)}]))
    assert table.answer.tolist() == [answer] and shade(table.image[0]) == 1
    assert name != "own" or table.choices.tolist() == [["nan", "None"]]  # words, not nulls


@pytest.mark.parametrize("changes, words", [
    ({"image": "99"}, ["'99'"]),
    ({"image": "2"}, ["'2'"]),  # which has no picture itself
    ({"image": coded(0)[:-3] + "="}, ["row 3", "'image'", "base64"]),
    ({"image": "../x.png"}, ["row 3", "leads out"]),
    ({"B": None}, ["row 3", "'B'"]),
])
def test_odd_rows_of_a_table(tmp_path, changes, words):
    rows = [star(0), star(1), star(2, image="0"), star(3, **changes)]
    refused(*words, str(tmp_path), name="MMStar", path=tabbed(tmp_path / "MMStar.tsv", rows))


@pytest.mark.parametrize("column", ["answer", "index", "question", "category"])
def test_a_row_of_a_table_that_lacks_something(tmp_path, column):
    rows = [star(0), star(1), star(2), star(3, **{column: None})]
    table = load("MMStar", path=tabbed(tmp_path / "MMStar.tsv", rows))
    assert len(table) == 3 and list(table.attrs["left_out"]) == [f"no {column}"]


def test_an_empty_picture_and_several(tmp_path):
    rows = [star(0), star(1, image=None), star(2, image=str([coded(1), coded(2)])), star(3)]
    table = load("MMStar", path=tabbed(tmp_path / "MMStar.tsv", rows))
    assert table.id.tolist() == ["0", "3"]
    assert table.attrs["left_out"] == {"several pictures": ["2"], "no picture": ["1"]}


@pytest.mark.parametrize("text, words", [
    ("", []), ("index\tindex\n1\t2\n", ["columns"]), ("index\tquestion\n1\n", ["row 0", "1 columns"]),
    ('index\tquestion\n1\t"open\n', []), ("index\tquestion\timage\n", ["empty"]),
    ("index\tquestion\timage\n1\twhat?\t\n", ["'answer'", "missing"]),
])
def test_a_broken_table(tmp_path, text, words):
    (tmp_path / "MMStar.tsv").write_text(text)
    refused(*words, "MMStar.tsv", name="MMStar", path=tmp_path)


@pytest.mark.parametrize("answer, options", [("D", {"D": None}), ("C", {"C": None, "D": None})])
def test_an_answer_of_which_there_is_no_option(tmp_path, answer, options):
    rows = [star(0), star(1, answer=answer, **options)]
    refused("row 1", "'answer'", f"'{answer}'", name="MMStar", path=tabbed(tmp_path / "MMStar.tsv", rows))


def test_categories_with_blanks_between_them(tmp_path):
    row = {"index": 0, "image": coded(0), "question": "Is it?", "answer": "No", "category": "adversarial, popular"}
    assert load("POPE", path=tabbed(tmp_path / "POPE.tsv", [row])).category.tolist() == ["adversarial", "popular"]


@pytest.mark.parametrize("name, row", [
    ("own", OWN | {"answer": "B", "options": "['cat', 'dog']"}),
    ("own", OWN | {"answer": "B", "Choices": "['cat', 'dog']"}),
    ("own", OWN | {"answer": "B", "a": "cat", "b": "dog"}), ("own", OWN | {" hint": "Look."}),
    ("own", OWN | {"Category": "x"}), ("own", OWN | {"ANSWERS": "['y']"}),
    ("MMStar", {"index": 1, "question": "Which?", "answer": "B", "category": "x", "l2_category": "y", "image": "1.png",
                "options": "['cat', 'dog']"}),
    ("MMStar", {"index": 1, "question": "Which?", "answer": "B", "category": "x", "l2_category": "y", "image": "1.png",
                "a": "cat", "b": "dog"}),
])
def test_a_column_that_is_called_otherwise_is_not_passed_over(tmp_path, name, row):
    """Its question would be asked without options, say, and every answer to it be wrong."""
    picture(tmp_path / "1.png")
    odd = next(c for c in row if c not in OWN and c not in ("index", "category", "l2_category"))
    refused(f"column '{odd}' is not read: call it", name=name, path=tabbed(tmp_path / f"{name}.csv", [row]))


def test_columns_of_other_names_are_left_alone(tmp_path):
    picture(tmp_path / "1.png")
    row = OWN | {"source": "x", "i": 3, "l2-category": "y", "answer": "B", "choices": "['a', 'b']", "options": "2"}
    assert load("own", path=tabbed(tmp_path / "own.csv", [row])).choices.tolist() == [["a", "b"]]


# ------------------------------------------------------------------------------------------ questions of one's own
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_questions_of_ones_own(tmp_path, suffix):
    rows = [OWN, OWN | {"id": "2", "question": "What?", "answer": "a red dog"},
            OWN | {"id": "3", "question": "Which?", "answer": "B", "choices": ["cat", "dog"], "image": "b/2.png"}]
    picture(tmp_path / "shown/1.png", 1), picture(tmp_path / "shown/b/2.png", 2)
    file = tmp_path / f"questions{suffix}"
    if suffix == ".jsonl":
        lines(file, rows)
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        tabbed(file, [row | {"choices": str(row["choices"]) if "choices" in row else ""} for row in rows])
    table = load("own", path=tmp_path)
    assert table.id.tolist() == ["1", "2", "3"] and table.answer.tolist() == ["yes", "a red dog", "B"]
    assert table.image_id.tolist() == ["1.png", "1.png", "b/2.png"] and [shade(p) for p in table.image] == [1, 1, 2]
    assert table.choices.tolist() == [[], [], ["cat", "dog"]]
    said = table.assign(prediction=["Yes.", "Red dog", "B. dog"])
    assert right(said, "own").tolist() == [1, 1, 1]
    assert right(said.assign(prediction=["maybe", "dog", "dog"]), "own").tolist() == [0, 0, 0]
    assert len(prompts(table, "own", "qwen2_vl")) == 3


def test_a_picture_may_bear_the_name_of_a_row(tmp_path):
    lines(tmp_path / "questions.jsonl", [OWN | {"id": "1.png"}])
    picture(tmp_path / "1.png", 9)
    assert shade(load("own", path=tmp_path).image[0]) == 9


def test_without_ids_rows_are_numbered(tmp_path):
    lines(tmp_path / "q.jsonl", [{k: v for k, v in OWN.items() if k != "id"}] * 2)
    picture(tmp_path / "1.png")
    assert load("own", path=tmp_path).id.tolist() == ["0", "1"]


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_signs_that_end_lines_in_unicode_alone(tmp_path, mark):
    """A line of JSON, or of MME's texts, ends with a line break and with nothing else."""
    picture(tmp_path / "1.png")
    text = json.dumps(OWN | {"question": f"Is it{mark}so?"}, ensure_ascii=False)
    (tmp_path / "questions.jsonl").write_text(text + "\r\n", encoding="utf-8")
    assert load("own", path=tmp_path).question.tolist() == [f"Is it{mark}so?"]
    folder = mme_folder(tmp_path / "MME", {"OCR": False})
    (folder / "OCR/0001.txt").write_text(f"Is it{mark}so?\tYes\r\nIs it?\tNo\r\n", encoding="utf-8")
    assert load("MME", path=folder).question[2] == f"Is it{mark}so?"


@pytest.mark.parametrize("answer, right_ones, wrong_ones", [
    ("A", ["A", "a", "A."], ["", "the", ".", "an"]), ("?", ["?"], ["", ".", "a"]),
    ("the end", ["The end.", "end"], [""]),
])
def test_an_answer_of_which_the_comparing_form_leaves_nothing(tmp_path, answer, right_ones, wrong_ones):
    picture(tmp_path / "1.png")
    said = [*right_ones, *wrong_ones]
    lines(tmp_path / "questions.jsonl", [OWN | {"id": str(i), "answer": answer} for i in range(len(said))])
    table = load("own", path=tmp_path).assign(prediction=said)
    assert right(table, "own").tolist() == [1.0] * len(right_ones) + [0.0] * len(wrong_ones)


@pytest.mark.parametrize("changes, words", [
    ({"image": "../1.png"}, ["leads out"]), ({"image": "~/1.png"}, ["~/1.png"]),
    ({"answer": 3.5}, ["'answer'", "3.5"]), ({"answer": "C", "choices": ["a", "b"]}, ["'answer'", "'C'"]),
    ({"choices": "a, b"}, ["'choices'"]), ({"question": 5}, ["'question'", "5"]), ({"hint": 5}, ["'hint'", "5"]),
    ({"image": {"bytes": 1}}, ["'image'"]),
    ({"id": "1"}, ["'1' occurs twice"]), ({"answers": [1]}, ["'answers.0'"]), ({"image": ""}, ["''"]),
])
def test_odd_questions_of_ones_own(tmp_path, changes, words):
    lines(tmp_path / "questions.jsonl", [OWN, OWN | {"id": "2"} | changes])
    picture(tmp_path / "1.png"), picture(tmp_path.parent / "1.png")
    refused(*words, name="own", path=tmp_path)


@pytest.mark.parametrize("changes", [{"id": None}, {"answer": float("nan")}, {"question": " "}, {"image": None}])
def test_a_question_of_ones_own_that_lacks_something(tmp_path, changes):
    lines(tmp_path / "questions.jsonl", [OWN, OWN | {"id": "2"} | changes])
    picture(tmp_path / "1.png")
    table = load("own", path=tmp_path)
    assert table.id.tolist() == ["1"] and [len(of) for of in table.attrs["left_out"].values()] == [1]


def test_parquet_behind_a_link(tmp_path):
    (rows,) = FILES["own"].values()
    write(tmp_path / "elsewhere", {"b.parquet": rows[2:]})
    write(tmp_path / "own/first", {"a.parquet": rows[:2]})
    (tmp_path / "own/second").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "own/._a.parquet").write_bytes(b"what another system keeps beside a file")
    table = load("own", path=tmp_path / "own")
    assert table.id.tolist() == [f"mine-{i}" for i in range(4)] and len(table.attrs["sha256"]) == 2


def test_two_tables(tmp_path):
    for name in ("a.csv", "b.csv"):
        tabbed(tmp_path / name, [OWN])
    refused("a.csv, b.csv", "questions.csv", name="own", path=tmp_path)


def test_ones_own_are_not_on_the_hub():
    with pytest.raises(ValueError, match="^own: .* path=<folder>$"):
        load("own")


# ------------------------------------------------------------------------------------------------ --data-dir
def test_a_folder_of_tables(tmp_path):
    """VLMEvalKit keeps one file of each benchmark side by side, LLaVA folders in small letters."""
    tabbed(tmp_path / "MMStar.tsv", [star(i) for i in range(4)])
    pope_folder(tmp_path / "pope")
    assert len(study.benchmark("MMStar", str(tmp_path), False, 0)[0]) == 4
    tables, shown = study.load_benchmarks(["POPE", "MME", "MMStar"], str(tmp_path), False, 1)
    assert {name: len(table) for name, table in tables.items()} == {"POPE": 6, "MMStar": 1}
    assert methods.data(False, "mmstar", str(tmp_path), False, 0)[0] == "MMStar"


def test_a_benchmark_twice(tmp_path):
    tabbed(tmp_path / "MMStar.tsv", [star(i) for i in range(4)])
    write(tmp_path / "MMStar", FILES["MMStar"])
    with pytest.raises(ValueError, match="MMStar is in .* twice: MMStar and MMStar.tsv"):
        study.benchmark("MMStar", str(tmp_path), False, 0)


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tabbed(tmp_path / "data/MMStar.tsv", [star(i) for i in range(4)])
    assert len(study.benchmark("MMStar", "~/data", False, 0)[0]) == 4


def test_a_chapter_says_what_is_left_out_and_what_is_missing(tmp_path, monkeypatch, capsys):
    """The engine passes on no other lines of a kernel's than those that begin with the chapter's name."""
    monkeypatch.setenv(progress.CHAPTER, "09-benchmarks")
    files = with_row("POPE", answer=None)
    write(tmp_path / "POPE", {file: rows for file, rows in files.items() if "popular" not in file})
    study.benchmark("POPE", str(tmp_path), False, 0)
    said = capsys.readouterr().err
    engine._Progress("09-benchmarks").write(said)
    assert capsys.readouterr().err == said
    for words in ("POPE: left out: 1 with no answer", "POPE: 2 of 3 categories, without popular",
                  "POPE: 8 of 9000 questions are there"):
        assert f"09-benchmarks: {words}" in said


# ---------------------------------------------------------------------------------------- answers that are none
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("said", [np.nan, None, 3, ["yes"], True])
def test_a_prediction_that_is_no_text(tmp_path, name, said):
    table = load(name, path=write(tmp_path, FILES[name]))
    table = table.assign(prediction=pd.Series(["yes"] * (len(table) - 1) + [said], dtype=object))
    with pytest.raises(ValueError, match=f"^{name}: a prediction is missing.*{table.id.iloc[-1]}"):
        right(table, name)


@pytest.mark.parametrize("name, column", [
    ("GQA", "answer"), ("TextVQA", "answers"), ("MMMU", "choices"), ("MathVista", "query"), ("ScienceQA-IMG", "hint"),
    ("ScienceQA-IMG", "choices"), ("POPE", "question"), ("MMStar", "l2_category"), ("MME", "group"),
])
def test_a_table_with_a_null_is_neither_asked_nor_scored(tmp_path, name, column):
    table = load(name, path=write(tmp_path, FILES[name])).assign(prediction="yes")
    table[column] = pd.Series([np.nan, *table[column][1:]], dtype=object)
    for use in (lambda: prompts(table, name), lambda: right(table, name)):
        with pytest.raises(ValueError, match=f"^{name}: the {column} of .* is nan"):
            use()


def test_answers_in_capitals(tmp_path):
    """GQA's own are in small letters; those of a table need not be."""
    table = load("GQA", path=write(tmp_path, with_row("GQA", answer="Yes ")))
    assert right(table.assign(prediction=["yes", "Yes.", "no"]), "GQA").tolist() == [1, 1, 0]


def test_open_questions_with_several_answers(tmp_path):
    """As three of MMMU have them, validation_Math_15 among them."""
    table = load("MMMU", path=write(tmp_path, with_row("MMMU", answer="['24/7', '3.429']")))[1:]
    for said, is_right in {"It is 3.43.": 1, "24/7": 1, "24": 0, "['24/7', '3.429']": 1, "7": 0}.items():
        assert right(table.assign(prediction=said), "MMMU").tolist() == [is_right], said


# --------------------------------------------------------------------------------------- result files of harnesses
def answers(name: str, tmp_path: Path) -> tuple[pd.DataFrame, Path]:
    table = load(name, path=write(tmp_path / "data", FILES[name]))
    said = ["Yes.", "no", "maybe", "Yes, B"]
    table = table.assign(prediction=[said[i % 4] for i in range(len(table))])
    benchmarks.harness.write(table, name, [f"ask {i}" for i in range(len(table))], "m", tmp_path / "out")
    return table, tmp_path / "out"


@pytest.mark.parametrize("name", NAMES)
def test_vlmevalkit_can_read_on(tmp_path, name):
    """Its loader is pandas.read_csv by tabs; its scorers take index, question, answer, category and prediction."""
    table, out = answers(name, tmp_path)
    read = pd.read_csv(out / f"vlmevalkit/m/m_{name}.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert read["index"].tolist() == table.id.tolist() and read.prediction.tolist() == table.prediction.tolist()
    assert read.category.tolist() == table.category.tolist() and read.image_path.tolist() == table.image_id.tolist()
    yes_no = name in ("POPE", "MME")
    assert read.answer.tolist() == (table.answer.str.title().tolist() if yes_no else table.answer.tolist())
    if name == "MMStar":
        assert read.question.tolist() == ["Which?"] * 4 and read[list("ABCD")].to_numpy().tolist() == [list("abcd")] * 4


@pytest.mark.parametrize("name", NAMES)
def test_lmms_eval_can_read_on(tmp_path, name):
    """As its `baselines/loader.py` does: samples by doc_id, the results beside them by the same beginning."""
    table, out = answers(name, tmp_path)
    [samples] = (out / "lmms-eval/m").glob("*_samples_*.jsonl")
    task = samples.name.split("_samples_")[1].removesuffix(".jsonl")
    read = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["doc_id"] for row in read] == list(range(len(table)))
    assert [row["filtered_resps"] for row in read] == table.prediction.tolist()
    assert [row["target"] for row in read] == table.answer.tolist() and read[1]["input"] == "ask 1"
    results = json.loads((samples.parent / f"{samples.name.split('_samples_')[0]}_results.json").read_text())
    assert results["n-samples"][task]["effective"] == len(table)
    numbers = results["results"][task]
    assert numbers["right_official,none"] == right(table, name).mean()
    assert ("right_strict,none" in numbers) == (name in benchmarks.RULES)


def test_lmms_evals_numbers_are_those_of_its_rule(tmp_path):
    """POPE, three times yes, no, yes, no, answered "Yes.", "no", "maybe", "Yes, B": "no" alone is an answer there."""
    _, out = answers("POPE", tmp_path)
    of = json.loads((out / "lmms-eval/m/pope_results.json").read_text())["results"]["pope"]
    found = {key.removesuffix(",none"): value for key, value in of.items() if key.endswith(",none")}
    assert found == pytest.approx({
        "pope_accuracy": 0.25, "pope_precision": 0, "pope_recall": 0, "pope_f1_score": 0, "pope_yes_ratio": 0.5,
        "right_official": 0.75, "right_strict": 0.5})
    _, out = answers("MME", tmp_path / "mme")  # count: Yes, No answered Yes., no; code: No, Yes answered maybe, Yes, B
    of = json.loads((out / "lmms-eval/m/mme_results.json").read_text())["results"]["mme"]
    assert of["mme_perception_score,none"] == 200 and of["mme_cognition_score,none"] == 50


def test_nothing_is_left_lying(tmp_path):
    _, out = answers("POPE", tmp_path)
    assert len([file for _, _, files in os.walk(out) for file in files]) == 3
