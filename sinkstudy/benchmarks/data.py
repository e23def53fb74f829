"""Benchmarks as tidy tables, from their Hugging Face data sets or from local files, in whichever form they lie there.

One row a question, whatever the benchmark:

- `id`: str, unique; `image_id`: str, the same for questions about the same image;
- `question`, `answer`: str; yes/no answers are lower-case, multiple choice is a letter;
- `category`: str, the part of the benchmark that scores are broken down by;
- `image`: a `parquet.Picture`, `pictures.File` or `files.Cell`, decoded when it is opened;
- what the benchmark has beyond that (`Source.extra`), such as `choices` or `group`.

The lab's benchmarks have the same columns without `image`: their pictures are rendered (`sinkstudy.world.benchmarks`).
A loaded table says where it comes from in `table.attrs`: benchmark, source, revision, sha256 of each file; and what was
left out of it, by the ids.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pandas as pd

from sinkstudy import digests, progress
from sinkstudy.benchmarks import files as plain
from sinkstudy.benchmarks import rows
from sinkstudy.paths import below

COLUMNS = ("id", "image_id", "question", "answer", "category")
OWN = "own"  # questions of one's own
MME_GROUPS = {  # the fourteen tasks of MME, in its order
    "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
                   "OCR"),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
_MME_GROUP_OF = {category: group for group, members in MME_GROUPS.items() for category in members}


@dataclass(frozen=True)
class Source:
    """One benchmark's data set: where its files are and how its columns become ours."""

    repo: str | None             # owner/name on the Hugging Face Hub; None: only local files
    revision: str | None         # commit of the data set; None: not pinned, must be passed to `load`
    splits: dict[str, str]       # name of a split -> pattern of its parquet files
    row: type[rows.Row]          # what each row holds, images aside
    tidy: Callable[[pd.DataFrame], pd.DataFrame]
    questions: int | None = None  # how many there are
    images: tuple[str, ...] = ("image",)
    extra: tuple[str, ...] = ()  # columns beyond COLUMNS that scores and prompts need
    table: Callable[[pd.DataFrame], pd.DataFrame] | None = None  # from VLMEvalKit's columns to the data set's

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that have to be in a file of the data set, images aside."""
        return tuple(name for name, field in self.row.model_fields.items() if field.is_required())


# --- raw columns to ours; `file` and `row` (place in the file) are added before. Sources: the data sets' own cards ---
def _pope(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(id=raw.category + "-" + raw.question_id, image_id=raw.image_source)


def _mme(raw: pd.DataFrame) -> pd.DataFrame:
    if unknown := set(raw.category) - set(_MME_GROUP_OF):
        raise ValueError(f"MME has no category {min(unknown)!r}; it has {', '.join(_MME_GROUP_OF)}")
    number = raw.groupby(["category", "question_id"]).cumcount()  # MME names images, not questions
    return raw.assign(id=raw.category + "/" + raw.question_id + "#" + number.astype(str), image_id=raw.question_id,
                      group=raw.category.map(_MME_GROUP_OF))


def _mmstar(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(id=raw["index"], image_id=raw["index"], answer=raw.answer.str.strip())


def _gqa(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(image_id=raw.imageId, category=[t["structural"] for t in raw.types])


def _science_qa(raw: pd.DataFrame) -> pd.DataFrame:
    name = [f"{Path(file).stem}-{row}" for file, row in zip(raw.file, raw.row, strict=True)]  # the set has no ids
    return raw.assign(id=name, image_id=name, category=raw.subject, answer=[rows.letters(26)[i] for i in raw.answer])


def _text_vqa(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(id=raw.question_id, category="all",
                      answer=[Counter(a).most_common(1)[0][0] for a in raw.answers])


def _mmmu(raw: pd.DataFrame) -> pd.DataFrame:
    subject = raw.id.str.replace(r"^[^_]+_(.+)_\d+$", r"\1", regex=True)  # validation_Art_Theory_7
    return raw.assign(image_id=raw.id, category=subject, choices=raw.options)


def _math_vista(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(id=raw.pid, image_id=raw.image, category=[m["task"] for m in raw.metadata],
                      skills=[m["skills"] for m in raw.metadata])


# The commits are those that public code pins, two or more projects each (seen in November 2026, when no download could
# be tried here). The Hub leads lmms-lab/… on to lmms-lab-encoder/…, with the same commits.
SOURCES = {
    "POPE": Source(  # three splits of 3000 questions about the same 500 images
        repo="lmms-lab/POPE", revision="4db1276663dfa5eb8ad16a52d24c31a09e470896",
        splits={s: f"Full/{s}-*.parquet" for s in ("random", "popular", "adversarial")},
        row=rows.Pope, tidy=_pope, questions=9000, table=plain.pope_table),
    "MME": Source(  # 2374 questions about 1187 images
        repo="lmms-lab/MME", revision="d6c9023f017b564f7b3ccccf5348166bce8fdbcd",
        splits={"test": "data/test-*.parquet"},
        row=rows.Mme, tidy=_mme, questions=2374, extra=("group",), table=plain.mme_table),
    "MMStar": Source(  # 1500 questions
        repo="Lin-Chen/MMStar", revision="bc98d668301da7b14f648724866e57302778ab27",
        splits={"val": "mmstar.parquet"},
        row=rows.MmStar, tidy=_mmstar, questions=1500, extra=("l2_category",), table=plain.mmstar_table),
    "GQA": Source(  # 12,578 questions about 398 images, which lie in files of their own
        repo="lmms-lab/GQA", revision="a6e72d6e1b912da88af8b2f9eba05d5ea8ec2dd8",
        splits={"testdev": "testdev_balanced_instructions/*.parquet"},
        row=rows.Gqa, tidy=_gqa, questions=12578, images=("testdev_balanced_images/*.parquet",)),
    "ScienceQA-IMG": Source(  # 2017 questions
        repo="lmms-lab/ScienceQA", revision="69dd4d6b67373d38f96a5badd5d24d0eb5bcdc50",
        splits={"test": "ScienceQA-IMG/test-*.parquet"},
        row=rows.ScienceQa, tidy=_science_qa, questions=2017, extra=("choices", "hint"), table=plain.science_qa_table),
    "TextVQA": Source(  # 5000 questions, ten people's answers to each
        repo="lmms-lab/textvqa", revision="9c0699cd19768ac5ab97568f6b3cbac4c0062884",
        splits={"validation": "data/validation-*.parquet"},
        row=rows.TextVqa, tidy=_text_vqa, questions=5000, extra=("answers",), table=plain.text_vqa_table),
    "MMMU": Source(  # 900 questions; up to seven images each: `image` is the first, `images` has all
        repo="lmms-lab/MMMU", revision="364f2e2eb107b36e07ff4c5a15f5947a759cef47",
        splits={"validation": "data/validation-*.parquet"},
        row=rows.Mmmu, tidy=_mmmu, questions=900,
        images=tuple(f"image_{i}" for i in range(1, 8)), extra=("choices", "question_type", "images")),
    "MathVista": Source(  # 1000 questions; `query` is the question with its options and the authors' instruction
        repo="AI4Math/MathVista", revision="2b6ad69445fbb5695c9b165475e8decdbeb97747",
        splits={"testmini": "data/testmini-*.parquet"},
        row=rows.MathVista, tidy=_math_vista, questions=1000, images=("decoded_image",),
        extra=("choices", "precision", "question_type", "answer_type", "query", "skills")),
    OWN: Source(
        repo=None, revision=None, splits={"all": "**/*.parquet"},
        row=rows.Own, tidy=lambda raw: raw, extra=("choices", "hint", "answers"), table=plain.own_table),
}


def load(name: str, *, path: str | Path | None = None, split: str | None = None, revision: str | None = None,
         limit: int | None = None) -> pd.DataFrame:
    """A benchmark as a tidy table.

    Args:
        name: one of `SOURCES`.
        path: a file, or a folder with the data set's files: parquet in its own layout or any other; POPE's JSON lines
            or MME's folders; one table, `questions.*` or by the benchmark's name, in CSV, TSV, JSON or JSON lines with
            the data set's columns or VLMEvalKit's. Without it the data set's files are downloaded from the Hugging
            Face Hub, or found in its cache.
        split: one of the benchmark's splits; all of them if left out (POPE has three, the others one).
        revision: commit of the data set to download, instead of the pinned one. A branch such as `main` works too;
            `attrs["revision"]` then holds the commit that it stood for.
        limit: keep only the questions about the first so many images.

    Returns:
        Columns `COLUMNS`, `image` and the benchmark's `extra`; see the module's text. `attrs` has `benchmark`,
        `source` (repository or path), `revision` (None for local files), `sha256` ({file: digest}; not of pictures in
        files of their own) and `left_out` ({why: ids or places in files}): questions that lack something or, in a
        table, have several pictures; they are said on stderr too.

    Raises:
        ValueError: unknown name or split, no revision, nothing downloadable, no files or in two forms, a column that
            is missing, a value of another form than its column has, an empty data set, or a wrong number of questions
            an image.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown benchmark {name!r}; known are {', '.join(SOURCES)}")
    spec = SOURCES[name]
    if split is not None and split not in spec.splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(spec.splits)}")
    patterns = [spec.splits[split]] if split else list(spec.splits.values())
    if path is None:
        root, commit = _download(name, spec, patterns, revision or spec.revision)
        raw, files = _parquet(name, spec, root, _matching(root, patterns))
        source = spec.repo
    else:
        root, commit, source = Path(path), None, str(path)
        raw, files = _local(name, spec, root, patterns)
    if raw.empty:
        raise ValueError(f"{name}: the data set is empty ({', '.join(str(f) for f in files)})")
    whole, left_out = rows.checked(raw, spec.row, name)
    table = spec.tidy(whole).assign(images=raw.picture)
    if "shown" in raw.columns and name in ("MMStar", "ScienceQA-IMG"):  # sets without names of pictures
        table = table.assign(image_id=raw.shown)
    if name == "POPE" and split:
        table = table[table.category == split].reset_index(drop=True)
    several = table.images.map(lambda shown: len(shown) > 1 and not any(shown))
    table, left_out = _without(table, "several pictures", several, left_out)
    table, left_out = _without(table, "no picture", ~table.images.map(all), left_out)
    if table.empty:
        raise ValueError(f"{name}: no question can be asked: {rows.counted(left_out)}")
    if "shown" in raw.columns:
        pictures = raw.shown[table.index].groupby(table.image_id).nunique()
        if (pictures > 1).any():
            raise ValueError(f"{name}: {pictures.idxmax()!r} names {pictures.max()} different pictures")
    table = table.assign(image=pd.Series([several[0] for several in table.images], index=table.index, dtype=object))
    table = table[[*COLUMNS, "image", *spec.extra]].reset_index(drop=True)
    if limit is not None:
        table = table[table.image_id.isin(table.image_id.drop_duplicates().head(limit))].reset_index(drop=True)
    check(table, name)
    table.attrs = {"benchmark": name, "source": source, "revision": commit, "left_out": left_out,
                   "sha256": _digests(files, root)}
    if left_out:
        progress.say(f"{name}: left out: {rows.counted(left_out)}")
    return table


def _digests(files: list[Path], root: Path) -> dict[str, str]:
    """SHA-256 of each file; of hundreds, as MME's texts, that of all their digests."""
    of = {str(file.relative_to(root) if root in file.parents else file.name): digests.sha256(file) for file in files}
    if len(of) < 100:
        return of
    listed = "".join(f"{name} {of[name]}\n" for name in sorted(of))
    return {f"{len(of)} files": hashlib.sha256(listed.encode()).hexdigest()}


def _without(table: pd.DataFrame, why: str, mask: pd.Series, left_out: dict[str, list[str]]
             ) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    ids = table.id[mask].tolist()
    return table[~mask], left_out | ({why: ids} if ids else {})


_SHOWS = re.compile(r"<image ([1-7])>")  # how MMMU names its pictures in question and options


def several_pictures(table: pd.DataFrame) -> pd.Series:
    """Whether a question is about several pictures, or about one that is not the first: bool, with the table's index.

    Such a question cannot be asked with one picture. Only MMMU has them.
    """
    if "images" not in table:
        return pd.Series(False, index=table.index)
    named = [set(_SHOWS.findall(f"{question} {choices}")) - {"1"}
             for question, choices in zip(table.question, table.choices, strict=True)]
    more = [len(shown or ()) > 1 for shown in table["images"]]
    return pd.Series([bool(one or other) for one, other in zip(more, named, strict=True)], index=table.index)


def askable(table: pd.DataFrame) -> pd.DataFrame:
    """The questions that can be asked with one picture; the others are in `attrs["left_out"]`, and said on stderr."""
    kept, several = _without(table, "several pictures", several_pictures(table), {})
    if not several:
        return table
    if kept.empty:
        raise ValueError(f"{table.attrs['benchmark']}: no question can be asked: {rows.counted(several)}")
    kept = kept.reset_index(drop=True)
    kept.attrs = table.attrs | {"left_out": table.attrs.get("left_out", {}) | several}
    name = table.attrs["benchmark"]
    progress.say(f"{name}: left out, since a prompt here has one: {rows.counted(several)}")
    return kept


def remarks(table: pd.DataFrame) -> list[str]:
    """What should be known of a loaded table, beside what was left out: what is missing, an older version."""
    name, said = table.attrs["benchmark"], []
    if name == "MME":
        if missing := [category for category in _MME_GROUP_OF if category not in set(table.category)]:
            known = len(_MME_GROUP_OF)
            said.append(f"MME: {known - len(missing)} of {known} categories, without {', '.join(missing)}")
    if name == "POPE" and (missing := [split for split in SOURCES[name].splits if split not in set(table.category)]):
        said.append(f"POPE: {3 - len(missing)} of 3 categories, without {', '.join(missing)}")
    there, whole = len(table) + sum(map(len, table.attrs.get("left_out", {}).values())), SOURCES[name].questions
    if whole and there < whole:
        said.append(f"{name}: {there} of {whole} questions are there")
    if name == "POPE" and (table.category == "random").sum() == 2910:
        said.append("POPE: the random part is the older one of 2910 questions; today's has 3000")
    return said


def check(table: pd.DataFrame, name: str, needs: Iterable[str] = ()) -> None:
    """Make sure that a table, loaded or made in the lab, is what the scorers of `name` expect.

    Raises:
        ValueError: unknown benchmark; no rows; a column that is missing (`COLUMNS`, the benchmark's own, `needs`); text
            that is none, a list that is none, or no answer at all; an id twice; a POPE or MME answer that is not yes
            or no; an MME image and category without exactly two questions; an MMStar answer that is not A, B, C or D.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown benchmark {name!r}; known are {', '.join(SOURCES)}")
    if missing := [c for c in (*COLUMNS, *SOURCES[name].extra, *needs) if c not in table.columns]:
        raise ValueError(f"{name}: the table has no column {missing[0]!r}; it has {', '.join(table.columns)}")
    if table.empty:
        raise ValueError(f"{name}: the table is empty")
    for column in (*COLUMNS, *SOURCES[name].extra, *needs):
        for value, row in zip(table[column], table.id, strict=True):
            if what := _unlike(column, value):
                raise ValueError(f"{name}: the {column} of {row!r} is {value!r}, not {what}")
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


_TEXTS = {*COLUMNS, "group", "l2_category", "hint", "query", "question_type", "answer_type"}
_LISTS = {"choices", "answers", "skills"}


def _unlike(column: str, value: object) -> str:
    """What a column of a table should hold and `value` is not; empty if it is."""
    if column in _TEXTS and not isinstance(value, str):
        return "text"
    if column in _LISTS and not isinstance(value, list) and not (column == "choices" and value is None):
        return "a list"
    return ""


# ------------------------------------------------------------------------------------------------- where files are
def _local(name: str, spec: Source, root: Path, patterns: list[str]) -> tuple[pd.DataFrame, list[Path]]:
    """The rows of a file, or of the one form that a folder has, and the files with the questions."""
    forms: dict[str, list[Path]] = {"parquet": [], "POPE's JSON lines": [], "MME's folders": [], "a table": []}
    folders: dict[str, Path] = {}
    if root.is_file():
        is_pope = name == "POPE" and plain.POPE_FILE.search(root.name)
        is_table = root.suffix.lower() in plain.TABLES
        forms["POPE's JSON lines" if is_pope else "a table" if is_table else "parquet"] = [root]
    elif root.is_dir():
        # a folder in the data set's layout, or just some files (then the split is what its category column says)
        forms["parquet"] = _matching(root, patterns) or _matching(root, ["**/*.parquet"])
        if name == "POPE":
            forms["POPE's JSON lines"] = plain.pope_files(root)
        if name == "MME":
            folders = plain.mme_folders(root, list(_MME_GROUP_OF), name)
            forms["MME's folders"] = list(folders.values())
        if not any(forms.values()):
            forms["a table"] = plain.tables(root, name)
    found = [form for form, files in forms.items() if files]
    if not found:
        raise ValueError(f"{name}: no parquet files in {root} (looked for {', '.join(patterns)}), and the questions in "
                         f"no other form (looked for {', '.join(list(forms)[1:])}: {', '.join(plain.TABLES)})")
    if len(found) > 1:
        raise ValueError(f"{name}: {root} has the questions as {' and as '.join(found)}: leave one of them")
    files = forms[found[0]]
    if found == ["parquet"]:
        return _parquet(name, spec, root, files)
    if found == ["POPE's JSON lines"]:
        raw = plain.pope(files, root if root.is_dir() else root.parent, name)
    elif found == ["MME's folders"]:
        raw, files = plain.mme(folders, name)
    else:
        raw = plain.with_pictures(plain.read(files[0], name), root if root.is_dir() else root.parent, name)
        raw = _as_data_set(raw, name, spec)
    pictures = [[None, None] if isinstance(shown, list) else [shown] for shown in raw.picture]  # several: not asked
    return raw.assign(picture=pd.Series(pictures, dtype=object)), files


def _as_data_set(raw: pd.DataFrame, name: str, spec: Source) -> pd.DataFrame:
    """A table with the data set's columns, from these or from VLMEvalKit's."""
    have = [c for c in raw.columns if c not in ("file", "row", "picture", "shown")]
    missing = [c for c in spec.columns if c not in have]
    for file in raw.file[:1]:
        plain.check_columns(have, {*spec.row.model_fields, "A", "index", "image"}, f"{name}: {file}")
    if spec.table is not None and (name == OWN or "index" in have and (missing or "A" in have)):
        try:
            raw = spec.table(raw)
        except KeyError as error:  # a column that the conversion needs
            missing = [error.args[0]]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        else:
            missing = [c for c in spec.columns if c not in raw.columns]
    if missing:
        raise ValueError(f"{name}: column {missing[0]!r} is missing in {raw.file[0]}, which has {', '.join(have)}")
    return raw


def _parquet(name: str, spec: Source, root: Path, files: list[Path]) -> tuple[pd.DataFrame, list[Path]]:
    """The rows of parquet files, with `picture`, a list for each; and the files, those of pictures included."""
    from sinkstudy.benchmarks import parquet

    if not files:
        raise ValueError(f"{name}: no parquet files in {root} (looked for {', '.join(spec.splits.values())})")
    if root.is_dir():  # not one that is asked for by its name
        _check_parts(files, name)
    if name == OWN:
        raw = pd.concat([parquet.own_questions(file, name) for file in files], ignore_index=True)
        return _as_data_set(raw, name, spec), files
    inside = () if name == "GQA" else spec.images  # GQA's images have files of their own
    raw = pd.concat([parquet.read(file, spec.columns, inside, name) for file in files], ignore_index=True)
    if name == "GQA":
        more = _matching(root if root.is_dir() else root.parent.parent, spec.images)
        _check_parts(more, name)
        shown = parquet.pictures_by_id(more, name)
        asked = [None if image is None else str(image) for image in raw.imageId]
        if lost := set(asked) - set(shown) - {None}:
            raise ValueError(f"GQA: {len(lost)} images, such as {min(lost)!r}, are missing in {spec.images[0]}")
        return raw.assign(picture=[[shown.get(image)] for image in asked]), files + more
    empty = {(file, i): parquet.without_picture(file, column) for file in files for i, column in enumerate(inside)}
    shown = [_shown(name, row, [row["row"] not in empty[row["file"], i] for i in range(len(inside))])
             for row in raw.to_dict("records")]
    pictures = [[parquet.Picture(file, inside[i], row) if row not in empty[file, i] else None for i in places]
                for file, row, places in zip(raw.file, raw.row, shown, strict=True)]
    return raw.assign(picture=pd.Series(pictures, dtype=object)), files


_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5}).*")


def _check_parts(files: Iterable[Path], name: str) -> None:
    """Raise ValueError unless of a data set in parts, "test-00000-of-00002", all are there, and each once."""
    parts: dict[Path, dict[int, list[int]]] = {}
    for file in files:
        if found := _PART.fullmatch(file.name):
            parts.setdefault(file.parent / found[1], {}).setdefault(int(found[3]), []).append(int(found[2]))
    for whole, of in parts.items():
        for n, there in of.items():
            if len(of) > 1 or sorted(there) != list(range(n)):
                have = ", ".join(f"{i:05}-of-{n:05}" for n, several in of.items() for i in sorted(several))
                raise ValueError(f"{name}: {whole}-.. has to have each of its parts once, and there are {have}")


def _download(name: str, spec: Source, patterns: list[str], revision: str | None) -> tuple[Path, str]:
    """The folder of the data set's snapshot, and its commit."""
    if spec.repo is None:
        raise ValueError(f"{name}: these questions are yours and not on the Hub; pass path=<folder>")
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
    if lacking := [pattern for pattern in wanted if not _matching(folder, [pattern])]:  # a cache without network, say
        raise ValueError(f"{name}: {folder} has no {lacking[0]}: let it be downloaded again")
    return folder, folder.name  # the hub's cache names a snapshot's folder by its commit


def _matching(root: Path, patterns: Iterable[str]) -> list[Path]:
    """Files of a folder by patterns; those that begin with **/ look below, also behind links, as no glob does."""
    if not root.is_dir():
        return []
    return [file for pattern in patterns for file in (
        [file for file in below(root) if fnmatch(file.name, pattern[3:]) and not file.name.startswith(".")]
        if pattern.startswith("**/") else sorted(root.glob(pattern)))]


def _shown(name: str, row: dict, there: Sequence[bool]) -> list[int]:
    """Which image columns a question shows: those that it names, as MMMU does in question and options, and any more.

    Args:
        there: whether the row has a picture in each column.
    """
    if name != "MMMU":
        return [0]
    named = {int(n) - 1 for n in _SHOWS.findall(f"{row['question']} {row['options']}")}
    return sorted(named | {i for i, has in enumerate(there) if has}) or [0]
