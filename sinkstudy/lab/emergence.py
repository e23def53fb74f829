"""What a tower's norms and attention look like at one moment of its training, on fixed validation scenes."""

from __future__ import annotations

import pandas as pd
import torch
from scipy.stats import spearmanr

from sinkstudy import sinks
from sinkstudy.lab.tower import LAYERS, attentions, normalise, states
from sinkstudy.lab.training import five_digits
from sinkstudy.world.drawing import GRID, render

IMAGES = 192
PATCHES = GRID * GRID


def log_spaced(steps: int) -> set[int]:
    """0, 1, 2, 4, 8, … and from 64 on four values an octave, up to and with `steps`."""
    early = {0, *(2**i for i in range(6))}
    return {s for s in early | {round(64 * 2 ** (i / 4)) for i in range(40)} if s < steps} | {steps}


class Follower:
    """Measures a tower at chosen steps; `rows` are tidy: one row a step and layer."""

    def __init__(self, kind: str, at: set[int]):
        self.kind, self.at, self.rows = kind, at, []
        scenes = render("val", 0, IMAGES)
        self.pixels = normalise(scenes.images)
        self.calm = scenes.calm.flatten(1)              # [images, 144]
        self.thing = scenes.thing_share.flatten(1) > 0.5

    @torch.no_grad()
    def __call__(self, tower, step: int) -> None:
        if step not in self.at or any(row["step"] == step for row in self.rows):
            return
        for attention in attentions(tower):
            attention.keep_weights = True
        hidden, received = [], []
        for pixels in self.pixels.to(tower.device).split(48):
            hidden.append([h[:, -PATCHES:].cpu() for h in states(tower, pixels, cls=self.kind != "no-cls")[1:]])
            received.append([of.weights.float().mean(2).cpu() for of in attentions(tower)])  # [n, heads, keys] each
        for attention in attentions(tower):
            attention.keep_weights, attention.weights = False, None
        for i in range(LAYERS):
            norms = torch.cat([of[i] for of in hidden]).float().norm(dim=-1)
            alpha = torch.cat([of[i] for of in received])
            self.rows.append({"step": step, "layer": i + 1} | self._describe(norms, alpha))

    def _describe(self, norms: torch.Tensor, alpha: torch.Tensor) -> dict[str, float]:
        """norms [images, 144]; alpha [images, heads, keys], patches last."""
        outlier = sinks.mean_sd(norms)
        patches = alpha[..., -PATCHES:]
        mean = patches.mean(1)  # over heads
        most = mean.argmax(1, keepdim=True)
        n_out = outlier.sum().clamp_min(1)
        return {
            **sinks.norm_summary(norms),
            # attention received, in units of what uniform attention gives
            "attention_max": (mean.max(1).values * alpha.shape[-1]).mean().item(),
            "attention_outliers": ((mean * outlier).sum() / n_out * alpha.shape[-1]).item(),
            "attention_calm": ((mean * self.calm).sum() / self.calm.sum() * alpha.shape[-1]).item(),
            "attention_prefix": alpha[..., :-PATCHES].sum(-1).mean().item(),  # share that CLS and registers get
            "sink_epsilon": (patches > 0.3).any(-1).float().mean().item(),  # share of heads with a sink patch
            "sink_epsilon_any": (alpha > 0.3).any(-1).float().mean().item(),  # CLS and registers included
            # where they lie: share of outliers, and of most attended patches, on each kind of patch
            "outliers_on_calm": ((outlier & self.calm).sum() / n_out).item(),
            "outliers_on_things": ((outlier & self.thing).sum() / n_out).item(),
            "attended_on_calm": self.calm.gather(1, most).float().mean().item(),
            "attended_on_things": self.thing.gather(1, most).float().mean().item(),
            "norm_attention_rank": float(spearmanr(norms.flatten(), mean.flatten()).statistic),
            "calm_norm_ratio": (norms[self.calm].mean() / norms[~self.calm].median()).item(),
            "area_calm": self.calm.float().mean().item(),
            "area_things": self.thing.float().mean().item(),
        }

    def table(self) -> pd.DataFrame:
        return five_digits(pd.DataFrame(self.rows))
