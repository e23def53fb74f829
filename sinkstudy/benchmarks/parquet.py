"""Read parquet files of questions; leave their images where they are until one is opened."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sinkstudy.pictures import decode


@dataclass(frozen=True)
class Picture:
    """An image in a parquet file. Only `open` reads and decodes it, so a table of pictures costs next to nothing."""

    file: Path
    column: str
    row: int

    def open(self) -> Image.Image:
        """The image as RGB, upright.

        Raises:
            ValueError: no image there, or one that cannot be decoded (`pictures.decode`).
        """
        ends = _group_ends(self.file)
        group = next(i for i, end in enumerate(ends) if self.row < end)
        first = ends[group - 1] if group else 0
        value = _row_group(self.file, group, self.column)[self.row - first].as_py()
        data = value["bytes"] if isinstance(value, dict) else value  # Hugging Face's image struct, or plain bytes
        if not data:
            raise ValueError(f"the {self} is empty")
        return decode(data, f"in row {self.row}, column {self.column!r} of {self.file}")

    def __str__(self) -> str:
        return f"image in row {self.row}, column {self.column!r} of {self.file}"


@lru_cache(256)
def _group_ends(file: Path) -> tuple[int, ...]:
    """For each row group of the file, the number of rows up to its end."""
    metadata = pq.read_metadata(file)
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return tuple(sum(rows[:i + 1]) for i in range(len(rows)))


@lru_cache(2)  # row groups of images are large (a hundred MB is usual), and tables are read in order
def _row_group(file: Path, group: int, column: str) -> pa.ChunkedArray:
    return pq.ParquetFile(file).read_row_group(group, columns=[column])[column]


def read(file: Path, columns: Sequence[str], images: Sequence[str], name: str) -> pd.DataFrame:
    """The file's `columns` as Python objects, with `file` and `row`, each row's place; `images` only have to be there.

    Raises:
        ValueError: not a parquet file, or without one of the columns. It begins with `name`, the benchmark.
    """
    try:
        there = pq.read_schema(file).names
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{name}: {file} is not a parquet file: {str(error).splitlines()[0]}") from None
    if missing := [c for c in (*columns, *images) if c not in there]:
        raise ValueError(f"{name}: column {missing[0]!r} is missing in {file}, which has {', '.join(there)}")
    # lists and structs as Python's own: arrays in cells compare and print badly; nulls stay None
    table = pq.read_table(file, columns=list(columns))
    raw = pd.DataFrame(table.to_pydict(), columns=list(columns), dtype=object)
    for column, labels in _class_labels(table.schema).items():
        raw[column] = [labels[v] if isinstance(v, int) and 0 <= v < len(labels) else v for v in raw[column]]
    return raw.assign(file=file, row=range(len(raw)))


def _class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Columns that the library datasets keeps as numbers of class labels, with the labels, as the file notes them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {c: of["names"] for c, of in features.items() if of.get("_type") == "ClassLabel" and c in schema.names}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def pictures(files: Iterable[Path], name: str) -> dict[str, Picture]:
    """The images of files that hold nothing else, by their `id`."""
    return {row.id: Picture(row.file, "image", row.row)
            for file in files for row in read(file, ["id"], ["image"], name).itertuples()}


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
