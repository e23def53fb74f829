"""Questions in files that are not parquet, as they are published: POPE's JSON lines, MME's folders, tables.

Each reader gives the columns that the benchmark's data set has on the Hub, so that what follows is the same, and
beside them `file` and `row`, each row's place, `picture`, an object that reads and decodes when it is opened, or None
where the file has none, and `shown`, a name for it that two questions about the same picture share.
"""

import base64
import binascii
import csv
import hashlib
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from sinkstudy.benchmarks.rows import letters
from sinkstudy.pictures import SUFFIXES, File, check, decode

TABLES = (".tsv", ".csv", ".jsonl", ".json")
POPE_FILE = re.compile(r"pope_(random|popular|adversarial)\.jsonl?$")
_DEEP = 3  # folders below the one that is given, in which pictures are looked for


@dataclass(frozen=True)
class Cell:
    """A picture as base64 text in a CSV or TSV file. `at` is the byte at which its record begins."""

    file: Path
    column: str
    row: int
    at: int

    def open(self) -> Image.Image:
        """The picture in RGB, upright. Raises ValueError, with its place, if it cannot be decoded."""
        header = next(_records(self.file))[1]
        text = next(_records(self.file, self.at))[1][header.index(self.column)]
        return decode(_decoded(text), str(self))

    def __str__(self) -> str:
        return f"in row {self.row}, column {self.column!r} of {self.file}"


def _decoded(text: str) -> bytes:
    return base64.b64decode(text.partition("base64,")[2] if text.startswith("data:") else text, validate=True)


# ------------------------------------------------------------------------------------------------- records
def _records(file: Path, at: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Records of a CSV or TSV file from byte `at` on, each with the byte at which it begins."""
    csv.field_size_limit(sys.maxsize)  # a picture is one field
    with open(file, "rb") as stream:
        stream.seek(at)
        place = at

        def lines() -> Iterator[str]:
            nonlocal place
            for line in stream:
                place += len(line)
                yield line.decode("utf-8-sig")

        reader = csv.reader(lines(), delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        while True:
            start = place
            record = next(reader, None)
            if record is None:
                return
            if record:  # no blank line
                yield start, record


def _delimited(file: Path) -> list[dict[str, Any]]:
    """Rows of a CSV or TSV file: text, None for empty cells; long ones of a column `image` stay in the file."""
    records = _records(file)
    header = next(records, (0, []))[1]
    if len(set(header)) < len(header) or not header:
        raise ValueError("its first line does not name its columns, each once")
    rows = []
    for i, (at, record) in enumerate(records):
        if len(record) != len(header):
            raise ValueError(f"row {i} has {len(record)} columns, and the first line names {len(header)}")
        row: dict[str, Any] = {column: text or None for column, text in zip(header, record, strict=True)}
        text = row.get("image") or ""
        if len(text) > 64 and (text.startswith("data:") or re.fullmatch(r"[A-Za-z0-9+/]+=*", text)):
            try:
                digest = hashlib.sha256(_decoded(text)).hexdigest()
            except binascii.Error as error:
                raise ValueError(f"row {i}, column 'image': the base64 text of a picture is damaged: {error}") from None
            row |= {"image": Cell(file, "image", i, at), "shown": digest}
        rows.append(row)
    return rows


def _json(file: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, or of one JSON list."""
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for i, line in enumerate(text.split("\n")):  # and at none of the other signs that Unicode ends lines with
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {i + 1} is no JSON: {error}") from None
    if odd := [i for i, row in enumerate(rows) if not isinstance(row, dict)]:
        raise ValueError(f"row {odd[0]} is no object with columns")
    return rows


_MEANT = {"option": "choices", "options": "choices", "choice": "choices"}


def check_columns(columns: Iterable[str], known: Collection[str], where: str) -> None:
    """Raise ValueError for a column that would not be read and is called almost as one that would."""
    for column in columns:
        plain = column.strip().casefold()
        meant = next((name for name in known if name.casefold() == plain), _MEANT.get(plain, ""))
        if column not in known and meant and meant not in columns:
            named = "A, B, C .." if meant == "choices" and meant not in known else repr(meant)
            raise ValueError(f"{where}: column {column!r} is not read: call it {named}, or otherwise if it is none")


def read(file: Path, name: str) -> pd.DataFrame:
    """A file of JSON lines, JSON, CSV or TSV: objects, None where there is nothing, with `file` and `row`.

    Raises:
        ValueError: it cannot be read, is not such a file, or is empty. It begins with `name`, the benchmark.
    """
    try:
        rows = _delimited(file) if file.suffix.lower() in (".tsv", ".csv") else _json(file)
    except OSError as error:
        raise ValueError(f"{name}: {file} cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{name}: {file}: {error}") from None
    if not rows:
        raise ValueError(f"{name}: the data set is empty ({file})")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    raw = pd.DataFrame({c: pd.Series([row.get(c) for row in rows], dtype=object) for c in columns})
    return raw.assign(file=file, row=range(len(raw)))


# ------------------------------------------------------------------------------------------------- pictures
def _folders(root: Path, depth: int = _DEEP) -> list[Path]:
    below = [f for f in sorted(root.iterdir()) if f.is_dir() and not f.name.startswith(".")] if depth else []
    return [root, *(folder for child in below for folder in _folders(child, depth - 1))]


def _named(names: dict[str, str], root: Path, name: str) -> dict[str, File]:
    """Pictures by their names in a file of questions, which lie in one folder, `root` or below.

    Args:
        names: of pictures; and for each, where it is named.

    Raises:
        ValueError: a name that leads out of the folder, pictures that are nowhere, or in two folders, or damaged.
    """
    for picture, where in names.items():
        if Path(picture).is_absolute() or ".." in Path(picture).parts:
            raise ValueError(f"{name}: {where}, the picture {picture!r} leads out of its folder: name its place in it")
    first, where = next(iter(names.items()))
    there = {(folder / first).resolve(): folder for folder in _folders(root) if (folder / first).is_file()}
    if len(there) > 1:
        some = " and ".join(str(folder) for folder in list(there.values())[:2])
        raise ValueError(f"{name}: {where}, the picture {first!r} is in {some}: leave one")
    if not there:
        raise ValueError(f"{name}: {where}, the picture {first!r} is neither in {root} nor in a folder there")
    folder = next(iter(there.values()))
    if lost := [picture for picture in names if not (folder / picture).is_file()]:
        raise ValueError(f"{name}: {len(lost)} of {len(names)} pictures are not in {folder}, the first is {lost[0]!r}")
    for picture, where in names.items():
        if not (folder / picture).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{name}: {where}, the picture {picture!r} is a link that leads out of {folder}")
        try:
            check(folder / picture)
        except ValueError as problem:
            raise ValueError(f"{name}: {where}, {problem}") from None
    return {picture: File(folder / picture) for picture in names}


def with_pictures(raw: pd.DataFrame, root: Path, name: str) -> pd.DataFrame:
    """Add `picture` and `shown` to the rows of one file.

    `image` is the name of a picture in `root` or in one folder below, base64 text, or the `index` of a row that has
    base64 text. Null stays None; a list is of several pictures and stays as it is.

    Raises:
        ValueError: no column `image`, an image that is none of these, or as `_named`.
    """
    if "image" not in raw.columns:
        raise ValueError(f"{name}: column 'image' is missing in {raw.file[0]}, which has {', '.join(raw.columns[:-2])}")
    where = [f"{file}, row {row}" for file, row in zip(raw.file, raw.row, strict=True)]
    known = [column for column in ("index", "id", "question_id") if column in raw.columns] or ["row"]
    keys = raw[known[0]].map(str).tolist()
    held = {key: i for i, key in enumerate(keys) if isinstance(raw.image[i], Cell)}
    at = [held.get(image, i) if isinstance(image, str) else i for i, image in enumerate(raw.image)]
    images = [raw.image[i] for i in at]
    several = [isinstance(image, list) or isinstance(image, str) and image.startswith("[") for image in images]
    for i, image in enumerate(images):
        if not (image is None or several[i] or isinstance(image, (str, Cell))):
            odd = str(image)[:60]
            raise ValueError(f"{name}: {where[i]}, column 'image': a picture's name is expected, not {odd!r}")
    names = {image: where[i] for i, image in reversed(list(enumerate(images)))
             if isinstance(image, str) and not several[i]}
    found = _named(dict(reversed(names.items())), root, name) if names else {}
    first: dict[str, str] = {}  # a picture's digest -> the key of the first row that has it
    shown = [first.setdefault(raw.shown[i], keys[i]) if isinstance(image, Cell)
             else keys[i] if image is None or many else str(Path(image))
             for i, image, many in zip(at, images, several, strict=True)]
    pictures = [[image] if many else found.get(image, image) if isinstance(image, str) else image
                for many, image in zip(several, images, strict=True)]
    objects = {"picture": pictures, "shown": shown}
    return raw.assign(**{column: pd.Series(values, dtype=object) for column, values in objects.items()})


# ------------------------------------------------------------------------------------------------- as published
def tables(root: Path, name: str) -> list[Path]:
    """The one table in a folder: `questions.*`, or by the benchmark's name, or the only one there is.

    Raises:
        ValueError: there are several.
    """
    there = sorted(f for f in root.iterdir() if f.suffix.lower() in TABLES and not f.name.startswith("."))
    found = [f for f in there if f.stem.lower() in ("questions", name.lower())] or there
    if len(found) > 1:
        some = ", ".join(file.name for file in found)
        raise ValueError(f"{name}: which of {some} in {root} has the questions? Call it questions{found[0].suffix}")
    return found


def pope_files(root: Path) -> list[Path]:
    """Files in a folder or below by the names that POPE's have."""
    return [f for folder in _folders(root) for f in sorted(folder.iterdir()) if POPE_FILE.search(f.name)]


def pope(files: list[Path], root: Path, name: str) -> pd.DataFrame:
    """POPE's JSON lines, a file for each category by its name; the pictures in one folder of `root`, or in it.

    Raises:
        ValueError: two files of a category, a column that is missing, or as `read` and `with_pictures`.
    """
    of: dict[str, Path] = {}
    for file in files:
        category = POPE_FILE.search(file.name)[1]  # the file does not say it
        if category in of:
            raise ValueError(f"{name}: {of[category]} and {file} are both {category}: leave one, by its own folder")
        of[category] = file
    parts = []
    for category, file in of.items():
        raw = read(file, name)
        if missing := [c for c in ("question_id", "image", "text", "label") if c not in raw.columns]:
            have = ", ".join(raw.columns[:-2])
            raise ValueError(f"{name}: column {missing[0]!r} is missing in {file}, which has {have}")
        raw = with_pictures(raw, root, name)
        source = [str(Path(image).with_suffix("")) if isinstance(image, str) else image for image in raw.image]
        parts.append(raw.rename(columns={"text": "question", "label": "answer"}).assign(
            category=category, image_source=pd.Series(source, dtype=object)))
    return pd.concat(parts, ignore_index=True)


def mme_folders(root: Path, categories: list[str], name: str) -> dict[str, Path]:
    """The folders of MME's categories, `root` or below, that hold texts: {category: folder}.

    Raises:
        ValueError: a category has two.
    """
    found: dict[str, Path] = {}
    for folder in _folders(root):
        if folder.name in categories and _mme_texts(folder):
            if folder.name in found:
                raise ValueError(f"{name}: {found[folder.name]} and {folder} are both {folder.name}: leave one")
            found[folder.name] = folder
    return found


def _mme_texts(folder: Path) -> list[Path]:
    return sorted(folder.glob("questions_answers_YN/*.txt")) or sorted(folder.glob("*.txt"))


def mme(folders: dict[str, Path], name: str) -> tuple[pd.DataFrame, list[Path]]:
    """MME's folders: for each picture a text of the same name with lines of question, tab and answer.

    Both lie in the category's folder, or the texts in `questions_answers_YN` and the pictures in `images`.

    Raises:
        ValueError: a text without its picture or with two, a picture without its text, a line that is not so, or a
            damaged picture.
    """
    rows, texts = [], []
    for category, folder in folders.items():
        place = folder / "images" if (folder / "questions_answers_YN").is_dir() else folder
        pictures: dict[str, list[Path]] = {}
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
                pictures.setdefault(file.stem, []).append(file)
        for text in _mme_texts(folder):
            of = pictures.pop(text.stem, [])
            if len(of) != 1:
                raise ValueError(f"{name}: {text} has {len(of) or 'no'} pictures of its name in {place}, not one")
            try:
                check(of[0])
                lines = text.read_text(encoding="utf-8-sig").split("\n")
            except (ValueError, OSError) as problem:
                raise ValueError(f"{name}: {text}: {problem}") from None
            for i, line in enumerate(lines):
                question, tab, answer = line.partition("\t")
                if line.strip():
                    if not tab or "\t" in answer:
                        raise ValueError(f"{name}: {text}, line {i + 1} is not a question, a tab and yes or no")
                    key = f"{category}/{of[0].name}"
                    rows.append({"question_id": key, "question": question, "answer": answer, "category": category,
                                 "file": text, "row": i, "picture": File(of[0]), "shown": key})
            texts.append(text)
        if pictures:
            alone = next(iter(pictures.values()))[0]
            raise ValueError(f"{name}: {len(pictures)} pictures of {category} have no text, the first is {alone}")
    return pd.DataFrame(rows, dtype=object), texts


# ------------------------------------------------------------------------- columns as VLMEvalKit's tables have them
def options(raw: pd.DataFrame) -> pd.Series:
    """The options of each row, columns A, B, C .. as far as they go without a gap; empty where there is no A."""
    columns = [raw[c].tolist() for c in letters(26) if c in raw.columns]
    several = [list(row) for row in zip(*columns, strict=True)] or [[]] * len(raw)
    for row, place in zip(several, raw.row, strict=True):
        while row and row[-1] is None:
            row.pop()
        if None in row:
            missing = letters(26)[row.index(None)]
            raise ValueError(f"{raw.file[0]}, row {place}, column {missing!r}: the option is missing")
    return pd.Series([[str(option) for option in row] for row in several], dtype=object)


def pope_table(raw: pd.DataFrame) -> pd.DataFrame:
    """A row for each category that a question is in; VLMEvalKit has it once, in "adversarial,popular,random"."""
    category = [[part.strip() for part in c.split(",")] if isinstance(c, str) else [c] for c in raw["category"]]
    raw = raw.assign(question_id=raw["index"], image_source=raw.shown, category=pd.Series(category, dtype=object))
    return raw.explode("category", ignore_index=True)


def mme_table(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(question_id=[f"{c}/{shown}" for c, shown in zip(raw["category"], raw.shown, strict=True)])


def mmstar_table(raw: pd.DataFrame) -> pd.DataFrame:
    """The options behind the question, as MMStar's own file has them. Raises ValueError: the answer is none of them."""
    for answer, of, place in zip(raw["answer"], options(raw), raw.row, strict=True):
        if of and answer and str(answer).strip() not in letters(len(of)):
            what = f"column 'answer' holds {answer!r}, no letter of its {len(of)} options"
            raise ValueError(f"{raw.file[0]}, row {place}, {what}")
    asked = [q if not of or q is None else
             f"{q.rstrip()}\nOptions: " + ", ".join(f"{c}: {o}" for c, o in zip(letters(len(of)), of, strict=True))
             for q, of in zip(raw["question"], options(raw), strict=True)]
    return raw.assign(question=pd.Series(asked, dtype=object))


def science_qa_table(raw: pd.DataFrame) -> pd.DataFrame:
    answer = [ord(a) - ord("A") if isinstance(a, str) and len(a) == 1 else a for a in raw["answer"]]
    return raw.assign(choices=options(raw), subject=raw["category"], answer=pd.Series(answer, dtype=object))


def text_vqa_table(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(question_id=raw["index"], image_id=raw.shown, answers=raw["answer"])


def own_table(raw: pd.DataFrame) -> pd.DataFrame:
    """Ids are the column `id`, or `index`, or else a row's number; options a column `choices`, or A, B, C .."""
    ids = next((raw[c] for c in ("id", "index") if c in raw.columns), raw.row)
    choices = raw.choices if "choices" in raw.columns else options(raw)
    return raw.assign(id=ids, image_id=raw.shown, choices=choices)
