"""Benchmarks as tidy tables, from their Hugging Face data sets or from local parquet files of the same schema.

One row a question, whatever the benchmark:

- `id`: str, unique; `image_id`: str, the same for questions about the same image;
- `question`, `answer`: str; yes/no answers are lower-case, multiple choice is a letter;
- `category`: str, the part of the benchmark that scores are broken down by;
- `image`: a `parquet.Picture`, decoded when it is opened;
- what the benchmark has beyond that (`Spec.extra`), such as `choices` or `group`.

The lab's benchmarks have the same columns without `image`: their pictures are rendered (`sinkstudy.lab.benchmarks`).
A loaded table says where it comes from in `table.attrs`: benchmark, source, revision, sha256 of each file.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

COLUMNS = ("id", "image_id", "question", "answer", "category")
MME_GROUPS = {  # the fourteen tasks of MME, in its order
    "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
                   "OCR"),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}


@dataclass(frozen=True)
class Spec:
    """One benchmark's data set: where its files are and how its columns become ours."""

    repo: str                    # owner/name on the Hugging Face Hub
    revision: str | None         # commit of the data set; None: not pinned, must be passed to `load`
    splits: dict[str, str]       # name of a split -> pattern of its parquet files
    columns: tuple[str, ...]     # columns that must be there, images aside
    tidy: Callable[[pd.DataFrame], pd.DataFrame]
    images: tuple[str, ...] = ("image",)
    extra: tuple[str, ...] = ()  # columns beyond COLUMNS that scores and prompts need


# --- raw columns to ours; `file` and `row` (place in the file) are added before. Sources: the data sets' own cards ---
def _pope(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(id=raw.category + "-" + raw.question_id.astype(str), image_id=raw.image_source,
                      answer=raw.answer.str.strip().str.lower())


def _mme(raw: pd.DataFrame) -> pd.DataFrame:
    groups = {category: group for group, members in MME_GROUPS.items() for category in members}
    if unknown := set(raw.category) - set(groups):
        raise ValueError(f"MME has no category {sorted(unknown)[0]!r}; it has {', '.join(groups)}")
    number = raw.groupby(["category", "question_id"]).cumcount()  # MME names images, not questions
    return raw.assign(id=raw.category + "/" + raw.question_id + "#" + number.astype(str), image_id=raw.question_id,
                      answer=raw.answer.str.strip().str.lower(), group=raw.category.map(groups))


def _mmstar(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(id=raw["index"].astype(str), image_id=raw["index"].astype(str), answer=raw.answer.str.strip())


def _gqa(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(image_id=raw.imageId, category=[t["structural"] for t in raw.types])


def _science_qa(raw: pd.DataFrame) -> pd.DataFrame:
    name = [f"{Path(file).stem}-{row}" for file, row in zip(raw.file, raw.row, strict=True)]  # the set has no ids
    return raw.assign(id=name, image_id=name, category=raw.subject, answer=[chr(ord("A") + i) for i in raw.answer])


def _text_vqa(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(id=raw.question_id.astype(str), image_id=raw.image_id.astype(str), category="all",
                      answer=[Counter(a).most_common(1)[0][0] for a in raw.answers])


def _mmmu(raw: pd.DataFrame) -> pd.DataFrame:
    choices = [ast.literal_eval(o) if isinstance(o, str) else list(o or []) for o in raw.options]
    subject = raw.id.str.replace(r"^[^_]+_(.+)_\d+$", r"\1", regex=True)  # validation_Art_Theory_7
    return raw.assign(image_id=raw.id, category=subject, choices=choices)


def _math_vista(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(id=raw.pid.astype(str), image_id=raw.image, category=[m["task"] for m in raw.metadata],
                      skills=[m["skills"] for m in raw.metadata])


# The commits are those that public code pins, two or more projects each (seen in November 2026, when no download could
# be tried here). The Hub leads lmms-lab/… on to lmms-lab-encoder/…, with the same commits.
SPECS = {
    "POPE": Spec(  # three splits of 3000 questions about the same 500 images
        repo="lmms-lab/POPE", revision="4db1276663dfa5eb8ad16a52d24c31a09e470896",
        splits={s: f"Full/{s}-*.parquet" for s in ("random", "popular", "adversarial")},
        columns=("question_id", "question", "answer", "image_source", "category"), tidy=_pope),
    "MME": Spec(  # 2374 questions about 1187 images
        repo="lmms-lab/MME", revision="d6c9023f017b564f7b3ccccf5348166bce8fdbcd",
        splits={"test": "data/test-*.parquet"},
        columns=("question_id", "question", "answer", "category"), tidy=_mme, extra=("group",)),
    "MMStar": Spec(  # 1500 questions
        repo="Lin-Chen/MMStar", revision="bc98d668301da7b14f648724866e57302778ab27",
        splits={"val": "mmstar.parquet"},
        columns=("index", "question", "answer", "category", "l2_category"), tidy=_mmstar, extra=("l2_category",)),
    "GQA": Spec(  # 12,578 questions about 398 images, which lie in files of their own
        repo="lmms-lab/GQA", revision="a6e72d6e1b912da88af8b2f9eba05d5ea8ec2dd8",
        splits={"testdev": "testdev_balanced_instructions/*.parquet"},
        columns=("id", "imageId", "question", "answer", "types"), tidy=_gqa,
        images=("testdev_balanced_images/*.parquet",)),
    "ScienceQA-IMG": Spec(  # 2017 questions
        repo="lmms-lab/ScienceQA", revision="69dd4d6b67373d38f96a5badd5d24d0eb5bcdc50",
        splits={"test": "ScienceQA-IMG/test-*.parquet"},
        columns=("question", "choices", "answer", "hint", "subject"), tidy=_science_qa, extra=("choices", "hint")),
    "TextVQA": Spec(  # 5000 questions, ten people's answers to each
        repo="lmms-lab/textvqa", revision="9c0699cd19768ac5ab97568f6b3cbac4c0062884",
        splits={"validation": "data/validation-*.parquet"},
        columns=("question_id", "image_id", "question", "answers"), tidy=_text_vqa, extra=("answers",)),
    "MMMU": Spec(  # 900 questions; up to seven images each: `image` is the first, `images` has all
        repo="lmms-lab/MMMU", revision="364f2e2eb107b36e07ff4c5a15f5947a759cef47",
        splits={"validation": "data/validation-*.parquet"},
        columns=("id", "question", "options", "answer", "question_type"), tidy=_mmmu,
        images=tuple(f"image_{i}" for i in range(1, 8)), extra=("choices", "question_type", "images")),
    "MathVista": Spec(  # 1000 questions; `query` is the question with its options and the authors' instruction
        repo="AI4Math/MathVista", revision="2b6ad69445fbb5695c9b165475e8decdbeb97747",
        splits={"testmini": "data/testmini-*.parquet"},
        columns=("pid", "question", "image", "choices", "precision", "answer", "question_type", "answer_type", "query",
                 "metadata"),
        tidy=_math_vista, images=("decoded_image",),
        extra=("choices", "precision", "question_type", "answer_type", "query", "skills")),
}


def load(name: str, *, path: str | Path | None = None, split: str | None = None, revision: str | None = None,
         limit: int | None = None) -> pd.DataFrame:
    """A benchmark as a tidy table.

    Args:
        name: one of `SPECS`.
        path: a parquet file, or a folder with the data set's files (in its own layout, or any `*.parquet`). Without
            it the data set's files are downloaded from the Hugging Face Hub, or found in its cache.
        split: one of the benchmark's splits; all of them if left out (POPE has three, the others one).
        revision: commit of the data set to download, instead of the pinned one. A branch such as `main` works too;
            `attrs["revision"]` then holds the commit that it stood for.
        limit: keep only the questions about the first so many images.

    Returns:
        Columns `COLUMNS`, `image` and the benchmark's `extra`; see the module's text. `attrs` has `benchmark`,
        `source` (repository or path), `revision` (None for local files), `sha256` ({file: digest}) and `left_out`
        ({reason: [row of file]}): questions that lack what they need, which are said on stderr too.

    Raises:
        ValueError: unknown name or split, no revision, nothing downloadable, no files, a column that is missing, a
            value of another type than its column has, an empty data set, or a wrong number of questions an image.
    """
    if name not in SPECS:
        raise ValueError(f"unknown benchmark {name!r}; known are {', '.join(SPECS)}")
    spec = SPECS[name]
    if split is not None and split not in spec.splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(spec.splits)}")
    from sinkstudy.benchmarks import parquet  # only now: the lab and the scorers need no parquet

    patterns = [spec.splits[split]] if split else list(spec.splits.values())
    if path is None:
        root, commit = _download(name, spec, patterns, revision or spec.revision)
        files, source = _matching(root, patterns), spec.repo
    else:
        root, commit, source = Path(path), None, str(path)
        # a folder in the data set's layout, or just some files (then the split is what its category column says)
        files = [root] if root.is_file() else _matching(root, patterns) or _matching(root, ["**/*.parquet"])
    if not files:
        raise ValueError(f"{name}: no parquet files in {root} (looked for {', '.join(patterns)})")
    inside = () if name == "GQA" else spec.images  # GQA's images have files of their own
    raw = pd.concat([parquet.read(file, spec.columns, inside, name) for file in files], ignore_index=True)
    if name == "POPE" and split:
        raw = raw[raw.category == split].reset_index(drop=True)
    if raw.empty:
        raise ValueError(f"{name}: the data set is empty ({', '.join(str(f) for f in files)})")
    raw, left_out = _usable(raw, name)
    if raw.empty:
        raise ValueError(f"{name}: no question can be asked: {_counted(left_out)}")
    if left_out:
        print(f"{name}: left out: {_counted(left_out)}", file=sys.stderr)
    if name == "GQA":
        more = _matching(root if root.is_dir() else root.parent.parent, spec.images)
        shown = parquet.pictures(more, name)
        if lost := set(raw.imageId) - set(shown):
            raise ValueError(f"GQA: {len(lost)} images, such as {min(lost)!r}, are missing in {spec.images[0]}")
        files, images = files + more, [[shown[i]] for i in raw.imageId]
    else:
        images = [[parquet.Picture(row["file"], spec.images[i], row["row"]) for i in _shown(name, row)]
                  for row in raw.to_dict("records")]
    table = spec.tidy(raw).assign(image=[several[0] for several in images], images=images)
    table = table[[*COLUMNS, "image", *spec.extra]]
    if limit is not None:
        table = table[table.image_id.isin(table.image_id.drop_duplicates().head(limit))].reset_index(drop=True)
    check(table, name)
    table.attrs = {"benchmark": name, "source": source, "revision": commit, "left_out": left_out,
                   "sha256": {str(_within(file, root)): parquet.sha256(file) for file in files}}
    return table


# What a column holds, where it is not text; a value that is null or empty there leaves its question out. None among the
# types: it may be null.
_HOLDS: dict[str, tuple] = {
    "question_id": (str, int), "index": (str, int), "id": (str, int), "pid": (str, int), "image_id": (str, int),
    "imageId": (str, int), "choices": (list, None), "answers": (list,), "types": (dict,), "metadata": (dict,),
    "options": (str, list, None), "precision": (int, float, None), "hint": (str, None),
}  # fmt: skip
_INSIDE = {"types": ("structural",), "metadata": ("task", "skills")}  # what a struct must hold


def _usable(raw: pd.DataFrame, name: str) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """The rows that have all that a question needs; and for each reason those that have not.

    Raises:
        ValueError: a value of a type that its column cannot have: the file is of another form, not just incomplete.
    """
    keep, left_out = [], {}
    for place, row in enumerate(raw.to_dict("records")):
        where = f"row {row['row']} of {row['file']}"
        reason = ""
        for column in SPECS[name].columns:
            value, holds = row[column], _HOLDS.get(column, (str,))
            if (name, column) == ("ScienceQA-IMG", "answer"):
                holds = (int,)  # the place among the choices
            if value is None or (isinstance(value, float) and value != value):
                reason = reason or ("" if None in holds else f"no {column}")
                continue
            types = tuple(kind for kind in holds if kind is not None)
            if not isinstance(value, types) or isinstance(value, bool):
                wanted = " or ".join({str: "text", int: "a whole number"}.get(kind, kind.__name__) for kind in types)
                raise ValueError(f"{name}: {where}: column {column!r} holds {str(value)[:40]!r}, which is not {wanted}")
            if isinstance(value, (str, list)) and not value and None not in holds:
                reason = reason or f"no {column}"
            for inner in _INSIDE.get(column, ()):
                if isinstance(value, dict) and value.get(inner) is None:
                    reason = reason or f"no {column}.{inner}"
            if isinstance(value, list) and any(item is None for item in value):
                reason = reason or f"a null among its {column}"
        if reason:
            left_out.setdefault(reason, []).append(where)
        else:
            keep.append(place)
    usable = raw.iloc[keep].reset_index(drop=True)
    if "hint" in usable:
        usable["hint"] = [hint or "" for hint in usable.hint]
    return usable.infer_objects(), left_out


def _counted(left_out: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{len(rows)} with {reason} ({rows[0]}{' ..' * (len(rows) > 1)})" for reason, rows in left_out.items()
    )


def check(table: pd.DataFrame, name: str, needs: Iterable[str] = ()) -> None:
    """Make sure that a table, loaded or made in the lab, is what the scorers of `name` expect.

    Raises:
        ValueError: unknown benchmark; no rows; a column that is missing (`COLUMNS`, the benchmark's own, `needs`); an
            id twice; a POPE or MME answer that is not yes or no; an MME image and category without exactly two
            questions; an MMStar answer that is not A, B, C or D.
    """
    if name not in SPECS:
        raise ValueError(f"unknown benchmark {name!r}; known are {', '.join(SPECS)}")
    if missing := [c for c in (*COLUMNS, *SPECS[name].extra, *needs) if c not in table.columns]:
        raise ValueError(f"{name}: the table has no column {missing[0]!r}; it has {', '.join(table.columns)}")
    if table.empty:
        raise ValueError(f"{name}: the table is empty")
    if table.id.duplicated().any():
        raise ValueError(f"{name}: the id {table.id[table.id.duplicated()].iloc[0]!r} occurs twice")
    allowed = {"POPE": ("yes", "no"), "MME": ("yes", "no"), "MMStar": tuple("ABCD")}.get(name)
    if allowed and not table.answer.isin(allowed).all():
        odd = table[~table.answer.isin(allowed)].iloc[0]
        raise ValueError(f"{name}: the answer of {odd.id!r} is {odd.answer!r}, not one of {', '.join(allowed)}")
    if name == "MME":
        asked = table.groupby(["category", "image_id"]).size()
        if (asked != 2).any():
            (category, image), n = asked[asked != 2].index[0], asked[asked != 2].iloc[0]
            raise ValueError(f"MME asks two questions an image; {image!r} in {category!r} has {n}")


def _download(name: str, spec: Spec, patterns: list[str], revision: str | None) -> tuple[Path, str]:
    """The folder of the data set's snapshot, and its commit."""
    if revision is None:
        raise ValueError(f"{name}: no revision of {spec.repo} is pinned; pass revision=<commit> "
                         f"(listed at https://huggingface.co/datasets/{spec.repo}/commits/main), or path=<folder>")
    from huggingface_hub import snapshot_download  # only now: local files need no hub

    wanted = [*patterns, *(i for i in spec.images if i.endswith(".parquet"))]
    try:
        folder = Path(snapshot_download(spec.repo, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except Exception as error:  # offline, unknown repository, unknown commit: one sentence for all
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: {spec.repo} at {revision} cannot be had from the Hub: {reason}") from None
    return folder, folder.name  # the hub's cache names a snapshot's folder by its commit


def _matching(root: Path, patterns: Iterable[str]) -> list[Path]:
    return [file for pattern in patterns for file in sorted(root.glob(pattern))] if root.is_dir() else []


def _shown(name: str, row: dict) -> list[int]:
    """Which image columns a question shows. MMMU names them in question and options, <image 1> to <image 7>."""
    if name != "MMMU":
        return [0]
    return sorted({int(n) - 1 for n in re.findall(r"<image ([1-7])>", f"{row['question']} {row['options']}")}) or [0]


def _within(file: Path, root: Path) -> Path:
    return file.relative_to(root) if root in file.parents else Path(file.name)
