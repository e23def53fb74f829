"""Training: data that change between a kill and the next start, and options that are none."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import architectures
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from test_fit import DATA, ENVIRONMENT, SETTINGS, Net, drawn, same
from test_stages import data, model, options, train  # noqa: F401  fixtures

from sinkstudy.book import memory
from sinkstudy.book.engine import UserError
from sinkstudy.model import loading
from sinkstudy.trained import conversations
from sinkstudy.trained.loop import _Draws, fit

KEYS = [f"sample {i}" for i in range(len(DATA))]
KILLED = """
import os, signal, sys
from test_fit import *
from test_training_runs import KEYS
fit(Net(), DATA, sys.argv[1], SETTINGS, killer(62), keys=KEYS)  # in step 8; the last checkpoint is of step 6
"""


def run_killed(code: str, folder: Path) -> Path:
    """Run a training's code, which kills itself, with its folder; return the folder."""
    path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], "tests/model", "tests/faults"])
    command = [sys.executable, "-c", code, str(folder)]
    died = subprocess.run(command, env=ENVIRONMENT | {"PYTHONPATH": path}, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    return folder


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The folder of a training that was killed in its eighth step."""
    return run_killed(KILLED, tmp_path / "killed")


def places_of(used: list[int], collate=drawn):
    def watch(samples, places):
        used.extend(places)
        return collate(samples, places)

    return watch


def order(n: int, keys: list[str]) -> list[int]:
    draws = _Draws(range(len(keys)), SETTINGS.seed, keys)
    return [draws[i][0] for i in range(n)]


def test_each_pass_takes_every_sample_in_an_order_of_its_own():
    drawn = order(60, KEYS)
    assert all(sorted(drawn[k : k + 20]) == list(range(20)) for k in (0, 20, 40))
    assert len({tuple(drawn[k : k + 20]) for k in (0, 20, 40)}) == 3
    without = [i for i in drawn[:20] if i != 7]  # taking one out leaves the order of the others
    assert [i + (i >= 7) for i in order(19, KEYS[:7] + KEYS[8:])] == without


def test_unchanged_data_go_on(killed: Path):
    places: list[int] = []
    net, whole = Net(), Net()
    fit(net, DATA, killed, SETTINGS, places_of(places), keys=KEYS)
    assert places == list(range(48, 96))
    fit(whole, DATA, killed.with_name("whole"), SETTINGS, drawn, keys=KEYS)
    same(net, whole, exactly=True)


MANY = [DATA[i % 20] + i for i in range(200)]
MANY_KEYS = [f"sample {i}" for i in range(200)]
MANY_KILLED = KILLED.replace("DATA, sys", "MANY, sys").replace("KEYS", "MANY_KEYS").replace(
    "import MANY_KEYS", "import MANY, MANY_KEYS")


@pytest.fixture
def one_pass(tmp_path: Path) -> Path:
    """As `killed`, of so many samples that half of them were not used yet."""
    return run_killed(MANY_KILLED, tmp_path / "killed")


@pytest.mark.parametrize("change", ["taken out", "replaced", "moved"])
def test_what_was_not_used_may_change(one_pass: Path, change: str, capsys):
    """And the end is that of a training which had the changed data from the start."""
    late = order(96, MANY_KEYS)[60]  # in step 8, behind the checkpoint of step 6
    keys, samples = list(MANY_KEYS), list(MANY)
    if change == "taken out":
        del keys[late], samples[late]
    elif change == "replaced":
        keys[late], samples[late] = "another", samples[late] * 2
    else:
        keys, samples = keys[::-1], samples[::-1]  # the file's order is of no matter
    places: list[int] = []
    resumed, whole = Net(), Net()
    fit(resumed, samples, one_pass, SETTINGS, places_of(places), keys=keys)
    assert places == list(range(48, 96))
    said = capsys.readouterr().err
    assert change == "moved" or "the data changed, and no step so far has used what did: goes on" in said
    fit(whole, samples, one_pass.with_name("whole"), SETTINGS, drawn, keys=keys)
    same(resumed, whole, exactly=True)


def test_what_was_used_and_changed_is_said(one_pass: Path, capsys):
    early = order(96, MANY_KEYS)[17]  # in step 3
    keys, samples = list(MANY_KEYS), list(MANY)
    keys[early], samples[early] = "another", samples[early] * 2
    places: list[int] = []
    resumed, whole = Net(), Net()
    fit(resumed, samples, one_pass, SETTINGS, places_of(places), keys=keys)
    said = capsys.readouterr().err
    # the sample that went may leave a gap earlier or later than where its successor comes in
    assert "was begun with other samples in step" in said and "of the 6 that were done: is trained anew" in said
    assert places == list(range(96))
    fit(whole, samples, one_pass.with_name("whole"), SETTINGS, drawn, keys=keys)
    same(resumed, whole, exactly=True)


def test_another_number_of_steps_is_said(tmp_path: Path, capsys):
    passes = replace(SETTINGS, steps=None, epochs=1)
    run_killed(MANY_KILLED.replace("SETTINGS", "replace(SETTINGS, steps=None, epochs=1)"), tmp_path / "a")
    places: list[int] = []
    fit(Net(), MANY[:150], tmp_path / "a", passes, places_of(places), keys=MANY_KEYS[:150])
    said = capsys.readouterr().err
    assert "other settings (steps: 25, now 19, samples: 200, now 150, data; with --steps 25 the learning rates" in said
    assert places[0] == 0


class Killed(BaseException):
    """In place of a signal."""


def test_a_changed_data_file_through_the_command(train, model, data, tmp_path: Path, monkeypatch):  # noqa: F811
    """A killed stage, a damaged picture taken out of the file: it goes on, or says why not."""
    begun = 0

    def dies(self, samples, places):
        nonlocal begun
        begun += 1
        if begun > 6:
            raise Killed
        return plain(self, samples, places)

    plain = conversations.Collate.__call__
    monkeypatch.setattr(conversations.Collate, "__call__", dies)
    out, more = tmp_path / "out", ("--steps", "5", "--lr", "0.01")
    with pytest.raises(Killed):
        train(model, data, out, "pretrain-sinks", *more)
    monkeypatch.setattr(conversations.Collate, "__call__", plain)
    changed = tmp_path / "data"
    changed.mkdir()
    for file in data.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (32, 32)).save(changed / "0.png")  # each sample is used in the first two steps of four
    assert "was begun with other samples in step" in train(model, changed, out, "pretrain-sinks", *more)


def test_what_was_finished_is_known_by_its_content(train, data, tmp_path: Path, monkeypatch):  # noqa: F811
    """However the folder of pictures is written and wherever it lies; and not once a picture or a weight changed."""
    base, out, more = tmp_path / "base", tmp_path / "out", ("--steps", "1")
    architectures.write(base, "llava")
    copied = Path(shutil.copytree(data, tmp_path / "copied"))
    finished = f"{out}: finished earlier with these settings"
    assert finished not in train(base, data, out, "pretrain-sinks", *more)
    monkeypatch.chdir(tmp_path)
    for way in (data, copied, Path("copied"), tmp_path / "base" / ".." / "copied"):
        assert finished in train(base, way, out, "pretrain-sinks", *more), way
    Image.new("RGB", (32, 32)).save(copied / "0.png")
    assert finished not in train(base, copied, out, "pretrain-sinks", *more)
    assert finished in train(base, copied, out, "pretrain-sinks", *more)
    (weights,) = base.glob("*.safetensors")
    save_file({name: -of for name, of in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert finished not in train(base, copied, out, "pretrain-sinks", *more)


# ------------------------------------------------------------------------------------------- odd options
ODD = {
    "--threshold": ["nan", "inf", "-inf"], "--lr": ["nan", "inf", "0", "-1"], "--epochs": ["nan", "inf", "0", "-1"],
    "--batch-size": ["0", "-1"], "--accumulate": ["0", "-2"], "--steps": ["-1", "0"], "--seed": ["-1", "2147483648"],
    "--longest": ["0", "-5"], "--checkpoint-steps": ["0", "-1"], "--workers": ["-1", "1000"],
    "--criterion": ["norm", "", "Above_Median"], "--method": ["", "DIYSink"], "--device": ["gpu", "cuda:x", "auto", ""],
    "--dtype": ["float64", "bf16", "float16"],
}


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in ODD.items() for v in values])
def test_odd_options_are_refused_before_work(train, model, data, tmp_path, monkeypatch, option, value):  # noqa: F811
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(conversations, "read", lambda *_, **__: pytest.fail("the pictures were read"))
    with pytest.raises(UserError) as problem:
        train(model, data, tmp_path / "out", "pretrain-sinks", f"{option}={value}")
    assert "\n" not in str(problem.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("threshold", ["100", "-1", "1e9"])
def test_percentiles_that_are_none(train, model, data, tmp_path, threshold):  # noqa: F811
    with pytest.raises(UserError, match="threshold is .*, but has to be a finite number, of a percentile from 0"):
        train(model, data, tmp_path / "out", "pretrain-sinks", "--criterion", "percentile", f"--threshold={threshold}")


def test_a_folder_that_cannot_be_written(train, model, data, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="nothing can be written to"):
        train(model, data, tmp_path / "file" / "out", "pretrain-sinks")
    with pytest.raises(UserError, match="is no method: choose another folder"):
        train(model, data, tmp_path / "file", "pretrain-sinks")


# ------------------------------------------------------------------------------------------- memory of pictures
def test_large_pictures_count(tmp_path, monkeypatch):
    """24 pictures of 12 megapixels in a batch take 864 MB before the model sees one."""
    outline = loading.outline("lab-llava")
    assert memory.need(outline, 2, (4000, 3000)) == memory.need(outline, 2)  # it takes its own size alone
    architectures.write(tmp_path / "model", "llava")
    name = str(tmp_path / "model")
    outline = loading.outline(name)
    more = sum(memory.need(outline, 24, (4000, 3000))) - sum(memory.need(outline, 24, (400, 300)))
    assert more == 24 * 3 * (4000 * 3000 - 400 * 300)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate([(40, 30), (4000, 3000), (30, 40)]):
        Image.new("RGB", size).save(folder / f"{i}.png")
    seen = []
    monkeypatch.setattr(memory, "check", lambda *_, **of: seen.append((of["batch_size"], of["size"])) or 0)
    memory._main([{"model": name, "images_dir": str(folder), "limit": 3, "batch_size": 8}])
    memory._main([{"model": name, "images_dir": str(folder), "limit": 1, "batch_size": 2}])
    assert seen == [(8, (4000, 3000)), (2, memory.PICTURE)]
    monkeypatch.undo()
    monkeypatch.setattr(memory, "free", lambda device: 700_000_000)
    with pytest.raises(ValueError, match="for a batch of 24 of pictures of 4000 x 3000.* smaller pictures"):
        memory._main([{"model": name, "images_dir": str(folder), "limit": 3, "batch_size": 24}])
