"""The `sinkstudy` command. Heavy imports are made where they are needed, so that it starts at once."""

import os
import sys
from typing import Annotated

import typer

from sinkstudy import engine

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


@app.command("run")
def run_command(
    model: Annotated[
        str, typer.Argument(help="Lab model, folder with config.json, or hub id owner/name.")
    ] = engine.DEFAULT_MODEL,
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
    jobs: Annotated[int, typer.Option(min=1, help="Notebooks executed at the same time.")] = 1,
    update_notebooks: Annotated[
        bool, typer.Option("--update-notebooks", help="Store the default run's outputs in notebooks/.")
    ] = False,
) -> None:
    """Execute the notebooks on a model: those that are out of date, and no other."""
    options = {"device": device, "dtype": dtype, "revision": revision, "batch_size": batch_size}
    options |= {"limit": limit, "seed": seed}
    parameters = {key: value for key, value in options.items() if value is not None}
    for item in parameter or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise engine.UserError(f"-p takes NAME=VALUE, not '{item}'")
        parameters[key] = value
    if update_notebooks and (parameters or name or model != engine.DEFAULT_MODEL):
        raise engine.UserError("--update-notebooks is for the default run: no other model, parameter or name")
    run = engine.run(model, only=only or [], parameters=parameters, name=name, jobs=jobs)
    if update_notebooks:
        engine.update_notebooks(only or [])
    typer.echo(f"run {run} is up to date: book/runs/{run}, results/{run}")


@app.command()
def book(
    stored: Annotated[
        bool, typer.Option("--stored", help="Where the default run is out of date, show the stored outputs.")
    ] = False,
) -> None:
    """Render _build/html from the pages and the executed notebooks, if anything shown has changed."""
    engine.render(stored=stored)


@app.command()
def models() -> None:
    """List the lab models and the runs made so far."""
    typer.echo("lab models: " + (", ".join(engine.lab_models()) or "none ('sinkstudy lab train' makes them)"))
    for run in engine.runs():
        names = [name + ("" if engine.is_fresh(run, name) else " (out of date)") for name in engine.executed(run)]
        typer.echo(f"run {run}: {', '.join(names)}")


@app.command("check-fresh")
def check_fresh() -> None:
    """Fail if an executed notebook no longer follows from its sources."""
    stale = engine.stale()
    if stale:
        raise engine.UserError(f"out of date: {', '.join(stale)}")
    typer.echo("every executed notebook is up to date")


@lab.command("train")
def train(
    names: Annotated[list[str] | None, typer.Argument(help="Lab models, 'emergence', or 'all'.")] = None,
) -> None:
    """Train lab models, and the short towers of chapter 02 ('emergence'), from nothing.

    A killed training goes on from its last checkpoint.
    """
    with_malloc()
    from sinkstudy.lab import train as training

    known = [*training.MODELS, "emergence"]
    wanted = known if not names or names == ["all"] else names
    for name in wanted:
        if name not in known:
            raise engine.UserError(f"'{name}' cannot be trained: choose from {', '.join(known)} or all")
    training.main(wanted)


@lab.command("diysink")
def lab_diysink(
    names: Annotated[list[str] | None, typer.Argument(help="Lab models; by default all that have arms.")] = None,
) -> None:
    """Train DIYSink and its controls on lab models, several seeds of each, from nothing.

    A killed training goes on from its last checkpoint.
    """
    with_malloc()
    from sinkstudy.lab import diysink

    for name in names or []:
        if name not in diysink.ARMS:
            raise engine.UserError(f"'{name}' has no arms: choose from {', '.join(diysink.ARMS)}")
    diysink.main(names or list(diysink.ARMS))


def with_malloc() -> None:
    """Start the command again with the allocator's settings, if it was started without."""
    if any(os.environ.get(key) != value for key, value in MALLOC.items()):
        command = [sys.executable, "-m", "sinkstudy.cli", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | MALLOC)


def main() -> None:
    """Run the command; what the user can put right ends in one line and exit code 1."""
    try:
        app()
    except engine.UserError as problem:
        sys.exit(f"sinkstudy: {problem}")


if __name__ == "__main__":
    main()
