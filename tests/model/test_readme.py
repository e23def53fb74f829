"""What a reader copies: the README's code as it stands, and the shell lines of every page, read by what they call."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import typer
import yaml
from architectures import write
from PIL import Image

from sinkstudy import cli, paths
from sinkstudy.book import engine
from sinkstudy.effects import moving
from sinkstudy.world import drawing

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"book/{page.name}" for page in paths.BOOK.glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (paths.ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def told() -> str:
    (code,) = blocks("README.md", "python")
    return code


def test_the_code_moves_the_sinks_of_a_lab_model(tmp_path, monkeypatch, capsys):
    """The same tokens as with a mask made by hand."""
    pixels = drawing.render("test", 0, 1).images[0]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    given: dict = {}
    exec(told(), given)
    lvlm = given["lvlm"]
    assert lvlm.name in told() and not lvlm.decoder._forward_pre_hooks
    seen: list[torch.Tensor] = []
    with next(iter(lvlm.connectors.values())).register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        inputs = lvlm.inputs([pixels], ["What is in the picture?"])
        lvlm.model(**inputs)
    norms = seen[0].reshape(-1, seen[0].shape[-1]).norm(dim=-1)
    mask = norms >= 3 * norms.median()
    assert 0 < mask.sum() < 20
    with torch.no_grad(), moving.reordered(lvlm, inputs, [mask]):
        tokens = lvlm.model.generate(**inputs, max_new_tokens=16)
    assert torch.equal(given["output"], tokens)
    assert capsys.readouterr().out.strip() == lvlm.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl"])
def test_the_code_runs_on_qwen_without_torchvision(architecture, tmp_path, monkeypatch):
    write(tmp_path / "qwen", architecture)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    code, n = re.subn(r'loading\.load\(".*?"\)', "loading.load('qwen')", told())
    assert n == 1
    given: dict = {}
    exec(code, given)
    assert given["lvlm"].model.config.model_type == architecture and "output" in given


def test_every_name_that_a_page_imports_is_there():
    code = [line for page in PAGES for block in blocks(page, "python") for line in block.splitlines()]
    imports = [line for line in code if line.startswith(("from sinkstudy", "import sinkstudy"))]
    assert len(imports) > 4
    for line in imports:
        exec(line, {})


# ------------------------------------------------------------------------------------------------- shell lines
def lines() -> list[tuple[str, str]]:
    """(page, command) of every command of the project in a block of shell, with continued lines joined."""
    text = [(page, block.replace("\\\n", " ")) for page in PAGES for block in blocks(page, "bash")]
    return [(page, line.strip()) for page, block in text for line in block.splitlines() if line.strip()]


def parse(arguments: list[str]) -> None:
    """What typer would do with a command line, up to calling the command."""
    command = typer.main.get_command(cli.app)
    context = command.make_context("sinkstudy", list(arguments))
    while hasattr(command, "resolve_command"):
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, list(arguments), parent=context)


SHELL = [(page, line) for page, line in lines() if "sinkstudy " in line and not line.startswith(("#", "conda"))]


@pytest.mark.parametrize(("page", "line"), SHELL)
def test_commands_are_known(page, line):
    words = shlex.split(line.replace("$DATA", "--data samples.json --images pictures"), comments=True)
    words = [word for word in words if word != "..."]
    start = next(i for i, word in enumerate(words) if word in (".venv/bin/sinkstudy", "sinkstudy.cli"))
    parse(words[start + 1 :])


def test_commands_are_many_and_wrong_ones_are_refused():
    assert len(SHELL) > 10
    for wrong in (["rum"], ["run", "--limits", "3"], ["run", "--limit", "three"], ["lab", "trian"]):
        with pytest.raises(Exception, match="(?i)no such|valid"):
            parse(wrong)


def test_targets_of_make_and_notebooks_are_there():
    named = re.findall(r"(?m)^make ([a-z-]+)", "\n".join(line for _, line in lines()))
    targets = re.findall(r"(?m)^([a-z-]+):", (paths.ROOT / "Makefile").read_text())
    assert named and set(named) <= set(targets)
    papermill = [line for _, line in lines() if "/papermill " in line]
    assert papermill and all(Path(line.split()[1]).stem in engine.notebooks() for line in papermill)


def test_the_version_is_the_same_wherever_it_stands():
    changes = (paths.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, day = re.search(r"(?m)^## \[(\d[\d.]*)\] - (\d{4}-\d\d-\d\d)$", changes).groups()
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], str(citation["date-released"])) == (version, day)
    assert tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]["version"] == version
