"""What a rule for sinks picks out of a tower: how many patches, which ones, and whether other tokens attend to them.

`look` follows pictures through a tower, `by_rule` says which patches are sinks by each rule. The other functions set
these masks against the pictures, against each other and against the attention; they return long tables, a row a
measured value, with the index of its `image`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch

from sinkstudy import sinks, stats
from sinkstudy.model import capture, groups
from sinkstudy.model.lvlm import LVLM
from sinkstudy.world import drawing

RUN_RULE = "rule of this run"
COMPARED_RULES = ("absolute", "mean + 3 sd", "top 2 %", "× median", "norm drop", "attention")  # that every run compares
SCORES = ("precision", "recall", "jaccard")


@dataclass(frozen=True)
class Seen:
    """What a tower made of pictures."""

    norms: torch.Tensor  # [images, layers, patches], L2 norm after each layer
    received: torch.Tensor  # the same shape, attention received in units of uniform attention, mean over heads
    read: torch.Tensor  # bool [images, patches]: those that the decoder gets; others are padding, and no sinks
    layer: int  # index of the layer whose output the connector reads

    @property
    def top(self) -> torch.Tensor:
        """Norms at the connector's input: [images, patches]."""
        return self.norms[:, self.layer]

    @property
    def relative(self) -> torch.Tensor:
        """The same in units of the picture's median."""
        return self.top / groups.median(self.top, self.read)

    @property
    def attention(self) -> torch.Tensor:
        """Attention received in the layer that makes the connector's input: [images, patches]."""
        return self.received[:, self.layer]


def look(lvlm: LVLM, pictures: Sequence[Any], batch_size: int = 16) -> Seen:
    """Follow pictures through the tower.

    Raises:
        ValueError: as `capture.trace_tower`.
    """
    norms, received, layouts = capture.trace_tower(lvlm, pictures, batch_size)
    return Seen(norms, received.mean(2), groups.all_read(layouts), lvlm.feature_layer)


def by_rule(seen: Seen, *, criterion: str, threshold: float, tau: float) -> dict[str, torch.Tensor]:
    """Which patches the connector reads as sinks, by `RUN_RULE` and each of `COMPARED_RULES`: bool [images, patches].

    Args:
        criterion, threshold: the rule of the run, see `sinks.rule`; `threshold` is also that of "× median".
        tau: the norm of "absolute".

    Raises:
        ValueError: as `sinks.rule`.
    """
    rules: dict[str, Callable[..., torch.Tensor]] = {
        RUN_RULE: sinks.rule(criterion, threshold),
        "absolute": partial(sinks.absolute, tau=tau),
        "mean + 3 sd": sinks.mean_sd,
        "top 2 %": partial(sinks.percentile, q=98),
        "× median": partial(sinks.above_median, ratio=threshold),
        "norm drop": sinks.norm_drop,
    }
    found = {name: groups.judged(rule, seen.top, seen.read) for name, rule in rules.items()}
    return found | {"attention": sinks.attended(seen.attention, 1.0, 5.0) & seen.read}


def by_layer(seen: Seen) -> pd.DataFrame:
    """The distribution of the norms after each layer, all pictures together, without what is padding in one of them.

    Returns:
        A row a layer: `layer` (from 1), `connector` (bool: it reads this layer's output), what `sinks.norm_summary`
        gives, and `max`.
    """
    rows = [{"layer": layer + 1, "connector": layer == seen.layer, **sinks.norm_summary(of), "max": of.max().item()}
            for layer, of in enumerate(seen.norms[..., seen.read.all(0)].unbind(1))]
    return pd.DataFrame(rows)


def counts(masks: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """How many sinks each rule finds in a picture: `rule`, `image`, `value`."""
    parts = [pd.DataFrame({"rule": rule, "image": range(len(mask)), "value": mask.sum(1)})
             for rule, mask in masks.items()]
    return pd.concat(parts, ignore_index=True)


def with_some(counts: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Share of the pictures in which a rule finds a sink, 0 to 1, with Wilson's interval.

    Args:
        counts: of `counts`, a row a picture.
        by: columns that name a cell.

    Returns:
        `by`, `value`, `low`, `high`, `n` (images).
    """
    rows = [(*cell, *stats.wilson(int((of.value > 0).sum()), len(of)))
            for cell, of in counts.groupby(list(by), sort=False)]
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n"])


# --- where they lie ---


def places(scenes: drawing.Scenes | None, tiles: int, grid: tuple[int, int], n: int) -> dict[str, torch.Tensor]:
    """Kinds of places on pictures: bool [images, patches] by kind.

    Calm patches, things and part textures exclude one another; they are the lab's, and known where the model cuts its
    scenes into the lab's patches. The outermost ring of patches overlaps them.

    Args:
        scenes: the lab's; None for other pictures.
        tiles, grid: how a picture is cut, see `ImageLayout`.
        n: the number of pictures.
    """
    ring = torch.ones(grid, dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    border = {"picture border" if tiles == 1 else "tile border": ring.flatten().repeat(tiles).expand(n, -1)}
    if scenes is None or (tiles, *grid) != (1, drawing.GRID, drawing.GRID):
        return border
    calm, things = scenes.calm.flatten(1), scenes.thing_share.flatten(1) > 0
    return {"calm patches": calm, "things": things & ~calm, "part textures": ~things & ~calm} | border


def lie_on(masks: Mapping[str, torch.Tensor], places: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """On which kinds of places the sinks lie.

    Returns:
        A row for each rule, place and sink: `rule`, `place`, `image`, `value` (100 or 0, so that means are in %). A
        picture without a sink has one row, without a value.
    """
    parts = []
    for rule, mask in masks.items():
        without = (~mask.any(1)).nonzero()[:, 0]
        image = torch.cat([mask.nonzero()[:, 0], without])
        for place, inside in places.items():
            value = torch.cat([100 * inside[mask].float(), torch.full((len(without),), float("nan"))])
            parts.append(pd.DataFrame({"rule": rule, "place": place, "image": image, "value": value}))
    return pd.concat(parts, ignore_index=True)


def against(masks: Mapping[str, torch.Tensor], right: torch.Tensor) -> pd.DataFrame:
    """Marks for each rule where it is known which patches are the sinks.

    Args:
        right: bool [images, patches].

    Returns:
        A row for each rule, measure and image: `rule`, `measure` (of `SCORES`), `image`, `value`. Precision is the
        share of the sinks found that are right, NaN where none is found; recall the share of the right ones found.
    """
    parts = []
    for rule, mask in masks.items():
        hit = (mask & right).sum(1).float()
        values = (hit / mask.sum(1), hit / right.sum(1), sinks.jaccard(mask, right))
        parts += [pd.DataFrame({"rule": rule, "measure": measure, "image": range(len(mask)), "value": of})
                  for measure, of in zip(SCORES, values, strict=True)]
    return pd.concat(parts, ignore_index=True)


# --- norm and attention ---


def attention(seen: Seen, masks: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """Mean attention that sinks at the connector's input and all other patches receive, in every layer.

    Returns:
        A row for each rule, layer and image: `rule`, `layer` (from 1), `image`, `inside` (sinks; NaN where there are
        none) and `outside`, in units of uniform attention. `chapter.ratios` makes estimates of them.
    """
    layer, image = (of.flatten() for of in np.mgrid[1 : seen.received.shape[1] + 1, : len(seen.received)])
    parts = []
    for rule, mask in masks.items():
        inside, outside = (groups.mean(seen.received, of[:, None]).T.flatten() for of in (mask, ~mask & seen.read))
        parts.append(pd.DataFrame({"rule": rule, "layer": layer, "image": image, "inside": inside, "outside": outside}))
    return pd.concat(parts, ignore_index=True)


def rank_correlation(seen: Seen) -> pd.DataFrame:
    """Spearman's correlation of norm and attention over the patches of each picture: `image`, `value`."""
    pairs = zip(seen.top.numpy(), seen.attention.numpy(), strict=True)
    return pd.DataFrame([{"image": image, "value": scipy.stats.spearmanr(*pair).statistic}
                         for image, pair in enumerate(pairs)])


def natural_sink(rows: pd.DataFrame) -> pd.DataFrame:
    """What a natural sink needs, by a rule that was fixed before looking: each condition, and `sink`, all three.

    Args:
        rows: of a log of `data/emergence`, see `lab.emergence`.

    Returns:
        Bool, with the index of `rows`: `norm`, a largest norm of at least 3 medians; `attention`, outliers that receive
        at least 5 times uniform attention; `low information`, outliers that lie on calm patches more than three times
        as often as chance, while fewer than half lie on things.
    """
    of = pd.DataFrame({
        "norm": rows.max_over_median >= 3, "attention": rows.attention_outliers >= 5,
        "low information": (rows.outliers_on_calm > 3 * rows.area_calm) & (rows.outliers_on_things < 0.5)})
    return of.assign(sink=of.all(axis=1))


# --- pictures to draw ---


def pixels(picture: Any) -> np.ndarray:
    """A picture to draw on: uint8 [rows, columns, 3]. One of a folder becomes a square of 336 pixels."""
    if torch.is_tensor(picture):
        return picture.permute(1, 2, 0).numpy()
    return np.asarray(picture.open().resize((336, 336)))


def outlines(mask: torch.Tensor, size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """The boxes of sinks on a picture that `imshow` drew: left, top, width and height, in pixels.

    Args:
        mask: bool [rows of patches, columns of patches].
        size: rows and columns of pixels.
    """
    high, wide = size[0] / mask.shape[0], size[1] / mask.shape[1]
    return [(j * wide - 0.5, i * high - 0.5, wide, high) for i, j in mask.nonzero().tolist()]  # pixel 0 begins at −0.5
