"""Training with `fit`: it computes what a plain loop computes, and a kill changes nothing."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from sinkstudy.lab.training import optimizers
from sinkstudy.paths import ROOT
from sinkstudy.trained.loop import Settings, fit

SETTINGS = Settings(
    steps=12, batch_size=4, accumulate=2, lr=0.02, weight_decay=0.1, clip=0.5, bf16=False, checkpoint_steps=3
)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
DATA = [torch.randn(6, generator=torch.Generator().manual_seed(i)) for i in range(20)]


class Net(nn.Module):
    """Tied weights, dropout, a layer that is not trained, a question for every draw."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.frozen, self.first, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.out.weight = self.first.weight
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Mean error of the first numbers; with `labels` [batch, 8] of those that are not -100."""
        out = self.out(self.dropout(self.first(self.frozen(x)).tanh()))
        if labels is None:
            return (out[:, :6] - x).square().mean()
        return F.mse_loss(out[labels != -100], labels[labels != -100].float())


def drawn(samples: list[torch.Tensor], places: list[int]) -> dict[str, torch.Tensor]:
    """Every draw of a sample differs from every other."""
    noise = [torch.randn(6, generator=torch.Generator().manual_seed(place)) for place in places]
    return {"x": torch.stack(samples) + 0.1 * torch.stack(noise)}


def labelled(samples: list[torch.Tensor], places: list[int]) -> dict[str, torch.Tensor]:
    """As many labels as the place says, so that batches differ in their number."""
    labels = torch.full((len(samples), 8), -100)
    for row, place in zip(labels, places, strict=True):
        row[: 1 + place % 8] = torch.arange(1 + place % 8)
    return {"x": torch.stack(samples), "labels": labels}


def killer(at: int):
    """Kills this process with SIGKILL when it has drawn so many samples."""

    def collate(samples, places):
        if places[-1] >= at:
            os.kill(os.getpid(), signal.SIGKILL)
        return drawn(samples, places)

    return collate


def plain_loop(net: Net, settings: Settings, collate=drawn) -> list[float]:
    """One batch a step, the textbook's update."""
    decayed = [p for p in net.parameters() if p.requires_grad and p.dim() == 2]
    others = [p for p in net.parameters() if p.requires_grad and p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    )
    per_step = settings.batch_size * settings.accumulate
    places = list(range(settings.steps * per_step))
    order = [
        int(np.random.default_rng([settings.seed, place // 20]).permutation(20)[place % 20]) for place in places
    ]
    losses = []
    warm = math.ceil(settings.warmup * settings.steps)
    for step in range(settings.steps):
        now = slice(step * per_step, (step + 1) * per_step)
        loss = net(**collate([DATA[i] for i in order[now]], places[now]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decayed + others, settings.clip)
        share = step / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (settings.steps - warm))) / 2
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * share
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(a: nn.Module, b: nn.Module, exactly: bool) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0 if exactly else 2e-6, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("collate", [drawn, labelled])
def test_equals_a_plain_loop(tmp_path: Path, collate):
    """With accumulation: a step of two batches is a step of one that holds both, however many labels each has."""
    net, expected = Net(), Net()
    table = fit(net, DATA, tmp_path, replace(SETTINGS, warmup=0.3), collate)
    losses = plain_loop(expected, replace(SETTINGS, warmup=0.3), collate)
    same(net, expected, exactly=False)
    assert table.step.tolist() == list(range(1, 13))
    np.testing.assert_allclose(table.loss, losses, rtol=1e-5)
    assert (net.first.weight != Net().first.weight).any() and net.out.weight is net.first.weight


def test_what_a_folder_holds(tmp_path: Path):
    net = Net()
    net.dropout.eval()
    table = fit(net, DATA, tmp_path, SETTINGS, drawn)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained.safetensors", "training.csv"]
    assert load_file(tmp_path / "trained.safetensors").keys() == {"first.weight", "first.bias", "out.bias"}
    kept = pd.read_csv(tmp_path / "training.csv")
    pd.testing.assert_frame_equal(kept, table, check_exact=True)
    assert net.training and not net.dropout.training  # as they were


def test_epochs(tmp_path: Path):
    """Each passes through all samples once, in an order of its own; the last step is filled up."""
    seen: list[int] = []

    def watch(samples, places):
        seen.extend(samples)
        return drawn([DATA[i] for i in samples], places)

    table = fit(Net(), range(20), tmp_path, replace(SETTINGS, steps=None, epochs=2, batch_size=3), watch)
    assert len(table) == 7 and len(seen) == 42
    assert sorted(seen[:20]) == sorted(seen[20:40]) == list(range(20)) and seen[:20] != seen[20:40]


def test_a_finished_training_is_read(tmp_path: Path, capsys):
    first, again, other, moved = Net(), Net(), Net(), Net()
    table = fit(first, DATA, tmp_path, SETTINGS, drawn)
    changed = replace(SETTINGS, checkpoint_steps=5, workers=1)  # without influence
    pd.testing.assert_frame_equal(fit(again, DATA, tmp_path, changed, killer(0)), table)
    same(again, first, exactly=True)
    assert "trained earlier" in capsys.readouterr().err
    fit(other, DATA, tmp_path, replace(SETTINGS, lr=0.01), drawn)
    assert "was trained with other settings (lr: 0.02, now 0.01): is trained anew" in capsys.readouterr().err
    assert (other.first.weight != first.first.weight).any()
    fit(moved, DATA, tmp_path, replace(SETTINGS, lr=0.01), drawn, about={"data": "b"})
    assert "other settings (about)" in capsys.readouterr().err


@pytest.mark.parametrize("muon", [False, True])
def test_killed_and_resumed(tmp_path: Path, muon: bool):
    """With dropout, so that the random state matters; a half-written checkpoint does not."""
    how = {"optimizers": lambda named: optimizers(named, 0.02, 0.1, 0.03)} if muon else {}
    whole, resumed = Net(0.3), Net(0.3)
    expected = fit(whole, DATA, tmp_path / "whole", SETTINGS, drawn, **how)
    code = f"""
from tests.model.test_fit import *
how = {{"optimizers": lambda named: optimizers(named, 0.02, 0.1, 0.03)}} if {muon} else {{}}
fit(Net(0.3), DATA, "{tmp_path}/killed", SETTINGS, killer(62), **how)
"""
    gone = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stderr=subprocess.PIPE)
    assert gone.wait() == -signal.SIGKILL, gone.stderr.read().decode()
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["checkpoint.pt"]
    checkpoint = torch.load(tmp_path / "killed/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 6 and "frozen.weight" not in checkpoint["weights"]
    (tmp_path / f"killed/.partial-{gone.pid}-a").mkdir()
    (tmp_path / f"killed/.partial-{gone.pid}-a/checkpoint.pt").write_bytes(b"cut off")
    drawn_places: list[int] = []

    def watch(samples, places):
        drawn_places.extend(places)
        return drawn(samples, places)

    table = fit(resumed, DATA, tmp_path / "killed", SETTINGS, watch, **how)
    assert drawn_places == list(range(48, 96))
    same(resumed, whole, exactly=True)
    pd.testing.assert_frame_equal(table, expected, check_exact=True)


def test_two_processes(tmp_path: Path):
    """Two processes with n samples each give what one gives with 2 n, up to rounding."""
    script = tmp_path / "train.py"
    script.write_text(f"""
from tests.model.test_fit import *
for collate in drawn, labelled:
    fit(Net(), DATA, "{tmp_path}/two" + collate.__name__, replace(SETTINGS, batch_size=2), collate)
""")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(launch, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for collate in drawn, labelled:
        one, two = Net(), tmp_path / f"two{collate.__name__}"
        expected = fit(one, DATA, tmp_path / f"one{collate.__name__}", SETTINGS, collate)
        for name, weights in load_file(two / "trained.safetensors").items():
            torch.testing.assert_close(weights, one.get_parameter(name).data, rtol=0, atol=2e-6)
        np.testing.assert_allclose(pd.read_csv(two / "training.csv").loss, expected.loss, rtol=1e-5)


def test_half_precision_weights_take_small_steps(tmp_path: Path):
    """Steps that bfloat16 would round away add up; the weights are bfloat16 again at the end."""
    net = Net().to(torch.bfloat16)
    before = net.first.weight.float().clone()
    fit(net, DATA, tmp_path, replace(SETTINGS, lr=5e-5, weight_decay=0.0, steps=40, clip=1e9), drawn)
    assert net.first.weight.dtype == torch.bfloat16
    moved = (load_file(tmp_path / "trained.safetensors")["first.weight"] - before).abs()
    assert 2e-4 < moved.median() < 2e-3


def test_errors(tmp_path: Path):
    with pytest.raises(ValueError, match="no samples"):
        fit(Net(), [], tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="no parameter asks for gradients"):
        fit(Net().requires_grad_(False), DATA, tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="batch_size is 0"):
        replace(SETTINGS, batch_size=0)
    with pytest.raises(ValueError, match="warmup is 3"):
        replace(SETTINGS, warmup=3)
    with pytest.raises(FloatingPointError, match="the loss at step 1 is nan"):
        fit(Net(), [torch.full((6,), float("nan"))] * 8, tmp_path, SETTINGS, drawn)
