"""The command `sinkstudy diysink`: all stages to the end on tiny models, one of them killed on the way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import architectures
import noise
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sinkstudy import cli
from sinkstudy.book.engine import UserError
from sinkstudy.model import loading
from sinkstudy.paths import ROOT
from sinkstudy.trained import connectors, loop, stages
from sinkstudy.trained.kinds import load_method

WORDS = "red blue yes no".split()
COMMON = ["--batch-size", "2", "--accumulate", "2", "--checkpoint-steps", "2", "--device", "cpu"]
SHORT = ["--steps", "5", "--lr", "0.01"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    samples = []
    for i, picture in enumerate(noise.pictures([(32, 32)] * 6)):
        picture.save(folder / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat is the texture"}, {"from": "gpt", "value": WORDS[i % 2]},
            {"from": "human", "value": "how many"}, {"from": "gpt", "value": WORDS[2 + i % 2]},
        ]  # fmt: skip
        samples.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(samples))
    return folder


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def model(request, tmp_path_factory) -> Path:
    return architectures.write(tmp_path_factory.mktemp(request.param), request.param)


def options(model, data: Path, out: Path, stage: str, *more: str) -> list[str]:
    where = ["--stage", stage, "--data", str(data / "data.json"), "--images", str(data), "--out", str(out)]
    return ["diysink", str(model), *where, *COMMON, *more]


@pytest.fixture
def train(monkeypatch):
    for name, value in cli.MALLOC.items():
        monkeypatch.setenv(name, value)

    def call(*args) -> str:
        """Run the command, and return what it printed."""
        done = CliRunner().invoke(cli.app, options(*args))
        if done.exception:
            raise done.exception
        return done.output

    return call


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def moved(a: Path, b: Path) -> set[str]:
    """Names, up to the first dot, of what differs."""
    first, second = weights(a), weights(b)
    return {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}


def test_two_connectors(train, model, data, tmp_path: Path):
    """Every stage trains what it should and the last one goes on from the first ones; killed, it ends the same."""
    low = ("--threshold", "1.02")  # so that the tiny tower has some
    sinks, others, out, killed = (tmp_path / name for name in ("sinks", "others", "tune", "killed"))
    fresh = tmp_path / "fresh"
    connectors.DIYSink(loading.load(str(model)), threshold=1.02, decoder=False).save(fresh)
    train(model, data, sinks, "pretrain-sinks", *SHORT, *low)
    train(model, data, others, "pretrain-others", *SHORT, *low)
    assert moved(fresh, sinks) == {"sink"} and moved(fresh, others) == {"connector"}
    tune = (*SHORT, *low, "--connectors", str(sinks), "--connectors", str(others))
    train(model, data, out, "tune", *tune)
    assert sorted(path.name for path in out.iterdir()) == ["method.json", "training.csv", "weights.safetensors"]
    assert not out.with_name("tune.training").exists()
    assert len(pd.read_csv(out / "training.csv")) == 5

    method = load_method(out)
    assert isinstance(method, connectors.DIYSink) and method.settings["threshold"] == 1.02
    assert method.lvlm.name == str(model) and not any(p.requires_grad for p in method.parameters())
    for name, p in method.changed().items():
        torch.testing.assert_close(p, weights(out)[name].float(), rtol=0, atol=0)
    untouched = loading.load(str(model))
    assert torch.equal(method.lvlm.vision_layers[0].state_dict()["mlp.fc1.weight"],
                       untouched.vision_layers[0].state_dict()["mlp.fc1.weight"])  # fmt: skip
    assert not torch.equal(method.lvlm.model.get_output_embeddings().weight,
                           untouched.model.get_output_embeddings().weight)  # fmt: skip

    kill = f"""
import os, signal, sys
from sinkstudy import cli
from sinkstudy.trained import conversations
collate = conversations.Collate.__call__
def until(self, samples, places):
    if places[-1] >= 13: os.kill(os.getpid(), signal.SIGKILL)
    return collate(self, samples, places)
conversations.Collate.__call__ = until
sys.argv = ["sinkstudy", *{options(model, data, killed, "tune", *tune)!r}]
cli.main()
"""
    environment = os.environ | cli.MALLOC | {"PYTHONPATH": str(ROOT)}
    died = subprocess.run([sys.executable, "-c", kill], env=environment, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not killed.exists() and (tmp_path / "killed.training/checkpoint.pt").exists()
    train(model, data, killed, "tune", *tune)
    assert moved(out, killed) == set()
    before = (killed / "weights.safetensors").stat().st_mtime_ns
    train(model, data, killed, "tune", *tune)  # finished
    assert (killed / "weights.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("method", ["one-connector", "matched-width"])
def test_one_connector(train, data, method: str, tmp_path: Path):
    model = tmp_path / "model"
    architectures.write(model, "llava")
    train(model, data, tmp_path / "first", "pretrain", "--method", method, *SHORT)
    tune = ("--method", method, *SHORT, "--connectors", str(tmp_path / "first"))
    train(model, data, tmp_path / "frozen", "tune", *tune, "--freeze-decoder")
    found = weights(tmp_path / "frozen")
    assert all(name.startswith("connector.") for name in found)
    assert moved(tmp_path / "first", tmp_path / "frozen") == {"connector"}
    if method == "matched-width":
        own = sum(p.numel() for p in loading.load(str(model)).connector.parameters())
        trained = sum(p.numel() for p in found.values())
        assert 0.95 < trained / (2 * own) <= 1


@pytest.mark.parametrize(("method", "split", "front"), [
    ("two-connectors", "sinks", True), ("random-split", "random", True), ("in-place", "sinks", False)])
def test_two_connectors_and_their_controls(model, data, method: str, split: str, front: bool, tmp_path: Path):
    job = stages.Job(str(model), method, "pretrain-sinks", data / "data.json", data)
    made, _ = stages.prepared(loading.load(str(model)), job, 0, {})
    made.save(tmp_path / "one")
    kept = load_method(tmp_path / "one").settings
    assert (kept["split"], kept["front"]) == (split, front)
    assert {name.split(".")[0] for name, p in made.changed().items() if p.requires_grad} == {"sink"}


def test_low_rank_updates_end_in_the_weights(train, data, tmp_path: Path):
    model = tmp_path / "model"
    architectures.write(model, "llava")
    train(model, data, tmp_path / "first", "pretrain", "--method", "one-connector", *SHORT)
    tune = ("--method", "one-connector", *SHORT, "--connectors", str(tmp_path / "first"), "--lora", "2")
    train(model, data, tmp_path / "lora", "tune", *tune)
    method, base = load_method(tmp_path / "lora"), loading.load(str(model))
    own = dict(base.decoder.named_parameters())
    for name, p in method.lvlm.decoder.named_parameters():
        change = (p - own[name].to(torch.bfloat16).float()).detach()
        if name.endswith("_proj.weight"):  # rank 2, but for rounding to bfloat16
            values = torch.linalg.svdvals(change)
            assert values[1] > 3 * values[2], name
        else:
            assert not change.any(), name


def test_it_learns(train, data, tmp_path: Path):
    """The recipe brings the loss of six samples well below where it began."""
    model = tmp_path / "model"
    architectures.write(model, "llava")
    how = ("--method", "one-connector", "--steps", "40", "--lr", "0.02", "--workers", "1")
    train(model, data, tmp_path / "out", "pretrain", *how)
    loss = pd.read_csv(tmp_path / "out/training.csv").loss
    assert loss[35:].mean() < 0.7 * loss[:3].mean()


def test_what_is_wrong_is_said(train, model, data, tmp_path: Path):
    out = tmp_path / "out"
    cases = [
        (("tune",), "tune begins with the connectors of pretrain-sinks, pretrain-others"),
        (("pretrain",), "two-connectors has no stage 'pretrain': choose from pretrain-sinks, pretrain-others, tune"),
        (("pretrain", "--method", "three"), "unknown method 'three'"),
        (("pretrain-sinks", "--lora", "2"), "connectors and the decoder are for tune"),
        (("tune", "--lora", "2", "--freeze-decoder"), "either frozen or trained by LoRA"),
        (("tune", "--connectors", str(data)), "does not hold a stage"),
        (("pretrain-sinks", "--criterion", "x"), "unknown criterion 'x'"),
        (("pretrain-sinks", "--dtype", "float16"), "in float32 or bfloat16"),
        (("pretrain-sinks", "--steps", "0"), "steps is 0"),
    ]
    for (stage, *more), message in cases:
        with pytest.raises(UserError, match=message):
            train(model, data, out, stage, *more)
    with pytest.raises(UserError, match="is no method: choose another folder"):
        train(model, data, tmp_path, "pretrain-sinks")
    with pytest.raises(UserError, match="unknown model 'no/such/model'"):
        train("no/such/model", data, out, "pretrain-sinks")
    assert not list(tmp_path.iterdir())


def test_connectors_of_another_training(train, data, tmp_path: Path):
    model = tmp_path / "model"
    architectures.write(model, "llava")
    train(model, data, tmp_path / "one", "pretrain-sinks", "--steps", "1")
    with pytest.raises(UserError, match="one was trained with threshold 3.0, not 2.0"):
        train(model, data, tmp_path / "out", "tune", "--threshold", "2", "--connectors", str(tmp_path / "one"))
    with pytest.raises(UserError, match="the connectors of pretrain-others: give"):
        train(model, data, tmp_path / "out", "tune", "--connectors", str(tmp_path / "one"))


def test_load(tmp_path: Path):
    with pytest.raises(ValueError, match="no readable method.json"):
        load_method(tmp_path)
    (tmp_path / "method.json").write_text('{"kind": "x"}')
    with pytest.raises(ValueError, match="unknown kind 'x'; known: one-connector, diysink"):
        load_method(tmp_path)


def test_what_is_trained_alone(train, model, data, tmp_path: Path):
    """Router, gates and adapters: one stage each, which moves their own parameters and keeps nothing else."""
    pair = tmp_path / "pair"
    connectors.DIYSink(loading.load(str(model)), threshold=1.02).save(pair)
    kept = {"soft-router": "router.", "gates": "gates.", "adapters": "layers."}
    for method, prefix in kept.items():
        out, more = tmp_path / method, ["--connectors", str(pair)] if method == "soft-router" else []
        train(model, data, out, "tune", *SHORT, "--threshold", "1.02", "--method", method, *more)
        assert all(name.startswith(prefix) for name in weights(out))
        last = [p for name, p in weights(out).items() if "lora_B" in name or name.endswith(("2.weight", "3.weight"))]
        assert last and any((p != 0).any() for p in last)  # zero before training
        assert load_method(out).kind == loop.Method.described(out)["kind"]


@pytest.mark.parametrize(("more", "message"), [
    (["--method", "soft-router"], "one trained DIYSink"), (["--method", "gates", "--lora", "4"], "never trains")])
def test_alone_refuses(train, model, data, tmp_path: Path, more, message):
    with pytest.raises(UserError, match=message):
        train(model, data, tmp_path / "out", "tune", *SHORT, *more)
