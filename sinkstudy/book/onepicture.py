"""One picture from the vision tower to the answer: a row of linked panels for each model, the same patch in each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import ConnectionPatch, Rectangle

from sinkstudy.analyses import probing, relevance
from sinkstudy.book import chapter, report
from sinkstudy.book.explorer import Explored
from sinkstudy.model.groups import median
from sinkstudy.model.lvlm import LVLM

PANELS = {"norm": "norm in the tower,\n× median", "seen": "who attends to it\nin the tower, %",
          "decoder": "attention from the\nprompt's end, %", "true": "alone: a word true\nof the picture (green)"}
"""The maps, in the order of the way of a token, and their titles."""


@dataclass(frozen=True)
class Followed:
    """What becomes of a picture in a model, and of the patch of its highest norm at the connector's input."""

    patch: tuple[int, int]  # row, column
    group: str  # whose tokens the answers go without, the patch among them: "sinks", or "top 2 %" where there are none
    maps: dict[str, torch.Tensor]  # of `PANELS`, [rows, columns]; of several tiles the first
    word: str  # that the patch's token is decoded to, alone
    answers: pd.DataFrame  # `type`, `answer`, and its probability `before`, `without` the group, without `random` ones


def follow(lvlm: LVLM, picture: Any, asked: pd.DataFrame, seen: Explored, truth: set[str]) -> Followed:
    """Follow a picture through a model.

    Args:
        picture: as in `LVLM.inputs`.
        asked: its questions, `type` and `answer`.
        seen: of `explorer.explore`, of the picture with these questions.
        truth: words that are true of it; empty if they are not known.
    """
    rows, columns = seen.layout.grid
    norms = seen.maps["tower_norm"][lvlm.feature_layer]
    top = int(norms[: rows * columns].argmax())
    attending = 100 * relevance.relevance_maps(lvlm, picture, [top], lvlm.feature_layer)[:, 0].mean(0)  # [patches]
    said = _said(lvlm, picture, seen)
    maps = {"norm": norms / median(norms, seen.layout.read), "seen": attending,
            "decoder": seen.maps["decoder_attention"].mean((0, 1)), "true": torch.tensor([w in truth for w in said])}
    group = "sinks" if "sinks" in seen.outcomes else "top_2_percent"
    before, gone = seen.outcomes[None].p, seen.outcomes[group]
    answers = pd.DataFrame({"type": asked.type.to_numpy(), "answer": asked.answer.to_numpy(), "before": before,
                            "without": gone.p, "random": gone.random.mean(0)})
    maps = {name: of[: rows * columns].float().view(rows, columns) for name, of in maps.items()}
    return Followed(divmod(top, columns), group.replace("_2_percent", " 2 %"), maps, said[top], answers)


def _said(lvlm: LVLM, picture: Any, seen: Explored) -> list[str]:
    """The word that each patch's token is decoded to alone; "–" where no token stands alone (`probing.words`)."""
    if lvlm.spec.deepstack:
        return ["–"] * len(seen.layout.vision)
    words = seen.layout.lower(probing.words(lvlm, [picture])[0].alone)
    return [lvlm.processor.decode([word]).strip().lower() or "(blank)" for word in words.tolist()]


def table(followed: Mapping[str, Followed]) -> pd.DataFrame:
    """What the panels show of the outlined patch, and the answers: a row a model and question."""
    parts = []
    for name, of in followed.items():
        at = {panel: of.maps[panel][of.patch].item() for panel in ("norm", "decoder")}
        parts.append(of.answers.assign(model=name, group=of.group, row=of.patch[0], column=of.patch[1], **at,
                                       attending=of.maps["seen"].mean().item(), word=of.word,
                                       word_true=bool(of.maps["true"][of.patch])))
    return pd.concat(parts, ignore_index=True)


def draw(picture: np.ndarray, followed: Mapping[str, Followed]) -> mpl.figure.Figure:
    """A row a model: the picture, [height, width, 3], maps with the same patch outlined and linked, and the answers."""
    ratios = [1] * (1 + len(PANELS)) + [1.1]
    fig, axes = plt.subplots(len(followed), len(ratios), figsize=(10.5, 1.9 * len(followed) + 0.8), squeeze=False,
                             width_ratios=ratios)
    for (name, of), row in zip(followed.items(), axes, strict=True):
        rows, columns = of.maps["norm"].shape
        row[0].imshow(picture, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
        row[0].set_ylabel(name)
        _link(fig, row, of)
        _answers(row[-1], of)
        row[len(PANELS)].set_xlabel(f"outlined: {of.word}", fontsize="small")
    for column, (panel, title) in enumerate(PANELS.items(), start=1):
        most = max(of.maps[panel].max().item() for of in followed.values())
        for of, ax in zip(followed.values(), axes[:, column], strict=True):
            true = {"vmax": 1, "cmap": ListedColormap([f"{report.INK}40", chapter.GREEN])}
            image = ax.imshow(of.maps[panel], vmin=0, **(true if panel == "true" else {"vmax": most}))
        axes[0, column].set_title(title, fontsize="small")
        if panel != "true":
            fig.colorbar(image, ax=axes[:, column].tolist(), location="bottom", shrink=0.9, aspect=14)
    plt.setp(axes[:, :-1], xticks=[], yticks=[])
    axes[0, 0].set_title("picture", fontsize="small")
    axes[0, -1].set_title("probability of\nthe right answer", fontsize="small")
    dots = {"as it is": report.INK} | {f"without {of.group}": chapter.colour(of.group) for of in followed.values()}
    handles = [mpl.lines.Line2D([], [], marker="o", ls="", ms=5, color=of, label=name) for name, of in dots.items()]
    handles.append(mpl.lines.Line2D([], [], marker="o", ls="", mfc="none", color=report.INK, label="without random"))
    fig.legend(handles=handles, loc="lower right", fontsize="x-small", ncols=2, columnspacing=0.8, handletextpad=0)
    return fig


def _link(fig: mpl.figure.Figure, row: Sequence[Any], of: Followed) -> None:
    """Outline the patch in every map, and lead from each to the next."""
    y, x = of.patch
    colour = chapter.colour(of.group)
    for ax in row[:-1]:
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, ec=colour, lw=2))
    for here, there in pairwise(row):
        end: tuple[Any, Any] = ((0, 0.5), there.transAxes) if there is row[-1] else ((x - 0.5, y), "data")
        way = ConnectionPatch((x + 0.5, y), end[0], "data", end[1], axesA=here, axesB=there,
                              arrowstyle="->", color=colour, lw=0.9, mutation_scale=8)
        way.set_in_layout(False)
        fig.add_artist(way)


def _answers(ax: Any, of: Followed) -> None:
    """Three dots a question: as it is, without the group, without as many random tokens."""
    at, colour = np.arange(len(of.answers)), chapter.colour(of.group)
    ax.hlines(at, of.answers.without, of.answers.before, color=colour, lw=1)
    ax.plot(of.answers.before, at, "o", ms=5, color=report.INK)
    ax.plot(of.answers.random, at, "o", ms=8, mfc="none", color=report.INK)
    ax.plot(of.answers.without, at, "o", ms=5, color=colour)
    named = zip(of.answers.type, of.answers.answer, strict=True)
    labels = [f"{kind}:\n{answer}" if isinstance(answer, str) else kind for kind, answer in named]
    ax.set(xlim=(-0.05, 1.05), ylim=(len(at) - 0.5, -0.5), xticks=[0, 0.5, 1])
    ax.set_yticks(at, labels, fontsize="x-small")
    ax.tick_params(labelsize="x-small")
    ax.yaxis.tick_right()
