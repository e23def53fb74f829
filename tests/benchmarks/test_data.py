"""Loading: files of the public data sets' schemas, made here, become tidy tables; what is wrong is one message."""

import dataclasses
import hashlib
import io
import re

import PIL.ExifTags
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sinkstudy.benchmarks import SOURCES, data, load
from sinkstudy.benchmarks.parquet import Picture

NAMES = list(SOURCES)


def image(shade: int = 0, size: tuple[int, int] = (4, 2)) -> dict:
    """An image as the Hub's data sets store it."""
    stream = io.BytesIO()
    PIL.Image.new("RGB", size, (shade, 0, 0)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def pope_rows(split: str) -> list[dict]:
    return [{"id": str(i), "question_id": str(i), "question": "Is there a dog in the image?", "category": split,
             "answer": ("yes", "no")[i % 2], "image_source": f"COCO_{i // 2}", "image": image(i // 2)}
            for i in range(4)]


def mme_row(category: str, number: int, answer: str) -> dict:
    return {"question_id": f"{category}/{number:04d}.png", "image": image(number), "answer": answer,
            "category": category, "question": "Is it so? Please answer yes or no."}


MATH = {"query": "Hint: …\nQuestion: …", "unit": None, "precision": 1.0, "question_type": "multi_choice",
        "answer_type": "text", "metadata": {"task": "geometry problem solving", "skills": ["numeric commonsense"]}}
FILES = {  # benchmark -> file -> rows
    "POPE": {f"Full/{s}-00000-of-00001.parquet": pope_rows(s) for s in ("random", "popular", "adversarial")},
    "MME": {"data/test-00000-of-00002.parquet": [mme_row("count", 1, a) for a in ("Yes", "No")],
            "data/test-00001-of-00002.parquet": [mme_row("code_reasoning", 2, a) for a in ("No", "Yes")]},
    "MMStar": {"mmstar.parquet": [
        {"index": i, "question": "Which?\nOptions: A: a, B: b, C: c, D: d", "image": image(i), "answer": "ABCD"[i],
         "category": "math", "l2_category": "geometry", "meta_info": {"source": "x"}} for i in range(4)]},
    "GQA": {"testdev_balanced_instructions/testdev-00000-of-00001.parquet": [
        {"id": f"20{i}", "imageId": f"n{i % 2}", "question": "Is it?", "answer": "yes",
         "types": {"structural": "verify", "semantic": "rel", "detailed": "x"}} for i in range(3)],
            "testdev_balanced_images/testdev-00000-of-00001.parquet": [
                {"id": "n1", "image": image(1)}, {"id": "n0", "image": image(0)}]},
    "ScienceQA-IMG": {"ScienceQA-IMG/test-00000-of-00001.parquet": [
        {"image": image(i), "question": "Which?", "choices": ["a", "b"], "answer": i, "hint": "", "subject": "biology"}
        for i in range(2)]},
    "TextVQA": {"data/validation-00000-of-00001.parquet": [
        {"image_id": "0054", "question_id": 34602 + i, "question": "what does it say?", "image": image(7),
         "answers": ["stop"] * 8 + ["go"] * 2} for i in range(2)]},
    "MMMU": {"data/validation-00000-of-00001.parquet": [
        {"id": "validation_Art_Theory_1", "question": "Set <image 2> beside <image 1>.", "options": "['a', 'b']",
         "answer": "B", "question_type": "multiple-choice",
         **{f"image_{k}": image(k) if k < 3 else None for k in range(1, 8)}},
        {"id": "validation_Math_2", "question": "How long is <image 1>?", "options": "[]", "answer": "4",
         "question_type": "open", **{f"image_{k}": image(k) if k < 2 else None for k in range(1, 8)}}]},
    "MathVista": {"data/testmini-00000-of-00001.parquet": [
        {"pid": "1", "question": "Which?", "image": "images/1.jpg", "decoded_image": image(1), "choices": ["3", "4"],
         "answer": "4", **MATH},
        {"pid": "2", "question": "Which?", "image": "images/2.jpg", "decoded_image": image(2), "choices": None,
         "answer": "1.5", **MATH, "question_type": "free_form"}]},
    "own": {"questions.parquet": [
        {"id": f"mine-{i}", "question": "Is there a dog?", "answer": ("Yes", "no")[i % 2], "image": image(i // 2)}
        for i in range(4)]},
}


def write(folder, files: dict[str, list[dict]], **options):
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / name, **options)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_becomes_a_tidy_table(tmp_path, name):
    table = load(name, path=write(tmp_path, FILES[name]))
    assert table.columns.tolist() == [*data.COLUMNS, "image", *SOURCES[name].extra]
    for column in data.COLUMNS:
        assert table[column].map(type).eq(str).all(), column
    assert table.id.is_unique and table.index.tolist() == list(range(len(table)))
    assert len(table) == sum(len(rows) for file, rows in FILES[name].items() if "balanced_images" not in file)
    for picture in table.image:
        assert picture.open().mode == "RGB" and picture.open().size == (4, 2)
    assert table.attrs["benchmark"] == name and table.attrs["revision"] is None
    assert table.attrs["sha256"] == {
        file: hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for file in FILES[name]}


def shade(picture: Picture) -> int:
    return picture.open().getpixel((0, 0))[0]


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_a_picture_is_that_of_its_row(tmp_path, rows):
    """Whatever the size of the file's row groups."""
    table = load("POPE", path=write(tmp_path, FILES["POPE"], row_group_size=rows))
    assert [shade(p) for p in table.image] == [0, 0, 1, 1] * 3
    table = load("GQA", path=write(tmp_path, FILES["GQA"], row_group_size=rows))
    assert [shade(p) for p in table.image] == [0, 1, 0]


def test_pictures_are_rgb_and_upright(tmp_path):
    rows = []
    for i, (mode, orientation) in enumerate([("L", 1), ("RGBA", 1), ("P", 1), ("RGB", 6)]):
        exif, stream = PIL.Image.Exif(), io.BytesIO()
        exif[PIL.ExifTags.Base.Orientation] = orientation
        PIL.Image.new(mode, (4, 2)).save(stream, "PNG", exif=exif)
        rows.append(FILES["MMStar"]["mmstar.parquet"][i] | {"image": {"bytes": stream.getvalue(), "path": None}})
    opened = [p.open() for p in load("MMStar", path=write(tmp_path, {"mmstar.parquet": rows})).image]
    assert [i.mode for i in opened] == ["RGB"] * 4 and [i.size for i in opened] == [(4, 2)] * 3 + [(2, 4)]


def test_loading_opens_no_image(tmp_path, monkeypatch):
    folder = write(tmp_path, FILES["MMStar"])
    monkeypatch.setattr(PIL.Image, "open", None)
    assert len(load("MMStar", path=folder)) == 4


def test_pope_has_three_splits(tmp_path):
    folder = write(tmp_path, FILES["POPE"])
    assert load("POPE", path=folder).category.value_counts().to_dict() == {"random": 4, "popular": 4, "adversarial": 4}
    one = load("POPE", path=folder, split="popular")
    assert set(one.category) == {"popular"} and list(one.attrs["sha256"]) == ["Full/popular-00000-of-00001.parquet"]
    assert set(one.answer) == {"yes", "no"} and one.image_id.nunique() == 2


def test_any_file_of_the_schema_will_do(tmp_path):
    rows = [row for split in FILES["POPE"].values() for row in split]
    file = tmp_path / "mine.parquet"
    write(tmp_path, {"mine.parquet": rows})
    assert len(load("POPE", path=file)) == len(load("POPE", path=tmp_path)) == 12
    assert load("POPE", path=file, split="random").category.tolist() == ["random"] * 4


def test_mme_names_images(tmp_path):
    table = load("MME", path=write(tmp_path, FILES["MME"]))
    assert table.group.tolist() == ["perception"] * 2 + ["cognition"] * 2
    assert table.image_id.tolist() == ["count/0001.png"] * 2 + ["code_reasoning/0002.png"] * 2
    assert table.answer.tolist() == ["yes", "no", "no", "yes"]


def test_mmmu_may_show_several_images(tmp_path):
    table = load("MMMU", path=write(tmp_path, FILES["MMMU"]))
    assert [[shade(p) for p in several] for several in table.images] == [[1, 2], [1]]
    assert table.category.tolist() == ["Art_Theory", "Math"] and table.choices.tolist() == [["a", "b"], []]


def test_other_columns(tmp_path):
    assert load("ScienceQA-IMG", path=write(tmp_path / "s", FILES["ScienceQA-IMG"])).answer.tolist() == ["A", "B"]
    text = load("TextVQA", path=write(tmp_path / "t", FILES["TextVQA"]))
    assert text.answer.tolist() == ["stop"] * 2 and text.image_id.tolist() == ["0054"] * 2
    math = load("MathVista", path=write(tmp_path / "m", FILES["MathVista"]))
    assert math.skills.tolist() == [["numeric commonsense"]] * 2 and math.image_id[0] == "images/1.jpg"


def test_limit_counts_images(tmp_path):
    folder = write(tmp_path, FILES["POPE"])
    assert load("POPE", path=folder, limit=1).image_id.tolist() == ["COCO_0"] * 6
    assert len(load("MME", path=write(tmp_path / "mme", FILES["MME"]), limit=1)) == 2


# ------------------------------------------------------------------------------------------------ errors
def one_message(message: str, *args, **options) -> None:
    with pytest.raises(ValueError) as raised:
        load(*args, **options)
    said = str(raised.value)
    assert said.startswith(message) and "\n" not in said, said


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_column(tmp_path, name):
    lost = SOURCES[name].columns[1]
    files = {file: [{k: v for k, v in row.items() if k != lost} for row in rows] for file, rows in FILES[name].items()}
    one_message(f"{name}: column {lost!r} is missing in {tmp_path}/", name, path=write(tmp_path, files))


def test_missing_images(tmp_path):
    files = {file: [{k: v for k, v in row.items() if k != "image"} for row in rows]
             for file, rows in FILES["POPE"].items()}
    one_message("POPE: column 'image' is missing in ", "POPE", path=write(tmp_path, files))
    gqa = FILES["GQA"] | {"testdev_balanced_images/testdev-00000-of-00001.parquet": [{"id": "n1", "image": image()}]}
    one_message("GQA: 1 images, such as 'n0', are missing in ", "GQA", path=write(tmp_path / "gqa", gqa))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_data_set(tmp_path, name):
    write(tmp_path, FILES[name])
    for file in FILES[name]:
        pq.write_table(pq.read_table(tmp_path / file).slice(0, 0), tmp_path / file)
    one_message(f"{name}: the data set is empty (", name, path=tmp_path)


def test_an_empty_folder(tmp_path):
    one_message(f"MME: no parquet files in {tmp_path} (looked for data/test-*.parquet)", "MME", path=tmp_path)
    one_message(f"MME: no parquet files in {tmp_path / 'nowhere'}", "MME", path=tmp_path / "nowhere")


def test_a_file_that_is_not_parquet(tmp_path):
    (tmp_path / "mmstar.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    one_message(f"MMStar: {tmp_path / 'mmstar.parquet'} is not a parquet file: ", "MMStar", path=tmp_path)


@pytest.mark.parametrize("rows, n", [([mme_row("count", 1, "Yes")], 1),
                                     ([mme_row("count", 1, a) for a in ("Yes", "No", "Yes")], 3)])
def test_mme_with_a_wrong_number_of_questions(tmp_path, rows, n):
    folder = write(tmp_path, {"data/test-0.parquet": rows})
    one_message(f"MME asks two questions an image; 'count/0001.png' in 'count' has {n}", "MME", path=folder)


def test_mme_with_an_unknown_category(tmp_path):
    folder = write(tmp_path, {"data/test-0.parquet": [mme_row("colour", 1, a) for a in ("Yes", "No")]})
    one_message("MME has no category 'colour'; it has existence, count, ", "MME", path=folder)


@pytest.mark.parametrize("stored, what", [
    (image()["bytes"][:40], "picture {} cannot be read: "), (b"no image at all", "picture {} cannot be read: "),
    (b"", "the image {} is empty"),
])
def test_a_corrupted_image(tmp_path, stored, what):
    rows = FILES["MMStar"]["mmstar.parquet"]
    bad = [rows[0], rows[1] | {"image": {"bytes": stored, "path": "1.png"}}, *rows[2:]]
    table = load("MMStar", path=write(tmp_path, {"mmstar.parquet": bad}))
    assert shade(table.image[2]) == 2  # the others can be read
    with pytest.raises(ValueError) as raised:
        table.image[1].open()
    where = f"in row 1, column 'image' of {tmp_path / 'mmstar.parquet'}"
    assert str(raised.value).startswith(what.format(where))


def test_unknown_names(tmp_path):
    one_message("unknown benchmark 'pope'; known are POPE, MME, ", "pope", path=tmp_path)
    one_message("POPE has no split 'test'; it has random, popular, adversarial", "POPE", path=tmp_path, split="test")


# ---------------------------------------------------------------------------------------------- the hub
def test_revisions_are_commits():
    for name, spec in SOURCES.items():
        assert name == "own" or re.fullmatch("[0-9a-f]{40}", spec.revision)


def test_without_a_pin_a_revision_is_needed(monkeypatch):
    monkeypatch.setitem(SOURCES, "MME", dataclasses.replace(SOURCES["MME"], revision=None))
    one_message("MME: no revision of lmms-lab/MME is pinned; pass revision=<commit> ", "MME")


def test_without_network_there_is_one_message(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    one_message("POPE: lmms-lab/POPE at 0123abc cannot be had from the Hub: ", "POPE", revision="0123abc")
    one_message(f"MME: lmms-lab/MME at {SOURCES['MME'].revision} cannot be had from the Hub: ", "MME")


@pytest.mark.parametrize("name", ["POPE", "GQA"])
def test_a_download_fetches_only_what_is_asked_for(tmp_path, monkeypatch, name):
    commit = "0123456789abcdef0123456789abcdef01234567"
    write(tmp_path / commit, FILES[name])
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        return str(tmp_path / commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    table = load(name, revision="main", split=next(iter(SOURCES[name].splits)))
    assert load(name).attrs["source"] == SOURCES[name].repo and calls.pop()[1]["revision"] == SOURCES[name].revision
    wanted = {"POPE": ["Full/random-*.parquet"],
              "GQA": ["testdev_balanced_instructions/*.parquet", "testdev_balanced_images/*.parquet"]}[name]
    assert calls == [(SOURCES[name].repo, {"repo_type": "dataset", "revision": "main", "allow_patterns": wanted})]
    assert table.attrs["source"] == SOURCES[name].repo and table.attrs["revision"] == commit
