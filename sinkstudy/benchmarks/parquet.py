"""Read parquet files of questions; leave their images where they are until one is opened."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
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
        group = bisect_right(ends, self.row)
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
    return tuple(accumulate(rows))


@lru_cache(2)  # row groups of images are large (a hundred MB is usual), and tables are read in order
def _row_group(file: Path, group: int, column: str) -> pa.ChunkedArray:
    return pq.ParquetFile(file).read_row_group(group, columns=[column])[column]


def read(file: Path, columns: Sequence[str], images: Sequence[str], name: str) -> pd.DataFrame:
    """The file's `columns` as Python objects, None for nulls, with `file` and `row`, each row's place.

    Whole numbers that stand for labels become the labels' names, which the library datasets keeps in the file.

    Args:
        images: columns of pictures, which only have to be there.

    Raises:
        ValueError: not a parquet file, without one of the columns, a label without a name, or a column of `images`
            that holds no pictures. It begins with `name`, the benchmark.
    """
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{name}: {file} is not a parquet file: {str(error).splitlines()[0]}") from None
    if missing := [c for c in (*columns, *images) if c not in schema.names]:
        raise ValueError(f"{name}: column {missing[0]!r} is missing in {file}, which has {', '.join(schema.names)}")
    for image in images:
        of = schema.field(image).type
        of = of.field("bytes").type if pa.types.is_struct(of) and of.get_field_index("bytes") >= 0 else of
        if not (pa.types.is_binary(of) or pa.types.is_large_binary(of) or pa.types.is_null(of)):
            raise ValueError(f"{name}: column {image!r} of {file} holds {of}, not pictures")
    # lists and structs as Python's own, and no null as a number: arrays and NaN in cells compare and print badly
    values = pq.read_table(file, columns=list(columns)).to_pydict()
    labels = _features(schema.metadata or {})
    for column in columns:
        if column in labels:
            try:
                values[column] = [_named(value, labels[column]) for value in values[column]]
            except ValueError as error:
                raise ValueError(f"{name}: {file}, column {column!r}: {error}") from None
    raw = pd.DataFrame({column: pd.Series(values[column], dtype=object) for column in columns})
    return raw.assign(file=file, row=range(len(raw)))


def _features(metadata: dict[bytes, bytes]) -> dict:
    """What the library datasets says of a file's columns; empty where it says nothing."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _named(value: Any, feature: Any) -> Any:
    """A value with its labels' names in place of their numbers, also within lists and structs; -1 is no label."""
    if value is None or not isinstance(feature, (dict, list)):
        return value
    if isinstance(feature, list):
        return [_named(item, feature[0]) for item in value] if feature else value
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names") or []
        if isinstance(value, int) and not -1 <= value < len(names):
            raise ValueError(f"the label {value} has no name, there are {len(names)}")
        return (names[value] if value >= 0 else None) if isinstance(value, int) else value
    if isinstance(value, list):
        return [_named(item, feature.get("feature")) for item in value]
    if isinstance(value, dict) and "_type" not in feature:
        return {key: _named(item, feature.get(key)) for key, item in value.items()}
    return value


def without_picture(file: Path, column: str) -> set[int]:
    """The rows whose picture is null. Where the file's statistics count none, no picture is read."""
    metadata = pq.read_metadata(file)
    rows: set[int] = set()
    first = 0
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        leaves = [group.column(i) for i in range(group.num_columns)]
        counts = [leaf.statistics.null_count if leaf.statistics and leaf.statistics.has_null_count else None
                  for leaf in leaves if leaf.path_in_schema in (column, f"{column}.bytes")]
        if counts != [0]:
            values = pq.ParquetFile(file).read_row_group(g, columns=[column])[column].combine_chunks()
            if pa.types.is_struct(values.type):
                values = pc.struct_field(values, "bytes")
            rows |= {first + i for i, null in enumerate(values.is_null().to_pylist()) if null}
        first += group.num_rows
    return rows


def own_questions(file: Path, name: str) -> pd.DataFrame:
    """A file of any columns and `image`, with `picture` and `shown`, which is the same for equal pictures."""
    raw = read(file, ["question", "answer"], ["image"], name)  # its errors first
    raw = read(file, [column for column in pq.read_schema(file).names if column != "image"], ["image"], name)
    digests: list[str] = []
    for batch in pq.ParquetFile(file).iter_batches(64, columns=["image"]):
        for value in batch["image"].to_pylist():
            data = value["bytes"] if isinstance(value, dict) else value
            digests.append(hashlib.sha256(data or b"").hexdigest()[:16])
    empty = without_picture(file, "image")
    pictures = [[None if row in empty else Picture(file, "image", row)] for row in raw.row]
    return raw.assign(picture=pd.Series(pictures, dtype=object), shown=pd.Series(digests, dtype=object))


def pictures_by_id(files: Iterable[Path], name: str) -> dict[str, Picture]:
    """The images of files that hold nothing else, by their `id`."""
    return {str(row.id): Picture(file, "image", row.row)
            for file in files for empty in [without_picture(file, "image")]
            for row in read(file, ["id"], ["image"], name).itertuples() if row.row not in empty}
