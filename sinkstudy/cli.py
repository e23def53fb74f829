"""The `sinkstudy` command. Heavy imports are made where they are needed, so that it starts at once."""

import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sinkstudy import paths
from sinkstudy.book import engine, parameters

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
lab = typer.Typer(no_args_is_help=True, help="The lab: the embedded world and its models.")
app.add_typer(lab, name="lab")

# glibc gives freed memory back to the system at every training step, which makes a CPU up to seven times slower.
# It reads these settings when a process starts.
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_MMAP_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "100000000",
}


def _in_checkout() -> None:
    """End with exit code 2 and a line that says why where the package was installed without its repository."""
    if paths.CHECKOUT is None:
        typer.echo(
            "sinkstudy: this command works on the notebooks, weights and results of a checkout, and the package was "
            "installed without: clone its repository, run `make setup` there, then call its .venv/bin/sinkstudy",
            err=True,
        )
        raise typer.Exit(2)


@app.command("run")
def run_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Lab models, folders with config.json, or hub ids owner/name."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Beginning of a notebook's name, e.g. 01.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps or auto (all GPUs).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures, or questions, in one forward pass.")] = None,
    limit: Annotated[int | None, typer.Option(help="Number of images.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all that is random.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="Any other parameter.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run, if not the model's.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The run from which verdicts come, with the pictures of data/full.yml.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Notebooks executed at the same time.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Folder of a Snakemake profile: profiles/slurm executes on a cluster.")
    ] = None,
    update_notebooks: Annotated[
        bool, typer.Option("--update-notebooks", help="Store the default run's outputs in notebooks/.")
    ] = False,
) -> None:
    """Execute the notebooks on models: those that are out of date, and no other."""
    _in_checkout()
    options = {"device": device, "dtype": dtype, "revision": revision, "batch_size": batch_size}
    options |= {"limit": limit, "seed": seed}
    given = {key: value for key, value in options.items() if value is not None}
    for item in parameter or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise engine.UserError(f"-p takes NAME=VALUE, not '{item}'")
        if key == "model":
            raise engine.UserError(f"a model is named without -p: sinkstudy run {value}")
        if key in given:
            raise engine.UserError(f"the parameter '{key}' is given twice")
        given[key] = value
    models = models or [paths.DEFAULT_MODEL]
    if profile and not (profile / "config.yaml").is_file():
        raise engine.UserError(f"{profile} is no folder of a Snakemake profile: it has no config.yaml")
    if update_notebooks and (given or name or models != [paths.DEFAULT_MODEL]):
        raise engine.UserError("--update-notebooks is for the default run: no other model, parameter or name")
    if full and (name or update_notebooks or models != [paths.DEFAULT_MODEL]):
        raise engine.UserError("--full is a run of its own, of the default model: no other model or name")
    for run in engine.run(models, only=only or [], given=given, name=name, full=full, jobs=jobs, profile=profile):
        if update_notebooks:
            engine.update_notebooks(only or [])
        typer.echo(f"run {run} is up to date: book/runs/{run}, results/{run}")


@app.command()
def route(
    model: Annotated[str, typer.Argument(help="Lab model, folder with config.json, or hub id owner/name.")],
    method: Annotated[str | None, typer.Option(help="Name of the method; without it, all are listed.")] = None,
    benchmark: Annotated[str, typer.Option(help="pope, mme, mmstar, gqa, .. ; any that is known.")] = "pope",
    limit: Annotated[int | None, typer.Option(help="Pictures, of each category alike; without it all.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps or auto (all GPUs).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions in one forward pass.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Public data: a folder with a folder or file of each.")] = None,
    hub: Annotated[bool | None, typer.Option("--hub", help="Public data from the hub, at pinned revisions.")] = None,
    weight: Annotated[float | None, typer.Option(help="Of the methods features and keys.")] = None,
    k: Annotated[int | None, typer.Option(help="Patches of front- and keep-top-k, neurons of registers.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all that is random.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run, if not the model's.")] = None,
) -> None:
    """Measure one training-free method on one benchmark, beside the untouched model.

    What is not given is as in chapter 10, but for the limit. Answers are kept: a killed command goes on where it was.
    """
    from sinkstudy.effects import methods

    if method is None:
        for name, known in methods.METHODS.items():
            typer.echo(f"{name}: {known.words}" + (f" (--{known.option})" if known.option else ""))
        return
    declared = {
        "model": parameters.Declared(parameters.Model, paths.DEFAULT_MODEL),
        "limit": parameters.Declared(parameters.AtLeast0, 0),
        "device": parameters.Declared(parameters.Device, "cpu"),
        "dtype": parameters.Declared(parameters.Dtype, "float32"),
        "batch_size": parameters.Declared(parameters.AtLeast1, methods.DEFAULTS["batch_size"]),
        "revision": parameters.Declared(parameters.Revision, ""),
        "data_dir": parameters.Declared(parameters.FolderIfAny, ""),
        "hub": parameters.Declared(parameters.Switch, False),
        "seed": parameters.Declared(parameters.Seed, methods.DEFAULTS["seed"]),
    }
    options = {"model": model, "limit": limit, "device": device, "dtype": dtype, "batch_size": batch_size}
    options |= {"revision": revision, "data_dir": data_dir, "hub": hub, "seed": seed}
    given = parameters.fitted_to(declared, {key: value for key, value in options.items() if value is not None})
    values = methods.DEFAULTS | {key: of.default for key, of in declared.items()} | given
    try:
        _route(method, benchmark, values, weight, k, name)
    except ValueError as problem:
        raise engine.UserError(str(problem)) from problem


def _route(method: str, benchmark: str, values: dict, weight: float | None, k: int | None, name: str | None) -> None:
    import pandas as pd

    from sinkstudy import digests, stats
    from sinkstudy.answers import evaluate
    from sinkstudy.book import report
    from sinkstudy.effects import methods
    from sinkstudy.model import loading

    value, public = methods.option(method, weight, k), bool(values["data_dir"] or values["hub"])
    model, check = values["model"], methods.METHODS[method].check
    run = name or paths.slug(model)
    found = methods.data(model in paths.lab_models(), benchmark, values["data_dir"], values["hub"], values["limit"])
    engine.check_memory([("", values | {"benchmarks": [found[0]]})])
    if check is not None:
        check(loading.outline(model, revision=values["revision"]))
    engine.claim(run, model)
    paths.check_writable(paths.RESULTS / run / "route")
    lvlm = loading.load(model, **{key: values[key] for key in ("device", "dtype", "revision")})
    typer.echo(f"{found[0]}: {len(found[1])} questions about {len(found[2])} pictures, twice", err=True)
    of = {key: values[key] for key in methods.DEFAULTS}
    words = [method, *([] if weight is None and k is None else [f"{value:g}"])]
    part = [f"{key}-{values[key]}" for key in ("limit", "seed") if values[key]]  # all pictures, seed 0
    part += [paths.slug(values["revision"])] if values["revision"] else []
    part += [values["dtype"]] if values["dtype"] != "float32" else []
    stem = "-".join(["public" if public else "lab", found[0].lower(), *words, *part])
    target = paths.RESULTS / run / "route" / f"{stem}.csv"
    asked = digests.of_values(sorted(found[1].attrs.get("sha256", {}).values()))[:16]
    there = pd.read_csv(target, dtype=str) if target.is_file() else pd.DataFrame()
    if len(there) and "data_sha256" in there and set(there.data_sha256) != {asked}:
        raise engine.UserError(f"{target} is about other data of {found[0]}: give the run about these a name (--name)")
    beside = target.with_suffix("") if public else None
    rows = methods.effect(lvlm, method, value, *found, public=public, cache=evaluate.ANSWERS, harnesses=beside, **of)
    rows = rows.assign(model=run, revision=lvlm.revision or "", dtype=values["dtype"], limit=values["limit"])
    rows = rows.assign(data_sha256=asked)
    paths.claimed(run, model)
    with paths.atomic(target) as temporary:
        rows.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    first = rows.iloc[0]
    rule = f"{values['criterion']} {values['threshold']:g}"
    stand_for = rule if first.group == "sinks" else f"the 2 % of highest norm, for lack of any by {rule}"
    typer.echo(f"{model} on {found[0]} ({first.data}): {first.questions} questions about {first.pictures} pictures")
    typer.echo(f"{' '.join(words)}: {methods.METHODS[method].words}. Sinks: {stand_for}")
    for (measure, unit), part in rows.groupby(["measure", "unit"], sort=False):
        label = {"right": "right answers", "logp": "log-probability of the right answer"}[measure]
        fmt = ".1f" if measure == "right" else ".2g"
        shown = [f"{row.what} {report.shown(stats.Interval(row.value, row.low, row.high, row.pictures), sign + fmt)}"
                 for row, sign in zip(part.itertuples(), ("", "", "+"), strict=True)]
        typer.echo(f"{label}, {unit}: {', '.join(shown)}")
    typer.echo(f"written: {target}" + (f"; for other harnesses: {beside}" if beside else ""))


@app.command()
def book(
    stored: Annotated[
        bool, typer.Option("--stored", help="Where the default run is out of date, show the stored outputs.")
    ] = False,
) -> None:
    """Render _build/html from the pages and the executed notebooks, if anything shown has changed."""
    _in_checkout()
    from sinkstudy.book import render

    render.book(stored=stored)


@app.command()
def models() -> None:
    """List the lab models and the runs made so far."""
    _in_checkout()
    typer.echo("lab models: " + (", ".join(paths.lab_models()) or "none ('sinkstudy lab train' makes them)"))
    for run in engine.runs():
        names = [name + ("" if engine.is_fresh(run, name) else " (out of date)") for name in engine.executed(run)]
        typer.echo(f"run {run}: {', '.join(names)}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN ..", help="Names of folders under results/.")],
    out: Annotated[Path | None, typer.Option(help="The page, .html; without it under _build/compare/.")] = None,
) -> None:
    """Compare runs: verdicts, headline numbers and figures side by side, on a page and in a CSV file."""
    _in_checkout()
    from sinkstudy.book import compare as of

    page = out or paths.BUILD / "compare" / f"{'--'.join(runs)[:200]}.html"
    try:
        found = of.write(runs, page)
    except ValueError as problem:
        raise engine.UserError(str(problem)) from None
    for model, rows in found.groupby("model", sort=False):
        typer.echo(f"{model}:\n{rows.pivot(index='claim', columns='run', values='verdict')[runs].to_string()}")
    typer.echo(f"written: {page} and {page.with_suffix('.csv').name}")


@app.command("check-full")
def check_full() -> None:
    """Fail if the default run's numbers do not agree with the full run's, by the rule of `claims.disagreements`."""
    _in_checkout()
    from sinkstudy.book import claims

    try:
        beside = claims.default_beside_full()
    except ValueError as problem:
        raise engine.UserError(str(problem)) from None
    typer.echo(claims.agreed(beside))
    if wrong := claims.disagreements(beside):
        raise engine.UserError("; ".join(wrong))


@app.command("check-fresh")
def check_fresh() -> None:
    """Fail if an executed notebook no longer follows from its sources."""
    _in_checkout()
    if stale := engine.stale():
        raise engine.UserError(f"out of date: {', '.join(stale)}")
    typer.echo("every executed notebook is up to date")


@app.command()
def diysink(
    model: Annotated[str, typer.Argument(help="Lab model, folder with config.json, or hub id owner/name.")],
    stage: Annotated[str, typer.Option(help="pretrain-sinks, pretrain-others or pretrain; then tune.")],
    data: Annotated[Path, typer.Option(help="Samples in LLaVA's format, JSON.")],
    images: Annotated[Path, typer.Option(help="Folder of their pictures.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained method.")],
    connectors: Annotated[list[Path] | None, typer.Option(help="For tune: the folder of a stage before it.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="two-connectors, one-connector, matched-width, random-split, in-place, soft-router, gates or adapters."
        ),
    ] = "two-connectors",
    criterion: Annotated[str, typer.Option(help="What a sink is.")] = "above_median",
    threshold: Annotated[float, typer.Option(help="Its threshold.")] = 3.0,
    lr: Annotated[
        float | None, typer.Option(help="Peak rate: 1e-3; for tune 2e-5, soft router 1e-2, gates and adapters 1e-3.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples that a process sees at once.")] = 8,
    accumulate: Annotated[
        int | None, typer.Option(help="Batches in a step; by default 256 samples' worth, for tune 128, soft router 20.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data; 1, soft router 10, gates and adapters 2.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Of the questions, for the soft router: own, or a sentence encoder's hub id.")
    ] = "own",
    steps: Annotated[int | None, typer.Option(help="Steps, in place of epochs.")] = None,
    seed: Annotated[int, typer.Option(help="Of the new connectors and the order of the samples.")] = 0,
    longest: Annotated[int, typer.Option(help="Tokens of a sample, its picture included; the rest is cut off.")] = 2048,
    lora: Annotated[int | None, typer.Option(min=1, help="For tune: rank of updates of the decoder.")] = None,
    freeze_decoder: Annotated[bool, typer.Option("--freeze-decoder", help="For tune: connectors alone.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16, the default on a GPU.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")] = None,
    checkpoint_steps: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
    workers: Annotated[int, typer.Option(help="Processes that prepare samples beside the training.")] = 0,
    outside: Annotated[bool, typer.Option("--outside", help="Pictures may lie outside of their folder.")] = False,
) -> None:
    """Train DIYSink, or a control, on a model: one stage.

    A killed training goes on from its last checkpoint. On several GPUs: accelerate launch -m sinkstudy.cli diysink ..
    """
    with_malloc()
    import torch

    from sinkstudy.trained import stages

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    if device == "auto" or dtype not in ("float32", "bfloat16"):
        raise engine.UserError(f"training is on one device and in float32 or bfloat16, not on {device} in {dtype}")
    model = str(Path(model).resolve()) if model not in paths.lab_models() and Path(model).is_dir() else model
    try:
        job = stages.Job(
            model, method, stage, data, images, tuple(connectors or ()), criterion, threshold,
            decoder=not freeze_decoder, lora=lora, longest=longest, revision=revision, encoder=encoder,
        )  # fmt: skip
        how = stages.settings(
            method, stage, batch_size=batch_size, accumulate=accumulate, lr=lr, epochs=epochs, steps=steps, seed=seed,
            bf16=dtype == "bfloat16", checkpoint_steps=checkpoint_steps, workers=workers,
        )  # fmt: skip
        stages.run(job, how, out, device=device, dtype=dtype, outside=outside)
    except (ValueError, FloatingPointError) as problem:
        raise engine.UserError(str(problem)) from None


def _check_names(what: str, given: list[str] | None, known: Collection[str]) -> None:
    for name in given or []:
        if name not in known:
            raise engine.UserError(f"'{name}' is no {what}: choose from {', '.join(known)}")


@lab.command("train")
def train(
    names: Annotated[list[str] | None, typer.Argument(help="Lab models, 'gist', 'emergence', or 'all'.")] = None,
) -> None:
    """Train lab models, the positive control's tower ('gist'), and the short towers of chapter 02 ('emergence').

    Without names all, from nothing. lab-llava-gist alone is trained behind the tower that is there. A killed training
    goes on from its last checkpoint.
    """
    _in_checkout()
    with_malloc()
    from sinkstudy.lab import train as training

    known = ["gist", *training.TOWER_OF, "emergence"]  # a tower before the model that is trained behind it
    _check_names("lab model or tower", names, [*known, "all"])
    training.main([name for name in known if not names or "all" in names or name in names])


@lab.command("gates")
def gates() -> None:
    """Measure what the tower with sinks by construction holds, and whether the language model behind it uses it.

    Writes `data/controls/{gates,answers}.csv`, which a page of the book shows, and fails if a gate is missed. Takes
    minutes.
    """
    _in_checkout()
    import pandas as pd

    from sinkstudy.lab import control as of_tower

    used, answers = of_tower.uses()
    table = pd.concat([of_tower.committed_gates(), used], ignore_index=True)
    typer.echo(table.to_string(index=False, float_format="{:.3f}".format))
    typer.echo("\nright answers, %, and changes without sinks (calm patches) or as many random tokens, points:")
    typer.echo(answers.set_index("model").to_string(float_format="{:.1f}".format))
    _keep_controls({"gates": table, "answers": answers})
    if not table.holds.all():
        raise engine.UserError(f"{(~table.holds).sum()} of {len(table)} gates are missed")


@lab.command("norms")
def norms() -> None:
    """Set norm and content of the calm patches apart, two by two, and train connectors on to other norms.

    Writes `data/controls/{norms,norms-training}.csv`, which a page of the book shows. Takes minutes; a killed training
    goes on from its last checkpoint.
    """
    _in_checkout()
    with_malloc()
    from sinkstudy.lab import norms as factors

    cells, training = factors.all_cells()
    typer.echo(cells.to_string(index=False, float_format="{:.2f}".format))
    _keep_controls({"norms": cells, "norms-training": training})


def _keep_controls(tables: Mapping[str, Any]) -> None:
    """Write tables that a page of the book shows, by name: `data/controls/<name>.csv`."""
    for name, table in tables.items():
        with paths.atomic(paths.DATA / "controls" / f"{name}.csv") as target:
            table.to_csv(target, index=False, float_format="%.6g")


@lab.command("diysink")
def lab_diysink(
    names: Annotated[list[str] | None, typer.Argument(help="Lab models; by default all that have arms.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only these arms; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only these seeds; may be repeated.")] = None,
) -> None:
    """Train DIYSink and its controls on lab models, several seeds of each, from nothing.

    A killed training goes on from its last checkpoint; what is finished is passed over.
    """
    _in_checkout()
    with_malloc()
    from sinkstudy.lab import arms

    _check_names("model with arms", names, arms.BASES)
    _check_names("arm", arm, arms.ALL_ARMS)
    arms.main(names or list(arms.BASES), arm or arms.ALL_ARMS, seed or arms.SEEDS)


@lab.command("alignment")
def lab_alignment(
    names: Annotated[list[str] | None, typer.Argument(help="lab-llava-gist, lab-llava; by default both.")] = None,
) -> None:
    """Train the alignment stage of lab models once more and keep the connector at some of its steps.

    Writes `data/alignment`, which the chapter on the language model follows. A killed training goes on from its last
    checkpoint; what is finished is passed over.
    """
    _in_checkout()
    with_malloc()
    from sinkstudy.lab import arms, training

    _check_names("model with arms", names, arms.BASES)
    training.threads()
    for name in names or arms.BASES:
        arms.follow_alignment(name)


def with_malloc() -> None:
    """Start the command again with the allocator's settings, if it was started without."""
    if any(os.environ.get(key) != value for key, value in MALLOC.items()):
        command = [sys.executable, "-m", "sinkstudy.cli", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | MALLOC)


def main() -> None:
    """Run the command; what goes wrong ends in one line and exit code 1, for want of a checkout 2, interrupted 130."""
    try:
        sys.exit(app(standalone_mode=False))
    except engine.UserError as problem:
        sys.exit(f"sinkstudy: {problem}")
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # typer's word for an interruption
            raise
        print("\nsinkstudy: interrupted; the same command goes on from what was finished", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # nobody reads what is said any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(141)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # typer's: an option that there is not, say
            error.show()
            sys.exit(error.exit_code)
        beside = (engine.WORK if paths.CHECKOUT else paths.CACHE) / "failed" / "command"
        sys.exit(f"sinkstudy: {engine.one_line(error, ' '.join(sys.argv[1:2]), beside)}")


if __name__ == "__main__":
    main()
