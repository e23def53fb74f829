"""What chapters have in common: pictures, questions about them, the model beside its controls, and its answers."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from sinkstudy import benchmarks, paths, progress, stats
from sinkstudy.answers.evaluate import Intervention, evaluate, judged
from sinkstudy.benchmarks.files import TABLES
from sinkstudy.model import loading
from sinkstudy.model.lvlm import LVLM
from sinkstudy.pictures import folder, opened
from sinkstudy.world import benchmarks as lab_benchmarks
from sinkstudy.world import drawing
from sinkstudy.world import questions as lab

FORMS = (".parquet", *TABLES)  # of a benchmark in one file
LAB_BENCHMARKS: dict[str, Callable[..., pd.DataFrame]] = {
    "POPE": lab_benchmarks.pope, "MME": lab_benchmarks.mme, "MMStar": lab_benchmarks.mmstar,
    "GQA": lab_benchmarks.gqa, "ScienceQA-IMG": lab_benchmarks.scienceqa, "TextVQA": lab_benchmarks.textvqa,
    "MMMU": lab_benchmarks.mmmu, "MathVista": lab_benchmarks.mathvista,
}  # fmt: skip
REPORTED = {  # columns of the paper's tables -> the benchmarks that each adds up
    "LLaVA-eval average": ("GQA", "ScienceQA-IMG", "TextVQA", "MMMU"),
    "MME all": ("MME",),
    "MathVista": ("MathVista",),
}
FEW = 5  # pictures that differ: with fewer, a bootstrap or a variance says little


def pictures(images_dir: str, limit: int) -> tuple[list[Any], drawing.Scenes | None]:
    """The first `limit` pictures of a folder, in order of name; without a folder the lab's test scenes, with facts.

    Args:
        images_dir: a path, from the project's root; empty for the lab.

    Returns:
        The pictures, `pictures.File` to be opened when they are needed, or of the lab uint8 [3, 96, 96]; and the lab's
        scenes, or None.

    Raises:
        ValueError: as `pictures.folder`.
    """
    if not images_dir:
        scenes = drawing.render("test", 0, limit)
        return list(scenes.images), scenes
    found, others = folder(paths.place(images_dir), limit)
    if others:
        progress.say(f"{images_dir}: {others} files that are no pictures passed over")
    return found, None


def questions(scenes: drawing.Scenes | None, n: int, prompt: str, seed: int) -> pd.DataFrame:
    """What is asked about each picture: of the lab a global, a local and a mixed question, drawn at random.

    Args:
        scenes: the lab's scenes; None for other pictures, which are all asked `prompt`.
        n: the number of pictures.
        seed: of the draw.

    Returns:
        A row a question, the rows of a picture together: `id`, `image` (index), `image_id`, `type` (global, local or
        mixed; generic for other pictures), `family`, `question`, `answer` (None if it is not known).
    """
    rng, rows = random.Random(seed), []
    if scenes is None:
        rows = [{"image": i, "type": "generic", "family": None, "question": prompt, "answer": None} for i in range(n)]
    for image, facts in enumerate([] if scenes is None else lab.facts(scenes)):
        for kind in ("global", "local", "mixed"):
            families = [family for family, of in lab.TYPES.items() if of == kind]
            asked = (lab.ask(facts, family, rng) for family in rng.sample(families, len(families)))
            q = next(q for q in asked if q is not None)
            rows.append({"image": image, "type": kind, "family": q.family, "question": q.text, "answer": q.answer})
    table = pd.DataFrame(rows)
    table.insert(0, "id", [f"{image}-{i}" for i, image in enumerate(table.image)])
    return table.assign(image_id=table.image.map(str))


def load(
    model: str,
    controls: Sequence[str],
    picture: Any,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
) -> tuple[dict[str, LVLM], list[str]]:
    """The model of the run and, beside it, those controls that are there and cut `picture` into the same patches.

    Args:
        picture: one of those that will be shown.
        revision: of the model, if it is one of the hub; not of the controls.

    Returns:
        The models by the name of their run, the model first; and the names of the controls that are left out. Why is
        said on stderr.

    Raises:
        ValueError: as `loading.load`, for the model itself.
    """
    lvlms, left_out = {paths.slug(model): loading.load(model, device=device, dtype=dtype, revision=revision)}, []
    own = patch_grid(lvlms[paths.slug(model)], picture)
    for name in controls:
        try:
            control = loading.load(name, device=device, dtype=dtype)
            if (grid := patch_grid(control, picture)) != own:
                raise ValueError(f"cuts a picture into {grid} (tiles, rows, columns), not {own}")
        except ValueError as problem:  # it is not there, say, or takes no picture of this size
            progress.say(f"{name} is left out of the controls: {problem}")
            left_out.append(name)
            continue
        if name != model:
            lvlms[paths.slug(name)] = control
    return lvlms, left_out


def patch_grid(lvlm: LVLM, picture: Any) -> tuple[int, int, int]:
    """(tiles, rows, columns) of the patches of a picture; rows and columns are those of a tile."""
    layout = lvlm.layout(lvlm.inputs([picture], [""]))[0]
    return layout.tiles, *layout.grid


def same_patches(lvlm: LVLM, other: LVLM, pictures: Sequence[Any]) -> bool:
    """Do two models cut every picture into the same patches? Pictures of a folder may differ in size."""
    try:
        return all(patch_grid(lvlm, picture) == patch_grid(other, picture) for picture in pictures)
    except ValueError:  # a model that takes pictures of one size only
        return False


def benchmark(
    name: str, data_dir: str, hub: bool, limit: int, simple: bool = False
) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """A benchmark's questions and pictures: public ones from files or the hub, otherwise the lab's.

    Args:
        name: of `benchmarks.load`; of the lab one of `LAB_BENCHMARKS`.
        data_dir: a folder with a folder or file for each benchmark, by its name in any case, in any form that
            `benchmarks.load` reads; from the project's root. Empty for the lab.
        hub: public data from the Hugging Face Hub, at the pinned revisions.
        limit: the number of pictures at most, as many of each category, and one of each at least; 0 for all. Where
            categories ask about the same pictures, as POPE's do, they share them.
        simple: whether the lab's MME and MMStar are asked about simple scenes as well, as often as about dense ones.

    Returns:
        The table of `benchmarks.load`, and the picture of each `image_id`; None if the data are not there. What one
        picture cannot answer is left out; this and what else the table lacks is said on stderr.

    Raises:
        ValueError: as `benchmarks.load`, or two folders or files of one benchmark.
    """
    if data_dir or hub:
        place = None if hub else _place(paths.place(data_dir), name)
        if not hub and place is None:
            return None
        table = benchmarks.askable(benchmarks.load(name, path=place))
        for line in benchmarks.remarks(table):
            progress.say(line)
    elif name in LAB_BENCHMARKS:
        table = LAB_BENCHMARKS[name]()
        if simple and name in ("MME", "MMStar"):
            others = LAB_BENCHMARKS[name](split="test" + drawing.SIMPLE)
            table = pd.concat([table, others.assign(id="simple " + others.id)], ignore_index=True)
    else:
        return None
    if limit:
        apart = ["category", "simple"] if "simple" in table else "category"
        place = table.groupby(apart).image_id.transform(lambda images: pd.factorize(images)[0])  # within the category
        shown = place.groupby(table.image_id).min().value_counts().sort_index().cumsum()  # pictures up to each place
        last = shown.index[shown <= limit].max() if shown.iloc[0] <= limit else 0
        table = table[place <= last].reset_index(drop=True)
    if data_dir or hub:
        return table, dict(zip(table.image_id, table["image"], strict=True))
    pixels, row = lab_benchmarks.render_pictures(table)
    return table, {image: pixels[i] for image, i in zip(table.image_id, row, strict=True)}


def _place(folder: Path, name: str) -> Path | None:
    """The folder or file of a benchmark in a folder, by its name in any case, or None."""
    there = folder.iterdir() if folder.is_dir() else ()
    found = sorted(p for p in there if (p.name if p.is_dir() else p.stem).lower() == name.lower()
                   and (p.is_dir() or p.suffix.lower() in FORMS))
    if len(found) > 1:
        raise ValueError(f"{name} is in {folder} twice: {' and '.join(p.name for p in found)}; leave one")
    return found[0] if found else None


def load_benchmarks(
    names: Sequence[str], data_dir: str, hub: bool, limit: int, simple: bool = False, also: Sequence[str] = ()
) -> tuple[dict[str, pd.DataFrame], dict[str, dict[str, Any]]]:
    """`benchmark` for each name, and for those of `also`: tables, and pictures, of those that are there.

    Raises:
        ValueError: none of `names` is.
    """
    found = {name: of for name in dict.fromkeys([*names, *also])
             if (of := benchmark(name, data_dir, hub, limit, simple)) is not None}
    if not set(names) & set(found):
        raise ValueError(f"none of {', '.join(names)} is there: data_dir {data_dir!r} needs a folder or file for each")
    return {name: of[0] for name, of in found.items()}, {name: of[1] for name, of in found.items()}


def prompt_family(lvlm: LVLM, public: bool) -> str:
    """Whose prompts a model is asked with: the lab's own on the lab's data, otherwise those of its family."""
    return benchmarks.FAMILIES.get(lvlm.model.config.model_type, "llava") if public else "lab"


def answers(
    lvlm: LVLM,
    benchmark: str,
    table: pd.DataFrame,
    pictures: Mapping[str, Any],
    interventions: Sequence[Intervention],
    *,
    public: bool,
    blind: Any | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """A model's answers to a benchmark, in the words of `prompt_family`, judged by the benchmark's official rule.

    Args:
        table, pictures: what `benchmark` gives.
        blind: a picture that is shown in place of all of them.
        settings: further ones of `evaluate`.

    Returns:
        The rows of `evaluate` with those of `judged`, `benchmark`, and `picture`, the image's id behind the benchmark's
        name. What a benchmark asks twice, as POPE does, is answered once.

    Raises:
        ValueError: as `evaluate`.
    """
    asked = table.assign(question=benchmarks.prompts(table, benchmark, prompt_family(lvlm, public)))
    asked = asked.drop(columns="image", errors="ignore")
    where = ["image_id", "question"] if blind is None else ["question"]
    once = asked.drop_duplicates(where)
    if blind is not None:
        once, pictures = once.assign(image_id="blind"), {"blind": blind}
    if benchmark == "MMStar":
        settings.setdefault("candidates", [tuple("ABCD")] * len(once))
    said = evaluate(lvlm, once, interventions, images=pictures, **settings)
    new = said[[*where, *said.columns.difference(asked.columns)]]
    parts = [asked.merge(of, on=where, how="left") for _, of in new.groupby("intervention", sort=False)]
    said = judged(pd.concat(parts, ignore_index=True), benchmark)
    return said.assign(benchmark=benchmark, picture=benchmark + " " + said.image_id.astype(str))


def mean_picture(pictures: Iterable[Any]) -> Any:
    """What is shown instead of a picture: the mean of all, of files brought to 336 × 336 pixels."""
    first, *_ = pictures = list(pictures)
    if isinstance(first, torch.Tensor):  # the lab's, all of one size
        return torch.stack(pictures).float().mean(0).round().to(torch.uint8)
    resized = (opened(of).resize((336, 336), Image.Resampling.BILINEAR) for of in pictures)
    return Image.fromarray((sum(np.asarray(of, float) for of in resized) / len(pictures)).round().astype(np.uint8))


def mean_of_benchmarks(said: pd.DataFrame, measure: str, seed: int = 0) -> stats.Interval:
    """Mean of a column of `answers`, each benchmark counting alike, with its 95 % bootstrap interval over pictures.

    Pictures are drawn within each benchmark. Rows without a value do not count. The interval is the percentiles'.
    In `right`, of several benchmarks, it has the width of the rule of three at least where hardly a picture differs.
    """
    said = said.dropna(subset=measure)
    if said.empty:
        return stats.NOTHING
    found = stats.mean_interval(
        said[measure], clusters=said.picture, strata=said.benchmark, method="percentile", seed=seed
    )
    return _widened(found, said, measure, said[measure])


def long(said: pd.DataFrame) -> pd.DataFrame:
    """Answers with a row a measure, "right" and "logp": its number is the `value`."""
    return said.melt([c for c in said if c not in ("right", "logp")], ["right", "logp"], var_name="measure")


def means(rows: pd.DataFrame, by: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """`mean_of_benchmarks` of each benchmark, and of all together ("mean"), in each cell.

    Args:
        rows: as `long` returns them, or differences of such values.
        by: further columns that name a cell.

    Returns:
        `by`, `benchmark`, `measure`, `value`, `low`, `high` and `n` (pictures).
    """
    found = []
    for (*cell, measure), of in rows.groupby([*by, "measure"], sort=False):
        of = of.rename(columns={"value": measure})
        for benchmark, part in (*of.groupby("benchmark", sort=False), ("mean", of)):
            found.append((*cell, benchmark, measure, *mean_of_benchmarks(part, measure, seed)))
    return pd.DataFrame(found, columns=[*by, "benchmark", "measure", "value", "low", "high", "n"])


def reported(said: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Answers whose mean, as `mean_of_benchmarks` and `mean_of_seeds` take it, is a column of the paper's tables.

    "LLaVA-eval average" is the mean of four accuracies, "MME all" the sum over MME's categories of accuracy and acc+,
    "MathVista" an accuracy. A column of which a benchmark is missing is left out.

    Args:
        said: rows of `answers`, with `category`.
        by: further columns that name a cell.

    Returns:
        `by`, `column`, `benchmark` (of MME the category), `id`, `picture` and `right` (0 to 100), a row a question, of
        MME a picture and category; and `scale`, by which a mean is multiplied.
    """
    found = []
    for column, names in REPORTED.items():
        of = said[said.benchmark.isin(names)]
        if set(names) <= set(of.benchmark):
            scale = 1
            if names == ("MME",):
                pairs = of.groupby([*by, "category", "picture"], sort=False).right.agg(["mean", "min"]).reset_index()
                name = pairs.category + " " + pairs.picture  # a name that categories share is two pictures
                of = pairs.assign(benchmark=pairs.category, id=name, picture=name,
                                  right=(pairs["mean"] + pairs["min"]) / 2)
                scale = 2 * of.category.nunique()
            found.append(of[[*by, "benchmark", "id", "picture", "right"]].assign(column=column, scale=scale))
    columns = [*by, "column", "benchmark", "id", "picture", "right", "scale"]
    return (pd.concat(found, ignore_index=True) if found else pd.DataFrame()).reindex(columns=columns)


def scaled(found: stats.Interval, scale: float) -> stats.Interval:
    """An interval in another unit, so many times as large."""
    return found._replace(value=scale * found.value, low=scale * found.low, high=scale * found.high)


def mean_of_seeds(said: pd.DataFrame, seeds: Sequence[Any], measure: str) -> tuple[stats.Interval, float]:
    """Mean over the columns `seeds`, one for each training, with a 95 % t interval over seeds and pictures.

    Benchmarks count alike, as in `mean_of_benchmarks`; rows that lack a seed do not count.

    Args:
        said: a row a question: `benchmark`, `picture` and a column for each seed.
        seeds: the names of these columns.
        measure: what they hold, "right" or "logp".

    Returns:
        As `stats.seeds_interval`: the interval, without low and high if there is one seed, and its degrees of freedom.
    """
    said = said.dropna(subset=list(seeds))
    if said.empty:
        return stats.NOTHING, float("nan")
    found, df = stats.seeds_interval(said[list(seeds)], clusters=said.picture, strata=said.benchmark)
    return _widened(found, said, measure, said[list(seeds)].mean(axis=1)), df


def _widened(found: stats.Interval, said: pd.DataFrame, measure: str, values: pd.Series) -> stats.Interval:
    """By the rule of three at least, if fewer than `FEW` pictures of several benchmarks differ in a share.

    Few pictures that differ are no surer than none, but a bootstrap of them hardly varies. `values` are those of the
    rows of `said`. For one benchmark in which no picture differs there is `claims.widen`.
    """
    if measure != "right" or said.benchmark.nunique() < 2 or np.isnan(found.low):
        return found
    pictures = values.groupby([said.benchmark, said.picture]).mean()
    benchmarks = pictures.groupby(level=0)
    if (pictures != benchmarks.transform(lambda of: of.mode()[0])).sum() >= FEW:
        return found
    half = 100 * stats.rule_of_three(benchmarks.ngroups * benchmarks.size().min())
    return found._replace(low=min(found.low, found.value - half), high=max(found.high, found.value + half))
