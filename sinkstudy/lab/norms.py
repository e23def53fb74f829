"""Norm and content apart: does a decoder follow how long a token is, or what it says?

Sinks as the paper has them are long and hold the picture as a whole, so nobody can tell which of the two draws
attention and which is missed. Here both are set apart, two by two, on the calm patches: those of `lab-llava-gist` hold
the picture as a whole, those of `lab-llava` do not; and at the connector's input either has its direction as it is and
the norm of sinks, or that of the picture's median patch. A decoder may have learned to expect the norms that it was
trained with, so each model with changed norms stands there twice: as it is, and with a connector that was trained on to
the new norms.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import BatchFeature

from sinkstudy import stats
from sinkstudy.answers.evaluate import Intervention, Prefixes
from sinkstudy.effects import ablation
from sinkstudy.lab import arms, control, language
from sinkstudy.lab.corpus import Corpus, training_pictures
from sinkstudy.lab.train import LAB_CACHE
from sinkstudy.model import capture, loading
from sinkstudy.model.lvlm import LVLM
from sinkstudy.trained import loop
from sinkstudy.world.drawing import Scenes, render

LONG = 5.1
"""Norm of a sink of `lab-llava-gist` over the median of its picture (chapter 01)."""
TIMES = {"long": LONG, "median": 1.0}
"""The norms that calm patches are given, in medians of the picture's other patches."""
NORM_CELLS = (("lab-llava-gist", "long"), ("lab-llava-gist", "median"), ("lab-llava", "long"), ("lab-llava", "median"))
"""Models, with and without the picture's gist in the calm patches, and the norm that these have."""
AS_TRAINED = {"lab-llava-gist": "long", "lab-llava": "median"}
RETUNE = loop.Settings(steps=200, batch_size=24, lr=1e-3, weight_decay=0.05)
TUNE_SCENES = 16_384
TRACED = 64  # pictures whose attention is followed


@contextmanager
def lengthened(lvlm: LVLM, inputs: BatchFeature, masks: Sequence[torch.Tensor], times: float) -> Iterator[None]:
    """Inside, a group of patches has a given norm at the connector's input; its directions, and all others, stay.

    Args:
        inputs: of n images.
        masks: the group of each image, bool [patches].
        times: the new norm, in medians of the picture's patches outside the group.
    """
    layouts = lvlm.layout(inputs)

    def put(tokens: torch.Tensor, layer: int) -> torch.Tensor:
        tokens = tokens.clone()
        for layout, mask in zip(layouts, masks, strict=True):
            places = layout.connector.to(tokens.device)
            tokens[places] = resized(tokens[places][None], mask[None].to(tokens.device), times)[0]
        return tokens

    with lvlm.editing(before=put):
        yield


def resized(patches: torch.Tensor, mask: torch.Tensor, times: float) -> torch.Tensor:
    """Patches [n, patches, width]: those of `mask`, bool [n, patches], get `times` the median norm of the others."""
    norms = patches.float().norm(dim=-1)
    median = norms.masked_fill(mask, float("nan")).nanmedian(dim=1, keepdim=True).values
    factor = torch.where(mask, times * median / norms, torch.ones_like(norms))
    return patches * factor[..., None].to(patches)


def with_norm(name: str, calm: ablation.Masks, norm: str | None, gone: ablation.Masks | None = None) -> Intervention:
    """The calm patches of a norm, "long" or "median", or None for that which they have; and a group hidden from all."""

    def around(lvlm: LVLM, inputs: Prefixes) -> Any:
        stack = ExitStack()
        if norm is not None:
            masks = ablation.of_images(calm, inputs)
            stack.enter_context(lengthened(lvlm, inputs, masks, TIMES[norm]))
        if gone is not None:
            stack.enter_context(ablation.hide("", gone).around(lvlm, inputs))
        return stack

    return Intervention(name, around, {"norm": norm})


class _Stage(language.ImageStage):
    """Questions behind a tower whose calm patches have another norm."""

    def __init__(self, lvlm: LVLM, corpus: Corpus, pictures: np.ndarray, calm: torch.Tensor, norm: str):
        super().__init__(lvlm.model, corpus, pictures, "questions")
        self.calm, self.times = calm, TIMES[norm]

    def loss(self, rows: torch.Tensor, seed: int) -> tuple[torch.Tensor, dict]:
        self.of_batch = self.calm[rows]
        return super().loss(rows, seed)

    def visual(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return super().visual(resized(patches, self.of_batch.to(patches.device), self.times))


def retrain(name: str, norm: str) -> tuple[LVLM, pd.DataFrame]:
    """A lab model whose connector alone was trained on, with questions, to calm patches of another norm; and its curve.

    A killed training goes on from its last checkpoint.
    """
    lvlm = loading.load(name)
    lvlm.model.set_attn_implementation("lab_matmul")
    calm = render("train", 0, TUNE_SCENES, pictures=False).calm.flatten(1)
    stage = _Stage(lvlm, Corpus(TUNE_SCENES), training_pictures(LAB_CACHE, TUNE_SCENES), calm, norm)
    lvlm.model.requires_grad_(False)
    lvlm.connector.requires_grad_(True)
    log = arms.fit_stage(stage.loss, lvlm.model, TUNE_SCENES, LAB_CACHE / f"norms.{name}.{norm}", RETUNE, muon=None)
    lvlm.model.eval().set_attn_implementation("sdpa")
    return lvlm, log


def cell(lvlm: LVLM, norm: str | None, scenes: Scenes) -> pd.DataFrame:
    """What a model answers, attends to and loses when its calm patches have a norm.

    Args:
        norm: "long", "median", or None for the norm that the patches have.

    Returns:
        A row each for gist and local questions: `about`; `right` (%); `lost` (points, without the calm patches less
        without as many random ones) with `low` and `high`; `attention`, from the tokens of the answer on a calm patch
        over that on another, with `attention_low` and `attention_high`; 95 % intervals over pictures, see `stats`.
    """
    pictures = {str(i): image for i, image in enumerate(scenes.images)}
    calm, chance = control.calm_and_random(scenes)
    table = control.questions_by_family(scenes, 0)
    ways = [with_norm("as it is", calm, norm), with_norm("calm", calm, norm, calm),
            with_norm("random", calm, norm, chance)]
    right = control.right_answers(lvlm, table, scenes, ways)
    rows = []
    for about, of in right.groupby("about", sort=False):
        lost = stats.mean_interval((of.calm - of.random).to_numpy(), clusters=of.image_id.to_numpy())
        drawn = attention_on_calm(lvlm, table[table.about == about], pictures, calm, norm, control.BATCH)
        rows.append({"about": about, "questions": len(of), "right": of["as it is"].mean(), "lost": lost.value,
                     "low": lost.low, "high": lost.high, "attention": drawn.value, "attention_low": drawn.low,
                     "attention_high": drawn.high})
    return pd.DataFrame(rows)


def attention_on_calm(lvlm: LVLM, table: pd.DataFrame, pictures: Mapping[str, torch.Tensor], calm: ablation.Masks,
                      norm: str | None, batch_size: int) -> stats.Interval:
    """Attention of the answer's tokens on a calm patch over that on another, mean over heads and layers."""
    table = table[table.image_id.astype(int) < TRACED].drop_duplicates("image_id")
    numerator, denominator = [], []
    for start in range(0, len(table), batch_size):
        of = table.iloc[start : start + batch_size]
        masks = [calm[i] for i in of.image_id]
        images = [pictures[i] for i in of.image_id]
        inputs = lvlm.inputs(images, list(of.question))
        with nullcontext() if norm is None else lengthened(lvlm, inputs, masks, TIMES[norm]):
            seen = capture.trace(lvlm, images, list(of.question), 4, len(of))
        for attention, mask in zip(seen.output_attention.mean((1, 2)), masks, strict=True):  # [patches]
            numerator.append(attention[mask].mean().item())
            denominator.append(attention[~mask].mean().item())
    return stats.ratio_interval(numerator, denominator)


def all_cells() -> tuple[pd.DataFrame, pd.DataFrame]:
    """All cells, and the curves of the connectors that were trained on.

    Returns:
        The rows of `cell` with `model`, `norm` ("long" or "median") and `connector` ("as it is" or "trained on"); and
        those of `loop.fit` with `model` and `norm`.
    """
    scenes, cells, logs = render("test", 0, control.USED), [], []
    for model, norm in NORM_CELLS:
        changed = norm != AS_TRAINED[model]
        found = cell(loading.load(model), norm if changed else None, scenes)
        cells.append(found.assign(model=model, norm=norm, connector="as it is"))
        if changed:
            lvlm, log = retrain(model, norm)
            cells.append(cell(lvlm, norm, scenes).assign(model=model, norm=norm, connector="trained on"))
            logs.append(log.assign(model=model, norm=norm))
    return pd.concat(cells, ignore_index=True), pd.concat(logs, ignore_index=True)
