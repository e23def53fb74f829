"""How towers and decoders of the lab are trained from nothing: attention, optimizers, batches; the loop is `loop`'s."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from sinkstudy import devices
from sinkstudy.trained import loop

BETAS = (0.9, 0.98)  # of AdamW


def autocast() -> torch.autocast:
    """bfloat16 autocast where the hardware multiplies bfloat16 natively, float32 elsewhere."""
    return torch.autocast(device().type, torch.bfloat16, enabled=devices.fast_bfloat16(device()))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matmul_attention(module, query, key, value, attention_mask, scaling=None, slots=None, pad=None, pictures=None,
                     **kwargs):
    """Attention as plain matrix products: on a CPU its backward is several times faster than SDPA's.

    Args:
        query, key, value: [batch, heads, tokens, width].
        attention_mask: None (all to all) or additive; ignored with `slots`.
        slots: (prefix, ((number, length), …)): a causal prefix, then slots that see the prefix and themselves
            but not each other, so that many questions about one picture cost one picture.
        pad: bool [batch, prefix], True where the prefix is padding.
        pictures: the one row of tokens is that of so many pictures of equal size, which do not see each other.
    """
    if pictures is not None:
        query, key, value = (t[0].unflatten(1, (pictures, -1)).transpose(0, 1) for t in (query, key, value))
    query = query * scaling
    if slots is None:
        scores = torch.matmul(query, key.transpose(-1, -2))  # [batch, heads, queries, keys]
        if attention_mask is not None:
            scores = scores + attention_mask.to(scores.dtype)
        weights = torch.softmax(scores, -1, dtype=scores.dtype)
        if getattr(module, "keep_weights", False):
            module.weights = weights
        return torch.matmul(weights.to(value.dtype), value).transpose(1, 2).contiguous(), None

    prefix, groups = slots
    hidden = None if pad is None else -1e4 * pad[:, None, None].to(query.dtype)  # [batch, 1, 1, prefix]
    key_p, value_p = key[:, :, :prefix], value[:, :, :prefix]
    scores = query[:, :, :prefix] @ key_p.transpose(-1, -2) + _causal(prefix, query)
    scores = scores if hidden is None else scores + hidden
    out = [scores.softmax(-1, dtype=scores.dtype) @ value_p]
    at = prefix
    for number, length in groups:
        part = slice(at, at + number * length)
        q = query[:, :, part]
        to_prefix = q @ key_p.transpose(-1, -2)  # [batch, heads, number · length, prefix]
        to_prefix = to_prefix if hidden is None else to_prefix + hidden
        q, k, v = (t.unflatten(2, (number, length)) for t in (q, key[:, :, part], value[:, :, part]))
        own = q @ k.transpose(-1, -2) + _causal(length, query)  # [batch, heads, number, length, length]
        weights = torch.cat([to_prefix.unflatten(2, (number, length)), own], -1)
        weights = weights.softmax(-1, dtype=weights.dtype)
        out.append(weights[..., :prefix].flatten(2, 3) @ value_p + (weights[..., prefix:] @ v).flatten(2, 3))
        at = part.stop
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def _causal(n: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((n, n), -1e4, dtype=like.dtype, device=like.device).triu(1)


AttentionInterface.register("lab_matmul", matmul_attention)
AttentionMaskInterface.register("lab_matmul", eager_mask)  # additive, as the products need it


def schedule(step: int, steps: int, warmup: float = 0.04, floor: float = 0.02) -> float:
    """Linear warm-up, then cosine to `floor`, as a share of the peak learning rate."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train(name: str, modules: Sequence[nn.Module], loss_at: Callable[[int], tuple[torch.Tensor, dict]], *,
          steps: int, lr: float, weight_decay: float, folder: Path, muon: float | None = None, log_every: int = 20,
          checkpoint_steps: int = 50, watch: Callable[[int], None] | None = None) -> pd.DataFrame:
    """Train the modules' parameters that ask for gradients; returns the loss curve, a row every `log_every` steps.

    Args:
        loss_at: step -> (loss, what to log). Must depend on the step alone (and the seed), never on what went
            before, so that a resumed run sees the same batches.
        muon: learning rate of Muon for the weight matrices, see `optimizers`; AdamW alone if None.
        folder: what a stage leaves there stands in `<name>`, see `loop.descend`; a finished one is read, not rerun.
        watch: called with the number of steps done: at 0 and after each step.

    Raises:
        FloatingPointError: the loss is not finite.
    """

    def gradients(step: int) -> dict[str, float]:
        loss, values = loss_at(step)
        loss.backward()
        return {"loss": loss.item(), **values}

    log = loop.descend(
        folder / name, {n: p for n, p in nn.ModuleList(modules).named_parameters() if p.requires_grad}, gradients,
        steps=steps, optimizers=lambda named: optimizers(named, lr, weight_decay, muon), clip=1.0,
        rate=lambda step: schedule(step, steps), checkpoint_steps=checkpoint_steps, watch=watch,
        known={"lr": lr, "weight_decay": weight_decay, "muon": muon})
    log = log.drop(columns="lr").assign(step=log.step - 1)
    log.insert(0, "stage", name)
    return five_digits(log[(log.step % log_every == 0) | (log.step == steps - 1)].reset_index(drop=True))


def five_digits(table: pd.DataFrame) -> pd.DataFrame:
    """The table, its floats with five significant digits."""
    return table.assign(**table.select_dtypes(float).map(lambda value: float(f"{value:.5g}")))


def optimizers(named: list[tuple[str, nn.Parameter]], lr: float, weight_decay: float, muon: float | None) -> list:
    """AdamW for all parameters; with `muon`, Muon (Jordan et al. 2024) at that rate for the weight matrices.

    Muon makes all singular values of an update equal, so that directions of little variance are learned too: the
    lab's decoder learns to read pictures in a third of the steps. Embeddings, biases, norms and the heads of a tower
    stay with AdamW, and the update's size is matched to AdamW's (Liu et al. 2025, 2502.16982).
    """
    if muon is None:
        return [loop.adamw(named, lr, weight_decay, betas=BETAS)]
    if not devices.fast_bfloat16(device()):
        torch.optim._muon._zeropower_via_newtonschulz = _orthogonal
    matrices, rest = [], []
    for name, p in named:
        probe = "_head." in name and "lm_head." not in name  # a tower's heads, which are left behind after its training
        (matrices if p.dim() == 2 and "embed" not in name and not probe else rest).append(p)
    return [torch.optim.AdamW(rest, lr=lr, betas=BETAS, weight_decay=0.0, fused=True),
            torch.optim.Muon(matrices, lr=muon, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]


def _orthogonal(gradient: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float,
                ) -> torch.Tensor:
    """Muon's Newton-Schulz iteration in float32. torch runs it in bfloat16, which takes a processor without it twenty
    times as long, more than the rest of a step."""
    a, b, c = coefficients
    x = gradient.T if gradient.shape[0] > gradient.shape[1] else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if gradient.shape[0] > gradient.shape[1] else x


def batch_rows(seed: int, step: int, batch: int, n: int) -> torch.Tensor:
    """The rows of step `step`: without replacement within each pass over the n samples."""
    epoch, place = divmod(step, n // batch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + epoch))
    return order[place * batch:(place + 1) * batch]


def threads() -> None:
    """Sets torch to the cores this process may use (OMP_NUM_THREADS, if it is set)."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", available)))


def compiled(function: Callable) -> Callable:
    """The function through torch.compile where a C++ compiler is there: the decoder trains 1.7 times faster."""
    return torch.compile(function, dynamic=False) if shutil.which("g++") else function
