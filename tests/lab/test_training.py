"""The training loop and its attention: slots are separate passes, a killed run ends as an unbroken one."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sinkstudy.lab import language, training
from sinkstudy.lab.corpus import slot_positions

PREFIX, GROUPS = 9, ((3, 5), (2, 7))


# ------------------------------------------------------------------------------------------ attention
@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, initializer_range=0.4, pad_token_id=0)).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(1, 40, (3, PREFIX + sum(n * k for n, k in GROUPS)), generator=torch.Generator().manual_seed(1))


def in_slots(llama, ids, positions, pad=None) -> torch.Tensor:
    llama.set_attn_implementation("lab_matmul")
    with torch.no_grad():
        return llama.model(input_ids=ids, position_ids=positions, use_cache=False, slots=(PREFIX, GROUPS), pad=pad,
                           attention_mask=torch.zeros(1, 1, 1, 1))[0]


def alone(llama, ids, padding) -> list[tuple[int, slice, torch.Tensor]]:
    """Every row and slot in a pass of its own: ordinary causal SDPA on the unpadded words of prefix and slot."""
    llama.set_attn_implementation("sdpa")
    out, at = [], PREFIX
    for number, length in GROUPS:
        for _ in range(number):
            part = slice(at, at + length)
            for row in range(len(ids)):
                words = torch.cat([ids[row, padding[row]:PREFIX], ids[row, part]])[None]
                with torch.no_grad():
                    out.append((row, part, llama.model(input_ids=words, use_cache=False)[0][0]))
            at = part.stop
    return out


@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 2, 5)])
def test_slots_equal_separate_passes(llama, ids, padding):
    pad = torch.arange(PREFIX)[None] < torch.tensor(padding)[:, None]
    ids = ids.clone()
    ids[:, :PREFIX][pad] = 0
    positions = (slot_positions(PREFIX, GROUPS)[None] - pad.sum(1, keepdim=True)).clamp_min(0)
    together = in_slots(llama, ids, positions, pad if any(padding) else None)
    compared = 0
    for row, part, reference in alone(llama, ids, padding):
        kept = PREFIX - padding[row]
        torch.testing.assert_close(together[row, padding[row]:PREFIX], reference[:kept], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together[row, part], reference[kept:], atol=1e-4, rtol=1e-4)
        compared += 1
    assert compared == 15


def test_a_slot_does_not_see_another(llama, ids):
    positions = slot_positions(PREFIX, GROUPS)[None]
    before = in_slots(llama, ids, positions)
    changed = ids.clone()
    changed[:, PREFIX:PREFIX + 5] = 7
    after = in_slots(llama, changed, positions)
    assert torch.equal(before[:, :PREFIX], after[:, :PREFIX])
    torch.testing.assert_close(before[:, PREFIX + 5:], after[:, PREFIX + 5:], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, PREFIX:PREFIX + 5], after[:, PREFIX:PREFIX + 5])


@pytest.mark.parametrize("masked", [False, True])
def test_without_slots_it_is_sdpa(masked):
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 3, 11, 8, requires_grad=True) for _ in range(3))
    mask = torch.full((11, 11), -1e4).triu(1)[None, None] if masked else None
    ours, none = training.matmul_attention(nn.Module(), q, k, v, mask, scaling=8**-0.5)
    assert none is None
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), (q, k, v)),
                    torch.autograd.grad((theirs * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_weights_are_kept_where_asked():
    module = nn.Module()
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    training.matmul_attention(module, q, k, v, None, scaling=1.0)
    assert not hasattr(module, "weights")
    module.keep_weights = True
    training.matmul_attention(module, q, k, v, None, scaling=1.0)
    torch.testing.assert_close(module.weights, (q @ k.mT).softmax(-1))


def test_next_word_loss():
    hidden, embedding = torch.randn(2, 5, 8), torch.randn(10, 8)
    labels = torch.tensor([[-100, 3, -100, -100, 9], [1, -100, -100, 4, -100]])  # the first 1 has no word before it
    loss, accuracy = language.next_word_loss(hidden, embedding, labels)
    logits = hidden @ embedding.T
    at = [(0, 0, 3), (0, 3, 9), (1, 2, 4)]
    wanted = torch.stack([F.cross_entropy(logits[i, t], torch.tensor(word)) for i, t, word in at]).mean()
    torch.testing.assert_close(loss, wanted)
    assert accuracy == pytest.approx(sum(int(logits[i, t].argmax()) == word for i, t, word in at) / 3)


# -------------------------------------------------------------------------------------------- batches
def test_an_epoch_shows_every_sample_once():
    epochs = [torch.cat([training.batch_rows(3, 12 * e + s, 8, 96) for s in range(12)]) for e in range(2)]
    for seen in epochs:
        assert sorted(seen.tolist()) == list(range(96))
    assert epochs[0].tolist() != epochs[1].tolist()
    # batches that do not divide the samples leave some out, but show none twice
    assert torch.cat([training.batch_rows(0, s, 10, 96) for s in range(9)]).unique().numel() == 90
    assert torch.equal(training.batch_rows(3, 5, 8, 96), training.batch_rows(3, 5, 8, 96))
    assert not torch.equal(training.batch_rows(3, 5, 8, 96), training.batch_rows(4, 5, 8, 96))


def test_schedule():
    steps, warm = 1000, 40
    rates = [training.schedule(s, steps) for s in range(steps)]
    assert rates[0] == pytest.approx(1 / warm) and rates[warm - 1] == rates[warm] == 1.0
    assert all(a < b for a, b in zip(rates[:warm - 1], rates[1:warm]))
    assert all(a > b for a, b in zip(rates[warm:], rates[warm + 1:]))
    assert rates[(steps + warm) // 2] == pytest.approx(0.51)
    assert 0.02 <= rates[-1] < 0.021 and training.schedule(steps, steps) == pytest.approx(0.02)
    assert all(0 < training.schedule(s, n) <= 1 for n in (1, 2, 3) for s in range(n))


# ----------------------------------------------------------------------------------------- fit, killed
def problem():
    """A small regression: two modules, one of them partly frozen."""
    torch.manual_seed(5)
    body, head = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16)), nn.Linear(16, 2)
    body[0].bias.requires_grad_(False)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(6))
    y = torch.stack([x[:, 0] * x[:, 1], x.sum(1)], 1)

    def loss_at(step):
        rows = training.batch_rows(1, step, 16, 64)
        loss = F.mse_loss(head(body(x[rows])), y[rows])
        return loss, {"halved": loss.item() / 2}

    return [body, head], loss_at


def run(folder, loss_at=None, steps=40, **more):
    modules, default = problem()
    table = training.train("job", modules, (loss_at or (lambda d: d))(default), steps=steps, lr=1e-2, weight_decay=0.1,
                         folder=folder, log_every=7, checkpoint_steps=1, **more)
    return modules, table


def weights(modules) -> list[torch.Tensor]:
    return [v for module in modules for v in module.state_dict().values()]


class Killed(Exception):
    pass


def killed_at(step):
    def wrap(loss_at):
        def inner(now):
            if now == step:
                raise Killed
            return loss_at(now)

        return inner

    return wrap


@pytest.mark.parametrize("muon", [None, 1e-2])
@pytest.mark.parametrize("steps_done", [(0,), (1,), (17, 31), (39,)])
def test_a_killed_run_resumes_to_the_same_weights_and_curve(tmp_path, steps_done, muon):
    whole, table = run(tmp_path / "whole", muon=muon)
    for step in steps_done:
        with pytest.raises(Killed):
            run(tmp_path / "killed", killed_at(step), muon=muon)
        assert not (tmp_path / "killed" / "job" / "trained.safetensors").exists()
    again, resumed = run(tmp_path / "killed", muon=muon)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    assert table.equals(resumed) and table.step.tolist() == [0, 7, 14, 21, 28, 35, 39]
    left = sorted(p.name for p in (tmp_path / "killed" / "job").iterdir())
    assert left == ["trained.safetensors", "training.csv"]


def test_muon_takes_the_matrices_and_moves_all_their_directions_alike():
    decoder = LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, pad_token_id=0))
    named = list(decoder.named_parameters())
    adamw, muon = training.optimizers(named, 1e-3, 0.1, 1e-3)
    theirs, ours = ([p for group in o.param_groups for p in group["params"]] for o in (adamw, muon))
    assert sorted(map(id, theirs + ours)) == sorted(id(p) for _, p in named)
    assert {n for n, p in named if any(p is q for q in theirs)} == {
        n for n, _ in named if "norm" in n or "embed" in n}
    before = [p.detach().clone() for p in ours]
    decoder(input_ids=torch.arange(1, 33).view(2, 16), labels=torch.arange(1, 33).view(2, 16)).loss.backward()
    muon.step()
    for p, old in zip(ours, before, strict=True):
        values = torch.linalg.svdvals(p.detach() - old * (1 - 1e-3 * 0.1))
        gradient = torch.linalg.svdvals(p.grad)
        k = int((gradient > 0.02 * gradient[0]).sum())  # directions that the gradient has
        assert k > 5 and values[:k].max() < 2.5 * values[:k].min() and gradient[0] > 5 * gradient[k - 1]


def test_training_lowers_the_loss_and_leaves_frozen_weights(tmp_path):
    start = weights(problem()[0])
    modules, table = run(tmp_path)
    assert table.loss.iloc[-1] < 0.5 * table.loss.iloc[0]
    assert (table.stage == "job").all() and (table.halved - table.loss / 2).abs().max() < 1e-3
    changed = [not torch.equal(a, b) for a, b in zip(start, weights(modules), strict=True)]
    assert changed == [True, False, True, True, True, True]


def test_a_finished_stage_is_loaded_not_rerun(tmp_path):
    modules, table = run(tmp_path)
    again, kept = run(tmp_path, killed_at(0))  # any step would raise
    assert all(torch.equal(a, b) for a, b in zip(weights(modules), weights(again), strict=True))
    assert table.equals(kept)


def test_a_checkpoint_made_with_other_settings_is_not_used(tmp_path, capsys):
    with pytest.raises(Killed):
        run(tmp_path, killed_at(10), steps=30)
    whole, table = run(tmp_path / "whole")
    for _ in range(2):  # a part and then a whole run of 30 steps
        again, resumed = run(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
        assert table.equals(resumed)
        assert "other settings (steps: 30, now 40): is trained anew" in capsys.readouterr().err
        run(tmp_path, steps=30)


def test_watch_sees_every_step_once(tmp_path):
    seen = []
    with pytest.raises(Killed):
        run(tmp_path, killed_at(10), steps=20, watch=seen.append)
    assert seen == list(range(11))
    run(tmp_path, steps=20, watch=seen.append)
    assert seen == list(range(21))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def broken(loss_at):
        return lambda step: (loss_at(step)[0] * (math.nan if step == 3 else 1), {})

    with pytest.raises(FloatingPointError, match="job: the loss at step 4 is nan"):
        run(tmp_path, broken)


def test_a_half_written_checkpoint_is_never_read(tmp_path, monkeypatch):
    """A save that dies midway leaves the checkpoint before it, whole."""
    whole, _ = run(tmp_path / "whole")
    saved, calls = torch.save, []

    def dies(state, file):
        calls.append(file)
        if len(calls) == 20:
            saved(state, file)
            with open(file, "r+b") as out:
                out.truncate(100)
            raise Killed
        saved(state, file)

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(Killed):
        run(tmp_path / "killed")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "killed" / "job").iterdir()] == ["checkpoint.pt"]
    assert torch.load(tmp_path / "killed" / "job" / "checkpoint.pt", weights_only=True)["step"] == 19
    again, _ = run(tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_a_run_shot_dead_resumes(tmp_path):
    """SIGKILL, which no handler sees, at whatever moment it comes."""
    code = ("import sys, time, pathlib; sys.path.insert(0, sys.argv[2]); import test_training as t\n"
            "def slow(loss_at):\n    def inner(step):\n        time.sleep(0.02)\n        return loss_at(step)\n"
            "    return inner\n"
            "t.run(pathlib.Path(sys.argv[1]), slow, steps=40)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed"), os.path.dirname(__file__)],
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "job" / "checkpoint.pt").exists() and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, _ = run(tmp_path / "whole")
        again, _ = run(tmp_path / "killed")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
